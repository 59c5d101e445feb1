"""``ggl-jax audit``: reconstruct private images from their defended gradients."""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Literal

from ggl_jax import files
from ggl_jax.commands import _devices
from ggl_jax.commands._shared import (
    AuditBar,
    check_ranges,
    console,
    environment,
    fields_of,
    load_inputs,
)
from ggl_jax.errors import GGLError

#: What each preset sets besides the search. Presets differ in effort, never in what is measured.
PRESETS: dict[str, dict] = {
    "quick": {"indices": "0", "ceiling_steps": 300},
    "standard": {"indices": ":8", "ceiling_steps": 400},
    "paper": {"indices": ":8", "ceiling_steps": 400},
}

_ADAM = {
    **{"optimizer": "adam", "signed": False, "schedule": "ramp", "steps": 60},
    **{"relative": True, "regularizer": "kld:0.00125", "combine": "auto", "refine": "auto"},
    "compare": "support",
}
#: How each preset searches, by attack and, for ggl, by optimiser. Its default search is the one of
#: lowest loss on public images (README). Preset paper is every attack as published.
SEARCHES: dict[str, dict[str, dict]] = {
    "quick": {
        "ggl": {**_ADAM, "pool": 100, "restarts": 4, "steps": 40, "refine_steps": 60},
        "ggl/cma_es": {"steps": 16},
        "ggl/turbo": {"steps": 60},
        "ggl/lbfgs": {"steps": 15, "restarts": 4},
        "ggl/lbfgs_wolfe": {"steps": 15, "restarts": 4},
        "ggl/hybrid": {"steps": 8},
        "dlg": {"steps": 60},
        "idlg": {"steps": 60},
        "ig": {"steps": 200},
        "gi": {"steps": 200},
    },
    "standard": {
        "ggl": {
            **_ADAM,
            **{"pool": 200, "restarts": 8, "finalists": 2, "final_steps": 60},
            "refine_steps": 120,
        },
        "ggl/cma_es": {"steps": 100},
        "ggl/turbo": {"steps": 100},
        "ggl/lbfgs": {"steps": 60, "restarts": 8},
        "ggl/lbfgs_wolfe": {"steps": 60, "restarts": 8},
        "ggl/hybrid": {"steps": 40},
        "dlg": {"steps": 400},
        "idlg": {"steps": 400},
        "ig": {"steps": 1000},
        "gi": {"steps": 1000},
    },
}


