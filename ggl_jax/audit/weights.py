"""Published weights that do not ship with the project: fetched, checked, converted and kept.

A file is downloaded over HTTPS into a `.part` file, goes on from there when it was cut off, and
counts only once its size and its sha256 are those recorded here. Files are read without running
code that they may hold (torch's `weights_only`, numpy without pickle, safetensors). What is kept
is a checkpoint (see `ggl_jax.checkpoint`) in the user's cache folder, or in the folder that the
environment variable GGL_JAX_WEIGHTS names.
"""

import contextlib
import hashlib
import http.client
import importlib.util
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import platformdirs

from ggl_jax import checkpoint, foreign
from ggl_jax.audit import lpips
from ggl_jax.errors import GGLError
from ggl_jax.types import PyTree

#: The environment variable that names the folder of the weights.
FOLDER_VARIABLE = "GGL_JAX_WEIGHTS"

_CONVERT = "pip install 'ggl-jax[convert]'"
_CHUNK = 2**18
#: Times that a download which was cut off is taken up again, and the pause before, seconds.
_ATTEMPTS, _PAUSE = 4, 1.0
_TIMEOUT = 30.0
_CUT_OFF = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class Source(NamedTuple):
    """A published file.

    Attributes:
        url: its official address.
        sha256: of the whole file.
        size: in bytes.
        licence: of its content.
    """

    url: str
    sha256: str
    size: int
    licence: str

    @property
    def filename(self) -> str:
        return urllib.parse.urlsplit(self.url).path.rsplit("/", 1)[-1]


_TORCHVISION = "https://download.pytorch.org/models/"
# A commit, not a branch: what lies there cannot change.
_LPIPS = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
    "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/"
)
_BACKBONE_LICENCE = (
    "torchvision is BSD-3-Clause; the weights were trained on ImageNet, whose terms may apply"
)
_LIN_LICENCE = "BSD-2-Clause, Copyright (c) 2018 Richard Zhang, Phillip Isola, Alexei A. Efros, "
_LIN_LICENCE += "Eli Shechtman, Oliver Wang"

#: Name -> the files that it is made of.
SOURCES: dict[str, tuple[Source, ...]] = {
    "lpips-vgg": (
        Source(
            _TORCHVISION + "vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            553_433_881,
            _BACKBONE_LICENCE,
        ),
        Source(
            _LPIPS + "vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            7_289,
            _LIN_LICENCE,
        ),
    ),
    "lpips-alex": (
        Source(
            _TORCHVISION + "alexnet-owt-7be5be79.pth",
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            244_408_911,
            _BACKBONE_LICENCE,
        ),
        Source(
            _LPIPS + "alex.pth",
            "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
            6_009,
            _LIN_LICENCE,
        ),
    ),
    "lpips-squeeze": (
        Source(
            _TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
            "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
            4_958_839,
            _BACKBONE_LICENCE,
        ),
        Source(
            _LPIPS + "squeeze.pth",
            "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
            10_811,
            _LIN_LICENCE,
        ),
    ),
}

#: ``progress(file, bytes_done, bytes_in_all)``.
Progress = Callable[[str, int, int], None]


def folder() -> Path:
    """Where weights are kept: GGL_JAX_WEIGHTS, or `weights` in the user's cache folder."""
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
    shapes = lpips.torch_shapes(backbone)
    path = installed().get(f"lpips-{backbone}")
    if path is None:
        return None
    tree, _ = checkpoint.load(path)
    template = lpips.from_torch({k: np.zeros(s, np.float32) for k, s in shapes.items()}, backbone)
    if jax.tree.map(np.shape, tree) != jax.tree.map(np.shape, template):
        raise GGLError(
            f"checkpoint {path}: its arrays are not those of lpips-{backbone}; remove the folder "
            f"and run ggl-jax weights lpips-{backbone}"
        )
    return jax.tree.map(jax.numpy.asarray, tree)


# --- downloads --------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(source: Source, target: Path, *, progress: Progress | None = None) -> Path:
    """Fetch a file, or the rest of it; `target` appears whole and checked, or not at all.

    What has arrived is kept beside it as `<target>.part`, also after Ctrl-C, and a later call goes
    on from there where the server allows it.

    Args:
        source: the file. Its size and sha256 are checked when it is complete.
        target: where to put it; a file that is already there is checked, not fetched again.
        progress: called as bytes arrive.

    Returns:
        `target`.

    Raises:
        GGLError: no connection, an answer other than the file (404, ...), a download that stays
            cut off, a full disk, or another size or sha256 than recorded; then the file is removed.
    """
    if target.exists() and target.stat().st_size == source.size:
        if _sha256(target) == source.sha256:
            return target
        target.unlink()
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            # Cut off: the size tells.
            with contextlib.suppress(*_CUT_OFF):
                _fetch(source, part, progress)
            have = part.stat().st_size if part.exists() else 0
            if have >= source.size:
                break
        else:
            raise GGLError(
                f"{source.url}: cut off at {have:,} of {source.size:,} bytes; the same command "
                "goes on from there"
            )
        found = _sha256(part)
        if have != source.size or found != source.sha256:
            part.unlink()
            raise GGLError(
                f"{source.url}: got {have:,} bytes with sha256 {found[:12]}..., expected "
                f"{source.size:,} with {source.sha256[:12]}...; nothing was kept, try again or "
                "give the file with --from"
            )
        part.replace(target)
    except OSError as error:
        raise GGLError(
            f"cannot write {part}: {error.strerror or error}; the file takes {source.size:,} "
            "bytes; make room or choose another folder with --out, the same command goes on"
        ) from error
    return target


