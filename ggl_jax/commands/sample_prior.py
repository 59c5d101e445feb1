"""``ggl-jax sample-prior``: a grid of random samples."""

import dataclasses
from pathlib import Path

import jax

from ggl_jax.commands._shared import say
from ggl_jax.errors import GGLError
from ggl_jax.priors import load_prior, samples
from ggl_jax.spec import Count, Seed


@dataclasses.dataclass(frozen=True)
class SamplePriorCommand:
    """Draw a grid of random samples from a prior, to see what it believes images look like."""

    prior: str = "dcgan32_faces"
    """Name of a shipped prior, or a checkpoint folder."""
    num: Count = 64
    """Number of samples."""
    seed: Seed = 0
    """Seed of the samples."""
    out: Path = Path("samples.png")
    """The PNG to write; one that exists is left alone."""


def run(command: SamplePriorCommand, argv: list[str]) -> int:
    """``ggl-jax sample-prior``."""
    if command.out.exists():
        raise GGLError(f"out: {command.out} exists; choose another --out, or remove it first")

    prior, params, card = load_prior(command.prior)
    samples(prior, params, jax.random.key(command.seed), command.num, path=command.out)
    say(f"{command.num} samples of {card['name']} are in {command.out}")
    return 0
