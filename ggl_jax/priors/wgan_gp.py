"""WGAN-GP, one iteration at a time: pure functions of a :class:`Config` and a :class:`TrainState`.

Loss: the critic maximises ``E[f(real)] - E[f(fake)] - penalty * E[(|df/dx| - 1)^2]`` with x drawn
uniformly on the line between a real and a fake image; the generator maximises ``E[f(fake)]``
(Gulrajani et al., "Improved Training of Wasserstein GANs", 2017). The exported weights are an
exponential moving average over the generator's training steps. Runs of these iterations are the
business of :mod:`ggl_jax.priors.training`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from ggl_jax.images import to_signed
from ggl_jax.priors.dcgan import IMAGE_SHAPE, Critic, Generator
from ggl_jax.spec import AtLeast, Count, Number, Positive, Seed, Share, check_fields


@dataclass(frozen=True)
class RunConfig:
    """What says which images a training run has, and in which order."""

    seed: Seed = 0
    """Seed of everything random: weights, batches, held-out images."""
    holdout: Number = 256
    """Images of the first file to keep out of training; of the same number and seed they are the
    same ones in each run."""

    def __post_init__(self):
        check_fields(self, "training: ")


@dataclass(frozen=True)
class Config(RunConfig):
    """Everything that, with the data, determines a training run.

    The published code trains with width 128, learning rate 1e-4, 5 critic steps, for 100 epochs.
    """

    width: Count = 64
    """Channels before the generator's last layer and after the critic's first, at least 1 (the
    published code: 128)."""
    latent_dim: Count = 128
    """Size of the latent vector, at least 1."""
    batch_size: Annotated[int, AtLeast(2)] = 64
    """Images per critic and generator update, at least 2."""
    critic_steps: Count = 5
    """Critic updates for each generator update, at least 1."""
    penalty: Annotated[float, AtLeast(0.0)] = 10.0
    """Weight of the gradient penalty, at least 0."""
    learning_rate: Positive = 1e-4
    """Step size of both Adams, above 0."""
    beta1: Share = 0.5
    """Adam's decay rate of the mean gradient, in [0, 1)."""
    beta2: Share = 0.999
    """Adam's decay rate of the squared gradient, in [0, 1)."""
    ema_decay: Share = 0.999
    """Decay of the average of the generator's weights that is exported, in [0, 1). Early in
    training it is lowered to (1 + step) / (10 + step), so that the random start is forgotten."""
    steps: Number = 20_000
    """Generator updates. The only option that may change when a run is resumed."""
    flips: bool = True
    """Mirror each real image with probability 1/2."""
    num_classes: Count | None = None
    """Classes of a class-conditional prior, at least 1: generator and critic then see the labels,
    and real and fake images of a batch have the same ones. None for an unconditional prior."""


class TrainState(NamedTuple):
    """The whole state of a run; with ``Config`` and the data it determines every later step."""

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


def _draw_indices(key, cumulative, num: int) -> jax.Array:
    """Which images a batch has: int [num]."""
    uniform = jax.random.uniform(jax.random.split(key)[0], (num,))
    # min: rounding may leave the last cumulative probability below a draw
    return jnp.minimum(jnp.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1)


def draw_labels(key, labels, cumulative, *, num: int) -> jax.Array | None:
    """Labels [num] of the images that :func:`draw_batch` draws with this key; None without any."""
    return None if labels is None else labels[_draw_indices(key, cumulative, num)]


def draw_batch(key, images, cumulative, *, num: int, flips: bool) -> jax.Array:
    """Draw images with replacement: uint8 [n 32 32 3] -> float32 [num 32 32 3] in [-1, 1]."""
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


def architecture(config: Config) -> Config:
    """The config less what compiled programs do not depend on, so that they are compiled once."""
    return replace(config, steps=0, holdout=0)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate, b1=config.beta1, b2=config.beta2)


