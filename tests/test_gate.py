"""The gate: kinds of objects that users bring, by kinds of faults; each refused in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY_SHAPE, make_tiny_prior
from flax import linen as nn
from flax import nnx

import ggl_jax as gx
from ggl_jax.adversary.optimizers.base import make_info
from ggl_jax.audit import metrics
from ggl_jax.gate.defenses import check_defense
from ggl_jax.gate.parts import check_attack, check_metric, check_optimizer
from ggl_jax.types import Candidates


class Tiny(nn.Module):
    outputs: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(2, (3, 3), strides=4)(x))
        return nn.Dense(self.outputs)(x.reshape(len(x), -1))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(3)(x)


class Aged(nn.Module):
    @nn.compact
    def __call__(self, x, age):
        return nn.Dense(3)(x.reshape(len(x), -1) + age)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Branching(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x.reshape(len(x), -1))
        return x if x.sum() > 0 else -x


MODEL = gx.from_flax(Tiny(), TINY_SHAPE)
PRIOR = make_tiny_prior()
PRIOR_PARAMS = PRIOR.init(jax.random.key(0))
IMAGES = np.random.default_rng(0).random((2, *TINY_SHAPE)).astype(np.float32)
STEPS = gx.Search(optimizer="adam:0.1", steps=2, regularizer="none")


@functools.cache
def variables():
    return MODEL.init(jax.random.key(0))


def inputs(**changes):
    """What an audit makes of its arguments before any work."""
    from ggl_jax.audit.cells import Inputs

    given = {"images": IMAGES, "labels": [0, 1], "model": MODEL, "prior": PRIOR}
    return Inputs(**{**given, "prior_params": PRIOR_PARAMS, **changes})


def apply_with(change):
    """The tiny model with another ``apply``, made of the logits and features of its own."""
    return MODEL._replace(apply=lambda v, x: change(*MODEL.apply(v, x)))


def each(change):
    return lambda key, update: jax.tree.map(change, update)


def defended(fn, **options):
    return lambda: check_defense(gx.from_function(fn, name="mine", **options), MODEL)


def prior_with(**changes):
    return lambda: inputs(prior=PRIOR._replace(**changes))


def made(change):
    return prior_with(apply=lambda p, z, y: change(PRIOR.apply(p, z, y)))


def metric(value):
    return lambda: check_metric(lambda x, y, model, v: value(x), "mine", MODEL, variables())


def step_gives(change):
    """An optimiser whose step's result is changed."""

    def step(key, state, loss_fn):
        return change(state, make_info(state, loss_fn(state)))

    one = gx.Optimizer(lambda key, z: z, step, lambda r: r, "mine")
    return lambda: check_optimizer(one, "mine")


def attack_with(**changes):
    shape = (2, 1, *TINY_SHAPE)
    found = {
        **{"points": jnp.zeros((2, 4)), "images": jnp.zeros(shape)},
        **{"labels": jnp.zeros((2, 1), jnp.int32), "losses": jnp.zeros(2)},
        "distances": jnp.zeros(2),
    }
    fields = {k: v for k, v in changes.items() if k in found}
    info = make_info(jnp.zeros((2, 4)), jnp.zeros(2))
    attack = gx.Attack(
        init=lambda key, problem, points=None: jnp.zeros(2),
        step=lambda key, problem, state: (state, info),
        candidates=lambda problem, state: Candidates(**{**found, **fields}),
        distances=lambda problem, images, labels: jnp.zeros(len(images)),
        evaluations_per_step=1,
        evaluations_at_start=0,
        name="mine",
    )._replace(**{k: v for k, v in changes.items() if k not in found})
    view = gx.parse("none").view
    return lambda: check_attack(attack, "mine", MODEL, PRIOR_PARAMS, view, 1)


def nnx_module():
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def plain(params, images):
    return images.reshape(len(images), -1) @ params["w"] + params["b"]


WEIGHTS = {"w": np.ones((192, 3), np.float32), "b": np.zeros(3, np.float32)}


def function(apply=plain, params=None, **options):
    params = WEIGHTS if params is None else params
    return lambda: gx.from_function_model(apply, params, TINY_SHAPE, **options)


