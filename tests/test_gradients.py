"""Client gradients: against finite differences, hand-written loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from ggl_jax.client.gradients import cross_entropy, gradient, local_update, update_fn
from ggl_jax.client.models import from_flax
from ggl_jax.errors import GGLError

SHAPE = (4, 4, 1)


class Tiny(nn.Module):
    """Smooth, so that finite differences converge."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(2, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def model():
    return from_flax(Tiny(), SHAPE)


@pytest.fixture(scope="module")
def variables(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (4, *SHAPE))


LABELS = jnp.array([0, 2, 1, 2])


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# --- cross_entropy -------------------------------------------------------------------------------


def test_cross_entropy_is_the_mean_of_the_negative_log_probabilities():
    logits = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -(np.log(p[0, 1]) + np.log(p[1, 0])) / 2
    assert cross_entropy(jnp.asarray(logits), jnp.array([1, 0])) == pytest.approx(
        expected, rel=1e-6
    )
    soft = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], np.float32)
    expected = -(soft * np.log(p)).sum() / 2
    assert cross_entropy(jnp.asarray(logits), soft) == pytest.approx(expected, rel=1e-6)


def test_one_hot_labels_equal_indices():
    logits = jax.random.normal(jax.random.key(0), (4, 3))
    one_hot = jax.nn.one_hot(LABELS, 3)
    expected = float(cross_entropy(logits, LABELS))
    assert float(cross_entropy(logits, one_hot)) == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_survives_large_logits():
    assert cross_entropy(jnp.array([[1e4, 0.0]]), jnp.array([1])) == pytest.approx(1e4)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_an_error_and_inside_jit_nan(label):
    logits = jnp.zeros((1, 3))
    with pytest.raises(GGLError, match="0 to 2"):
        cross_entropy(logits, jnp.array([label]))
    assert np.isnan(jax.jit(cross_entropy)(logits, jnp.array([label])))


@pytest.mark.parametrize(
    "labels", [jnp.array([0.0, 1.0]), jnp.array([0]), jnp.zeros((2, 4)), jnp.zeros((2, 3), int)]
)
def test_labels_of_a_wrong_kind(labels):
    with pytest.raises(GGLError, match=r"labels have shape.*\[2 3\]"):
        cross_entropy(jnp.zeros((2, 3)), labels)


# --- gradient ------------------------------------------------------------------------------------


def loss_of(model, variables, params, images, labels):
    logits, _ = model.apply({**variables, "params": params}, images)
    return cross_entropy(logits, labels)


def test_gradient_equals_finite_differences(model, variables, images):
    g = gradient(model, variables, images, LABELS)
    params, unravel = ravel_pytree(variables["params"])
    loss = jax.jit(lambda p: loss_of(model, variables, unravel(p), images, LABELS))
    h = 1e-2
    steps = h * jnp.eye(params.size)
    numeric = jnp.array([(loss(params + e) - loss(params - e)) / (2 * h) for e in steps])
    analytic = ravel_pytree(g)[0]
    assert np.linalg.norm(analytic) > 0.1
    np.testing.assert_allclose(analytic, numeric, atol=2e-4)


