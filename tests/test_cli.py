"""The command line as users meet it: results on disk, clear errors with exit code 2, Ctrl-C."""

import errno
import inspect
import itertools
import json
import os
import re

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import ggl_jax as gx
from ggl_jax import checkpoint, files
from ggl_jax.adversary import reconstruct
from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.audit import folder as folders
from ggl_jax.audit import run as run_module
from ggl_jax.cli import COMMANDS, _parse, run
from ggl_jax.commands import _shared
from ggl_jax.commands.audit import defaults
from ggl_jax.priors import dcgan

FIELDS = {
    *("image", "label_true", "label_inferred", "defense", "defense_true", "defense_estimated"),
    *("attack", "optimizer", "seed", "evaluations", "seconds", "loss", "psnr", "ssim"),
    *("mse_i", "mse_r", "psnr_control_mean", "psnr_control_best", "psnr_mean_image"),
    *("psnr_ceiling", "reconstruction", "lpips", "lpips_backbone"),
}


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory):
    """An untrained, tiny DCGAN as a checkpoint with a card."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    prior = dcgan(width=2, latent_dim=4)
    card = {
        "name": "tiny",
        "kind": "dcgan",
        "arguments": {"width": 2, "latent_dim": 4},
        "trained_on": ["lfw"],
        "data": [],
    }
    checkpoint.save(folder, prior.init(jax.random.key(0)), card)
    return folder


@pytest.fixture
def audit(prior_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))

    def call(*extra, out=tmp_path / "out"):
        return run(
            [
                "audit",
                "--prior",
                str(prior_folder),
                "--model",
                "lenet",
                "--optimizer",
                "cma_es:8",
                "--steps",
                "2",
                "--num-controls",
                "8",
                "--ceiling-steps",
                "5",
                "--out",
                str(out),
                *extra,
            ]
        )

    return call


def one_error_line(capsys, *words):
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.out + captured.err
    for word in words:
        assert word in lines[0], lines[0]


def test_audit_writes_everything(audit, tmp_path, capsys):
    assert audit("--defenses", "none", "clip:4+noise:0.1") == 0
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["defense"] for row in rows] == ["none", "clip:4+noise:0.1"]
    for row in rows:
        assert set(row) >= FIELDS
        assert Image.open(out / row["reconstruction"]).size == (32, 32)
        assert row["evaluations"] == 16
    text = (out / "report.md").read_text()
    assert "| clip:4+noise:0.1 |" in text
    assert "private, controls, reconstructions" in (out / "figures" / "image-0.svg").read_text()
    assert "figures/image-0.svg" in text
    assert "none" in (out / "report.html").read_text()
    shown = capsys.readouterr().out
    assert "blind guess" in shown
    assert "No leak" in shown or "leaked" in shown
    # The same command again finds everything done; another one is refused, and says why.
    before = (out / "results.jsonl").read_text()
    assert audit("--defenses", "none", "clip:4+noise:0.1") == 0
    assert (out / "results.jsonl").read_text() == before
    capsys.readouterr()
    assert audit("--defenses", "none", "--seed", "5") == 2
    one_error_line(capsys, "out", "seed: 0 -> 5")


def test_a_dry_run_of_an_audit_leaves_nothing(audit, tmp_path, capsys):
    assert audit("--defenses", "none", "clip:4", "--dry-run") == 0
    assert "2 cells (0 finished), 2 programs to compile, 32 gradient" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_default_search_goes_through_its_stages(prior_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "out"
    options = (
        "--attack ggl --model lenet --steps 2 --pool 6 --restarts 3 --finalists 2 --final-steps 2"
    )
    options += " --refine-steps 3 --num-controls 8 --ceiling-steps 5 --defenses none noise:0.1"
    arguments = ["audit", "--prior", str(prior_folder), "--out", str(out), *options.split()]
    assert run(arguments) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    # Under noise, finalists give way to the mean of all restarts, and pixels would fit the noise.
    assert [row["refined"] for row in rows] == [True, False]
    assert [row["evaluations"] for row in rows] == [6 + 3 * 2 + 2 * 2 + 3, 6 + 3 * 2]
    assert all(row["optimizer"] == "adam" and row["adaptive"] for row in rows)
    capsys.readouterr()
    assert run([*arguments, "--finalists", "1"]) == 2
    one_error_line(capsys, "out", "finalists")
    assert run([*arguments, "--finalists", "4", "--out", str(tmp_path / "new")]) == 2
    one_error_line(capsys, "finalists", "4", "restarts, 3")


def test_presets_know_attacks_and_optimizers(capsys):
    def search(*argv):
        return defaults(list(argv)).search

    assert search().attack == search("--preset", "standard").attack == "map"
    quick = search("--attack", "ggl")
    assert quick.optimizer == "adam:schedule=ramp,signed=False"
    assert (quick.pool, quick.refine) == (100, "auto")
    assert search("--preset", "paper") == ATTACKS["ggl"]
    assert search("--preset", "code").distance == "mean_squared_l2"
    assert defaults(["--preset", "code"]).defenses[2] == "clip:4,layerwise=False"
    by_adam = search("--preset", "paper", "--optimizer", "adam")
    assert (by_adam.optimizer, by_adam.steps) == ("adam", 2500)
    assert search("--preset", "paper", "--attack", "ig").distance == "cosine"
    other = search("--optimizer", "cma_es:20")
    assert (other.optimizer, other.pool, other.restarts) == ("cma_es:20", 0, 1)
    assert other.steps == 16
    assert search("--attack=ig", "--preset", "standard").steps == 1000
    command = _parse(["audit", "--optimizer", "adam:0.05", "--steps", "7"])
    assert command.search.optimizer == "adam:0.05,schedule=ramp,signed=False"
    assert command.search.steps == 7


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"ggl-jax {gx.__version__}\n"


def test_switches_have_one_grammar():
    assert _parse(["audit", "--shard", "--no-relative"]).running.shard
    assert not _parse(["audit", "--no-relative"]).search.relative
    assert _parse(["sweep", "g.toml", "--shard"]).running.shard
    attack = ["attack", "--gradient", "g", "--weights", "w", "--out", "o"]
    assert _parse([*attack, "--attack", "ig", "--adaptive", "--shard"]).search.adaptive
    assert _parse([*attack, "--optimizer", "cma_es:8"]).search.optimizer == "cma_es:8"


def test_config_json_reproduces_the_run(audit, tmp_path, capsys):
    assert audit("--defenses", "noise:0.5", "--seed", "3") == 0
    again = tmp_path / "again"
    assert (
        run(["audit", "--config", str(tmp_path / "out" / "config.json"), "--out", str(again)]) == 0
    )
    rows = [
        json.loads((folder / "results.jsonl").read_text()) for folder in (tmp_path / "out", again)
    ]
    assert rows[0]["defense"] == rows[1]["defense"]
    for name in ("loss", "psnr", "seed"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)


def test_config_and_what_options_depend_on(audit, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"options": {"defenses": ["none"], "steps": 3}}))
    for name, value in (("preset", "paper"), ("attack", "ig"), ("optimizer", "adam")):
        assert run(["audit", "--config", str(config), f"--{name}", value]) == 2
        one_error_line(capsys, name, value, "--config")
    assert defaults(["--config", str(config), "--seed", "3"]).search.steps == 3


def test_interrupt_keeps_finished_cells(audit, tmp_path, capsys, monkeypatch):
    whole = reconstruct.run_stages
    calls = []

    def stops_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(reconstruct, "run_stages", stops_at_the_second)
    assert audit("--defenses", "none", "clip:4") == 130
    assert "kept" in capsys.readouterr().out
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1
    monkeypatch.undo()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert audit("--defenses", "none", "clip:4") == 0
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2


def test_failed_cells_are_tried_again_where_that_is_asked_for(
    prior_folder, tmp_path, monkeypatch, capsys
):
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    fixed = f"prior = '{prior_folder}'\nmodel = 'mlp:width=4'\nnum_controls = 4\nceiling_steps = 1"
    axes = "attack = ['ig']\nsteps = [1]\nrestarts = [1]\ndefense = ['none', 'clip:4']"
    grid.write_text(f"[fixed]\n{fixed}\n[axes]\n{axes}\n")
    whole = reconstruct.run_stages

    def fails_once(*args, **kwargs):
        monkeypatch.setattr(reconstruct, "run_stages", whole)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(reconstruct, "run_stages", fails_once)
    command = ["sweep", str(grid), "--out", str(out)]
    for _ in range(2):  # what failed is settled
        assert run(command) == 1
        said = capsys.readouterr().out
        assert "2 cells: 1 done, 1 failed" in said
        assert "out of luck" in said
        assert "--retry-failed" in said
    assert run([*command, "--retry-failed"]) == 0
    assert "2 cells: 2 done, 0 failed" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["defense"] for row in rows} == {"none", "clip:4"}


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_nan_in_the_observed_gradient(audit, capsys, monkeypatch):
    from ggl_jax.client import gradients, share

    whole = gradients.client_update
    monkeypatch.setattr(
        share,
        "client_update",
        lambda *a, **k: jax.tree.map(lambda g: g * np.nan, whole(*a, **k)),
    )
    assert audit("--defenses", "none") == 1
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("failed: "))
    assert "finite" in line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_unwritable_output(audit, capsys, monkeypatch, code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), "results.jsonl")

    monkeypatch.setattr(files, "write_png", fail)
    assert audit("--defenses", "none") == 2
    one_error_line(capsys, os.strerror(code))


def test_a_folder_in_use_is_left_alone(audit, tmp_path, capsys):
    assert audit("--defenses", "none") == 0
    with folders.lock(tmp_path / "out"):
        capsys.readouterr()
        assert audit("--defenses", "none") == 2
        one_error_line(capsys, "in use")
    assert audit("--defenses", "none") == 0


def test_a_folder_with_other_things_is_left_alone(audit, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("do not touch")
    assert audit() == 2
    one_error_line(capsys, "not an empty folder")


def test_help_explains_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")

    def said(*command):
        with pytest.raises(SystemExit) as left:
            run([*command, "--help"])
        assert left.value.code == 0
        return capsys.readouterr().out

    for name in ("train-prior", "sample-prior", "score-prior", "weights", "info"):
        assert f" {name} " in said(name)
    of_audit = said("audit", "--preset", "paper")
    assert "(default: 800)" in of_audit  # the preset's steps, not quick's
    assert "None)" not in of_audit  # the words say what that would be
    assert "(default: 800)" not in said("audit")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fills_its_lines(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run([name, "--help"])
    said = capsys.readouterr().out
    assert ":func:" not in said
    cells = [re.fullmatch(r"│ {8,}(\S.*?) *│", line) for line in said.splitlines()]
    for before, after in itertools.pairwise(cells):
        if before and after and before.start(1) == after.start(1):
            assert after[1].startswith("(") or before.end(1) + len(after[1].split()[0]) >= 77


def test_sample_prior_and_info(prior_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/tmp/[red]x")
    out = tmp_path / "grid.png"
    assert run(["sample-prior", "--prior", str(prior_folder), "--num", "9", "--out", str(out)]) == 0
    assert Image.open(out).width > 90
    before = out.read_bytes()
    assert run(["sample-prior", "--prior", str(prior_folder), "--num", "4", "--out", str(out)]) == 2
    one_error_line(capsys, "grid.png exists", "--out")
    assert out.read_bytes() == before
    assert run(["info"]) == 0
    said = capsys.readouterr().out
    assert "jax" in said
    assert "/tmp/[red]x" in said


def test_train_prior_and_export(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    data = write_npz(tmp_path / "faces.npz", images=images)
    options = [
        "--width",
        "2",
        "--latent-dim",
        "4",
        "--steps",
        "2",
        "--critic-steps",
        "1",
        "--batch-size",
        "4",
        "--holdout",
        "8",
        "--out",
        str(tmp_path / "run"),
        "--export",
        str(tmp_path / "mine"),
        "--trained-on",
        "noise",
    ]
    assert run(["train-prior", "--data", data, *options]) == 0
    card = json.loads((tmp_path / "mine" / "card.json").read_text())
    assert card["trained_on"] == ["noise"]
    assert "train-prior" in card["command"]
    capsys.readouterr()
    mine = ["--prior", str(tmp_path / "mine"), "--steps", "3", "--restarts", "1"]
    assert run(["score-prior", "--data", data, *mine]) == 0
    assert "8 images" in capsys.readouterr().out  # the held-out ones
    # An audit takes the held-out images, and refuses those that the prior was trained on.
    other = write_npz(tmp_path / "other.npz", images=images[:9])
    assert run(["score-prior", "--data", other, *mine]) == 2
    one_error_line(capsys, "held-out", "faces.npz")
    assert run(["audit", "--data", data, "--label", "0", "--indices", "0:40", *mine]) == 2
    one_error_line(capsys, "held-out")
    assert run(["train-prior", "--data", str(tmp_path / "none.npz"), *options]) == 2
    one_error_line(capsys, "none.npz")


def test_progress_knows_every_phase_of_a_cell():
    """An unknown one would begin at 0 again, and hours would be left."""
    for module in (run_module, reconstruct):
        told = re.findall(r"(?:report|progress)\(\"([^\"]+)\"", inspect.getsource(module))
        assert told
        assert set(told) <= set(_shared._PHASES)


def test_progress_without_a_terminal(monkeypatch):
    """The time left is told from the first line on: by shares, then by what others took."""
    shown = Console(record=True, width=100)
    monkeypatch.setattr(_shared, "console", shown)
    with _shared.AuditBar() as bar:
        bar.began -= 30.0
        bar("a phase of unknown length", 0, 4, 0.0, None)
        bar("none: client's update", 0, 4, 0.0, None)
        bar("none: search", 0, 4, 0.1, 9.0)
        bar("none: search", 0, 4, 0.2, 8.0)  # too soon for another line
        monkeypatch.setattr(_shared, "_QUIET_SECONDS", 0.0)
        bar("none: search", 0, 4, 0.4, 7.5)
        bar("clip:4: search", 1, 4, 0.0, None)
        bar.began -= 20.0  # the second took as long
        bar("noise:1: search", 2, 4, 0.0, None)
        bar.began -= 100.0  # a fifth of the third took five times as long
        bar("noise:1: training", 2, 4, 0.2, None)
    lines = [line.split("s  ", 1)[1] for line in shown.export_text().splitlines()]
    assert lines == [
        "[1/4] a phase of unknown length",
        "[1/4] none: client's update, about 20 min left",  # 30 s are 5 % of a half of all
        "[1/4] none: search, about 51 s left",
        "[1/4] none: search, 41% of all, loss 7.5, about 44 s left",
        "[2/4] clip:4: search, about 18 s left",
        "[3/4] noise:1: search, about 40 s left",
        "[3/4] noise:1: training, about 11 min left",  # 400 s, and the mean of 20 and 500
    ]
