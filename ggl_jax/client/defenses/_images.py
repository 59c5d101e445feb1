"""Defenses that change the client's images before the gradient, and public images for some."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ggl_jax import npz
from ggl_jax.client.defenses._views import nothing_estimated, unchanged
from ggl_jax.client.gradients import gradient
from ggl_jax.errors import GGLError, about
from ggl_jax.types import Defense, Factored, Facts, View

#: The public images that come with scikit-image: 100 grey faces, 25x25, of LFW.
EMBEDDED = "faces"


def of_images(name: str, change: Callable) -> Defense:
    """A defense that takes the gradient of other images than the private ones.

    Args:
        name: its specification.
        change: ``change(key, context) -> (images[b h w c], labels, record)``; labels as
            :func:`ggl_jax.client.gradients.gradient` takes them.

    Returns:
        A Defense with factored form that computes the gradient anew, so it must be the first stage
        of a chain, on a single gradient step. Nothing is estimated, and candidates are compared as
        they are: what the server looks for is the changed image, the one that its update tells.
        What it finds is judged beside the private image.
    """

    def apply(key, update, context):
        del update
        images, labels, record = change(key, context)
        return gradient(context.model, context.variables, images, labels), record

    view = image_view(name.partition(":")[0])
    return Defense(name, apply, view, Facts(replaces_update=True))


def image_view(kind: str) -> View:
    """The server's side of :func:`of_images`."""
    return View(kind, nothing_estimated, unchanged, lambda estimated: Factored(), rounds=None)


@functools.lru_cache(maxsize=8)
def public_set(source: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Public images [n h w c] in [0, 1], and their labels [n], if they have any.

    Args:
        source: "faces" (:data:`EMBEDDED`), or an .npz file as ``--data`` takes it.
        shape: (h, w, c) of the model's images; those of another size are resized, and made grey
            for one channel.

    Raises:
        GGLError: no such file, or one that cannot be read.
    """
    labels = None
    if source == EMBEDDED:
        import skimage.data  # its data sets are only needed here

        pictures = np.rint(255 * skimage.data.lfw_subset()[:100]).astype(np.uint8)
        pictures = np.repeat(pictures[..., None], 3, axis=-1)
    else:
        with about(f"public: {source}"):
            pictures, labels, _ = npz.read(source)
    height, width, channels = shape
    if channels not in (1, 3):
        raise GGLError(f"public: the model's images have {channels} channels, allowed: 1 or 3")
    found = []
    for picture in pictures:
        one = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
        found.append(np.asarray(one.convert("L" if channels == 1 else "RGB"), np.float32) / 255)
    return np.stack(found).reshape(-1, *shape), labels


def check_source(source: str, *also: str) -> None:
    """Raise :class:`GGLError` unless public images are there, or it is one of ``also``."""
    if source not in (EMBEDDED, *also) and not Path(source).is_file():
        allowed = ", ".join((EMBEDDED, *also))
        raise GGLError(f"public: got {source!r}, allowed: {allowed}, or an .npz file that is there")


def draw_public(key: jax.Array, source: str, shape: tuple[int, int, int], num: int) -> jax.Array:
    """``num`` public images, drawn at random with repeats."""
    images, _ = public_set(source, shape)
    return jnp.asarray(images)[jax.random.randint(key, (num,), 0, len(images))]
