"""The real CuPy, as far as it can be read without a GPU: classes, members, signatures, keys of device attributes."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from types import ModuleType
from typing import Any

import pytest

RUNTIME_ATTRIBUTE = "cudaDevAttr"  # prefix of its runtime module's names that are keys of `Device.attributes`


@cache
def real() -> ModuleType:
    """Return the installed package; skips where there is none."""
    return pytest.importorskip("cupy", reason="CuPy is not installed: there are no wheels for this platform")


def attribute_keys() -> set[str]:
    """Return the keys of ``cupy.cuda.Device().attributes``."""
    names = vars(real().cuda.runtime)
    return {name.removeprefix(RUNTIME_ATTRIBUTE) for name in names if name.startswith(RUNTIME_ATTRIBUTE)}


def members(kind: type) -> set[str]:
    """Return the names that instances of a class have."""
    names = set(dir(kind))
    if kind is real().cuda.Stream:
        names |= set(vars(kind.null))  # which its constructor sets
    return names


def signature(function: Any) -> inspect.Signature | None:
    """Return what a function takes, also where only its docstring tells; None where nothing does."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        found = None
    if found is not None and [*found.parameters][-2:] != ["args", "kwargs"]:
        return found
    name = getattr(function, "__name__", "")
    lines = (inspect.getdoc(function) or "").splitlines()
    written = [match[1] for line in lines if (match := re.match(rf"(?:\w+\.)*{name}\((.*)\)( -> .*)?$", line))]
    return _parsed(written[-1]) if written else found


def _parsed(inside: str) -> inspect.Signature | None:
    """Return the signature that Cython or a person wrote at the top of a docstring."""
    words = inside.replace("\\", "").split(",") if inside else []
    # Cython names types before parameters.
    source = ", ".join(" ".join([word.split("=")[0].split()[-1], *_default(word)]) for word in words)
    try:
        parsed = ast.parse(f"def f({source}): pass").body[0].args
    except SyntaxError:
        return None
    optional = len(parsed.args) - len(parsed.defaults)
    found = [
        inspect.Parameter(
            argument.arg,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if i < optional else ast.unparse(parsed.defaults[i - optional]),
        )
        for i, argument in enumerate(parsed.args)
    ]
    if parsed.vararg:
        found.append(inspect.Parameter(parsed.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for argument, default in zip(parsed.kwonlyargs, parsed.kw_defaults, strict=True):
        given = inspect.Parameter.empty if default is None else ast.unparse(default)
        found.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=given))
    if parsed.kwarg:
        found.append(inspect.Parameter(parsed.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(found)


def _default(word: str) -> list[str]:
    return ["=" + word.split("=", 1)[1]] if "=" in word else []
