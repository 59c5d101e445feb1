"""``ggl-jax reproduce``: the paper's experiments, ours beside the paper's numbers."""

import dataclasses
import datetime
import shlex
from pathlib import Path
from typing import Literal

import tyro

from ggl_jax import files
from ggl_jax.commands._shared import (
    AuditBar,
    check_ranges,
    console,
    environment,
    load_inputs,
)
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class ReproduceCommand:
    """Run one of the paper's experiments at 32x32: its table or figure, ours beside the paper's.

    Writes table.md, figure.png and one folder for each search; the same command goes on where it
    was interrupted.
    """

    experiment: tyro.conf.Positional[
        Literal["table1", "table2", "table3", "figure4", "figure5", "figure6", "figure7", "figure8"]
    ]
    """table1 and figure4: optimisers; table2: distances and regularisers; table3 and figure6:
    attacks under defenses; figure5: Soteria on more samples; figure7: leakage by a defense's
    strength; figure8: out-of-distribution images."""
    data: str | None = None
    """Private images, as for ggl-jax audit: a .npz file, a folder, or tfds:celeb_a. Only figure8
    has a default, embedded:nonfaces."""
    images: int | None = None
    """How many of them, the first ones; by default 4, for figure5 16."""
    scale: Literal["quick", "paper"] = "quick"
    """quick (shorter searches, for CPUs) or paper (the published lengths, meant for a GPU)."""
    prior: str = "dcgan32_faces"
    """The adversary's generator, as for ggl-jax audit."""
    lpips: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network behind the LPIPS score."""
    seed: int = 0
    """Seed of the model's weights, the noise and the searches."""
    out: Path | None = None
    """Folder for the results; by default ggl-EXPERIMENT-SCALE here."""


def run(command: ReproduceCommand, argv: list[str]) -> int:
    """``ggl-jax reproduce``."""
    from rich.markdown import Markdown

    from ggl_jax.audit import paper
    from ggl_jax.audit.run import AuditInterrupted, AuditResult, audit

    experiment = paper.EXPERIMENTS[command.experiment]()
    check_ranges(command)
    num = experiment.images if command.images is None else command.images
    data = experiment.data if command.data is None else command.data
    if data is None:
        raise GGLError(
            f"data: {command.experiment} needs --data, private images with labels such as "
            "tfds:celeb_a"
        )
    dataset, prior, prior_params, card, model = load_inputs(
        data,
        command.prior,
        indices=f":{num}",
        unlabelled=experiment.label,
        remedy=f"{command.experiment} needs them",
    )
    if len(dataset.images) < num:
        raise GGLError(
            f"images: got {num}, but {data} has {len(dataset.images)}; give --images "
            f"{len(dataset.images)} or other --data"
        )
    out = command.out or Path(f"ggl-{command.experiment}-{command.scale}")
    options = dataclasses.asdict(command)
    options.pop("out")
    shown = "ggl-jax " + shlex.join(argv)
    env = environment()
    inputs = {"images": files.digest(dataset.images)[:12], "prior": card["sha256"]}
    files.claim(out, {"command": shown, "options": options, "inputs": inputs, "environment": env})
    searches = experiment.searches(command.scale)
    console.print(
        f"{experiment.title}: {len(searches)} searches, {len(experiment.defenses)} defenses, "
        f"{num} images, scale {command.scale}. Results: {out}/",
        markup=False,
        soft_wrap=True,
    )
    results: dict[str, AuditResult] = {}
    interrupted = False
    with AuditBar(len(searches)) as bar:
        for number, (name, settings) in enumerate(searches.items()):
            bar.begin(name, number)
            try:
                results[name] = audit(
                    dataset.images,
                    dataset.labels,
                    model=model,
                    prior=prior,
                    prior_params=prior_params,
                    defenses=experiment.defenses,
                    names=dataset.names,
                    instance_ids=dataset.indices,
                    settings=settings,
                    lpips=command.lpips,
                    seed=command.seed,
                    out=out / _folder(name),
                    progress=bar,
                )
            except AuditInterrupted as stop:
                interrupted = True
                if stop.result.rows:
                    results[name] = stop.result
                break
    if results:
        date = datetime.date.today().isoformat()
        where = (
            f"{date}; {env['device']}; {env['cpu']}; jax {env['jax']}; {num} images; "
            f"seed {command.seed}; prior {card['name']}"
        )
        text = paper.markdown(experiment, results, command=shown, where=where)
        files.write_text(out / "table.md", text)
        paper.draw(experiment, results, out / "figure.png")
        console.print(Markdown(text))
        console.print(f"Table: {out}/table.md; pictures: {out}/figure.png", markup=False)
    if interrupted:
        console.print("Interrupted. The same command goes on from here.", markup=False)
        return 130
    return 0


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())
