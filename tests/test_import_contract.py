"""The rooms' doors open one way, and the adversary has no argument for a private image."""

import ast
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent
PRIVATE_NAMES = {
    "private",
    "private_image",
    "private_images",
    "original",
    "originals",
    "true_label",
    "true_labels",
    "label_true",
    "ground_truth",
    "truth",
}


def test_import_contract(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml")) == 0


def test_adversary_takes_nothing_private():
    for path in (ROOT / "ggl_jax" / "adversary").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                taken = {a.arg for a in arguments} & PRIVATE_NAMES
                assert not taken, f"{path.name}:{node.name} takes {taken}"
            if isinstance(node, ast.Name):
                assert node.id != "Context", f"{path.name} uses the client's private Context"
