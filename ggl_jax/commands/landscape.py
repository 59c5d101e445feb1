"""``ggl-jax landscape``: matching loss beside perceptual distance around a result."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import files
from ggl_jax.adversary.attacks import search_of
from ggl_jax.adversary.reconstruct import prepare
from ggl_jax.audit import landscape, metrics
from ggl_jax.audit.landscape import Resolution
from ggl_jax.client.defenses import parse
from ggl_jax.commands._options import choice_of
from ggl_jax.commands._shared import AuditBar, about, determining, load_inputs, say
from ggl_jax.spec import Client, Judge, Number, Positive, Search, Setup, Speed


@dataclasses.dataclass(frozen=True)
class LandscapeCommand:
    """Does a lower matching loss mean a nearer image? The paper's Figure 9.

    Searches for one private image from its defended gradient, as ggl-jax audit does, then evaluates
    the matching loss and the perceptual distance to the private image on a plane of latents
    around the result. Writes both as contour plots (landscape.png) and as numbers (landscape.json),
    with their rank correlation: near 1, a search that lowers the loss comes nearer to the image.
    """

    index: Number = 0
    """Which of the private images."""
    defense: str = "none"
    """The client's defense, such as none, noise:0.1 or clip:4+noise:0.1."""
    resolution: Resolution = 21
    """Points of the grid in each direction; the result is its middle if this is odd."""
    span: Positive = 1.0
    """The grid's reach from the result to each side, in norms of the result's latent."""
    lpips: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network behind LPIPS; without its weights (ggl-jax weights), 1 - SSIM is shown."""
    setup: Setup = dataclasses.field(default_factory=Setup)
    search: Search = dataclasses.field(
        default_factory=lambda: search_of("quick", "ggl", refine="none")
    )
    speed: Speed = dataclasses.field(default_factory=Speed)
    out: Path = Path("ggl-landscape")
    """Folder for landscape.png and landscape.json."""


def defaults(argv: list[str]) -> LandscapeCommand:
    """The options before the user's own: the search in latents of the audit's quick preset."""
    choice = choice_of(argv)
    choice = dataclasses.replace(choice, attack=choice.attack or "ggl")
    return LandscapeCommand(search=dataclasses.replace(choice.search, refine="none"))


def run(command: LandscapeCommand, argv: list[str]) -> int:
    """``ggl-jax landscape``."""
    search, seed = command.search, command.setup.seed
    defense = parse(command.defense)
    given, _ = load_inputs(
        *(command.setup, Judge(suspects=0), command.speed),
        indices=[command.index],
        remedy="give --label 0",
    )
    prepare(given.model, given.prior, defense.view, Client(), search)  # for its errors
    told, inputs = about(argv), given.digests
    image, name = given.images[0], given.names[0]
    config = {**told, "options": determining(command), "inputs": inputs}
    with files.claimed(command.out, config), AuditBar() as bar:
        center = landscape.find_center(
            given,
            defense=defense,
            search=search,
            seed=seed,
            progress=lambda phase, fraction, loss: bar(phase, 0, 2, fraction, loss),
        )
        bar("landscape", 1, 2, 0.0, center.loss)
        found = landscape.landscape(
            center,
            image,
            # folded away from the streams of the image's index
            jax.random.fold_in(jax.random.key(seed), 2**31 - 3),
            prior=given.prior,
            resolution=command.resolution,
            span=command.span,
            lpips=command.lpips,
        )
    psnr = float(metrics.psnr(jnp.asarray(center.images[0]), jnp.asarray(image)))
    said = f"{found.correlation:.3f}" if np.isfinite(found.correlation) else "undefined"
    title = f"{name}, {command.defense}, {search.optimizer}, seed {seed}"
    landscape.draw(found, command.out / "landscape.png", title=f"{title}: rank correlation {said}")
    report = {
        "image": name,
        "defense": defense.name,
        "psnr": psnr if np.isfinite(psnr) else None,
        "loss": center.loss,
        "evaluations": center.evaluations + command.resolution**2,
        "label_true": int(given.labels[0]),
        "label_inferred": int(center.problem.labels[0]),
        **found.summary(),
        **told,
    }
    files.write_json(command.out / "landscape.json", report)
    if found.note:
        say(f"LPIPS was not measured: {found.note}")
    say(
        f"Result: {psnr:.1f} dB PSNR. Spearman's rank correlation of the matching loss and "
        f"{found.measure} over {command.resolution} x {command.resolution} latents: {said}"
    )
    say(f"Plots: {command.out}/landscape.png; numbers: {command.out}/landscape.json")
    return 0
