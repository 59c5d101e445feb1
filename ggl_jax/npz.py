"""Images in .npz files, as audits and the training of priors read them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggl_jax.errors import GGLError, explaining


class Pictures(NamedTuple):
    """What a file holds.

    Attributes:
        images: uint8 [n h w 3], n at least 1.
        labels: int32 [n], at least 0; None where the file has none.
        names: n names, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: list[str] | None


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode(errors="backslashreplace")


def read(path: str | Path) -> Pictures:
    """The arrays ``images``, ``labels`` and ``files`` of an .npz file, checked.

    Pickled arrays could run code, so they are never read. Grey images, [n h w 1] or [n h w], become
    three equal channels.

    Raises:
        GGLError: no such file, a damaged one, no ``images``, or an array of another type, shape or
            range. The message does not name the file.
    """
    if not Path(path).is_file():
        raise GGLError(f"{path} does not exist or is not a file")
    arrays = {}
    remedy = "save it with numpy.savez(path, images=..., labels=...)"
    with explaining("not a readable .npz file", remedy):
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            present = ", ".join(sorted(archive.files)) or "nothing"
            for key in {"images", "labels", "files"} & set(archive.files):
                arrays[key] = np.asarray(archive[key])  # a member that is no array: its bytes
    if "images" not in arrays:
        raise GGLError(f"no array `images`, only {present}; save it as images, uint8 [n, h, w, 3]")
    images = arrays["images"]
    labels, names = (arrays.get(key) for key in ("labels", "files"))
    if images.dtype != np.uint8:
        raise GGLError(
            f"`images` is {images.dtype}, must be uint8; convert with "
            "numpy.rint(255 * images).astype(numpy.uint8) if they are in [0, 1]"
        )
    if images.ndim == 3 and images.shape[-1] > 4:  # else one image, without its first axis
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise GGLError(
            f"`images` has shape {list(images.shape)}, must be [n, h, w, 3], or [n, h, w, 1] if "
            "they are grey"
        )
    size = len(images)
    if not size:
        raise GGLError("holds no images; [n, h, w, 3] with n at least 1 is needed")
    if labels is not None:
        if labels.dtype.kind not in "iub" or labels.shape != (size,):
            raise GGLError(
                f"`labels` is {labels.dtype} {list(labels.shape)}, must be whole numbers [{size}], "
                "one per image"
            )
        if wrong := [int(label) for label in labels if not 0 <= label < 2**31]:
            raise GGLError(f"label {wrong[0]} is not allowed; labels count from 0")
        labels = labels.astype(np.int32)
    if names is not None and (names.shape != (size,) or names.dtype.kind not in "US"):
        raise GGLError(f"`files` is {names.dtype} {list(names.shape)}, must be {size} texts")
    shown = None if names is None else [_text(name) for name in names.tolist()]
    return Pictures(np.broadcast_to(images, (*images.shape[:3], 3)), labels, shown)
