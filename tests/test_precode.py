"""PRECODE: a bottleneck with noise, which the update of a single image tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ggl_jax as gx
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.client.bottleneck import NAME, with_bottleneck, with_noise
from ggl_jax.client.defenses.precode import noise_of
from ggl_jax.client.models import get_model
from ggl_jax.types import Context

SIZE = 5


@pytest.fixture(scope="module")
def context(tiny_model, tiny_images):
    model = with_bottleneck(tiny_model, SIZE)
    variables = jax.jit(model.init)(jax.random.key(3))
    return Context(model, variables, tiny_images, jnp.array([1, 0]))


def drawn(key, num):
    return jax.random.normal(key, (num, SIZE))


def test_the_bottleneck_is_the_papers(tiny_model, context):
    """Beside torch, from the features on: encoder, softplus, noise, decoder, last layer."""
    params, noise = context.variables["params"], drawn(jax.random.key(1), 2)
    _, features = tiny_model.apply({"params": params}, context.images)
    variables = with_noise(context.variables, noise)
    logits, decoded = context.model.apply(variables, context.images)

    def dense(layer, x):
        kernel, bias = (torch.tensor(np.asarray(layer[part])) for part in ("kernel", "bias"))
        return torch.nn.functional.linear(x, kernel.T, bias)

    law = dense(params[NAME]["encoder"], torch.tensor(np.asarray(features)))
    spread = torch.nn.functional.softplus(law[:, SIZE:])
    inner = law[:, :SIZE] + spread * torch.tensor(np.asarray(noise))
    outer = dense(params[NAME]["decoder"], inner)
    expected = dense(params[context.model.head[0]], outer)
    np.testing.assert_allclose(decoded, outer, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    reach = params[NAME]["decoder"]["kernel"]
    assert 0.9 * SIZE**-0.5 < np.abs(reach).max() <= SIZE**-0.5


def test_on_average_the_logits_are_those_without_noise(context):
    def logits(key):
        variables = with_noise(context.variables, drawn(key, 2))
        return context.model.apply(variables, context.images)[0]

    found = jax.jit(jax.vmap(logits))(jax.random.split(jax.random.key(0), 400))
    mean, _ = context.model.apply(context.variables, context.images)
    spread = np.std(found, axis=0)
    assert np.all(np.abs(found.mean(axis=0) - mean) < 5 * spread / 20)
    assert spread.min() > 0.01


def test_the_update_of_one_image_tells_the_noise(context):
    defense, key = gx.parse("precode"), jax.random.key(2)
    one = context._replace(images=context.images[:1], labels=context.labels[:1])
    observed, _ = defense.apply(key, None, one)
    estimated = defense.view.estimate(observed, one.model.head)
    assert estimated["single"] == 1
    features = one.model.apply(one.variables, one.images)  # of the decoder: not those
    assert features[1].shape == (1, estimated["features"].size)
    np.testing.assert_allclose(noise_of(estimated, one.variables), drawn(key, 1), rtol=2e-3)

    def loss_at(variables):
        loss = matching_loss(one.model, variables, observed, view=defense.view, estimated=estimated)
        return loss(one.images[None], one.labels)[0]

    energy = sum(float(jnp.sum(y**2)) for y in jax.tree.leaves(observed))
    rewired = defense.view.rewire(estimated, one.variables, one.model.head)
    assert loss_at(rewired) < 1e-6 * energy
    assert loss_at(one.variables) > 1e-3 * energy  # at the mean


def test_of_several_images_or_under_noise_the_mean_is_taken(context):
    defense = gx.parse("precode")
    observed, _ = defense.apply(jax.random.key(2), None, context)
    estimated = defense.view.estimate(observed, context.model.head)
    assert estimated["single"] == 0
    assert not np.any(noise_of(estimated, context.variables))
    one = context._replace(images=context.images[:1], labels=context.labels[:1])
    observed, _ = defense.apply(jax.random.key(2), None, one)
    noisy = defense.view.estimate(observed, one.model.head, noise=jnp.float32(0.1))
    assert not np.any(noise_of(noisy, one.variables))


def test_a_model_by_name_and_one_without_a_bottleneck(context, tiny_model, tiny_variables):
    model = get_model("precode:base=convnet/width=4/batch_norm=train,size=7", 3, (8, 8, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert shapes["params"][NAME]["encoder"]["bias"].shape == (14,)
    assert shapes[NAME]["noise"].shape == (1, 7)
    assert model.statistics is not None
    for text, said in (
        ("precode:base=convnet/widht=4", "base: model: 'widht=4'"),
        ("precode:nope", "base: model: got 'nope'"),
        ("precode:none", "base: got None"),
        ("precode:size=0", "size: got 0"),
    ):
        with pytest.raises(gx.GGLError, match=said):
            get_model(text)
    plain = Context(tiny_model, tiny_variables, context.images, context.labels)
    with pytest.raises(gx.GGLError, match="has no bottleneck"):
        gx.parse("precode").apply(jax.random.key(0), None, plain)
    with pytest.raises(gx.GGLError, match="has no bottleneck"):
        gx.parse("precode").view.estimate(tiny_variables["params"], tiny_model.head)
