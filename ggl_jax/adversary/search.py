"""Drives an attack's steps: from the host on CPU, in compiled chunks on accelerators."""

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import files
from ggl_jax.adversary.resume import Checkpoints, Saved
from ggl_jax.adversary.sharding import Layout
from ggl_jax.errors import GGLError
from ggl_jax.types import NONFINITE, OK, STALLED, Attack, Candidates, Problem, PyTree

#: Which parts of a problem differ between the instances of one batch: each client has its own
#: update and labels, while the global model and the prior are shared.
_INSTANCE_AXES: Any = Problem(*cast(Any, [0] * len(Problem._fields)))._replace(
    variables=None, prior_params=None
)


class SearchResult(NamedTuple):
    """Outcome of :func:`run_search` for ``i`` instances.

    Attributes:
        candidates: each restart's best, [i r ...], lowest loss first.
        evaluations: gradient evaluations spent on each instance.
        history: [i steps], lowest loss so far after each step.
        status: [i], OK, NONFINITE (some step had no candidate of finite loss) or STALLED.
        problems: what was worked on, [i] of them.
    """

    candidates: Candidates
    evaluations: int
    history: jax.Array
    status: jax.Array
    problems: Sequence[Problem] = ()

    @property
    def images(self) -> jax.Array:
        """[i b h w c], the candidates of lowest loss."""
        return self.candidates.images[:, 0]

    @property
    def losses(self) -> jax.Array:
        """[i], their losses."""
        return self.candidates.losses[:, 0]

    @property
    def distances(self) -> jax.Array:
        """[i], their distances, without regularisers."""
        return self.candidates.distances[:, 0]

    @property
    def labels(self) -> jax.Array:
        """[i b], the classes that go with them."""
        return self.candidates.labels[:, 0]


def default_steps_per_call() -> int:
    """Optimiser steps in one compiled call.

    XLA runs a convolution inside a loop on one CPU thread only, so CPUs are stepped from the host;
    accelerators keep a chunk of steps on the device and meet the host once in a chunk.
    """
    return 1 if jax.default_backend() == "cpu" else 25


@functools.lru_cache(maxsize=64)
def _compiled(attack: Attack, batched: bool):
    def advance(key: jax.Array, problem: Problem, state: PyTree, first: jax.Array, num: int):
        def body(state, index):
            state, info = attack.step(jax.random.fold_in(key, index), problem, state)
            return state, (jnp.min(state.losses), info.status)

        if num == 1:
            state, report = body(state, first)
            return state, jax.tree.map(lambda x: x[None], report)
        return jax.lax.scan(body, state, first + jnp.arange(num))

    init, candidates = attack.init, attack.candidates
    if not batched:
        return jax.jit(init), jax.jit(advance, static_argnums=4), jax.jit(candidates)

    def advance_all(keys, problems, states, first, num):
        each = functools.partial(advance, first=first, num=num)
        return jax.vmap(each, in_axes=(0, _INSTANCE_AXES, 0))(keys, problems, states)

    return (
        jax.jit(jax.vmap(init, in_axes=(0, _INSTANCE_AXES, 0))),
        jax.jit(advance_all, static_argnums=4),
        jax.jit(jax.vmap(candidates, in_axes=(_INSTANCE_AXES, 0))),
    )


#: Share of a Linux process' memory mappings at which compiled programs are given up.
MAPPINGS_SHARE = 0.6


def release_programs(share: float = MAPPINGS_SHARE) -> bool:
    """Give up compiled programs before the process runs out of memory mappings.

    XLA's CPU backend maps every compiled function by itself, some thousands for one search, and
    Linux allows a process 65,530 by default: a run of some twenty different searches would die in
    LLVM with "Cannot allocate memory". Programs needed again are compiled again, or read from the
    compilation cache.

    Args:
        share: of the mappings that the system allows, in [0, 1].

    Returns:
        Whether programs were given up; False where the system does not count mappings.
    """
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as file:
            used = sum(1 for _ in file)
    except (OSError, ValueError):
        return False
    if used <= share * limit:
        return False
    jax.clear_caches()
    gc.collect()
    return True


