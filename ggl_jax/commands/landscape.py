"""``ggl-jax landscape``: matching loss beside perceptual distance around a result."""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from ggl_jax import files
from ggl_jax.commands._shared import (
    AuditBar,
    check_ranges,
    console,
    environment,
    fields_of,
    load_inputs,
)
from ggl_jax.commands.audit import SEARCHES
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class LandscapeCommand:
    """Does a lower matching loss mean a nearer image? The paper's Figure 9.

    Searches for one private image from its defended gradient, as ggl-jax audit does, then evaluates
    the matching loss and the perceptual distance to the private image on a plane of latents
    around the result. Writes both as contour plots (landscape.png) and as numbers (landscape.json),
    with their rank correlation: near 1, a search that lowers the loss comes nearer to the image.
    """

    data: str = "embedded"
    """Private images, as for ggl-jax audit."""
    index: int = 0
    """Which of them."""
    label: int | None = None
    """Its class label, for data without labels."""
    defense: str = "none"
    """The client's defense, such as none, noise:0.1 or clip:4+noise:0.1."""
    prior: str = "dcgan32_faces"
    """The adversary's generator, as for ggl-jax audit."""
    model: str = "resnet18"
    """Federated model: resnet18, lenet or convnet, with random weights."""
    num_classes: int | None = None
    """Its classes; by default those of a class-conditional prior, else of the data."""
    resolution: int = 21
    """Points of the grid in each direction; the result is its middle if this is odd."""
    span: float = 1.0
    """The grid's reach from the result to each side, in norms of the result's latent."""
    optimizer: str = "adam"
    """Search for the result: adam, cma_es, turbo, lbfgs, lbfgs_wolfe or hybrid."""
    steps: int | None = None
    """Search steps."""
    population: int | None = None
    """Candidates per step of cma_es and hybrid."""
    restarts: int | None = None
    """Independent searches in one batch; the lowest loss wins."""
    pool: int | None = None
    """Random samples of the prior that are compared first; the best start the searches."""
    start: Literal["zeros", "prior", "uniform", "normal"] | None = None
    """Where searches start without a pool."""
    bound: Literal["none", "tanh"] | None = None
    """tanh keeps every latent entry within (-1, 1); the plane lies in the space before it."""
    regularizer: str | None = None
    """Penalties of the search, as for ggl-jax audit; the landscape's loss has none."""
    distance: Literal["squared_l2", "cosine"] | None = None
    """Distance between updates."""
    relative: bool | None = None
    """Divide distances by that of an update of zero, as for ggl-jax audit."""
    compare: Literal["published", "support", "undefended", "likelihood"] = "published"
    """What is compared, as for ggl-jax audit."""
    fidelity: Literal["paper", "code"] = "paper"
    """Where the paper and its published code differ: follow the paper, or the code."""
    chunk_size: int | None = None
    """Candidates evaluated at once; by default as many as memory allows."""
    memory: float | None = None
    """Gigabytes for the candidates that are evaluated at once, in place of that choice."""
    lpips: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network behind LPIPS; without its weights (ggl-jax weights), 1 - SSIM is shown."""
    seed: int = 0
    """Seed of the model's weights, the noise, the search and the plane."""
    out: Path = Path("ggl-landscape")
    """Folder for landscape.png and landscape.json."""


def defaults(argv: list[str]) -> LandscapeCommand:
    """The options before the user's own: the search is that of the audit's quick preset."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--optimizer", default="adam")
    optimizer = finder.parse_known_args(argv)[0].optimizer
    name = "ggl" if optimizer == "adam" else f"ggl/{optimizer}"
    search = SEARCHES["quick"].get(name, {})
    known = {field.name for field in dataclasses.fields(LandscapeCommand)}
    return LandscapeCommand(**{k: v for k, v in search.items() if k in known})


def run(command: LandscapeCommand, argv: list[str]) -> int:
    """``ggl-jax landscape``."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ggl_jax.adversary.reconstruct import search_for
    from ggl_jax.adversary.strategy import AttackSettings
    from ggl_jax.audit import landscape, metrics
    from ggl_jax.client import defenses
    from ggl_jax.client.share import ClientSettings

    check_ranges(command)
    defense = defenses.parse(command.defense, fidelity=command.fidelity, compare=command.compare)
    dataset, prior, prior_params, card, model = load_inputs(
        command.data,
        command.prior,
        indices=[command.index],
        label=command.label,
        remedy="give --label 0",
        model_name=command.model,
        num_classes=command.num_classes,
    )
    label = int(dataset.labels[0])
    if label >= model.num_classes:
        raise GGLError(
            f"label: got {label}, allowed: 0 to {model.num_classes - 1}; raise --num-classes"
        )
    given = fields_of(AttackSettings, command)
    if command.optimizer == "adam":
        # as the audit's default search, not as published
        given |= {"signed": False, "schedule": "ramp"}
    settings = AttackSettings(**given)
    search_for(model, prior, defense, ClientSettings(), settings)  # for its errors
    options = {k: v for k, v in dataclasses.asdict(command).items() if k != "out"}
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
            settings=settings,
            instance_id=command.index,
            seed=command.seed,
            progress=advanced,
        )
        bar("landscape", 1, 2, 0.0, center.loss)
        found = landscape.landscape(
            center,
            image,
            # folded away from the streams of the image's index
            jax.random.fold_in(jax.random.key(command.seed), 2**31 - 3),
            prior=prior,
            resolution=command.resolution,
            span=command.span,
            lpips=command.lpips,
        )
    psnr = float(metrics.psnr(jnp.asarray(center.images[0]), jnp.asarray(image)))
    correlation = found.correlation
    said = f"{correlation:.3f}" if np.isfinite(correlation) else "undefined"
    title = f"{name}, {command.defense}, {command.optimizer}, seed {command.seed}"
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
