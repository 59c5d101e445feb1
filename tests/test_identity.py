"""Nothing is taken for another thing of the same name: folders, defenses, images, models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE, TinyNet

import ggl_jax as gx
from ggl_jax import files
from ggl_jax.adversary.optimizers import OPTIMIZERS, adam
from ggl_jax.audit import folder as folders
from ggl_jax.audit import identity
from ggl_jax.audit.cells import Cells, Inputs
from ggl_jax.cli import run

SETTINGS = gx.Search(optimizer="adam", steps=2, restarts=2, pool=4)


@pytest.fixture(scope="module")
def given(tiny_model, tiny_prior, tiny_prior_params, tiny_images):
    return {
        "images": np.asarray(tiny_images),
        "labels": [0, 1],
        "model": tiny_model,
        "prior": tiny_prior,
        "prior_params": tiny_prior_params,
        "search": SETTINGS,
        "num_controls": 8,
        "ceiling_steps": 3,
    }


def scaled(factor, name="mine"):
    return gx.from_function(
        lambda key, update: jax.tree.map(lambda g: factor * g, update), name=name
    )


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A finished audit of an own defense, and its result."""
    out = tmp_path_factory.mktemp("audit") / "out"
    return out, gx.audit(**given, defenses=["none", scaled(0.5)], out=out)


