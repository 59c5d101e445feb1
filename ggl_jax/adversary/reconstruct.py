"""The adversary's whole part: from what clients shared to images, knowing what a server knows."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import trees
from ggl_jax.adversary import estimation
from ggl_jax.adversary.attack import reads
from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.labels import (
    check_told,
    infer_labels,
    public_expectations,
    smallest_labels,
    softmax_form,
)
from ggl_jax.adversary.matching.factored import FACTORED, as_data
from ggl_jax.adversary.regression import read
from ggl_jax.adversary.resume import Checkpoints
from ggl_jax.adversary.search import Stage, run_stages
from ggl_jax.adversary.stages import combines, fits, make_stages, refines, result_images
from ggl_jax.client.local import gradients_summed
from ggl_jax.client.share import update_program
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client, Search, Speed, replace
from ggl_jax.types import Attack, Model, Prior, Problem, Public, PyTree, Shared, View


class Reconstruction(NamedTuple):
    """What a server gets out of an update.

    Attributes:
        images: [b h w c] float32 in [0, 1], in no particular order.
        labels: [b] the inferred classes, in the images' order.
        loss: the attack's whole loss at the result, or at the best restart where the result is the
            mean image of all.
        distance: the distance of updates there.
        evaluations: gradient evaluations spent.
        history: [steps] lowest loss so far.
        status: one of ``ggl_jax.types.OK``, ``NONFINITE``, ``STALLED``.
        seconds: wall-clock time of the search, shared evenly by those of its batch.
        search: whether it was "adaptive", its "optimizer" and "bound", and whether the result is
            the restarts' mean ("combined"), was refined in pixels ("refined", in the last
            "refinement_steps"), and whether the generator's fit has a part in it ("fitted"); of
            attack strongest, whose it is ("won") and each attack's :func:`mismatch`
            ("mismatches"), and evaluations and seconds are those of all.
        point: [p], the result in the space that the search's last stage searched.
        attack: of that stage.
        problem: what the search worked on.
        estimated: the defense's estimated parameters; of several rounds those of the first.
    """

    images: np.ndarray
    labels: np.ndarray
    loss: float
    distance: float
    evaluations: int
    history: np.ndarray
    status: int
    seconds: float
    search: Mapping[str, Any]
    point: jax.Array
    attack: Attack
    problem: Problem
    estimated: PyTree


class Prepared(NamedTuple):
    """A search made ready.

    Attributes:
        stages: of :func:`ggl_jax.run_stages`.
        about: its options that results show.
    """

    stages: list[Stage]
    about: dict[str, Any]

    @property
    def evaluations(self) -> int:
        """Gradient evaluations of one search, if it does not end early."""
        return sum(
            s.attack.evaluations_at_start + s.steps * s.attack.evaluations_per_step
            for s in self.stages
        )


def _several(search: Search, view: View, client: Client) -> list[Search]:
    """The searches of attack strongest; none of any other."""
    found = members(search, view)
    if found and client.rounds > 1:
        raise GGLError(
            f"rounds: got {client.rounds}, allowed: 1 under attack strongest, which compares the "
            "updates of one round; choose one attack"
        )
    return found


# Searches of the same objects, one after the other, share their compiled programs.
@functools.lru_cache(maxsize=64)
def prepare(
    model: Model,
    prior: Prior,
    view: View,
    client: Client,
    search: Search,
    speed: Speed = Speed(),  # noqa: B008 (it cannot change)
    compared: View | None = None,
) -> Prepared:
    """The search that :func:`reconstruct` runs for ``speed.instances`` updates on each device.

    Raises:
        GGLError: an option out of its range, or options that do not go together.
    """
    several = _several(search, view, client)
    if several:
        each = [prepare(model, prior, view, client, one, speed) for one in several]
        return Prepared([stage for one in each for stage in one.stages], {})
    stages = make_stages(search, model, prior, view, compared=compared, client=client, speed=speed)
    refined = refines(search, view)
    return Prepared(
        stages,
        {
            "adaptive": search.adaptive,
            "optimizer": search.optimizer.partition(":")[0],
            "bound": search.bound,
            "combined": combines(search, view),
            "refined": refined,
            "refinement_steps": stages[-1].steps if refined else 0,
            "fitted": fits(search, view),
        },
    )


_expectations = jax.jit(public_expectations, static_argnums=(0, 2))
_labels = jax.jit(infer_labels, static_argnums=1, static_argnames=("batch_size", "num_steps"))


def expectations(key: jax.Array, public: Public) -> dict[str, jax.Array]:
    """What the model makes of samples of the prior: by it a batch's labels are told apart."""
    return _expectations(public.model, public.variables, public.prior, public.prior_params, key)


