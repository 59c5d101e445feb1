"""Tensor files of other libraries, read as named numpy arrays.

Only arrays are ever read: a file that would run code when it is loaded is refused.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ggl_jax.errors import GGLError, explaining
from ggl_jax.types import Path as TreePath
from ggl_jax.types import PyTree

#: What :func:`read` understands, by the end of the file's name.
SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".npz")

#: How torch calls an array of a layer.
NAMES = {
    **{"kernel": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}

#: Torch's batch norms count their batches in tensors that nobody needs.
COUNTER = "num_batches_tracked"

#: Entries under which checkpoints keep their tensors beside other things; the first one counts.
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net", "module", "gradients", "update")

#: What wrappers of torch modules put before all names.
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")


def _read_torch(path: Path) -> Any:
    import torch

    with warnings.catch_warnings(action="ignore"):  # of a file that is refused anyway, or read
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


def _read_npz(path: Path) -> Any:
    stored = np.load(path, allow_pickle=False)
    if not isinstance(stored, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array, not an archive of named ones")
    with stored:
        return {name: stored[name] for name in stored.files}


def _to_numpy(value) -> np.ndarray:
    """An array or a torch tensor as numpy; bfloat16, which numpy lacks, becomes float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return value.numpy()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"no numbers but {type(value).__name__} of {array.dtype}")
    return array


def as_arrays(tensors: Mapping[str, Any], *, source: str = "state_dict") -> dict[str, np.ndarray]:
    """A mapping of names to tensors as numpy arrays, without its usual wrappings.

    Args:
        tensors: name -> array, torch tensor (on any device) or number. A checkpoint that holds its
            tensors under an entry ``"state_dict"``, ``"model_state_dict"``, ``"model"`` and the
            like is unwrapped, and the prefixes that torch's wrappers give to all names
            (``module.``, ``model.``, ``_orig_mod.``) are taken off.
        source: what to call it in errors, such as the file's path.

    Returns:
        Name -> array, in the mapping's own order. Types are kept, save that bfloat16 becomes
        float32. Arrays may share memory with the tensors.

    Raises:
        GGLError: no mapping, an empty one, or an entry that is no array of numbers.

    >>> as_arrays({"state_dict": {"module.bias": [1.0, 2.0]}})
    {'bias': array([1., 2.])}
    """
    while isinstance(tensors, Mapping):
        inner = [w for w in _WRAPPINGS if isinstance(tensors.get(w), Mapping)]
        if not inner:
            break
        tensors = tensors[inner[0]]
    if not isinstance(tensors, Mapping) or not tensors:
        raise GGLError(
            f"{source}: holds {'no entries' if tensors == {} else type(tensors).__name__}, not "
            "named tensors; save a state_dict"
        )
    arrays = {}
    for name, value in tensors.items():
        what = f"{source}: entry {name!r} is no tensor"
        with explaining(what, "save a plain state_dict", (TypeError, ValueError)):
            arrays[str(name)] = _to_numpy(value)
    return unprefixed(arrays)


