"""Imports point down only, those inside functions and under TYPE_CHECKING included."""

import ast
from pathlib import Path

import pytest

import pagedkv

ROOT = next(Path(path) for path in pagedkv.__path__ if (Path(path) / "spec.py").exists())

LAYER_OF = {
    "errors": 0,
    "shapes": 0,
    "spec": 0,
    "kernels": 1,
    "storage": 2,
    "management": 3,
    "attention": 3,
    "integrations": 4,
    "engine": 5,
    "server": 5,
    "cli": 5,
}
# Part of one layer: the two halves of L3 know nothing of each other; of L5, the applications stand on the engine.
MAY_IMPORT_SIDEWAYS = {("cli", "engine"), ("server", "engine")} | {("spec", "shapes")}


def imported_parts(path, root=ROOT):
    """First components below the package that a file imports, wherever the import stands."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            if not node.level:
                if (node.module or "").split(".")[0] != "pagedkv":
                    continue
                base = node.module.split(".")[1:]
            elif node.module:
                base += node.module.split(".")
            for alias in node.names:
                yield base[0] if base else alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("pagedkv."):
                    yield alias.name.split(".")[1]


def sources():
    return [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem in LAYER_OF]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for part in imported_parts(path):
        assert part != "testing" or own == "testing", f"{path} imports testing, which is for tests alone"
        if own == "testing" or part == own:
            continue
        assert part in LAYER_OF, f"{path} imports {part}, which has no layer"
        allowed = LAYER_OF[part] < LAYER_OF[own] or (own, part) in MAY_IMPORT_SIDEWAYS
        assert allowed, f"{own} (L{LAYER_OF[own]}) must not import {part} (L{LAYER_OF[part]}): {path}"


def test_every_part_has_a_layer():
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts -= {"__init__", "__pycache__", "_native", "testing"}
    assert {part for part in parts if not part.startswith(".") and part != "py.typed"} <= set(LAYER_OF)


def test_upward_import_is_seen(tmp_path):
    """The check can fail: an import hidden in a function of a low layer is found."""
    planted = tmp_path / "kernels" / "planted.py"
    planted.parent.mkdir()
    planted.write_text("def f():\n    from ..management import manager\n")
    assert list(imported_parts(planted, tmp_path)) == ["management"]
