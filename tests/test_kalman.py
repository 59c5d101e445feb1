"""Ensemble Kalman steps, and the inner products of residuals that they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggl_jax as gx
from ggl_jax.adversary.attack import search_attack
from ggl_jax.adversary.estimation import estimate, noise_level
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.adversary.optimizers import kalman
from ggl_jax.client.gradients import client_update
from ggl_jax.errors import GGLError
from ggl_jax.gate.parts import least_squares
from ggl_jax.spec import Client, Speed
from ggl_jax.types import Loss

KEY = jax.random.key(0)
#: A linear model of 30 numbers from 6 latents, what was observed of it, and its noise.
MATRIX = jax.random.normal(KEY, (30, 6))
OBSERVED = MATRIX @ jnp.linspace(-1, 1, 6) + 0.5 * jax.random.normal(jax.random.key(1), (30,))
STD = 0.5
#: Twice minus the logarithm of the posterior's density, under a standard normal prior.
LINEAR = least_squares(
    lambda z: jnp.concatenate([(z @ MATRIX.T - OBSERVED) / STD, z], axis=1),
)


def after(optimizer, loss_fn, steps, start):
    state = optimizer.init(KEY, start)
    step = jax.jit(lambda key, state: optimizer.step(key, state, loss_fn))
    for number in range(steps):
        state, info = step(jax.random.fold_in(KEY, number), state)
    return state[0], info


@pytest.mark.parametrize("population", [12, 4])
def test_finds_the_posterior_mean_of_a_linear_problem(population):
    """Also with fewer members than dimensions: they are drawn anew in each step."""
    precision = MATRIX.T @ MATRIX / STD**2 + jnp.eye(6)
    expected = jnp.linalg.solve(precision, MATRIX.T @ OBSERVED / STD**2)
    start = jnp.asarray([[3.0] * 6, [-1.0] * 6])
    found, info = after(kalman(population=population, steps=40), LINEAR, 40, start)
    np.testing.assert_allclose(found, jnp.stack([expected] * 2), atol=2e-3)
    assert info.losses.shape == (2 * population,)


def test_a_step_is_the_kalman_gain():
    noise, damping, start = 0.3, 0.2, jnp.asarray([[0.5] * 6])
    products = lambda z: LINEAR.products(z)._replace(noise=jnp.full(1, noise))  # noqa: E731
    found, info = after(
        kalman(population=5, damping=damping), Loss(LINEAR.losses, products), 1, start
    )
    members = np.asarray(info.latents, np.float64)
    predicted = np.concatenate([members @ np.asarray(MATRIX).T / STD, members], axis=1)
    target = np.concatenate([np.asarray(OBSERVED) / STD, np.zeros(6)])
    u, g = (x - x[0] for x in (members, predicted))
    c_ug, c_gg = u.T @ g / 5, g.T @ g / 5
    r = damping * np.trace(c_gg) / 5 + noise * 6 / 5
    expected = c_ug @ np.linalg.solve(c_gg + r * np.eye(36), target - predicted[0])
    np.testing.assert_allclose(found[0] - start[0], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(members[0], start[0])


def test_failed_candidates_have_no_part():
    def broken(z):
        return jnp.where(z[:, :1] > 0.6, jnp.nan, z - 0.25)

    optimizer = kalman(population=30, last_spread=1.0)
    found, _ = after(optimizer, least_squares(broken), 20, jnp.zeros((1, 4)))
    np.testing.assert_allclose(found, 0.25, atol=1e-3)
    # Where the mean itself fails there is no way to tell where to go.
    start = jnp.ones((1, 4))
    np.testing.assert_array_equal(after(kalman(), least_squares(broken), 2, start)[0], start)


def test_needs_residuals():
    with pytest.raises(GGLError, match="kalman needs residuals"):
        kalman().step(KEY, kalman().init(KEY, jnp.zeros((1, 4))), lambda z: jnp.sum(z**2, axis=1))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"population": 3}, "population"), ({"spread": 0}, "spread"), ({"damping": -1}, "damping")],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(GGLError, match=word):
        kalman(**options)


@pytest.fixture(scope="module")
def public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    return gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)


def shared(public, images, labels, spec, client=None):
    """A client's defended update, the view of its defense, and what the server estimates."""
    defense, variables = gx.parse(spec), public.variables
    update = client_update(client or Client(), public.model, variables, images, labels, lambda g: g)
    context = gx.Context(public.model, variables, images, labels)
    observed, _ = defense.apply(jax.random.key(1), update, context)
    return observed, defense.view, estimate(defense.view, observed, public.model.head)


