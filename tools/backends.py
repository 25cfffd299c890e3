"""The four backends of an op: NumPy's reference and compiled kernels, emulated kernels, a GPU. One test serves all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from bnkernels.runtime import cpu
from tools import emulator

NUMPY = ("reference", "compiled")  # engines of NumPy arrays
NAMES = (*NUMPY, "emulator", "cuda")
PARAMETERS = [
    *(pytest.param(name, id=name) for name in NUMPY),
    pytest.param("emulator", id="emulator", marks=pytest.mark.emulator),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]


class Backend(NamedTuple):
    """Transfers of arrays to and from a backend."""

    name: str
    asarray: Callable[[Any], Any]  # a C-contiguous copy
    like: Callable[[np.ndarray], Any]  # a copy with the same strides
    asnumpy: Callable[[Any], np.ndarray]
    xp: Any  # the array module

    @property
    def is_numpy(self) -> bool:
        """Whether its arrays are NumPy's, whatever computes them."""
        return self.xp is np

    def arrays(self, *arrays: np.ndarray | None) -> list[Any]:
        """Return a copy of each; None stays None."""
        return [None if array is None else self.asarray(array) for array in arrays]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array that holds NaN: yesterday's right answer must not pass."""
        return self.asarray(np.full(shape, np.nan, dtype))


@cache
def emulated_runtime() -> emulator.EmulatorRuntime:
    """Return the one emulator of this process; without g++ a test is skipped, and a command ends with one line."""
    try:
        emulator.compiler()
    except emulator.EmulatorError as error:
        end = pytest.skip if "PYTEST_CURRENT_TEST" in os.environ else sys.exit
        end(str(error))
    return emulator.from_environment()


class EmulatedNumPy:
    """NumPy, whose new arrays lie in the emulator's memory."""

    def __init__(self, runtime: emulator.EmulatorRuntime) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        """Return NumPy's own function."""
        return getattr(np, name)

    def asarray(self, array: Any) -> emulator.EmulatedArray:
        """Return an emulated copy."""
        return self._runtime.asarray(array)

    def empty(self, shape: Any, dtype: Any) -> emulator.EmulatedArray:
        """Return an emulated array that nobody has written."""
        return self._runtime.empty(shape if isinstance(shape, tuple) else (shape,), dtype)

    def zeros(self, shape: Any, dtype: Any) -> emulator.EmulatedArray:
        """Return emulated zeros."""
        return self._runtime.asarray(np.zeros(shape, dtype))

    def ones(self, shape: Any, dtype: Any) -> emulator.EmulatedArray:
        """Return emulated ones."""
        return self._runtime.asarray(np.ones(shape, dtype))

    def stack(self, arrays: Any) -> emulator.EmulatedArray:
        """Return emulated copies, one behind the other."""
        return self._runtime.asarray(np.stack(arrays))

    def zeros_like(self, array: Any) -> emulator.EmulatedArray:
        """Return emulated zeros of the same shape and data type."""
        return self.zeros(array.shape, array.dtype)


def _like(base: Callable[[np.ndarray], Any], array: np.ndarray) -> Any:
    """Copy an array with its strides, onto a device whose arrays come from `base`, a copy of contiguous bytes."""
    reach = [(extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True)]
    before = -sum(min(r, 0) for r in reach) // array.itemsize
    flat = np.zeros(before + sum(max(r, 0) for r in reach) // array.itemsize + 1, array.dtype)
    view = np.lib.stride_tricks.as_strided(flat[before:], array.shape, array.strides)
    view[...] = array
    xp_flat = base(flat)
    if isinstance(xp_flat, np.ndarray):
        return np.lib.stride_tricks.as_strided(xp_flat[before:], array.shape, array.strides)
    import cupy

    return cupy.lib.stride_tricks.as_strided(xp_flat[before:], array.shape, array.strides)


@contextmanager
def entered(name: str) -> Iterator[Backend]:
    """Compute NumPy arrays by the engine of a backend meanwhile; skip where it is not installed."""
    if name not in NUMPY:
        yield make(name)
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(cpu.using(name))
        except RuntimeError as error:
            pytest.skip(str(error))
        yield make(name)


def make(name: str) -> Backend:
    """Return a backend by name; "numpy" is that of NumPy arrays, computed by whichever engine is in use."""
    if name in ("numpy", *NUMPY):
        copy = partial(np.array, order="C")
        return Backend(name, copy, lambda array: _like(copy, array), np.asarray, np)
    if name == "emulator":
        runtime = emulated_runtime()
        xp = EmulatedNumPy(runtime)
        return Backend(name, runtime.asarray, runtime.like, lambda array: np.array(array, subok=False), xp)
    import cupy

    copy = partial(cupy.array, order="C")
    return Backend(name, copy, lambda array: _like(copy, array), cupy.asnumpy, cupy)
