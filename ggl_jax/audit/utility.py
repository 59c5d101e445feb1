"""What a defense costs: test accuracy after federated training under it, and its epsilon.

A folder holds ``utility.json`` (what was asked for) and ``utility.jsonl`` (a line for each finished
defense), beside an audit's or sweep's results or alone.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ggl_jax import files
from ggl_jax.audit import folder as folders
from ggl_jax.audit import privacy, training
from ggl_jax.audit.cells import MODEL_STREAM, admit
from ggl_jax.audit.judge import jsonable
from ggl_jax.audit.run import Progress
from ggl_jax.client import defenses as client_defenses
from ggl_jax.client.defenses.transformations import as_defense
from ggl_jax.errors import GGLError
from ggl_jax.gate.defenses import check_defense
from ggl_jax.spec import Client, Count, Number, Positive, Share, checked
from ggl_jax.types import Defense, Model, PyTree

#: Stream of the run's key for batches and the defenses' noise, beside the model's weights.
TRAINING_STREAM = 2**31 - 3

CONFIG, ROWS = "utility.json", "utility.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How the federated model is trained; see :func:`ggl_jax.audit.training.federated`."""

    clients: Count = 4
    """Clients; each has its own part of the images and takes part in every round."""
    batch_size: Count = 16
    """Images that a client draws in each round."""
    learning_rate: Positive = 0.03
    """Step size of the server's SGD. The default suits convnet; resnet18 wants 0.001 (and many
    rounds), and resnet18:batch_norm=train 0.01."""
    momentum: Share = 0.9
    """Momentum of the server's SGD."""
    test_images: Count | None = None
    """Images held out of training (default: a fifth, at most 1,000)."""
    seed: Number = 0
    """Seed of the model's weights, the batches, the noise and the choice of test images."""


@dataclasses.dataclass(frozen=True)
class UtilitySettings(TrainingSettings):
    """How each defense's training is measured."""

    rounds: Count = 100
    """Rounds of federated SGD."""
    delta: Positive = 1e-5
    """Probability with which epsilon's bound may fail."""


