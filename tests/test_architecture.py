"""Imports go one way: model -> graph rewrite -> program -> method -> result -> view."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "onnxplain"

# What the modules of a room may import from onnxplain, by prefix.
ALLOWED = {
    "errors": (),
    "_version": (),
    "graph": ("errors", "graph", "rules"),
    "rules": ("errors", "graph.emit", "rules"),
    "run": ("errors", "graph", "run"),
    "model": ("errors", "graph", "rules", "run"),
    "blackbox": ("errors", "graph", "run"),
    "perturb": ("errors", "blackbox", "graph", "kernels", "model", "perturb", "run"),
    "methods": (
        *("blackbox", "errors", "graph", "kernels", "methods", "model", "perturb", "rules", "run"),
    ),
    "result": ("errors", "view"),
    "view": ("errors", "result", "view"),
    "inputs": ("errors", "inputs", "perturb.maskers", "perturb.segments", "result", "run.feeds"),
    "explain": (
        *("errors", "_version", "blackbox", "graph", "methods", "model", "perturb.maskers"),
        *("result", "run"),
    ),
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("onnxplain"):
            tail = node.module.removeprefix("onnxplain").lstrip(".")
            found |= {f"{tail}.{a.name}".lstrip(".") for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("onnxplain.")
                for a in node.names
                if a.name.startswith("onnxplain.")
            }
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__", "cli"):
        return
    allowed = ALLOWED[room]
    wrong = {
        name
        for name in imported(path)
        if not any(name == a or name.startswith(a + ".") for a in allowed)
    }
    assert not wrong, f"{room} must not import {sorted(wrong)}"


def test_rules_are_injected() -> None:
    """Only the walk knows the rule interface; rules know only how to write nodes."""
    for path in (ROOT / "rules").rglob("*.py"):
        assert not any(n.startswith("graph.grad") for n in imported(path)), path
