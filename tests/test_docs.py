"""The documents' examples run, and what they name exists."""

import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from ggl_jax import checkpoint
from ggl_jax.cli import run
from ggl_jax.client import models
from ggl_jax.commands import _plugins

ROOT = Path(__file__).parents[1]


def shown_commands(text):
    """The arguments of every whole ``ggl-jax`` command in bash blocks, but for plugins'."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.partition(" #")[0].split("&&"):
                words = shlex.split(part)
                # Commands with a plugin parse only with it: the test of docs/extend.md runs them.
                if {"--help", "--plugin"} & set(words) or "..." in part:
                    continue
                if words[:1] == ["ggl-jax"]:
                    yield words[1:]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def with_examples():
    """The modules that show examples in their docstrings."""
    for path in sorted((ROOT / "ggl_jax").rglob("*.py")):
        if ">>>" in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("module", with_examples())
def test_examples_in_docstrings(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted
    assert not found.failed


@pytest.fixture
def own_parts():
    """Registries that the test may add to."""
    before = [dict(registry) for registry in _plugins.REGISTRIES.values()]
    yield
    for registry, entries in zip(_plugins.REGISTRIES.values(), before, strict=True):
        registry.clear()
        registry.update(entries)


def test_extending_works_as_shown(own_parts, capsys):
    exec("\n".join(blocks(ROOT / "docs" / "extend.md")), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["none", "rounding:0.1"]
    assert "'step': 0.1" in lines[1]


ADDED = {
    "defenses": "rounding", "optimizers": "random_search", "distances": "relative_l2",
    "penalties": "contrast", "attacks": "smooth_ggl", "kinds of prior": "flat_colours",
    "models": "net", "metrics": "worst_pixel", "experiments": "rounding",
}  # fmt: skip


@pytest.fixture
def plugin(tmp_path):
    """The document's parts as a file of a user's, and a prior and images for them."""
    *parts, _ = blocks(ROOT / "docs" / "extend.md")
    (tmp_path / "mine.py").write_text("\n".join(parts))
    card = {"name": "flat", "kind": "flat_colours", "arguments": {}, "trained_on": [], "data": []}
    checkpoint.save(tmp_path / "flat", {"gain": np.ones((), np.float32)}, card)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", images=pictures, labels=np.array([0, 1, 0]))
    return ["--plugin", str(tmp_path / "mine.py")]


def test_every_part_is_listed_by_the_help(own_parts, plugin, capsys):
    assert not any(name in _plugins.known() for name in set(ADDED.values()) - {"net"})
    with pytest.raises(SystemExit):
        run([*plugin, "--help"])
    said = " ".join(re.sub(r"[│╭╰╮╯─]", " ", capsys.readouterr().out).split())
    listed = said.split("Known by name")[1]
    for what, name in ADDED.items():
        names = re.split(r"[;.] ", listed.split(f"{what}: ")[1])[0]
        assert name in names.split(", "), what
    assert run(["--plugin", "none.py", "info"]) == 2
    assert "plugin: got 'none.py'" in capsys.readouterr().err


def test_every_part_works_from_the_command_line(own_parts, plugin, tmp_path, capsys, monkeypatch):
    """Axes of a sweep, its config, report and check; an experiment. No other file is touched."""
    monkeypatch.setitem(models.MODELS, "resnet18", models.MODELS["lenet"])  # the experiment's own
    data, prior = tmp_path / "mine.npz", tmp_path / "flat"
    (tmp_path / "grid.toml").write_text(
        f"""
        [fixed]
        data = "{data}"
        prior = "{prior}"
        model = "net:width=2"
        distance = "relative_l2"
        num_controls = 4
        ceiling_steps = 2
        [axes]
        image = [0, 1]
        attack = ["smooth_ggl"]
        defense = ["none", "rounding:0.1"]
        optimizer = ["random_search:4"]
        regularizer = ["contrast:0.1"]
        steps = [2]
        """
    )
    out = tmp_path / "out"
    assert run([*plugin, "sweep", str(tmp_path / "grid.toml"), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert "--plugin" in config["command"]
    assert config["options"]["fixed"]["distance"] == "relative_l2"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["axes"]["optimizer"] for row in rows} == {"random_search:4"}
    assert {row["defense"] for row in rows} == {"none", "rounding:0.1"}
    assert {row["attack"] for row in rows} == {"smooth_ggl"}
    assert all(0 < row["worst_pixel"] <= 1 for row in rows)
    report = (out / "report.md").read_text()
    assert "**Worst**: largest error of a pixel, lower is nearer" in report
    assert "| rounding:0.1 |" in report
    steps = [row["defense_estimated"].get("step") for row in rows]
    assert [step for step in steps if step] == pytest.approx([0.1] * 2)
    bound = [*plugin, "check", str(out), "--bound"]
    assert run([*bound, "worst_pixel=0.0"]) == 0
    assert run([*bound, "worst_pixel=1.0"]) == 1
    capsys.readouterr()
    command = [*plugin, "reproduce", "rounding", "--data", str(data), "--prior", str(prior)]
    command += ["--images", "1", "--num-controls", "4", "--ceiling-steps", "2"]
    assert run([*command, "--out", str(tmp_path / "paper")]) == 0
    table = (tmp_path / "paper" / "table.md").read_text()
    assert "# GGL under rounding" in table
    assert "| rounding:0.1 | smooth GGL |" in table


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_paths_and_commands_exist(document):
    from ggl_jax.cli import COMMANDS, _parse

    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:ggl_jax|docs|tests|benchmarks|checkpoints)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"ggl-jax ([a-z][a-z-]+)", text):
        assert command in COMMANDS, command
    for command in shown_commands(text):
        _parse(command)  # exits where tyro does not understand it
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
