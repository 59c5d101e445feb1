"""``ggl-jax reproduce``: the paper's tables and figures, ours beside the paper's numbers."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.markdown import Markdown

from ggl_jax import files
from ggl_jax.audit import paper
from ggl_jax.audit import run as cell_runs
from ggl_jax.audit.cells import Cells, image_batches
from ggl_jax.audit.folder import Records
from ggl_jax.commands import _devices, landscape
from ggl_jax.commands._options import Running
from ggl_jax.commands._shared import (
    about,
    check_number,
    console,
    determining,
    load_inputs,
    run_grid,
    say,
)
from ggl_jax.errors import GGLError, check_known
from ggl_jax.spec import Client, Count, Judge, Search, Seed, Setup, Speed


@dataclasses.dataclass(frozen=True)
class ReproduceCommand:
    """Run one of the paper's experiments: its table or figure, ours beside the paper's numbers.

    Writes table.md and figure.png beside the results; the same command goes on where it was
    interrupted. figure9 writes what ggl-jax landscape does.
    """

    experiment: tyro.conf.Positional[str]
    """In the paper's numbering. table1: loss functions; table2, figure3: optimisers; table3,
    figure4: attacks under defenses; figure5: more samples under Soteria; figure6: combined
    defenses; figure7: Soteria's pruning rate; figure8: images outside the generator's distribution;
    figure9: the loss landscape."""
    half: Literal["celeba", "imagenet"] | None = None
    """The paper's data set: celeba (32x32) or imagenet (224x224; docs/imagenet.md). By default
    celeba, but imagenet for figures 5, 8 and 9, which the paper has of it alone."""
    data: str | None = None
    """Private images, as for ggl-jax audit: a .npz file, a folder, or tfds:celeb_a. Only figure8's
    celeba half has a default, embedded:nonfaces."""
    images: Count | None = None
    """How many of them, the first ones; by default the experiment's own number."""
    seeds: Count | None = None
    """How many seeds, from --seed on; by default 1, but 3 (paper scale: 5) for table2, figure3."""
    scale: Literal["quick", "paper"] = "quick"
    """quick (shorter searches, for CPUs) or paper (the published lengths, meant for a GPU)."""
    fidelity: Literal["paper", "code"] = "paper"
    """Where the paper and its published code differ: follow the paper (clipping layer by layer), or
    the code (one global norm)."""
    weights: str = "random"
    """The federated model's weights, as for ggl-jax audit; seeds then change noise and search
    alone."""
    prior: str | None = None
    """The adversary's generator, as for ggl-jax audit; by default dcgan32_faces for celeba."""
    seed: Seed = 0
    """Seed of the model's weights, the noise and the searches."""
    judge: Judge = dataclasses.field(default_factory=lambda: Judge(suspects=0))
    speed: Speed = dataclasses.field(default_factory=Speed)
    out: Path | None = None
    """Folder for the results; by default ggl-EXPERIMENT-HALF-SCALE here."""
    running: Running = dataclasses.field(default_factory=Running)


def run(command: ReproduceCommand, argv: list[str]) -> int:
    """``ggl-jax reproduce``."""
    chosen: Any = _resolve(command)
    experiment = paper.EXPERIMENTS[chosen.experiment](chosen.scale, chosen.half, chosen.fidelity)
    runs = experiment.runs(range(chosen.seed, chosen.seed + chosen.seeds))
    if chosen.experiment == "figure9":
        return _landscape(chosen, runs[0].search, argv)
    given, card = load_inputs(
        _setup(chosen),
        chosen.judge,
        chosen.speed,
        indices=f":{chosen.images}",
        unlabelled=experiment.label,
        remedy=f"{chosen.experiment} needs them",
        about=about(argv),
        mesh=_devices.mesh(chosen.running.shard),
    )
    check_number(chosen.images, len(given.images), chosen.data)
    cells = _cells(runs, given)
    config = cell_runs.config_of(cells, given, determining(chosen))
    grid = cell_runs.Grid(cells, given, config)
    say(
        f"{experiment.title}: {len(runs)} searches, {len(experiment.defenses)} defenses, "
        f"{len(given.images)} images, scale {chosen.scale}."
    )
    wanted = {cell.id for cell in cells}

    def write(records: Records) -> None:
        ours = records._replace(rows=[row for row in records.rows if row["cell"] in wanted])
        if ours.rows:
            _write(chosen, experiment, ours, given, card["name"])

    return run_grid(grid, chosen.out, chosen.running, write)