@dataclasses.dataclass(frozen=True)
class AuditCommand:
    """Audit defenses: reconstruct private images from their defended gradients.

    A client shares the (defended) gradient of its private image with a federated-learning server.
    This command plays the server: it searches a face generator for the image whose own gradient
    matches what was shared, and reports how near that comes to the private image, beside what
    could have been guessed without any gradient. Results go to a folder as they are found; the same
    command continues an interrupted run.
    """

    preset: Literal["quick", "standard", "paper"] = "quick"
    """How much effort: quick (1 image; minutes on two CPU cores), standard (8 images, a longer
    search) or paper (8 images, each attack as published; meant for a GPU). Options given here as
    well win over the preset's; those that an attack or optimiser other than the default does not
    know are left out of it."""
    config: Path | None = None
    """A config.json of an earlier run: start from all of its options, which others given here
    change; not with --preset, --attack or --optimizer, on which further options depend."""
    data: str = "embedded"
    """Private images: embedded (a portrait that ships with scikit-image), embedded:faces,
    embedded:nonfaces, a .npz file (uint8 images [n h w 3], labels), a folder of images, or
    tfds:NAME[:SPLIT] such as tfds:celeb_a:test."""
    indices: str = "0"
    """Which of them: a number, a list such as 0,3,5, or a range such as 0:8 or :8 (the first 8, or
    all where there are fewer)."""
    label: int | None = None
    """Class label for every image, for data without labels."""
    defenses: tuple[str, ...] = (
        "none",
        "noise:0.1",
        "clip:4",
        "sparsify:0.9",
        "soteria:0.8",
        "clip:4+noise:0.1",
    )
    """Defenses to audit, e.g. none noise:0.1 clip:4 sparsify:0.9 soteria:0.8. Join with + to apply
    one after the other. noise: standard deviation; clip: l2 bound; sparsify and soteria: share
    pruned."""
    model: str = "resnet18"
    """Federated model: resnet18, lenet or convnet, with random weights."""
    batch_norm: Literal["eval", "train"] = "eval"
    """Batch normalisation of the federated model: eval (running statistics, as published) or train
    (each batch's own statistics)."""
    num_classes: int | None = None
    """Classes of the federated model; by default those of a class-conditional prior, else of the
    data."""
    prior: str = "dcgan32_faces"
    """The adversary's generator: the name of one that ships with the tool, or a checkpoint folder
    made by ggl-jax train-prior."""
    batch_size: int = 1
    """Private images in each shared update."""
    local_steps: int = 1
    """Local SGD steps behind each shared update: 1 for a plain gradient, more for FedAvg."""
    local_learning_rate: float = 0.01
    """Step size of the local steps."""
    share_statistics: bool = False
    """Clients also share their batch's mean and variance at every BatchNorm layer, for attacks with
    batch_norm among their penalties."""
    attack: str = "ggl"
    """Attack: ggl (generative gradient leakage), or a baseline on pixels: dlg, idlg, ig (inverting
    gradients), gi (GradInversion). Options below that are not set are as that attack's authors
    published."""
    adaptive: bool | None = None
    """Whether candidates' gradients go through the estimated defense before they are compared
    (published: True for ggl, False for the baselines)."""
    optimizer: str | None = None
    """Search: cma_es and turbo (gradient-free), adam, lbfgs (torch's plain form), lbfgs_wolfe (with
    a line search), or hybrid (cma_es whose candidates are refined by gradient steps)."""
    population: int | None = None
    """Candidates per step of cma_es and hybrid."""
    steps: int | None = None
    """Search steps."""
    restarts: int | None = None
    """Independent searches in one batch; the lowest loss wins."""
    pool: int | None = None
    """Random samples of the prior that are compared first; the best start the searches."""
    start: Literal["zeros", "prior", "uniform", "normal"] | None = None
    """Where searches start without a pool: zeros, a sample of the prior, uniform in [0, 1], or
    normal."""
    bound: Literal["none", "tanh"] | None = None
    """tanh keeps every latent entry within (-1, 1)."""
    learning_rate: float | None = None
    """Step size of adam (default 0.1)."""
    schedule: Literal["step", "ramp"] | None = None
    """Step sizes of adam: step (x 0.1 at 3/8, 5/8, 7/8) or ramp (warm-up and cosine ramp-down)."""
    signed: bool | None = None
    """Whether adam sees only the gradient's sign."""
    sigma0: float | None = None
    """Initial step size of cma_es and hybrid (default 1.0)."""
    compare: Literal["published", "support", "undefended", "likelihood"] = "published"
    """What is compared: published; support (sparsified updates on the entries that were shared);
    undefended (Soteria's layer left out); likelihood (of the estimated noise)."""
    distance: Literal["squared_l2", "cosine"] | None = None
    """Distance between updates."""
    relative: bool | None = None
    """Divide distances by that of an update of zero, so that penalties weigh as much under each
    defense (published: False)."""
    regularizer: str | None = None
    """Penalties on the candidate, as name:weight joined by +, or none. Names: kld, norm,
    gaussian, total_variation, l2, group (consistency of the restarts), batch_norm (distance to the
    shared statistics, or else to the model's running ones)."""
    finalists: int = 0
    """So many of the restarts go on by adam, for final-steps; 0 for none."""
    final_steps: int = 100
    """Adam's steps on the finalists."""
    combine: Literal["best", "mean", "auto"] = "best"
    """What the result is: best (the restart of lowest loss), mean (the mean image of all restarts),
    or auto (mean where noise was added, else best)."""
    refine: Literal["none", "pixels", "auto"] = "none"
    """Go on from the result in pixel space: none, pixels, or auto (pixels, unless the defense adds
    noise, which pixels would fit)."""
    refine_steps: int = 300
    """Steps of the refinement."""
    fidelity: Literal["paper", "code"] = "paper"
    """Where the paper and its published code differ: follow the paper, or the code."""
    method: Literal["auto", "fused", "direct"] = "auto"
    """How matching losses are computed: fused (without each candidate's gradient), direct, or the
    cheaper of the two."""
    precision: Literal["default", "bfloat16", "tensorfloat32", "float32"] | None = None
    """Precision of the search's matrix products on accelerators (default: JAX's own, TF32 on recent
    GPUs). Finalists and refinement then run in float32."""
    chunk_size: int | None = None
    """Candidates evaluated at once; by default as many as memory allows."""
    memory: float | None = None
    """Gigabytes for the candidates that are evaluated at once, in place of that choice."""
    instances: int | None = None
    """Images whose searches run in one batch (default: 8 on a GPU, if they have at most 64x64
    pixels, else 1)."""
    num_controls: int = 400
    """Random samples of the prior that are scored; the mean image averages up to 8 times as many
    (at most 2,048), and the ceiling starts from the nearest of up to 16 times as many (4,096)."""
    ceiling_steps: int = 300
    """Steps of the prior's direct fit to the private image (the ceiling)."""
    suspects: int = 99
    """Other images of the same data, at most, among which the private one is to be told by its
    reconstruction; 0 for none."""
    lpips: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network behind the LPIPS score: vgg (as in the paper), alex or squeeze. Its weights come with
    ggl-jax weights; without them the audit leaves LPIPS out."""
    seed: int = 0
    """Seed of the model's weights, the noise and the search."""
    shard: bool = False
    """Share the work out to all devices of this machine: the images of a batch where there are as
    many as devices (see instances), else each step's candidates."""
    out: Path | None = None
    """Folder for the results; by default ggl-audit-<fingerprint of the options> here."""


