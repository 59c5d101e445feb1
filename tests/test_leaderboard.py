"""The leaderboard: its rule, the choice among attacks without the truth, and its command."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEFENSE_SPECS, write_tiny_prior
from test_report import Page, make_row, make_sweep, write
from test_utility import write_utility

import ggl_jax as gx
from ggl_jax.adversary.attacks import PRESETS
from ggl_jax.adversary.reconstruct import mismatch
from ggl_jax.audit import leaderboard, utility
from ggl_jax.audit.sweep import check_axes
from ggl_jax.audit.tables import by_fit, leakage
from ggl_jax.cli import run
from ggl_jax.client.defenses import DEFENSES, STRENGTHS, parse
from ggl_jax.client.gradients import gradient
from ggl_jax.commands.leaderboard import settings

# --- the rule -----------------------------------------------------------------------------------


def rows_of(gains, **changes):
    """Two images each, whose mean gain is that number."""
    return [
        make_row(f"{d}{i}".replace(":", "-"), f"{i}", d, 11 + gain + 2 * i - 1, **changes)
        for d, gain in gains.items()
        for i in range(2)
    ]


def test_those_that_keep_the_accuracy_come_first_and_the_least_leak_of_them(tmp_path):
    gains = {"none": 9.0, "noise:0.1": 3.0, "noise:1": -1.0, "clip:4": 9.5, "clip:1": 2.0}
    records = make_sweep(tmp_path / "run", rows_of(gains))
    accuracies = {"none": 0.9, "noise:0.1": 0.88, "noise:1": 0.6, "clip:4": 0.91, "clip:1": 0.879}
    measured = [(name, accuracy, None) for name, accuracy in accuracies.items()]
    write_utility(records.folder, [*measured, ("noise:9", None, None), ("noise:2", 0.89, None)])
    found = utility.read(records.folder)
    ranked = leaderboard.points(found, leakage(records.rows))
    # 0.88 is two points below, and counts as equal; 0.879 does not.
    assert [(p.label, p.kept) for p in ranked] == [
        *(("noise:0.1", True), ("none", True), ("clip:4", True)),
        *(("noise:1", False), ("clip:1", False)),
        *(("noise:2", True), ("noise:9", False)),
    ]
    said = leaderboard.of_folder(records)
    assert "at most 2 points below the undefended model's" in said
    names = [line.split(" | ")[0].strip("| ") for line in said.splitlines() if " | " in line]
    assert names[1:] == [point.label for point in ranked]
    assert "| noise:0.1 | +3.0 [-9.7, +15.7] | yes | 88.0 % |" in said.replace("\xa0", " ")
    page = Page(write(records).read_text())
    assert "Sorted by leak at equal utility" in page.said
    # The figure has the table's order.
    drawn = page.figure("Test accuracy")
    assert drawn.index("noise:0.1") < drawn.index("clip:4") < drawn.index("noise:1<")


def test_without_accuracies_it_is_sorted_by_gain_alone(tmp_path):
    records = make_sweep(tmp_path / "run", rows_of({"none": 9.0, "noise:1": -1.0, "clip:4": 8.0}))
    said = leaderboard.of_folder(records)
    assert said.index("noise:1 |") < said.index("clip:4 |") < said.index("none |")
    assert "accuracies were not measured" in said
    assert "Test accuracy" not in said


# --- the choice among attacks -------------------------------------------------------------------


def test_the_attack_is_chosen_by_fit_not_by_the_truth():
    fits = {("a", "0"): 0.2, ("b", "0"): 0.1, ("a", "1"): 0.3, ("b", "1"): None}
    rows = [
        make_row(f"{a}{i}", i, "none", 20.0 if a == "a" else 15.0, attack=a, mismatch=fit)
        for (a, i), fit in fits.items()
    ]
    (found,) = by_fit(rows)
    assert [row["attack"] for row in found.rows] == ["b", "a"]
    assert found.means["psnr"].mean == 17.5
    assert found.variant == "b (1 of 2), a (1 of 2)"
    del rows[0]["mismatch"]
    assert [group.variant for group in by_fit(rows)] == ["a"]  # the strongest by PSNR


@pytest.mark.parametrize("spec", ["none", "clip:0.5", "sparsify:0.9", "soteria:0.2"])
def test_mismatch_is_the_share_of_the_update_that_is_not_met(
    spec, tiny_model, tiny_variables, tiny_images
):
    defense, client = parse(spec), gx.Client()
    public = gx.Public(tiny_model, tiny_variables, None, None)
    private, other = tiny_images[:1], tiny_images[1:]
    sent, _ = gx.share(jax.random.key(0), public, private, [1], defense=defense)

    def found(images):
        return SimpleNamespace(
            images=np.asarray(images),
            labels=np.array([1]),
            problem=SimpleNamespace(**sent._asdict(), observed=sent.update),
        )

    given = {"public": public, "view": defense.view, "client": client}
    assert mismatch(found(private), **given) < 1e-5
    far = mismatch(found(other), **given)
    assert far > 0.01
    if spec == "none":
        own = gradient(tiny_model, tiny_variables, other, jnp.array([1]))
        pairs = list(zip(jax.tree.leaves(own), jax.tree.leaves(sent.update), strict=True))
        apart = sum(np.sum(np.square(np.subtract(a, b))) for a, b in pairs)
        assert far == pytest.approx(apart / sum(np.sum(np.square(b)) for _, b in pairs), rel=1e-4)


# --- the command --------------------------------------------------------------------------------


def test_every_defense_has_strengths_and_names_stand_for_them(monkeypatch):
    assert DEFENSES.keys() | {"clip+noise"} == STRENGTHS.keys()
    for name in STRENGTHS:
        specs = check_axes({"defense": settings((name,))})["defense"]
        assert {one.view.name for one in map(parse, specs)} == {name}
        assert len({parse(one).name for one in specs}) == len(specs)
        assert len(specs) == {"none": 1, "precode": 1, "sign": 2}.get(name, max(3, len(specs)))
    assert "precode" not in settings((), "resnet18")
    assert "precode" in settings((), "precode:convnet")
    assert settings(("clip", "noise:{0.1,2}")) == ["clip:{16,4,1}", "noise:{0.1,2}"]
    monkeypatch.setitem(DEFENSES, "mine", DEFENSES["none"])
    assert settings(())[-1] == "mine"
    assert DEFENSE_SPECS.keys() <= set(STRENGTHS)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Arguments of a leaderboard that takes seconds."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (120, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "few.npz", images=pictures[:8], labels=np.arange(8) % 2)
    np.savez(tmp_path / "many.npz", images=pictures, labels=np.arange(120) % 2)
    short = {"steps": 2, "restarts": 1, "optimizer": "adam:box=1", "regularizer": "none"}
    monkeypatch.setitem(PRESETS["standard"], "ig", short)
    prior = write_tiny_prior(tmp_path / "tiny")
    given = ["leaderboard", "--data", str(tmp_path / "few.npz"), "--prior", str(prior)]
    given += ["--model", "convnet:width=2", "--utility-model", "convnet:width=2", "--rounds", "2"]
    given += ["--attacks", "ig", "--defenses", "none", "clip:1", "--images", "2"]
    given += ["--num-controls", "4", "--ceiling-steps", "2", "--out", str(tmp_path / "board")]
    return given, tmp_path


def test_command(board, capsys):
    given, folder = board
    out = folder / "board"
    assert run(given) == 2  # the private images are too few to train on
    assert "batch_size: 16 is more" in capsys.readouterr().err
    assert not out.exists()
    assert run([*given, "--dry-run", "--skip-utility"]) == 0
    assert "4 cells (0 finished)" in capsys.readouterr().out
    given += ["--utility-data", str(folder / "many.npz"), "--learning-rate", "0.03"]
    assert run([*given, "0.03"]) == 2
    assert "learning_rate: got 0.03 0.03, allowed: different" in capsys.readouterr().err
    assert not out.exists()
    given += ["0.01"]
    assert run(given) == 0
    table = (out / "leaderboard.md").read_text()
    assert "| none | " in table
    assert "| clip:1 | " in table
    assert "Accuracy kept" in table
    assert "| Test accuracy | Learning rate |" in table
    assert table.split("\n\n")[0] in (out / "report.md").read_text()
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["mismatch"] > 0 for row in rows)
    assert {row["suspects"] for row in rows} == {7}
    # The same command goes on, here with nothing left to do but the table.
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*") if path.is_file()}
    (out / "leaderboard.md").unlink()
    assert run(given) == 0
    assert {path for path in kept if path.parent.name == "cells"} <= {
        path for path, time in kept.items() if path.stat().st_mtime_ns == time
    }
    assert (out / "leaderboard.md").read_text() == table
    assert run([*given, "--seed", "1", "--dry-run", "--skip-utility"]) == 2
    assert "give --extend" in capsys.readouterr().err
    assert run([*given[:-2], "--images", "99"]) == 2
    assert "few.npz has 8" in capsys.readouterr().err
