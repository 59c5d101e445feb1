"""Fixtures shared by the tests: tiny models and priors that compile in a second."""
# ruff: noqa: E402, I001  (the environment comes before JAX)

import functools
import gc
import os
import tempfile

# Most of the tests' time is compilation of small programs: let XLA optimise them less, and keep
# what was compiled, since each audit builds its programs anew. The older emitters compile in half
# the time, and one module is faster than 32 where each worker has one core.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
_cache = tempfile.TemporaryDirectory(prefix="ggl_jax-tests-")
# Each worker has its own: JAX writes entries in place, and another worker could read half of one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
# Audits in tests do not depend on what weights the user has installed.
os.environ["GGL_JAX_WEIGHTS"] = os.path.join(_cache.name, "weights")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import ggl_jax as gx
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from ggl_jax import checkpoint
from ggl_jax.adversary.search import release_programs
from ggl_jax.client.models import from_flax
from ggl_jax.priors import dcgan
from ggl_jax.types import Prior

# JAX makes an MLIR context with all dialects for each program: 5 ms, a third of what a small one
# takes. The programs of one file share theirs. The name is JAX's own: without it tests are slower.
try:
    from jax._src.interpreters import mlir

    _make_context = functools.lru_cache(mlir.make_ir_context)
    mlir.make_ir_context = _make_context
except (ImportError, AttributeError):
    _make_context = functools.lru_cache(lambda: None)

# Tracing makes many objects that live on: collect seldom, and never what the imports made.
gc.freeze()
gc.set_threshold(20_000)

TINY_SHAPE = (8, 8, 3)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """A worker that kept all programs of its half of the suite would hold 5 GB; this is half."""
    yield
    _make_context.cache_clear()  # a context holds its programs' constants
    release_programs(0.15)


class TinyNet(nn.Module):
    """Two convolutions and a Dense layer: enough structure for every defense."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="session")
def tiny_model():
    return from_flax(TinyNet(), image_shape=TINY_SHAPE, num_classes=3)


@pytest.fixture(scope="session")
def tiny_variables(tiny_model):
    return tiny_model.init(jax.random.key(0))


def make_tiny_prior(latent_dim: int = 4) -> Prior:
    """A fixed smooth map from latents to images: a sum of plane waves through a sigmoid."""
    h, w, c = TINY_SHAPE
    size = h * w * c

    def init(key):
        return {"basis": jax.random.normal(key, (latent_dim, size))}

    def apply(params, latents, labels):
        del labels
        return jax.nn.sigmoid(latents @ params["basis"]).reshape(-1, h, w, c)

    def sample_latent(key, num):
        return jax.random.normal(key, (num, latent_dim))

    return Prior(init, apply, sample_latent, latent_dim, TINY_SHAPE, "tiny")


@pytest.fixture(scope="session")
def tiny_prior():
    return make_tiny_prior()


@pytest.fixture(scope="session")
def tiny_prior_params(tiny_prior):
    return tiny_prior.init(jax.random.key(1))


@pytest.fixture(scope="session")
def tiny_images(tiny_prior, tiny_prior_params):
    """Two images in the prior's range."""
    latents = tiny_prior.sample_latent(jax.random.key(2), 2)
    return jnp.asarray(tiny_prior.apply(tiny_prior_params, latents, jnp.zeros(2, jnp.int32)))


def write_tiny_prior(folder):
    """An untrained, tiny DCGAN as a checkpoint with a card; gives the folder."""
    arguments = {"width": 2, "latent_dim": 4}
    card = {"name": "tiny", "kind": "dcgan", "arguments": arguments, "trained_on": [], "data": []}
    checkpoint.save(folder, jax.jit(dcgan(**arguments).init)(jax.random.key(0)), card)
    return folder


#: One specification of every registered defense, by its name, of effect on the tiny model's update.
DEFENSE_SPECS = {
    "none": "none",
    "noise": "noise:0.1",
    "clip": "clip:0.5",
    "sparsify": "sparsify:0.9",
    "soteria": "soteria:0.2",
    "sign": "sign",
    "qsgd": "qsgd:3",
    "ternary": "ternary:2",
    "topk": "topk:0.1",
    "randomk": "randomk:0.3",
    "dropout": "dropout:0.4",
    "laplace": "laplace:0.1",
    "dpsgd": "dpsgd:0.5,multiplier=0.1",
    "flower": "flower:0.5,sensitivity=0.001",
    "percentile": "percentile:60,gamma=0.05",
    "svt": "svt:0.3,epsilon=5,noise_var=1,gamma=0.1,tau=0.01",
    "outpost": "outpost:0.5",
    "censor": "censor:3",
    "mixup": "mixup:2",
    "ats": "ats:43-18-18",
    "precode": "precode",
    "graddefense": "graddefense:0.1,roots=3",
}


def attack_of(name, model, prior, *, view=None, client=None, speed=None, **options):
    """An attack by name, as published but for the options."""
    search = gx.search_of("paper", name, **options)
    return gx.search_attack(model, prior, search, view=view, client=client, speed=speed)