class Utility(NamedTuple):
    """What a folder holds.

    Attributes:
        config: the content of ``utility.json``.
        rows: one for each finished defense, see :func:`measure`.
        interrupted: Ctrl-C ended the run that returns this; what is finished is kept.
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    interrupted: bool = False

    def row_of(self, defense: str) -> dict[str, Any] | None:
        """The row of a defense."""
        return next((row for row in self.rows if row["defense"] == defense), None)


def split(num_images: int, settings: TrainingSettings) -> tuple[np.ndarray, np.ndarray]:
    """Share images out to the clients, and hold some out for the test.

    Args:
        num_images: how many there are.
        settings: how many are held out, clients, and the seed of the shuffling.

    Returns:
        ``(train [m n], test [t])``, disjoint sorted positions: a row for each client, all of the
        same length, so that up to m - 1 images are left over.

    Raises:
        GGLError: there are too few images.
    """
    num_test, num_clients = settings.test_images, settings.clients
    if num_test is None:
        num_test = min(1000, num_images // 5)
    if num_images < 2:
        raise GGLError(f"images: got {num_images}, needed: some to train on, others to test on")
    if num_test < 1 or num_test >= num_images:
        raise GGLError(
            f"test_images: got {num_test} of {num_images} images, allowed: 1 to {num_images - 1}; "
            "give that many, or more images"
        )
    order = np.random.default_rng(settings.seed).permutation(num_images)
    test, rest = order[:num_test], order[num_test:]
    each = len(rest) // num_clients
    if each < settings.batch_size:
        raise GGLError(
            f"batch_size: {settings.batch_size} is more than the {each} training images of each "
            "client; give more images, fewer test images or fewer clients"
        )
    train = rest[: each * num_clients].reshape(num_clients, each)
    return np.sort(train, axis=1), np.sort(test)


def asked_for(about: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was asked for, without the command and the environment: these may differ later."""
    return {k: v for k, v in (about or {}).items() if k not in ("command", "environment")}


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on the test images of always naming the training images' commonest class.

    Ties go to the lower class.
    """
    return float(np.mean(test_labels == np.bincount(train_labels.reshape(-1)).argmax()))


def measure(
    images,
    labels,
    *,
    model: Model,
    defenses: Sequence[Defense | str],
    out: str | Path,
    settings: UtilitySettings | None = None,
    client: Client | None = None,
    variables: PyTree | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Utility:
    """Train the federated model under each defense; keep each result as soon as it is there.

    Every defense starts from the same weights and sees the same batches. The images are shared out
    to the clients, each of which takes part in every round.

    Args:
        images: [n h w c], float in [0, 1].
        labels: [n], integers.
        model: the federated model.
        defenses: specifications or :class:`Defense` objects; "none" is added as the control.
        out: folder; what an earlier call finished there is kept and not repeated.
        settings: of the training.
        client: local steps behind each update; its batch size is not looked at.
        variables: the model's first weights; None for those of an audit with the settings' seed.
        about: what was asked for besides the settings, such as the names of data and model; its
            ``"command"`` and ``"environment"`` are kept, and may differ where a run goes on.
        progress: called as it goes on.

    Returns:
        A :class:`Utility`; Ctrl-C returns one, too. A row has ``defense``, ``accuracy``
        (on the test images; None where the training diverged, and then ``diverged_round`` says
        when), ``curve`` ([rounds, accuracies] on the way), ``bound`` and
        ``sigma`` of the Gaussian mechanism, ``rounds`` that compose, ``delta``, ``epsilon`` and
        ``epsilon_replace`` (see :data:`ggl_jax.audit.privacy.ADJACENCIES`; None where there is
        none, and ``epsilon_note`` says why), and ``seconds``.

    Raises:
        GGLError: unusable images or labels, too few of them, an unknown defense, or the folder is
            in use or holds another configuration.
        StorageError: the disk is full; nothing that was finished is lost.
    """
    settings, client = checked(settings or UtilitySettings()), client or Client()
    privacy.check_delta(settings.delta)
    images, labels = admit(model, images, labels, variables)
    train_at, test_at = split(len(images), settings)
    named: dict[str, Defense] = {}
    for one in ("none", *map(as_defense, defenses)):
        defense = client_defenses.parse(one) if isinstance(one, str) else one
        named.setdefault(defense.name, defense)
    for defense in named.values():
        check_defense(defense, model)
        client_defenses.check_local_steps(defense, client)
    asked = asked_for(about)
    local = {k: v for k, v in dataclasses.asdict(client).items() if k.startswith("local_")}
    config = {
        "options": {**dataclasses.asdict(settings), **local, "model": model.name, **asked},
        **{name: value for name, value in (about or {}).items() if name not in asked},
        "inputs": {"data": files.digest(images, labels, jax.tree.leaves(variables))[:12]},
        "model": model.name,
        "rounds": settings.rounds,
        "clients": settings.clients,
        "batch_size": settings.batch_size,
        "delta": settings.delta,
        "num_train": int(train_at.size),
        "num_test": len(test_at),
        "majority": majority_accuracy(labels[train_at], labels[test_at]),
        "test_indices": test_at.tolist(),
    }
    folder, interrupted = Path(out), False
    with folders.lock(folder, "lock-utility"):
        if (folder / ROWS).exists() and not (folder / CONFIG).exists():
            raise GGLError(f"out: {folder} has {ROWS} without {CONFIG}; move it away")
        files.claim(folder, config, name=CONFIG, guest=True)
        rows = _read_rows(folder)
        known = {row["defense"] for row in rows}
        todo = [defense for name, defense in named.items() if name not in known]
        key = jax.random.key(settings.seed)
        if variables is None:
            variables = jax.jit(model.init)(jax.random.fold_in(key, MODEL_STREAM))
        data = (images[train_at], labels[train_at], images[test_at], labels[test_at])
        try:
            for number, defense in enumerate(todo):

                def report(phase, fraction, number=number, defense=defense):
                    if progress is not None:
                        label = f"{defense.name}: {phase}"
                        progress(label, number, len(todo), fraction, None)

                row: dict[str, Any] = {"defense": defense.name}
                stream = jax.random.fold_in(key, TRAINING_STREAM)
                row |= _train(stream, model, defense, variables, data, settings, client, report)
                row |= _privacy(defense, variables, settings)
                rows.append(jsonable(row))
                files.write_text(folder / ROWS, "".join(json.dumps(r) + "\n" for r in rows))
        except KeyboardInterrupt:
            interrupted = True
    return Utility(config, rows, interrupted)


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / ROWS
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]
    except ValueError:
        raise GGLError(f"out: {path} is damaged; move it away") from None


def read(folder: str | Path) -> Utility | None:
    """What :func:`measure` left in a folder, also while it runs; None where it never ran.

    A row that lacks its epsilon for want of the accountant gets it now, if that is installed.

    Raises:
        GGLError: a file is damaged.
    """
    folder = Path(folder)
    if not (folder / ROWS).exists():
        return None
    config = files.read_json(folder / CONFIG, f"{folder} is damaged")
    rows = _read_rows(folder)
    for row in rows:
        if row["epsilon_note"] == _MISSING:
            row.update(_epsilons(row["bound"], row["sigma"], row["rounds"], row["delta"]))
    return Utility(config, rows)


def _train(key, model, defense, variables, data, settings, client, report) -> dict[str, Any]:
    began = time.perf_counter()
    federated = training.federated(
        model,
        defense,
        num_clients=settings.clients,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        client=client,
    )
    images, labels, test_images, test_labels = data
    rounds, accuracies, diverged = [], [], 0
    report("compiling", 0.0)
    each = math.ceil(settings.rounds / 10)
    for state in training.train(
        federated,
        key,
        variables,
        images,
        labels,
        stops=[*range(each, settings.rounds, each), settings.rounds],
    ):
        diverged = int(state.diverged)
        if diverged:
            break
        rounds.append(int(state.round))
        accuracies.append(training.accuracy(model, state.variables, test_images, test_labels))
        report(
            f"{rounds[-1]} of {settings.rounds} rounds, accuracy {100 * accuracies[-1]:.1f} %",
            rounds[-1] / settings.rounds,
        )
    return {
        "accuracy": None if diverged else accuracies[-1],
        "diverged_round": diverged or None,
        "curve": [rounds, accuracies],
        "seconds": time.perf_counter() - began,
    }


#: The note of a row whose epsilon can still be had.
_MISSING = f"not computed: {privacy.REMEDY}"


def _privacy(defense, variables, settings: UtilitySettings) -> dict[str, Any]:
    found = privacy.mechanism(defense, len(jax.tree.leaves(variables["params"])))
    row = {
        "bound": found.bound,
        "sigma": found.sigma,
        "rounds": settings.rounds,
        "delta": settings.delta,
    }
    if found.reason:
        none = {"epsilon": None, "epsilon_replace": None}
        return row | none | {"epsilon_note": found.reason}
    return row | _epsilons(found.bound, found.sigma, settings.rounds, settings.delta)


def _epsilons(bound, sigma, rounds, delta) -> dict[str, Any]:
    if not privacy.accountant_installed():
        return {"epsilon": None, "epsilon_replace": None, "epsilon_note": _MISSING}

    def at(adjacency):
        return privacy.epsilon(bound, sigma, rounds=rounds, delta=delta, adjacency=adjacency)

    return {"epsilon": at("add_remove"), "epsilon_replace": at("replace"), "epsilon_note": ""}


# --- words --------------------------------------------------------------------------------------


def accuracy_text(row: Mapping[str, Any]) -> str:
    """E.g. ``"81.3 %"``, or when the training diverged."""
    if row["accuracy"] is None:
        return f"diverged in round {row['diverged_round']}"
    return f"{100 * row['accuracy']:.1f} %"


def epsilon_text(row: Mapping[str, Any], name: str = "epsilon") -> str:
    """E.g. ``"12.3"``, ``"5.1e+04"``, ``"none (unbounded)"``."""
    value = row[name]
    if value is not None:
        return f"{value:.3g}"
    return "not computed" if row["epsilon_note"] == _MISSING else "none (unbounded)"


def warnings(found: Utility) -> list[str]:
    """What makes the accuracies say little: a control that learnt nothing. Usually empty."""
    control, majority = found.row_of("none"), found.config["majority"]
    if control is None or control["accuracy"] is None:
        return []
    spread = math.sqrt(majority * (1 - majority) / found.config["num_test"])
    if control["accuracy"] > majority + 2 * spread:
        return []
    return [
        "Even the undefended model is not better than naming the commonest class (within two "
        "standard errors), so these accuracies do not tell the defenses apart: train for more "
        "rounds, or with another learning rate or model."
    ]


def legend(config: Mapping[str, Any]) -> str:
    """What accuracy and epsilon mean here, in a few sentences."""
    return (
        f"Accuracy on {config['num_test']:,} images held out of training, after "
        f"{config['rounds']:,} rounds of federated SGD of {config['model']}: "
        f"{config['clients']} clients, each with a batch of {config['batch_size']} in each round, "
        f"defended by each client; one run. Epsilon at delta {config['delta']:g}: of the Gaussian "
        "mechanism, for all that one client shares in all rounds, with the server seeing each "
        "client's update; neighbours differ in whether the client's update is there or zero (add "
        "or remove), or in what it is (replace). Without a clip before Gaussian noise there is "
        "none."
    )
