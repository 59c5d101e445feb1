"""``ggl-jax attack``: audit an update that came from elsewhere."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ggl_jax import checkpoint, files, trees
from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.reconstruct import expectations, prepare, reconstruct
from ggl_jax.adversary.scale import Scale, read_scale
from ggl_jax.audit import data, metrics
from ggl_jax.audit.controls import prior_controls
from ggl_jax.audit.judge import jsonable, judge, searched
from ggl_jax.client import updates
from ggl_jax.client.defenses import parse
from ggl_jax.commands import _devices
from ggl_jax.commands._options import Preset, choice_of
from ggl_jax.commands._shared import AuditBar, about, console, determining, say
from ggl_jax.errors import GGLError
from ggl_jax.gate.models import check_values
from ggl_jax.priors import load_prior
from ggl_jax.spec import Client, Count, Number, Positive, Search, Seed, Speed, replace
from ggl_jax.types import Public, Shared


@dataclasses.dataclass(frozen=True)
class AttackCommand:
    """Attack an update that came from elsewhere: what does it show about the image behind it?

    Plays the server with what a server has: the update and the global model's weights. With
    --image, the private image, the result is judged as in an audit, beside its controls; without,
    only what the server could know is reported.
    """

    weights: Annotated[Path, tyro.conf.arg(aliases=("--before",))]
    """The global model's weights that the update was computed at: a file or a checkpoint folder, as
    for ggl-jax audit."""
    out: Path
    """Folder for the reconstruction and result.json."""
    gradient: Path | None = None
    """The update: a file of the same kind, with a gradient for each parameter that was shared (the
    others are left out of the comparison). After several local steps, the sum of their gradients,
    which is (before - after) / learning-rate."""
    after: Path | None = None
    """In place of the update, the client's weights after its training; with --learning-rate."""
    learning_rate: Positive | None = None
    """The client's; then also that of its local steps."""
    loss_scale: Literal["auto"] | Positive = 1.0
    """What the client's mean loss was multiplied by (a batch's size, where it took the sum). auto:
    read off the last layer for one undefended image; else the size of updates of the prior's
    samples, and candidates are compared at the scale that suits each best (scaled_l2)."""
    mean: tuple[float, ...] = (0.5,)
    """The client's model sees (image - mean) / std of images in [0, 1]: a number, or one for each
    channel."""
    std: tuple[float, ...] = (0.5,)
    """See mean; 0.5 for both is [-1, 1]."""
    image: Path | None = None
    """The private image, to judge the result."""
    label: Number = 0
    """The private image's class; read only with --image."""
    model: str = "resnet18"
    """Federated model, as for ggl-jax audit; resnet18:batch_norm=train for a client whose model was
    in training mode."""
    defense: str = "none"
    """What the client is taken to have done, e.g. clip:4; its parameters are estimated."""
    prior: str = "dcgan32_faces"
    """The adversary's generator, as for ggl-jax audit."""
    preset: Preset = "quick"
    """How much effort, as for ggl-jax audit."""
    statistics: Path | None = None
    """The mean and variance of the client's batch at every BatchNorm layer, where it shared them:
    a file as for --gradient, named as the model's batch_stats (bn1/mean, bn1/var, ...). Read by
    batch_norm among the penalties."""
    num_controls: Count = 400
    """Random samples of the prior for the controls; read only with --image."""
    ceiling_steps: Count = 300
    """Steps of the ceiling's fit; read only with --image."""
    seed: Seed = 0
    """Seed of the search."""
    client: Client = dataclasses.field(default_factory=Client)
    search: Search = dataclasses.field(default_factory=Search)
    speed: Speed = dataclasses.field(default_factory=Speed)
    shard: bool = False
    """Share each step's candidates out to all devices of this machine."""


def defaults(argv: list[str]) -> AttackCommand:
    """The options before the user's own: the preset's search."""
    needed: Any = tyro.MISSING
    return AttackCommand(needed, needed, search=choice_of(argv).search)


