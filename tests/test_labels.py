"""Label inference on untrained models, under every defense, one image and batches with repeats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggl_jax as gx
from ggl_jax.adversary.labels import infer_labels, smallest_labels
from ggl_jax.audit.paper import FORMS
from ggl_jax.client.defenses import parse
from ggl_jax.client.gradients import gradient, local_update
from ggl_jax.client.models import convnet
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client
from ggl_jax.types import Context

K = 10
DEFENSES = [
    "none",
    "noise:0.05",
    "clip:0.5",
    "sparsify:0.9",
    "soteria:0.8",
    "clip:1+noise:0.01",
    "sparsify:0.9+noise:0.001",
]


@pytest.fixture(scope="module")
def setting():
    model = convnet(num_classes=K, image_shape=(16, 16, 3))
    variables = model.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    public = jax.random.uniform(jax.random.key(2), (32, 16, 16, 3))
    logits, features = jax.jit(model.apply)(variables, public)
    knowledge = {"probabilities": jax.nn.softmax(logits).mean(0), "features": features.mean(0)}
    share = jax.jit(lambda images, labels: gradient(model, variables, images, labels))
    return model, variables, images, knowledge, share


@pytest.fixture(scope="module")
def infer(setting):
    head = setting[0].head

    @functools.cache
    def compiled(batch_size, **options):
        return jax.jit(lambda u, **known: infer_labels(u, head, batch_size, **options, **known))

    def infer(update, batch_size=1, known=None, **options):
        labels = compiled(batch_size, **options)(update, **(known or {}))
        assert labels.shape == (batch_size,)
        assert labels.dtype == jnp.int32
        return labels.tolist()

    return infer


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("spec", DEFENSES)
def test_one_image_under_every_defense(setting, infer, spec, fidelity):
    model, variables, images, _, _ = setting
    defense = parse(FORMS[fidelity](spec))

    @jax.jit
    def share(key, image, label):
        update = gradient(model, variables, image, label)
        return defense.apply(key, update, Context(model, variables, image, label))[0]

    for label in (0, 4, 9):
        observed = share(jax.random.key(label), images[label % 8][None], jnp.array([label]))
        found = infer(observed) if fidelity == "paper" else smallest_labels(observed, model.head)
        assert list(found) == [label]


BATCHES = [[3, 3], [0, 9], [1, 1, 1], [5, 2, 5, 5], [7] * 8, [0, 0, 1, 1, 1, 2, 9, 9]]


@pytest.mark.parametrize("labels", BATCHES)
def test_repeats_are_counted(setting, infer, labels):
    _, _, images, knowledge, share = setting
    update = share(images[: len(labels)], jnp.array(labels))
    assert infer(update, len(labels)) == sorted(labels)
    assert infer(update, len(labels), knowledge) == sorted(labels)


@pytest.mark.parametrize("spec", ["noise:0.02", "clip:0.5", "sparsify:0.9", "clip:1+noise:0.005"])
def test_repeats_are_counted_under_defenses(setting, infer, spec):
    _, _, images, knowledge, share = setting
    labels = [5, 2, 5, 5]
    defense = parse(spec)
    apply = jax.jit(lambda key, update: defense.apply(key, update, None)[0])
    observed = apply(jax.random.key(0), share(images[:4], jnp.array(labels)))
    assert infer(observed, 4, knowledge) == sorted(labels)


def test_global_clipping_scales_the_counts(setting, infer):
    """The scale is read from the classes that do not occur."""
    _, _, images, knowledge, share = setting
    update = share(images[:4], jnp.array([5, 2, 5, 5]))
    small = parse("clip:0.3,layerwise=False").apply(None, update, None)[0]
    assert infer(small, 4, knowledge) == [2, 5, 5, 5]


def test_local_steps_are_divided_out(setting, infer):
    model, variables, images, knowledge, _ = setting
    labels = jnp.array([5, 2, 5])
    update = jax.jit(
        lambda: local_update(
            model, variables, images[:3], labels, local_steps=3, learning_rate=1e-3
        )
    )()
    assert infer(update, 3, knowledge, num_steps=3) == [2, 5, 5]


@pytest.mark.parametrize("optimizer", ["sgd:momentum=0.9", "adam"])
def test_the_server_reads_labels_after_local_steps(
    tiny_model, tiny_variables, tiny_prior, tiny_prior_params, optimizer
):
    """With momentum early gradients count several times; of Adam one image's label can be read."""
    labels = [0, 0, 1, 2, 2, 2] if optimizer != "adam" else [2]
    client = Client(len(labels), 3, local_learning_rate=1e-3, local_optimizer=optimizer)
    public = gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)
    latents = tiny_prior.sample_latent(jax.random.key(5), len(labels))
    images = tiny_prior.apply(tiny_prior_params, latents, jnp.zeros(len(labels), jnp.int32))
    none = parse("none")
    sent, _ = gx.share(jax.random.key(0), public, images, labels, defense=none, client=client)
    search = gx.Search(optimizer="cma_es:4", steps=1)
    options = {"view": none.view, "client": client, "search": search}
    (found,) = gx.reconstruct(jax.random.key(1)[None], public, [sent], **options)
    assert sorted(found.labels.tolist()) == labels
    if optimizer == "adam":
        options["client"] = Client(2, 3, local_optimizer="adam")
        with pytest.raises(GGLError, match=r"labels: .*adam.*cannot be counted"):
            gx.reconstruct(jax.random.key(1)[None], public, [sent], **options)


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    seed=st.integers(0, 10**6),
    with_bias=st.booleans(),
    sigma=st.sampled_from([0.0, 0.003]),
)
def test_counts_of_a_model_with_known_probabilities(labels, seed, with_bias, sigma):
    """Features and probabilities that scatter by 10 % about known means, 5 classes, 8 images."""
    rng = np.random.default_rng(seed)
    mean_features, mean_logits = rng.gamma(2, 0.5, 256), rng.normal(0, 0.3, 5)
    features = mean_features * (1 + 0.1 * rng.standard_normal((8, 256))).clip(0)
    logits = mean_logits + 0.1 * rng.standard_normal((8, 5))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)  # noqa: E731
    residual = softmax(logits) - np.eye(5)[labels]
    head = {"kernel": features.T @ residual / 8}
    if with_bias:
        head["bias"] = residual.mean(0)
    head = {
        k: jnp.asarray(v + sigma * rng.standard_normal(v.shape), jnp.float32)
        for k, v in head.items()
    }
    found = counted(
        {"fc": head},
        jnp.asarray(softmax(mean_logits), jnp.float32),
        jnp.asarray(mean_features, jnp.float32),
    )
    assert found.tolist() == sorted(labels)


