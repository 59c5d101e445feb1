"""Foreign generators' weights, made into checkpoints that :func:`load_prior` finds."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ggl_jax import checkpoint, files
from ggl_jax.errors import GGLError, check_known, explaining
from ggl_jax.grammar import at_least
from ggl_jax.priors.biggan import BIGGAN_DEEP, BigGANConfig, biggan_deep
from ggl_jax.priors.biggan import from_torch as biggan_from_torch
from ggl_jax.priors.convolutional import convolutional
from ggl_jax.priors.convolutional import from_torch as convolutional_from_torch
from ggl_jax.priors.dcgan import dcgan
from ggl_jax.priors.dcgan import from_torch as dcgan_from_torch
from ggl_jax.priors.samples import samples

#: What `import_prior` understands.
GENERATORS = (*(f"biggan-deep-{size}" for size in BIGGAN_DEEP), "dcgan")


def _json(path: Path) -> dict[str, Any]:
    with explaining(f"config: {path} cannot be read", "give the JSON file beside the weights"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise GGLError(f"config: {path} holds {type(content).__name__}, not an object")
    return content


def _import_biggan(size: int, source: Path, config: Path | None, truncation, image_size):
    chosen = BIGGAN_DEEP[size] if config is None else BigGANConfig.read(config)
    if chosen.output_dim != size:
        raise GGLError(
            f"config: {config} is of BigGAN-deep-{chosen.output_dim}; import it as that, not as "
            f"biggan-deep-{size}"
        )
    arguments = {
        "config": dataclasses.asdict(chosen),
        "truncation": truncation,
        "image_size": image_size,
    }
    prior = biggan_deep(**arguments)
    return "biggan_deep", arguments, prior, biggan_from_torch(source, chosen)


def _import_dcgan(source: Path, config: Path | None):
    if config is None:
        params = dcgan_from_torch(source)
        width = params["params"]["norm3"]["scale"].shape[0]
        arguments = {"width": width, "latent_dim": params["params"]["dense"]["kernel"].shape[0]}
        return "dcgan", arguments, dcgan(**arguments), params
    given = _json(config)
    if not {"layers", "latent_dim"} <= given.keys() <= {"layers", "latent_dim", "latents"}:
        raise GGLError(
            f"config: {config} has {', '.join(sorted(given)) or 'nothing'}; it needs layers and "
            "latent_dim, and may have latents"
        )
    prior = convolutional(**given)
    params = convolutional_from_torch(source, given["layers"], latent_dim=given["latent_dim"])
    return "convolutional", given, prior, params


def import_prior(
    generator: str,
    source,
    out,
    *,
    config=None,
    truncation: float = 1.0,
    image_size: int | None = None,
    trained_on: Sequence[str] | None = None,
    licence_note: str = "see the licence of the weights",
    command: str = "",
    num_samples: int = 8,
) -> dict[str, Any]:
    """Make a checkpoint for :func:`load_prior` from a foreign generator's weights.

    Args:
        generator: one of :data:`GENERATORS`.
        source: the weights' file, see :func:`ggl_jax.foreign.read`.
        out: the checkpoint's folder; its last part is the prior's name.
        config: a JSON file. For BigGAN, the ``config.json`` beside the weights; by default the
            published one of this size. For a DCGAN, its layers: an object with ``latent_dim``,
            ``layers`` (see :class:`ggl_jax.priors.convolutional.Layer`) and, unless latents are
            normal, ``latents``; by default it is the generator of the paper
            (:mod:`ggl_jax.priors.dcgan`).
        truncation: of BigGAN, see :func:`biggan_deep`.
        image_size: of BigGAN, see :func:`biggan_deep`.
        trained_on: names of the data sets behind the weights, so that an audit can refuse private
            images that the generator has seen; None for what is known of the generator: "imagenet"
            for BigGAN, nothing for others.
        licence_note: for the card.
        command: what was run, for the card.
        num_samples: images drawn into ``samples.png``; 0 for none.

    Returns:
        The card as written.

    Raises:
        GGLError: an unknown generator, an unreadable file, one that does not fit the architecture,
            or a folder that cannot be written.
    """
    source, out = Path(source), Path(out)
    config = None if config is None else Path(config)
    check_known("generator", generator, GENERATORS)
    at_least(0, num_samples=num_samples)
    if generator == "dcgan":
        if truncation != 1.0 or image_size is not None:
            raise GGLError("truncation and image_size belong to BigGAN; leave them out for a dcgan")
        kind, arguments, prior, params = _import_dcgan(source, config)
    else:
        size = int(generator.rpartition("-")[2])
        imported = _import_biggan(size, source, config, truncation, image_size)
        kind, arguments, prior, params = imported
    if trained_on is None:
        trained_on = () if generator == "dcgan" else ("imagenet",)
    card = {
        "name": out.name,
        "kind": kind,
        "arguments": arguments,
        "method": f"imported from foreign weights as {generator}",
        "source": {"file": source.name, "sha256": files.sha256(source)},
        "trained_on": list(trained_on),
        "data": [],
        "licence_note": licence_note,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "files": [checkpoint.CARD, checkpoint.WEIGHTS, *["samples.png"][:num_samples]],
    }
    card = checkpoint.save(out, params, card)
    if num_samples:
        samples(prior, params, jax.random.key(0), num_samples, path=out / "samples.png")
    return card
