"""The whole attack on one observed update, with nothing but what a server knows."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ggl_jax.adversary import estimation
from ggl_jax.adversary.labels import infer_labels, public_expectations
from ggl_jax.adversary.search import run_stages
from ggl_jax.adversary.strategy import AttackSettings, make_stages, result_images
from ggl_jax.types import Model, Prior, Problem, PyTree, View

# The search's stream and that of the public samples.
_SEARCH, _PUBLIC = 0, 1


class Reconstruction(NamedTuple):
    """What a server gets out of an update.

    Attributes:
        images: [b h w c] float32 in [0, 1], in no particular order.
        labels: [b] the inferred classes.
        loss: the attack's whole loss at the result, or at the best restart where the result is the
            mean image of all.
        distance: the distance of updates there.
        estimated: the defense's estimated parameters.
        evaluations: gradient evaluations spent.
        history: [steps] lowest loss so far.
        status: one of ``ggl_jax.types.OK``, ``NONFINITE``, ``STALLED``.
    """

    images: np.ndarray
    labels: np.ndarray
    loss: float
    distance: float
    estimated: PyTree
    evaluations: int
    history: np.ndarray
    status: int


def reconstruct(
    key: jax.Array,
    update: PyTree,
    *,
    model: Model,
    variables: PyTree,
    prior: Prior,
    prior_params: PyTree,
    view: View,
    settings: AttackSettings | None = None,
    batch_size: int = 1,
    local_steps: int = 1,
    local_learning_rate: float = 0.01,
    statistics: PyTree | None = None,
    mesh: jax.sharding.Mesh | None = None,
    callback: Callable[[int, jax.Array], None] | None = None,
) -> Reconstruction:
    """Attack an update: infer labels and the defense's parameters, then search the prior.

    Args:
        key: typed key.
        update: the observed update, a pytree like ``variables["params"]``; the sum of the local
            gradients (weights before minus weights after, divided by the step size).
        model: the federated model.
        variables: its weights that the update was computed at.
        prior: the generator.
        prior_params: its parameters.
        view: of the kind of defense that the server takes the client to use.
        settings: the search.
        batch_size: images behind the update.
        local_steps: SGD steps behind it.
        local_learning_rate: their step size.
        statistics: the batch's BatchNorm statistics, where the client shared them; read by attacks
            with ``batch_norm`` in their regulariser.
        mesh: as for :func:`ggl_jax.run_search`.
        callback: ``callback(steps_done, losses[1])``.

    Returns:
        A :class:`Reconstruction`.

    Raises:
        GGLError: NaN or infinity in the update, or a setting out of its range.
    """
    settings = settings or AttackSettings()
    estimation.check_finite(update)
    public: dict[str, jax.Array] = {}
    if batch_size > 1:
        public = jax.jit(public_expectations, static_argnums=(0, 2))(
            model, variables, prior, prior_params, jax.random.fold_in(key, _PUBLIC)
        )
    labels = infer_labels(
        update,
        model.head,
        batch_size=batch_size,
        num_steps=local_steps,
        fidelity=settings.fidelity,
        **public,
    )
    estimated = estimation.estimate(view, update, model.head)
    noise = estimation.noise_level(view, estimated)
    stages, _ = make_stages(
        settings,
        model,
        prior,
        view,
        batch_size=batch_size,
        local_steps=local_steps,
        local_learning_rate=local_learning_rate,
    )
    outcome = run_stages(
        stages,
        jax.random.fold_in(key, _SEARCH)[None],
        [Problem(update, variables, prior_params, labels, estimated, noise, statistics)],
        mesh=mesh,
        callback=callback,
    )
    return Reconstruction(
        images=result_images(settings, view, stages, outcome)[0],
        labels=np.asarray(outcome.labels[0]),
        loss=float(outcome.losses[0]),
        distance=float(outcome.distances[0]),
        estimated=estimated,
        evaluations=outcome.evaluations,
        history=np.asarray(outcome.history[0]),
        status=int(outcome.status[0]),
    )
