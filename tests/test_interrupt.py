"""Ctrl-C at any moment: exit code 130, no crash, and the same command goes on to the same rows."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_tiny_prior

from ggl_jax.cli import run

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@pytest.fixture
def arguments(tmp_path):
    """``arguments(out, *more)``: of a small audit."""
    write_tiny_prior(tmp_path / "prior")
    options = "--optimizer adam --steps 3 --restarts 1 --pool 0 --refine none --num-controls 4"
    options += f" --ceiling-steps 1 --prior {tmp_path}/prior --out"
    return lambda out, *more: ["audit", *options.split(), str(out), *more]


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "ggl_jax", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def has_begun(process):
    """Wait until the command's own imports have begun, or it is done."""
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "numpy" not in maps.read_text():
        time.sleep(0.01)


def rows(out):
    """What was found, without what depends on the clock."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in found]


def interrupt(process):
    """Send Ctrl-C, once the program is up; whether it came in time."""
    has_begun(process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    if process.returncode == 0:
        return False
    assert process.returncode == 130, f"{process.returncode}\n{said}"
    assert "nterrupted" in said or "goes on from there" in said
    assert "Traceback" not in said, said
    assert "Fatal" not in said, said
    return True


def test_three_interrupts(arguments, tmp_path):
    """While it imports, while it compiles, and while it judges."""
    options = ["--model", "lenet", "--defenses", "none"]
    assert run(arguments(tmp_path / "undisturbed", *options)) == 0
    command = arguments(tmp_path / "out", *options)
    assert interrupt(start(command))
    for phase in ("compiling the search", "controls"):
        process = start(command)
        assert process.stdout is not None
        while phase not in process.stdout.readline():
            assert process.poll() is None
        assert interrupt(process)
    assert run(command) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "undisturbed")


@pytest.mark.slow
def test_twenty_interrupts(arguments, tmp_path):
    """At random moments, without the cache of programs, so that every run compiles."""
    options = ["--model", "convnet:width=8", "--defenses", "none"]
    uncached = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    began = time.monotonic()
    assert start(arguments(tmp_path / "undisturbed", *options), **uncached).wait(3000) == 0
    took = time.monotonic() - began
    command, draw, hit = arguments(tmp_path / "out", *options), random.Random(0), []
    while len(hit) < 20:
        process, moment = start(command, **uncached), draw.uniform(0.0, 0.8 * took)
        has_begun(process)
        time.sleep(moment)
        if interrupt(process):
            hit.append(round(moment, 1))
            print(hit[-1], flush=True)
        else:  # it was done before
            shutil.rmtree(tmp_path / "out")
    print(f"undisturbed {took:.0f} s, interrupted after", hit)
    assert start(command, **uncached).wait(3000) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "undisturbed")
