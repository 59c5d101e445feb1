"""``ggl-jax landscape``: matching loss beside perceptual distance around a result."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

from ggl_jax import files
from ggl_jax.adversary.attacks import search_of
from ggl_jax.commands._options import choice_of
from ggl_jax.commands._shared import AuditBar, console, environment, load_inputs
from ggl_jax.errors import GGLError
from ggl_jax.spec import AtLeast, Client, Number, Positive, Search, Setup, Speed, checked, flat


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
    resolution: Annotated[int, AtLeast(2)] = 21
    """Points of the grid in each direction; the result is its middle if this is odd."""
    span: Positive = 1.0
    """The grid's reach from the result to each side, in norms of the result's latent."""
    lpips: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network behind LPIPS; without its weights (ggl-jax weights), 1 - SSIM is shown."""
    setup: Setup = dataclasses.field(default_factory=Setup)
    search: Search = dataclasses.field(default_factory=lambda: search_of("quick", refine="none"))
    speed: Speed = dataclasses.field(default_factory=Speed)
    out: Path = Path("ggl-landscape")
    """Folder for landscape.png and landscape.json."""


def defaults(argv: list[str]) -> LandscapeCommand:
    """The options before the user's own: the search is that of the audit's quick preset."""
    return LandscapeCommand(search=dataclasses.replace(choice_of(argv).search, refine="none"))


def run(command: LandscapeCommand, argv: list[str]) -> int:
    """``ggl-jax landscape``."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ggl_jax.adversary.reconstruct import prepare
    from ggl_jax.audit import landscape, metrics
    from ggl_jax.client import defenses

    command = checked(command)
    search = command.search
    defense = defenses.parse(command.defense, fidelity=search.fidelity, compare=search.compare)
    dataset, prior, prior_params, card, model = load_inputs(
        command.setup, indices=[command.index], remedy="give --label 0"
    )
    label = int(dataset.labels[0])
    if label >= model.num_classes:
        raise GGLError(
            f"label: got {label}, allowed: 0 to {model.num_classes - 1}; raise --num-classes"
        )
    prepare(model, prior, defense.view, Client(), search)  # for its errors
    left_out = ("out", *flat(Speed()))
    options = {k: v for k, v in flat(command).items() if k not in left_out}
    shown = "ggl-jax " + shlex.join(argv)
    env = environment()
    inputs = {"images": files.digest(dataset.images)[:12], "prior": card["sha256"]}
    files.claim(
        command.out, {"command": shown, "options": options, "inputs": inputs, "environment": env}
    )
    image, name = dataset.images[0], dataset.names[0]
    with AuditBar() as bar:

        def advanced(phase, fraction, loss):
            bar(phase, 0, 2, fraction, loss)

        center = landscape.find_center(
            image,
            label,
            model=model,
            prior=prior,
            prior_params=prior_params,
            defense=defense,
            search=search,
            speed=command.speed,
            instance_id=command.index,
            seed=command.setup.seed,
            progress=advanced,
        )
        bar("landscape", 1, 2, 0.0, center.loss)
        found = landscape.landscape(
            center,
            image,
            # folded away from the streams of the image's index
            jax.random.fold_in(jax.random.key(command.setup.seed), 2**31 - 3),
            prior=prior,
            resolution=command.resolution,
            span=command.span,
            lpips=command.lpips,
        )
    psnr = float(metrics.psnr(jnp.asarray(center.images[0]), jnp.asarray(image)))
    correlation = found.correlation
    said = f"{correlation:.3f}" if np.isfinite(correlation) else "undefined"
    title = f"{name}, {command.defense}, {search.optimizer}, seed {command.setup.seed}"
    landscape.draw(found, command.out / "landscape.png", title=f"{title}: rank correlation {said}")
    report = {
        "image": name,
        "defense": defense.name,
        "psnr": psnr if np.isfinite(psnr) else None,
        "loss": center.loss,
        "evaluations": center.evaluations + command.resolution**2,
        "label_true": label,
        "label_inferred": int(center.problem.labels[0]),
        **found.summary(),
        "command": shown,
        "environment": env,
    }
    files.write_json(command.out / "landscape.json", report)
    if found.note:
        console.print(f"LPIPS was not measured: {found.note}", markup=False, soft_wrap=True)
    console.print(
        f"Result: {psnr:.1f} dB PSNR. Spearman's rank correlation of the matching loss and "
        f"{found.measure} over {command.resolution} x {command.resolution} latents: {said}",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"Plots: {command.out}/landscape.png; numbers: {command.out}/landscape.json")
    return 0
