"""``ggl-jax utility``: the test accuracy that each defense leaves, and its epsilon."""

import dataclasses
from pathlib import Path

import tyro

from ggl_jax.audit import folder as folders
from ggl_jax.audit import leaderboard, utility
from ggl_jax.commands import audit as audit_command
from ggl_jax.commands._shared import (
    AuditBar,
    about,
    console,
    count_classes,
    load_labelled,
    load_model,
    say,
    stopped,
    write_report,
)
from ggl_jax.errors import GGLError
from ggl_jax.priors import load_prior
from ggl_jax.spec import replace


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
    model: str | None = None
    """Federated model, as for ggl-jax audit (default: the run's, else resnet18). With
    batch_norm=train, test images are normalised by their own batches, too."""
    weights: str | None = None
    """Its first weights, as for ggl-jax audit (default: the run's)."""
    training: utility.UtilitySettings = dataclasses.field(default_factory=utility.UtilitySettings)
    out: Path | None = None
    """Folder for the results (default: the run's)."""


def _of_run(folder: Path) -> tuple[audit_command.AuditCommand, list[str]]:
    """A run's options and its defenses."""
    records = folders.read(folder)
    options = records.config["options"]
    defenses = list(dict.fromkeys(cell["defense"] for cell in records.cells.values()))
    if "defenses" in options and "data" in options:
        return audit_command.read_config(folder / "config.json"), defenses
    if not {"preset", "fixed", "axes"} <= set(options):
        raise GGLError(
            f"folder: {folder} was run from Python, so its model is not known here; call "
            "ggl_jax.audit.utility.measure(..., out=folder)"
        )
    several = [name for name in ("model", "weights") if name in options["axes"]]
    if several:
        raise GGLError(
            f"folder: {folder} varies {' and '.join(several)}; name one, with --data, --model, "
            "--weights, --defenses and --out in place of the folder"
        )
    base = audit_command.AuditCommand(preset=options["preset"])
    return replace(base, **options["fixed"]), defenses


def run(command: UtilityCommand, argv: list[str]) -> int:
    """``ggl-jax utility``."""
    from ggl_jax.audit import report  # here and not above: it loads matplotlib

    if command.folder is not None:
        base, defenses = _of_run(command.folder)
        prior = load_prior(base.setup.prior)[0]
        size, known = prior.image_shape[0], (base.setup.num_classes, prior.num_classes)
    else:
        missing = [n for n in ("defenses", "data", "out") if getattr(command, n) is None]
        if missing:
            wanted = " and ".join(f"--{name}" for name in missing)
            raise GGLError(f"folder: not given; give a run's folder, or {wanted}")
        base, defenses, size, known = audit_command.AuditCommand(), [], 32, (None, None)
    if command.defenses is not None:
        defenses = list(command.defenses)
    given = {name: getattr(command, name) for name in ("data", "model", "weights")}
    setup = replace(base.setup, **{name: value for name, value in given.items() if value})
    dataset = load_labelled(setup.data, size, setup.label)
    shape = dataset.images.shape[1:]
    model, variables = load_model(setup, count_classes(dataset, dataset.labels, *known), shape)
    out = command.out or command.folder
    assert out is not None
    with AuditBar() as bar:
        found = utility.measure(
            dataset.images,
            dataset.labels,
            model=model,
            variables=variables,
            defenses=defenses,
            out=out,
            settings=command.training,
            client=base.client,
            about={
                **about(argv),
                "data": setup.data,
                "model": [setup.model, model.num_classes, size],
            },
            progress=bar,
        )
    if found.rows:
        console.print(report.Terminal(leaderboard.text(leaderboard.points(found, []), found)))
    say(f"Results: {out / utility.ROWS}")
    if command.folder is not None and out == command.folder:
        records = folders.read(out)
        if records.rows:
            write_report(records)
    return stopped() if found.interrupted else 0
