"""What every defense and estimator must keep: signatures, purity, one compilation."""

import inspect

import jax
import numpy as np
import pytest

from ggl_jax.audit.paper import FORMS
from ggl_jax.client.defenses import DEFENSES, parse
from ggl_jax.client.gradients import gradient
from ggl_jax.types import Context, Defense

SPECS = [
    "none",
    "noise:0.1",
    "clip:0.5",
    "sparsify:0.9",
    "soteria:0.5",
    "clip:0.5+noise:0.01",
    "soteria:0.5+clip:0.5",
]


@pytest.fixture(scope="module")
def shared(tiny_model, tiny_variables, tiny_images):
    images, labels = tiny_images[:1], np.array([1])
    update = gradient(tiny_model, tiny_variables, images, labels)
    return update, Context(tiny_model, tiny_variables, images, labels)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), a, b)


def test_the_registry_is_covered():
    assert {spec.split(":")[0].split("+")[0] for spec in SPECS} >= set(DEFENSES)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("spec", SPECS)
def test_defense_contract(spec, fidelity, shared):
    update, context = shared
    defense = parse(FORMS[fidelity](spec))
    assert isinstance(defense, Defense)
    assert list(inspect.signature(defense.apply).parameters) == ["key", "update", "context"]
    head = context.model.head
    key = jax.random.key(0)

    eager, record = defense.apply(key, update, context)
    share = jax.jit(
        lambda key, update, images: defense.apply(key, update, context._replace(images=images))
    )
    close(share(key, update, context.images), (eager, record))
    share(jax.random.key(1), update, context.images)
    assert share._cache_size() == 1

    estimate = jax.jit(lambda observed: defense.view.estimate(observed, head))
    estimated = defense.view.estimate(eager, head)
    close(estimate(eager), estimated)
    one = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    close(jax.vmap(lambda o: defense.view.estimate(o, head))(one(eager)), one(estimated))

    simulated = defense.view.simulate(estimated, update)
    close(jax.jit(defense.view.simulate)(estimated, update), simulated)
    close(jax.vmap(defense.view.simulate)(one(estimated), one(update)), one(simulated))
    assert jax.tree.structure(simulated) == jax.tree.structure(update)
