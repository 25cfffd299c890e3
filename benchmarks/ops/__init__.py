"""Benchmarks of the ops, found by name: a ``bench_*.py`` declares an `Op`, or several, and ``SAMPLES`` of its calls."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from benchmarks.harness.case import Op
from benchmarks.harness.samples import Sample


def modules() -> Iterator[ModuleType]:
    """Yield every ``bench_*.py`` of this folder."""
    for module in iter_modules(__path__):
        if module.name.startswith("bench_"):
            yield import_module(f"{__name__}.{module.name}")


@cache
def every_op() -> dict[str, Op]:
    """Return every op that is declared, by its name."""
    return {op.name: op for module in modules() for op in vars(module).values() if isinstance(op, Op)}


@cache
def every_sample() -> dict[str, Sample]:
    """Return the sample calls of every op, by their names: one for every function and its ways to be called."""
    return {name: sample for module in modules() for name, sample in module.SAMPLES.items()}


@cache
def every_variant() -> dict[str, Sample]:
    """Return all samples, and those calls that are there because they launch further kernels."""
    more = (getattr(module, "VARIANTS", {}) for module in modules())
    return every_sample() | {name: sample for variants in more for name, sample in variants.items()}