@pytest.mark.parametrize(
    ("spec", "distance", "client", "method"),
    [
        *[("none", distance, {}, "auto") for distance in ("mean_squared_l2", "scaled_l2")],
        ("clip:0.5", "squared_l2", {}, "auto"),
        ("clip:0.5+noise:0.1", "cosine", {}, "auto"),
        ("sparsify:0.9", "squared_l2", {}, "auto"),
        ("clip:0.5", "cosine", {}, "direct"),
        ("none", "cosine", {"local_steps": 2}, "auto"),
        ("none", "squared_l2", {"batch_size": 2}, "auto"),
    ],
)
def test_products_are_those_of_the_residuals(public, tiny_images, spec, distance, client, method):
    client = Client(**client)
    private = tiny_images[: client.batch_size]
    labels = jnp.arange(client.batch_size)
    observed, view, estimated = shared(public, private, labels, spec, client)
    loss = matching_loss(
        public.model,
        public.variables,
        observed,
        view=view,
        estimated=estimated,
        distance=distance,
        client=client,
        speed=Speed(method=method, chunk_size=2),
    )
    images = jax.random.uniform(KEY, (2, 3, *private.shape))
    found = jax.jit(loss.products)(images, jnp.broadcast_to(labels, (2, 3, len(labels))))
    flat = images.reshape(-1, *private.shape)
    np.testing.assert_allclose(found.losses.reshape(-1), loss(flat, labels), rtol=1e-4)

    def residual(images):
        g = client_update(
            client,
            public.model,
            public.variables,
            images,
            labels,
            lambda g: view.simulate(estimated, g),
        )
        g, y = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (g, observed))
        if distance == "cosine":
            return (g / np.linalg.norm(g) - y / np.linalg.norm(y)) / np.sqrt(2)
        if distance == "scaled_l2":
            return max(g @ y, 0) / (g @ g) * g - y
        return (g - y) / np.sqrt(6 if distance == "mean_squared_l2" else 1)

    for restart in range(2):
        rows = np.stack([residual(one) for one in images[restart]])
        np.testing.assert_allclose(found.inner[restart], rows @ rows.T, rtol=2e-3, atol=1e-5)


def problem_of(public, images, spec="none"):
    labels = jnp.zeros(len(images), jnp.int32)
    observed, view, estimated = shared(public, images, labels, spec)
    noise = noise_level(view, estimated)
    return view, gx.Problem(
        observed, public.variables, public.prior_params, labels, estimated, noise
    )


@pytest.mark.parametrize("spec", ["sign", "soteria:0.2", "clip:0.5+noise:0.01"])
def test_an_attack_gets_near(public, tiny_images, spec):
    view, problem = problem_of(public, tiny_images[:1], spec)
    search = gx.Search(
        optimizer="kalman:8",
        steps=12,
        restarts=2,
        relative=True,
        regularizer="kld:1e-6",
        start="prior",
    )
    attack = search_attack(public.model, public.prior, search, view=view)
    step = jax.jit(attack.step)
    state = attack.init(KEY, problem)
    first = step(KEY, problem, state)[1]
    for number in range(12):
        state, _ = step(jax.random.fold_in(KEY, number), problem, state)
    before = float(jnp.min(first.losses.reshape(2, -1)[:, 0]))
    best = attack.candidates(problem, state)
    assert float(best.losses[0]) < (1e-3 if spec == "soteria:0.2" else 0.3) * before
    # What is reported is what the loss says of the same candidates.
    again = attack.distances(problem, best.images, problem.labels)
    np.testing.assert_allclose(best.distances, again, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"labels": "searched", "space": "pixels"}])
def test_an_attack_lowers_for_accelerators_and_runs_for_many(public, tiny_images, options):
    view, problem = problem_of(public, tiny_images[:1])
    search = gx.Search(optimizer="kalman:5", steps=2, **options)
    attack = search_attack(public.model, public.prior, search, view=view)
    state = attack.init(KEY, problem)
    own = jax.jit(attack.step)(KEY, problem, state)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), (problem, state))
    _, info = jax.jit(jax.vmap(attack.step, (None, 0, 0)))(KEY, *many)
    np.testing.assert_allclose(info.losses, jnp.stack([own[1].losses] * 2), rtol=1e-3)
    traced = jax.jit(attack.step).trace(KEY, problem, state)
    for platform in ("cuda", "tpu"):
        assert "callback" not in traced.lower(lowering_platforms=(platform,)).as_text()
