"""What the package says of the machine it runs on, and of one that it cannot run on."""

import os
import subprocess
import sys

import numpy as np

from ggl_jax import files, machine
from ggl_jax.cli import run


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_processor_has_a_name():
    assert machine.cpu_name()
    assert machine.devices()


def test_a_missing_device_is_called_so_by_every_command(tmp_path):
    """In one process, since importing JAX takes longer than all of them."""
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 32, 32, 3), np.uint8))
    commands = [
        ["info"],
        ["sample-prior", "--out", f"{tmp_path}/a.png"],
        ["audit", "--out", f"{tmp_path}/audit"],
        ["score-prior", "--data", "embedded", "--indices", "0"],
        ["train-prior", "--data", f"{tmp_path}/a.npz", "--holdout", "1", "--out", f"{tmp_path}/r"],
    ]
    done = python(
        f"from ggl_jax.cli import run\nfor argv in {commands!r}: assert run(argv) == 2, argv",
        JAX_PLATFORMS="cuda",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ggl-jax: ")]
    assert len(lines) == len(commands)
    assert all("JAX_PLATFORMS=cuda" in line for line in lines)
    assert "damaged" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_environment_does_not_change_results(tmp_path):
    """Nothing in a folder would say that JAX had been set up otherwise."""
    options = ["sample-prior", "--num", "1", "--out"]
    assert run([*options, f"{tmp_path}/a.png"]) == 0
    done = python(
        f"from ggl_jax.cli import run\nrun({[*options, f'{tmp_path}/b.png']!r})",
        JAX_ENABLE_X64="1",
        JAX_DEFAULT_PRNG_IMPL="rbg",
        JAX_RANDOM_SEED_OFFSET="7",
        JAX_NUMPY_DTYPE_PROMOTION="strict",
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes(), done.stderr


def test_where_there_is_no_flock(tmp_path):
    """As on Windows: the import works, and keeping results says why it does not."""
    done = python(
        "import sys; sys.modules['fcntl'] = None\n"
        "import ggl_jax\n"
        "from ggl_jax.audit.folder import lock\n"
        "from pathlib import Path\n"
        f"try: lock(Path({str(tmp_path)!r})).__enter__()\n"
        "except ggl_jax.GGLError as error: print(error)"
    )
    assert "Linux and macOS" in done.stdout, done.stderr


def test_digests():
    a = np.arange(6, dtype=np.float32)
    parts = [a, a.reshape(2, 3), a.astype(np.int32), a + 1, b"1", 1, "1", [1], {"a": 1}]
    assert len({files.digest(part) for part in parts}) == len(parts)
    assert files.digest("a", "b") != files.digest("ab")
    assert files.digest(a, "x") == files.digest(np.array(a), "x")
