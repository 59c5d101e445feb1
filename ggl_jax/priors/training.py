"""Training runs of the DCGAN prior: resumable, watchable, determined by a :class:`Config`."""

import contextlib
import csv
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ggl_jax import checkpoint, files, machine, npz
from ggl_jax.errors import GGLError, about, explaining
from ggl_jax.images import from_signed
from ggl_jax.priors import wgan_gp
from ggl_jax.priors.dcgan import IMAGE_SHAPE, dcgan
from ggl_jax.priors.holdout import holdout_split
from ggl_jax.priors.samples import samples, save_grid
from ggl_jax.priors.wgan_gp import Config, TrainState


class Dataset(NamedTuple):
    """Training images in memory and how often each is drawn."""

    images: np.ndarray  # uint8 [n 32 32 3]
    cumulative: np.ndarray  # float32 [n], cumulative probability of drawing each image
    sources: list[dict]  # per file: file, weight, num_images, num_held_out, sha256
    held_out: np.ndarray  # uint8 [m h w c], of the first file, not trained on
    labels: np.ndarray | None = None  # int32 [n], for a class-conditional prior


# --- data -------------------------------------------------------------------------------------


def _read(path, *, labelled: bool, shape=IMAGE_SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Images [n h w c] and labels [n] of a file; zeros for labels that are not wanted."""
    with about(f"training data {path}"):
        found = npz.read(path)
        if found.images.shape[1:] != tuple(shape):
            raise GGLError(
                f"`images` has shape {list(found.images.shape)}, must be [n, "
                f"{', '.join(map(str, shape))}]; resize them first"
            )
        if not labelled:
            return found.images, np.zeros(len(found.images), np.int32)
        if found.labels is None:
            raise GGLError(
                "no array `labels`, which a class-conditional prior needs; add whole numbers "
                f"[{len(found.images)}], or train without --conditional"
            )
    return found.images, found.labels


def _pairs(data: Sequence) -> list[tuple[Any, float]]:
    return [(item, 1.0) if isinstance(item, str | os.PathLike) else item for item in data]


def count_classes(data: Sequence) -> int:
    """One more than the largest label in the files, given as for :func:`load_data`.

    Raises:
        GGLError: a bad file, or one without labels.
    """
    return 1 + max(
        (int(_read(path, labelled=True)[1].max()) for path, _ in _pairs(data)), default=0
    )


def load_data(
    data: Sequence, config: wgan_gp.RunConfig, shape=IMAGE_SHAPE, num_classes: int | None = None
) -> Dataset:
    """Load the training images: every file's, less the held-out ones of the first.

    Args:
        data: paths of .npz files, or ``(path, weight)``; an image of a file of weight 2 is drawn
            twice as often as one of weight 1. A file given twice counts twice; its held-out images
            stay out each time.
        config: gives ``holdout`` and ``seed``.
        shape: of the images, (h, w, c).
        num_classes: of their labels, which are then read, too.

    Raises:
        GGLError: no file, a bad file (see :func:`ggl_jax.npz.read`), a weight that is not above 0,
            a label beyond the classes, or no image left to train on.
    """
    if not data:
        raise GGLError("data is empty; give at least one .npz file with `images`")
    pairs = _pairs(data)
    images, labels, weights, sources, held_out = [], [], [], [], np.empty(0)
    for path, weight in pairs:
        if not 0 < weight < float("inf"):
            raise GGLError(f"data: weight {weight} of {path} must be above 0")
        found, classes = _read(path, labelled=num_classes is not None, shape=shape)
        num = len(found)
        kept = np.arange(num)
        if Path(path).resolve() == Path(pairs[0][0]).resolve():
            kept, left = holdout_split(num, config.holdout, config.seed)
            held_out = found[left]
        if classes.max() >= (num_classes or 1):
            raise GGLError(
                f"training data {path}: label {classes.max()} is beyond num_classes={num_classes}"
            )
        labels.append(classes[kept])
        images.append(found[kept])
        weights.append(np.full(len(kept), weight, np.float64))
        sources.append(
            {
                "file": Path(path).name,
                "weight": float(weight),
                "num_images": num,
                "num_held_out": num - len(kept),
                "sha256": files.sha256(path),
            }
        )
    every = np.concatenate(weights)
    if not len(every):
        raise GGLError(
            f"holdout={config.holdout} leaves no image to train on; lower it, or give more files"
        )
    cumulative = (np.cumsum(every) / every.sum()).astype(np.float32)
    every_label = None if num_classes is None else np.concatenate(labels)
    return Dataset(np.concatenate(images), cumulative, sources, held_out, every_label)


# --- a run's folder ---------------------------------------------------------------------------


def _claim_folder(out_dir: Path, config: Any, sources: list[dict]) -> None:
    """Write ``config.json``, or check that the one there is this run's, but for its steps."""

    def shown(run):
        data = ", ".join(f"{s['file']}*{s['weight']:g} {s['sha256'][:8]}" for s in run["data"])
        return {**run["config"], "steps": None, "data": data}

    path = out_dir / "config.json"
    mine = {"config": asdict(config), "data": sources}
    if path.exists():
        with explaining(f"{path} is not a training configuration", "give another folder"):
            changed = files.differences(shown(json.loads(path.read_text())), shown(mine))
        if changed:
            raise GGLError(
                f"{out_dir} holds a run of another configuration ({'; '.join(changed)}); give "
                "another folder or the same configuration"
            )
    files.write_json(path, mine)


def _manager(out_dir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((out_dir / "checkpoints").resolve(), options=options)


@contextlib.contextmanager
def run_folder(out_dir: Path, config: Any, sources: list[dict]):
    """The checkpoints of a run's folder, which is made, or whose configuration is compared."""
    with explaining(f"cannot write to {out_dir}", "mend that or choose another", OSError):
        out_dir.mkdir(parents=True, exist_ok=True)
        _claim_folder(out_dir, config, sources)
        with _manager(out_dir) as manager:
            yield manager


def keep(manager: ocp.CheckpointManager, state: Any) -> None:
    """Make a checkpoint of a state with a ``step``, unless there is one of it."""
    step = int(state.step)
    if step != (manager.latest_step() or 0):
        manager.save(step, args=ocp.args.StandardSave(state), force=True)


State = TypeVar("State")


def restore(manager: ocp.CheckpointManager, state: State) -> State:
    """The newest checkpoint, placed where ``state`` lives; ``state`` itself without one."""
    step = manager.latest_step()
    if step is None:
        return state
    folder = Path(manager.directory) / str(step)
    remedy = "delete that folder to resume from the one before"
    with explaining(f"checkpoint {folder} cannot be read", remedy):
        return manager.restore(step, args=ocp.args.StandardRestore(state))


#: The columns of ``losses.csv``; each row is the mean over the steps since the row before.
COLUMNS = ("step", *wgan_gp.Metrics._fields, "seconds_per_step")


def _read_losses(out_dir: Path, step: int) -> list[list[str]]:
    """The rows up to a step; those past the restored checkpoint are about to be made again."""
    path = out_dir / "losses.csv"
    if not path.exists():
        return []
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    return [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) <= step]


def _write_losses(out_dir: Path, rows: list[list[str]]) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    files.write_text(out_dir / "losses.csv", text.getvalue())


def _draw_losses(out_dir: Path, rows: list[list[str]]) -> None:
    from matplotlib.figure import Figure  # slow to import, and only training needs it

    if not rows:
        return
    table = np.array(rows, np.float64)
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, column in zip(figure.subplots(1, 3), (1, 2, 3), strict=True):
        axis.plot(table[:, 0], table[:, column], linewidth=0.8)
        axis.set(xlabel="generator step", title=COLUMNS[column].replace("_", " "))
    files.write_figure(out_dir / "losses.png", figure, dpi=110)


# --- the run ----------------------------------------------------------------------------------


def train(
    config: Config,
    data: Sequence,
    out_dir,
    *,
    progress: Callable[[int, dict], None] | None = None,
    log_every: int = 50,
    sample_every: int = 500,
    checkpoint_minutes: float = 5.0,
) -> TrainState:
    """Train the prior, or go on with the run in ``out_dir``.

    Writes there: ``config.json``, ``checkpoints/`` (orbax, the newest two), ``losses.csv``,
    ``losses.png`` and ``samples_<step>.png`` (always the same 64 latents through the averaged
    weights). Ctrl-C saves the last whole step and returns; the same call goes on from there, and
    ends with the same weights, bit for bit on the same machine, as a run that was never stopped.

    Args:
        config: the run.
        data: .npz paths or ``(path, weight)`` pairs (see :func:`load_data`); images are held out of
            the first.
        out_dir: folder of the run; made if absent.
        progress: called as ``progress(step, metrics)`` about every ``log_every`` steps with a dict
            of floats (:class:`ggl_jax.priors.wgan_gp.Metrics`).
        log_every: steps per row of ``losses.csv`` (means over those steps).
        sample_every: steps per sample grid.
        checkpoint_minutes: minutes between checkpoints; one is also made at the end.

    Returns:
        The last :class:`~ggl_jax.priors.wgan_gp.TrainState`; its ``step`` is below ``config.steps``
        if the run was interrupted.

    Raises:
        GGLError: bad data; a folder with another configuration or an unreadable checkpoint in it;
            a folder that cannot be written; losses that are not finite (nothing is saved then).
    """
    out_dir = Path(out_dir)
    dataset = load_data(data, config, num_classes=config.num_classes)
    with run_folder(out_dir, config, dataset.sources) as manager:
        run = _Run(config, dataset, out_dir, manager)
        with contextlib.suppress(KeyboardInterrupt):
            run.advance(progress, log_every, sample_every, checkpoint_minutes)
        run.save()
        run.show()
    return run.state


@partial(jax.jit, static_argnames=("config", "num"))
def _advance(config: Config, state: TrainState, images, cumulative, labels, *, num: int):
    """``num`` iterations; the metrics of each, stacked."""

    def body(state, _):
        return wgan_gp.train_step(config, state, images, cumulative, labels)

    if num == 1:
        state, metrics = body(state, None)
        return state, jax.tree.map(lambda x: x[None], metrics)
    return jax.lax.scan(body, state, None, length=num)


@partial(jax.jit, static_argnames=("config", "num"))
def _sample_images(config: Config, generator_params, key, *, num: int):
    """Images in [0, 1] of ``num`` fixed latents, in evaluation mode."""
    params = wgan_gp.standing_statistics(config, generator_params, key, num=1024)
    latents = jax.random.normal(key, (num, config.latent_dim))
    images = wgan_gp.generator(config).apply(params, latents, wgan_gp.all_classes(config, num))
    return from_signed(cast(jax.Array, images))


class _Run:
    """A run in progress: ``state`` is always that after a whole step."""

    def __init__(self, config: Config, dataset: Dataset, out_dir: Path, manager):
        self.config, self.out_dir, self.manager = config, out_dir, manager
        self.architecture = wgan_gp.architecture(config)
        self.data = tuple(
            None if x is None else jnp.asarray(x)
            for x in (dataset.images, dataset.cumulative, dataset.labels)
        )
        self.state = restore(manager, wgan_gp.init_state(config))
        self.rows = _read_losses(out_dir, int(self.state.step))
        _write_losses(out_dir, self.rows)

    def save(self) -> None:
        """Make a checkpoint, unless there is one, or the weights are not finite."""
        leaves = jax.tree.leaves((self.state.generator, self.state.critic))
        if all(np.isfinite(leaf).all() for leaf in leaves):
            keep(self.manager, self.state)

    def show(self) -> None:
        """Write the sample grid and draw the losses."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2)
        images = _sample_images(self.architecture, self.state.ema, key, num=64)
        save_grid(self.out_dir / f"samples_{int(self.state.step):06d}.png", images)
        _draw_losses(self.out_dir, self.rows)

    def advance(self, progress, log_every, sample_every, checkpoint_minutes) -> None:
        """Go on to the last step."""
        # XLA's CPU backend runs a scan's body on one thread; on accelerators a scan saves dispatch
        on_cpu = jax.default_backend() == "cpu"
        saved_at = began = time.monotonic()
        window, logged = [], int(self.state.step)
        while (step := int(self.state.step)) < self.config.steps:
            ends = (n - step % n for n in (log_every, sample_every))
            num = 1 if on_cpu else min(self.config.steps - step, *ends)
            self.state, metrics = _advance(self.architecture, self.state, *self.data, num=num)
            window.append(jax.device_get(metrics))
            step += num
            if step % log_every == 0 or step == self.config.steps:
                stacked = jax.tree.map(lambda *x: float(np.concatenate(x).mean()), *window)
                means = stacked._asdict()
                if not np.isfinite(list(means.values())).all():
                    raise GGLError(
                        f"train-prior: the losses are not finite near step {step} ({means}); lower "
                        f"learning_rate={self.config.learning_rate} and start in a new folder"
                    )
                now = time.monotonic()
                values = [*means.values(), (now - began) / (step - logged)]
                self.rows.append([str(step), *(f"{value:.6g}" for value in values)])
                _write_losses(self.out_dir, self.rows)
                window, began, logged = [], now, step
                if progress is not None:
                    progress(step, means)
                # only after the losses of every step so far were seen to be finite
                if now - saved_at > 60 * checkpoint_minutes:
                    self.save()
                    saved_at = now
            if step % sample_every == 0:
                self.show()


def export(
    out_dir,
    path,
    *,
    trained_on: Sequence[str],
    command: str,
    licence_note: str = "",
    num_statistics: int = 8192,
) -> dict[str, Any]:
    """Make a prior to ship from a run: its newest checkpoint's averaged weights and their card.

    Args:
        out_dir: the run's folder (see :func:`train`); the run need not be finished.
        path: the folder of the shipped prior; its last part is the prior's name.
        trained_on: the public data sets behind the files, e.g. ("celeba", "lfw"): an audit must
            know them to refuse private images that the prior has seen.
        command: what was run, for the card.
        licence_note: what the data's licence asks of users of the weights.
        num_statistics: latents that the batch norm statistics are measured on.

    Returns:
        The card as written. Beside it and the weights lies ``samples.png``, 64 samples.

    Raises:
        GGLError: no run or no checkpoint in ``out_dir``, or ``path`` cannot be written.
    """
    out_dir, path = Path(out_dir), Path(path)
    if not (out_dir / "config.json").is_file():
        raise GGLError(f"{out_dir} holds no training run (no config.json)")
    with explaining(f"{out_dir / 'config.json'} cannot be read", "train in a new folder"):
        run = json.loads((out_dir / "config.json").read_text())
        config, data = Config(**run["config"]), run["data"]
    with _manager(out_dir) as manager:
        if manager.latest_step() is None:
            raise GGLError(f"{out_dir} holds no checkpoint yet; train first")
        state = restore(manager, wgan_gp.init_state(config))
    step = int(state.step)
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    params = wgan_gp.standing_statistics(config, state.ema, key, num=num_statistics)
    rows = _read_losses(out_dir, step)
    seconds = sum(
        (int(row[0]) - int(before[0])) * float(row[-1])
        for before, row in zip([["0"], *rows], rows, strict=False)
    )
    devices = sorted({device.device_kind for device in machine.devices()})
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
            f"ggl_jax.priors.holdout.holdout_split(num_images, {config.holdout}, {config.seed}) "
            "of the first data file: those images were not trained on"
        ),
        "licence_note": licence_note,
        "command": command,
        "hardware": f"{machine.cpu_name()}, {os.cpu_count()} cores; {', '.join(devices)}",
        "hours": round(seconds / 3600, 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "files": [checkpoint.CARD, checkpoint.WEIGHTS, "samples.png"],
    }
    card = checkpoint.save(path, params, card)
    samples(dcgan(**arguments), params, key, 64, path=path / "samples.png")
    return card
