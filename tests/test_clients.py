"""The mean of several clients' updates: what is shared, how candidates are compared, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE

import ggl_jax as gx
from ggl_jax.adversary.reconstruct import prepare
from ggl_jax.client.gradients import client_update, gradient, local_update
from ggl_jax.client.models import get_model
from ggl_jax.spec import Client, Search, Speed

LABELS = np.array([0, 2, 1, 1], np.int32)


@pytest.fixture(scope="module")
def world(tiny_prior, tiny_prior_params):
    """A model whose BatchNorm mixes the images of a batch, four images, and what is public."""
    model = get_model("convnet:2,batch_norm=train", 3, TINY_SHAPE)
    variables = jax.jit(model.init)(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).random((4, *TINY_SHAPE)), jnp.float32)
    return images, gx.Public(model, variables, tiny_prior, tiny_prior_params)


def close(a, b, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


def halves(world, update):
    """A function's results for the first and the second two images."""
    images, public = world
    own = jax.jit(lambda x, y: update(public.model, public.variables, x, y))
    return [own(images[part], LABELS[part]) for part in (slice(0, 2), slice(2, 4))]


def test_each_client_defends_its_own_part(world):
    images, public = world
    one, two = halves(world, gradient)
    norms = [np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(u))) for u in (one, two)]
    bound = 0.5 * min(norms)
    expected = jax.tree.map(lambda a, b: bound / 2 * (a / norms[0] + b / norms[1]), one, two)
    client = Client(4, clients=2)
    key = jax.random.key(1)

    def shared(defense):
        return gx.share(key, public, images, LABELS, defense=defense, client=client)

    sent, record = shared(gx.clip(bound=bound, layerwise=False))
    close(sent.update, expected)
    assert float(record["bound"]) == pytest.approx(bound)
    plain = shared(gx.parse("none"))[0].update
    noisy = shared(gx.noise(sigma=0.2))[0].update
    left = np.concatenate(
        [np.ravel(leaf) for leaf in jax.tree.leaves(jax.tree.map(jnp.subtract, noisy, plain))]
    )
    # Two independent draws, averaged. Four standard errors.
    assert abs(left.std() / (0.2 / np.sqrt(2)) - 1) < 4 / np.sqrt(2 * left.size)
    # BatchNorm sees two images at a time: one client with all four shares something else.
    whole = gx.share(key, public, images, LABELS, defense=gx.parse("none"))[0].update
    off = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), whole, plain)
    assert max(jax.tree.leaves(off)) > 1e-2


def test_local_steps_are_each_clients_own(world):
    images, public = world
    client = Client(4, 3, 0.1, "sgd:momentum=0.9", clients=2)

    def alone(model, variables, images, labels):
        options = {"local_steps": 3, "learning_rate": 0.1, "optimizer": "sgd:momentum=0.9"}
        return local_update(model, variables, images, labels, **options)

    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves(world, alone))
    found = jax.jit(lambda x: client_update(client, public.model, public.variables, x, LABELS))
    close(found(images), expected)


@pytest.mark.parametrize("spec", ["none", "clip:0.05,layerwise=False"])
def test_candidates_are_compared_as_the_clients_shared(world, spec):
    """The private images have a loss of 0, in either half; fused agrees with direct."""
    images, public = world
    defense, client = gx.parse(spec), Client(4, clients=2)
    key = jax.random.key(1)
    sent, record = gx.share(key, public, images, LABELS, defense=defense, client=client)
    swapped = jnp.array([2, 3, 0, 1])
    mixed = jnp.array([0, 2, 1, 3])
    candidates = jnp.stack([images, images[swapped], images[mixed]])
    labels = jnp.stack([LABELS, LABELS[swapped], LABELS[mixed]])

    def losses(method):
        def run(variables, update, record, images):
            loss = gx.matching_loss(
                public.model,
                variables,
                update,
                view=defense.view,
                estimated=record,
                client=client,
                speed=Speed(method=method),
            )
            return loss(images, labels)

        return jax.jit(run)(public.variables, sent.update, record, candidates)

    size = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(sent.update))
    found = losses("direct")
    assert max(found[0], found[1]) < 1e-6 * size
    assert found[2] > 1e-3 * size
    if spec == "none":
        np.testing.assert_allclose(losses("fused"), found, atol=1e-6 * size)
    else:
        np.testing.assert_allclose(losses("auto"), found, atol=1e-6 * size)
        with pytest.raises(gx.GGLError, match="'fused' cannot serve the mean of 2 updates"):
            losses("fused")


@pytest.mark.parametrize(
    ("client", "spec", "words"),
    [
        (Client(4, clients=3), "none", "clients: got 3, allowed: divisors of batch_size, .* 4 "),
        (Client(4, clients=2, share_statistics=True), "none", "share_statistics: the variances"),
        (Client(4, clients=2), "soteria:0.5", "clients: what soteria did is read off each"),
        (Client(local_optimizer="adam:b3=1"), "none", "local_optimizer: 'b3=1' in 'adam:b3=1'"),
    ],
)
def test_what_does_not_go_together_is_refused(world, client, spec, words):
    images, public = world
    defense = gx.parse(spec)
    with pytest.raises(gx.GGLError, match=words):
        prepare(public.model, public.prior, defense.view, client, Search())
    if spec == "none":
        with pytest.raises(gx.GGLError, match=words):
            gx.share(jax.random.key(0), public, images, LABELS, defense=defense, client=client)
