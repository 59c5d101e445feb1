"""A folder of results: one file for each finished cell, written whole or not at all.

``config.json`` says what was asked for, ``plan.json`` has every cell's values by its id.
``cells/ID.json`` has a finished cell's rows, or why it failed; what it refers to is on disk before
it is: the images ``cells/ID.npy`` (float32 [b h w c]), their pictures ``cells/ID-0.png`` and so on,
and each image's controls in ``controls/`` (or where its row says). ``results.jsonl`` is an export
of all rows, written at the end of each run and never read.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggl_jax import files
from ggl_jax.errors import GGLError, explaining

#: Of this layout. Folders of another one are refused.
FORMAT = 2


class Records(NamedTuple):
    """What a folder holds.

    Attributes:
        folder: where.
        config: the content of ``config.json``.
        cells: cell -> its values on the axes and its gradient evaluations.
        rows: finished cells' rows, one for each image, in the order of the plan.
        failures: cell -> the reason, for the cells whose last attempt failed.
    """

    folder: Path
    config: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    failures: dict[str, str]

    @property
    def finished(self) -> set[str]:
        """The cells whose rows are there."""
        return {row["cell"] for row in self.rows}

    @property
    def left(self) -> list[str]:
        """The cells that neither finished nor failed."""
        known = self.finished | set(self.failures)
        return [cell for cell in self.cells if cell not in known]

    def image(self, row: Mapping[str, Any]) -> np.ndarray:
        """A row's reconstruction [h w c], float32 in [0, 1], exactly as it was found.

        Raises:
            GGLError: its file is missing or damaged.
        """
        path = self.folder / f"cells/{row['cell']}.npy"
        remedy = f"remove {path.with_suffix('.json')} and run the cell again"
        with explaining(f"{path} is missing or damaged", remedy):
            return np.load(path, allow_pickle=False)[row["part"]]


def in_words(axes: Mapping[str, Any]) -> str:
    """A cell's values on the axes, in words."""
    return ", ".join(f"{name} {value}" for name, value in axes.items() if name != "evaluations")


def read(folder: str | Path) -> Records:
    """Read the folder of an audit or a sweep, also while it runs.

    Raises:
        GGLError: it is neither, of an older version, or damaged.
    """
    folder = Path(folder)
    config = files.read_json(folder / "config.json", f"{folder} is no folder of an audit or sweep")
    check_format(folder, config)
    plan = files.read_json(folder / "plan.json", f"{folder} holds no audit or sweep")
    rows, failures = [], {}
    if not isinstance(plan.get("cells"), dict):
        raise GGLError(f"{folder} holds no audit or sweep ({folder}/plan.json is damaged)")
    for cell in plan["cells"]:
        path = folder / f"cells/{cell}.json"
        if path.exists():
            content = files.read_json(path, f"{folder} is damaged; remove the file")
            rows += content.get("rows", ())
            if "failed" in content:
                failures[cell] = content["failed"]
    return Records(folder, config, plan["cells"], rows, failures)


def check_format(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise :class:`GGLError` for a folder that an older version wrote."""
    older = any(folder.glob("results*.jsonl")) and config.get("format") != FORMAT
    if older or config.get("format", FORMAT) != FORMAT:
        raise GGLError(
            f"out: {folder} was written by another version of ggl-jax, whose folders are not read "
            "any more; run it again in another folder"
        )


def prepare(
    folder: Path,
    config: Mapping[str, Any],
    cells: Mapping[str, Mapping[str, Any]],
    extend: bool | None = None,
    dry: bool = False,
) -> None:
    """Claim a folder for these cells (:func:`ggl_jax.files.claim`) and write their plan.

    Finished cells of an earlier plan stay in it. ``dry``: only refuse what cannot be.

    Raises:
        GGLError: it holds something else (without ``extend``; None: it cannot be given).
    """
    path = folder / "config.json"
    if path.exists():
        check_format(folder, files.read_json(path, f"out: {folder} is damaged"))
    files.claim(folder, {**config, "format": FORMAT}, extend=extend, dry=dry)
    before: dict[str, Any] = {}
    if (folder / "plan.json").exists():
        records = read(folder)
        if not set(cells) <= set(records.cells) and not extend:
            raise GGLError(
                f"out: {folder} holds the same options with another meaning (another version or "
                "preset); choose another --out"
            )
        done = records.finished - set(cells)
        before = {cell: values for cell, values in records.cells.items() if cell in done}
    if dry:
        return
    for name in ("cells", "controls"):
        (folder / name).mkdir(exist_ok=True)
    files.write_json(folder / "plan.json", {"cells": {**before, **cells}})


def keep(folder: Path, cell: str, rows: Sequence[Mapping[str, Any]], images: np.ndarray) -> None:
    """Keep a finished cell's rows and images.

    Raises:
        StorageError: the disk is full or not writable; the cell is then not finished.
    """
    exact = np.asarray(images, np.float32)
    files.write_by(folder / f"cells/{cell}.npy", lambda file: np.save(file, exact))
    kept = []
    for part, (row, image) in enumerate(zip(rows, images, strict=True)):
        name = f"cells/{cell}-{part}.png"
        files.write_png(folder / name, image)
        kept.append({"cell": cell, "part": part, "parts": len(rows), **row, "reconstruction": name})
    files.write_json(folder / f"cells/{cell}.json", {"rows": kept})


def fail(folder: Path, cell: str, why: str) -> None:
    """Keep why a cell failed."""
    files.write_json(folder / f"cells/{cell}.json", {"failed": why})


def export(records: Records) -> None:
    """Write ``results.jsonl``, for other programs to read: a line for each row."""
    lines = "".join(json.dumps(row) + "\n" for row in records.rows)
    files.write_text(records.folder / "results.jsonl", lines)


@contextlib.contextmanager
def lock(folder: Path, name: str = "lock-0000") -> Iterator[None]:
    """Keep a second run off a folder; the kernel lets go of it when the process ends, any way.

    The folder is made where it is missing, and a run that is refused leaves nothing behind.
    Network file systems honour the lock where they support ``flock`` (NFS since Linux 2.6.12).

    Raises:
        GGLError: another process holds it, or this is Windows, which has no such locks.
    """
    try:
        import fcntl  # here and not above, so that the package can be imported on Windows
    except ImportError:
        raise GGLError(
            "out: results can be kept on Linux and macOS only; on Windows use WSL, or call audit "
            "without out"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise GGLError(f"out: {folder} is a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    fresh = not path.exists()
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise GGLError(
                f"out: {folder} is in use by {holder}; wait for it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        except GGLError:
            if fresh:
                path.unlink()
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only if it is empty
            raise