def _problem(public: Public, one: Shared, view: View, client: Client, search: Search) -> Problem:
    """What a client shared, with the labels and the defense's parameters that it tells."""
    model, known = public.model, (public.variables, public.prior_params)
    estimation.check_finite(one.update)
    observed, estimated, noise = estimation.pooled(
        view, one.update, public.variables["params"], model.head, client.rounds
    )
    check_told(model, observed, searched=search.labels == "searched")
    update, head = softmax_form(model, observed)
    if search.labels == "smallest":
        labels = smallest_labels(update, head, client.batch_size)
    else:
        labels = _labels(
            update,
            tuple(head),
            batch_size=client.batch_size,
            num_steps=gradients_summed(client) or 1,
            # Only the labels of several images need them; one image's is read off directly.
            **(public.expected or {} if client.batch_size > 1 else {}),
        )
    return Problem(observed, *known, labels, estimated, noise, one.statistics)


def _as_compared(
    public: Public, problems: Sequence[Problem], view: View, search: Search
) -> tuple[View | None, list[Problem]]:
    """The view by which candidates are compared, and problems with its parameters.

    Many defenses share one, and with it a compiled program; None is the defense's own.
    """
    if not search.adaptive:
        return None, [problem._replace(estimated=()) for problem in problems]
    known = public.variables, public.model.head
    forms = [as_data(view, problem.estimated, *known) for problem in problems]
    if any(form is None for form in forms):
        return None, list(problems)
    found = zip(problems, forms, strict=True)
    return FACTORED, [problem._replace(estimated=form) for problem, form in found]


def mismatch(found: Reconstruction, *, public: Public, view: View, client: Client) -> float:
    """How far a result's own update lies from the observed one, in one way for every attack.

    The squared l2 distance of the result's update, put through the estimated defense (on the
    support, where there is one), to the observed update, over the squared norm of that. It takes
    what a server knows, so that one may choose among attacks by it; attacks' own losses differ in
    distances and penalties.

    Args:
        found: of :func:`reconstruct`.
        public: as there, like ``view`` and ``client``.
        view: of the kind of defense.
        client: what is behind an update.

    Returns:
        At least 0; 0 where the update is met, 1 for an update of zero. Under noise, of the private
        image itself the noise's share.
    """
    observed, view = found.problem.observed, view.comparing(True)
    estimated = estimation.estimate(view, observed, public.model.head)
    variables = public.variables
    if view.rewire is not None:
        variables = view.rewire(estimated, variables, public.model.head)
    own = update_program(public.model, client)(variables, found.images, found.labels)
    own = view.simulate(estimated, own)
    return float(trees.sq_distance(own, observed) / trees.total(trees.sq_norms(observed)))


def _nearest(
    names: Sequence[str],
    found: Sequence[Reconstruction],
    public: Public,
    view: View,
    client: Client,
) -> Reconstruction:
    """The result, of several attacks on one update, of lowest mismatch."""
    misfits = [mismatch(one, public=public, view=view, client=client) for one in found]
    number = int(np.argmin(np.where(np.isnan(misfits), np.inf, misfits)))
    about = {"won": names[number], "mismatches": dict(zip(names, misfits, strict=True))}
    return found[number]._replace(
        evaluations=sum(one.evaluations for one in found),
        seconds=sum(one.seconds for one in found),
        search={**found[number].search, **about},
    )


def _strongest(
    several: Sequence[Search],
    keys: jax.Array,
    public: Public,
    shared: Sequence[Shared],
    checkpoints: Checkpoints | None,
    report: Callable,
    options: Mapping[str, Any],
) -> list[Reconstruction]:
    """Every attack on every update, by :func:`reconstruct` with the other options as they are."""
    found = []
    for number, one in enumerate(several):

        def part(phase, fraction, loss, number=number, name=one.attack):
            report(f"{name}: {phase}", (number + fraction) / len(several), loss)

        own = None if checkpoints is None else checkpoints.part(one.attack)
        given = {**options, "search": one, "checkpoints": own, "progress": part}
        found.append(reconstruct(keys, public, shared, **given))
    names, known = [one.attack for one in several], (public, options["view"], options["client"])
    return [_nearest(names, each, *known) for each in zip(*found, strict=True)]


