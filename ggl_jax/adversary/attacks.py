"""Reconstruction attacks: an optimiser, a matching loss and a prior, composed.

A new attack is one function that returns an :class:`ggl_jax.types.Attack` and one line in
:data:`ATTACKS`.
"""

import jax
import jax.numpy as jnp

from ggl_jax.adversary.losses import parse_regularizer
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.adversary.optimizers import BestState, best_so_far
from ggl_jax.errors import GGLError
from ggl_jax.types import Attack, Defense, Model, Optimizer, Prior

STARTS = ("zeros", "prior", "uniform")


def ggl(
    model: Model,
    prior: Prior,
    optimizer: Optimizer,
    *,
    defense: Defense | None = None,
    batch_size: int = 1,
    restarts: int = 1,
    start: str = "zeros",
    bound: str = "none",
    distance: str = "squared_l2",
    regularizer: str = "kld:0.1",
    fidelity: str = "paper",
    method: str = "auto",
    local_steps: int = 1,
    local_learning_rate: float = 0.01,
    chunk_size: int | None = None,
) -> Attack:
    """Generative gradient leakage: search the prior's latents for the matching gradient.

    The adversary minimises, over latents z, the distance between the observed update and the
    update that the image G(z) would cause with the inferred label, after the estimated defense is
    applied to the candidate's own gradient, plus a regulariser that keeps z plausible.

    Args:
        model: the federated model.
        prior: the generator G.
        optimizer: the search; the attack remembers the candidate of lowest loss.
        defense: how a candidate's gradient is transformed before comparison (with the parameters
            in ``problem.estimated``); None for a non-adaptive attack.
        batch_size: images per observed update, at least 1; a candidate is then a batch, and its
            latents are concatenated.
        restarts: independent searches in one batch, at least 1; the lowest loss wins.
        start: "zeros" (first restart at 0, the others sampled from the prior; published at 32x32),
            "prior" (all sampled), or "uniform" (U[0, 1], published at 224x224).
        bound: "none", or "tanh" to search an unbounded vector whose tanh is the latent (published
            at 224x224).
        distance: "squared_l2" (D1) or "cosine" (D2).
        regularizer: a weighted sum by name such as "kld:0.1+norm:1e-4"; "none" for none.
        fidelity: "paper", or "code" for the published code's forms of distance and regulariser.
        method: "auto", "fused" or "direct" evaluation of the matching loss.
        local_steps: SGD steps in the client's update; 1 for a plain gradient.
        local_learning_rate: their step size.
        chunk_size: candidates evaluated at once; None chooses by memory.

    Returns:
        An :class:`Attack`.

    Raises:
        GGLError: for an unknown ``start`` or ``bound``, or a count below 1.

    Reference:
        Paper, section 3, equations 3 to 6 (the transformation-aware search).
    """
    if batch_size < 1 or restarts < 1:
        raise GGLError(f"batch_size, restarts: got {batch_size}, {restarts}, allowed: at least 1")
    if start not in STARTS:
        raise GGLError(f"start: got {start!r}, allowed: {', '.join(STARTS)}")
    if bound not in ("none", "tanh"):
        raise GGLError(f"bound: got {bound!r}, allowed: none, tanh")
    search = best_so_far(optimizer)
    regularize = parse_regularizer(regularizer, fidelity=fidelity)
    latent_dim = prior.latent_dim

    def to_latents(points):
        return jnp.tanh(points) if bound == "tanh" else points

    def images_of(problem, points):
        """Points [n, batch_size * z] to images [n, batch_size, h, w, c]."""
        num = points.shape[0]
        latents = to_latents(points).reshape(num * batch_size, latent_dim)
        images = prior.apply(problem.prior_params, latents, jnp.tile(problem.labels, num))
        return images.reshape(num, batch_size, *images.shape[1:])

    def loss_fn_of(problem):
        variables = problem.variables
        if defense is not None and defense.rewire is not None:
            variables = defense.rewire(problem.estimated, variables, model.head)
        distance_to = matching_loss(
            model,
            variables,
            problem.observed,
            defense=defense,
            estimated=problem.estimated,
            distance=distance,
            fidelity=fidelity,
            method=method,
            chunk_size=chunk_size,
            local_steps=local_steps,
            learning_rate=local_learning_rate,
        )

        def loss_fn(points):
            images = images_of(problem, points)
            num = points.shape[0]
            labels = jnp.broadcast_to(problem.labels, (num, batch_size))
            latents = to_latents(points).reshape(num, batch_size, latent_dim)
            return distance_to(images, labels) + regularize(latents, images)

        return loss_fn

    def init(key, problem):
        del problem
        key_start, key_search = jax.random.split(key)
        if start == "uniform":
            points = jax.random.uniform(key_start, (restarts, batch_size * latent_dim))
        else:
            points = prior.sample_latent(key_start, restarts * batch_size)
            points = points.reshape(restarts, batch_size * latent_dim)
            if start == "zeros":
                points = points.at[0].set(0.0)
        return search.init(key_search, points)

    def step(key, problem, state):
        return search.step(key, state, loss_fn_of(problem))

    def decode(problem, state: BestState):
        return images_of(problem, state.latent[None])[0], state.loss

    return Attack(
        init=init,
        step=step,
        decode=decode,
        evaluations_per_step=optimizer.evaluations_per_step(restarts),
        name="ggl",
    )


ATTACKS = {"ggl": ggl}