def unprefixed(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same values without the wrappers' prefixes that all of their names have.

    >>> unprefixed({"_orig_mod.module.fc.bias": 0})
    {'fc.bias': 0}
    """
    named = dict(named)
    while named and (shared := [p for p in _PREFIXES if all(name.startswith(p) for name in named)]):
        named = {name.removeprefix(shared[0]): value for name, value in named.items()}
    return named


def read(path) -> dict[str, np.ndarray]:
    """Read the named tensors of a file that another library wrote.

    Args:
        path: ``.bin``, ``.pt`` or ``.pth`` (torch; read with ``weights_only=True``, so that no code
            in it runs; needs torch), ``.safetensors`` (needs safetensors) or ``.npz``. Both
            packages come with ``pip install 'ggl-jax[convert]'``.

    Returns:
        Name -> array, unwrapped as by :func:`as_arrays`.

    Raises:
        GGLError: no such file, another type of file, a damaged one, one that holds more than
            tensors, or a package that is not installed.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix, _read_torch)
    if path.suffix not in SUFFIXES:
        raise GGLError(f"{path}: unknown type of tensor file; give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise GGLError(f"{path} does not exist or is not a file")
    # torch's refusals, safetensors' own exceptions, zipfile's and numpy's
    what = f"{path} cannot be read or holds more than tensors"
    with explaining(what, "fetch it again, or save its plain state_dict"):
        try:
            tensors = reader(path)
        except ImportError as error:
            package = "safetensors" if reader is _read_safetensors else "torch"
            raise GGLError(
                f"{path}: reading {path.suffix} files needs the package {package}; install it "
                "with: pip install 'ggl-jax[convert]'"
            ) from error
    return as_arrays(tensors, source=str(path))


def read_or_take(state_dict_or_path) -> dict[str, np.ndarray]:
    """:func:`as_arrays` of a mapping, :func:`read` of anything else."""
    if isinstance(state_dict_or_path, Mapping):
        return as_arrays(state_dict_or_path)
    return read(state_dict_or_path)


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_shapes(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Check that ``arrays`` are exactly the expected ones.

    Args:
        arrays: name -> array.
        expected: name -> shape.
        what: the thing that they should be, for the message, e.g. "BigGAN-deep-256".

    Raises:
        GGLError: names missing or unknown, or other shapes; the message names them (the first
            eight of each kind).
    """
    missing = [name for name in expected if name not in arrays]
    unknown = [name for name in arrays if name not in expected]
    misshapen = [
        f"{name} {list(arrays[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
    wrong = [f"{kind}: {_listed(names)}" for kind, names in kinds if names]
    if wrong:
        raise GGLError(f"the tensors are not those of {what}; {'; '.join(wrong)}")


def channels_last(array):
    """Torch's axes to ours: [out in ...] to [... in out], vectors as they are."""
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Torch's shape of an array of ours.

    >>> channels_first((3, 3, 16, 32)), channels_first((32,))
    ((32, 16, 3, 3), (32,))
    """
    return (*shape[:-3:-1], *shape[:-2])


class Tensor(NamedTuple):
    """What is expected of a foreign tensor, and what becomes of it.

    Attributes:
        shape: in the file.
        path: where it goes in nested dicts; empty for one that must be there and is not kept.
        change: from the file's axes to ours.
    """

    shape: tuple[int, ...]
    path: TreePath = ()
    change: Callable[[Any], Any] = channels_last


def convert(
    tensors: Mapping[str, np.ndarray], layout: Mapping[str, Tensor], *, what: str
) -> PyTree:
    """Foreign tensors under our names and axes; every one of them is accounted for.

    Args:
        tensors: name -> array, as from :func:`read`. Torch's counters (``num_batches_tracked``)
            are left out.
        layout: name -> what is expected of it.
        what: the thing that they should be, for errors.

    Returns:
        Nested dicts of float32 numpy arrays.

    Raises:
        GGLError: names missing or unknown, other shapes, or values that are not finite real
            numbers; the message names the tensors.

    >>> convert({"fc.weight": np.ones((2, 3))}, {"fc.weight": Tensor((2, 3), ("kernel",))}, what="")
    {'kernel': array([[1., 1.],
           [1., 1.],
           [1., 1.]], dtype=float32)}
    """
    arrays = {k: np.asarray(v) for k, v in tensors.items() if not k.endswith(COUNTER)}
    check_shapes(arrays, {name: tensor.shape for name, tensor in layout.items()}, what=what)
    kept: dict[TreePath, np.ndarray] = {}
    for name, tensor in layout.items():
        if not tensor.path:
            continue
        array = tensor.change(arrays[name])
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise GGLError(
                f"tensor {name} of {what} is not of finite real numbers; give one from before "
                "NaN or infinity came up"
            )
        kept[tensor.path] = np.array(array, np.float32, order="C")
    return traverse_util.unflatten_dict(kept)
