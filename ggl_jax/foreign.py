"""Tensor files of other libraries, read as named numpy arrays.

Only arrays are ever read: a file that would run code when it is loaded is refused.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ggl_jax.errors import GGLError

#: What `read` understands, by the end of the file's name.
SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".npz")


def _reason(error: BaseException) -> str:
    """An error's first line, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _missing_package(path, package: str) -> GGLError:
    return GGLError(
        f"{path}: reading {path.suffix} files needs the package {package}; "
        "install it with: pip install 'ggl-jax[convert]'"
    )


def _read_torch(path: Path) -> Any:
    import torch

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
        raise TypeError(f"no array of numbers but {type(value).__name__}")
    return array


def as_arrays(tensors: Mapping[str, Any], *, source: str = "state_dict") -> dict[str, np.ndarray]:
    """A mapping of names to tensors as numpy arrays, without its usual wrappings.

    Args:
      tensors: name -> array, torch tensor (on any device) or number. A checkpoint that holds its
        tensors under the one entry `"state_dict"` is unwrapped, and the prefix `module.` that
        torch's `DataParallel` gives to all names is taken off.
      source: what to call it in errors, such as the file's path.

    Returns:
      Name -> array, in the mapping's own order. Types are kept, save that bfloat16 becomes
      float32. Arrays may share memory with the tensors.

    Raises:
      GGLError: no mapping, an empty one, or an entry that is no array of numbers.
    """
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping) or not tensors:
        raise GGLError(
            f"{source}: holds {'no entries' if tensors == {} else type(tensors).__name__}, not "
            "named tensors; save a state_dict"
        )
    arrays = {}
    for name, value in tensors.items():
        try:
            arrays[str(name)] = _to_numpy(value)
        except (TypeError, ValueError) as error:
            raise GGLError(
                f"{source}: entry {name!r} is no tensor ({_reason(error)}); save a plain state_dict"
            ) from error
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


def read(path) -> dict[str, np.ndarray]:
    """Reads the named tensors of a file that another library wrote.

    Args:
      path: `.bin`, `.pt` or `.pth` (torch; read with `weights_only=True`, so that no code in it
        runs; needs torch), `.safetensors` (needs safetensors) or `.npz`. Both packages come with
        `pip install 'ggl-jax[convert]'`.

    Returns:
      Name -> array, unwrapped as by `as_arrays`.

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
    try:
        tensors = reader(path)
    except ImportError as error:
        package = "safetensors" if reader is _read_safetensors else "torch"
        raise _missing_package(path, package) from error
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise GGLError(f"{path} cannot be read: {_reason(error)}; fetch it again") from error
    except Exception as error:
        # torch's refusal (pickle.UnpicklingError) and safetensors' own exceptions
        raise GGLError(
            f"{path} is damaged or holds more than tensors ({_reason(error)}); fetch it again, or "
            "save its plain state_dict"
        ) from error
    return as_arrays(tensors, source=str(path))


def read_or_take(state_dict_or_path) -> dict[str, np.ndarray]:
    """`as_arrays` of a mapping, `read` of anything else."""
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
    """Checks that `arrays` are exactly the expected ones.

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
