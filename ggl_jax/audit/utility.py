"""What a defense costs: test accuracy after federated training under it, and its epsilon.

A folder holds ``utility.json`` (what was asked for) and ``utility.jsonl`` (a line for each finished
training), beside an audit's or sweep's results or alone.
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
import optax

from ggl_jax import files
from ggl_jax.audit import folder as folders
from ggl_jax.audit import privacy, tables, training
from ggl_jax.audit.cells import MODEL_STREAM, admit
from ggl_jax.audit.judge import jsonable
from ggl_jax.audit.run import Progress
from ggl_jax.errors import GGLError, explaining
from ggl_jax.spec import Client, Count, Positive, Proper, checked
from ggl_jax.types import Defense, Model, PyTree

#: Stream of the run's key for batches and the defenses' noise, beside the model's weights.
TRAINING_STREAM = 2**31 - 3

CONFIG, ROWS = "utility.json", "utility.jsonl"


@dataclasses.dataclass(frozen=True)
class UtilitySettings(training.TrainingSettings):
    """How each defense's training is measured."""

    learning_rate: tuple[Positive, ...] = (0.03,)
    """Step sizes that the server's SGD starts with; each falls to 0 along a cosine, so that the
    last batches do not decide. Of several, each defense is trained at each and keeps the one that
    is best on validation images, held out of training like the test images and as many. 0.03
    suits convnet without a defense; resnet18 wants 0.001 (and many rounds),
    resnet18:batch_norm=train 0.01."""
    rounds: Count = 100
    """Rounds of federated SGD."""
    repeats: Count = 1
    """Trainings of each defense at its learning rate, from other weights (if they are random),
    batches and noise; its accuracy is their mean. More can follow later, in the same folder."""
    delta: Proper = 1e-5
    """Probability with which epsilon's bound may fail."""

    @property
    def validates(self) -> bool:
        """Whether there are several learning rates."""
        return len(self.learning_rate) > 1


def usable(settings: UtilitySettings) -> UtilitySettings:
    """The settings themselves, checked.

    Raises:
        GGLError: one is out of its range, or the learning rates are none or not different.
    """
    settings = checked(settings)
    rates = settings.learning_rate
    if not rates or len(set(rates)) < len(rates):
        raise GGLError(
            f"learning_rate: got {' '.join(f'{rate:g}' for rate in rates) or 'none'}, allowed: "
            "different numbers above 0, at least one; name each once"
        )
    return settings


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


class Split(NamedTuple):
    """Disjoint sorted positions of images.

    Attributes:
        train: [m n], a row for each client.
        test: [t].
        validation: [t], or [0] where nothing is chosen.
    """

    train: np.ndarray
    test: np.ndarray
    validation: np.ndarray