def stack_problems(problems: list[Problem]) -> Problem:
    """Stack the instances' own parts, such as updates and labels, along a new first axis."""
    own = [p._replace(variables=None, prior_params=None) for p in problems]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *own)
    return stacked._replace(variables=problems[0].variables, prior_params=problems[0].prior_params)


def run_search(
    attack: Attack,
    keys: jax.Array,
    problems: list[Problem],
    *,
    steps: int,
    points: jax.Array | None = None,
    steps_per_call: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    callback: Callable[[int, jax.Array], None] | None = None,
) -> SearchResult:
    """Run an attack on one or more instances that share model, prior and defense.

    Several instances run in one batched program. An instance's random stream is its own key's, so
    it does not depend on which others it is batched with.

    Args:
        attack: from :mod:`ggl_jax.adversary.attacks`.
        keys: [i] typed keys, one for each instance.
        problems: ``i`` problems with the same ``variables`` and ``prior_params``.
        steps: optimiser steps, at least 1.
        points: [i r p], starting points that replace the attack's own.
        steps_per_call: steps per compiled call; None for :func:`default_steps_per_call`.
        mesh: devices to share the work out to: the instances where there are as many as devices,
            else each step's candidates. Results are those of one device but for rounding. With
            several processes each has to make the same call, and gets the same results.
        checkpoints: where the state is kept from time to time; the same call goes on from the last
            one. None keeps none.
        callback: ``callback(steps_done, losses[i])`` after each call.

    Returns:
        A :class:`SearchResult`.

    Edge cases:
        The search ends early when no step of a call was OK in any instance: all were non-finite,
        or the optimiser had nowhere left to go. An instance whose best loss did not improve at all
        after its first step is marked STALLED.
    """
    if steps < 1:
        raise GGLError(f"steps: got {steps}, allowed: whole numbers of at least 1")
    layout = Layout(mesh, len(problems))
    worked_on, problems = problems, layout.pad([jax.tree.map(jnp.asarray, p) for p in problems])
    batched = len(problems) > 1
    init, advance, candidates = _compiled(attack, batched)
    problem = stack_problems(problems) if batched else problems[0]
    pairs = jax.vmap(jax.random.split)(jnp.stack(layout.pad(list(keys))))
    key_start, key = (pairs[:, 0], pairs[:, 1]) if batched else (pairs[0, 0], pairs[0, 1])
    if points is not None:
        points = jnp.stack(layout.pad(list(points))) if batched else points[0]
    name, saved = "", None
    own = problem._replace(variables=None, prior_params=None)
    if checkpoints is not None:
        name = files.digest(attack.name, steps, jax.tree.leaves((keys, points, own)))
        saved = checkpoints.load(name, jax.eval_shape(init, key_start, problem, points))
    key_start, key, points = layout.instances((key_start, key, points))
    problem = layout.instances(own)._replace(
        variables=layout.shared(problem.variables),
        prior_params=layout.shared(problem.prior_params),
    )
    history, statuses, done = [], [], 0
    if saved is None:
        with layout.active():
            state = init(key_start, problem, points)
    else:
        state, done = layout.instances(saved.state), saved.done
        history, statuses = [jnp.asarray(saved.history)], [jnp.asarray(saved.statuses)]
    per_call = min(steps_per_call or default_steps_per_call(), steps)
    while done < steps:
        num = min(per_call, steps - done)
        with layout.active():
            state, report = advance(key, problem, state, np.int32(done), num)
        report = report if batched else jax.tree.map(lambda x: x[None], report)
        losses, status = layout.fetch(report)
        history.append(losses)
        statuses.append(status)
        done += num
        if callback is not None:
            callback(done, losses[:, -1])
        if bool(jnp.all(status != OK)):
            break
        if checkpoints is not None and layout.agree(checkpoints.due(done == steps)):
            past = (np.concatenate(history, axis=1), np.concatenate(statuses, axis=1))
            checkpoints.save(name, Saved(done, layout.whole(state), *past))
    with layout.active():
        found = candidates(problem, state)
    found = layout.fetch(found if batched else jax.tree.map(lambda x: x[None], found))
    all_losses = jnp.concatenate(history, axis=1)
    failed = jnp.max(jnp.concatenate(statuses, axis=1), axis=1)
    flat = (all_losses.shape[1] > 1) & (all_losses[:, -1] >= all_losses[:, 0])
    return SearchResult(
        candidates=found,
        # given points are not drawn from a pool
        evaluations=(attack.evaluations_at_start if points is None else 0)
        + done * attack.evaluations_per_step,
        history=all_losses,
        status=jnp.where(failed != OK, failed, jnp.where(flat, STALLED, OK)),
        problems=worked_on,
    )