#: Kind of object, kind of fault -> what brings it in, and what the line says.
FAULTS = {
    # models: how they are made
    ("linen", "dropout without a key"): (lambda: gx.from_flax(Dropped(), TINY_SHAPE), "dropout"),
    ("linen", "a second input"): (lambda: gx.from_flax(Aged(), TINY_SHAPE), "'age'"),
    ("linen", "one logit"): (lambda: gx.from_flax(Tiny(1), TINY_SHAPE), "1 logit"),
    ("linen", "other classes"): (lambda: gx.from_flax(Tiny(), TINY_SHAPE, 5), "num_classes=5"),
    ("linen", "branches in Python"): (lambda: gx.from_flax(Branching(), TINY_SHAPE), "branches"),
    ("linen", "updates statistics"): (lambda: gx.from_flax(Normed(), TINY_SHAPE), "mutable"),
    ("linen", "two sizes"): (lambda: gx.from_flax(Tiny(), (8, 8)), "image_shape"),
    ("linen", "unknown loss"): (lambda: gx.from_flax(Tiny(), TINY_SHAPE, loss="hinge"), "loss="),
    ("linen", "an NNX module"): (lambda: gx.from_flax(nnx_module(), TINY_SHAPE), "Linear"),
    ("nnx", "a Linen module"): (lambda: gx.from_nnx(Tiny(), TINY_SHAPE), "gx.from_flax"),
    ("nnx", "does not fit"): (lambda: gx.from_nnx(nnx_module(), TINY_SHAPE), "linear"),
    ("function", "no function"): (function(apply=3), "apply is int"),
    ("function", "no arrays"): (function(params={"w": "x"}), "params: w is str"),
    ("function", "whole numbers"): (function(params={"w": np.ones(3, int)}), "int64"),
    ("function", "nothing"): (function(params={}), "no array"),
    ("function", "no last layer"): (function(lambda p, x: plain(p, x) ** 2), "head="),
    ("function", "unknown head"): (function(head="v"), "head='v'"),
    ("function", "several outputs"): (
        function(lambda p, x: {"a": plain(p, x), "b": plain(p, x)}), "return one"
    ),
    ("function", "one logit"): (
        function(lambda p, x: plain(p, x)[:, :1], head="w"), "1 logit"
    ),
    ("function", "features but no head"): (function(lambda p, x: (plain(p, x), x)), "head="),
    ("function", "NumPy"): (function(lambda p, x: np.asarray(x).sum(0)), "NumPy"),
    # models: as an audit gets them
    ("model", "a Linen module"): (lambda: inputs(model=Tiny()), "gx.from_flax"),
    ("model", "an NNX module"): (lambda: inputs(model=nnx_module()), "gx.from_nnx"),
    ("model", "a name"): (lambda: inputs(model="resnet18"), "model: got str"),
    ("model", "logits only"): (lambda: inputs(model=apply_with(lambda y, f: y)), "features"),
    ("model", "three results"): (lambda: inputs(model=apply_with(lambda y, f: (y, f, f))), "a tup"),
    ("model", "features of another layer"): (
        lambda: inputs(model=apply_with(lambda y, f: (y, y))), "head=('Dense_0',)"
    ),
    ("model", "too few classes"): (lambda: inputs(model=MODEL._replace(num_classes=2)), "3 logits"),
    ("model", "one class"): (lambda: inputs(model=MODEL._replace(num_classes=1)), "num_classes"),
    ("model", "a list as head"): (lambda: inputs(model=MODEL._replace(head=["a"])), "head is list"),
    ("model", "an unknown head"): (lambda: inputs(model=MODEL._replace(head=("a",))), "a/kernel"),
    ("model", "a list as shape"): (
        lambda: inputs(model=MODEL._replace(image_shape=[8, 8, 3])), "image_shape"
    ),
    ("model", "init without params"): (
        lambda: inputs(model=MODEL._replace(init=lambda k: MODEL.init(k)["params"])), "'params'"
    ),
    ("model", "no init"): (lambda: inputs(model=MODEL._replace(init=None)), "init: got NoneType"),
    ("model", "probabilities"): (
        lambda: inputs(model=apply_with(lambda y, f: (jax.nn.softmax(y), f))), "softmax"
    ),
    ("model", "sigmoids"): (
        lambda: inputs(model=apply_with(lambda y, f: (jax.nn.sigmoid(y), f))), "sigmoid"
    ),
    ("model", "always the same"): (
        lambda: inputs(model=apply_with(lambda y, f: (0 * y, 0 * f))), "same features"
    ),
    ("model", "NaN"): (lambda: inputs(model=apply_with(lambda y, f: (y / 0 * 0, f))), "NaN"),
    ("model", "NumPy's randomness"): (
        lambda: inputs(model=apply_with(lambda y, f: (y + np.random.normal(), f))), "jax.random"
    ),
    ("model", "a loss for each image"): (
        lambda: inputs(model=MODEL._replace(loss=lambda y, t: y[:, 0])), "loss(logits, labels)"
    ),
    # variables
    ("variables", "without params"): (lambda: inputs(variables=variables()["params"]), "'params'"),
    ("variables", "other classes"): (
        lambda: inputs(variables=gx.from_flax(Tiny(5), TINY_SHAPE).init(jax.random.key(0))), "(5,)"
    ),
    ("variables", "a layer missing"): (
        lambda: inputs(variables={"params": {"Dense_0": variables()["params"]["Dense_0"]}}),
        "has no params/Conv_0",
    ),
    ("variables", "NaN"): (
        lambda: inputs(variables=jax.tree.map(lambda x: x * jnp.nan, variables())), "NaN"
    ),
    ("variables", "no tree"): (lambda: inputs(variables=3), "variables: got"),
    # images and labels
    ("images", "none"): (lambda: inputs(images=[], labels=[]), "got none"),
    ("images", "text"): (lambda: inputs(images="face.png"), "no array of numbers"),
    ("images", "of several sizes"): (
        lambda: inputs(images=[np.ones((8, 8, 3)), np.ones((9, 9, 3))]), "no array of numbers"
    ),
    ("images", "None"): (lambda: inputs(images=None), "images"),
    ("images", "bytes"): (lambda: inputs(images=IMAGES * 255), "255"),
    ("images", "one alone"): (lambda: inputs(images=IMAGES[0]), "shape (8, 8, 3)"),
    ("images", "grey"): (lambda: inputs(images=IMAGES[..., :1]), "shape"),
    ("labels", "names"): (lambda: inputs(labels=["cat", "dog"]), "number classes"),
    ("labels", "one too few"): (lambda: inputs(labels=[0]), "one per image"),
    ("labels", "out of range"): (lambda: inputs(labels=[0, 2**31 - 2]), "0 to 2"),
    ("labels", "fractions"): (lambda: inputs(labels=[0.5, 1.0]), "float64"),
    ("labels", "ragged"): (lambda: inputs(labels=[[0], [0, 1]]), "labels"),
    ("classes", "an identifier"): (lambda: gx.resnet18(2**31 - 1), "at most"),
    # priors
    ("prior", "no prior"): (lambda: inputs(prior=3), "prior: got int"),
    ("prior", "parameters forgotten"): (lambda: inputs(prior_params=None), "prior_params: got"),
    ("prior", "other parameters"): (
        lambda: inputs(prior_params={"basis": np.ones((3, 192), np.float32)}), "prior_params"
    ),
    ("prior", "another width"): (prior_with(latent_dim=5), "sample_latent"),
    ("prior", "latents of another width"): (
        prior_with(sample_latent=lambda key, n: jax.random.normal(key, (n, 5))), "(3, 5)"
    ),
    ("prior", "another size"): (prior_with(image_shape=(9, 9, 3)), "(9, 9, 3)"),
    ("prior", "tanh"): (made(lambda x: 2 * x - 1), "(x + 1) / 2"),
    ("prior", "0 to 255"): (made(lambda x: 255 * x), "divide"),
    ("prior", "flat"): (made(lambda x: x.reshape(len(x), -1)), "(3, 192)"),
    ("prior", "NaN"): (made(lambda x: x * jnp.nan), "NaN"),
    ("prior", "always the same"): (made(lambda x: 0 * x + 0.5), "nothing to search"),
    ("prior", "no array"): (made(lambda x: "image"), "no array"),
    ("prior", "NumPy's randomness"): (made(lambda x: x * np.random.random()), "jax.random"),
    ("prior", "NumPy's latents"): (
        prior_with(sample_latent=lambda key, n: np.random.normal(size=(n, 4)).astype("f")),
        "jax.random",
    ),
    ("prior", "one set of latents"): (
        prior_with(sample_latent=lambda key, n: jnp.arange(4.0 * n).reshape(n, 4)), "jax.random"
    ),
    ("prior", "a denoiser that is none"): (prior_with(denoise=3), "denoise: got int"),
    ("prior", "a denoiser without parameters"): (prior_with(denoise=lambda x: x), "denoise: "),
    ("prior", "a denoiser of one image"): (
        prior_with(denoise=lambda params, x: x[0]), "denoise: gave an array (8, 8, 3)"
    ),
    ("prior", "a denoiser in NumPy"): (
        prior_with(denoise=lambda params, x: np.clip(np.asarray(x), 0, 1)), "NumPy"
    ),
    ("prior", "a denoiser in bytes"): (
        prior_with(denoise=lambda params, x: 255 * x), "for images in [0, 1]"
    ),
    ("prior", "a denoiser that makes NaN"): (
        prior_with(denoise=lambda params, x: x * jnp.nan), "from nan to nan"
    ),
    ("prior", "a denoiser at random"): (
        prior_with(denoise=lambda params, x: x * np.random.random()), "denoise: it differs"
    ),
    # defenses
    ("defense", "a function"): (lambda: check_defense(plain, MODEL), "gx.from_function"),
    ("defense", "a number"): (lambda: check_defense(3, MODEL), "defenses: got int"),
    ("defense", "NumPy"): (defended(each(lambda g: np.clip(np.asarray(g), -1, 1))), "NumPy"),
    ("defense", "branches in Python"): (defended(each(lambda g: g if g.sum() > 0 else -g)), "bran"),
    ("defense", "NumPy's randomness"): (
        defended(each(lambda g: g + np.random.normal(size=g.shape))), "jax.random"
    ),
    ("defense", "one noise for all keys"): (
        defended(each(lambda g: g + 1.0), adds_noise=True), "two keys"
    ),
    ("defense", "zero"): (defended(each(jnp.zeros_like)), "zero"),
    ("defense", "constant"): (defended(each(jnp.ones_like)), "same update"),
    ("defense", "no array"): (defended(lambda key, update: "update"), "no array"),
    ("defense", "None"): (defended(lambda key, update: None), "has no"),
    ("defense", "one tensor"): (defended(lambda key, update: update["Dense_0"]), "has no"),
    ("defense", "another shape"): (defended(each(jnp.ravel)), "shape"),
    ("defense", "whole numbers"): (defended(each(lambda g: jnp.sign(g).astype(int))), "int32"),
    ("defense", "another dtype's key"): (
        defended(lambda key, update: jax.random.normal("key", (3,))), "defense mine"
    ),
    ("defense", "fails"): (defended(lambda key, update: 1 / 0), "ZeroDivisionError"),
    ("defense", "an estimate that is no array"): (
        defended(lambda key, u: u, estimate=lambda u, head, noise=0.0: {"a": "four"}), "no array"
    ),
    ("defense", "an estimate that is no dict"): (
        defended(lambda key, u: u, estimate=lambda u, head, noise=0.0: jnp.ones(3)), "a dict"
    ),
    ("defense", "an estimate of other arguments"): (
        defended(lambda key, u: u, estimate=lambda u: {}), "estimate"
    ),
    ("defense", "a simulation of another shape"): (
        defended(lambda key, u: u, simulate=lambda e, u: jax.tree.map(jnp.ravel, u)), "simulate"
    ),
    ("defense", "a noise level for each tensor"): (
        defended(lambda key, u: u, noise_std=lambda e: jnp.ones(3)), "noise_std"
    ),
    ("optax", "accumulates"): (
        lambda: check_defense(gx.from_optax(optax.MultiSteps(optax.sgd(0.1), 4)), MODEL), "zero"
    ),
    ("optax", "a warm-up from zero"): (
        lambda: check_defense(
            gx.from_optax(optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, 9))), MODEL
        ),
        "zero",
    ),
    ("optax", "wants each image's gradient"): (
        lambda: check_defense(
            gx.from_optax(optax.contrib.differentially_private_aggregate(1.0, 1.0, 0)), MODEL
        ),
        "batch dimension",
    ),
    ("optax", "no transformation"): (lambda: gx.from_optax(3), "from_optax: got int"),
    # optimisers, attacks, metrics
    ("optimizer", "no optimiser"): (lambda: check_optimizer(3, "mine"), "ggl_jax.Optimizer"),
    ("optimizer", "no pair"): (step_gives(lambda state, info: info), "step"),
    ("optimizer", "no info"): (step_gives(lambda state, info: (state, state)), "ggl_jax.Info"),
    ("optimizer", "another state"): (step_gives(lambda s, info: (s[:1], info)), "the state after"),
    ("optimizer", "no losses"): (
        step_gives(lambda s, info: (s, info._replace(losses=info.losses[:1]))), "losses"
    ),
    ("optimizer", "NumPy's randomness"): (
        step_gives(lambda s, info: (s + np.random.normal(), info)), "jax.random"
    ),
    ("optimizer", "an odd number of candidates"): (
        step_gives(lambda s, info: (s, info._replace(latents=jnp.ones((3, 3))))), "restarts"
    ),
    ("attack", "no attack"): (
        lambda: check_attack(3, "mine", MODEL, PRIOR_PARAMS, gx.parse("none").view, 1), "gave int"
    ),
    ("attack", "an estimate that is no array"): (attack_with(images="image"), "no array"),
    ("attack", "images without a batch"): (attack_with(images=jnp.zeros((2, 8, 8, 3))), "images"),
    ("attack", "losses of one"): (attack_with(losses=jnp.zeros(())), "losses"),
    ("attack", "labels of none"): (attack_with(labels=jnp.zeros(2, jnp.int32)), "labels"),
    ("attack", "a budget of half"): (attack_with(evaluations_per_step=0.5), "evaluations_per_step"),
    ("attack", "no candidates"): (attack_with(candidates=lambda p, s: s), "Candidates"),
    ("metric", "text"): (metric(lambda x: "good"), "one real number"),
    ("metric", "a whole image"): (metric(lambda x: x), "one real number"),
    ("metric", "None"): (metric(lambda x: None), "one real number"),
    ("metric", "fails"): (metric(lambda x: x @ x.T), "metric mine"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fault"), FAULTS, ids=lambda text: text.replace(" ", "-"))
def test_one_line_for_each_fault(kind, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bring, words = FAULTS[kind, fault]
    with pytest.raises(gx.GGLError) as caught:
        bring()
    message = str(caught.value)
    assert "\n" not in message
    assert words in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": "quick"}, "gx.search_of('quick')"),
        ({"search": {"steps": 3}}, "search: got dict"),
        ({"client": {"batch_size": 2}}, "client: got dict"),
        ({"seed": "a"}, "seed: got 'a'"),
        (
            {"seed": 2**63},
            "seed: got 9223372036854775808, allowed: whole numbers of at least 0 and",
        ),
        ({"speed": 3}, "speed: got int"),
        ({"num_controls": 0}, "num_controls: got 0"),
        ({"ceiling_steps": 0}, "ceiling_steps: got 0"),
        ({"instance_ids": [0, -1]}, "instance_ids[1]"),
        ({"names": ["a", "a"]}, "'a' is there twice"),
        ({"others": IMAGES[:, :4]}, "others: got shape"),
        ({"lpips": "resnet"}, "resnet"),
    ],
)
def test_options_of_other_kinds(options, words):
    with pytest.raises(gx.GGLError) as caught:
        gx.audit(
            *(IMAGES, [0, 1]),
            **{"model": MODEL, "prior": PRIOR, "prior_params": PRIOR_PARAMS},
            **{"defenses": ["none"], **options},
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_is_large_enough():
    assert len(FAULTS) >= 60


def test_what_fits_passes():
    assert inputs(variables=variables()).labels.tolist() == [0, 1]
    assert inputs(names=["a\n\udcff", 1]).names == ["a\\n\\udcff", "1"]
    for fn in (lambda k, u: u, lambda k, u, c: jax.tree.map(jnp.sign, u)):
        defended(fn)()
    attack_with()()
    step_gives(lambda state, info: (state, info))()
    metric(lambda x: jnp.mean(x))()
    check_defense(gx.from_optax(optax.clip_by_global_norm(1.0)), MODEL)


@pytest.mark.parametrize(
    ("given", "words"),
    [([], "got none"), ("none", "a list"), (["none", "none"], "twice"), ([None], "defenses: got")],
)
def test_the_list_of_defenses(given, words):
    with pytest.raises(gx.GGLError, match=words):
        gx.audit(
            IMAGES, [0, 1], model=MODEL, prior=PRIOR, prior_params=PRIOR_PARAMS, defenses=given
        )


def test_settings_of_jax_are_part_of_what_is_audited():
    plain = inputs().digests
    with jax.enable_x64(True), jax.default_matmul_precision("float32"):
        found = inputs().digests
    changed = {"jax_enable_x64": True, "jax_default_matmul_precision": "float32"}
    assert found["jax"] == changed
    assert "jax" not in plain
    with jax.disable_jit(), pytest.raises(gx.GGLError, match="jax_disable_jit: got True"):
        inputs()


def test_own_metrics_are_tried(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "mine", lambda x, y, model, v: x)
    with pytest.raises(gx.GGLError, match="metric mine"):
        inputs()
