"""The landscape around a result: its centre, plane, values and correlation, and the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ggl_jax as gx
from ggl_jax import checkpoint
from ggl_jax.audit import landscape, metrics
from ggl_jax.audit.cells import Inputs
from ggl_jax.audit.run import audit
from ggl_jax.cli import _parse, run
from ggl_jax.client import defenses
from ggl_jax.client.gradients import gradient
from ggl_jax.errors import GGLError
from ggl_jax.priors import dcgan

SETTINGS = gx.Search(optimizer="cma_es:6", steps=3, bound="tanh")
OPTIONS = {"search": SETTINGS, "defense": "clip:0.5"}


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_prior, tiny_prior_params):
    return {"model": tiny_model, "prior": tiny_prior}, {"prior_params": tiny_prior_params}


def inputs_of(setting, images, ids=None):
    shared, params = setting
    return Inputs(images[:1], [1], instance_ids=ids, **shared, **params)


@pytest.fixture(scope="module")
def center(setting, tiny_images):
    return landscape.find_center(inputs_of(setting, tiny_images, [5]), seed=3, **OPTIONS)


def test_the_centre_is_the_audits_result(setting, tiny_images, center):
    shared, params = setting
    result = audit(
        tiny_images[:1],
        [1],
        instance_ids=[5],
        seed=3,
        defenses=["clip:0.5"],
        search=SETTINGS,
        num_controls=1,
        ceiling_steps=1,
        **shared,
        **params,
    )
    np.testing.assert_allclose(center.images[0], result.reconstructions[0], atol=1e-5)
    np.testing.assert_allclose(center.loss, result.rows[0]["loss"], rtol=1e-4)
    assert center.evaluations == result.rows[0]["evaluations"] == 18
    assert center.search["bound"] == "tanh"


def test_plane_is_orthogonal_and_as_long_as_the_latent():
    point = jnp.array([3.0, 0.0, 4.0, 0.0, 0.0])
    first, second = landscape.plane(point, jax.random.key(0))
    assert abs(jnp.vdot(first, second)) < 1e-4
    for direction in (first, second):
        np.testing.assert_allclose(jnp.linalg.norm(direction), 5.0, rtol=1e-5)
    other = landscape.plane(point, jax.random.key(1))[0]
    assert jnp.linalg.norm(first - other) > 0.1
    for direction in landscape.plane(jnp.zeros(9), jax.random.key(0)):
        np.testing.assert_allclose(jnp.linalg.norm(direction), 3.0, rtol=1e-5)
    with pytest.raises(GGLError, match="at least 2 latent entries"):
        landscape.plane(jnp.zeros(1), jax.random.key(0))


def test_values_against_each_latents_own_gradient(setting, tiny_images, center, monkeypatch):
    # images of 8x8 are too small for SSIM's window: any other measure serves
    monkeypatch.setattr(metrics, "ssim", lambda x, y: 1.0 - metrics.mse(x, y))
    shared, _ = setting
    model, prior = shared["model"], shared["prior"]
    defense = defenses.parse("clip:0.5")
    key = jax.random.key(7)
    found = landscape.landscape(
        center,
        tiny_images[0],
        key,
        prior=prior,
        resolution=3,
        span=0.5,
    )
    assert found.measure == "1 - SSIM"
    assert "at least" in found.note
    np.testing.assert_allclose(found.offsets, [-0.5, 0.0, 0.5])
    problem = center.problem
    first, second = landscape.plane(center.point, key)
    for row, v in enumerate(found.offsets):
        for column, u in enumerate(found.offsets):
            latent = jnp.tanh(center.point + u * first + v * second)[None]
            image = prior.apply(problem.prior_params, latent, problem.labels)
            update = gradient(model, problem.variables, image, problem.labels)
            update = defense.view.simulate(center.estimated, update)
            pairs = zip(jax.tree.leaves(update), jax.tree.leaves(problem.observed), strict=True)
            loss = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
            np.testing.assert_allclose(found.losses[row, column], loss, rtol=1e-3)
            distance = np.mean((image - tiny_images[0]) ** 2)
            np.testing.assert_allclose(found.distances[row, column], distance, rtol=1e-3, atol=1e-6)
    # Spearman: Pearson's correlation of the ranks
    ranks = [np.argsort(np.argsort(x.ravel())) for x in (found.losses, found.distances)]
    np.testing.assert_allclose(found.correlation, np.corrcoef(*ranks)[0, 1], rtol=1e-6)
    assert json.dumps(found.summary())


@pytest.mark.parametrize("options", [{"relative": True}, {"distance": "likelihood"}])
def test_values_are_scaled_as_the_searchs(setting, tiny_images, options):
    shared, _ = setting
    settings = dataclasses.replace(SETTINGS, regularizer="none", **options)
    inputs = inputs_of(setting, tiny_images)
    center = landscape.find_center(inputs, defense="noise:0.01", search=settings)
    found = landscape.landscape(
        center, tiny_images[0], jax.random.key(0), prior=shared["prior"], resolution=3
    )
    np.testing.assert_allclose(found.losses[1, 1], center.loss, rtol=1e-4)
    problem = center.problem
    image = jnp.asarray(center.images)
    update = gradient(shared["model"], problem.variables, image, problem.labels)
    pairs = zip(jax.tree.leaves(update), jax.tree.leaves(problem.observed), strict=True)
    loss = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    variance = float(center.estimated["sigma"]) ** 2
    observed = jnp.concatenate([y.ravel() for y in jax.tree.leaves(problem.observed)])
    signal = float(jnp.sum(observed**2)) - observed.size * variance
    scale = 1 / signal if "relative" in options else 0.5 / variance
    np.testing.assert_allclose(found.losses[1, 1], scale * loss, rtol=1e-3)


def test_nothing_to_correlate(setting, tiny_images, center):
    prior = setting[0]["prior"]
    found = landscape.landscape(
        center, tiny_images[0], jax.random.key(0), resolution=2, prior=prior
    )
    # SSIM's window does not fit into 8x8
    assert np.isnan(found.distances).all()
    assert np.isnan(found.correlation)
    assert found.summary()["correlation"] is None


def test_bad_settings(setting, tiny_images, center):
    shared, _ = setting
    for options, match in (({"resolution": 1}, "resolution: got 1"), ({"span": 0.0}, "span: got")):
        with pytest.raises(GGLError, match=match):
            landscape.landscape(
                center, tiny_images[0], jax.random.key(0), prior=shared["prior"], **options
            )
    with pytest.raises(GGLError, match="attacks on pixels have no latents"):
        landscape.find_center(inputs_of(setting, tiny_images), search=gx.search_of("paper", "ig"))


def test_command_searches_as_the_quick_audit_by_ggl():
    command, audit = _parse(["landscape"]), _parse(["audit", "--attack", "ggl"])
    for name in ("steps", "pool", "restarts", "relative", "regularizer", "distance"):
        assert getattr(command.search, name) == getattr(audit.search, name)
    assert _parse(["landscape", "--optimizer", "cma_es"]).search.pool == 0


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    prior = dcgan(width=2, latent_dim=4)
    card = {"name": "tiny", "kind": "dcgan", "arguments": {"width": 2, "latent_dim": 4}}
    card |= {"trained_on": [], "data": []}
    checkpoint.save(tmp_path / "prior", prior.init(jax.random.key(0)), card)
    command = ["landscape", "--prior", str(tmp_path / "prior"), "--model", "lenet"]
    command += ["--optimizer", "cma_es:4", "--steps", "2", "--resolution", "3"]
    command += ["--out", str(tmp_path / "out")]
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "LPIPS was not measured: its weights are not installed: ggl-jax weights" in out
    found = json.loads((tmp_path / "out" / "landscape.json").read_text())
    assert f"3 x 3 latents: {found['correlation']:.3f}" in " ".join(out.split())
    assert np.shape(found["losses"]) == np.shape(found["distances"]) == (3, 3)
    # the centre's loss is the search's own, less its regulariser
    assert found["losses"][1][1] != found["loss"]
    assert found["evaluations"] == 2 * 4 + 9
    assert Image.open(tmp_path / "out" / "landscape.png").width > 500
    assert run([*command, "--index", "1"]) == 2
    assert run([*command, "--label", "5", "--num-classes", "2"]) == 2
    assert "labels: got 5 to 5" in capsys.readouterr().err
