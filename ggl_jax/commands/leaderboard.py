"""``ggl-jax leaderboard``: all defenses by what they leak where they leave the accuracy."""

import dataclasses
from pathlib import Path
from typing import Any

from ggl_jax import files
from ggl_jax.audit import folder, leaderboard, utility
from ggl_jax.client.defenses import DEFENSES, STRENGTHS
from ggl_jax.commands import _devices, sweep
from ggl_jax.commands import utility as utility_command
from ggl_jax.commands._options import Choice, Parts, Preset, Running
from ggl_jax.commands._shared import about, check_number, console, load_labelled, run_grid, say
from ggl_jax.spec import Count, Judge, Positive, Setup, Speed, flat


@dataclasses.dataclass(frozen=True)
class LeaderboardCommand:
    """Rank all defenses, each at several strengths: what leaks, and what accuracy is left.

    A sweep of defenses, attacks and images, then ggl-jax utility for the same defenses, in one
    folder. The table (leaderboard.md; the report has it with its figure) is sorted by leak at equal
    utility. Every finished cell is kept at once; the same command goes on where a run ended.
    """

    preset: Preset = "standard"
    """How much effort each attack is worth, as for ggl-jax audit."""
    attacks: tuple[str, ...] = ()
    """Attacks; by default the preset's own. Of several, each image has the one whose result's
    update comes nearest to the observed one."""
    defenses: tuple[str, ...] = ()
    """Defenses: a name alone stands for its strengths (clip, or clip+noise), others are as for
    ggl-jax sweep, such as noise:{0.1,1}. By default all, each at its strengths."""
    images: Count = 8
    """How many of the private images, the first ones."""
    skip_utility: bool = False
    """Measure no accuracies; ggl-jax utility adds them later, with options of its own."""
    utility_data: str | None = None
    """Images with labels to train and test on, as for --data; by default those of --data."""
    utility_model: str = "convnet"
    """The model to train, from random weights; resnet18 does not learn in so few rounds."""
    rounds: Count = utility.UtilitySettings().rounds
    """Rounds of federated SGD."""
    repeats: Count = utility.UtilitySettings().repeats
    """Trainings of each defense, as for ggl-jax utility; their mean counts."""
    learning_rate: tuple[Positive, ...] = utility.UtilitySettings().learning_rate
    """Step sizes to train at. Of several, each defense keeps the one that is best on validation
    images, as for ggl-jax utility: 0.03 suits the undefended update, not signs and sums."""
    setup: Setup = dataclasses.field(default_factory=Setup)
    judge: Judge = dataclasses.field(default_factory=Judge)
    speed: Speed = dataclasses.field(default_factory=Speed)
    running: Running = dataclasses.field(default_factory=Running)
    out: Path = Path("leaderboard")
    """Folder for the results."""


def settings(defenses: tuple[str, ...], model: str = "") -> list[str]:
    """Specifications, in which braces list values: names alone stand for their strengths.

    Args:
        defenses: as given; none at all stand for every defense that this model can have.
        model: its specification.
    """
    names = dict.fromkeys(defenses or [*STRENGTHS, *DEFENSES])
    if not defenses and not model.startswith("precode"):
        del names["precode"]  # needs a bottleneck
    return [spec for name in names for spec in STRENGTHS.get(name, (name,))]


def grid_of(command: LeaderboardCommand) -> sweep.GridFile:
    """The sweep behind a leaderboard."""
    given = flat(command.setup) | flat(command.judge) | flat(command.speed)
    usual = flat(Parts())
    own_attack = Choice(command.preset).search.attack
    table: dict[str, Any] = {
        "preset": command.preset,
        "fixed": {k: v for k, v in given.items() if k != "seed" and v != usual[k]},
        "axes": {
            "image": f":{command.images}",
            "attack": list(command.attacks or [own_attack]),
            "defense": settings(command.defenses, command.setup.model),
            "seed": [command.setup.seed],
        },
    }
    return sweep.grid_of(table)


def run(command: LeaderboardCommand, argv: list[str]) -> int:
    """``ggl-jax leaderboard``."""
    mesh = _devices.mesh(command.running.shard)
    grid = sweep.load_grid(grid_of(command), about(argv), fit=True, mesh=mesh)
    check_number(command.images, len(grid.inputs.images), command.setup.data)
    training = utility.UtilitySettings(
        rounds=command.rounds,
        repeats=command.repeats,
        learning_rate=command.learning_rate,
        seed=command.setup.seed,
    )
    if not command.skip_utility:  # for its errors, before hours of work
        data, size = command.utility_data or command.setup.data, grid.inputs.model.image_shape[0]
        found = len(load_labelled(data, size, command.setup.label).images)
        utility.split(found, utility.usable(training))
    code = run_grid(grid, command.out, command.running)
    if command.running.dry_run or code == 130:
        return code
    if not command.skip_utility:
        measured = utility_command.UtilityCommand(
            command.out,
            data=command.utility_data,
            model=command.utility_model,
            weights="random",
            training=training,
        )
        code = max(code, utility_command.run(measured, argv))
    _write(command.out)
    return code


def _write(out: Path) -> None:
    """The table of what is there."""
    from ggl_jax.audit import report

    records = folder.read(out)
    if records.rows:
        text = leaderboard.of_folder(records)
        files.write_text(out / "leaderboard.md", text + "\n")
        console.print(report.Terminal(text))
        say(f"Table: {out}/leaderboard.md")
