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
from importlib.util import find_spec
from pathlib import Path

import pytest
from numpydoc.validate import validate

import bnkernels
from bnkernels import distributed
from bnkernels.train import environment
from tools import real_torch

# Not asked for: an extended summary, See Also and Examples everywhere, and a line break before the summary.
OPTIONAL = {"ES01", "SA01", "EX01", "GL01"}
NOT_IMPORTED = {"bnkernels.runtime.cuda", "bnkernels.__main__"}  # one needs CuPy, the other runs the command
NEEDS = {f"bnkernels.compat.{package}": package for package in ("dezero", "thinc")}  # module, and the package it needs
NOT_IMPORTED |= {name for name, package in NEEDS.items() if find_spec(package) is None}
if real_torch.absent():
    NOT_IMPORTED |= {"bnkernels.compat.torch", "bnkernels.compat.torch_autograd"}
MODULES = [
    module.name for module in pkgutil.walk_packages(bnkernels.__path__, "bnkernels.") if module.name not in NOT_IMPORTED
]
COMPAT = [name for name in MODULES if name.startswith("bnkernels.compat.")]
ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("*.py")] + [
    p for f in ("bnkernels", "tools", "benchmarks", "tests", "examples") for p in (ROOT / f).rglob("*.py")
]
FRAGMENT = re.compile(r"(of|what|whatever|who|whose|whoever|so many|so much|how)\b", re.IGNORECASE)


def public_names() -> list[str]:
    """Return the dotted public names, with the public methods of public classes."""
    names = []
    for module in (bnkernels, bnkernels.nn, distributed):
        for name in module.__all__:
            thing = getattr(module, name)
            names += [f"{module.__name__}.{name}"] if callable(thing) else []
            for kind in thing.__mro__ if inspect.isclass(thing) else ():
                if kind.__module__.startswith("bnkernels."):
                    methods = [m for m, f in vars(kind).items() if callable(f) and not m.startswith("_")]
                    # An override that says where its documentation stands.
                    methods = [m for m in methods if "; see `" not in (getattr(kind, m).__doc__ or "")]
                    names += [f"{kind.__module__}.{kind.__qualname__}.{method}" for method in methods]
    for name in COMPAT:
        module = importlib.import_module(name)
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == name]
        names += [f"{name}.{thing.__qualname__}" for thing in own if not thing.__name__.startswith("_")]
    return sorted(set(names))


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
