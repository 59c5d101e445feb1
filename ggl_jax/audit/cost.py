"""What a sweep would cost: counts, and the time by a short calibration (``--dry-run``)."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax.adversary import estimation
from ggl_jax.adversary.search import Stage, default_steps_per_call, run_search
from ggl_jax.audit.controls import prior_controls
from ggl_jax.audit.runner import ClientSettings, build_programs, default_instances
from ggl_jax.audit.sweep import Grid, SweepCell, batches
from ggl_jax.errors import GGLError
from ggl_jax.priors import fit_latents
from ggl_jax.types import Candidates, Problem


class Estimate(NamedTuple):
    """What a sweep would cost, as measured by a short calibration.

    Attributes:
        cells: number of cells left to run.
        evaluations: gradient evaluations of their searches.
        seconds: estimated wall-clock time on this machine, a rough figure.
        measured: kinds of search stages that were measured, of ``kinds``.
        kinds: search stages that cost alike count as one.
        programs: distinct programs to compile.
    """

    cells: int
    evaluations: int
    seconds: float
    measured: int
    kinds: int
    programs: int


class _Kind(NamedTuple):
    """Stages of searches that cost alike: same work for each evaluation, as many in each step.

    Attributes:
        formed: the defense needs each candidate's gradient, not only its layers' norms and inner
            products; that is slower.
        speed: the settings that change speed alone.
    """

    attack: str
    optimizer: str
    formed: bool
    evaluations_per_step: int
    evaluations_at_start: int
    client: ClientSettings
    speed: tuple


class _Pace(NamedTuple):
    """What a stage costs: seconds of one search in a batch to start and for a step, and to compile.

    ``candidates`` are what its few steps found, for the next stage to start from.
    """

    start: float
    step: float
    once: float
    candidates: Candidates | None = None


def _stages(grid: Grid, cell: SweepCell) -> list[tuple[_Kind, Stage]]:
    """The stages of a cell's search."""
    own, defense = cell.settings, cell.defense
    programs = build_programs(grid.model, grid.prior, defense, cell.client, own)
    return [
        (
            _Kind(
                stage.attack.name,
                programs.search["optimizer"],
                bool(programs.search["adaptive"]) and defense.view.factor is None,
                stage.attack.evaluations_per_step,
                stage.attack.evaluations_at_start,
                cell.client,
                (own.method, own.precision, own.chunk_size, own.memory),
            ),
            stage,
        )
        for stage in programs.stages
    ]


def estimate(
    grid: Grid,
    *,
    finished: Sequence[str] = (),
    seconds: float = 15.0,
    mesh: jax.sharding.Mesh | None = None,
) -> Estimate:
    """What a grid would cost here: counts, and roughly the time, by a short calibration.

    Stages of searches that cost alike are measured once, by a few steps, the heaviest cells'
    first. What no time was left for is taken to be as fast, per evaluation, as what was measured.
    Judging and writing the results is left out. Expect an error of tens of percent, more where
    the machine is busy with other work, now or then.

    Args:
        grid: of :func:`ggl_jax.audit.sweep.plan`.
        finished: cells to leave out.
        seconds: after which no further stage is measured; one is in any case.
        mesh: as for :func:`ggl_jax.audit.sweep.run`.

    Raises:
        GGLError: nothing could be measured.
    """
    known = set(finished)
    cells = [cell for cell in grid.cells if cell.id not in known]
    by_program: dict[tuple, list[SweepCell]] = {}
    for cell in cells:
        by_program.setdefault(cell.program, []).append(cell)
    groups = [group for group in by_program.values() if group[0].evaluations]
    groups.sort(key=lambda group: -sum(cell.evaluations for cell in group))
    paces: dict[_Kind, _Pace] = {}
    shares: list[_Pace] = []
    ends = time.perf_counter() + seconds
    kinds = {kind for group in groups for kind, _ in _stages(grid, group[0])}
    for group in groups:
        if paces and _is_over(ends):
            break
        if all(kind in paces for kind, _ in _stages(grid, group[0])):
            continue
        batch = next(batches(group, default_instances(grid.model, mesh)))
        # A cell that cannot run will say why when it does.
        with contextlib.suppress(Exception):
            _measure(grid, batch, shares, paces, ends, mesh)
    if groups and not paces:
        raise GGLError("the calibration failed in every program; run one cell by ggl-jax audit")
    total = 0.0
    for group in groups:
        each = float(np.mean([pace.start for pace in shares]))
        once = float(np.mean([pace.once for pace in shares]))
        for kind, stage in _stages(grid, group[0]):
            pace = paces.get(kind) or _guess(kind, paces)
            each += pace.start + pace.step * stage.steps
            once += pace.once
        total += each * len(group) + once
    controls = {(c.seed, image) for c in cells for image in c.images}
    return Estimate(
        cells=len(cells),
        evaluations=sum(cell.evaluations for cell in cells),
        seconds=total + (_time_controls(grid, cells[0]) * len(controls) if cells else 0.0),
        measured=len(paces),
        kinds=len(kinds),
        programs=len(by_program),
    )


