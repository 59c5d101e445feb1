"""The documents' examples run, and what they name exists."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

import ggl_jax as gx

ROOT = Path(__file__).parents[1]


def shown_commands(text):
    """The arguments of every whole ``ggl-jax`` command in bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.partition(" #")[0].split("&&"):
                words = shlex.split(part)
                if words[:1] == ["ggl-jax"] and "--help" not in words and "..." not in part:
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


def test_extending_works_as_shown(capsys):
    registries = (gx.DEFENSES, gx.OPTIMIZERS, gx.ATTACKS, gx.METRICS)
    before = [dict(registry) for registry in registries]
    try:
        exec("\n".join(blocks(ROOT / "docs" / "extend.md")), {})
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["none", "rounding:0.1"]
    assert "'step': 0.1" in lines[1]


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
