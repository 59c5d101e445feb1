"""Client gradients: against finite differences, hand-written loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from ggl_jax.client import gradients
from ggl_jax.client.gradients import cross_entropy, gradient, local_update
from ggl_jax.client.local import gradients_summed, local_optimizer, shares_gradient
from ggl_jax.client.models import from_flax
from ggl_jax.client.updates import read_update, read_variables
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client

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


@pytest.mark.parametrize("optimizer", ["sgd:momentum=0.9", "adam:eps=1"])
def test_local_update_is_differentiable(model, variables, images, optimizer):
    @jax.jit
    def energy(images):
        options = {"local_steps": 3, "learning_rate": 0.1, "optimizer": optimizer}
        update = local_update(model, variables, images, LABELS, **options)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(update))

    direction = jax.random.normal(jax.random.key(4), images.shape)
    slope = jnp.sum(jax.grad(energy)(images) * direction)
    h = 1e-2
    numeric = (energy(images + h * direction) - energy(images - h * direction)) / (2 * h)
    assert abs(slope) > 1e-2
    assert float(numeric) == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd:momentum=0.9", {"momentum": 0.9}),
        ("sgd:momentum=0.5,nesterov=True", {"momentum": 0.5, "nesterov": True}),
        ("adam:b2=0.99", {"betas": (0.9, 0.99)}),
    ],
)
def test_five_local_steps_in_training_mode_agree_with_torch(optimizer, options, monkeypatch):
    """A batch of four through BatchNorm by its own statistics, and torch's optimisers."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = ((3, 4), (4, 8), (8, 16))
    layers = [
        [torch.nn.Conv2d(a, b, 3, padding=1, bias=False), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
        for a, b in sizes
    ]
    pool = torch.nn.MaxPool2d(2)
    body = [*layers[0], *layers[1], pool, *layers[2], pool, torch.nn.Flatten()]
    net = torch.nn.Sequential(*body, torch.nn.Linear(64, 3)).double().train()
    numbers = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 7: "conv3", 8: "bn3", 12: "fc"}

    def named():
        renamed = ((k.partition("."), v) for k, v in net.state_dict().items())
        return {f"{numbers[int(k[0])]}.{k[2]}": v.numpy().copy() for k, v in renamed}

    before = named()
    model, variables = read_variables(before, "convnet:4,batch_norm=train", (8, 8, 3))
    rng = np.random.default_rng(0)
    images, labels = rng.random((4, 8, 8, 3)), np.array([0, 2, 1, 2])
    rate = 0.02
    kind = torch.optim.Adam if optimizer.startswith("adam") else torch.optim.SGD
    own = kind(net.parameters(), lr=rate, **options)
    seen = torch.tensor(2 * images - 1).permute(0, 3, 1, 2)
    for _ in range(5):
        own.zero_grad()
        torch.nn.functional.cross_entropy(net(seen), torch.tensor(labels)).backward()
        own.step()
    after = named()
    expected = read_update({k: (before[k] - after[k]) / rate for k in after}, variables["params"])

    run = jax.jit(
        lambda v, x: local_update(
            model, v, x, labels, local_steps=5, learning_rate=rate, optimizer=optimizer
        )
    )
    found = run(variables, jnp.asarray(images, jnp.float32))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
    if "nesterov" not in options:
        return
    # The loop, which more steps than five or an accelerator take, finds the same.
    monkeypatch.setattr(gradients, "_UNROLLED", 0)
    looped = jax.jit(lambda v, x: run.__wrapped__(v, x))(
        variables, jnp.asarray(images, jnp.float32)
    )
    assert_trees_close(looped, found, rtol=1e-3, atol=1e-5)


def test_what_an_update_is_a_sum_of(model, variables, images):
    """Of a linear loss the gradient is the same in every step, so weights can be counted."""
    for text, steps in (
        ("sgd", 3),
        ("sgd:momentum=0.9", 5),
        ("sgd:momentum=0.5,nesterov=True", 2),
    ):
        own = local_optimizer(text)
        state, total = own.init(jnp.ones(())), 0.0
        for _ in range(steps):
            direction, state = own.update(jnp.ones(()), state)
            total += float(direction)
        client = Client(local_steps=steps, local_optimizer=text)
        assert gradients_summed(client) == pytest.approx(total)
    assert gradients_summed(Client(local_optimizer="adam")) is None
    plain = {
        text: shares_gradient(Client(local_optimizer=text))
        for text in ("sgd", "sgd:momentum=0.9", "sgd:0.9,nesterov=True", "adam")
    }
    assert list(plain.values()) == [True, True, False, False]
    for text, expected in plain.items():
        update = local_update(model, variables, images, LABELS, optimizer=text)
        whole = gradient(model, variables, images, LABELS)
        off = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), update, whole)
        assert (max(jax.tree.leaves(off)) < 1e-6) == expected
    with pytest.raises(GGLError, match="local_optimizer: got 'rmsprop', allowed: sgd, adam"):
        local_optimizer("rmsprop")


def test_adams_root_has_a_derivative_where_a_gradient_is_zero(model, variables, images):
    """Behind a dead unit gradients are 0; the root's own derivative there is infinite."""
    dead = jax.tree.map(jnp.zeros_like, variables)

    def energy(images):
        found = local_update(model, dead, images, LABELS, local_steps=2, optimizer="adam")
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(found))

    assert np.isfinite(jax.jit(jax.grad(energy))(images)).all()


def test_more_local_steps_are_no_larger_program(model, variables, images):
    """The derivative's program does not grow with the steps; its memory by the weights alone."""

    def compiled(steps):
        def energy(images):
            found = local_update(model, variables, images, LABELS, local_steps=steps)
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(found))

        return jax.jit(jax.grad(energy)).lower(images).compile()

    few, many = compiled(6), compiled(20)
    assert len(many.as_text()) < 1.05 * len(few.as_text())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    grown = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert grown < 1.5 * 14 * weights


def test_learning_rate_may_be_traced(model, variables, images):
    def update(rate):
        return local_update(model, variables, images, LABELS, local_steps=2, learning_rate=rate)

    assert_trees_close(jax.jit(update)(0.1), update(0.1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_steps": 0}, "local_steps: got 0"),
        ({"local_steps": 1.0}, "local_steps: got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 3}, "batch_size=3 does not divide the batch of 4"),
    ],
)
def test_bad_training_arguments(model, variables, images, options, words):
    with pytest.raises(GGLError, match=words):
        local_update(model, variables, images, LABELS, **options)
