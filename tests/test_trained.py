"""Trained federated models: running statistics, checkpoints and their cards."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggl_jax as gx
from ggl_jax import checkpoint
from ggl_jax.audit import trained, training
from ggl_jax.cli import run
from ggl_jax.client.defenses import parse
from ggl_jax.client.models import get_model
from ggl_jax.commands._shared import load_model
from ggl_jax.spec import Setup

SHAPE = (8, 8, 3)


def last(states):
    *_, state = states
    return state


def test_running_statistics_are_those_of_the_clients_batches():
    """Beside Flax's own running mean, of each client's batch at the weights of the round."""
    model = get_model("convnet:2,batch_norm=train", 2, SHAPE)
    variables = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 3, *SHAPE)).astype(np.float32)
    labels = rng.integers(0, 2, (2, 3)).astype(np.int32)
    module = gx.client.networks.ConvNet(2, 2, "train")

    def after_a_step(variables, images):
        return module.apply(variables, 2 * images - 1, mutable=["batch_stats"])[1]["batch_stats"]

    def states(track):
        settings = training.TrainingSettings(clients=2, batch_size=3, momentum=0.0)
        made = training.federated(model, parse("none"), settings, track=track)
        given = (made, jax.random.key(1), variables, images, labels)
        return [state.variables for state in training.train(*given, stops=[0, 1, 2])]

    tracked, plain = states(True), states(False)
    for before, found in itertools.pairwise(tracked):
        own = [jax.jit(after_a_step)(before, images[i]) for i in range(2)]
        expected = jax.tree.map(lambda a, b: (a + b) / 2, *own)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            found["batch_stats"],
            expected,
        )
        assert np.abs(found["batch_stats"]["bn2"]["mean"]).max() > 1e-3
    # They change nothing of the training itself; without tracking they stay.
    jax.tree.map(np.testing.assert_array_equal, tracked[-1]["params"], plain[-1]["params"])
    jax.tree.map(np.testing.assert_array_equal, plain[-1]["batch_stats"], variables["batch_stats"])


def test_which_models_normalise_by_their_batch():
    found = {}
    for name in ("convnet:2,batch_norm=train", "convnet:2", "convnet:2,norm=group"):
        model = get_model(name, 2, SHAPE)
        variables = jax.jit(model.init)(jax.random.key(0))
        found[name] = training.uses_batch_statistics(model, variables)
    assert list(found.values()) == [True, False, False]
    with pytest.raises(gx.GGLError, match="track: model convnet has no BatchNorm"):
        training.federated(model, parse("none"), training.TrainingSettings(), track=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright and dark images, told apart in a few rounds."""
    path = tmp_path_factory.mktemp("data") / "public.npz"
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    images = rng.uniform(0, 0.4, (60, 32, 32, 3)) + 0.5 * labels[:, None, None, None]
    np.savez(path, images=(255 * images).astype(np.uint8), labels=labels)
    return path


COMMAND = "train-model --image-size 8 --model convnet:2,batch_norm=train --clients 2 --batch-size 8"


@pytest.fixture
def command(data, tmp_path):
    def call(*options):
        return run([*COMMAND.split(), "--data", str(data), "--out", str(tmp_path / "m"), *options])

    return call


