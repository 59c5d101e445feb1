"""The ``ggl-jax`` command line: parses options, shows progress, and prints what was found.

Everything that can go wrong with a user's input ends in one line and exit code 2; Ctrl-C keeps
what is finished and exits with 130.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ggl_jax.commands import weights as weights_command
from ggl_jax.commands import import_prior
from ggl_jax.errors import GGLError

console = Console()

#: What each preset sets besides the search. Presets differ in effort, never in what is measured.
PRESETS: dict[str, dict] = {
    "quick": {"indices": "0", "ceiling_steps": 300},
    "standard": {"indices": "0:8", "ceiling_steps": 400},
    "paper": {"indices": "0:8", "ceiling_steps": 400},
}

_ADAM = {"optimizer": "adam", "signed": False, "schedule": "ramp", "steps": 60}
#: How each preset searches, by attack and, for ggl, by optimiser. Its default search is the one of
#: lowest loss on public images (README); the paper's, CMA-ES as published, is that of its preset.
SEARCHES: dict[str, dict[str, dict]] = {
    "quick": {
        "ggl": {**_ADAM, "pool": 200, "restarts": 4, "refine": "auto", "refine_steps": 100},
        "ggl/cma_es": {"steps": 16},
        "ggl/turbo": {"steps": 60},
        "ggl/lbfgs": {"steps": 15, "restarts": 4},
        "ggl/hybrid": {"steps": 8},
        "dlg": {"steps": 60},
        "idlg": {"steps": 60},
        "ig": {"steps": 200},
        "gi": {"steps": 200},
    },
    "standard": {
        "ggl": {
            **_ADAM,
            **{"pool": 400, "restarts": 8, "finalists": 2, "final_steps": 100},
            **{"refine": "auto", "refine_steps": 200},
        },
        "ggl/cma_es": {"steps": 100},
        "ggl/turbo": {"steps": 100},
        "ggl/lbfgs": {"steps": 60, "restarts": 8},
        "ggl/hybrid": {"steps": 40},
        "ig": {"steps": 1000},
        "gi": {"steps": 1000},
    },
    "paper": {
        "ggl": {"optimizer": "cma_es", "population": 50, "steps": 800},
        "ggl/cma_es": {"population": 50, "steps": 800},
        "ggl/turbo": {"steps": 100},
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
    """A config.json of an earlier run: start from all of its options."""
    data: str = "embedded"
    """Private images: embedded (a portrait that ships with scikit-image), embedded:faces,
    embedded:nonfaces, a .npz file (uint8 images [n h w 3], labels), a folder of images, or
    tfds:NAME[:SPLIT] such as tfds:celeb_a:test."""
    indices: str = "0"
    """Which of them: a number, a list such as 0,3,5, or a range such as 0:8."""
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
    """Classes of the federated model; by default those of the data."""
    prior: str = "dcgan32_faces"
    """The adversary's generator: the name of one that ships with the tool, or a checkpoint folder
    made by ggl-jax train-prior."""
    batch_size: int = 1
    """Private images in each shared update."""
    local_steps: int = 1
    """Local SGD steps behind each shared update: 1 for a plain gradient, more for FedAvg."""
    local_learning_rate: float = 0.01
    """Step size of the local steps."""
    attack: str = "ggl"
    """Attack: ggl (generative gradient leakage), or a baseline on pixels: dlg, idlg, ig (inverting
    gradients), gi (GradInversion). Options below that are not set are as that attack's authors
    published."""
    adaptive: bool | None = None
    """Whether candidates' gradients go through the estimated defense before they are compared
    (published: True for ggl, False for the baselines)."""
    optimizer: str | None = None
    """Search: cma_es and turbo (gradient-free), adam, lbfgs, or hybrid (cma_es whose candidates are
    refined by gradient steps)."""
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
    regularizer: str | None = None
    """Penalties on the candidate, as name:weight joined by +, or none. Names: kld, norm,
    gaussian, total_variation, l2, group (consistency of the restarts)."""
    finalists: int = 0
    """So many of the restarts go on by adam, for final-steps; 0 for none."""
    final_steps: int = 100
    """Adam's steps on the finalists."""
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
    """Precision of matrix products on accelerators (default: JAX's own, TF32 on recent GPUs)."""
    chunk_size: int | None = None
    """Candidates evaluated at once; by default as many as memory allows."""
    instances: int | None = None
    """Images whose searches run in one batch (default: 1 on a CPU, 8 on a GPU)."""
    num_controls: int = 400
    """Random samples of the prior for the controls."""
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
    out: Path | None = None
    """Folder for the results; by default ggl-audit-<fingerprint of the options> here."""


