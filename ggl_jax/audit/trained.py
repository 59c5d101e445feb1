"""Trains the federated model and keeps its weights at chosen rounds, to be audited.

A folder holds ``training.json`` (what was asked for) and a checkpoint for each chosen round, such
as ``round-20``, whose card says what it is (:mod:`ggl_jax.checkpoint`); ``unfinished`` is the state
that an interrupted training goes on from.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import checkpoint, files
from ggl_jax.adversary.resume import Checkpoints, Saved
from ggl_jax.audit import folder as folders
from ggl_jax.audit import training
from ggl_jax.audit.cells import MODEL_STREAM, admit
from ggl_jax.audit.run import Progress
from ggl_jax.audit.utility import TRAINING_STREAM, asked_for, majority_accuracy, split
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client, Count, Number, Positive, checked
from ggl_jax.types import Defense, Model, PyTree

CONFIG = "training.json"


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(training.TrainingSettings):
    """How the federated model is trained, and when its weights are kept."""

    learning_rate: Positive = 0.03
    """Step size of the server's SGD; as for ggl-jax utility, but one."""
    local_steps: Count = 1
    """Local steps behind each client's update, as for ggl-jax audit."""
    local_learning_rate: Positive = 0.01
    """Their step size."""
    local_optimizer: str = "sgd"
    """What makes them, as for ggl-jax audit."""
    checkpoints: tuple[Number, ...] = (0, 20, 200)
    """Rounds after which the weights are kept; the last of them ends the training, 0 is before it.
    """


def train_model(
    images,
    labels,
    *,
    model: Model,
    out: str | Path,
    defense: Defense | str = "none",
    settings: CheckpointSettings | None = None,
    variables: PyTree | None = None,
    in_eval: Model | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Train a federated model, and keep its weights after chosen rounds, as soon as they are there.

    The images are shared out to the clients, each of which takes part in every round; one client is
    central training. Where the model's BatchNorm layers are in training mode, a running mean of
    their statistics is kept (``track`` of :func:`ggl_jax.audit.training.federated`), so that the
    weights serve in eval mode, too.

    Args:
        images: [n h w c], float in [0, 1].
        labels: [n], integers.
        model: the federated model.
        out: folder. What an earlier call of the same arguments left there stays, and the training
            goes on from where that was interrupted, or from at most a minute before it was killed.
        defense: of every client.
        settings: of the training.
        variables: the first weights; None for those of an audit with the settings' seed.
        in_eval: the same model in eval mode, to measure its accuracy, too, where ``model`` is in
            training mode.
        about: as for :func:`ggl_jax.audit.utility.measure`; goes to the cards, too.
        progress: called as it goes on.

    Yields:
        A checkpoint's folder and its card, in the order of rounds. A card has, besides what
        ``about`` tells, ``round``, ``accuracy`` (on images held out of training, in the model's own
        mode), ``accuracy_in_eval`` (None without ``in_eval``), ``majority`` (accuracy of naming the
        commonest class), ``batch_norm`` ("train", "eval", or "none" where there is none),
        ``num_classes``, ``image_shape``, ``settings``, ``defense``, and the weights' ``sha256``.

    Raises:
        GGLError: unusable images or labels, too few of them, an unknown defense, a folder that
            holds something else, or a training that diverges (checkpoints before it are kept).
    """
    settings = checked(settings or CheckpointSettings())
    training.check_rising("checkpoints", settings.checkpoints)
    local = {k: v for k, v in dataclasses.asdict(settings).items() if k.startswith("local_")}
    client = Client(**local)
    images, labels = admit(model, images, labels, variables)
    train_at, test_at, _ = split(len(images), settings)
    parsed = training.admitted(defense, model, client)
    told = asked_for(about)
    options = {**dataclasses.asdict(settings), "model": model.name, "defense": parsed.name, **told}
    content = files.digest(images, labels, jax.tree.leaves(variables))[:12]
    config = {**(about or {}), "options": options, "inputs": {"data": content}}
    folder = Path(out)
    key = jax.random.key(settings.seed)
    if variables is None:
        variables = jax.jit(model.init)(jax.random.fold_in(key, MODEL_STREAM))
    track = training.uses_batch_statistics(model, variables)
    rate = settings.learning_rate
    made = training.federated(
        model, parsed, settings, learning_rate=rate, client=client, track=track
    )
    last = settings.checkpoints[-1]
    train, test = ((images[at], labels[at]) for at in (train_at, test_at))
    card = {
        "kind": "federated model",
        **config,
        "model": told.get("model", model.name),
        "num_classes": model.num_classes,
        "image_shape": list(model.image_shape),
        "batch_norm": "train" if track else "eval" if model.statistics else "none",
        "defense": parsed.name,
        "majority": majority_accuracy(labels[train_at], labels[test_at]),
        "num_train": int(train_at.size),
        "num_test": len(test_at),
    }
    with folders.lock(folder, "lock-training"):
        files.claim(folder, config, name=CONFIG)
        paths = {done: folder / f"round-{done}" for done in settings.checkpoints}
        there = [*itertools.takewhile(lambda done: paths[done].exists(), paths)]
        for done in there:
            yield paths[done], checkpoint.load_card(paths[done])
        if len(there) == len(paths):
            return
        unfinished = Checkpoints(folder / "unfinished", seconds=60.0)
        identity = files.digest(options, content)
        ahead = settings.checkpoints[len(there) :]
        state = _latest(unfinished, identity, made.init(variables), ahead[0])
        # Between two checkpoints, for the progress and for what is kept when it is stopped.
        stops = sorted({*ahead, *range(int(state.round), last, max(1, last // 100))})
        keys = jax.random.fold_in(key, TRAINING_STREAM)
        try:
            for latest in training.train(made, keys, variables, *train, stops=stops, state=state):
                state, done = latest, int(latest.round)
                _check_finite(state)
                if progress is not None:
                    to = next(stop for stop in ahead if stop >= done)
                    progress(f"training, up to round {to}", 0, 1, done / max(last, 1), None)
                if done in ahead:
                    if not paths[done].exists():
                        _write(paths[done], state, card, (model, in_eval), test)
                    yield paths[done], checkpoint.load_card(paths[done])
                elif unfinished.due(last=False):
                    _keep(unfinished, identity, state)
        except KeyboardInterrupt:
            _keep(unfinished, identity, state)
            raise
        unfinished.clear()


def _write(path: Path, state: training.TrainingState, card: dict[str, Any], models, test) -> None:
    """A checkpoint of the weights, with the accuracy of both models on the test images."""
    own = {"name": f"{models[0].name}-{path.name}", **card, "round": int(state.round)}
    for name, one in zip(("accuracy", "accuracy_in_eval"), models, strict=True):
        own[name] = one and training.accuracy(one, state.variables, *test)
    checkpoint.save(path, state.variables, own)


def _keep(unfinished: Checkpoints, identity: str, state: training.TrainingState) -> None:
    nothing = np.zeros(1)  # a training has no losses to show
    unfinished.save(identity, Saved(int(state.round), state, nothing, nothing))


def _latest(
    unfinished: Checkpoints, identity: str, start: training.TrainingState, most: int
) -> training.TrainingState:
    """Where a training goes on: not past the round of a checkpoint that is to be made."""
    saved = unfinished.load(identity, start)
    if saved is None or saved.done > most:
        return start
    return jax.tree.map(jnp.asarray, saved.state)


def _check_finite(state: training.TrainingState) -> None:
    if int(state.diverged):
        raise GGLError(
            f"learning_rate: the training diverged in round {int(state.diverged)}; lower it. "
            "Checkpoints before that are kept"
        )