def run(command: AttackCommand, argv: list[str]) -> int:
    """``ggl-jax attack``."""
    _check(command)
    if command.learning_rate is not None:
        command = replace(command, local_learning_rate=command.learning_rate)
    search, client = command.search, command.client
    prior, prior_params, card = load_prior(command.prior)
    original = None if command.image is None else _private_image(command, prior)
    model, variables = updates.read_variables(command.weights, command.model, prior.image_shape)
    if (command.mean, command.std) != ((0.5,), (0.5,)):
        model = updates.normalised(model, command.mean, command.std)
    check_values(model, variables)
    if original is not None and command.label >= model.num_classes:
        raise GGLError(f"label: got {command.label}, allowed: 0 to {model.num_classes - 1}")
    part = _read_part(command, variables["params"])
    statistics = None
    if command.statistics is not None:
        statistics = updates.read_update(command.statistics, variables.get("batch_stats", {}))
    defense = parse(command.defense)
    view = updates.shared_part(defense.view, variables["params"], list(part), model.head)
    public = Public(model, variables, prior, prior_params)
    prepare(model, prior, view, client, search, command.speed)  # for its errors
    keys = [jax.random.fold_in(jax.random.key(command.seed), stream) for stream in range(3)]
    if client.batch_size > 1:
        public = public._replace(expected=expectations(keys[1], public))
    part, scale, notes = _scaled(command, keys[2], public, part)
    if scale["profiled"] and search.distance == "squared_l2":
        search = replace(search, distance="scaled_l2")
    last = "/".join(model.head)
    known = f"{last}/kernel" in part or f"{last}/bias" in part
    if not known:
        # A refinement has no labels of its own to go on with.
        search = replace(search, labels="searched", refine="none")
        notes.append(
            f"The update has no {last}, so the labels are unknown: they are searched with the "
            "images, which are not refined."
        )
    # What the files' contents stand for is no option.
    options = determining(command, "weights", "gradient", "after", "image")
    sources = [getattr(command, n) for n in ("weights", "gradient", "after", "image", "statistics")]
    digests = [None if path is None else _sha256(path) for path in sources]
    told, inputs = about(argv), {"files": digests, "prior": card["sha256"]}
    update = updates.whole(part, variables["params"])
    config = {**told, "options": options, "inputs": inputs}
    for note in notes:
        say(f"Note: {note}")
    with files.claimed(command.out, config), AuditBar() as bar:
        (found,) = reconstruct(
            keys[0][None],
            public,
            [Shared(update, statistics)],
            view=view,
            client=client,
            search=search,
            speed=command.speed,
            mesh=_devices.mesh(command.shard),
            progress=lambda phase, fraction, loss: bar(phase, 0, 1, fraction, loss),
        )
    content = {
        **searched(found),
        "labels": found.labels.tolist(),
        "shared": list(part),
        "squared_norm": sum(float((leaf.astype(float) ** 2).sum()) for leaf in part.values()),
        "labels_known": known,
        "defense": defense.name,
        "attack": search.attack,
        "scale": scale,
        "notes": notes,
        **told,
    }
    for number, image in enumerate(found.images):
        files.write_png(command.out / f"reconstruction-{number}.png", image)
    _write(command, content)  # whatever becomes of the controls
    if original is not None:
        content["judged"] = _judge(command, found, original, public)
        _write(command, content)
    for line in _lines(command, content, search):
        console.print(line, markup=False)
    say(f"Pictures and numbers: {command.out}/")
    return 0


def _check(command: AttackCommand) -> None:
    """Refuse what is for audits."""
    if command.client.rounds > 1:
        raise GGLError(
            f"rounds: got {command.client.rounds}, allowed: 1, since one update is read; several "
            "of the same images and weights are attacked as their mean, so give that"
        )
    if members(command.search):
        raise GGLError("attack: strongest is for audits and sweeps; choose one attack")
    if command.image is not None and command.client.batch_size > 1:
        raise GGLError("image: judged for one image only; use --batch-size 1, or ggl-jax audit")


