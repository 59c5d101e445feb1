"""The benchmark beside the published code: same networks, same update, same first steps."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggl_jax as gx
from benchmarks import attack as over_time
from benchmarks import published

torch = pytest.importorskip("torch")

#: A folder with checkouts of the published repositories, see the benchmark.
CODE = os.environ.get("GGL_JAX_PUBLISHED_CODE")


def test_the_generators_agree():
    prior, params, _ = gx.load_prior("dcgan32_faces")
    latents = np.random.default_rng(0).standard_normal((2, prior.latent_dim)).astype(np.float32)
    expected = prior.apply(params, jnp.asarray(latents), jnp.zeros(2, jnp.int32))
    with torch.no_grad():
        found = published.torch_generator(params)(torch.tensor(latents)).numpy()
    np.testing.assert_allclose((found.transpose(0, 2, 3, 1) + 1) / 2, expected, atol=1e-5)


def test_the_networks_agree():
    model = gx.resnet18(2, (32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0))
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        signed = torch.tensor(2 * images - 1).permute(0, 3, 1, 2)
        found = published.torch_network(variables)(signed).numpy()
    expected, _ = jax.jit(model.apply)(variables, jnp.asarray(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_checkout_is_named(tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(gx.GGLError, match="'invertinggradients'"):
            published.checkout(folder, "ig")
    (tmp_path / "me+invertinggradients").mkdir()
    assert published.checkout(tmp_path, "ig").name == "me+invertinggradients"


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["dlg", "idlg", "ig", "ggl"])
def test_both_sides_set_out_alike(attack):
    if attack in published.FOLDERS and CODE is None:
        pytest.skip("GGL_JAX_PUBLISHED_CODE names no folder with the published code")
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    theirs, ours = published.compare(attack, image, steps=3, code=CODE and Path(CODE))
    # The same loss at the same start, and nearly the same after the first step.
    np.testing.assert_allclose(theirs.losses[0], ours.losses[0], rtol=1e-4)
    np.testing.assert_allclose(theirs.losses[1], ours.losses[1], rtol=1e-2)
    np.testing.assert_allclose(theirs.psnrs[:2], ours.psnrs[:2], atol=1e-2)
    assert not any(name.startswith(("inversefed", "torchvision")) for name in sys.modules)


def test_who_reaches_what_and_when():
    fast = over_time.Curve("fast", [1, 2, 3], [1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [3.0, 2.0, 1.0])
    slow = over_time.Curve("slow", [1, 2], [10.0, 20.0], [12.0, 15.0], [2.5, 2.0])
    found = over_time.compare(fast, slow, by="psnrs")
    assert found["reaches_the_others"] == {"fast": 2.0, "slow": None}
    found = over_time.compare(fast, slow, by="losses")
    assert found["reaches_the_others"] == {"fast": 2.0, "slow": None}
    words = over_time.in_words(found)
    assert "fast: a loss of 2, where slow ends (20.0 s), after 2.0 s" in words
    assert "slow: a loss of 1, where fast ends (3.0 s), not in 20.0 s" in words


@pytest.mark.slow
def test_both_loops_of_cma_es_draw_and_judge_alike(monkeypatch):
    """The same first population has the same lowest loss, and the same picture."""
    monkeypatch.setattr(over_time, "POPULATION", 4)
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    model, (prior, params, _) = gx.resnet18(2), gx.load_prior("dcgan32_faces")
    variables = jax.jit(model.init)(jax.random.key(0))
    labels = jnp.asarray([1])
    observed = gx.gradient(model, variables, image[None], labels)
    case = published.Case(image, 1, variables, observed, np.zeros(0, np.float32))
    public = gx.Public(model, variables, prior, params)
    problem = gx.Problem(observed, variables, params, labels, {})
    ours = over_time.our_ggl(case, public, problem, 2)
    theirs = over_time.torch_ggl(case, params, prior.latent_dim, 2)
    np.testing.assert_allclose(theirs.losses, ours.losses, rtol=1e-3)
    np.testing.assert_allclose(theirs.psnrs, ours.psnrs, atol=0.01)
    assert ours.evaluations == theirs.evaluations == [4, 8]


@pytest.mark.slow
def test_the_loop_of_ig_starts_as_ours_does():
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    model = gx.resnet18(2)
    variables = jax.jit(model.init)(jax.random.key(0))
    observed = gx.gradient(model, variables, image[None], jnp.asarray([1]))
    start = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    chw = np.ascontiguousarray(start[0].transpose(1, 2, 0)).ravel()
    case = published.Case(image, 1, variables, observed, chw)
    theirs = over_time.torch_ig(case, 3)
    ours = published.ours(published.our_attack("ig", model, None, 3), case, 3, {})
    np.testing.assert_allclose(theirs.losses[0], ours.losses[0], rtol=1e-4)