def _fetch(source: Source, part: Path, progress: Progress | None) -> None:
    """One request: appends to `part` what it still lacks, until the connection ends."""
    have = part.stat().st_size if part.exists() else 0
    if have >= source.size:
        return
    # identity: a compressed answer would have other bytes and another length
    headers = {"User-Agent": "ggl-jax", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(source.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # the server's file ends before ours: start afresh
            part.unlink()
            return
        raise GGLError(
            f"{source.url}: the server answers {error.code} {error.reason}; fetch the file by "
            "other means and give it with --from"
        ) from None
    except urllib.error.URLError as error:
        raise GGLError(
            f"{source.url}: no connection ({error.reason}); where there is no network, fetch the "
            "file elsewhere and give it with --from"
        ) from None
    with response:
        if source.url.startswith("https:") and not response.url.startswith("https:"):
            raise GGLError(f"{source.url}: redirected to {response.url}, which is not encrypted")
        # A server without ranges sends the whole file: then what there was is written over.
        resumes = response.status == 206
        if resumes:
            sent, _, total = response.headers.get("Content-Range", "").partition("/")
            if not sent.startswith(f"bytes {have}-"):
                part.unlink()
                return
        else:
            have, total = 0, response.headers.get("Content-Length", "")
        if total.isdigit() and int(total) != source.size:
            part.unlink(missing_ok=True)
            raise GGLError(
                f"{source.url}: the server offers {int(total):,} bytes, expected {source.size:,}: "
                "another file; fetch it by other means and give it with --from"
            )
        with part.open("ab" if resumes else "wb") as file:
            # One byte more than expected is enough to see that it is another file.
            while have <= source.size and (chunk := response.read(_CHUNK)):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(source.filename, have, source.size)


def _require(module: str, path: Path | str) -> None:
    if importlib.util.find_spec(module) is None:
        raise GGLError(f"{path}: reading this file needs {module}; {_CONVERT}")


# --- installation -----------------------------------------------------------------------------


def install(
    name: str,
    *,
    files: Sequence[Path | str] = (),
    out: Path | str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Path:
    """Fetch or read published weights, convert them and keep them with a card.

    Args:
        name: one of `SOURCES`.
        files: read these instead of downloading: one or several files of torch's names that
            together hold the network's `features.*` and LPIPS' `lin*.model.1.weight`. Their
            tensors' names, shapes and finiteness are checked; their sha256 is written to the card
            and compared with nothing, since these may be any weights of that shape.
        out: folder to keep them in; by default `folder()`.
        command: for the card.
        progress: called as bytes arrive.

    Returns:
        The checkpoint's folder, `out/name`; an older one there is replaced.

    Raises:
        GGLError: see `download`, `ggl_jax.foreign.read` and `ggl_jax.audit.lpips.from_torch`.
    """
    if name not in SOURCES:
        raise GGLError(f"weights: got {name!r}, allowed: {', '.join(SOURCES)}")
    backbone = name.removeprefix("lpips-")
    out = folder() if out is None else Path(out)
    downloads = out / "downloads"
    if files:
        paths = [Path(file) for file in files]
    else:
        # before half a gigabyte is fetched for nothing
        _require("torch", SOURCES[name][0].url)
        paths = [
            download(source, downloads / f"{name}-{source.filename}", progress=progress)
            for source in SOURCES[name]
        ]
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        found = foreign.read(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise GGLError(f"from: {twice[0]} is in {path} and in a file before it")
        tensors |= found
    if files and not any(tensor.startswith("lin") for tensor in tensors):
        raise GGLError(
            f"from: LPIPS' linear layers (lin0.model.1.weight, ...) are missing; give the file "
            f"{SOURCES[name][1].url} as well"
        )
    params = lpips.from_torch(tensors, backbone)
    digests = [_sha256(path) for path in paths]
    if files:
        sources = [
            {"file": path.name, "sha256": digest, "licence": "not known: a file of the user's"}
            for path, digest in zip(paths, digests, strict=True)
        ]
    else:
        sources = [
            {"file": s.filename, "url": s.url, "sha256": digest, "licence": s.licence}
            for s, digest in zip(SOURCES[name], digests, strict=True)
        ]
    card = {
        "name": name,
        "kind": "lpips",
        "arguments": {"backbone": backbone},
        "version": "0.1",
        "reference": "Zhang et al., The unreasonable effectiveness of deep features as a "
        "perceptual metric, CVPR 2018",
        "sources": sources,
        "command": command,
    }
    checkpoint.save(out / name, params, card)
    if not files:
        # The classifier alone is nine tenths of them; what is needed is in the checkpoint.
        for path in paths:
            path.unlink()
        with contextlib.suppress(OSError):
            downloads.rmdir()
    return out / name
