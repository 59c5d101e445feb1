"""Files that are written whole or not at all, whatever ends the process, and their digests."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from PIL import Image

from ggl_jax.errors import GGLError, StorageError


def digest(*parts: Any) -> str:
    """sha256, as 64 hexadecimal digits, of values by their content.

    Args:
        *parts: bytes, arrays (shape, type and entries count), typed keys, what JSON has, and
            mappings (in any order of their keys), lists and tuples of these.
    """
    found = hashlib.sha256()

    def feed(part):
        if isinstance(part, Mapping):
            found.update(f"{{{len(part)}".encode())
            for key in sorted(part, key=str):
                feed(str(key))
                feed(part[key])
        elif isinstance(part, list | tuple):
            found.update(f"[{len(part)}".encode())
            for one in part:
                feed(one)
        elif isinstance(part, jax.Array) and jax.dtypes.issubdtype(part.dtype, jax.dtypes.prng_key):
            feed(jax.random.key_data(part))
        elif isinstance(part, np.ndarray | np.generic | jax.Array):
            array = np.asarray(part)
            found.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        elif isinstance(part, bytes):
            found.update(f"b{len(part)}".encode() + part)
        else:
            found.update(json.dumps(part).encode() + b"\n")

    feed(parts)
    return found.hexdigest()


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        GGLError: there is none; the message is ``otherwise``.
    """
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise GGLError(f"{otherwise} ({path} is missing or damaged)")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a table below its heading, by their columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two configurations, one line for each: ``"fixed.steps: 4 -> 8"``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(old, list) and isinstance(new, list):
        added = [v for v in new if v not in old]
        gone = [v for v in old if v not in new]
        if added or gone:
            return [f"{name}: + {v!r}" for v in added] + [f"{name}: - {v!r}" for v in gone]
        return [] if old == new else [f"{name}: in another order"]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def claim(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str = "config.json",
    guest: bool = False,
    extend: bool | None = None,
    dry: bool = False,
) -> dict[str, Any]:
    """Make a folder a run's own, or go on in it; refuse one that holds something else.

    What was asked for is in ``config["options"]``, and the digests of what it was asked of in
    ``config["inputs"]``; both have to be the same as when the folder was claimed first.

    Args:
        folder: made where it is missing.
        config: values of JSON.
        name: of the file that keeps ``config``.
        guest: whether the folder may hold other things: a measurement beside a run's results.
        extend: whether to go on although something differs; the earlier configurations are then
            kept in ``"history"``. None: the run cannot do that.
        dry: write nothing; only refuse.

    Returns:
        The configuration that the folder has now.

    Raises:
        GGLError: it holds another run, naming what differs; something else; or it is a file.
    """
    path = folder / name
    wanted: dict[str, Any] = json.loads(json.dumps(config))
    if folder.exists() and not folder.is_dir():
        raise GGLError(f"out: {folder} is a file; choose another --out")
    if path.exists():
        old = read_json(path, f"out: {folder} is damaged; choose another --out")
        before, now = (
            {"": c.get("options", {}), "inputs": c.get("inputs", {})} for c in (old, wanted)
        )
        changed = [line.removeprefix(".") for line in differences(before, now)]
        if not changed:
            return old
        if not extend:
            remedy = "choose another --out"
            if extend is not None:
                remedy = f"give --extend to go on and keep what is finished, or {remedy}"
            raise GGLError(f"out: {folder} holds something else: {'; '.join(changed)}; {remedy}")
        past = [*old.get("history", []), {k: v for k, v in old.items() if k != "history"}]
        wanted["history"] = past
    elif (
        not guest
        and folder.is_dir()
        and any(not one.name.startswith("lock-") for one in folder.iterdir())
    ):
        raise GGLError(
            f"out: {folder} is not an empty folder and not an earlier run; choose another --out"
        )
    if not dry:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    return wanted


@contextlib.contextmanager
def claimed(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """:func:`claim`, taken back where what follows is refused before anything else is kept."""
    new = not folder.exists()
    claim(folder, config)
    try:
        yield
    except GGLError:
        if new and [path.name for path in folder.iterdir()] == ["config.json"]:
            shutil.rmtree(folder)
        raise


def sha256(path: str | Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_by(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all, by a function of it, and sync it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise storage_error(path, error) from error


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_by` of bytes."""
    write_by(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of text, as UTF-8; bytes of a path that are none become escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """:func:`write_bytes` of indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_png(path: Path, image: np.ndarray) -> None:
    """:func:`write_by` of a float image [h w c] in [0, 1], losslessly at 8 bits a channel."""
    pixels = np.asarray(np.clip(image, 0.0, 1.0) * 255.0 + 0.5, np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    write_by(path, lambda file: picture.save(file, format="PNG"))


def write_figure(path: Path, figure, *, dpi: int = 130) -> None:
    """:func:`write_by` of a matplotlib figure, as a PNG."""
    write_by(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


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
