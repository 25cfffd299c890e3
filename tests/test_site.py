"""The site: its reference has every public name, and the lines of its pages run on NumPy and on CuPy."""

from __future__ import annotations

import ast
import doctest
import re
import types
from collections import Counter
from pathlib import Path

import pytest

import bnkernels
import bnkernels.distributed
from tests.train.test_captured_step import cupy

__all__ = ["cupy"]  # the fixture
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^\.\. (currentmodule|autofunction|autoclass|autoexception|autodata):: (\S+)$", re.M)
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
WITH_LINES = sorted(name for name, text in PAGES.items() if ">>> " in text)


def documented() -> list[str]:
    """Return the dotted names that the reference has entries for."""
    names = []
    for path in sorted((DOCS / "reference").glob("*.md")):
        module = ""
        for kind, name in ENTRY.findall(path.read_text(encoding="utf-8")):
            if kind == "currentmodule":
                module = name
            else:
                names.append(f"{module}.{name}")
    return names


def of_compat(path: Path) -> list[str]:
    """Return the public functions and classes of a module that may need a package which is not installed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    things = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [f"bnkernels.compat.{path.stem}.{name}" for name in things if not name.startswith("_")]


def test_the_reference_has_every_public_name_once() -> None:
    public = [f"bnkernels.{name}" for name in bnkernels.__all__ if name not in ("nn", "MLP")]
    public += [f"bnkernels.nn.{name}" for name in bnkernels.nn.__all__]  # MLP among them
    public += [f"bnkernels.distributed.{name}" for name in bnkernels.distributed.__all__]
    compat = set((ROOT / "bnkernels" / "compat").glob("*.py"))
    for path in compat - {path for path in compat if path.stem in ("__init__", "torch_autograd")}:
        public += of_compat(path)
    assert len(public) > 90
    assert Counter(documented()) == Counter(public)


def lines_of(name: str, xp: str) -> doctest.TestResults:
    """Run the lines of a page, with this module where the page says `xp`."""
    text = PAGES[name].replace("import numpy as xp", f"import {xp} as xp")
    return doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(text, {}, name, name, 0))


@pytest.mark.parametrize("name", [name for name in WITH_LINES if ">>> import cupy" not in PAGES[name]])
def test_the_lines_of_a_page_run(name: str) -> None:
    assert lines_of(name, "numpy").failed == 0


@pytest.mark.emulator
@pytest.mark.parametrize(
    "name", [name for name in WITH_LINES if re.search(">>> import (cupy|numpy as xp)", PAGES[name])]
)
def test_the_lines_of_a_page_run_on_cupy(name: str, cupy: types.ModuleType) -> None:
    assert lines_of(name, "cupy").failed == 0
    assert cupy.driver.launches, "no kernel of ours ran"


def test_pages_have_lines() -> None:
    assert len(WITH_LINES) > 5
