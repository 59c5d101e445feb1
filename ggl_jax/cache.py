"""Arrays that are computed once for all processes, beside JAX's compiled programs.

They are where JAX keeps those (``jax_compilation_cache_dir``; the command line chooses the user's
cache folder), and kept only if it does (``jax_enable_compilation_cache``).
"""

import contextlib
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from ggl_jax import files
from ggl_jax.errors import GGLError
from ggl_jax.types import PyTree

#: All that is kept at most; what was used last stays.
MOST_BYTES = 4 * 2**30
#: A file is the arrays' checksum and, one after the other, their bytes.
_CHECKSUM = np.dtype("<u4")


def folder() -> Path | None:
    """Where arrays are kept; None where nothing is."""
    config: Any = jax.config
    programs = config.jax_compilation_cache_dir
    if not programs or "://" in programs or not config.jax_enable_compilation_cache:
        return None
    return Path(programs) / "arrays"


def load(name: str, like: PyTree) -> PyTree | None:
    """What :func:`keep` was given under a name, mapped; None where it is not there, or damaged.

    Args:
        name: a digest of all that the arrays depend on.
        like: a tree of their shapes and types.
    """
    where = folder()
    if where is None:
        return None
    leaves: list[Any] = jax.tree.leaves(like)
    ends = np.cumsum([_CHECKSUM.itemsize, *(x.size * np.dtype(x.dtype).itemsize for x in leaves)])
    try:
        os.utime(where / name)
        raw = np.asarray(np.memmap(where / name, np.uint8, "r"))
    except (OSError, ValueError):  # of an empty file
        return None
    if len(raw) != ends[-1] or zlib.crc32(raw[ends[0] :].data) != raw[: ends[0]].view(_CHECKSUM)[0]:
        return None
    parts = zip(leaves, ends, ends[1:], strict=False)
    arrays = [raw[first:end].view(x.dtype).reshape(x.shape) for x, first, end in parts]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def keep(name: str, tree: PyTree) -> None:
    """Keep arrays under a name, if the disk takes them; those used least recently make way.

    Args:
        name: a digest of all that the arrays depend on.
        tree: of arrays; more than :data:`MOST_BYTES` of them are not kept.
    """
    leaves = map(np.ascontiguousarray, jax.tree.leaves(tree))
    arrays = [x.reshape(-1).view(np.uint8).data for x in leaves]
    where, room = folder(), MOST_BYTES - sum(map(len, arrays))
    if where is None or room < 0:
        return

    def write(file: BinaryIO) -> None:
        found = 0
        file.write(bytes(_CHECKSUM.itemsize))
        for array in arrays:
            found = zlib.crc32(array, found)
            file.write(array)
        file.seek(0)
        file.write(_CHECKSUM.type(found).tobytes())

    with contextlib.suppress(OSError, GGLError):
        where.mkdir(parents=True, exist_ok=True)
        for path in sorted(where.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
        files.write_by(where / name, write)