def _guess(kind: _Kind, paces: Mapping[_Kind, _Pace]) -> _Pace:
    """The pace of stages that were not measured: that of others, per evaluation."""
    alike = {k: p for k, p in paces.items() if k.formed == kind.formed} or paces
    step = float(np.mean([p.step / k.evaluations_per_step for k, p in alike.items()]))
    pools = [p.start / n for k, p in alike.items() if (n := k.evaluations_at_start)]
    return _Pace(
        start=kind.evaluations_at_start * (float(np.mean(pools)) if pools else step),
        step=kind.evaluations_per_step * step,
        once=float(np.mean([p.once for p in alike.values()])),
    )


def _is_over(ends: float) -> bool:
    """Whether the calibration's time is up, by the clock of process 0."""
    over = time.perf_counter() > ends
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        over = multihost_utils.broadcast_one_to_all(np.asarray(over))
    return bool(over)


def _seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return jax.block_until_ready(function()), time.perf_counter() - began


def _measure(
    grid: Grid,
    cells: Sequence[SweepCell],
    shares: list[_Pace],
    paces: dict[_Kind, _Pace],
    ends: float,
    mesh,
) -> None:
    """Add the paces of a client's update, and of a batch's stages until time is up."""
    cell = cells[0]
    programs = build_programs(grid.model, grid.prior, cell.defense, cell.client, cell.settings)
    key = jax.random.key(cell.seed)
    images = np.asarray(grid.images[list(cell.images)])
    labels = np.asarray(grid.labels[list(cell.images)], np.int32)
    variables = jax.jit(grid.model.init)(key) if grid.variables is None else grid.variables

    def share():
        observed, _ = programs.share(key, variables, images, labels)
        return observed, estimation.estimate(cell.defense.view, observed, grid.model.head)

    (observed, estimated), first = _seconds(share)
    _, again = _seconds(share)
    shares.append(_Pace(start=again, step=0.0, once=max(0.0, first - again)))
    # Time does not depend on whether the labels are right, so none are inferred.
    problem = Problem(observed, variables, grid.prior_params, jnp.asarray(labels), estimated)
    before: Candidates | None = None
    for kind, stage in _stages(grid, cell):
        if kind not in paces:
            if paces and _is_over(ends):
                break
            points = None
            if stage.enter is not None and before is not None:
                points = jnp.repeat(stage.enter(before)[:1], len(cells), axis=0)
            paces[kind] = _measure_stage(stage, [problem] * len(cells), points, mesh)
        before = paces[kind].candidates


def _measure_stage(stage: Stage, problems: list[Problem], points, mesh) -> _Pace:
    per_call = min(default_steps_per_call(), stage.steps)

    def search(calls):
        """The result, and the seconds until the first call's end, of further ones, and after."""
        ticks = [time.perf_counter()]

        def tick(done, losses):
            jax.block_until_ready(losses)
            ticks.append(time.perf_counter())

        found = run_search(
            stage.attack,
            jax.random.split(jax.random.key(0), len(problems)),
            problems,
            steps=calls * per_call,
            points=points,
            steps_per_call=per_call,
            mesh=mesh,
            callback=tick,
        )
        jax.block_until_ready(found.candidates)
        ticks.append(time.perf_counter())
        first, *further, last = np.diff(ticks)
        return found, first, further, last

    found, first, further, last = search(3)
    call = min(further, default=first)
    # Its own start is only as long as the pool's evaluation.
    start = max(0.0, search(1)[1] - call) if stage.attack.evaluations_at_start else 0.0
    once = max(0.0, first - start - call) + last
    return _Pace(start / len(problems), call / per_call / len(problems), once, found.candidates)


def _time_controls(grid: Grid, cell: SweepCell) -> float:
    """Seconds for one image's controls, from few samples and a short fit."""
    image, label = grid.images[cell.images[0]], int(grid.labels[cell.images[0]])
    num, steps = min(8, grid.num_controls), min(2, grid.ceiling_steps)
    given = (grid.prior, grid.prior_params)

    def controls():
        key = jax.random.key(0)
        return prior_controls(
            *given, image, label, key, num_samples=num, ceiling_steps=steps
        ).scores

    def fit():
        key, labels = jax.random.key(0), np.asarray([label])
        return fit_latents(*given, image[None], key, steps=steps, num_candidates=4, labels=labels)

    (_, _), (_, fitting) = _seconds(fit), _seconds(fit)
    (_, _), (_, whole) = _seconds(controls), _seconds(controls)
    # Samples for the mean image and to start the fit from, as prior_controls draws them.
    drawn = [min(2048, 8 * n) + min(4096, 16 * n) for n in (num, grid.num_controls)]
    sampling = max(0.0, whole - fitting) * drawn[1] / drawn[0]
    return sampling + fitting / (steps + 1) * (grid.ceiling_steps + 1)
