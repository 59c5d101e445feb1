"""A folder of results on disk: locked by one run, appended row by row, read by whoever reports.

A sweep's folder holds ``config.json`` (what was asked for), ``plan.json`` (its cells),
``results-0000.jsonl`` (one file for each process, appended and synced), ``reconstructions/`` and
``controls/``. An audit's holds ``config.json``, ``results.jsonl`` and ``reconstructions/``.
"""

import contextlib
import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ggl_jax import files
from ggl_jax.errors import GGLError


class Records(NamedTuple):
    """What a folder holds.

    Attributes:
        folder: where.
        kind: "sweep" or "audit".
        config: the content of ``config.json``.
        cells: cell -> its values on the axes and its gradient evaluations, for all cells that
            were asked for.
        rows: finished cells' rows, one for each image, in the order of the plan.
        failures: cell -> the reason, for the cells whose last attempt failed.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    failures: dict[str, str]

    @property
    def finished(self) -> set[str]:
        """The cells of which every row is there."""
        return {row["cell"] for row in self.rows}

    @property
    def left(self) -> list[str]:
        """The cells that neither finished nor failed."""
        known = self.finished | set(self.failures)
        return [cell for cell in self.cells if cell not in known]


class Lock:
    """Keeps a second run off a folder; the kernel lets go of it when the process ends, any way.

    Network file systems honour it where they support ``flock`` (NFS since Linux 2.6.12).

    Raises:
        GGLError: another process holds it, or this is Windows, which has no such locks.
    """

    def __init__(self, folder: Path, process: int = 0, *, name: str | None = None):
        try:
            import fcntl  # here and not above, so that the package can be imported on Windows
        except ImportError:
            raise GGLError(
                "out: results can be kept on Linux and macOS only; on Windows use WSL, or call "
                "audit without out"
            ) from None
        path = folder / (name or f"lock-{process:04d}")
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise GGLError(
                f"out: {folder} is in use by {holder}; wait for it, or choose another --out"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def release(self) -> None:
        """Let go."""
        self._file.close()


class Journal:
    """One process's results: whole lines, appended in one write and synced.

    They go to ``results-0000.jsonl`` and so on, or to the file ``name``.

    Opening cuts off what a killed run left behind its last finished cell (half a line, or the first
    rows of a batch).
    """

    def __init__(self, folder: Path, process: int = 0, *, name: str | None = None):
        self.path = folder / (name or f"results-{process:04d}.jsonl")
        new = not self.path.exists()
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if new:
            files.sync_folder(folder)
        length = _read_journal(self.path)[1]
        if length < os.fstat(self._handle).st_size:
            os.ftruncate(self._handle, length)
            os.fsync(self._handle)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of one cell, all or none.

        Raises:
            StorageError: the disk is full or not writable; the file is as it was before.
        """
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        before = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, content)
            if written < len(content):  # a full disk takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._handle)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, before)
            if isinstance(error, OSError):
                raise files.storage_error(self.path, error) from error
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of whole cells, and the length in bytes up to the last one's end."""
    content = path.read_bytes()
    entries: list[dict[str, Any]] = []
    whole, position, pending = 0, 0, []
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        if last and not line:
            break
        try:
            row = json.loads(line) if not last else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            row = None
        position += len(line) + 1
        if row is None:
            # Only a run that was killed while writing leaves such a line, and only at the end. A
            # power cut may leave zeros there.
            if last or all(not rest.strip(b"\0") for rest in lines[number + 1 :]):
                break
            raise GGLError(f"out: line {number + 1} of {path} is not JSON; move the file away")
        pending.append(row)
        if row.get("part", 0) + 1 >= row.get("parts", 1):
            entries.extend(pending)
            pending, whole = [], position
    return entries, whole


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a :class:`Journal`, also while it is written; none where it does not exist.

    Raises:
        GGLError: a line in its midst is damaged.
    """
    return _read_journal(path)[0] if path.exists() else []


def read(folder: str | Path) -> Records:
    """Read the folder of a sweep or an audit, also while it runs.

    Raises:
        GGLError: it is neither, or damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", f"{folder} is no folder of ggl-jax sweep or audit")
    if (folder / "plan.json").exists():
        return _read_sweep(folder, config)
    return _read_audit(folder, config)


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        GGLError: there is none; the message is ``otherwise``.
    """
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        pass
    raise GGLError(f"{otherwise} ({path} is missing or damaged)")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two configurations, one line for each: ``"fixed.steps: 4 -> 8"``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(old, list) and isinstance(new, list):
        added = [v for v in new if v not in old]
        gone = [v for v in old if v not in new]
        if added or gone:
            return [f"{name}: + {v!r}" for v in added] + [f"{name}: - {v!r}" for v in gone]
        return [] if old == new else [f"{name}: in another order"]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def _read_sweep(folder: Path, config: dict[str, Any]) -> Records:
    plan = read_json(folder / "plan.json", f"{folder} is damaged")
    cells: dict[str, dict[str, Any]] = plan["cells"]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    for path in sorted(folder.glob("results-*.jsonl")):
        for row in _read_journal(path)[0]:
            cell = row["cell"]
            if "failed" in row:
                failures[cell] = row["failed"]
            elif row["parts"] != len(found.setdefault(cell, {})):
                found[cell][row["part"]] = row
    rows = [found[cell][part] for cell in cells if cell in found for part in sorted(found[cell])]
    return Records(
        folder,
        "sweep",
        config,
        cells,
        rows,
        {cell: why for cell, why in failures.items() if cell in cells and cell not in found},
    )


def _read_audit(folder: Path, config: dict[str, Any]) -> Records:
    rows = read_journal(folder / "results.jsonl")
    # What was asked for, so that an audit that was interrupted does not look finished.
    asked = config.get("asked", {"defenses": [], "images": []})
    cells: dict[str, dict[str, Any]] = {
        f"{defense} {image}": {"defense": defense, "image": image}
        for image in asked["images"]
        for defense in asked["defenses"]
    }
    for row in rows:
        row["cell"] = f"{row['defense']} {row['image']}"
        cells[row["cell"]] = {
            name: row[name] for name in ("attack", "optimizer", "defense", "seed", "image")
        }
    return Records(folder, "audit", config, cells, rows, {})