def test_gradient_is_the_mean_over_the_batch(model, variables, images):
    whole = gradient(model, variables, images, LABELS)
    each = [gradient(model, variables, images[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    assert_trees_close(whole, jax.tree.map(lambda *g: sum(g) / 4, *each), rtol=1e-4, atol=1e-6)


def test_gradient_of_the_last_bias_is_the_residual(model, variables, images):
    logits, features = model.apply(variables, images)
    residual = jax.nn.softmax(logits) - jax.nn.one_hot(LABELS, 3)
    g = gradient(model, variables, images, LABELS)["Dense_0"]
    np.testing.assert_allclose(g["bias"], residual.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(g["kernel"], features.T @ residual / 4, atol=1e-6)


def test_gradient_is_differentiable_in_images_and_soft_labels(model, variables, images):
    """The directional derivative of a matching loss, against finite differences."""
    soft = jax.nn.softmax(jax.random.normal(jax.random.key(2), (4, 3)))
    target = gradient(model, variables, images[::-1], LABELS)

    @jax.jit
    def matching(images, labels):
        g = gradient(model, variables, images, labels)
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), g, target)
        return sum(jax.tree.leaves(squares))

    for argument, x in enumerate((images, soft)):
        direction = jax.random.normal(jax.random.key(3 + argument), x.shape)
        slope = jnp.sum(jax.grad(matching, argument)(images, soft) * direction)
        h = 1e-2

        def along(t, argument=argument, x=x, direction=direction):
            arguments = [images, soft]
            arguments[argument] = x + t * direction
            return matching(*arguments)

        assert abs(slope) > 1e-3
        assert float(along(h) - along(-h)) / (2 * h) == pytest.approx(float(slope), rel=2e-2)


def test_gradient_under_jit_and_vmap(model, variables, images):
    eager = [gradient(model, variables, images[i : i + 1], LABELS[i : i + 1]) for i in range(2)]
    many = jax.jit(jax.vmap(lambda x, y: gradient(model, variables, x[None], y[None])))
    batched = many(images[:2], LABELS[:2])
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *eager)
    assert_trees_close(batched, stacked, rtol=1e-4, atol=1e-6)


# --- local_update --------------------------------------------------------------------------------


@pytest.mark.parametrize("learning_rate", [1e-6, 0.01, 10.0])
def test_one_local_step_is_the_gradient(model, variables, images, learning_rate):
    update = local_update(model, variables, images, LABELS, learning_rate=learning_rate)
    assert_trees_close(update, gradient(model, variables, images, LABELS), rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_three_local_steps_equal_a_hand_loop(model, variables, images, batch_size):
    learning_rate = 0.3
    grad = jax.jit(jax.grad(lambda p, x, y: loss_of(model, variables, p, x, y)))
    blocks = [slice(0, 4)] * 3 if batch_size is None else [slice(0, 2), slice(2, 4), slice(0, 2)]
    params = variables["params"]
    for block in blocks:
        g = grad(params, images[block], LABELS[block])
        params = jax.tree.map(lambda w, g: w - learning_rate * g, params, g)
    expected = jax.tree.map(lambda a, b: (a - b) / learning_rate, variables["params"], params)
    update = local_update(
        model,
        variables,
        images,
        LABELS,
        local_steps=3,
        learning_rate=learning_rate,
        batch_size=batch_size,
    )
    assert_trees_close(update, expected, rtol=1e-4, atol=3e-6)
    three_times = jax.tree.map(lambda g: 3 * g, gradient(model, variables, images, LABELS))
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), update, three_times)
    assert max(jax.tree.leaves(off)) > 1e-2  # the weights did move between the steps


def test_local_update_is_differentiable(model, variables, images):
    update = update_fn(model, local_steps=2, learning_rate=0.1)

    @jax.jit
    def energy(images):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(update(variables, images, LABELS)))

    direction = jax.random.normal(jax.random.key(4), images.shape)
    slope = jnp.sum(jax.grad(energy)(images) * direction)
    h = 1e-2
    numeric = (energy(images + h * direction) - energy(images - h * direction)) / (2 * h)
    assert abs(slope) > 1e-2
    assert float(numeric) == pytest.approx(float(slope), rel=1e-2)


def test_update_fn_is_local_update(model, variables, images):
    options = {"local_steps": 2, "learning_rate": 0.5, "batch_size": 2}
    assert_trees_close(
        update_fn(model, **options)(variables, images, LABELS),
        local_update(model, variables, images, LABELS, **options),
        rtol=0,
        atol=0,
    )


def test_learning_rate_may_be_traced(model, variables, images):
    def update(rate):
        return local_update(model, variables, images, LABELS, local_steps=2, learning_rate=rate)

    assert_trees_close(jax.jit(update)(0.1), update(0.1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_steps": 0}, "local_steps=0"),
        ({"local_steps": 1.0}, "local_steps=1.0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 3}, "batch_size=3 does not divide the batch of 4"),
    ],
)
def test_bad_training_arguments(model, variables, images, options, words):
    with pytest.raises(GGLError, match=words):
        local_update(model, variables, images, LABELS, **options)
