"""The ImageNet track at its true sizes: BigGAN-deep to 224x224, ResNet-18, 1,000 classes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ggl_jax import checkpoint
from ggl_jax.priors import BIGGAN_DEEP, biggan_deep

PHOTOS = Path(__file__).parents[2] / "shared/data/imagenet_ccby"

#: Runs the command line and reports its peak memory.
SCRIPT = """
import resource, sys
from ggl_jax.cli import run
code = run(sys.argv[1:])
print("peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the development data are not here")
def test_a_useless_prior_shows_no_leak(tmp_path):
    # the published layout at 256x256, of a sixteenth of its width, with random weights
    config = dataclasses.replace(BIGGAN_DEEP[256], channel_width=8)
    arguments = {"config": dataclasses.asdict(config), "image_size": 224}
    card = {"name": "random-biggan", "kind": "biggan_deep", "arguments": arguments}
    params = biggan_deep(**arguments).init(jax.random.key(0))
    checkpoint.save(tmp_path / "prior", params, {**card, "trained_on": [], "data": []})
    command = ["audit", "--data", str(PHOTOS), "--indices", "0:2", "--defenses", "noise:0.1"]
    command += ["--prior", str(tmp_path / "prior"), "--out", str(tmp_path / "out")]
    command += ["--optimizer", "cma_es:8", "--steps", "3", "--bound", "tanh"]
    command += ["--start", "uniform", "--regularizer", "none", "--num-controls", "8"]
    command += ["--ceiling-steps", "5", "--suspects", "5"]
    # the tests' own flags would make XLA's programs slow
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command], env=env, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "No leak of the image beyond the prior was shown" in " ".join(done.stdout.split())
    assert int(done.stdout.split("peak MB")[1]) < 8000
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert len(rows) == 2
    for row in rows:
        assert row["label_inferred"] == row["label_true"] > 100
        assert row["psnr"] < row["psnr_control_best"] + 3
        assert row["psnr"] < row["psnr_ceiling"] + 1