def split(num_images: int, settings: training.TrainingSettings) -> Split:
    """Share images out to the clients, and hold some out for the test and for choices.

    Args:
        num_images: how many there are.
        settings: how many are held out, clients, and the seed of the shuffling.

    Returns:
        A :class:`Split`. Clients have the same number, so that up to m - 1 images are left over.
        The test images are the same with and without validation images.

    Raises:
        GGLError: there are too few images.
    """
    num_test, num_clients = settings.test_images, settings.clients
    if num_test is None:
        num_test = min(1000, num_images // 5)
    if num_images < 2:
        raise GGLError(f"images: got {num_images}, needed: some to train on, others to test on")
    num_validation = num_test if settings.validates else 0
    most = (num_images - 1) // (2 if settings.validates else 1)
    if not 1 <= num_test <= most:
        also = " (and as many to choose the learning rate by)" if settings.validates else ""
        raise GGLError(
            f"test_images: got {num_test} of {num_images} images{also}, allowed: 1 to {most}; "
            "give that many, or more images"
        )
    order = np.random.default_rng(settings.seed).permutation(num_images)
    test, validation, rest = np.split(order, [num_test, num_test + num_validation])
    each = len(rest) // num_clients
    if each < settings.batch_size:
        raise GGLError(
            f"batch_size: {settings.batch_size} is more than the {each} training images of each "
            "client; give more images, fewer test images or fewer clients"
        )
    train = rest[: each * num_clients].reshape(num_clients, each)
    return Split(np.sort(train, axis=1), np.sort(test), np.sort(validation))


def _options(settings: UtilitySettings) -> dict[str, Any]:
    """The settings for ``utility.json``, where a single learning rate is a number.

    Without the repeats, of which a folder may get more.
    """
    rates = settings.learning_rate
    own = dataclasses.asdict(settings)
    del own["repeats"]
    return own | {"learning_rate": list(rates) if settings.validates else rates[0]}


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
        A :class:`Utility`; Ctrl-C returns one, too. A row has ``defense``, ``learning_rate``,
        ``accuracy`` (on the test images, the mean of ``accuracies``, one for each repeat; None
        where a training diverged, and then ``diverged_round`` says when), ``curve`` ([rounds,
        accuracies] on the first one's way), ``bound`` and
        ``sigma`` of the Gaussian mechanism, ``rounds`` that compose, ``delta``, ``epsilon`` and
        ``epsilon_replace`` (see :data:`ggl_jax.audit.privacy.ADJACENCIES`; None where there is
        none, and ``epsilon_note`` says why), and ``seconds``. Of several learning rates it is the
        training of best ``validation`` (accuracy on the validation images), of equal ones the first
        asked for; one that diverged is the last choice.

    Raises:
        GGLError: unusable images or labels, too few of them, an unknown defense, or the folder is
            in use or holds another configuration.
        StorageError: the disk is full; nothing that was finished is lost.
    """
    settings, client = usable(settings or UtilitySettings()), client or Client()
    images, labels = admit(model, images, labels, variables)
    parts = split(len(images), settings)
    rates = settings.learning_rate
    named: dict[str, Defense] = {}
    for given in ("none", *defenses):
        defense = training.admitted(given, model, client)
        named.setdefault(defense.name, defense)
    asked = asked_for(about)
    local = {k: v for k, v in dataclasses.asdict(client).items() if k.startswith("local_")}
    options = {**_options(settings), "schedule": "cosine", **local, "model": model.name, **asked}
    shown = ("rounds", "clients", "batch_size", "delta")
    config = {
        "options": options,
        **{name: value for name, value in (about or {}).items() if name not in asked},
        "inputs": {"data": files.digest(images, labels, jax.tree.leaves(variables))[:12]},
        "model": model.name,
        **{name: getattr(settings, name) for name in shown},
        **{f"num_{name}": at.size for name, at in parts._asdict().items()},
        "majority": majority_accuracy(labels[parts.train], labels[parts.test]),
        "test_indices": parts.test.tolist(),
        "validation_indices": parts.validation.tolist(),
    }
    folder, interrupted = Path(out), False
    with folders.lock(folder, "lock-utility"):
        if (folder / ROWS).exists() and not (folder / CONFIG).exists():
            raise GGLError(f"out: {folder} has {ROWS} without {CONFIG}; move it away")
        files.claim(folder, config, name=CONFIG, guest=True)
        lines, number = _read_lines(folder), 0
        total = sum(len(_left(lines, name, settings)) for name in named)
        first = jax.random.key(settings.seed)
        begin = jax.jit(model.init)
        data = [(images[at], labels[at]) for at in parts]
        try:
            for defense in named.values():
                while left := _left(lines, defense.name, settings):
                    rate, repeat = left[0]
                    label = f"{defense.name} at {rate:g}" if settings.validates else defense.name
                    label += f", repeat {repeat}" if repeat else ""

                    def report(phase, fraction, number=number, label=label):
                        if progress is not None:
                            progress(f"{label}: {phase}", number, total, fraction, None)

                    line = {"defense": defense.name, "learning_rate": rate, "repeat": repeat}
                    key = jax.random.fold_in(first, repeat) if repeat else first
                    own = variables
                    if own is None:
                        own = begin(jax.random.fold_in(key, MODEL_STREAM))
                    stream = jax.random.fold_in(key, TRAINING_STREAM)
                    how = dataclasses.replace(settings, learning_rate=(rate,))
                    line |= _train(stream, model, defense, own, data, how, client, report)
                    line |= _privacy(defense, own, settings)
                    lines.append(jsonable(line))
                    files.write_text(folder / ROWS, "".join(json.dumps(r) + "\n" for r in lines))
                    number += 1
        except KeyboardInterrupt:
            interrupted = True
    return Utility(config, _chosen(lines, len(rates)), interrupted)


def _left(
    lines: Sequence[dict[str, Any]], defense: str, settings: UtilitySettings
) -> list[tuple[float, int]]:
    """Trainings of a defense that are still to do: each rate, then repeats at the best, or some."""
    rates = settings.learning_rate
    own = [line for line in lines if line["defense"] == defense]
    # A line of a folder that had one rate may lack it.
    known = {(line.get("learning_rate", rates[0]), line.get("repeat", 0)) for line in own}
    tried = [(rate, 0) for rate in rates if (rate, 0) not in known]
    if tried or not own:
        again = rates[0]
    else:
        best = max(_firsts(own), key=_merit)
        if best["accuracy"] is None:
            return []
        again = best.get("learning_rate", rates[0])
    repeats = [(again, repeat) for repeat in range(1, settings.repeats)]
    return tried + [one for one in repeats if one not in known]


def _firsts(own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A defense's trainings but for repeats: one at each learning rate, one of which is chosen."""
    return [line for line in own if not line.get("repeat")]


def _merit(line: Mapping[str, Any]) -> float:
    """What a learning rate is chosen by."""
    found = line.get("validation")
    return -1.0 if found is None else found


def _chosen(lines: Sequence[dict[str, Any]], num_rates: int) -> list[dict[str, Any]]:
    """For each defense that was trained at every rate, the training that is best on validation,
    with the accuracies of its repeats.
    """
    found = []
    for own in tables.grouped(lines, lambda line: line["defense"]).values():
        first = _firsts(own)
        if len(first) < num_rates:
            continue
        best = max(first, key=_merit)
        every = [best, *(line for line in own if line.get("repeat"))]
        accuracies = [line["accuracy"] for line in every]
        lost = [line["diverged_round"] for line in every if line["accuracy"] is None]
        mean = None if lost else sum(accuracies) / len(accuracies)
        told = {"accuracy": mean, "accuracies": accuracies, "diverged_round": (*lost, None)[0]}
        found.append({**best, **told})
    return found


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / ROWS
    lines = path.read_text().splitlines() if path.exists() else []
    with explaining(f"out: {path} is damaged", "move it away", ValueError):
        return [json.loads(line) for line in lines]


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
    num_rates = len(config["options"]["learning_rate"]) if chooses(config) else 1
    rows = _chosen(_read_lines(folder), num_rates)
    for row in rows:
        if row["epsilon_note"] == _MISSING:
            row.update(_epsilons(row))
    return Utility(config, rows)


def chooses(config: Mapping[str, Any]) -> bool:
    """Whether a folder's learning rates were chosen; ``config`` is the one of :class:`Utility`."""
    return config.get("num_validation", 0) > 0


def _train(key, model, defense, variables, data, settings, client, report) -> dict[str, Any]:
    """One training, at one rate; ``data`` are the images and labels of each part of a split."""
    began, num_rounds = time.perf_counter(), settings.rounds
    rate = optax.cosine_decay_schedule(settings.learning_rate[0], num_rounds)
    federated = training.federated(model, defense, settings, learning_rate=rate, client=client)
    train, test, validation = data
    rounds, accuracies, diverged, validated = [], [], 0, None
    report("compiling", 0.0)
    each = math.ceil(num_rounds / 10)
    stops = [*range(each, num_rounds, each), num_rounds]
    for state in training.train(federated, key, variables, *train, stops=stops):
        diverged = int(state.diverged)
        if diverged:
            break
        rounds.append(int(state.round))
        accuracies.append(training.accuracy(model, state.variables, *test))
        report(
            f"{rounds[-1]} of {num_rounds} rounds, accuracy {100 * accuracies[-1]:.1f} %",
            rounds[-1] / num_rounds,
        )
        if rounds[-1] == num_rounds and len(validation[0]):
            validated = training.accuracy(model, state.variables, *validation)
    return {
        "accuracy": None if diverged else accuracies[-1],
        "validation": validated,
        "diverged_round": diverged or None,
        "curve": [rounds, accuracies],
        "seconds": time.perf_counter() - began,
    }


#: The note of a row whose epsilon can still be had.
_MISSING = f"not computed: {privacy.REMEDY}"


def _privacy(defense, variables, settings: UtilitySettings) -> dict[str, Any]:
    found = privacy.mechanism(defense, len(jax.tree.leaves(variables["params"])))
    row = {"bound": found.bound, "sigma": found.sigma}
    row |= {"rounds": settings.rounds, "delta": settings.delta}
    return row | _epsilons(row, found.reason)


def _epsilons(row: Mapping[str, Any], why: str = "") -> dict[str, Any]:
    """Both epsilons of a row; none where ``why`` says why, or for want of the accountant."""
    note = why or ("" if privacy.accountant_installed() else _MISSING)
    given = {name: row[name] for name in ("rounds", "delta")}

    def at(adjacency):
        if note:
            return None
        return privacy.epsilon(row["bound"], row["sigma"], adjacency=adjacency, **given)

    return {"epsilon": at("add_remove"), "epsilon_replace": at("replace"), "epsilon_note": note}


# --- words --------------------------------------------------------------------------------------


def accuracy_of(row: Mapping[str, Any]) -> tables.Mean | None:
    """In percent, with an interval over the repeats; None where a training diverged."""
    if row["accuracy"] is None:
        return None
    every = row.get("accuracies", [row["accuracy"]])
    return tables.mean_of([100 * accuracy for accuracy in every], (0.0, 100.0))


def accuracy_text(row: Mapping[str, Any]) -> str:
    """E.g. ``"81.3 %"``, ``"81.3 [79.0, 83.6] %"``, or when a training diverged."""
    found = accuracy_of(row)
    if found is None:
        return f"diverged in round {row['diverged_round']}"
    return f"{tables.mean_text(found)} %"


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
    return [tables.WORDS["learnt_nothing"]]


def legend(found: Utility) -> str:
    """What accuracy and epsilon mean here, in a few sentences."""
    config, times = found.config, "one run"
    runs = {len(row.get("accuracies", [0])) for row in found.rows} or {1}
    if max(runs) > 1:
        number = " to ".join(str(n) for n in dict.fromkeys((min(runs), max(runs))))
        times = f"mean of {number} runs with a 95 % interval (Student's t)"
    words = [tables.WORDS["utility"].format(**config, times=times)]
    if chooses(config):
        rates = ", ".join(f"{rate:g}" for rate in config["options"]["learning_rate"])
        words.append(tables.WORDS["chosen_rate"].format(rates=rates, **config))
    return " ".join(words)
