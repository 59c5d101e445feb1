"""The paper's experiments: what they state, their table, and one run end to end."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ggl_jax import checkpoint
from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.audit import paper
from ggl_jax.audit.run import AuditResult
from ggl_jax.cli import run
from ggl_jax.priors import dcgan


@pytest.mark.parametrize("name", paper.EXPERIMENTS)
def test_experiments_state_what_they_are(name):
    experiment = paper.EXPERIMENTS[name]()
    for word in ("Claim:", f"Command: ``ggl-jax reproduce {name} ", "Cost:", "Expected"):
        assert word in type(experiment).__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.defenses = ()
    for scale in paper.SCALES:
        searches = experiment.searches(scale)
        assert all(settings.attack in ATTACKS for settings in searches.values())
    # Published numbers belong to searches and defenses that are really run.
    for search, defense in experiment.published:
        assert search in searches
        assert defense in experiment.defenses


def row(psnr, **more):
    controls = {"psnr_control_mean": 9.0, "psnr_mean_image": 11.0, "psnr_ceiling": 23.0}
    own = {"mse_i": 4 * 10 ** (-psnr / 10), "psnr_paper": psnr - 6.02, "mse_r": 0.001}
    return {"image": "a", "psnr": psnr, "lpips": None, **own, **controls, **more}


def test_table_shows_ours_beside_the_papers():
    rows = [row(p, defense=d) for d in paper.DEFENSES for p in (16.0, 18.0)]
    result = AuditResult(rows, [], {}, {})
    text = paper.markdown(paper.Table3(), {"GGL": result}, command="the command", where="here")
    line = next(x for x in text.splitlines() if x.startswith("| clip:4 | GGL |"))
    # Student's t with one degree of freedom: 12.706 * sd / sqrt(2), sd = sqrt(2).
    assert "10.98 ± 12.71 (11.19)" in line
    assert "(0.0760)" in line
    assert "– (0.1670)" in line  # LPIPS was not measured
    assert line.rstrip(" |").endswith("17.00 ± 12.71 | 6.00 ± 12.71")
    assert "11.00 ± 0.00" in text  # the mean image
    assert "the command" in text


def test_reproduce_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    prior = dcgan(width=2, latent_dim=4)
    card = {"name": "tiny", "kind": "dcgan", "arguments": {"width": 2, "latent_dim": 4}}
    card |= {"trained_on": [], "data": []}
    checkpoint.save(tmp_path / "prior", prior.init(jax.random.key(0)), card)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "faces.npz", images=images, labels=np.array([0, 1, 0], np.int32))

    class Short(paper.Table1):
        """A shorter one."""

        def searches(self, scale):
            return {
                name: dataclasses.replace(settings, steps=2, pool=None, restarts=2)
                for name, settings in super().searches(scale).items()
                if name != "TuRBO"
            }

    monkeypatch.setitem(paper.EXPERIMENTS, "table1", Short)
    from ggl_jax.client import models

    monkeypatch.setitem(models.MODELS, "resnet18", models.MODELS["lenet"])
    out = tmp_path / "out"
    command = ["reproduce", "table1", "--data", str(tmp_path / "faces.npz"), "--images", "2"]
    command += ["--prior", str(tmp_path / "prior"), "--out", str(out)]
    assert run(command) == 0
    text = (out / "table.md").read_text()
    assert "| none | Adam |" in text
    assert "(13.70)" in text
    assert Image.open(out / "figure.png").width > 200
    lines = (out / "adam" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["optimizer"] for line in lines] == ["adam", "adam"]
    # Again: nothing is repeated; other options are refused.
    assert run(command) == 0
    assert (out / "adam" / "results.jsonl").read_text().splitlines() == lines
    capsys.readouterr()
    assert run([*command, "--seed", "1"]) == 2
    assert "seed" in capsys.readouterr().err
    assert run(["reproduce", "table1"]) == 2
    assert "table1 needs --data" in capsys.readouterr().err
    assert run([*command[:-1], str(tmp_path / "new"), "--images", "0"]) == 2
    assert "images: got 0" in capsys.readouterr().err


def test_figure8_runs_on_images_without_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    from ggl_jax.audit import data
    from ggl_jax.audit import run as runs

    seen = {}

    def audit(images, labels, **options):
        seen.update(images=images, labels=labels, **options)
        return AuditResult([], [], {}, {})

    monkeypatch.setattr(runs, "audit", audit)
    monkeypatch.setattr(paper, "markdown", lambda *args, **options: "")
    monkeypatch.setattr(paper, "draw", lambda *args: None)
    assert run(["reproduce", "figure8", "--images", "3", "--out", str(tmp_path / "out")]) == 0
    expected = data.load("embedded:nonfaces", image_size=32, indices="0:3").images
    np.testing.assert_array_equal(seen["images"], expected)
    np.testing.assert_array_equal(seen["labels"], [0, 0, 0])
    assert seen["defenses"] == ("none", *paper.DEFENSES)
    # the others need labels
    assert run(["reproduce", "figure5", "--data", "embedded:nonfaces"]) == 2
