"""Weights on disk: an orbax checkpoint beside a JSON card that says what they are.

A checkpoint is a folder:

    card.json    what the weights are, where they come from, their shapes and their sha256
    weights/     the arrays, as orbax writes them

Arrays are saved and loaded as numpy arrays, so a checkpoint made on one machine loads on any
other, whatever its devices. Weights shipped with the project are found by name (``find``).
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ggl_jax import machine, trees
from ggl_jax.errors import GGLError, did_you_mean, explaining

CARD, WEIGHTS = "card.json", "weights"


def _named_leaves(tree) -> dict[str, np.ndarray]:
    """Leaves by slash-separated path, sorted by that name."""
    return dict(sorted(trees.named(jax.tree.map(np.asarray, tree)).items()))


def _describe(array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def sha256(tree) -> str:
    """The sha256 of a tree of arrays: of its values, not of the files that hold them.

    Hashed, leaf by leaf in the order of their names ("params/dense/kernel"): the line
    ``<name> <dtype>[<shape>]`` with a newline, in UTF-8, then the values in C order, little-endian.
    """
    digest = hashlib.sha256()
    for name, array in _named_leaves(tree).items():
        digest.update(f"{name} {_describe(array)}\n".encode())
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_free(path) -> None:
    """Refuse a folder that holds anything but a checkpoint, which would be replaced.

    Raises:
        GGLError: it names the folder.
    """
    if Path(path).exists() and not (Path(path) / CARD).is_file():
        raise GGLError(f"{path} exists and is no checkpoint (no {CARD}); give another folder")


def save(path, tree, card: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint; all of it or nothing.

    Args:
        path: the folder; an older checkpoint there is replaced, anything else is an error.
        tree: nested dicts (string keys) of arrays, at least one.
        card: what the weights are, in values that JSON holds.

    Returns:
        The card as written: ``card`` with ``sha256`` (see ``sha256``) and ``arrays`` (name ->
        "dtype[shape]") added.

    Raises:
        GGLError: the folder holds something else, or cannot be written.
    """
    path = Path(path)
    check_free(path)
    tree = jax.tree.map(np.asarray, tree)
    arrays = {name: _describe(array) for name, array in _named_leaves(tree).items()}
    card = {**card, "sha256": sha256(tree), "arrays": arrays}
    staging = path.with_name(path.name + ".tmp").absolute()
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(staging / WEIGHTS, args=ocp.args.PyTreeSave(tree))
        # orbax's mark of completion for stores without rename; it names this machine's path
        (staging / WEIGHTS / "commit_success.txt").unlink(missing_ok=True)
        (staging / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        staging.rename(path)
    except OSError as error:
        raise GGLError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return card


def load_card(path) -> dict[str, Any]:
    """Read a checkpoint's card.

    Raises:
        GGLError: no such folder, no card, or a card that is not JSON or lacks its hash.
    """
    path = Path(path)
    if not path.is_dir():
        raise GGLError(f"checkpoint {path} does not exist or is not a folder")
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GGLError(f"{path} is no checkpoint: it has no {CARD}") from None
    except (OSError, ValueError) as error:
        raise GGLError(f"{path / CARD} cannot be read: {error}") from error
    if not isinstance(card, dict) or not {"sha256", "arrays"} <= card.keys():
        raise GGLError(f"{path / CARD} is no card: it lacks `sha256` or `arrays`")
    return card


def load(path) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint and checks it against its card.

    Args:
        path: the folder.

    Returns:
        ``(tree, card)``: nested dicts of numpy arrays, and the card.

    Raises:
        GGLError: missing folder, missing or corrupt card or weights, other arrays or shapes than
            the card says, or other values than its sha256 says.
    """
    path = Path(path)
    card = load_card(path)
    machine.devices()  # orbax wants them, and a missing one is no damage
    weights = (path / WEIGHTS).absolute()
    if not weights.is_dir():
        raise GGLError(f"checkpoint {path} has no {WEIGHTS} folder; fetch it again")
    with explaining(f"checkpoint {path}: {WEIGHTS} is damaged", "fetch it again"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(weights)
        # as numpy whatever wrote it; a damaged file may surface here as a wrong type
        tree = jax.tree.map(np.asarray, tree)
        found = {name: _describe(array) for name, array in _named_leaves(tree).items()}
    expected = card["arrays"]
    if found != expected:
        names = sorted(found.keys() | expected.keys())
        name = next(n for n in names if found.get(n) != expected.get(n))
        raise GGLError(
            f"checkpoint {path} does not match its card: {name} is {found.get(name, 'absent')}, "
            f"the card says {expected.get(name, 'absent')}; fetch it again"
        )
    actual = sha256(tree)
    if actual != card["sha256"]:
        raise GGLError(
            f"checkpoint {path} does not match its card: sha256 {actual[:12]}..., the card says "
            f"{str(card['sha256'])[:12]}...; fetch it again"
        )
    return tree, card


def _shelves() -> list[Path]:
    """Where shipped checkpoints lie: inside the installed package, or the source tree's top."""
    package = Path(__file__).resolve().parent
    return [package / "checkpoints", package.parent / "checkpoints"]


def shipped() -> dict[str, Path]:
    """Name -> folder of the checkpoints that came with the project; empty if there are none."""
    found: dict[str, Path] = {}
    for shelf in _shelves():
        if shelf.is_dir():
            for card in sorted(shelf.glob(f"*/{CARD}")):
                found.setdefault(card.parent.name, card.parent)
    return found


def find(path_or_name) -> Path:
    """A checkpoint's folder, from its path or the name of a shipped one; a path goes first.

    Raises:
        GGLError: neither; the message lists the shipped names.
    """
    path = Path(path_or_name)
    if path.is_dir():
        return path
    names = shipped()
    if str(path_or_name) in names:
        return names[str(path_or_name)]
    listed = ", ".join(names) or "none"
    hint = did_you_mean(str(path_or_name), names, before="; ")
    raise GGLError(
        f"checkpoint {path_or_name} is neither a folder nor a shipped one ({listed}){hint}"
    )
