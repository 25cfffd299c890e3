"""The rooms of benchmarks: what each may import, no circles, and a declaration of every op."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MAY_IMPORT = {
    "harness": set(),
    "peers": {"harness"},
    "ops": {"harness", "peers"},
    "counts": {"harness", "ops", "peers"},
    "steps": {"harness", "peers"},
    "accuracy": {"harness"},
    "gpu": {"counts", "harness", "ops"},
    "distributed": {"harness", "peers"},
    "step_through": {"counts", "harness", "peers"},
    "report": {"accuracy", "counts", "distributed", "harness", "steps"},
    "": {"counts", "harness", "ops", "peers"},  # the commands
}
MODULES = {
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}


def room(module: str) -> str:
    """Return the folder of a module."""
    return MODULES[module].relative_to(FOLDER).parts[0].removesuffix(MODULES[module].name)


def imported(module: str) -> Iterator[str]:
    """Yield the modules of benchmarks that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "benchmarks":
                while name not in MODULES:
                    name = name.rpartition(".")[0]
                yield name


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_room_may(module: str) -> None:
    rooms = {room(name) for name in imported(module) if name != "benchmarks"}
    assert rooms <= MAY_IMPORT[room(module)] | {room(module)}


def test_no_imports_go_in_circles() -> None:
    arrows = {module: set(imported(module)) - {module} for module in MODULES}
    while free := {module for module, others in arrows.items() if not others & arrows.keys()}:
        for module in free:
            del arrows[module]
    assert not arrows, "these import one another, or what does"