class Stage(NamedTuple):
    """One part of a search that goes through several.

    Attributes:
        attack: the attack.
        steps: optimiser steps, at least 1.
        enter: ``enter(candidates) -> points[i r p]``, its starting points made of the
            :class:`Candidates` [i r ...] that the stage before found; None for the attack's own.
        revise: ``revise(problem, candidates) -> problem`` of each instance, by what the stage
            before found for it, [r ...]; None for the same problem.
        begin: ``begin(keys[i], problems) -> points[i r p]``, a first stage's starting points, made
            of the problems; None for the attack's own.
        accept: ``accept(problem, first, lowest) -> bool``, whether what is found for an instance
            counts, by the losses at its start and its end; else what the stage before found is
            kept. None to take it.
    """

    attack: Attack
    steps: int
    enter: Callable | None = None
    revise: Callable | None = None
    accept: Callable | None = None
    begin: Callable | None = None


def run_stages(
    stages: Sequence[Stage],
    keys: jax.Array,
    problems: list[Problem],
    *,
    mesh: jax.sharding.Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    callback: Callable[[int, jax.Array], None] | None = None,
) -> SearchResult:
    """Run the stages of a search, each from where the one before came to.

    Args:
        stages: at least one.
        keys: [i], as for :func:`run_search`.
        problems: as for :func:`run_search`.
        mesh: as for :func:`run_search`.
        checkpoints: as for :func:`run_search`.
        callback: ``callback(steps_done, losses[i])``, with the steps of all stages.

    Returns:
        The last stage's :class:`SearchResult`, with the evaluations of all stages, their histories
        one after the other (a regulariser that one stage lacks makes a jump), and the first stage's
        status, or NONFINITE where a later one broke down.
    """
    results: list[SearchResult] = []
    done = 0
    for number, stage in enumerate(stages):
        points = None if stage.begin is None else stage.begin(keys, problems)
        if stage.enter is not None and results:
            points = stage.enter(results[-1].candidates)
        if stage.revise is not None and results:
            found = jax.tree.map(np.asarray, results[-1].candidates)
            problems = [
                stage.revise(problem, jax.tree.map(lambda x, i=i: x[i], found))
                for i, problem in enumerate(problems)
            ]

        def advanced(steps, losses, before=done):
            if callback is not None:
                callback(before + steps, losses)

        results.append(
            run_search(
                stage.attack,
                keys if number == 0 else jax.vmap(jax.random.fold_in, (0, None))(keys, number),
                problems,
                steps=stage.steps,
                points=points,
                mesh=mesh,
                checkpoints=None if checkpoints is None else checkpoints.stage(number),
                callback=advanced,
            )
        )
        if stage.accept is not None and len(results) > 1:
            last = results[-1]
            losses = zip(problems, last.history[:, 0], last.losses, strict=True)
            taken = np.asarray([bool(stage.accept(*one)) for one in losses])

            def choose(new, old, taken=taken):
                return jnp.where(taken.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            kept = jax.tree.map(choose, last.candidates, results[-2].candidates)
            results[-1] = last._replace(candidates=kept)
        done += stage.steps
    status = results[0].status
    for result in results[1:]:
        # A later stage that finds nothing better leaves what was found as it is.
        broke = (status == OK) & (result.status == NONFINITE)
        status = jnp.where(broke, NONFINITE, status)
    return results[-1]._replace(
        evaluations=sum(result.evaluations for result in results),
        history=jnp.concatenate([result.history for result in results], axis=1),
        status=status,
    )
