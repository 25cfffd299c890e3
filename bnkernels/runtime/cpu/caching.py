"""Numba's decorators with a cache on disk, which is renewed with every file that a kernel is made of."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.types import unliteral

from bnkernels.runtime.cpu.parts import PartCompiler

OURS = re.compile(r"^from (bnkernels[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)
NOWHERE = (
    "compiled CPU kernels cannot be kept, so that every process compiles them anew: neither the package's folder nor "
    "the user's cache folder can be written; set NUMBA_CACHE_DIR to a folder that can"
)


def cached(**options: Any) -> Callable[[Callable], Any]:
    """Return a decorator like ``numba.njit(cache=True, **options)``, and without the cache if Python cannot call it.

    Numba looks only at the file of a function: a kernel would go on with what it has compiled in of another file that
    has changed since. And where no folder can be written it would raise an error; this warns, once, and goes on.

    Parameters
    ----------
    **options : any
        Options of ``numba.njit``.
    """
    options = {"forceinline": False, **options}  # not given, it would be that of its first caller

    def decorate(function: Callable) -> Any:
        part = options.get("no_cpython_wrapper", False)
        dispatcher = numba.njit(**options, **({"pipeline_class": PartCompiler} if part else {}))(function)
        _take_constants_as_numbers(dispatcher)
        if part:
            return dispatcher
        try:
            dispatcher.enable_caching()
        except RuntimeError as error:
            if "no locator" not in str(error):
                raise
            _warn()
        else:
            index = dispatcher._cache._cache_file
            index._source_stamp = (index._source_stamp, _stamps(function.__module__))
        return dispatcher

    return decorate


def _take_constants_as_numbers(dispatcher: Any) -> None:
    """Let kernels pass constants as numbers: Numba would compile a function anew for each constant."""
    resolve = dispatcher.get_call_template

    def resolve_numbers(given: tuple, named: dict[str, Any]) -> Any:
        return resolve(tuple(map(unliteral, given)), {name: unliteral(of) for name, of in named.items()})

    dispatcher.get_call_template = resolve_numbers


@cache
def _warn() -> None:
    warnings.warn(NOWHERE, RuntimeWarning, stacklevel=3)


@cache
def _stamps(module: str) -> tuple[tuple[str, float, int], ...]:
    """Return time and size of the files of a module and of all that it imports of ours, which is loaded already."""
    found, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        if name in found or name not in sys.modules:
            continue
        file = Path(sys.modules[name].__file__)
        found[name] = (name, file.stat().st_mtime, file.stat().st_size)
        for parent, names in OURS.findall(file.read_text(encoding="utf-8")):
            waiting += [parent, *(f"{parent}.{word}" for word in re.findall(r"\w+", names))]
    return tuple(sorted(found.values()))