def other_model():
    """Of the same name, shapes and number of classes."""
    net = TinyNet()
    model = gx.from_flax(net, image_shape=TINY_SHAPE, num_classes=3)
    return model._replace(apply=lambda variables, x: model.apply(variables, 1.0 - x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: {"images": g["images"][::-1]}, r"inputs\.images\.image-0"),
        (lambda g: {"labels": [1, 1]}, r"inputs\.images\.image-0"),
        (lambda g: {"names": ["a", "b"]}, r"inputs\.images\.a"),
        (lambda g: {"search": dataclasses.replace(SETTINGS, steps=3)}, "search.steps: 2 -> 3"),
        (lambda g: {"client": gx.Client(local_steps=2)}, "client.local_steps: 1 -> 2"),
        (lambda g: {"seed": 1}, "seed: 0 -> 1"),
        (lambda g: {"num_controls": 9}, "num_controls: 8 -> 9"),
        (lambda g: {"model": other_model()}, r"inputs\.model"),
        (lambda g: {"variables": g["model"].init(jax.random.key(8))}, r"inputs\.variables"),
        (
            lambda g: {"prior_params": jax.tree.map(lambda x: 2 * x, g["prior_params"])},
            r"inputs\.prior",
        ),
        (lambda g: {"others": g["images"]}, r"inputs\.suspects"),
        (lambda g: {"defenses": ["none", scaled(0.25)]}, r"inputs\.defenses\.mine"),
        (lambda g: {"defenses": ["none", "clip:1"]}, r"defenses: \+ 'clip:1'"),
    ],
)
def test_a_folder_never_returns_the_rows_of_another_audit(given, finished, change, words):
    out = finished[0]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options = given | {"defenses": ["none", scaled(0.5)]} | change(given)
    with pytest.raises(gx.GGLError, match=words):
        gx.audit(**options, out=out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_same_objects_made_anew_are_the_same(given, finished):
    out, result = finished
    model = gx.from_flax(TinyNet(), image_shape=TINY_SHAPE, num_classes=3)
    assert model != given["model"]
    again = gx.audit(**given | {"model": model}, defenses=["none", scaled(0.5)], out=out)
    assert again.rows == result.rows
    np.testing.assert_array_equal(again.reconstructions, result.reconstructions)


def test_a_python_audit_is_reported_and_checked(finished, capsys):
    out, result = finished
    assert run(["report", str(out)]) == 0
    assert "mine" in (out / "report.md").read_text()
    assert run(["check", str(out), "--max-psnr-over-control", "99"]) == 0
    assert run(["check", str(out), "--max-psnr-over-control", "-99"]) == 1
    assert run(["status", str(out)]) == 0
    assert "4 cells: 4 done, 0 failed, 0 left" in capsys.readouterr().out
    (cell,) = {row["cell"] for row in result.rows[:1]}
    kept = out / f"cells/{cell}.json"
    content = kept.read_text()
    kept.unlink()
    assert run(["check", str(out), "--max-psnr-over-control", "99"]) == 2
    kept.write_text(content)


def test_folders_of_other_versions_and_of_other_things_are_refused(given, tmp_path, capsys):
    old = tmp_path / "old"
    old.mkdir()
    files.write_json(old / "config.json", {"options": {"defenses": ["none"]}})
    (old / "results.jsonl").write_text("{}\n")
    with pytest.raises(gx.GGLError, match="written by another version"):
        gx.audit(**given, defenses=["none"], out=old)
    assert run(["report", str(old)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("")
    with pytest.raises(gx.GGLError, match="not an empty folder"):
        gx.audit(**given, defenses=["none"], out=other)
    with pytest.raises(gx.GGLError, match="is a file"):
        gx.audit(**given, defenses=["none"], out=other / "chapter.tex")
    assert [path.name for path in other.iterdir()] == ["chapter.tex"]
    with pytest.raises(gx.GGLError, match="no folder of an audit"):
        folders.read(other)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"defenses": [scaled(0.5), scaled(0.25)]}, "'mine' names two defenses"),
        ({"defenses": ["clip:1", scaled(0.5, "clip:1")]}, "'clip:1' names two defenses"),
        ({"defenses": ["clip:1", "clip:1.0"]}, "'clip:1' is there twice"),
        ({"defenses": []}, "defenses: got none"),
        ({"names": ["a", "a"]}, "'a' is there twice"),
        ({"names": ["a"]}, "names: got 1"),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_two_things_of_one_name_are_refused(given, tmp_path, change, words, kept):
    out = {"out": tmp_path / "out"} if kept else {}
    with pytest.raises(gx.GGLError, match=words):
        gx.audit(**given | {"defenses": ["none"]} | change, **out)
    assert not (tmp_path / "out").exists()


# --- digests ------------------------------------------------------------------------------------


def closing_over(kind, value):
    array = np.full((3, 50), value, np.float32)
    if kind == "numpy":
        return lambda x: x * array
    held = jnp.asarray(array)
    return {
        "jax": lambda x: x * held,
        "jit": jax.jit(lambda x: x * held),
        "scan": lambda x: jax.lax.scan(lambda s, row: (s + held, row), x, held)[0],
        "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda: held, lambda: x),
    }[kind]


@pytest.mark.parametrize("kind", ["numpy", "jax", "jit", "scan", "cond"])
def test_programs_are_told_apart_by_their_constants(kind):
    x = jnp.ones((3, 50))
    one, again, two = (identity.traced("f", closing_over(kind, v), x)[0] for v in (1, 1, 2))
    assert one == again != two


def test_what_cannot_be_told_apart_is_refused(given, tmp_path):
    def by_numpy(key, update):
        return jax.tree.map(lambda g: jnp.asarray(np.clip(np.asarray(g), -1, 1)), update)

    def by_callback(key, update):
        def halved(g):
            return jax.pure_callback(lambda x: 0.5 * x, jax.ShapeDtypeStruct(g.shape, g.dtype), g)

        return jax.tree.map(halved, update)

    for function, words in (
        (by_numpy, "it gives traced arrays to NumPy"),
        (by_callback, "calls back into"),
    ):
        own = gx.from_function(function, name="own")
        with pytest.raises(gx.GGLError, match=f"defense own: {words}"):
            gx.audit(**given, defenses=[own], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_parts_put_into_a_registry_are_told_apart(given, tmp_path, monkeypatch):
    def ids(rate):
        monkeypatch.setitem(OPTIMIZERS, "mine", lambda steps=1: adam(learning_rate=rate))
        settings = dataclasses.replace(SETTINGS, optimizer="mine")
        cells = Cells(Inputs(**{k: v for k, v in given.items() if k != "search"}))
        defense = cells.defense("none")
        return cells.make({}, settings, gx.Client(), defense, 0, (0,)).id

    assert ids(0.1) == ids(0.1) != ids(0.2)


# --- failures -----------------------------------------------------------------------------------


def test_a_failing_cell_of_an_audit_has_its_reason_and_the_others_go_on(given, tmp_path):
    def apply(key, update, context):
        bad = context.labels[0] == 1
        return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), update)

    poison = gx.from_function(apply, name="poison")
    result = gx.audit(**given, defenses=[poison, "none"], out=tmp_path / "out")
    found = [(row["image"], row["defense"]) for row in result.rows]
    assert found == [("image-0", "poison"), ("image-0", "none"), ("image-1", "none")]
    assert len(result.reconstructions) == 3
    assert list(result.failures) == ["poison, image-1"]
    assert "NaN" in result.failures["poison, image-1"]
    stored = [json.loads(path.read_text()) for path in (tmp_path / "out/cells").glob("*.json")]
    assert sum("failed" in one for one in stored) == 1
    # It is settled: the same call repeats nothing.
    assert gx.audit(**given, defenses=[poison, "none"], out=tmp_path / "out").rows == result.rows


def test_priors_of_other_denoisers_are_told_apart(tiny_prior):
    ways = None, lambda params, x: 0.9 * x, lambda params, x: 0.8 * x, lambda params, x: 0.8 * x
    found = [identity.prior_digest(tiny_prior._replace(denoise=way)) for way in ways]
    assert len({*found}) == 3
    assert found[2] == found[3]