def reconstruct(
    keys: jax.Array,
    public: Public,
    shared: Sequence[Shared],
    *,
    view: View,
    client: Client | None = None,
    search: Search | None = None,
    speed: Speed | None = None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Callable[[str, float, float | None], None] | None = None,
) -> list[Reconstruction]:
    """Attack updates: infer labels and the defense's parameters, then search the prior.

    Several updates are searched for in one batched program. What is found for one does not depend
    on the others but for rounding.

    Args:
        keys: [i] typed keys, one for each update.
        public: what the server has; what it expects is drawn by the first key, where it is None
            and several images are behind an update.
        shared: ``i`` updates of clients that did the same.
        view: of the kind of defense that the server takes the clients to use.
        client: how many images and local steps are behind an update, and in how many rounds the
            client shared one; these are attacked as their mean
            (:func:`ggl_jax.adversary.estimation.pooled`).
        search: how to search; None for GGL as published.
        speed: how losses are computed.
        mesh: as for :func:`ggl_jax.run_search`, like ``checkpoints``.
        progress: ``progress(phase, fraction, loss)``, called as it goes on; the loss is the mean
            over the updates of the lowest so far, None outside the search.

    Returns:
        One :class:`Reconstruction` for each update.

    Raises:
        GGLError: an update with NaN or infinity, or one that tells nothing; a setting out of its
            range; several rounds that cannot be attacked together.
    """
    client, search, speed = client or Client(), search or Search(), speed or Speed()

    def report(phase, fraction=0.0, loss=None):
        if progress is not None:
            progress(phase, fraction, loss)

    report("label and defense estimation")
    if client.batch_size > 1 and public.expected is None:
        public = public._replace(expected=expectations(jax.random.fold_in(keys[0], 1), public))
    several = _several(search, view, client)
    if several:
        options = {"view": view, "client": client, "speed": speed, "mesh": mesh}
        return _strongest(several, keys, public, shared, checkpoints, report, options)
    view = view.comparing(search.support)
    problems = [_problem(public, one, view, client, search) for one in shared]
    readings = []
    for number, problem in enumerate(problems if reads(search) else []):
        readings.append(
            read(
                public,
                problem,
                view if search.adaptive else None,
                client,
                search.bank,
                lambda share: report("gradients of the bank", share),
            )
        )
        problems[number] = problem._replace(guess=readings[-1].guess)
    estimates = [problem.estimated for problem in problems]
    if client.rounds > 1:  # as one round shows them, beside which the client's record stands
        firsts = [estimation.of_round(one.update, 0) for one in shared]
        estimates = [estimation.estimate(view, one, public.model.head) for one in firsts]
    compared, problems = _as_compared(public, problems, view, search)
    report("compiling the search")
    began = time.perf_counter()
    per_device = -(-len(problems) // (1 if mesh is None else mesh.size))
    speed = replace(speed, instances=per_device)
    ready = prepare(public.model, public.prior, view, client, search, speed, compared)
    steps = sum(stage.steps for stage in ready.stages)
    outcome = run_stages(
        ready.stages,
        keys,
        problems,
        mesh=mesh,
        checkpoints=checkpoints,
        callback=lambda done, losses: report("search", done / steps, float(jnp.mean(losses))),
    )
    images = result_images(search, view, outcome, public)
    seconds = (time.perf_counter() - began) / len(problems)
    return [
        Reconstruction(
            images=images[i],
            labels=np.asarray(outcome.labels[i]),
            loss=float(outcome.losses[i]),
            distance=float(outcome.distances[i]),
            evaluations=outcome.evaluations,
            history=np.asarray(outcome.history[i]),
            status=int(outcome.status[i]),
            seconds=seconds,
            search=ready.about | ({"predicted_rmse": readings[i].rmse} if readings else {}),
            point=outcome.candidates.points[i, 0],
            attack=ready.stages[-1].attack,
            problem=problem,
            estimated=estimates[i],
        )
        for i, problem in enumerate(outcome.problems)
    ]
