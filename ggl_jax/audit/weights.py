"""Published weights that do not ship with the project: fetched, checked, converted and kept.

A file counts only once its sha256 is the one recorded here. Files are read without running code
that they may hold (torch's ``weights_only``, numpy without pickle, safetensors). What is kept is a
checkpoint (see :mod:`ggl_jax.checkpoint`) in the user's cache folder, or in the folder that the
environment variable GGL_JAX_WEIGHTS names.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import platformdirs

from ggl_jax import checkpoint, files, foreign
from ggl_jax.audit import lpips
from ggl_jax.errors import GGLError, check_known, explaining
from ggl_jax.types import PyTree

#: The environment variable that names the folder of the weights.
FOLDER_VARIABLE = "GGL_JAX_WEIGHTS"
#: Seconds without an answer after which a server counts as absent.
_TIMEOUT = 30


class Source(NamedTuple):
    """A published file.

    Attributes:
        url: its official address.
        sha256: of the file.
        licence: of its content.
    """

    url: str
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


def _recorded() -> dict[str, tuple[Source, ...]]:
    table = files.read_csv(Path(__file__).parent / "weights.csv")
    rows = [(row.pop("name"), Source(**row)) for row in table]
    return {name: tuple(source for own, source in rows if own == name) for name, _ in rows}


#: Name -> the files that it is made of. LPIPS' own are of a commit, not of a branch, so that what
#: lies there cannot change; torchvision's weights were trained on ImageNet.
SOURCES: dict[str, tuple[Source, ...]] = _recorded()


def folder() -> Path:
    """Where weights are kept: GGL_JAX_WEIGHTS, or ``weights`` in the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(platformdirs.user_cache_dir("ggl_jax")) / "weights"


def installed() -> dict[str, Path]:
    """Name -> checkpoint of the weights that are there."""
    found = {name: folder() / name for name in SOURCES}
    return {name: path for name, path in found.items() if (path / checkpoint.CARD).is_file()}


def load_lpips(backbone: str) -> PyTree | None:
    """The parameters of LPIPS with that backbone, or None where they are not installed.

    Raises:
        GGLError: an unknown backbone, or weights that are damaged or not those of this backbone.
    """
    layout = lpips.torch_layout(backbone)
    path = installed().get(f"lpips-{backbone}")
    if path is None:
        return None
    tree, _ = checkpoint.load(path)
    zeros = {name: np.zeros(tensor.shape, np.float32) for name, tensor in layout.items()}
    if jax.tree.map(np.shape, tree) != jax.tree.map(np.shape, lpips.from_torch(zeros, backbone)):
        raise GGLError(
            f"checkpoint {path}: its arrays are not those of lpips-{backbone}; remove the folder "
            f"and run ggl-jax weights lpips-{backbone}"
        )
    return jax.tree.map(jax.numpy.asarray, tree)


def download(source: Source, target: Path) -> Path:
    """Fetch a file; ``target`` appears whole and checked, or not at all.

    Args:
        source: the file.
        target: where to put it; a file that is already there is checked, and fetched again only
            where it is another.

    Raises:
        GGLError: no connection, an answer other than the file (404, ...), a download that is cut
            off, another sha256 than recorded, or a full disk.
    """
    import pooch  # imports requests, which takes a while and only downloads need

    show = sys.stderr.isatty()
    fetch = pooch.HTTPDownloader(progressbar=show, timeout=_TIMEOUT)
    # pooch's own messages go to the stream that was stderr when it was imported, closed or not.
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    what = f"{source.url} could not be fetched to {target.parent}"
    remedy = "try again, or fetch the file by other means and give it with --from"
    try:
        with explaining(what, remedy, (OSError, ValueError)):  # requests' errors are OSErrors
            pooch.retrieve(
                source.url,
                f"sha256:{source.sha256}",
                fname=target.name,
                path=target.parent,
                downloader=fetch,
            )
    finally:
        logger.setLevel(level)
    return target


def _read(name: str, files_given: Sequence[Path]) -> dict[str, np.ndarray]:
    """All tensors of several files; the user's are told what they lack."""
    tensors: dict[str, np.ndarray] = {}
    for path in files_given:
        found = foreign.read(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise GGLError(f"from: {twice[0]} is in {path} and in a file before it")
        tensors |= found
    if not any(tensor.startswith("lin") for tensor in tensors):
        raise GGLError(
            "from: LPIPS' linear layers (lin0.model.1.weight, ...) are missing; give the file "
            f"{SOURCES[name][1].url} as well"
        )
    return tensors


def install(
    name: str, *, given: Sequence[Path | str] = (), out: Path | str | None = None, command: str = ""
) -> Path:
    """Fetch or read published weights, convert them and keep them with a card.

    Args:
        name: a key of :data:`SOURCES`.
        given: read these instead of downloading: one or several files of torch's names that
            together hold the network's ``features.*`` and LPIPS' ``lin*.model.1.weight``. Their
            tensors' names, shapes and finiteness are checked; their sha256 is written to the card
            and compared with nothing, since these may be any weights of that shape.
        out: folder to keep them in; by default :func:`folder`.
        command: for the card.

    Returns:
        The checkpoint's folder, ``out/name``; an older one there is replaced.

    Raises:
        GGLError: see :func:`download`, :func:`ggl_jax.foreign.read` and
            :func:`ggl_jax.foreign.convert`.
    """
    check_known("weights", name, SOURCES)
    out = folder() if out is None else Path(out)
    paths = [Path(file) for file in given]
    if not given:
        if importlib.util.find_spec("torch") is None:  # before half a gigabyte is fetched
            raise GGLError(
                f"weights: reading {SOURCES[name][0].url} needs torch; "
                "pip install 'ggl-jax[convert]'"
            )
        downloads = out / "downloads"
        paths = [download(s, downloads / f"{name}-{s.filename}") for s in SOURCES[name]]
    params = lpips.from_torch(_read(name, paths), backbone := name.removeprefix("lpips-"))
    about = [{"url": s.url, "licence": s.licence} for s in SOURCES[name]]
    if given:
        about = [{"licence": "not known: a file of the user's"} for _ in given]
    card = {
        "name": name,
        "kind": "lpips",
        "arguments": {"backbone": backbone},
        "version": "0.1",
        "reference": "Zhang et al., The unreasonable effectiveness of deep features as a "
        "perceptual metric, CVPR 2018",
        "sources": [
            {"file": path.name, "sha256": files.sha256(path), **more}
            for path, more in zip(paths, about, strict=True)
        ],
        "command": command,
    }
    checkpoint.save(out / name, params, card)
    if not given:
        # The classifier alone is nine tenths of them; what is needed is in the checkpoint.
        for path in paths:
            path.unlink()
        with contextlib.suppress(OSError):
            downloads.rmdir()
    return out / name
