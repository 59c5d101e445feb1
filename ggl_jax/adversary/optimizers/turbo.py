"""TuRBO-1: Bayesian optimisation in one trust region, written from the paper."""

import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.adversary.optimizers.base import make_info, require
from ggl_jax.adversary.optimizers.gaussian_process import fit, sample_posterior
from ggl_jax.spec import AtLeast, Count, Positive, ranged
from ggl_jax.types import Optimizer

#: Side of the trust region, in units of the box: at the start, at most, and where it is given up.
LENGTH_START, LENGTH_MAX, LENGTH_MIN = 0.8, 1.6, 2.0**-7
#: A success must lower the best loss by this share of its magnitude (the published setting).
IMPROVEMENT = 1e-3


class TrustRegion(NamedTuple):
    """How far to look around the best point.

    Attributes:
        length: side of the region before scaling, in units of the box.
        successes: rounds in a row that improved.
        failures: rounds in a row that did not.
    """

    length: jax.Array
    successes: jax.Array
    failures: jax.Array


class TurboState(NamedTuple):
    """State of :func:`turbo`, with a first axis of ``r`` restarts.

    Attributes:
        points: [r n z], evaluated points in the unit cube.
        losses: [r n], their losses; +inf for empty rows and failed candidates.
        design: [r m z], the Latin hypercube of the current run, in the unit cube.
        rounds: [r], rounds since the run began.
        region: the trust region, each field [r].
    """

    points: jax.Array
    losses: jax.Array
    design: jax.Array
    rounds: jax.Array
    region: TrustRegion


def start_region() -> TrustRegion:
    """The trust region of a new run."""
    zero = jnp.asarray(0, jnp.int32)
    return TrustRegion(jnp.asarray(LENGTH_START, jnp.float32), zero, zero)


def update_region(
    region: TrustRegion, improved: jax.Array, *, success_tolerance: int, failure_tolerance: int
) -> TrustRegion:
    """Double the side after enough successes in a row, halve it after enough failures.

    Args:
        region: before the round.
        improved: whether the round's best loss is a success, bool scalar.
        success_tolerance: successes in a row that double the side (at most :data:`LENGTH_MAX`).
        failure_tolerance: failures in a row that halve it.

    Returns:
        The region after the round. A side below :data:`LENGTH_MIN` ends the run.

    Reference:
        Eriksson et al. (2019), section 2.
    """
    successes = jnp.where(improved, region.successes + 1, 0)
    failures = jnp.where(improved, 0, region.failures + 1)
    grow, shrink = successes >= success_tolerance, failures >= failure_tolerance
    length = jnp.where(grow, jnp.minimum(2 * region.length, LENGTH_MAX), region.length)
    return TrustRegion(
        length=jnp.where(shrink, length / 2, length),
        successes=jnp.where(grow, 0, successes),
        failures=jnp.where(shrink, 0, failures),
    )


def latin_hypercube(key: jax.Array, num: int, num_dims: int) -> jax.Array:
    """[num z] points of the unit cube, one in each of ``num`` slices along every axis."""
    key_order, key_place = jax.random.split(key)
    slices = jnp.broadcast_to(jnp.arange(num)[:, None], (num, num_dims))
    slices = jax.random.permutation(key_order, slices, axis=0, independent=True)
    return (slices + jax.random.uniform(key_place, (num, num_dims))) / num


def candidates_around(
    key: jax.Array, centre: jax.Array, lengthscale: jax.Array, length: jax.Array, num: int
) -> jax.Array:
    """Random candidates in the trust region.

    Side i of the region is ``length * lengthscale_i / geometric mean``, cut to the unit cube. Each
    candidate differs from the centre in a random subset of the entries, of about 20.

    Args:
        key: a typed key.
        centre: [z], the best point.
        lengthscale: [z], of the fitted process.
        length: side of the region, scalar.
        num: number of candidates, at least 1.

    Returns:
        [num z] in the unit cube; each differs from the centre in at least one entry.

    Reference:
        Eriksson et al. (2019), section 2 and supplement. The subset there is of a Sobol sequence;
        here candidates are uniform.
    """
    key_point, key_subset, key_one = jax.random.split(key, 3)
    num_dims = centre.shape[0]
    logs = jnp.log(lengthscale)
    half = 0.5 * length * jnp.exp(logs - jnp.mean(logs))
    low, high = jnp.maximum(centre - half, 0.0), jnp.minimum(centre + half, 1.0)
    points = low + (high - low) * jax.random.uniform(key_point, (num, num_dims))
    moves = jax.random.bernoulli(key_subset, min(1.0, 20 / num_dims), (num, num_dims))
    one = jax.random.randint(key_one, (num,), 0, num_dims)
    moves |= jnp.arange(num_dims) == one[:, None]
    return jnp.where(moves, points, centre)


