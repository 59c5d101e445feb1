"""WGAN-GP training of the DCGAN prior: resumable, watchable, reproducible from its `Config`.

Loss: the critic maximises `E[f(real)] - E[f(fake)] - penalty * E[(|df/dx| - 1)^2]` with x drawn
uniformly on the line between a real and a fake image; the generator maximises `E[f(fake)]`
(Gulrajani et al., "Improved Training of Wasserstein GANs", 2017). The exported weights are an
exponential moving average over the generator's training steps.
"""

import csv
import datetime
import hashlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from ggl_jax import checkpoint, files
from ggl_jax.errors import GGLError
from ggl_jax.images import from_signed, to_signed
from ggl_jax.priors.dcgan import IMAGE_SHAPE, Critic, Generator, dcgan
from ggl_jax.priors.samples import samples, save_grid


@dataclass(frozen=True)
class Config:
    """Everything that, with the data, determines a training run.

    The paper trains with width 128, learning rate 1e-4, 5 critic steps, for 100 epochs.

    Attributes:
      width: channels before the generator's last layer and after the critic's first, >= 1.
      latent_dim: size of the latent, >= 1.
      batch_size: images per critic and generator step, >= 2.
      critic_steps: critic updates per generator update, >= 1.
      penalty: weight of the gradient penalty, >= 0.
      learning_rate: of both Adams, > 0.
      beta1, beta2: their decay rates, in [0, 1).
      ema_decay: decay of the average of the generator's weights, in [0, 1); early in training it
        is lowered to (1 + step) / (10 + step), so that the random start is forgotten.
      steps: generator updates. The only field that may change when a run is resumed.
      seed: of the weights, the batches and the held-out images.
      holdout: images of the first data file kept out of training (see `holdout_split`), >= 0.
      flips: whether each real image is mirrored with probability 1/2.
      num_classes: of a class-conditional prior, >= 1: generator and critic then see the labels,
        and real and fake images of a batch have the same ones. None for an unconditional prior.
    """

    width: int = 64
    latent_dim: int = 128
    batch_size: int = 64
    critic_steps: int = 5
    penalty: float = 10.0
    learning_rate: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.999
    ema_decay: float = 0.999
    steps: int = 20_000
    seed: int = 0
    holdout: int = 256
    flips: bool = True
    num_classes: int | None = None

    def __post_init__(self):
        limits = {
            "width": (1, None), "latent_dim": (1, None), "batch_size": (2, None),
            "critic_steps": (1, None), "penalty": (0, None), "beta1": (0, 1), "beta2": (0, 1),
            "ema_decay": (0, 1), "steps": (0, None), "seed": (0, None), "holdout": (0, None),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not value >= low or (high is not None and value >= high):
                upper = "" if high is None else f" and below {high}"
                raise GGLError(f"train-prior: {name}={value} must be at least {low}{upper}")
        if self.num_classes is not None and self.num_classes < 1:
            raise GGLError(f"train-prior: num_classes={self.num_classes} must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise GGLError(f"train-prior: learning_rate={self.learning_rate} must be above 0")


class TrainState(NamedTuple):
    """The whole state of a run; with `Config` and the data it determines every later step."""

    step: jax.Array  # int32 [], generator updates done
    generator: Any
    critic: Any
    generator_optimizer: optax.OptState
    critic_optimizer: optax.OptState
    ema: Any  # averaged generator weights


class Metrics(NamedTuple):
    """Float32 scalars of one iteration; the first two are means over its critic steps."""

    wasserstein: jax.Array  # E[f(real)] - E[f(fake)], the critic's estimate of the distance
    penalty: jax.Array  # E[(|df/dx| - 1)^2], unweighted
    generator_loss: jax.Array  # -E[f(fake)]


class Dataset(NamedTuple):
    """Training images in memory and how often each is drawn."""

    images: np.ndarray  # uint8 [n 32 32 3]
    cumulative: np.ndarray  # float32 [n], cumulative probability of drawing each image
    sources: list[dict]  # per file: file, weight, num_images, num_held_out, sha256
    labels: np.ndarray | None = None  # int32 [n], for a class-conditional prior


# --- data -------------------------------------------------------------------------------------


def holdout_split(num: int, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(num) into indices to train on and indices to hold out.

    The held-out ones are the first `holdout` of a permutation that depends on `seed` alone
    (numpy's PCG64), so whoever knows the three numbers gets the same images.

    Args:
      num: number of images in the file.
      holdout: how many to hold out, in [0, num].
      seed: the run's seed.

    Returns:
      `(train_indices, holdout_indices)`, both int64; the first sorted, the second in the
      permutation's order.

    Raises:
      GGLError: `holdout` outside [0, num].
    """
    if not 0 <= holdout <= num:
        raise GGLError(f"holdout={holdout} must lie in [0, {num}], the file's number of images")
    order = np.random.default_rng(seed).permutation(num)
    return np.sort(order[holdout:]), order[:holdout]


def held_out_indices(card: dict[str, Any], path: Path) -> list[int]:
    """Indices of the images in a prior's first training file that it was not trained on.

    Args:
      card: the prior's card.
      path: the file, which must be the very one that the card names (by its sha256).

    Raises:
      GGLError: the file is missing or another one, or the card names no held-out images.
    """
    try:
        first, seed = card["data"][0], card["config"]["seed"]
        if hashlib.sha256(path.read_bytes()).hexdigest() != first["sha256"]:
            raise GGLError(
                f"indices: held-out needs the prior's first training file, {first['file']} with "
                f"sha256 {first['sha256'][:12]}..., but {path} is another; give --indices numbers"
            )
        held_out = holdout_split(first["num_images"], first["num_held_out"], seed)[1]
    except FileNotFoundError:
        raise GGLError(f"data: {path} does not exist") from None
    except (KeyError, IndexError, TypeError):
        raise GGLError("indices: the prior's card names no held-out images") from None
    return held_out.tolist()


def read_images(path) -> np.ndarray:
    """Reads `images` (uint8 [n 32 32 3]) from an .npz file.

    Raises:
      GGLError: missing or corrupt file, no such key, wrong dtype or shape, no images.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "images" not in archive:
                raise GGLError(f"{path} has no array `images`; it holds {sorted(archive)}")
            images = archive["images"]
    except FileNotFoundError:
        raise GGLError(f"training data {path} does not exist") from None
    except GGLError:
        raise
    except Exception as error:  # zip, zlib and numpy each have their own
        raise GGLError(f"training data {path} is not a readable .npz file: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise GGLError(
            f"training data {path}: `images` is {images.dtype} {list(images.shape)}, "
            "must be uint8 [n, 32, 32, 3]"
        )
    if not len(images):
        raise GGLError(f"training data {path} holds no images")
    return images


def read_labels(path, num: int) -> np.ndarray:
    """Reads `labels` (whole numbers [num], at least 0) from an .npz file, as int32.

    Raises:
      GGLError: no such key, another shape or type, or a negative label.
    """
    with np.load(path, allow_pickle=False) as archive:
        if "labels" not in archive:
            raise GGLError(
                f"{path} has no array `labels`, which a class-conditional prior needs; add int "
                f"[{num}], or train without --conditional"
            )
        labels = archive["labels"]
    whole = np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.shape != (num,) or labels.min() < 0:
        raise GGLError(
            f"training data {path}: `labels` is {labels.dtype} {list(labels.shape)}, must be whole "
            f"numbers [{num}] of at least 0"
        )
    return labels.astype(np.int32)


def count_classes(data: Sequence) -> int:
    """One more than the largest label in the files, given as for `load_data`.

    Raises:
      GGLError: a bad file, see `read_images` and `read_labels`.
    """
    paths = [item if isinstance(item, str | os.PathLike) else item[0] for item in data]
    return 1 + max(
        (int(read_labels(path, len(read_images(path))).max()) for path in paths), default=0
    )


def load_data(data: Sequence, config: Config) -> Dataset:
    """Loads the training images: every file's, less the held-out ones of the first.

    Args:
      data: paths of .npz files, or `(path, weight)`; an image of a file of weight 2 is drawn
        twice as often as one of weight 1. A file given twice counts twice; its held-out images
        stay out each time.
      config: gives `holdout`, `seed` and `num_classes`; with classes, labels are read too.

    Raises:
      GGLError: no file, a bad file (see `read_images` and `read_labels`), a weight that is not
        above 0, a label beyond the classes, or no image left to train on.
    """
    if not data:
        raise GGLError("train-prior: data is empty; give at least one .npz file with `images`")
    pairs = [(item, 1.0) if isinstance(item, str | os.PathLike) else item for item in data]
    parts, weights, sources = [], [], []
    label_parts: list[np.ndarray] = []
    held_out_path = Path(pairs[0][0]).resolve()
    for path, weight in pairs:
        if not 0 < weight < float("inf"):
            raise GGLError(f"train-prior: weight {weight} of {path} must be above 0")
        images = read_images(path)
        num_images = len(images)
        kept = np.arange(num_images)
        if Path(path).resolve() == held_out_path:
            kept = holdout_split(num_images, config.holdout, config.seed)[0]
        images = images[kept]
        if config.num_classes is not None:
            labels = read_labels(path, num_images)
            if labels.max() >= config.num_classes:
                raise GGLError(
                    f"training data {path}: label {labels.max()} is beyond num_classes="
                    f"{config.num_classes}"
                )
            label_parts.append(labels[kept])
        parts.append(images)
        weights.append(np.full(len(images), weight, np.float64))
        sources.append(
            {
                "file": Path(path).name,
                "weight": float(weight),
                "num_images": num_images,
                "num_held_out": num_images - len(images),
                "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            }
        )
    images, weight = np.concatenate(parts), np.concatenate(weights)
    if not len(images):
        raise GGLError(f"train-prior: holdout={config.holdout} leaves no image to train on")
    cumulative = np.cumsum(weight) / weight.sum()
    all_labels = np.concatenate(label_parts) if label_parts else None
    return Dataset(images, cumulative.astype(np.float32), sources, all_labels)


def _draw_indices(key, cumulative, num: int) -> jax.Array:
    """Which images a batch has: int [num]."""
    uniform = jax.random.uniform(jax.random.split(key)[0], (num,))
    # min: rounding may leave the last cumulative probability below a draw
    return jnp.minimum(jnp.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1)


def draw_labels(key, labels, cumulative, *, num: int) -> jax.Array | None:
    """The labels [num] of the images that `draw_batch` draws with this key; None without any."""
    return None if labels is None else labels[_draw_indices(key, cumulative, num)]


def draw_batch(key, images, cumulative, *, num: int, flips: bool) -> jax.Array:
    """Draws images with replacement: uint8 [n 32 32 3] -> float32 [num 32 32 3] in [-1, 1]."""
    batch = to_signed(images[_draw_indices(key, cumulative, num)].astype(jnp.float32) / 255.0)
    if flips:
        flip_key = jax.random.split(key)[1]
        mirrored = jax.random.bernoulli(flip_key, 0.5, (num, 1, 1, 1))
        batch = jnp.where(mirrored, batch[:, :, ::-1], batch)
    return batch


# --- one iteration ----------------------------------------------------------------------------


def gradient_penalty(score: Callable, real, fake, mix) -> jax.Array:
    """Mean of (|d score/dx| - 1)^2 at x = real + mix * (fake - real).

    Args:
      score: images [b h w c] -> scores [b]; each score may depend on its own image only.
      real, fake: [b h w c].
      mix: [b 1 1 1], in [0, 1].

    Returns:
      A scalar. Where the gradient is exactly zero the norm is taken as 1e-6, so that its own
      derivative is finite.
    """
    gradient = jax.grad(lambda x: score(x).sum())(real + mix * (fake - real))
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=(1, 2, 3)) + 1e-12)
    return jnp.mean((norm - 1.0) ** 2)


def _architecture(config: Config) -> Config:
    """The config less what compiled programs do not depend on, so that they are compiled once."""
    return replace(config, steps=0, holdout=0)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate, b1=config.beta1, b2=config.beta2)


def _generator(config: Config, **options) -> Generator:
    return Generator(config.width, config.latent_dim, num_classes=config.num_classes, **options)


def _all_classes(config: Config, num: int) -> jax.Array | None:
    """Labels [num], evenly spread over the classes in rising order; None without classes."""
    return None if config.num_classes is None else jnp.arange(num) * config.num_classes // num


def _fake(config: Config, params, latents, labels=None) -> jax.Array:
    """Images of the generator in training mode: batch norm by the statistics of this batch.

    Running statistics are not kept during training: `standing_statistics` makes exact ones for
    whichever weights are used.
    """
    images, _ = _generator(config).apply(
        {"params": params}, latents, labels, train=True, mutable=["batch_stats"]
    )
    return images


def init_state(config: Config) -> TrainState:
    """The state before the first step."""
    return _init_state(_architecture(config))


@partial(jax.jit, static_argnames=("config",))
def _init_state(config: Config) -> TrainState:
    generator_key, critic_key = jax.random.split(jax.random.key(config.seed))
    latents = jnp.zeros((1, config.latent_dim))
    label = jnp.zeros((1,), jnp.int32)
    generator = _generator(config).init(generator_key, latents, label)["params"]
    critic_net = Critic(config.width, config.num_classes)
    critic = critic_net.init(critic_key, jnp.zeros((1, *IMAGE_SHAPE)), label)["params"]
    optimizer = _optimizer(config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=generator,
        critic=critic,
        generator_optimizer=optimizer.init(generator),
        critic_optimizer=optimizer.init(critic),
        ema=jax.tree.map(jnp.copy, generator),
    )


def train_step(config: Config, state: TrainState, images, cumulative, labels=None):
    """One generator update after `config.critic_steps` critic updates.

    Pure; its randomness is a function of the seed and the step alone, so a resumed run draws
    what the uninterrupted one would. The critic steps are unrolled: inside a `lax.scan` XLA's
    CPU backend would run them on one thread.

    Args:
      config: static.
      state: the state.
      images: uint8 [n 32 32 3].
      cumulative: float32 [n], as in `Dataset`.
      labels: int32 [n], where the config has classes.

    Returns:
      `(state, Metrics)`.
    """
    optimizer = _optimizer(config)
    critic_net = Critic(config.width, config.num_classes)
    # folded away from init_state's use of the same seed
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.step)
    keys = jax.random.split(key, config.critic_steps + 1)
    num = config.batch_size

    def critic_loss(params, real, fake, mix, classes):
        def score(x, classes=classes):
            return critic_net.apply({"params": params}, x, classes)

        twice = None if classes is None else jnp.concatenate([classes, classes])
        scores = score(jnp.concatenate([real, fake]), twice)
        distance = scores[:num].mean() - scores[num:].mean()
        penalty = gradient_penalty(score, real, fake, mix)
        return config.penalty * penalty - distance, (distance, penalty)

    def generator_loss(params, critic, latents, classes):
        fake = _fake(config, params, latents, classes)
        scores = critic_net.apply({"params": critic}, fake, classes)
        return -jnp.mean(cast(jax.Array, scores))

    critic, critic_optimizer = state.critic, state.critic_optimizer
    logged = []
    for step_key in keys[:-1]:
        data_key, latent_key, mix_key = jax.random.split(step_key, 3)
        real = draw_batch(data_key, images, cumulative, num=num, flips=config.flips)
        latents = jax.random.normal(latent_key, (num, config.latent_dim))
        # fakes of the same classes, so that an image between the two has a class
        classes = draw_labels(data_key, labels, cumulative, num=num)
        fake = _fake(config, state.generator, latents, classes)
        mix = jax.random.uniform(mix_key, (num, 1, 1, 1))
        gradients, aux = jax.grad(critic_loss, has_aux=True)(critic, real, fake, mix, classes)
        updates, critic_optimizer = optimizer.update(gradients, critic_optimizer)
        critic = optax.apply_updates(critic, updates)
        logged.append(aux)

    latents = jax.random.normal(keys[-1], (num, config.latent_dim))
    classes = draw_labels(jax.random.fold_in(keys[-1], 1), labels, cumulative, num=num)
    loss, gradients = jax.value_and_grad(generator_loss)(state.generator, critic, latents, classes)
    updates, generator_optimizer = optimizer.update(gradients, state.generator_optimizer)
    generator = optax.apply_updates(state.generator, updates)

    decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = optax.incremental_update(generator, state.ema, 1.0 - decay)
    distance, penalty = (jnp.stack(values).mean() for values in zip(*logged, strict=True))
    state = TrainState(
        state.step + 1, generator, critic, generator_optimizer, critic_optimizer, ema
    )
    return state, Metrics(distance, penalty, loss)


def standing_statistics(config: Config, generator_params, key, *, num: int = 4096) -> dict:
    """Prior params with batch norm statistics measured on `num` latents in one batch.

    The average of weights never saw a batch, so statistics from training would not fit it. Classes,
    if there are any, are evenly spread.

    Args:
      config: gives the architecture.
      generator_params: the generator's `params` tree (usually the average).
      key: typed key for the latents.
      num: number of latents, at least 2.

    Returns:
      `{"params": ..., "batch_stats": ...}` for `dcgan(...).apply`.
    """
    _, statistics = _standing_statistics(_architecture(config), generator_params, key, num=num)
    return {"params": generator_params, **statistics}


@partial(jax.jit, static_argnames=("config", "num"))
def _standing_statistics(config: Config, generator_params, key, *, num: int):
    latents = jax.random.normal(key, (num, config.latent_dim))
    return _generator(config, momentum=0.0).apply(
        {"params": generator_params},
        latents,
        _all_classes(config, num),
        train=True,
        mutable="batch_stats",
    )


# --- the run ----------------------------------------------------------------------------------


def _claim_folder(out_dir: Path, config: Config, sources: list[dict], resume: bool) -> None:
    """Writes `config.json`, or checks that the one there is this run's."""
    path = out_dir / "config.json"
    new = asdict(config)
    mine = {"config": dict(new), "data": sources}
    if path.exists():
        if not resume:
            raise GGLError(f"{out_dir} already holds a run; give another folder, or resume it")
        try:
            theirs = json.loads(path.read_text())
            old = dict(theirs["config"])
            old_data = theirs["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise GGLError(f"{path} is not a training configuration: {error}") from error
        old.pop("steps", None), new.pop("steps")
        names = [f.name for f in fields(Config) if f.name != "steps"]
        differences = [
            f"{n}: {old.get(n)} there, {new[n]} here" for n in names if old.get(n) != new[n]
        ]
        if old_data != sources:

            def brief(data):
                return ", ".join(f"{s['file']}*{s['weight']:g} {s['sha256'][:8]}" for s in data)

            differences.append(f"data: {brief(old_data)} there, {brief(sources)} here")
        if differences:
            raise GGLError(
                f"{out_dir} holds a run of another configuration ({'; '.join(differences)}); "
                "give another folder or the same configuration"
            )
    files.write_json(path, mine)


def _manager(out_dir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((out_dir / "checkpoints").resolve(), options=options)


def _restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest checkpoint, placed where `state` lives; `state` itself when there is none."""
    step = manager.latest_step()
    if step is None:
        return state
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(state))
    except Exception as error:  # orbax and tensorstore raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        folder = Path(manager.directory) / str(step)
        raise GGLError(
            f"checkpoint {folder} cannot be read ({reason}); delete that folder to resume from "
            "the one before"
        ) from error


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a flag; the second acts as usual."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set  # signals reach the main thread only
        return
    previous: dict[int, Any] = {}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number, frame):
        del number, frame
        flag.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield flag.is_set
    finally:
        restore()


class _LossLog:
    """`losses.csv` (one row per window of steps) and the figure drawn from it."""

    HEADER = ("step", "wasserstein", "penalty", "generator_loss", "seconds_per_step")

    def __init__(self, out_dir: Path, step: int):
        self.path, self.figure = out_dir / "losses.csv", out_dir / "losses.png"
        self.rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
            # rows past the restored checkpoint are about to be made again
            self.rows = [row for row in rows if len(row) == 5 and int(row[0]) <= step]

    def start(self) -> None:
        """Leaves in the file only what is here."""
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([self.HEADER, *self.rows])

    def append(self, step: int, means: dict, seconds: float) -> None:
        values = [*means.values(), seconds]
        self.rows.append([str(step), *(f"{value:.6g}" for value in values)])
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(self.rows[-1])

    def seconds(self) -> float:
        """Seconds of all logged steps, from whichever sessions."""
        steps = np.diff([0, *(int(row[0]) for row in self.rows)])
        return float(steps @ np.array([float(row[4]) for row in self.rows]))

    def draw(self) -> None:
        from matplotlib.figure import Figure  # slow to import, and only training needs it

        if not self.rows:
            return
        table = np.array(self.rows, np.float64)
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axis, column in zip(figure.subplots(1, 3), (1, 2, 3), strict=True):
            axis.plot(table[:, 0], table[:, column], linewidth=0.8)
            axis.set(xlabel="generator step", title=self.HEADER[column].replace("_", " "))
        figure.savefig(self.figure, dpi=110)


def _show_progress(total: int, start: int):
    """A rich bar on a terminal, a line a minute elsewhere; yields `update(step, metrics)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console()

    def describe(metrics):
        return (
            f"Wasserstein {metrics['wasserstein']:.3f}  penalty {metrics['penalty']:.3f}  "
            f"generator {metrics['generator_loss']:.3f}"
        )

    @contextmanager
    def bar():
        columns = (
            TextColumn("train-prior"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.description}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("compiling", total=total, completed=start)

            def update(step, metrics):
                progress.update(task, completed=step, description=describe(metrics))

            yield update

    @contextmanager
    def lines():
        began = last = time.monotonic()

        def update(step, metrics):
            nonlocal last
            now = time.monotonic()
            if now - last < 60 and step < total:
                return
            last = now
            rate = (now - began) / max(1, step - start)
            print(
                f"step {step}/{total}  {describe(metrics)}  {rate:.3f} s/step  "
                f"ETA {rate * (total - step) / 60:.0f} min",
                flush=True,
            )

        yield update

    return bar() if console.is_terminal else lines()


def train(
    config: Config,
    data: Sequence,
    out_dir,
    *,
    resume: bool = True,
    progress: Callable[[int, dict], None] | None = None,
    log_every: int = 50,
    sample_every: int = 500,
    checkpoint_minutes: float = 5.0,
) -> TrainState:
    """Trains the prior, or goes on with the run in `out_dir`.

    Writes there: `config.json`, `checkpoints/` (orbax, the newest two), `losses.csv`,
    `losses.png` and `samples_<step>.png` (always the same 64 latents through the averaged
    weights). Ctrl-C (or SIGTERM) finishes the step at hand, saves and returns; the same call
    goes on from there, and ends with the same weights, bit for bit on the same machine, as a
    run that was never stopped.

    Args:
      config: the run.
      data: .npz paths or `(path, weight)` pairs (see `load_data`); images are held out of the
        first.
      out_dir: folder of the run; made if absent.
      resume: whether a run found in the folder is continued; otherwise it is an error.
      progress: called as `progress(step, metrics)` about every `log_every` steps with a dict
        of floats; by default a progress bar, or a line a minute where there is no terminal.
      log_every: steps per row of `losses.csv` (means over those steps).
      sample_every: steps per sample grid.
      checkpoint_minutes: minutes between checkpoints; one is also made at the end.

    Returns:
      The last `TrainState`; its `step` is below `config.steps` if the run was interrupted.

    Raises:
      GGLError: bad data; a folder with another configuration or an unreadable checkpoint in it;
        a folder that cannot be written; losses that are not finite (nothing is saved then).
    """
    out_dir = Path(out_dir)
    dataset = load_data(data, config)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _claim_folder(out_dir, config, dataset.sources, resume)
        return _run(config, dataset, out_dir, progress, log_every, sample_every, checkpoint_minutes)
    except OSError as error:
        raise GGLError(f"cannot write to {out_dir}: {error}") from error


@partial(jax.jit, static_argnames=("config", "num"), donate_argnames=("state",))
def _advance(config: Config, state: TrainState, images, cumulative, labels, *, num: int):
    """`num` iterations; the metrics of each, stacked."""

    def body(state, _):
        return train_step(config, state, images, cumulative, labels)

    if num == 1:
        state, metrics = body(state, None)
        return state, jax.tree.map(lambda x: x[None], metrics)
    return jax.lax.scan(body, state, None, length=num)


@partial(jax.jit, static_argnames=("config", "num"))
def _sample_images(config: Config, generator_params, key, *, num: int):
    """Images in [0, 1] of `num` fixed latents, in evaluation mode."""
    params = standing_statistics(config, generator_params, key, num=1024)
    latents = jax.random.normal(key, (num, config.latent_dim))
    images = _generator(config).apply(params, latents, _all_classes(config, num))
    return from_signed(cast(jax.Array, images))


def _run(config, dataset, out_dir, progress, log_every, sample_every, checkpoint_minutes):
    # XLA's CPU backend runs a scan's body on one thread; on accelerators a scan saves dispatch
    on_cpu = jax.default_backend() == "cpu"
    images, cumulative = jnp.asarray(dataset.images), jnp.asarray(dataset.cumulative)
    labels = None if dataset.labels is None else jnp.asarray(dataset.labels)

    prior_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    architecture = _architecture(config)

    def write_samples(state, step):
        save_grid(
            out_dir / f"samples_{step:06d}.png",
            _sample_images(architecture, state.ema, prior_key, num=64),
        )

    with _manager(out_dir) as manager, _stop_requested() as stop:
        state = _restore(manager, init_state(config))
        step = saved_step = int(state.step)
        log = _LossLog(out_dir, step)
        log.start()

        def save():
            nonlocal saved_step
            if step != saved_step:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
                saved_step = step

        saved_at = time.monotonic()
        with nullcontext(progress) if progress else _show_progress(config.steps, step) as update:
            window, window_start, window_step = [], time.monotonic(), step
            while step < config.steps and not stop():
                num = (
                    1
                    if on_cpu
                    else min(
                        config.steps - step, *(n - step % n for n in (log_every, sample_every))
                    )
                )
                state, metrics = _advance(architecture, state, images, cumulative, labels, num=num)
                window.append(jax.device_get(metrics))
                step += num
                if step % log_every == 0 or step == config.steps:
                    stacked = jax.tree.map(lambda *x: np.concatenate(x).mean(), *window)
                    means = {name: float(value) for name, value in stacked._asdict().items()}
                    if not all(np.isfinite(value) for value in means.values()):
                        raise GGLError(
                            f"train-prior: the losses are not finite near step {step} ({means}); "
                            f"lower learning_rate={config.learning_rate} and start in a new folder"
                        )
                    now = time.monotonic()
                    log.append(step, means, (now - window_start) / (step - window_step))
                    window, window_start, window_step = [], now, step
                    update(step, means)
                    # only after the losses of every step so far were seen to be finite
                    if now - saved_at > 60 * checkpoint_minutes:
                        save()
                        saved_at = now
                if step % sample_every == 0:
                    write_samples(state, step)
                    log.draw()
            if all(np.isfinite(np.concatenate(metrics)).all() for metrics in window):
                save()
        write_samples(state, step)
        log.draw()
    return state


def _hardware() -> str:
    """The machine in a few words, e.g. "AMD EPYC, 2 cores; cpu"."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux; the architecture must do
    devices = sorted({device.device_kind for device in jax.devices()})
    return f"{name}, {os.cpu_count()} cores; {', '.join(devices)}"


def export(
    out_dir,
    path,
    *,
    trained_on: Sequence[str],
    command: str,
    licence_note: str = "",
    num_statistics: int = 8192,
) -> dict[str, Any]:
    """Makes a prior to ship from a run: its newest checkpoint's averaged weights and their card.

    Args:
      out_dir: the run's folder (see `train`); the run need not be finished.
      path: the folder of the shipped prior; its last part is the prior's name.
      trained_on: the public data sets behind the files, e.g. ("celeba", "lfw"): an audit must
        know them to refuse private images that the prior has seen.
      command: what was run, for the card.
      licence_note: what the data's licence asks of users of the weights.
      num_statistics: latents that the batch norm statistics are measured on.

    Returns:
      The card as written. Beside it and the weights lies `samples.png`, 64 samples.

    Raises:
      GGLError: no run or no checkpoint in `out_dir`, or `path` cannot be written.
    """
    out_dir, path = Path(out_dir), Path(path)
    try:
        run = json.loads((out_dir / "config.json").read_text())
        config, data = Config(**run["config"]), run["data"]
    except FileNotFoundError:
        raise GGLError(f"{out_dir} holds no training run (no config.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GGLError(f"{out_dir / 'config.json'} cannot be read: {error}") from error
    with _manager(out_dir) as manager:
        if manager.latest_step() is None:
            raise GGLError(f"{out_dir} holds no checkpoint yet; train first")
        state = _restore(manager, init_state(config))
    step = int(state.step)
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    params = standing_statistics(config, state.ema, key, num=num_statistics)
    seconds = _LossLog(out_dir, step).seconds()
    arguments = {"width": config.width, "latent_dim": config.latent_dim}
    if config.num_classes is not None:
        arguments["num_classes"] = config.num_classes
    card = {
        "name": path.name,
        "kind": "dcgan",
        "arguments": arguments,
        "method": "WGAN-GP; exponential moving average of the generator's weights",
        "steps": step,
        "config": {**asdict(config), "steps": step},
        "trained_on": list(trained_on),
        "data": data,
        "holdout": (
            f"ggl_jax.priors.wgan_gp.holdout_split(num_images, {config.holdout}, {config.seed}) "
            "of the first data file: those images were not trained on"
        ),
        "licence_note": licence_note,
        "command": command,
        "hardware": _hardware(),
        "hours": round(seconds / 3600, 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "files": [checkpoint.CARD, checkpoint.WEIGHTS, "samples.png"],
    }
    card = checkpoint.save(path, params, card)
    prior = dcgan(**arguments)
    samples(prior, params, key, 64, path=path / "samples.png")
    return card
