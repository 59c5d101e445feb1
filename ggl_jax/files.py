"""Files that are written whole or not at all, whatever ends the process."""

import contextlib
import errno
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ggl_jax.errors import StorageError


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and sync it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise storage_error(path, error) from error


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of text, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """:func:`write_bytes` of indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_png(path: Path, image: np.ndarray) -> None:
    """:func:`write_bytes` of a float image [h w c] in [0, 1], losslessly at 8 bits a channel."""
    write_bytes(path, png_bytes(image))


def read_png(path: Path) -> np.ndarray:
    """An image [h w c] in [0, 1], float32, as :func:`write_png` wrote it."""
    pixels = np.asarray(Image.open(path), np.float32) / 255.0
    return pixels if pixels.ndim == 3 else pixels[..., None]


def png_bytes(image: np.ndarray) -> bytes:
    """A float image [h w c] in [0, 1] as the bytes of a PNG."""
    pixels = np.asarray(np.clip(image, 0.0, 1.0) * 255.0 + 0.5, np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def write_figure(path: Path, figure, *, dpi: int = 130) -> None:
    """:func:`write_bytes` of a matplotlib figure, as a PNG."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    write_bytes(path, stream.getvalue())


def storage_error(path: Path, error: OSError) -> StorageError:
    """What to tell the user of a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = "no space left on the disk"
        remedy = "free some and give the same command again"
    else:
        why, remedy = error.strerror or str(error), "mend that and give the same command again"
    return StorageError(
        f"out: {path} could not be written ({why}); what was finished is kept, {remedy}"
    )
