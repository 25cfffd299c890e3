"""Docstrings of public names follow numpydoc, and their examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

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
