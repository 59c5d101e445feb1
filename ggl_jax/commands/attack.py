"""``ggl-jax attack``: audit an update that came from elsewhere."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from ggl_jax import files
from ggl_jax.commands import _devices
from ggl_jax.commands import audit as audit_command
from ggl_jax.commands._shared import AuditBar, check_ranges, console, environment, fields_of
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class AttackCommand:
    """Attack an update that came from elsewhere: what does it show about the image behind it?

    Plays the server with what a server has: the update and the global model's weights. With
    --image, the private image, the result is judged as in an audit, beside its controls; without,
    only what the server could know is reported.
    """

    gradient: Path
    """The update: a .npz, .safetensors, .pt or .pth file of named tensors, named as the model's
    parameters (fc/kernel, ...) or as torch names a ResNet-18's (fc.weight, ...)."""
    weights: Path
    """The global model's weights that the update was computed at, in a file of the same kind; of
    torch, the whole state dict with its buffers."""
    out: Path
    """Folder for the reconstruction and result.json."""
    image: Path | None = None
    """The private image, to judge the result."""
    label: int = 0
    """The private image's class; read only with --image."""
    model: str = "resnet18"
    """Federated model: resnet18, lenet or convnet."""
    defense: str = "none"
    """What the client is taken to have done, e.g. clip:4; its parameters are estimated."""
    prior: str = "dcgan32_faces"
    """The adversary's generator, as for ggl-jax audit."""
    preset: Literal["quick", "standard", "paper"] = "quick"
    """How much effort, as for ggl-jax audit."""
    attack: str = "ggl"
    """Attack: ggl, dlg, idlg, ig or gi."""
    optimizer: str | None = None
    """Search, as for ggl-jax audit."""
    steps: int | None = None
    """Search steps."""
    batch_size: int = 1
    """Images behind the update."""
    local_steps: int = 1
    """Local SGD steps behind it; the file then holds the sum of their gradients."""
    local_learning_rate: float = 0.01
    """Step size of the local steps."""
    regularizer: str | None = None
    """Penalties on the candidate, as for ggl-jax audit."""
    statistics: Path | None = None
    """The mean and variance of the client's batch at every BatchNorm layer, where it shared them:
    a file as for --gradient, named as the model's batch_stats (bn1/mean, bn1/var, ...). Read by
    batch_norm among the penalties."""
    num_controls: int = 400
    """Random samples of the prior for the controls; read only with --image."""
    ceiling_steps: int = 300
    """Steps of the ceiling's fit; read only with --image."""
    seed: int = 0
    """Seed of the search."""
    shard: bool = False
    """Share each step's candidates out to all devices of this machine."""