def _lines(command: AttackCommand, content: dict[str, Any], search: Search) -> Iterator[str]:
    """What the terminal shows of ``result.json``."""
    scale, scores = content["scale"], content.get("judged")
    if command.loss_scale == "auto":
        yield f"Loss scale: {scale['factor']:.4g}, from {scale['source'] or 'nothing'}."
    yield (
        f"Labels {'inferred' if content['labels_known'] else 'that fit best'}: "
        f"{content['labels']}. Defense as estimated: "
        f"{content['defense_estimated'] or 'no parameters'}."
    )
    distance = f"Distance of updates {content['distance']:.4g}"
    if search.distance == "likelihood" and not content["refined"]:
        yield f"{distance}, minus the logarithm of the likelihood."
    elif search.relative or content["refined"]:
        yield f"{distance}, where an update of zero has 1."
    else:
        norm = content["squared_norm"]
        yield f"{distance} ({search.distance}), where the update's squared norm is {norm:.4g}."
    if scores is None:
        yield "Whether it shows the private image cannot be told without it (--image)."
    else:
        yield (
            f"PSNR {scores['psnr']:.1f} dB; mean image {scores['psnr_mean_image']:.1f}, random "
            f"sample {scores['psnr_control_mean']:.1f}, ceiling {scores['psnr_ceiling']:.1f}."
        )


def _sha256(path: Path) -> str:
    """Of a file, or of a checkpoint's values."""
    return checkpoint.load_card(path)["sha256"] if path.is_dir() else files.sha256(path)


def _read_part(command: AttackCommand, params) -> dict[str, Any]:
    """The tensors that the client shared, without those that are all zero."""
    if (command.gradient is None) == (command.after is None):
        raise GGLError("gradient: give --gradient, or --after with --learning-rate; one of the two")
    if command.gradient is not None:
        part = updates.read_part(command.gradient, params)
    else:
        if command.learning_rate is None:
            raise GGLError("learning_rate: not given; --after needs the client's --learning-rate")
        assert command.after is not None
        after = updates.read_part(command.after, params)
        before = updates.read_part(command.weights, params)
        part = {name: (before[name] - after[name]) / command.learning_rate for name in after}
    # A layer that was frozen: nothing of the image went into it.
    shared = {name: tensor for name, tensor in part.items() if tensor.any()}
    if not shared:
        raise GGLError(
            "gradient: every tensor of the update is zero; give the gradient before it is cleared, "
            "or the weights after a step"
        )
    return shared


def _scaled(command: AttackCommand, key, public, part) -> tuple[dict, dict[str, Any], list[str]]:
    """The update of a loss that was not scaled, what is known of the scale, and what to say."""
    params, total = public.variables["params"], len(trees.names(public.variables["params"]))
    notes = []
    if len(part) < total:
        notes.append(
            f"{len(part)} of the model's {total} tensors were shared; the others are left out of "
            "the distance."
        )
    found = Scale(1.0, "", False)
    if "noise" not in command.defense:  # which turns signs and adds to sizes
        found = read_scale(
            key,
            public,
            updates.whole(part, params),
            client=command.client,
            undefended=command.defense == "none",
            part=frozenset(part),
        )
    if found.negated:
        notes.append(
            "The update looks like minus a gradient (of the last layer's biases, too many classes "
            "lose); an update is (before - after) / learning-rate."
        )
    given = command.loss_scale
    auto, factor = given == "auto", found.factor if given == "auto" else given
    left = found._replace(factor=found.factor / factor)
    if left.is_off:
        notes.append(
            f"By {found.source} the client's loss was multiplied by some {found.factor:.3g}, not "
            f"{factor:g}; see --loss-scale, and --learning-rate of two checkpoints."
        )
    scale = {
        "factor": float(factor),
        "source": found.source if auto else "given",
        "profiled": auto and found.source != "the last layer",
    }
    return {name: tensor / factor for name, tensor in part.items()}, scale, notes


def _write(command: AttackCommand, content: dict) -> None:
    files.write_json(command.out / "result.json", jsonable(content))


def _private_image(command: AttackCommand, prior):
    """The private image [h w c] in [0, 1]."""
    assert command.image is not None
    if not command.image.exists():
        raise GGLError(f"image: {command.image} does not exist; give an image file")
    private = data.load(str(command.image), image_size=prior.image_shape[0], labels=command.label)
    if len(private.images) != 1:
        raise GGLError(f"image: {command.image} holds {len(private.images)} images; give one file")
    return jnp.asarray(private.images[0])


def _judge(command: AttackCommand, found, original, public) -> dict:
    """Scores and controls, as in an audit."""
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
