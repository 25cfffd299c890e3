"""Benchmarks of the ops, found by name: an `Op` at the top level of a ``bench_*.py`` is in the list of all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from benchmarks.harness.case import Op


def modules() -> Iterator[ModuleType]:
    """Yield every ``bench_*.py`` of this folder."""
    for module in iter_modules(__path__):
        if module.name.startswith("bench_"):
            yield import_module(f"{__name__}.{module.name}")


@cache
def every_op() -> dict[str, Op]:
    """Return every op that is declared, by its name."""
    return {op.name: op for module in modules() for op in vars(module).values() if isinstance(op, Op)}
