"""``ggl-jax train-denoiser``: train a denoiser beside a generator, on public images."""

import dataclasses
from pathlib import Path

from ggl_jax.commands._shared import command_of, say
from ggl_jax.commands.train_prior import PriorTraining, trained, weighted
from ggl_jax.priors import denoiser, load_prior


@dataclasses.dataclass(frozen=True)
class TrainDenoiserCommand(PriorTraining):
    """Train a denoiser beside a prior, on your own public images.

    Attack map then knows what images look like between the pixels, too. Ctrl-C saves, and the same
    command goes on from there.
    """

    prior: str = "dcgan32_faces"
    """Prior to put it beside, as for ggl-jax audit; a denoiser that it has is replaced."""
    out: Path = Path("denoiser")
    """Folder for checkpoints."""
    config: denoiser.Config = dataclasses.field(default_factory=denoiser.Config)


def run(command: TrainDenoiserCommand, argv: list[str]) -> int:
    """``ggl-jax train-denoiser``."""
    files = weighted(command)
    own, params, card = load_prior(command.prior)
    prior = denoiser.with_denoiser(own)
    config = command.config

    def train(show):
        return denoiser.train(config, prior, files, command.out, progress=show)

    state = trained(train, config.steps)
    if state is None:
        return 130
    if command.export is None:
        say(f"Trained {state.step} steps. The same command with --export FOLDER writes the prior.")
    else:
        card = denoiser.export(
            *(state, config, prior, (params, card), files, command.export),
            trained_on=command.trained_on,
            command=command_of(argv),
        )
        psnrs, gains = (card[denoiser.DENOISER][name] for name in ("psnr_held_out", "gain"))
        text = "; ".join(
            f"noise {strength}: {psnr} dB, from {psnr - gains[strength]:.2f}"
            for strength, psnr in psnrs.items()
        )
        say(f"Exported to {command.export}; use it with --prior {command.export}.")
        say(f"PSNR of held-out images: {text or 'none were held out'}.")
        worse = [strength for strength, gain in gains.items() if gain <= 0]
        if worse:
            say(
                f"Warning: at noise {' and '.join(worse)} it does no better than no denoising, and "
                "attack map may lose by it; train on, with more --steps."
            )
    return 0