def defaults(argv: list[str]) -> AuditCommand:
    """The audit options before the user's own: a preset's, or those of a ``config.json``.

    They are read first, so that ``--help`` shows the values that will really be used.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    finder.add_argument("--attack")
    finder.add_argument("--optimizer")
    finder.add_argument("--adaptive")
    finder.add_argument("--config", type=Path)
    found, _ = finder.parse_known_args(argv)
    if found.config is not None:
        for name in ("preset", "attack", "optimizer"):
            if getattr(found, name) is not None:
                raise GGLError(
                    f"{name}: got {getattr(found, name)!r} beside --config, which has set what "
                    f"depends on it; leave out --config or --{name}"
                )
        return read_config(found.config)
    preset, attack = found.preset if found.preset in PRESETS else "quick", found.attack or "ggl"
    options = {"preset": preset, **PRESETS[preset]}
    if preset == "paper":
        from ggl_jax.adversary.attacks import resolve

        published = resolve(attack, optimizer=found.optimizer)
        known = {field.name for field in dataclasses.fields(AuditCommand)}
        return AuditCommand(**options | {k: v for k, v in published.items() if k in known})
    chosen = attack if found.optimizer is None else f"{attack}/{found.optimizer}"
    search = dict(SEARCHES[preset].get("ggl" if chosen == "ggl/adam" else chosen, {}))
    if found.adaptive == "False":
        search.pop("compare", None)  # there is no simulation that it could change
    return AuditCommand(**options | search)


def read_config(path: Path) -> AuditCommand:
    try:
        options = json.loads(path.read_text())["options"]
        options["defenses"] = tuple(options["defenses"])
        known = {f.name for f in dataclasses.fields(AuditCommand)}
        return AuditCommand(**{k: v for k, v in options.items() if k in known})
    except FileNotFoundError:
        raise GGLError(f"config: {path} does not exist; give a run's config.json") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise GGLError(f"config: {path} is not a config.json of ggl-jax audit") from None


def _options(command: AuditCommand) -> dict:
    """The options that determine the results, as they go into ``config.json``."""
    from ggl_jax.client.defenses import parse

    options = dataclasses.asdict(command)
    for name in ("out", "config", "shard"):
        options.pop(name)
    # By the names that they have in the results, however they were spelled.
    options["defenses"] = [
        parse(spec, fidelity=command.fidelity, compare=command.compare).name
        for spec in command.defenses
    ]
    return options


def run(command: AuditCommand, argv: list[str]) -> int:
    """``ggl-jax audit``."""
    from ggl_jax.adversary.reconstruct import search_for
    from ggl_jax.adversary.strategy import AttackSettings, unused_options
    from ggl_jax.audit import folder as folders
    from ggl_jax.audit import report
    from ggl_jax.audit.cells import image_batches
    from ggl_jax.audit.run import AuditInterrupted, audit
    from ggl_jax.client.defenses import parse
    from ggl_jax.client.share import ClientSettings

    # Cheap checks first: a typing error should cost no work, and leave no folder behind.
    if not command.defenses:
        raise GGLError("defenses: got none; name at least one, e.g. --defenses none clip:4")
    check_ranges(command)
    settings = AttackSettings(**fields_of(AttackSettings, command))
    client = ClientSettings(**fields_of(ClientSettings, command))
    parsed = [
        parse(spec, fidelity=command.fidelity, compare=command.compare) for spec in command.defenses
    ]
    dataset, prior, prior_params, card, model = load_inputs(
        command.data,
        command.prior,
        indices=command.indices,
        label=command.label,
        remedy="add a labels.csv (file,label) or give --label 0",
        model_name=command.model,
        num_classes=command.num_classes,
        batch_norm=command.batch_norm,
    )
    image_batches(len(dataset.images), command.batch_size)
    for defense in parsed:
        search_for(model, prior, defense, client, settings)  # for its errors
    options = _options(command)
    content = files.digest(options, dataset.images, dataset.labels, card["sha256"])
    out = command.out or Path(f"ggl-audit-{content[:8]}")
    shown_command = "ggl-jax " + shlex.join(argv)
    env = environment()
    num = len(dataset.images)
    for line in unused_options(settings):
        console.print(f"Note: {line}", markup=False, soft_wrap=True)
    console.print(
        f"Auditing {len(command.defenses)} defenses on {num} image{'s' * (num != 1)} of "
        f"{command.data}: {model.name}, prior {card['name']}, attack {command.attack}. "
        f"Results: {out}/",
        markup=False,
        soft_wrap=True,
    )
    interrupted = False
    with AuditBar() as bar:
        try:
            result = audit(
                dataset.images,
                dataset.labels,
                model=model,
                prior=prior,
                prior_params=prior_params,
                defenses=list(options["defenses"]),
                names=dataset.names,
                instance_ids=dataset.indices,
                others=_others(command, dataset, prior.image_shape[0]),
                client=client,
                settings=settings,
                num_controls=command.num_controls,
                ceiling_steps=command.ceiling_steps,
                lpips=command.lpips,
                seed=command.seed,
                out=out,
                mesh=_devices.mesh(command.shard),
                progress=bar,
                about={"command": shown_command, "options": options, "environment": env},
            )
        except AuditInterrupted as stop:
            result, interrupted = stop.result, True
    if result.rows:
        found = report.make(folders.read(out))
        path = report.write(found, out)
        console.print(report.terminal(found))
        console.print(
            f"\nWith pictures: {path} (and {path.with_suffix('.md')}); all numbers: "
            f"{out}/results.jsonl",
            markup=False,
            soft_wrap=True,
        )
    for which, reason in result.failures.items():
        console.print(f"failed: {which}: {reason}", markup=False, soft_wrap=True)
    if interrupted:
        console.print(
            f"Interrupted. {len(result.rows)} finished results are kept in {out}/; the same "
            "command goes on from there.",
            markup=False,
        )
        return 130
    return 1 if result.failures else 0


def _others(command: AuditCommand, dataset, size: int):
    """Images [m h w c] of the same data, none of them audited; None where there are none."""
    import numpy as np

    from ggl_jax.audit import data as audit_data

    left = np.setdiff1d(np.arange(dataset.size), dataset.indices)
    chosen = np.random.default_rng(command.seed).permutation(left)[: command.suspects]
    if not len(chosen):
        return None
    return audit_data.load(
        command.data, image_size=size, indices=sorted(chosen.tolist()), labels=command.label
    ).images