def run(command: AttackCommand, argv: list[str]) -> int:
    """``ggl-jax attack``."""
    import jax
    import jax.numpy as jnp

    from ggl_jax import foreign
    from ggl_jax.adversary.reconstruct import expectations, reconstruct
    from ggl_jax.adversary.strategy import AttackSettings
    from ggl_jax.client.defenses import parse, summary
    from ggl_jax.client.share import ClientSettings
    from ggl_jax.client.updates import read_update, read_variables
    from ggl_jax.priors import load_prior
    from ggl_jax.types import STATUS_MESSAGES, Public, Shared

    check_ranges(command)
    if command.image is not None and command.batch_size > 1:
        raise GGLError("image: judged for one image only; use --batch-size 1, or ggl-jax audit")
    prior, prior_params, _ = load_prior(command.prior)
    original = None if command.image is None else _private_image(command, prior)
    tensors = foreign.read(command.weights)
    model, variables = read_variables(tensors, command.model, prior.image_shape)
    update = read_update(command.gradient, variables["params"])
    statistics = None
    if command.statistics is not None:
        statistics = read_update(command.statistics, variables.get("batch_stats", {}))
    chosen = ["--preset", command.preset, "--attack", command.attack]
    chosen += [] if command.optimizer is None else ["--optimizer", command.optimizer]
    base = audit_command.defaults(chosen)
    given = fields_of(AttackSettings, base)
    given |= {"attack": command.attack, "optimizer": command.optimizer or base.optimizer}
    given["regularizer"] = command.regularizer or base.regularizer
    given["steps"] = base.steps if command.steps is None else command.steps
    settings = AttackSettings(**given)
    defense = parse(command.defense, fidelity=settings.fidelity, compare=settings.compare)
    command.out.mkdir(parents=True, exist_ok=True)
    public = Public(model, variables, prior, prior_params)
    client = ClientSettings(**fields_of(ClientSettings, command))
    search_key, samples_key = (jax.random.fold_in(jax.random.key(command.seed), i) for i in (0, 1))
    with AuditBar() as bar:
        (found,) = reconstruct(
            search_key[None],
            public,
            [Shared(update, statistics)],
            defense=defense,
            client=client,
            settings=settings,
            expected=expectations(samples_key, public) if command.batch_size > 1 else None,
            mesh=_devices.mesh(command.shard),
            progress=lambda phase, fraction, loss: bar(phase, 0, 1, fraction, loss),
        )
    norm = float(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(update)))
    content = {
        "labels": found.labels.tolist(),
        "defense": defense.name,
        "defense_estimated": summary(found.estimated),
        "attack": settings.attack,
        "loss": found.loss,
        "distance": found.distance,
        "squared_norm": norm,
        "evaluations": found.evaluations,
        "status": STATUS_MESSAGES[found.status],
        "loss_history": [float(f"{loss:.5g}") for loss in found.history],
    }
    for number, image in enumerate(found.images):
        files.write_png(command.out / f"reconstruction-{number}.png", image)
    lines = [
        f"Labels inferred: {content['labels']}. Defense as estimated: "
        f"{content['defense_estimated'] or 'no parameters'}.",
        f"Distance of updates {found.distance:.4g}, where the update's squared norm is {norm:.4g}.",
    ]
    content |= {"command": "ggl-jax " + shlex.join(argv), "environment": environment()}
    if original is not None:
        _write(command, content)  # whatever becomes of the controls
        content["judged"] = _judge(command, found, original, public)
        scores = content["judged"]
        lines.append(
            f"PSNR {scores['psnr']:.1f} dB; mean image {scores['psnr_mean_image']:.1f}, random "
            f"sample {scores['psnr_control_mean']:.1f}, ceiling {scores['psnr_ceiling']:.1f}."
        )
    else:
        lines.append("Whether it shows the private image cannot be told without it (--image).")
    _write(command, content)
    for line in lines:
        console.print(line, markup=False)
    console.print(f"Pictures and numbers: {command.out}/", markup=False, soft_wrap=True)
    return 0


def _write(command: AttackCommand, content: dict) -> None:
    from ggl_jax.audit.judge import jsonable

    files.write_json(command.out / "result.json", jsonable(content))


def _private_image(command: AttackCommand, prior):
    """The private image [h w c] in [0, 1]."""
    import jax.numpy as jnp

    from ggl_jax.audit import data

    assert command.image is not None
    if not command.image.exists():
        raise GGLError(f"image: {command.image} does not exist; give an image file")
    private = data.load(str(command.image), image_size=prior.image_shape[0], labels=command.label)
    if len(private.images) != 1:
        raise GGLError(f"image: {command.image} holds {len(private.images)} images; give one file")
    return jnp.asarray(private.images[0])


def _judge(command: AttackCommand, found, original, public) -> dict:
    """Scores and controls, as in an audit."""
    import jax
    import numpy as np

    from ggl_jax.audit import metrics
    from ggl_jax.audit.controls import prior_controls
    from ggl_jax.audit.judge import judge

    controls = prior_controls(
        public.prior,
        public.prior_params,
        original,
        int(found.labels[0]),
        jax.random.key(command.seed),
        num_samples=command.num_controls,
        ceiling_steps=command.ceiling_steps,
    )
    (row,) = judge(
        found, original[None], np.asarray([command.label]), public=public, controls=[controls]
    )
    return {name: row[name] for name in (*metrics.METRICS, *controls.scores)}