@jax.jit
def counted(update, probabilities, features):
    return infer_labels(update, ("fc",), 8, probabilities=probabilities, features=features)


def test_a_lost_bias_does_not_lose_the_label():
    """Noise ten times the bias gradient: the sums over 512 features still tell."""
    rng = np.random.default_rng(0)
    hits = 0
    for label in range(4):
        residual = np.full(4, 0.25) - np.eye(4)[label]
        update = {"fc": {"kernel": np.outer(rng.gamma(2, 0.5, 512), residual), "bias": residual}}
        update = jax.tree.map(
            lambda x: jnp.asarray(x + 3 * rng.standard_normal(x.shape), jnp.float32), update
        )
        hits += counted_one(update).tolist() == [label]
    assert hits >= 3


@jax.jit
def counted_one(update):
    return infer_labels(update, ("fc",))


def test_code_takes_each_class_once(setting, infer):
    _, _, images, _, share = setting
    update = share(images[:3], jnp.array([7, 7, 1]))
    found = smallest_labels(update, setting[0].head, 3).tolist()
    assert len(set(found)) == 3
    assert {1, 7} <= set(found)


def test_batches_of_instances_through_vmap(setting, infer):
    model, _, images, _, share = setting
    updates = [share(images[i : i + 1], jnp.array([label])) for i, label in enumerate((3, 8))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *updates)
    found = jax.jit(jax.vmap(lambda u: infer_labels(u, model.head)))(stacked)
    assert found.tolist() == [[3], [8]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, allowed: whole numbers of at least 1"),
        ({"batch_size": 1.5}, "batch_size: got 1.5"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"head": ("Dense_9",)}, "no matrix Dense_9/kernel"),
    ],
)
def test_bad_arguments_get_one_line(options, message):
    update = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(GGLError, match=message) as error:
        infer_labels(update, **{"head": ("fc",), **options})
    assert "\n" not in str(error.value)
