"""Tensor files of other libraries: what is read, and what is refused in words."""

import sys

import numpy as np
import pytest

from ggl_jax import foreign
from ggl_jax.errors import GGLError

TENSORS = {
    "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bn.num_batches_tracked": np.array(7),
}


def same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape


def test_reads_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **TENSORS)
    same(foreign.read(tmp_path / "a.npz"))
    same(foreign.read_or_take(str(tmp_path / "a.npz")))


def test_reads_torch_files_and_their_wrappings(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in TENSORS.items()}
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}
    for suffix, content in ((".bin", tensors), (".pt", wrapped), (".pth", tensors)):
        path = (tmp_path / "a").with_suffix(suffix)
        torch.save(content, path)
        same(foreign.read(path))
    same(foreign.read_or_take(tensors))
    half = foreign.as_arrays({"x": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)})
    same(half, {"x": np.array([1.5, -2.0], np.float32)})


def test_reads_safetensors(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    numpy_io.save_file(TENSORS, tmp_path / "a.safetensors")
    same(foreign.read(tmp_path / "a.safetensors"))
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(GGLError, match=r"b\.safetensors .*fetch it again"):
        foreign.read(tmp_path / "b.safetensors")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_does_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
    with pytest.raises(GGLError, match="holds more than tensors"):
        foreign.read(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
    np.savez(tmp_path / "a.npz", x=np.array([Evil(tmp_path / "ran")], dtype=object))
    with pytest.raises(GGLError, match="cannot be read"):
        foreign.read(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize("content", [b"", b"no tensors in here", b"PK\x03\x04broken"])
def test_damaged_files(tmp_path, suffix, content):
    if suffix == ".pt":
        pytest.importorskip("torch")
    path = (tmp_path / "a").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(GGLError, match=r"a\..*fetch it again"):
        foreign.read(path)


def test_refusals(tmp_path):
    with pytest.raises(GGLError, match="does not exist"):
        foreign.read(tmp_path / "a.npz")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(GGLError, match=r"a\.ckpt.*\.safetensors"):
        foreign.read(tmp_path / "a.ckpt")
    np.save(tmp_path / "a.npy", np.zeros(2))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(GGLError, match="single array"):
        foreign.read(tmp_path / "a.npz")
    with pytest.raises(GGLError, match="'epoch' is no tensor"):
        foreign.as_arrays({"x": np.zeros(2), "epoch": "third"})
    with pytest.raises(GGLError, match="no entries"):
        foreign.as_arrays({})
    with pytest.raises(GGLError, match=r"my\.pt: holds list"):
        foreign.as_arrays([1], source="my.pt")  # type: ignore[arg-type]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for suffix, package in ((".pt", "torch"), (".safetensors", "safetensors")):
        path = (tmp_path / "a").with_suffix(suffix)
        path.touch()
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.numpy", None)
        with pytest.raises(GGLError, match=rf"needs the package {package}; .*ggl-jax\[convert\]"):
            foreign.read(path)


def test_check_shapes_names_what_is_wrong():
    expected = {"a": (2, 3), "b": (4,), "c": ()}
    good = {"a": np.zeros((2, 3)), "b": np.zeros(4), "c": np.zeros(())}
    foreign.check_shapes(good, expected, what="X")
    with pytest.raises(GGLError, match=r"of X; missing: b; unknown: d; misshapen: a \[3, 2\] inst"):
        foreign.check_shapes(
            {"a": np.zeros((3, 2)), "c": np.zeros(()), "d": np.zeros(1)}, expected, what="X"
        )
    many = {**good, **{f"n{i}": np.zeros(1) for i in range(12)}}
    with pytest.raises(GGLError, match="n7 and 4 more"):
        foreign.check_shapes(many, expected, what="X")