def _resolve(command: ReproduceCommand) -> ReproduceCommand:
    """The command with the experiment's own defaults filled in.

    Raises:
        GGLError: an unknown experiment, or no data or prior.
    """
    name = command.experiment
    check_known("experiment", name, paper.EXPERIMENTS)
    kind = paper.EXPERIMENTS[name]
    half: Any = command.half or kind.default_half
    data = command.data or kind.data.get(half)
    prior = command.prior or ("dcgan32_faces" if half == "celeba" else None)
    if data is None:
        example = "tfds:celeb_a" if half == "celeba" else "tfds:imagenet2012:validation"
        raise GGLError(f"data: {name} needs --data, private images with labels such as {example}")
    if prior is None:
        raise GGLError(
            "prior: the ImageNet half needs --prior, a generator of such images (docs/imagenet.md "
            "says how to get BigGAN-deep); or give --half celeba"
        )
    return dataclasses.replace(
        command,
        half=half,
        data=data,
        prior=prior,
        images=command.images or kind.images[command.scale],
        seeds=command.seeds or kind.seeds[command.scale],
        out=command.out or Path(f"ggl-{name}-{half}-{command.scale}"),
    )


def _setup(command: Any) -> Setup:
    return Setup(command.data, prior=command.prior, seed=command.seed, weights=command.weights)


def _landscape(command: Any, search: Search, argv: list[str]) -> int:
    """Figure 9, by ``ggl-jax landscape``."""
    if (command.images, command.seeds) != (1, 1):
        raise GGLError("images, seeds: figure9 is of one image and one seed; leave them out")
    if command.running.dry_run:
        raise GGLError("dry_run: figure9 is a single search; leave it out")
    options = landscape.LandscapeCommand(
        lpips=command.judge.lpips,
        setup=_setup(command),
        search=search,
        speed=command.speed,
        out=command.out,
    )
    return landscape.run(options, argv)


def _write(chosen: Any, experiment: Any, ours: Any, given: Any, prior: str) -> None:
    """The table and the pictures of what is there."""
    key, told = jax.random.key(chosen.seed), given.about
    env = told["environment"]
    controls = paper.control_scores(
        ours,
        given.public(chosen.seed),
        # folded away from the streams of the images' indices
        jax.random.fold_in(key, 2**31 - 4),
        lpips=chosen.judge.lpips,
    )
    text = paper.markdown(
        experiment,
        ours.rows,
        controls,
        num_images=chosen.images,
        lpips=chosen.judge.lpips,
        command=told["command"],
        where=(
            f"{datetime.date.today().isoformat()}; {env['device']}; {env['cpu']}; "
            f"jax {env['jax']}; images: {chosen.images}; seeds: {chosen.seeds}, from {chosen.seed} "
            f"on; prior {prior}"
        ),
    )
    files.write_text(chosen.out / "table.md", text)
    paper.draw(experiment, ours, chosen.out / "figure.png")
    console.print(Markdown(text))
    say(f"Table: {chosen.out}/table.md; pictures: {chosen.out}/figure.png")


def _cells(runs: Sequence[Any], inputs: Any) -> list[Any]:
    """The experiment's cells: every search under every one of its defenses, on every image."""
    maker, client = Cells(inputs), Client()
    return [
        maker.make(
            {"search": one.name}, one.search, client, maker.defense(defense), one.seed, batch
        )
        for one in runs
        for defense in one.defenses
        for batch in image_batches(len(inputs.images), client.batch_size)
    ]
