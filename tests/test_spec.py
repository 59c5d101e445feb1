"""The tree of options, and the grammar of parts: canonical spelling, types, ranges, errors."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggl_jax as gx
from ggl_jax import grammar, spec
from ggl_jax.adversary.optimizers import OPTIMIZERS
from ggl_jax.errors import GGLError


@dataclasses.dataclass(frozen=True)
class Whole:
    """Parts in one tree."""

    seed: spec.Number = 0
    client: spec.Client = dataclasses.field(default_factory=spec.Client)
    search: spec.Search = dataclasses.field(default_factory=spec.Search)
    speed: spec.Speed = dataclasses.field(default_factory=spec.Speed)


def test_options_are_found_in_their_part_and_go_through_json():
    own = spec.replace(Whole(), steps=5, batch_size=2, seed=3, memory=2)
    assert (own.search.steps, own.client.batch_size, own.seed, own.speed.memory) == (5, 2, 3, 2.0)
    assert Whole() == Whole(), "replace must not change what it is given"
    assert spec.replace(Whole(), **json.loads(json.dumps(spec.flat(own)))) == own


def test_names_of_options_are_their_own():
    parts = (spec.Client, spec.Search, spec.Judge, spec.Speed)
    names = [field.name for part in parts for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))


def test_every_option_has_a_help_text_and_a_default_that_it_allows():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(spec))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in ("Client", "Search", "Judge", "Speed"):
            fields = [i for i, item in enumerate(node.body) if isinstance(item, ast.AnnAssign)]
            for i in fields:
                follows = node.body[i + 1]
                assert isinstance(follows, ast.Expr), ast.unparse(node.body[i])
                assert isinstance(follows.value, ast.Constant), ast.unparse(node.body[i])
    for part in (spec.Client, spec.Search, spec.Judge, spec.Speed):
        assert spec.checked(part()) == part()


WRONG = [
    ({"steps": 0}, "steps: got 0, allowed: whole numbers of at least 1"),
    ({"steps": 2.5}, "steps: got 2.5, allowed: whole numbers of at least 1"),
    ({"steps": "4"}, "steps: got '4', allowed: whole numbers of at least 1"),
    ({"steps": True}, "steps: got True, allowed: whole numbers of at least 1"),
    ({"pool": -1}, "pool: got -1, allowed: whole numbers of at least 0"),
    ({"local_learning_rate": 0}, "allowed: numbers above 0"),
    ({"local_learning_rate": float("inf")}, "allowed: numbers above 0"),
    ({"local_learning_rate": float("nan")}, "allowed: numbers above 0"),
    ({"start": "ones"}, "start: got 'ones', allowed: zeros, prior, uniform, normal"),
    ({"adaptive": 1}, "adaptive: got 1, allowed: True or False"),
    ({"memory": "much"}, "memory: got 'much', allowed: numbers above 0 or None"),
    ({"stepz": 1}, "stepz: no such option; did you mean 'steps'?"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(GGLError) as caught:
        spec.replace(Whole(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_combinations_are_a_product_with_the_last_axis_fastest():
    found = list(spec.combinations({"a": [1, 2], "b": ["x", "y"]}))
    assert found == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert list(spec.combinations({})) == [{}]


def part(*, value: float = 0.5, kind: str = "soft", flag: bool = False, steps: int = 1):
    """A factory that gives back what it was given."""
    return value, kind, flag, steps


PARTS = {"part": part, "bare": lambda: "bare"}


def canonical(registry, text, *, what):
    """A text's one spelling."""
    return grammar.write(registry, *grammar.read(registry, text, what=what))


@pytest.mark.parametrize(
    ("written", "expected", "made"),
    [
        ("part", "part", (0.5, "soft", False, 7)),
        ("part:4.0", "part:4", (4.0, "soft", False, 7)),
        ("part:1e-1", "part:0.1", (0.1, "soft", False, 7)),
        ("part: value=.5", "part", (0.5, "soft", False, 7)),
        ("part:flag=true,value=2", "part:2,flag=True", (2, "soft", True, 7)),
        ("part:kind=hard", "part:kind=hard", (0.5, "hard", False, 7)),
        ("bare", "bare", "bare"),
    ],
)
def test_parts_have_one_spelling(written, expected, made):
    assert canonical(PARTS, written, what="thing") == expected
    assert grammar.build(PARTS, written, what="thing", steps=7, unknown=1) == made
    assert grammar.build(PARTS, expected, what="thing", steps=7) == made


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("prat", "did you mean 'part'?"),
        ("part:1,2", "'2' in 'part:1,2' is not understood; part takes value, kind, flag"),
        ("part:valu=1", "'valu=1'"),
        ("part:1,value=2", "'value=2'"),
        ("part:steps=3", "'steps=3'"),
        ("bare:1", "bare has no options"),
    ],
)
def test_wrong_parts_are_refused_in_one_line(written, words):
    with pytest.raises(GGLError) as caught:
        grammar.build(PARTS, written, what="thing", steps=7)
    assert str(caught.value).startswith("thing: ")
    assert words in str(caught.value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_canonical_spellings_are_stable(value, flag):
    once = grammar.write(PARTS, "part", {"value": value, "flag": flag})
    assert canonical(PARTS, once, what="thing") == once


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_has_a_canonical_spelling(name):
    assert canonical(OPTIMIZERS, name, what="optimizer") == name


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_whole_numbers_are_checked_by_name(value):
    with pytest.raises(GGLError, match="rounds: got"):
        grammar.at_least(1, rounds=value)
    grammar.at_least(1, rounds=1)


def test_an_option_is_one_field(tmp_path):
    """One field more in a copy of the package: command line, grid, Python, config, identity."""
    home = Path(gx.__file__).parent
    shutil.copytree(home, tmp_path / "ggl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    spec = tmp_path / "ggl_jax" / "spec.py"
    field = '    wobble: Number = 0\n    """How much it wobbles."""\n'
    marker = "    restarts: Count = 1\n"
    text = spec.read_text(encoding="utf-8")
    assert text.count(marker) == 1
    spec.write_text(text.replace(marker, field + marker), encoding="utf-8")
    (tmp_path / "try.py").write_text(
        """
import contextlib, io, json, sys
import jax
import numpy as np
import ggl_jax as gx
from ggl_jax.audit import sweep
from ggl_jax.audit.cells import Inputs
from ggl_jax.cli import run

assert gx.search_of("quick", wobble=3).wobble == gx.Search(wobble=3).wobble == 3
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    run(["audit", "--help"])
shown = " ".join(out.getvalue().split())
model, prior = gx.convnet(image_shape=(8, 8, 3), width=2), gx.pixels((8, 8, 3))

images = np.full((1, 8, 8, 3), 0.5, np.float32)
inputs = Inputs(images, [1], model, prior, prior.init(jax.random.key(0)))
cells = sweep.plan(inputs, {"wobble": [0, 3]}, search="quick").cells
error = ""
try:
    gx.Search(), gx.search_of("quick", wobble=-1)
except gx.GGLError as e:
    error = str(e)
json.dump({
    "help": "--wobble" in shown and "How much it wobbles." in shown,
    "ids": [cell.id for cell in cells],
    "axes": [cell.axes["wobble"] for cell in cells],
    "config": gx.spec.flat(cells[1].search)["wobble"],
    "error": error,
}, sys.stdout)
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "try.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["help"]
    assert found["axes"] == [0, 3]
    assert len(set(found["ids"])) == 2
    assert found["config"] == 3
    assert found["error"] == "wobble: got -1, allowed: whole numbers of at least 0"