def propose_from_model(
    key: jax.Array, state: TurboState, *, num: int, most: int, fit_steps: int
) -> jax.Array:
    """The next round of one restart, by Thompson sampling.

    Args:
        key: a typed key.
        state: of one restart, with at least one finite loss.
        num: candidates of the round, each the lowest of a function drawn from the process.
        most: candidates that are compared, at most; 100 per dimension below that, at least ``num``.
        fit_steps: Adam steps on the process's hyper-parameters.

    Returns:
        [num z] different candidates.
    """
    key_candidates, key_sample = jax.random.split(key)
    mask = jnp.isfinite(state.losses)
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask, state.losses, 0.0)) / count
    centred = jnp.where(mask, state.losses - mean, 0.0)
    spread = jnp.sqrt(jnp.sum(centred**2) / count)
    targets = centred / jnp.where(spread > 0, spread, 1.0)
    hyper = fit(state.points, targets, mask, steps=fit_steps)
    centre = state.points[jnp.argmin(state.losses)]
    queries = candidates_around(
        key_candidates,
        centre,
        hyper.lengthscale,
        state.region.length,
        max(num, min(100 * centre.shape[0], most)),
    )
    draws = sample_posterior(key_sample, hyper, state.points, targets, mask, queries, num=num)

    def choose(taken, draw):
        index = jnp.argmin(jnp.where(taken, jnp.inf, draw))
        return taken.at[index].set(True), index

    _, indices = jax.lax.scan(choose, jnp.zeros(queries.shape[0], bool), draws)
    return queries[indices]