@dataclasses.dataclass(frozen=True)
class TrainPriorCommand:
    """Train a face generator (DCGAN with WGAN-GP) on your own public images.

    Writes checkpoints, loss curves and sample grids as it goes; Ctrl-C saves, and the same command
    goes on from there.
    """

    data: tuple[str, ...]
    """Training files: .npz with uint8 images [n 32 32 3]. FILE*2 is drawn twice as often."""
    out: Path = Path("prior")
    """Folder for checkpoints, losses.csv, losses.png and sample grids."""
    trained_on: tuple[str, ...] = ()
    """Names of the data sets behind the files, such as celeba lfw: an audit refuses private images
    from them."""
    licence_note: str = "see the licences of the training data"
    """What the card says about using the weights."""
    width: int = 64
    """Channels before the generator's last layer (the paper: 128)."""
    latent_dim: int = 128
    """Size of the latent vector."""
    steps: int = 20_000
    """Generator updates."""
    critic_steps: int = 5
    """Critic updates for each generator update."""
    batch_size: int = 64
    """Images per update."""
    learning_rate: float = 1e-4
    """Step size of both Adams."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""
    ema_decay: float = 0.999
    """Decay of the average of the generator's weights that is exported."""
    holdout: int = 256
    """Images of the first file to keep out of training."""
    flips: bool = True
    """Mirror images at random."""
    seed: int = 0
    """Seed of weights, batches and held-out images."""
    export: Path | None = None
    """Write the trained prior (weights and card) to this folder when done, for --prior."""


@dataclasses.dataclass(frozen=True)
class SamplePriorCommand:
    """Draw a grid of random samples from a prior, to see what it believes images look like."""

    prior: str = "dcgan32_faces"
    """Name of a shipped prior, or a checkpoint folder."""
    num: int = 64
    """Number of samples."""
    seed: int = 0
    """Seed of the samples."""
    out: Path = Path("samples.png")
    """The PNG to write."""


@dataclasses.dataclass(frozen=True)
class ScorePriorCommand:
    """Measure how near a prior can come to images: its ceiling, mean image and random samples.

    No gradient is involved. An audit that uses this prior cannot be expected to score above its
    ceiling.
    """

    data: str
    """Images, as for ggl-jax audit."""
    prior: str = "dcgan32_faces"
    """Name of a shipped prior, or a checkpoint folder."""
    indices: str = "held-out"
    """Which images: as for audit, or held-out for those that were kept out of the prior's training
    (--data must then be its first training file)."""
    restarts: int = 4
    """Starting points of each fit."""
    steps: int = 400
    """Steps of each fit."""
    seed: int = 0
    """Seed of the starting points and samples."""


@dataclasses.dataclass(frozen=True)
class InfoCommand:
    """Show versions, devices, and the data and weights that were found."""


