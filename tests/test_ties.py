"""Ties in sparsification: equal magnitudes fall the same way in every program, on both sides."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggl_jax as gx
from ggl_jax import trees
from ggl_jax.audit.paper import FORMS
from ggl_jax.client.networks import BasicBlock
from ggl_jax.selection import zero_smallest

FIDELITIES = ["paper", "code"]


class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.softplus(nn.Conv(6, (3, 3), 2)(x))
        x = nn.softplus(nn.Conv(8, (3, 3), 2)(x))
        # With all logits equal at the start, all classes but the label's have equal gradients.
        init = nn.initializers.lecun_normal() if self.classes == 2 else nn.initializers.zeros
        return nn.Dense(self.classes, kernel_init=init)(x.reshape(x.shape[0], -1))


@functools.cache
def setting(classes, fidelity, rate=0.9):
    """The model, what a client shared of an image, and losses in four programs."""
    model = gx.from_flax(Net(classes), (12, 12, 3), classes)
    variables = jax.jit(model.init)(jax.random.key(1))
    image = jax.random.uniform(jax.random.key(2), (1, 12, 12, 3))
    labels = jnp.array([1])
    defense = gx.parse(FORMS[fidelity](f"sparsify:{rate}"))

    @jax.jit
    def share(image):
        update = gx.gradient(model, variables, image, labels)
        return defense.apply(None, update, gx.Context(model, variables, image, labels))[0]

    observed = share(image)
    estimated = gx.estimate(defense.view, observed, model.head)

    def make(method, estimated=estimated):
        speed = gx.Speed(method=method)
        return gx.matching_loss(
            model, variables, observed, view=defense.view, estimated=estimated, speed=speed
        )

    def eager(images, labels):
        update = gx.gradient(model, variables, images[0], labels)
        difference = jax.tree.map(jnp.subtract, defense.view.simulate(estimated, update), observed)
        return trees.total(trees.sq_norms(difference))[None]

    programs = {
        "fused": jax.jit(make("fused")),
        "direct": jax.jit(make("direct")),
        "eager": eager,
        # Ties of the entries that the client did not share apart are left to the places.
        "unobserved": jax.jit(
            make("direct", estimated | {"support": jax.tree.map(jnp.isfinite, observed)})
        ),
    }
    scale = float(trees.total(trees.sq_norms(observed)))
    return image, labels, share, programs, scale


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("classes", [2, pytest.param(10, marks=pytest.mark.slow)])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), candidate=st.integers(0, 3))
def test_rounding_does_not_decide(classes, fidelity, seed, candidate):
    """A candidate, the same up to 1e-6, and all programs: one loss, to 1e-4 of itself."""
    image, labels, share, programs, scale = setting(classes, fidelity)
    if candidate:
        image = jax.random.uniform(jax.random.key(10 + candidate), image.shape)
    moved = image * (1 + 1e-6 * jax.random.uniform(jax.random.key(seed), image.shape, minval=-1))
    for name, program in programs.items():
        there, near = (float(program(x[None], labels)[0]) for x in (image, moved))
        other = float(programs["direct"](image[None], labels)[0])
        if candidate:
            assert near == pytest.approx(there, rel=1e-4), name
            assert there == pytest.approx(other, rel=1e-4), name
        elif name != "unobserved":
            assert max(there, near) < 1e-9 * scale, name
    # The client, too, whatever the rounding of its update.
    for before, after in zip(*map(jax.tree.leaves, (share(image), share(moved))), strict=True):
        assert np.mean((before == 0) != (after == 0)) == 0


class Residual(nn.Module):
    """ResNet-18's blocks, two of them."""

    @nn.compact
    def __call__(self, x):
        for features, stride in ((8, 1), (16, 2)):
            x = BasicBlock(features, stride, "eval", nn.initializers.he_normal())(x)
        return nn.Dense(2)(jnp.mean(x, axis=(1, 2)))


RESNETS = {
    "two blocks": lambda: gx.from_flax(Residual(), (16, 16, 3), 2),
    "resnet18": lambda: gx.resnet18(2, (32, 32, 3)),
}


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("name", ["two blocks", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_the_loss_of_a_resnet_is_zero_at_the_truth(name, fidelity):
    model = RESNETS[name]()
    variables = jax.jit(model.init)(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (1, *model.image_shape))
    labels = jnp.array([0])
    defense = gx.parse(FORMS[fidelity]("sparsify:0.9"))
    update = jax.jit(gx.gradient, static_argnums=0)(model, variables, image, labels)
    observed, _ = jax.jit(lambda g: defense.apply(None, g, None))(update)
    estimated = jax.jit(defense.view.estimate, static_argnums=1)(observed, model.head)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(method, observed, estimated, images):
        speed = gx.Speed(method=method)
        made = gx.matching_loss(
            model, variables, observed, view=defense.view, estimated=estimated, speed=speed
        )
        return made(images, labels)

    scale = float(trees.total(trees.sq_norms(observed)))
    for method in ("fused", "direct"):
        assert float(loss(method, observed, estimated, image[None])[0]) < 1e-9 * scale


#: Compiled once for each size, whatever the count.
SELECT = jax.jit(zero_smallest)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    classes=st.sampled_from([2, 3, 10, 100]),
    rate=st.floats(0, 1),
)
def test_equal_groups_are_cut_at_the_same_places(seed, classes, rate):
    """Groups of equal magnitudes, rounded in two ways; and the places that were kept once."""
    rng = np.random.default_rng(seed)
    values = np.repeat(np.exp(rng.standard_normal(3000 // classes + 1)), classes)
    values *= rng.choice([-1, 1], values.size)
    count = round(rate * values.size)

    def zeros(noise, kept=None):
        rounded = values * (1 + noise * rng.uniform(-1, 1, values.size))
        after = np.asarray(SELECT(jnp.asarray(rounded, jnp.float32), count, kept))
        assert np.sum(after == 0) == count
        return after == 0

    first = zeros(1e-8)
    np.testing.assert_array_equal(first, zeros(1e-8))
    np.testing.assert_array_equal(first, zeros(3e-4, jnp.asarray(~first)))
