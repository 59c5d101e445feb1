"""The search loop: batches of instances, chunks of steps, and statuses as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import ggl_jax as gx
from ggl_jax.types import NONFINITE, OK, STALLED, Problem


@pytest.fixture(scope="module")
def problems(tiny_model, tiny_variables, tiny_prior_params, tiny_images):
    return [
        Problem(
            gx.gradient(tiny_model, tiny_variables, image[None], jnp.asarray([label])),
            tiny_variables,
            tiny_prior_params,
            jnp.asarray([label]),
            {},
        )
        for image, label in zip(tiny_images, (0, 2), strict=True)
    ]


@pytest.fixture(scope="module")
def attack(tiny_model, tiny_prior):
    return gx.search_attack(tiny_model, tiny_prior, gx.Search(optimizer="cma_es:8"))


KEYS = jax.random.split(jax.random.key(0), 2)


def test_a_batch_of_instances_equals_each_alone(attack, problems):
    # Over a few generations: CMA-ES is chaotic, and float32 sums differ with the batch's shape.
    together = gx.run_search(attack, KEYS, problems, steps=4)
    for i, problem in enumerate(problems):
        alone = gx.run_search(attack, KEYS[i : i + 1], [problem], steps=4)
        np.testing.assert_allclose(together.history[i], alone.history[0], rtol=1e-3)
        np.testing.assert_allclose(together.images[i], alone.images[0], atol=1e-3)
    assert not np.allclose(together.images[0], together.images[1], atol=0.05)


def test_chunks_of_steps_do_not_change_the_result(attack, problems):
    # As on accelerators: 4 + 4 + 1 steps in three calls.
    seen = []
    one = gx.run_search(attack, KEYS[:1], problems[:1], steps=9, steps_per_call=1)
    chunked = gx.run_search(
        attack,
        KEYS[:1],
        problems[:1],
        steps=9,
        steps_per_call=4,
        callback=lambda done, losses: seen.append((done, losses.shape)),
    )
    np.testing.assert_allclose(one.history[0, :4], chunked.history[0, :4], rtol=1e-3)
    assert seen == [(4, (1,)), (8, (1,)), (9, (1,))]
    assert chunked.history.shape == (1, 9)
    assert chunked.evaluations == 9 * 8
    assert np.all(np.diff(chunked.history[0]) <= 0)


def test_statuses(attack, problems):
    broken = problems[0]._replace(
        observed=jax.tree.map(lambda x: x * jnp.nan, problems[0].observed)
    )
    outcome = gx.run_search(attack, KEYS[:1], [broken], steps=5)
    assert int(outcome.status[0]) == NONFINITE
    assert outcome.evaluations == 8  # it did not go on
    fine = gx.run_search(attack, KEYS[:1], problems[:1], steps=5)
    assert int(fine.status[0]) == OK
    # An optimiser that never moves.
    still = attack._replace(
        step=lambda key, problem, state: attack.step(jax.random.key(0), problem, state)
    )
    frozen = still._replace(
        step=lambda key, problem, state: (
            lambda new, info: (state._replace(losses=jnp.minimum(state.losses, 5.0)), info)
        )(*still.step(key, problem, state))
    )
    assert int(gx.run_search(frozen, KEYS[:1], problems[:1], steps=3).status[0]) == STALLED


class SmoothNet(nn.Module):
    """Without ReLU, whose kinks finite differences of a gradient's distance stumble over."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(6, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def test_generator_gradient_by_finite_differences(tiny_prior, tiny_prior_params, tiny_images):
    # "Adam fails" was once a gradient cut between the loss and the generator.
    model = gx.from_flax(SmoothNet(), image_shape=(8, 8, 3))
    variables = model.init(jax.random.key(0))
    labels = jnp.asarray([0])
    observed = gx.gradient(model, variables, tiny_images[:1], labels)
    problem = Problem(observed, variables, tiny_prior_params, labels, {})
    loss = gx.matching_loss(model, variables, observed)

    def of_latent(z):
        images = tiny_prior.apply(problem.prior_params, z[None], problem.labels)
        return loss(images[None], problem.labels[None])[0]

    z = jnp.asarray([0.3, -0.2, 0.5, 0.1])
    direction = jnp.asarray([0.5, 0.5, -0.5, 0.5])
    step = 3e-3
    finite = (of_latent(z + step * direction) - of_latent(z - step * direction)) / (2 * step)
    exact = jnp.vdot(jax.grad(of_latent)(z), direction)
    assert abs(float(exact)) > 1e-3
    np.testing.assert_allclose(exact, finite, rtol=0.02)
