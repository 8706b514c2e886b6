"""Which room may know of which: held by reading the imports, so that a shortcut is noticed the day it is taken."""

import ast
from pathlib import Path

import pytest

from tests.conftest import PROJECT

SOURCE = PROJECT / "src" / "r1zero"
# How data is read and what its golds look like is the task's affair.
DATASETS = {"rows", "columns", "sources", "gsm8k", "competition", "dataset", "mixture", "decontamination"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too; ``from a import b`` counts as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((SOURCE / "training").glob("*.py")), ids=lambda path: path.stem)
def test_training_sees_golds_only_through_the_task(path: Path) -> None:
    names = imported(path)
    assert {
        name for name in names if name.split(".")[:2] == ["r1zero", "tasks"] and name.split(".")[2] in DATASETS
    } == set()
    assert {name for name in names if name.startswith("datasets.load")} == set()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_sympy_is_imported_only_where_it_can_be_killed(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    if path.stem != "algebra":
        assert tops.isdisjoint({"sympy", "math_verify", "latex2sympy2_extended"})
    assert path.stem == "algebra" or "r1zero.tasks.mathematics.algebra" not in imported(path)