def test_checkpoints_are_weights_to_audit(command, data, tmp_path, capsys):
    options = ["--checkpoints", "0", "5", "20", "--learning-rate", "0.05"]
    assert command(*options) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"--weights {tmp_path / 'm' / 'round-20'}" in said
    cards, read = {}, {}
    for number in (0, 5, 20):
        folder = tmp_path / "m" / f"round-{number}"
        setup = Setup(model="convnet:2,batch_norm=eval", weights=str(folder))
        model, read[number] = load_model(setup, 7, SHAPE)
        cards[number] = card = checkpoint.load_card(folder)
        assert (model.num_classes, card["round"], card["batch_norm"]) == (2, number, "train")
        assert card["command"].startswith("ggl-jax train-model")
    # The start is that of an audit with this seed.
    key = jax.random.fold_in(jax.random.key(0), trained.MODEL_STREAM)
    start = jax.jit(model.init)(key)
    jax.tree.map(np.testing.assert_array_equal, read[0], start)
    assert np.abs(read[20]["batch_stats"]["bn1"]["var"] - 1).max() > 0.1
    # Accuracy by hand, on the images that were held out.
    images = np.load(data)["images"] / np.float32(255)
    images = np.asarray(images.reshape(60, 8, 4, 8, 4, 3).mean((2, 4)), np.float32)
    labels = np.load(data)["labels"]
    test = trained.split(60, trained.CheckpointSettings(2, 8)).test
    logits, _ = jax.jit(model.apply)(read[20], jnp.asarray(images[test]))
    expected = np.mean(np.argmax(logits, 1) == labels[test])
    assert cards[20]["accuracy_in_eval"] == pytest.approx(expected)
    assert cards[20]["accuracy"] > 0.9
    assert cards[20]["num_test"] == len(test) == 12

    # The same again finds all of it there; other options are refused.
    before = (tmp_path / "m" / "round-20" / "card.json").stat().st_mtime_ns
    assert command(*options) == 0
    assert (tmp_path / "m" / "round-20" / "card.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert command(*options, "--defense", "clip:1") == 2
    assert "defense: 'none' -> 'clip:1'" in capsys.readouterr().err.replace('"', "'")


def test_what_is_finished_stays_when_it_is_stopped(command, tmp_path, capsys, monkeypatch):
    whole, calls = checkpoint.save, []

    def stops(path, *rest):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(path, *rest)

    monkeypatch.setattr(checkpoint, "save", stops)
    assert command("--checkpoints", "1", "2") == 130
    assert "Interrupted. Kept:" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "m").glob("round-*")) == ["round-1"]
    assert json.loads((tmp_path / "m" / "training.json").read_text())["options"]["clients"] == 2


def test_a_training_goes_on_where_it_was_stopped(command, data, tmp_path, capsys, monkeypatch):
    """To the weights of one that was not stopped, bit by bit, without its first rounds."""
    whole, begun = training.train, []

    def stops(*given, state, **more):
        begun.append(int(state.round))
        for found in whole(*given, state=state, **more):
            yield found
            if int(found.round) == 7:
                raise KeyboardInterrupt

    options = ["--checkpoints", "2", "5", "12"]
    monkeypatch.setattr(training, "train", stops)
    assert command(*options) == 130
    folder = tmp_path / "m"
    assert sorted(path.name for path in folder.glob("round-*")) == ["round-2", "round-5"]
    monkeypatch.setattr(
        training, "train", lambda *a, **k: begun.append(int(k["state"].round)) or whole(*a, **k)
    )
    assert command(*options) == 0
    assert begun == [0, 7]
    assert not (folder / "unfinished").exists()
    whole_one = tmp_path / "whole"
    assert command(*options, "--out", str(whole_one)) == 0
    for name in ("round-2", "round-5", "round-12"):
        one, other = (checkpoint.load(at / name)[0] for at in (folder, whole_one))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    # A finished one is not trained again; a checkpoint that is gone is made again.
    assert command(*options) == 0
    assert begun == [0, 7, 0]
    shutil.rmtree(folder / "round-5")
    assert command(*options) == 0
    assert begun == [0, 7, 0, 0]
    one, other = (checkpoint.load(at / "round-5")[0] for at in (folder, whole_one))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoints", "5", "1"], "checkpoints: got 5 1, allowed: different rounds in rising"),
        (["--learning-rate", "1e30", "--checkpoints", "4"], "learning_rate: the training diverged"),
        (["--batch-size", "40"], "batch_size: 40 is more than the 24 training images"),
        (["--defense", "nosie:1"], "nosie"),
    ],
)
def test_what_is_refused(command, capsys, options, words):
    assert command(*options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
