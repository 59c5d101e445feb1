"""A denoiser beside a generator: what images look like where a generator draws them only roughly.

What it takes off an image is, where the noise is Gaussian, the noise's variance times the slope of
the images' log density (Tweedie's formula), so that it serves as a prior of searches in pixels
(Romano, Elad and Milanfar, "The Little Engine that Could: Regularization by Denoising", 2017). It
is not told the noise's strength; a network without biases carries over to strengths that it was not
trained on (Mohan et al., "Robust and Interpretable Blind Image Denoising via Bias-Free
Convolutional Neural Networks", 2020).
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ggl_jax import checkpoint, machine
from ggl_jax.errors import GGLError
from ggl_jax.images import from_signed
from ggl_jax.priors import training
from ggl_jax.priors.samples import samples, save_grid
from ggl_jax.priors.wgan_gp import RunConfig, averaged, draw_batch
from ggl_jax.spec import Count, Number, Positive
from ggl_jax.types import Prior, PyTree

#: Where the denoiser's weights lie beside the generator's, in the parameters and on the card.
DENOISER = "denoiser"
#: Weakest and strongest noise of the training images, standard deviations in [0, 1].
STRENGTHS = (0.02, 0.2)


class Denoiser(nn.Module):
    """A U-Net of residual blocks without biases: images [n h w c] in [0, 1] to cleaner ones.

    Attributes:
        widths: channels at full, half and quarter size.
    """

    widths: Sequence[int] = (32, 64, 96)

    @nn.compact
    def __call__(self, images):
        height, width, channels = images.shape[1:]
        sides = [(0, 0), (0, -height % 4), (0, -width % 4), (0, 0)]
        given = jnp.pad(images, sides, mode="edge") - 0.5
        conv = functools.partial(nn.Conv, use_bias=False)
        up = functools.partial(nn.ConvTranspose, kernel_size=(2, 2), strides=(2, 2), use_bias=False)

        def block(x):
            inner = conv(x.shape[-1], (3, 3))(nn.relu(x))
            return x + conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(nn.relu(inner))

        full, half, quarter = self.widths
        fine = block(conv(full, (3, 3))(given))
        middle = block(conv(half, (2, 2), strides=2)(fine))
        coarse = block(block(conv(quarter, (2, 2), strides=2)(middle)))
        middle = block(middle + up(half)(coarse))
        fine = block(fine + up(full)(middle))
        cleaned = given - conv(channels, (3, 3))(fine) + 0.5
        return cleaned[:, :height, :width]


@functools.lru_cache(maxsize=64)
def with_denoiser(prior: Prior, widths: tuple[int, ...] = (32, 64, 96)) -> Prior:
    """The same prior with a denoiser; the same object for the same prior.

    Args:
        prior: any prior.
        widths: of :class:`Denoiser`.

    Returns:
        A prior whose parameters have one more entry, "denoiser".
    """
    network = Denoiser(widths)

    def init(key):
        blank = jnp.zeros((1, *prior.image_shape))
        return {**prior.init(key), DENOISER: network.init(key, blank)["params"]}

    def apply(params, latents, labels=None):
        return prior.apply({k: v for k, v in params.items() if k != DENOISER}, latents, labels)

    def denoise(params, images):
        return network.apply({"params": params[DENOISER]}, images)

    return prior._replace(init=init, apply=apply, denoise=denoise)


@dataclass(frozen=True)
class Config(RunConfig):
    """Everything that, with the data, determines a denoiser's training."""

    steps: Number = 6000
    """Updates. The only option that may change when a run is resumed."""
    batch_size: Count = 32
    """Images per update, at least 1."""
    learning_rate: Positive = 2e-3
    """Adam's first step size, above 0; it goes down to zero on a half cosine."""


class TrainState(NamedTuple):
    """The whole state of a run; with ``Config`` and the data it determines every later step."""

    step: jax.Array
    params: PyTree
    optimizer: optax.OptState
    ema: PyTree