def _preset_defaults(argv: list[str]) -> AuditCommand:
    """The audit options before the user's own: a preset's, or those of a ``config.json``.

    They are read first, so that ``--help`` shows the values that will really be used.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    finder.add_argument("--attack", default="ggl")
    finder.add_argument("--optimizer")
    finder.add_argument("--config", type=Path)
    found, _ = finder.parse_known_args(argv)
    if found.config is not None:
        return _read_config(found.config)
    preset = found.preset if found.preset in PRESETS else "quick"
    chosen = found.attack if found.optimizer is None else f"{found.attack}/{found.optimizer}"
    if chosen == "ggl/adam" and preset != "paper":
        chosen = "ggl"
    search = SEARCHES[preset].get(chosen, {})
    return AuditCommand(**{"preset": preset, **PRESETS[preset], **search})


def _read_config(path: Path) -> AuditCommand:
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
    options = dataclasses.asdict(command)
    for name in ("out", "config"):
        options.pop(name)
    options["defenses"] = list(command.defenses)
    return options


def _fingerprint(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        )
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Versions and hardware that numbers depend on."""
    import importlib.metadata as metadata

    import jax

    packages = ("ggl-jax", "jax", "jaxlib", "flax", "optax", "evosax", "orbax-checkpoint", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = jax.devices()
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _check_config(out: Path, config: dict) -> None:
    """Refuse a folder that holds another configuration; name what differs."""
    path = out / "config.json"
    if path.exists():
        try:
            old = json.loads(path.read_text())
            same = {k: (old["options"].get(k), v) for k, v in config["options"].items()}
            changed = [f"{k} ({a!r} there, {b!r} here)" for k, (a, b) in same.items() if a != b]
            if old["inputs"] != config["inputs"]:
                changed.append("the private images or the prior's weights")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise GGLError(f"out: {path} is damaged; choose another --out") from None
        if changed:
            raise GGLError(
                f"out: {out} holds an audit with other options: {', '.join(changed)}; choose "
                "another --out or remove the folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GGLError(
            f"out: {out} is not an empty folder and not an earlier audit; choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(path)


class _Bar:
    """Live progress on a terminal; one line per cell and phase change elsewhere."""

    def __init__(self, evaluations_note: str):
        self.live = console.is_terminal
        self.note = evaluations_note
        self.last = ""
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )

    def __enter__(self):
        self.bar.__enter__()
        self.task = self.bar.add_task("starting", total=1.0, shown="")
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def __call__(self, phase, number, total, fraction, loss):
        text = f"[{number + 1}/{total}] {phase}"
        shown = "" if loss is None else f"loss {loss:.4g}"
        if self.live:
            self.bar.update(
                self.task, description=text, completed=number + fraction, total=total, shown=shown
            )
        elif text != self.last:
            console.print(f"{time.perf_counter() - self.began:7.1f} s  {text}", markup=False)
        self.last = text


def run_audit(command: AuditCommand, argv: list[str]) -> int:
    """``ggl-jax audit``."""
    import numpy as np

    from ggl_jax.adversary.strategy import AttackSettings
    from ggl_jax.audit import data as audit_data
    from ggl_jax.audit import figure, report
    from ggl_jax.audit.runner import AuditInterrupted, ClientSettings, audit
    from ggl_jax.client.defenses import parse
    from ggl_jax.client.models import get_model
    from ggl_jax.priors import load_prior

    # Cheap checks first: a typing error should not cost a minute of work.
    for spec in command.defenses:
        parse(spec, fidelity=command.fidelity)
    prior, prior_params, card = load_prior(command.prior)
    size = prior.image_shape[0]
    dataset = audit_data.load(
        command.data, image_size=size, indices=command.indices, labels=command.label
    )
    audit_data.check_prior_overlap(dataset, card, allow_held_out=True)
    if dataset.labels is None:
        raise GGLError(
            f"data: {command.data} has no labels; add a labels.csv (file,label) or give --label 0"
        )
    num_classes = command.num_classes or max(
        2, dataset.num_classes or 0, int(np.max(dataset.labels)) + 1
    )
    options = {"batch_norm": command.batch_norm} if command.model != "lenet" else {}
    model = get_model(
        command.model, num_classes=num_classes, image_shape=prior.image_shape, **options
    )
    options = _options(command)
    inputs = {
        "images": _fingerprint(dataset.images.tobytes(), np.asarray(dataset.labels).tobytes()),
        "prior": card["sha256"],
    }
    out = command.out or Path(f"ggl-audit-{_fingerprint(options, inputs)[:8]}")
    shown_command = "ggl-jax " + shlex.join(argv)
    env = environment()
    _check_config(
        out, {"command": shown_command, "options": options, "inputs": inputs, "environment": env}
    )
    settings = AttackSettings(
        **{f.name: getattr(command, f.name) for f in dataclasses.fields(AttackSettings)}
    )
    client = ClientSettings(command.batch_size, command.local_steps, command.local_learning_rate)
    num = len(dataset.images)
    console.print(
        f"Auditing {len(command.defenses)} defenses on {num} image{'s' * (num != 1)} of "
        f"{command.data}: {model.name}, prior {card['name']}, attack {command.attack}. "
        f"Results: {out}/",
        markup=False,
        soft_wrap=True,
    )
    interrupted = False
    with _Bar("") as bar:
        try:
            result = audit(
                dataset.images,
                dataset.labels,
                model=model,
                prior=prior,
                prior_params=prior_params,
                defenses=command.defenses,
                names=dataset.names,
                instance_ids=dataset.indices,
                others=_others(command, dataset, size),
                client=client,
                settings=settings,
                num_controls=command.num_controls,
                ceiling_steps=command.ceiling_steps,
                lpips=command.lpips,
                seed=command.seed,
                out=out,
                progress=bar,
            )
        except AuditInterrupted as stop:
            result, interrupted = stop.result, True
    if result.rows:
        summaries = report.summarize(result.rows)
        title = f"{model.name}, prior {card['name']}, {command.attack}, seed {command.seed}"
        figure.draw(result, out / "figure.png", title=title)
        date = datetime.date.today().isoformat()
        where = f"{date}; {env['device']}; {env['cpu']}; jax {env['jax']}; {num} images"
        _write(
            out / "summary.md",
            report.markdown(summaries, command=shown_command, environment=where),
        )
        for table in report.terminal_tables(summaries):
            console.print(table)
        console.print(report.LEGEND, style="dim")
        console.print()
        for sentence in report.in_words(summaries):
            console.print(sentence, markup=False)
        console.print(
            f"\nPictures: {out}/figure.png; all numbers: {out}/results.jsonl",
            markup=False,
            soft_wrap=True,
        )
    if interrupted:
        console.print(
            f"Interrupted. {len(result.rows)} finished results are kept in {out}/; the same "
            "command goes on from there.",
            markup=False,
        )
        return 130
    return 0


def _others(command: AuditCommand, dataset, size: int):
    """Images [m h w c] of the same data, none of them audited; None where there are none."""
    import numpy as np

    from ggl_jax.audit import data as audit_data

    if command.suspects < 0:
        raise GGLError(f"suspects: got {command.suspects}, allowed: whole numbers of at least 0")
    left = np.setdiff1d(np.arange(dataset.size), dataset.indices)
    chosen = np.random.default_rng(command.seed).permutation(left)[: command.suspects]
    if not len(chosen):
        return None
    return audit_data.load(
        command.data, image_size=size, indices=sorted(chosen.tolist()), labels=command.label
    ).images


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


def run_train_prior(command: TrainPriorCommand, argv: list[str]) -> int:
    """``ggl-jax train-prior``."""
    from ggl_jax.priors import wgan_gp

    names = {f.name for f in dataclasses.fields(wgan_gp.Config)}
    config = wgan_gp.Config(**{n: getattr(command, n) for n in names if hasattr(command, n)})
    files = []
    for entry in command.data:
        path, _, weight = entry.partition("*")
        try:
            files.append((path, float(weight or 1)))
        except ValueError:
            raise GGLError(f"data: {entry!r}: the weight after * must be a number") from None
    wgan_gp.train(config, files, command.out)
    if command.export is not None:
        wgan_gp.export(
            command.out,
            command.export,
            trained_on=command.trained_on,
            licence_note=command.licence_note,
            command="ggl-jax " + shlex.join(argv),
        )
        console.print(f"Exported to {command.export}; use it with --prior {command.export}")
    return 0


def run_sample_prior(command: SamplePriorCommand, argv: list[str]) -> int:
    """``ggl-jax sample-prior``."""
    del argv
    import jax

    from ggl_jax.priors import load_prior, samples

    prior, params, card = load_prior(command.prior)
    samples(prior, params, jax.random.key(command.seed), command.num, path=command.out)
    console.print(f"{command.num} samples of {card['name']} are in {command.out}", markup=False)
    return 0


def run_score_prior(command: ScorePriorCommand, argv: list[str]) -> int:
    """``ggl-jax score-prior``."""
    del argv
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ggl_jax.audit import metrics
    from ggl_jax.audit.data import load
    from ggl_jax.priors import fit_latents, load_prior, samples
    from ggl_jax.priors.wgan_gp import held_out_indices

    prior, params, card = load_prior(command.prior)
    size = prior.image_shape[0]
    if command.indices == "held-out":
        indices = held_out_indices(card, Path(command.data))
        dataset = load(command.data, image_size=size, indices=indices)
    else:
        dataset = load(command.data, image_size=size, indices=command.indices)
    images = jnp.asarray(dataset.images)
    key_fit, key_samples = jax.random.split(jax.random.key(command.seed))
    drawn = samples(prior, params, key_samples, 2048)
    mean_image = drawn.mean(axis=0)
    ceilings = []
    part = 64  # bounds memory; all parts but the last have one shape
    for first in range(0, len(images), part):
        _, _, psnr = fit_latents(
            prior,
            params,
            images[first : first + part],
            jax.random.fold_in(key_fit, first),
            restarts=command.restarts,
            steps=command.steps,
        )
        ceilings.extend(np.asarray(psnr).tolist())
        console.print(f"{len(ceilings)} of {len(images)} images fitted", markup=False)
    scores = {
        "ceiling": ceilings,
        "mean image": [float(metrics.psnr(mean_image, image)) for image in images],
        "random sample": [
            float(jnp.mean(metrics.psnr(drawn[:64], image[None]))) for image in images
        ],
    }
    for name, values in scores.items():
        low, high = metrics.confidence_interval(values)
        console.print(
            f"{name}: {np.mean(values):.2f} dB PSNR, 95 % interval [{low:.2f}, {high:.2f}], lowest "
            f"{min(values):.2f}, {len(values)} images",
            markup=False,
        )
    return 0


def run_info(command: InfoCommand, argv: list[str]) -> int:
    """``ggl-jax info``."""
    del command, argv
    from rich.table import Table

    from ggl_jax.audit import weights
    from ggl_jax.audit.data import load
    from ggl_jax.checkpoint import load_card, shipped

    table = Table("", "", show_header=False)
    for name, value in environment().items():
        table.add_row(name, value)
    for name, folder in shipped().items():
        card = load_card(folder)
        trained = ", ".join(card.get("trained_on", ())) or "unknown data"
        table.add_row(f"prior {name}", f"{folder} (trained on {trained})")
    for name in weights.SOURCES:
        there = weights.installed().get(name)
        table.add_row(f"metric {name}", str(there or f"absent; get it: ggl-jax weights {name}"))
    for name in ("embedded", "embedded:faces", "embedded:nonfaces"):
        table.add_row(f"data {name}", f"{load(name, max_images=1).size} images")
    folder = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    prepared = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    table.add_row("data tfds", f"{folder}: {', '.join(prepared) or 'nothing prepared'}")
    console.print(table)
    return 0


COMMANDS: dict[type, Callable[..., int]] = {
    AuditCommand: run_audit,
    TrainPriorCommand: run_train_prior,
    SamplePriorCommand: run_sample_prior,
    ScorePriorCommand: run_score_prior,
    weights_command.WeightsCommand: weights_command.run,
    import_prior.ImportPriorCommand: import_prior.run,
    InfoCommand: run_info,
}


def _parse(argv: list[str]):
    defaults = _preset_defaults(argv[1:]) if argv[:1] == ["audit"] else AuditCommand()
    # A subcommand's default is given to tyro so that --help shows what the preset sets.
    commands = (
        Annotated[AuditCommand, tyro.conf.subcommand("audit", default=defaults)]
        | Annotated[TrainPriorCommand, tyro.conf.subcommand("train-prior")]
        | Annotated[SamplePriorCommand, tyro.conf.subcommand("sample-prior")]
        | Annotated[ScorePriorCommand, tyro.conf.subcommand("score-prior")]
        | Annotated[weights_command.WeightsCommand, tyro.conf.subcommand("weights")]
        | Annotated[import_prior.ImportPriorCommand, tyro.conf.subcommand("import-prior")]
        | Annotated[InfoCommand, tyro.conf.subcommand("info")]
    )
    return tyro.cli(
        commands,
        prog="ggl-jax",
        args=argv,
        description="Audit privacy defenses in federated learning: what does a defended gradient "
        "still leak about the image behind it? Start with: ggl-jax audit",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that later runs start at once."""
    import jax
    import platformdirs

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # CPU programs hold instructions of the very processor they were compiled on.
    machine = _fingerprint(_cpu_name().encode(), jax.__version__.encode())[:8]
    jax.config.update(
        "jax_compilation_cache_dir",
        str(Path(platformdirs.user_cache_dir("ggl_jax")) / f"xla-{machine}"),
    )


def run(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None for the process's own.

    Returns:
        The exit code: 0 done, 2 unusable input (one line on stderr), 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    errors = Console(stderr=True)
    try:
        command = _parse(argv)
        _use_compilation_cache()
        return COMMANDS[type(command)](command, argv)
    except GGLError as error:
        errors.print(f"ggl-jax: {error}", markup=False, soft_wrap=True, highlight=False)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        errors.print(
            f"ggl-jax: cannot read or write{where}: {error.strerror or error}",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )
        return 2
    except KeyboardInterrupt:
        errors.print("ggl-jax: interrupted", markup=False)
        return 130
