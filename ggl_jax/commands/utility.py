"""``ggl-jax utility``: the test accuracy that each defense leaves, and its epsilon."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, Literal

import tyro

from ggl_jax.commands import audit as audit_command
from ggl_jax.commands._shared import (
    AuditBar,
    check_ranges,
    console,
    count_classes,
    environment,
    fields_of,
)
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class UtilityCommand:
    """Train the federated model under each defense, and report its test accuracy and epsilon.

    Given the folder of a sweep or audit: every defense of it, with its model; the results go there,
    and its report then has a privacy-utility plot. Else name --defenses, --data and --out. Finished
    defenses are kept; the same command goes on.
    """

    folder: tyro.conf.Positional[Path | None] = None
    """Folder of ggl-jax sweep or ggl-jax audit, finished or not."""
    data: str | None = None
    """Images with labels, as for ggl-jax audit; by default those that the run's private images come
    from."""
    defenses: tuple[str, ...] | None = None
    """Defenses; by default those of the run."""
    rounds: int = 100
    """Rounds of federated SGD."""
    clients: int = 4
    """Clients; each has its own part of the images and takes part in every round."""
    batch_size: int = 16
    """Images that a client draws in each round."""
    learning_rate: float = 0.03
    """Step size of the server's SGD. The default suits convnet; resnet18 wants 0.001 with
    --batch-norm eval (and many rounds) and 0.01 with train."""
    momentum: float = 0.9
    """Momentum of the server's SGD."""
    test_images: int | None = None
    """Images held out of training (default: a fifth, at most 1,000)."""
    delta: float = 1e-5
    """Probability with which epsilon's bound may fail."""
    model: str | None = None
    """Federated model: resnet18, lenet or convnet (default: the run's, else resnet18)."""
    batch_norm: Literal["eval", "train"] | None = None
    """Batch normalisation of the federated model (default: the run's, else eval); with train, test
    images are normalised by their own batches, too."""
    fidelity: Literal["paper", "code"] | None = None
    """paper or code (default: the run's, else paper)."""
    seed: int = 0
    """Seed of the model's weights, the batches, the noise and the choice of test images."""
    out: Path | None = None
    """Folder for the results (default: the run's)."""


def _of_run(folder: Path) -> tuple[audit_command.AuditCommand, list[str], list[str]]:
    """A run's options, its defenses, and their fidelities."""
    from ggl_jax.audit import folder as folders

    records = folders.read(folder)
    options = records.config["options"]
    defenses = list(dict.fromkeys(cell["defense"] for cell in records.cells.values()))
    if "defenses" in options and "data" in options:
        command = audit_command.read_config(folder / "config.json")
        return command, defenses, [command.fidelity]
    if not {"preset", "fixed", "axes"} <= set(options):
        raise GGLError(
            f"folder: {folder} was run from Python, so its model is not known here; call "
            "ggl_jax.audit.utility.measure(..., out=folder)"
        )
    try:
        command = audit_command.AuditCommand(preset=options["preset"], **options["fixed"])
    except TypeError:
        raise GGLError(f"folder: {folder / 'config.json'} is of another version") from None
    return command, defenses, options["axes"].get("fidelity", [command.fidelity])


def run(command: UtilityCommand, argv: list[str]) -> int:
    """``ggl-jax utility``."""
    from ggl_jax.audit import data as audit_data
    from ggl_jax.audit import folder as folders
    from ggl_jax.audit import report, utility
    from ggl_jax.client.models import get_model
    from ggl_jax.priors import load_prior

    check_ranges(command)
    if command.folder is not None:
        base, defenses, fidelities = _of_run(command.folder)
        prior = load_prior(base.prior)[0]
        size, known = prior.image_shape[0], (base.num_classes, prior.num_classes)
    else:
        missing = [n for n in ("defenses", "data", "out") if getattr(command, n) is None]
        if missing:
            wanted = " and ".join(f"--{name}" for name in missing)
            raise GGLError(f"folder: not given; give a run's folder, or {wanted}")
        base, defenses, fidelities = audit_command.AuditCommand(), [], ["paper"]
        size, known = 32, (None, None)
    defenses = list(command.defenses) if command.defenses is not None else defenses
    fidelities = [command.fidelity] if command.fidelity else fidelities
    data, name = command.data or base.data, command.model or base.model
    dataset = audit_data.load(data, image_size=size, labels=base.label)
    if dataset.labels is None:
        raise GGLError(f"data: {data} has no labels; add a labels.csv (file,label)")
    num_classes = count_classes(dataset, dataset.labels, *known)
    batch_norm = command.batch_norm or base.batch_norm
    extra: dict[str, Any] = {"batch_norm": batch_norm} if name != "lenet" else {}
    model = get_model(name, num_classes=num_classes, image_shape=dataset.images.shape[1:], **extra)
    settings = utility.UtilitySettings(
        **fields_of(utility.UtilitySettings, command),
        local_steps=base.local_steps,
        local_learning_rate=base.local_learning_rate,
    )
    about = {
        "options": dataclasses.asdict(settings)
        | {"data": data, "model": [name, num_classes, size, extra]},
        "command": "ggl-jax " + shlex.join(argv),
        "environment": environment(),
    }
    out = command.out or command.folder
    assert out is not None
    with AuditBar() as bar:
        found = utility.measure(
            dataset.images,
            dataset.labels,
            model=model,
            defenses=defenses,
            out=out,
            settings=settings,
            fidelities=fidelities,
            about=about,
            progress=bar,
        )
    if found.rows:
        console.print(_table(found))
        console.print(utility.legend(found.config), style="dim", markup=False)
        for sentence in utility.warnings(found):
            console.print(sentence, markup=False)
        notes = {row["epsilon_note"] for row in found.rows if "pip install" in row["epsilon_note"]}
        for note in notes:
            console.print(f"Epsilon {note}", markup=False)
    console.print(f"Results: {out / utility.ROWS}", markup=False, soft_wrap=True)
    if command.folder is not None and out == command.folder:
        records = folders.read(out)
        if records.rows:
            page = report.write(report.make(records), out)
            console.print(f"Report: {page}", markup=False, soft_wrap=True)
    if found.interrupted:
        console.print("Interrupted. The same command goes on from here.", markup=False)
        return 130
    return 0


def _table(found):
    from rich.table import Table

    from ggl_jax.audit import utility

    table = Table(
        title="What the defenses leave of the model", title_justify="left", pad_edge=False
    )
    several = len({row["fidelity"] for row in found.rows}) > 1
    for heading in ("Defense", "Accuracy", "Epsilon", "Epsilon (replace)", "Seconds"):
        left = heading == "Defense"
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in found.rows:
        table.add_row(
            f"{row['defense']} ({row['fidelity']})" if several else row["defense"],
            utility.accuracy_text(row),
            utility.epsilon_text(row),
            utility.epsilon_text(row, "epsilon_replace"),
            f"{row['seconds']:.0f}",
        )
    table.add_row("majority class", f"{100 * found.config['majority']:.1f} %", "0", "0", "")
    return table
