"""Docstrings of public names follow numpydoc, and their examples run; no text begins in the middle of a sentence."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from numpydoc.validate import validate

import bnkernels
from bnkernels.train import environment

# Not asked for: an extended summary, See Also and Examples everywhere, and a line break before the summary.
OPTIONAL = {"ES01", "SA01", "EX01", "GL01"}
NOT_IMPORTED = {"bnkernels.runtime.cuda", "bnkernels.__main__"}  # one needs CuPy, the other runs the command
MODULES = [
    module.name for module in pkgutil.walk_packages(bnkernels.__path__, "bnkernels.") if module.name not in NOT_IMPORTED
]
ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("*.py")] + [
    p for f in ("bnkernels", "tools", "benchmarks", "tests") for p in (ROOT / f).rglob("*.py")
]
FRAGMENT = re.compile(r"(of|what|whatever|who|whose|whoever|so many|so much|how)\b", re.IGNORECASE)


def public_names() -> list[str]:
    """Return the dotted public names, with the public methods of public classes."""
    names = [f"bnkernels.{name}" for name in bnkernels.__all__]
    for name in bnkernels.__all__:
        thing = getattr(bnkernels, name)
        if inspect.isclass(thing):
            names += [f"bnkernels.{name}.{m}" for m, f in vars(thing).items() if callable(f) and not m.startswith("_")]
    return names


@pytest.mark.parametrize("name", [*public_names(), "bnkernels.train.environment.report"])
def test_docstring_follows_numpydoc(name: str) -> None:
    errors = [f"{code}: {text}" for code, text in validate(name)["errors"] if code not in OPTIONAL]
    assert errors == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_examples_are_found() -> None:
    assert doctest.testmod(environment).attempted > 0


def texts(path: Path) -> Iterator[str]:
    """Yield the beginnings of docstrings, of the descriptions in them, and of comments."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, *lines = node.value.value.splitlines() or [""]
            yield first
            indents = [len(line) - len(line.lstrip()) for line in lines]
            yield from (
                line.strip()
                for above, before, line, indent in zip(lines, indents, lines[1:], indents[1:], strict=False)
                if above.strip() and before < indent
            )
    above = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not (token.line.lstrip().startswith("#") and above.startswith("#")):
            yield token.string.lstrip("#: ")
        if token.type != tokenize.NL:
            above = token.line.lstrip()


def test_texts_name_their_thing_first() -> None:
    found = [f"{path.relative_to(ROOT)}: {text}" for path in SOURCES for text in texts(path) if FRAGMENT.match(text)]
    assert found == []
