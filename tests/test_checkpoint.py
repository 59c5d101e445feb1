"""Checkpoints: what is saved comes back, and damage is told in one line."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax import checkpoint
from ggl_jax.errors import GGLError

CARD = {"name": "test", "kind": "dcgan", "steps": 3}


def make_tree():
    rng = np.random.default_rng(0)
    return {
        "params": {
            "dense": {"kernel": rng.normal(size=(64, 32)).astype(np.float32), "bias": np.ones(3)},
            "count": np.array(7, np.int32),
        },
        "batch_stats": {"mean": jnp.arange(5.0)},
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "shelf" / "name"
    checkpoint.save(path, make_tree(), CARD)
    return path


def edit_card(path, **changes):
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps({**card, **changes}))


def assert_same(left, right):
    assert checkpoint.sha256(left) == checkpoint.sha256(right)


def test_round_trip(saved):
    tree, card = checkpoint.load(saved)
    expected = make_tree()
    assert_same(tree, expected)
    np.testing.assert_array_equal(
        tree["params"]["dense"]["kernel"], expected["params"]["dense"]["kernel"]
    )
    assert tree["params"]["count"].dtype == np.int32
    assert tree["params"]["count"].shape == ()
    assert {k: card[k] for k in CARD} == CARD
    assert card["arrays"]["params/dense/kernel"] == "float32[64, 32]"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["name"]
    # shipped files name no path of the machine that made them
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert not any(str(saved.parent.parent).encode() in path.read_bytes() for path in files)


def test_sha256_is_the_documented_one():
    tree = {"b": np.array([1, 2], np.int16), "a": {"c": np.array([[1.5]], np.float32)}}
    text = b"a/c float32[1, 1]\n" + np.float32(1.5).tobytes() + b"b int16[2]\n\x01\x00\x02\x00"
    assert checkpoint.sha256(tree) == hashlib.sha256(text).hexdigest()
    # the order of the keys and of the memory are no part of the value
    swapped = {"a": tree["a"], "b": tree["b"]}
    assert checkpoint.sha256(swapped) == checkpoint.sha256(tree)
    matrix = np.arange(6.0).reshape(2, 3)
    assert checkpoint.sha256({"m": np.asfortranarray(matrix)}) == checkpoint.sha256({"m": matrix})
    assert checkpoint.sha256({"m": matrix.reshape(3, 2)}) != checkpoint.sha256({"m": matrix})


def test_loads_on_another_number_of_devices(saved):
    code = (
        "import sys, jax; from ggl_jax import checkpoint; assert jax.device_count() == 3;"
        "tree, card = checkpoint.load(sys.argv[1]);"
        "assert checkpoint.sha256(tree) == card['sha256'] == sys.argv[2]"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    environment["JAX_PLATFORMS"] = "cpu"
    arguments = [sys.executable, "-c", code, str(saved), checkpoint.sha256(make_tree())]
    top = Path(checkpoint.__file__).parents[1]
    subprocess.run(arguments, check=True, env=environment, cwd=top)


def test_replaces_a_checkpoint_but_nothing_else(saved, tmp_path):
    checkpoint.save(saved, {"x": np.zeros(2)}, {"name": "second"})
    tree, card = checkpoint.load(saved)
    assert list(tree) == ["x"]
    assert card["name"] == "second"
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.jpg").write_text("dear to someone")
    with pytest.raises(GGLError, match="no checkpoint"):
        checkpoint.save(folder, {"x": np.zeros(2)}, {})
    assert (folder / "a.jpg").exists()


def test_a_failed_save_leaves_the_old_one(saved):
    with pytest.raises(TypeError):
        checkpoint.save(saved, {"x": np.zeros(2)}, {"name": object()})
    assert_same(checkpoint.load(saved)[0], make_tree())
    assert sorted(path.name for path in saved.parent.iterdir()) == ["name"]


def test_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GGLError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "below", {"x": np.zeros(2)}, {})


def refused(path, match):
    with pytest.raises(GGLError, match=match) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message


def test_missing_parts(saved, tmp_path):
    refused(tmp_path / "absent", "does not exist")
    (saved / "weights").rename(tmp_path / "weights")
    refused(saved, "no weights")
    (saved / "card.json").unlink()
    refused(saved, r"no card\.json")


def test_unreadable_cards(saved):
    (saved / "card.json").write_text('{"name": ')
    refused(saved, "cannot be read")
    (saved / "card.json").write_text("[1]")
    refused(saved, "lacks")


def weight_files(path):
    files = [file for file in (path / "weights").rglob("*") if file.is_file()]
    return sorted(files, key=lambda file: -file.stat().st_size)


def test_damaged_weights(saved):
    largest = weight_files(saved)[0]
    content = largest.read_bytes()
    assert len(content) > 4096
    for damaged in (b"", content[: len(content) // 2], content[:2000] + b"?" + content[2001:]):
        assert damaged != content
        largest.write_bytes(damaged)
        refused(saved, "damaged|does not match")
    largest.unlink()
    refused(saved, "damaged")


def test_every_single_file_missing_is_told_or_harmless(saved):
    for file in weight_files(saved):
        content = file.read_bytes()
        file.unlink()
        try:
            tree, _ = checkpoint.load(saved)
        except GGLError:
            pass
        else:
            assert_same(tree, make_tree())
        file.write_bytes(content)


def test_other_weights_than_the_card_says(saved):
    right = json.loads((saved / "card.json").read_text())
    edit_card(saved, sha256="0" * 64)
    refused(saved, "sha256")
    wrong = {**right["arrays"], "params/dense/kernel": "float32[64, 31]"}
    edit_card(saved, sha256=right["sha256"], arrays=wrong)
    refused(saved, r"params/dense/kernel is float32\[64, 32\], the card says float32\[64, 31\]")
    edit_card(saved, arrays={**right["arrays"], "params/extra": "float32[1]"})
    refused(saved, "params/extra is absent")


def test_find(saved, monkeypatch):
    assert checkpoint.find(saved) == saved
    monkeypatch.setattr(checkpoint, "_shelves", lambda: [saved.parent, saved.parent / "absent"])
    assert checkpoint.shipped() == {"name": saved}
    assert checkpoint.find("name") == saved
    with pytest.raises(GGLError, match=r"other is neither .*\(name\)"):
        checkpoint.find("other")
