"""Engine of NumPy arrays: kernels compiled by Numba where it is installed, else the NumPy reference of each op.

Nothing of Numba is imported before the first call with NumPy arrays.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import TextIO

ENGINES = ("auto", "compiled", "reference")
VARIABLE = "BNKERNELS_CPU_ENGINE"
PACKAGES = ("numba", "scipy")  # SciPy has the BLAS that Numba calls
REFERENCE, COMPILED = "NumPy reference", "compiled by Numba"

_wanted = ""  # set by `using`, above the environment variable
_modules: dict[str, ModuleType | None] = {}  # modules in use, by name


def kernels(name: str) -> ModuleType | None:
    """Return the module of compiled kernels of this name, or None where the reference computes.

    Parameters
    ----------
    name : str
        Full name of the module, such as ``bnkernels.ops.batch_norm.cpu``.
    """
    try:
        return _modules[name]
    except KeyError:
        module = _modules[name] = importlib.import_module(name) if why_reference() is None else None
        return module


def why_reference() -> str | None:
    """Return why NumPy arrays are computed by the reference, and the way out; None if compiled kernels compute.

    Raises
    ------
    RuntimeError
        If compiled kernels are demanded and a package is missing, or the demand is none.
    """
    wanted = _wanted or os.environ.get(VARIABLE, "") or "auto"
    if wanted not in ENGINES:
        raise RuntimeError(f"{VARIABLE} must be one of {', '.join(ENGINES)}, got {wanted!r}")
    if wanted == "reference":
        return f"{VARIABLE} is reference"
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if not missing:
        return None
    reason = f"{' and '.join(missing)} cannot be found; install bnkernels[cpu] for compiled kernels"
    if wanted == "compiled":
        raise RuntimeError(f"{VARIABLE} is compiled, but {reason}")
    return reason


def engine() -> str:
    """Return in words what computes NumPy arrays."""
    return COMPILED if why_reference() is None else REFERENCE


def compilation_shown(stream: TextIO | None) -> AbstractContextManager[None]:
    """Return a context in which a stream tells of kernels that are compiled, which happens once per machine."""
    if stream is None or why_reference() is not None:
        return nullcontext()
    return importlib.import_module("bnkernels.runtime.cpu.progress").compilation_shown(stream)


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Let all NumPy arrays be computed by ``compiled`` kernels or the ``reference`` meanwhile, for tests of both."""
    global _wanted
    before, _wanted = _wanted, wanted
    _modules.clear()
    try:
        why_reference()
        yield
    finally:
        _wanted = before
        _modules.clear()
