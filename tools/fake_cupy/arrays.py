"""Arrays of the stand-in for CuPy with arithmetic: NumPy's, of which products by a library cannot be captured."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tools import fake_cupy as package


class Pointer:
    """``cupy.cuda.MemoryPointer``."""

    def __init__(self, array: Array) -> None:
        self.ptr, self.device_id, self._array = array._memory.ctypes.data, array._device, array

    def copy_from_device_async(self, src: Pointer, size: int, stream: Any = None) -> None:
        """Copy bytes in the order of the stream."""
        target, source_bytes = (pointer._array._memory.view(np.uint8).reshape(-1) for pointer in (self, src))

        def work() -> None:
            target[:size] = source_bytes[:size]

        self._array.driver.enqueue(work)


class Array(package.Array):
    """``cupy.ndarray`` with NumPy's arithmetic."""

    data = property(Pointer)
    ndim = property(lambda self: self._memory.ndim)
    T = property(lambda self: self.view_of(self._memory.T))
    flags = property(lambda self: self._memory.flags)

    def reshape(self, *shape: Any) -> Array:
        """Return a view of another shape."""
        return self.view_of(self._memory.reshape(*shape))

    def ravel(self) -> Array:
        """Return a view of one axis."""
        return self.reshape(-1)

    def transpose(self, *axes: Any) -> Array:
        """Return a view with other axes."""
        return self.view_of(self._memory.transpose(*axes))

    def __getitem__(self, key: Any) -> Array:
        """Return a view, or for an array of indices a copy."""
        if any(isinstance(index, package.Array) for index in (key if isinstance(key, tuple) else (key,))):
            return computed(self.driver, operator.getitem, (self, key), {})
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Set elements, in the order of the stream."""
        self.driver.enqueue(functools.partial(np.asarray(self._memory).__setitem__, bare(key), bare(value)))

    def __len__(self) -> int:
        return len(self._memory)

    def __int__(self) -> int:
        return int(self.item())

    __index__ = __int__


OPERATORS = (
    "abs add and eq floordiv ge gt invert le lt matmul mod mul ne neg or pow radd rmul rsub rtruediv sub truediv"
)
IN_PLACE = "iadd imul isub itruediv"
BLAS = {"matmul", "rmatmul", "dot", "tensordot", "einsum", "inner"}  # by a library that CuPy does not capture
METHODS = "all any argmax astype copy max mean min sum var"


def _method(name: str) -> Callable[..., Any]:
    def method(self: Array, *args: Any, **given: Any) -> Any:
        return computed(self.driver, getattr(np.asarray(self._memory), name), args, given)

    return method


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: Array, other: Any) -> Array:
        computed(self.driver, getattr(np.asarray(self._memory), name), (other,), {})
        return self

    return method


for _name in IN_PLACE.split():
    setattr(Array, f"__{_name}__", _in_place(f"__{_name}__"))
for _name in (*(f"__{name}__" for name in OPERATORS.split()), *METHODS.split()):
    setattr(Array, _name, _method(_name))


def bare(value: Any) -> Any:
    """Return NumPy arrays for arrays of the stand-in, also within lists and tuples."""
    if isinstance(value, package.Array):
        return np.asarray(value._memory)
    return type(value)(map(bare, value)) if type(value) in (list, tuple) else value


def computed(driver: package.Driver, function: Callable[..., Any], args: Sequence, given: dict) -> Any:
    """Call a function of NumPy on the arrays' memory; return its result as an array of the stand-in."""
    if driver.capture is not None:
        return _captured(driver, function, args, given)
    result = function(*map(bare, args), **{name: bare(value) for name, value in given.items()})
    if given.get("out") is not None:
        return given["out"]
    if isinstance(result, np.ndarray | np.generic):
        return driver.new(result)
    return result


def _captured(driver: package.Driver, function: Callable[..., Any], args: Sequence, given: dict) -> Any:
    """Call a function of NumPy whenever the graph is launched; what it returns now has only its shape and type."""
    if function.__name__.strip("_") in BLAS:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    work = functools.partial(function, *map(bare, args), **{name: bare(value) for name, value in given.items()})
    if given.get("out") is not None or function.__name__.strip("_") in IN_PLACE.split():
        driver.enqueue(work)
        return given.get("out")
    result = driver.new(np.zeros_like(work()))
    driver.enqueue(lambda: np.asarray(result._memory).__setitem__(..., work()))
    return result
