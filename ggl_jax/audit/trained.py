"""Trains the federated model and keeps its weights at chosen rounds, to be audited.

A folder holds ``training.json`` (what was asked for) and a checkpoint for each chosen round, such
as ``round-20``, whose card says what it is (:mod:`ggl_jax.checkpoint`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ggl_jax import checkpoint, files
from ggl_jax.audit import folder as folders
from ggl_jax.audit import training
from ggl_jax.audit.cells import MODEL_STREAM, admit
from ggl_jax.audit.run import Progress
from ggl_jax.audit.utility import (
    TRAINING_STREAM,
    TrainingSettings,
    asked_for,
    majority_accuracy,
    split,
)
from ggl_jax.client import defenses as client_defenses
from ggl_jax.errors import GGLError
from ggl_jax.gate.defenses import check_defense
from ggl_jax.spec import Client, Count, Number, Positive, checked
from ggl_jax.types import Defense, Model, PyTree

CONFIG = "training.json"


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(TrainingSettings):
    """How the federated model is trained, and when its weights are kept."""

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
        out: folder; checkpoints that an earlier call of the same arguments left there stay.
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
    _check_order(settings.checkpoints)
    local = {k: v for k, v in dataclasses.asdict(settings).items() if k.startswith("local_")}
    client = Client(**local)
    images, labels = admit(model, images, labels, variables)
    train_at, test_at = split(len(images), settings)
    parsed = client_defenses.parse(defense) if isinstance(defense, str) else defense
    check_defense(parsed, model)
    client_defenses.check_local_steps(parsed, client)
    told = asked_for(about)
    named = {"model": model.name, "defense": parsed.name}
    options = {**dataclasses.asdict(settings), **named, **told}
    content = files.digest(images, labels, jax.tree.leaves(variables))[:12]
    config = {**(about or {}), "options": options, "inputs": {"data": content}}
    folder = Path(out)
    key = jax.random.key(settings.seed)
    if variables is None:
        variables = jax.jit(model.init)(jax.random.fold_in(key, MODEL_STREAM))
    track = training.uses_batch_statistics(model, variables)
    names = ("batch_size", "learning_rate", "momentum")
    server = {name: getattr(settings, name) for name in names}
    made = training.federated(
        model, parsed, num_clients=settings.clients, client=client, track=track, **server
    )
    last = settings.checkpoints[-1]
    # Between two checkpoints, for the progress.
    stops = sorted({*settings.checkpoints, *range(0, last, max(1, last // 100))})
    train, test = ((images[at], labels[at]) for at in (train_at, test_at))
    states = training.train(
        made, jax.random.fold_in(key, TRAINING_STREAM), variables, *train, stops=stops
    )
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
        for state in states:
            done = int(state.round)
            _check_finite(state)
            if progress is not None:
                ahead = next(stop for stop in settings.checkpoints if stop >= done)
                progress(f"training, up to round {ahead}", 0, 1, done / max(last, 1), None)
            if done not in settings.checkpoints:
                continue
            path = folder / f"round-{done}"
            if not path.exists():
                own = {"name": f"{model.name}-{path.name}", **card, "round": done}
                for name, one in {"accuracy": model, "accuracy_in_eval": in_eval}.items():
                    own[name] = one and training.accuracy(one, state.variables, *test)
                checkpoint.save(path, state.variables, own)
            yield path, checkpoint.load_card(path)


def _check_finite(state: training.TrainingState) -> None:
    if int(state.diverged):
        raise GGLError(
            f"learning_rate: the training diverged in round {int(state.diverged)}; lower it. "
            "Checkpoints before that are kept"
        )


def _check_order(checkpoints: tuple[int, ...]) -> None:
    if not checkpoints or list(checkpoints) != sorted(set(checkpoints)):
        raise GGLError(
            f"checkpoints: got {' '.join(map(str, checkpoints)) or 'none'}, allowed: different "
            "rounds in rising order"
        )