def noise(key: jax.Array, num: int, shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Noise of a random kind and strength for each of ``num`` images of a shape (h, w, c).

    What is wrong with a reconstruction is seldom white: half of the noise is, the rest is blurred
    or half blurred, and of every second image's a random share is the same in all channels.

    Returns:
        ``(noise [num h w c], strengths [num 1 1 1])``; a strength is the noise's standard
        deviation, log-uniform in :data:`STRENGTHS`.
    """
    keys = jax.random.split(key, 6)
    each = (num, 1, 1, 1)
    white = jax.random.normal(keys[0], (num, *shape))
    other = jax.random.normal(keys[1], (num, *shape))
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    blurred = sum(jnp.roll(other, shift, (1, 2)) for shift in shifts) / 3.0
    kind = jax.random.uniform(keys[2], each)
    coloured = jnp.where(kind < 0.8, (white + blurred) / jnp.sqrt(2.0), blurred)
    coloured = jnp.where(kind < 0.5, white, coloured)
    share, half = jax.random.uniform(keys[3], (2, *each))
    share = jnp.where(half < 0.5, share, 0.0)
    grey = jax.random.normal(keys[4], (num, *shape[:2], 1))
    weakest, strongest = np.log(STRENGTHS)
    strength = jnp.exp(jax.random.uniform(keys[5], each, minval=weakest, maxval=strongest))
    return strength * (jnp.sqrt(1 - share) * coloured + jnp.sqrt(share) * grey), strength


def _optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(100, config.steps // 2), max(config.steps, 1)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def init_state(config: Config, prior: Prior) -> TrainState:
    """The state before the first step, for a prior with a denoiser."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    params = jax.jit(prior.init)(key)[DENOISER]
    return TrainState(jnp.int32(0), params, _optimizer(config).init(params), params)


@functools.partial(jax.jit, static_argnames=("config", "prior"))
def train_step(
    config: Config, prior: Prior, state: TrainState, images: jax.Array, cumulative: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One update, and its loss: the mean squared error over the noise's standard deviation.

    Args:
        config: of the run.
        prior: with a denoiser.
        state: before it.
        images: uint8 [n h w c].
        cumulative: [n], of :class:`ggl_jax.priors.training.Dataset`.
    """
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    num = config.batch_size
    clean = from_signed(
        draw_batch(jax.random.fold_in(key, 0), images, cumulative, num=num, flips=True)
    )
    added, strength = noise(jax.random.fold_in(key, 1), num, clean.shape[1:])

    def loss(params):
        assert prior.denoise is not None
        cleaned = prior.denoise({DENOISER: params}, clean + added)
        error = jnp.mean((cleaned - clean) ** 2, axis=(1, 2, 3), keepdims=True)
        return jnp.mean(error / strength)

    value, gradient = jax.value_and_grad(loss)(state.params)
    updates, optimizer = _optimizer(config).update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = averaged(state.ema, params, state.step, 0.995)
    return TrainState(state.step + 1, params, optimizer, ema), value


def train(
    config: Config,
    prior: Prior,
    data: Sequence,
    out_dir,
    *,
    progress: Callable[[int, float], None] | None = None,
    every: int = 500,
    log: int = 20,
) -> TrainState:
    """Train a denoiser, or go on with the run in ``out_dir``, which keeps the newest states.

    Ctrl-C saves the last whole step and returns; the same call goes on from there, to the same
    weights, bit for bit on the same machine.

    Args:
        config: the run.
        prior: with a denoiser (:func:`with_denoiser`).
        data: .npz paths or ``(path, weight)`` pairs, as for
            :func:`ggl_jax.priors.training.load_data`.
        out_dir: folder of the run; made if absent.
        progress: ``progress(step, loss)``, with the mean loss since the last call.
        every: steps between savings.
        log: steps between calls of ``progress``.

    Raises:
        GGLError: bad data; a folder with another configuration; a loss that is not finite.
    """
    out_dir = Path(out_dir)
    dataset = training.load_data(data, config, prior.image_shape)
    arrays = jnp.asarray(dataset.images), jnp.asarray(dataset.cumulative)
    with training.run_folder(out_dir, config, dataset.sources) as manager:
        state = training.restore(manager, init_state(config, prior))
        losses: list[float] = []
        with suppress(KeyboardInterrupt):
            while (step := int(state.step)) < config.steps:
                state, loss = train_step(config, prior, state, *arrays)
                losses.append(float(loss))
                if not np.isfinite(losses[-1]):
                    raise GGLError(
                        f"train-denoiser: the loss is not finite at step {step}; lower "
                        f"learning_rate={config.learning_rate} and start in a new folder"
                    )
                if progress is not None and (step + 1) % log == 0:
                    progress(step + 1, float(np.mean(losses)))
                    losses = []
                if (step + 1) % every == 0:
                    training.keep(manager, state)
        training.keep(manager, state)
    return state


def export(
    state: TrainState,
    config: Config,
    prior: Prior,
    base: tuple[PyTree, dict[str, Any]],
    data: Sequence,
    path,
    *,
    trained_on: Sequence[str],
    command: str,
) -> dict[str, Any]:
    """Write a prior's checkpoint again, with the trained denoiser in it.

    Args:
        state: of :func:`train`.
        config: of the run, like ``prior`` and ``data``.
        prior: with a denoiser.
        base: parameters and card of the prior without one.
        data: as for :func:`train`.
        path: folder of the new checkpoint; its last part is the prior's name.
        trained_on: further public data sets, beside the prior's own.
        command: what was run, for the card.

    Returns:
        The card: the prior's, whose "denoiser" says how it was trained and how it does on images
        held out of that (PSNR in dB by the white noise's standard deviation; "gain" is what it adds
        to the noisy images', or takes away; of training images where none were held out). Beside it
        lies ``denoiser.png``: samples of the generator, with noise, and cleaned.

    Raises:
        GGLError: it takes away at every strength, or ``path`` cannot be written.
    """
    path, (params, card) = Path(path), base
    params = {**params, DENOISER: jax.device_get(state.ema)}
    dataset = training.load_data(data, config, prior.image_shape)
    held_out = len(dataset.held_out) > 0
    known = (dataset.held_out if held_out else dataset.images)[:128].astype(np.float32) / 255
    assert prior.denoise is not None
    denoise = functools.partial(jax.jit(prior.denoise), params)
    psnrs, gains = {}, {}
    drawn = np.asarray(samples(prior, params, jax.random.key(0), 8))
    rows = [drawn]  # the public images themselves may not be passed on
    for strength in (0.05, 0.1, 0.2):
        noisy = [x + strength * _normal(x.shape) for x in (drawn, known)]
        rows += [noisy[0], np.asarray(denoise(noisy[0]))]
        before, after = (_psnr(x, known) for x in (noisy[1], denoise(noisy[1])))
        psnrs[str(strength)], gains[str(strength)] = round(after, 2), round(after - before, 2)
    if all(gain <= 0 for gain in gains.values()):
        told = ", ".join(f"{gain:+.1f} dB at noise {at}" for at, gain in gains.items())
        raise GGLError(
            f"train-denoiser: after {int(state.step)} steps it leaves images no nearer than their "
            f"noise does ({told}), and would spoil attack map; train on, with more steps"
        )
    about = {
        "arguments": {"widths": list(Denoiser.widths)},
        "method": "bias-free U-Net, mean squared error over the noise's standard deviation",
        "config": {**asdict(config), "steps": int(state.step)},
        "data": dataset.sources,
        "psnr_held_out": psnrs if held_out else {},
        "gain": gains,
        "command": command,
        "hardware": machine.cpu_name(),
    }
    card = {
        **card,
        "name": path.name,
        "trained_on": list(dict.fromkeys([*card.get("trained_on", []), *trained_on])),
        DENOISER: about,
        "files": [checkpoint.CARD, checkpoint.WEIGHTS, "samples.png", "denoiser.png"],
    }
    card = checkpoint.save(path, params, card)
    samples(prior, params, jax.random.key(0), 64, path=path / "samples.png")
    save_grid(path / "denoiser.png", np.concatenate(rows), num_columns=len(drawn))
    return card


def _psnr(found: np.ndarray | jax.Array, images: np.ndarray) -> float:
    errors = (np.clip(found, 0, 1) - images) ** 2
    return float(np.mean(-10 * np.log10(np.mean(errors, axis=(1, 2, 3)))))


def _normal(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