@ranged
def turbo(
    *,
    round_size: Count = 10,
    num_initial: Annotated[int, AtLeast(2)] = 256,
    half_width: Positive = 2.0,
    num_candidates: Count = 5000,
    success_tolerance: Count = 3,
    failure_tolerance: Count = 13,
    fit_steps: Count = 50,
    max_points: Count = 1024,
    steps: Count = 100,
) -> Optimizer:
    """TuRBO-1, the paper's Bayesian optimisation, for searches of some thousand evaluations.

    A Gaussian process models the losses in a box. Each round draws ``round_size`` functions from
    it and evaluates, for each, the candidate in the trust region where that function is lowest
    (Thompson sampling). Each restart is a run of its own; one step costs
    ``restarts * round_size`` evaluations, in the initial design as well.

    Args:
        steps: rounds of the search, which set the size of the arrays; at least 1. The paper grants
            1,000 evaluations: 100 rounds of 10.
        round_size: candidates per restart and round, at least 1.
        num_initial: size of the initial Latin hypercube, at least 2; rounded up to whole rounds.
        half_width: the box is [-half_width, half_width] along every axis, > 0. With sampled latents
            of a standard normal prior, 2 covers 95 % of each entry.
        num_candidates: at most this many candidates per round (100 per dimension below that).
        success_tolerance: successes in a row that double the trust region.
        failure_tolerance: failures in a row that halve it. 13 in the attack's published setting;
            TuRBO's own default is ceil(max(4 / round_size, z / round_size)).
        fit_steps: Adam steps on the process's hyper-parameters in every round, at least 1.
        max_points: most points that the process holds; above it those furthest from the best are
            dropped. A round's time grows with its third power. At least the initial design and one
            round.

    Returns:
        An :class:`Optimizer`. ``init(key, latents[r z])`` takes each restart's starting point,
        clipped to the box, as the first point of its initial design.

    Edge cases:
        Failed candidates (NaN or infinite loss) are not modelled. When the trust region gets
        smaller than 2^-7, the run forgets its data and starts anew with another design; the best
        point of all runs is remembered by ``best_so_far``. Latents outside of the box are never
        tried. Fewer rounds than the design takes give a plain space-filling search.

    Reference:
        Eriksson et al. (2019), "Scalable Global Optimization via Local Bayesian Optimization".
        Differences: uniform candidates instead of Sobol points, functions drawn by random Fourier
        features with an exact correction instead of jointly at all candidates, float32.
    """
    require(num_candidates >= round_size, "num_candidates", num_candidates, "at least round_size")
    design_rounds = math.ceil(num_initial / round_size)
    design_size = design_rounds * round_size
    least = design_size + round_size
    require(max_points >= least, "max_points", max_points, f"at least {least} with this design")
    capacity = min(max_points, max(steps * round_size, round_size))

    def begin(key, num_dims):
        """The state of one restart without data."""
        return TurboState(
            points=jnp.zeros((capacity, num_dims), jnp.float32),
            losses=jnp.full(capacity, jnp.inf, jnp.float32),
            design=latin_hypercube(key, design_size, num_dims),
            rounds=jnp.zeros((), jnp.int32),
            region=start_region(),
        )

    def init(key, latents):
        num, num_dims = latents.shape
        state = jax.vmap(lambda k: begin(k, num_dims))(jax.random.split(key, num))
        first = jnp.clip(0.5 + 0.5 * latents.astype(jnp.float32) / half_width, 0.0, 1.0)
        return state._replace(design=state.design.at[:, 0].set(first))

    def from_design(state):
        # The index is cut to the design's length by dynamic_slice; such rounds are never used.
        return jax.lax.dynamic_slice_in_dim(state.design, state.rounds * round_size, round_size)

    from_model = functools.partial(
        propose_from_model, num=round_size, most=num_candidates, fit_steps=fit_steps
    )

    def absorb(key, state, points, losses):
        losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf).astype(jnp.float32)
        best_index = jnp.argmin(state.losses)
        best = state.losses[best_index]
        # Empty rows are filled first; then those furthest from the best point go.
        distance = jnp.sum((state.points - state.points[best_index]) ** 2, axis=1)
        distance = jnp.where(jnp.isfinite(state.losses), distance, jnp.inf)
        _, rows = jax.lax.top_k(distance, round_size)
        updated = update_region(
            state.region,
            jnp.min(losses) < best - IMPROVEMENT * jnp.abs(best),
            success_tolerance=success_tolerance,
            failure_tolerance=failure_tolerance,
        )
        searching = state.rounds >= design_rounds
        region = jax.tree.map(lambda x, y: jnp.where(searching, x, y), updated, state.region)
        kept = TurboState(
            points=state.points.at[rows].set(points),
            losses=state.losses.at[rows].set(losses),
            design=state.design,
            rounds=state.rounds + 1,
            region=region,
        )
        anew, over = begin(key, state.points.shape[1]), region.length < LENGTH_MIN
        return jax.tree.map(lambda x, y: jnp.where(over, x, y), anew, kept)

    def step(key, state, loss_fn):
        num_restarts, num_dims = state.rounds.shape[0], state.points.shape[2]
        key_model, key_design = (jax.random.split(k, num_restarts) for k in jax.random.split(key))
        designing, designed = state.rounds < design_rounds, jax.vmap(from_design)(state)

        def propose():
            modelled = jax.vmap(from_model)(key_model, state)
            return jnp.where(designing[:, None, None], designed, modelled)

        # No model is fitted while all restarts are in their design (unless a vmap over instances
        # turns the branch into a selection).
        with jax.default_matmul_precision("highest"):
            points = jax.lax.cond(jnp.all(designing), lambda: designed, propose)
        latents = half_width * (2 * points.reshape(num_restarts * round_size, num_dims) - 1)
        losses = loss_fn(latents)
        state = jax.vmap(absorb)(key_design, state, points, losses.reshape(num_restarts, -1))
        return state, make_info(latents, losses)

    return Optimizer(
        init=init,
        step=step,
        evaluations_per_step=lambda num_restarts: num_restarts * round_size,
        name="turbo",
    )