def generator(config: Config, **options) -> Generator:
    return Generator(config.width, config.latent_dim, num_classes=config.num_classes, **options)


def all_classes(config: Config, num: int) -> jax.Array | None:
    """Labels [num], evenly spread over the classes in rising order; None without classes."""
    return None if config.num_classes is None else jnp.arange(num) * config.num_classes // num


def _fake(config: Config, params, latents, labels=None) -> jax.Array:
    """Images of the generator in training mode: batch norm by the statistics of this batch.

    Running statistics are not kept during training: :func:`standing_statistics` makes exact ones
    for whichever weights are used.
    """
    images, _ = generator(config).apply(
        {"params": params}, latents, labels, train=True, mutable=["batch_stats"]
    )
    return images


def init_state(config: Config) -> TrainState:
    """The state before the first step."""
    return _init_state(architecture(config))


@partial(jax.jit, static_argnames=("config",))
def _init_state(config: Config) -> TrainState:
    generator_key, critic_key = jax.random.split(jax.random.key(config.seed))
    latents = jnp.zeros((1, config.latent_dim))
    label = jnp.zeros((1,), jnp.int32)
    params = generator(config).init(generator_key, latents, label)["params"]
    critic_net = Critic(config.width, config.num_classes)
    critic = critic_net.init(critic_key, jnp.zeros((1, *IMAGE_SHAPE)), label)["params"]
    optimizer = _optimizer(config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=params,
        critic=critic,
        generator_optimizer=optimizer.init(params),
        critic_optimizer=optimizer.init(critic),
        ema=jax.tree.map(jnp.copy, params),
    )


def averaged(average: Any, params: Any, step: jax.Array, most: float) -> Any:
    """An exponential moving average of weights, whose decay rises to ``most`` with the steps."""
    decay = jnp.minimum(most, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, average, 1.0 - decay)


def train_step(config: Config, state: TrainState, images, cumulative, labels=None):
    """One generator update after ``config.critic_steps`` critic updates.

    Pure; its randomness is a function of the seed and the step alone, so a resumed run draws
    what the uninterrupted one would. The critic steps are unrolled: inside a ``lax.scan`` XLA's
    CPU backend would run them on one thread.

    Args:
        config: static.
        state: the state.
        images: uint8 [n 32 32 3].
        cumulative: float32 [n], as in :class:`ggl_jax.priors.training.Dataset`.
        labels: int32 [n], where the config has classes.

    Returns:
        ``(state, Metrics)``.
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
    params = optax.apply_updates(state.generator, updates)

    ema = averaged(state.ema, params, state.step, config.ema_decay)
    distance, penalty = (jnp.stack(values).mean() for values in zip(*logged, strict=True))
    state = TrainState(state.step + 1, params, critic, generator_optimizer, critic_optimizer, ema)
    return state, Metrics(distance, penalty, loss)


def standing_statistics(config: Config, generator_params, key, *, num: int = 4096) -> dict:
    """Prior params with batch norm statistics measured on ``num`` latents in one batch.

    The average of weights never saw a batch, so statistics from training would not fit it. Classes,
    if there are any, are evenly spread.

    Args:
        config: gives the architecture.
        generator_params: the generator's ``params`` tree (usually the average).
        key: typed key for the latents.
        num: number of latents, at least 2.

    Returns:
        ``{"params": ..., "batch_stats": ...}`` for ``dcgan(...).apply``.
    """
    _, statistics = _standing_statistics(architecture(config), generator_params, key, num=num)
    return {"params": generator_params, **statistics}


@partial(jax.jit, static_argnames=("config", "num"))
def _standing_statistics(config: Config, generator_params, key, *, num: int):
    latents = jax.random.normal(key, (num, config.latent_dim))
    return generator(config, momentum=0.0).apply(
        {"params": generator_params},
        latents,
        all_classes(config, num),
        train=True,
        mutable="batch_stats",
    )
