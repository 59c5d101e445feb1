"""GradDefense: sensitivities, slices and noise as released, and a server that sees the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE
from jax.flatten_util import ravel_pytree

import ggl_jax as gx
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.client.defenses._images import public_set
from ggl_jax.client.defenses.graddefense import sensitivities, slices_of
from ggl_jax.client.models import convnet
from ggl_jax.types import Context


@pytest.fixture(scope="module")
def context():
    model = convnet(3, (16, 16, 3), width=8)
    variables = jax.jit(model.init)(jax.random.key(0))
    images, _ = public_set("faces", (16, 16, 3))
    return Context(model, variables, jnp.asarray(images[40:41]), jnp.array([1]))


@pytest.fixture(scope="module")
def update(context):
    return gx.gradient(context.model, context.variables, context.images, context.labels)


def test_sensitivities_are_those_of_two_backward_passes(tiny_model, tiny_variables, tiny_images):
    labels = jnp.array([1, 2])

    def total(images, place):
        found = gx.gradient(tiny_model, tiny_variables, images, labels)
        return jnp.sum(jax.tree.leaves(found)[place])

    slope = jax.jit(jax.grad(total), static_argnums=1)
    found = sensitivities(tiny_model, tiny_variables, tiny_images, labels)
    assert jax.tree.structure(found) == jax.tree.structure(tiny_variables["params"])
    for place, one in enumerate(jax.tree.leaves(found)):
        each = np.linalg.norm(np.asarray(slope(tiny_images, place)).reshape(2, -1), axis=1)
        # The head's columns sum to zero over the classes, so their sum tells nothing.
        assert one == pytest.approx(each.mean(), rel=1e-3, abs=1e-5)


def test_slices_are_stretches_of_equal_sensitivity():
    tree = {"a": np.zeros((6, 5)), "b": np.zeros(200), "c": np.zeros((10, 7))}
    levels = {"a": jnp.float32(3), "b": jnp.float32(1), "c": jnp.float32(6)}
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(slices_of(tree, levels, 5))])
    each = np.concatenate([np.full(30, 3 / 30), np.full(200, 1 / 200), np.full(70, 6 / 70)])
    assert np.all(np.diff(found) >= 0)
    sums = np.bincount(found, weights=each)
    np.testing.assert_allclose(sums, 2, atol=0.11)  # of 10 in 5, up to one entry


def test_noise_is_on_the_drawn_slices_alone(tiny_model, tiny_variables, tiny_images):
    context = Context(tiny_model, tiny_variables, tiny_images[:1], jnp.array([1]))
    update = gx.gradient(*context)
    defense = gx.parse("graddefense:0.3,slices=8,perturbed=3,roots=4")
    images, _ = public_set("faces", TINY_SHAPE)
    labels = np.arange(4) % 3
    found = sensitivities(context.model, context.variables, jnp.asarray(images[:4]), labels)
    at = np.asarray(ravel_pytree(slices_of(update, found, 8))[0])
    draw = jax.jit(lambda key: defense.apply(key, update, context))
    drawn = set()
    for seed in range(6):
        sent, record = draw(jax.random.key(seed))
        noise = np.asarray(ravel_pytree(jax.tree.map(jnp.subtract, sent, update))[0])
        noisy = [s for s in range(8) if np.any(noise[at == s] != 0)]
        assert len(noisy) == 3
        drawn |= {tuple(noisy)}
        on = np.isin(at, noisy)
        assert np.all(noise[~on] == 0)
        assert record["rate"] == pytest.approx(on.mean())
        assert abs(noise[on].std() / 0.3 - 1) < 5 / np.sqrt(2 * on.sum())
        assert abs(noise[on].mean()) < 5 * 0.3 / np.sqrt(on.sum())
    assert len(drawn) > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_the_server_sees_which_entries_have_noise(seed, context, update):
    """But for the blocks in which a slice ends, and where the gradient is as large as the noise."""
    view = gx.parse("graddefense").view
    at = np.arange(sum(leaf.size for leaf in jax.tree.leaves(update)))
    noisy = (at // 1300 + seed) % 2 == 0
    rng = np.random.default_rng(seed)
    flat, back = ravel_pytree(update)
    sent = back(flat + 0.1 * noisy * rng.normal(size=at.size))
    estimated = jax.jit(lambda y: view.estimate(y, ("fc",)))(sent)
    assert estimated["scale"] == pytest.approx(0.1, rel=0.05)
    kept = np.asarray(ravel_pytree(estimated["mask"])[0])
    assert np.mean(noisy == (kept == 0)) > 0.8
    assert np.mean(kept[noisy]) < 0.25
    assert estimated["rate"] == pytest.approx(noisy.mean(), abs=0.15)

    # Candidates are told apart as without noise on what is left.
    images = jnp.stack([context.images, 1 - context.images])

    @jax.jit
    def losses(observed, estimated):
        loss = matching_loss(
            context.model, context.variables, observed, view=view, estimated=estimated
        )
        return loss(images, context.labels)

    near, far = losses(sent, estimated)
    seen = 0.01 * np.sum(noisy & (kept == 0))
    assert near < 1.1 * seen + 0.01 * np.sum(noisy & (kept == 1))
    clean_near, clean_far = losses(update, estimated)
    assert far - near > 0.5 * (clean_far - clean_near) > 0


def test_nothing_is_seen_where_all_is_noise_or_more_lies_on_top(update):
    view = gx.parse("graddefense").view
    rng = np.random.default_rng(0)
    sent = jax.tree.map(lambda g: jnp.asarray(rng.normal(size=g.shape), jnp.float32), update)
    estimate = jax.jit(lambda y, noise: view.estimate(y, ("fc",), noise=noise))
    noisy = estimate(sent, jnp.float32(0.1))
    assert noisy["scale"] == 0
    assert all(bool(jnp.all(kept == 1)) for kept in jax.tree.leaves(noisy["mask"]))
    wide = {"w": jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)}
    assert estimate(wide, 0.0)["rate"] > 0.999
    assert jnp.all(estimate(wide, 0.0)["mask"]["w"] == 1)
    with pytest.raises(gx.GGLError, match="graddefense: perturbed: got 4, allowed: 1 to slices, 3"):
        gx.parse("graddefense:0.1,slices=3,perturbed=4")
