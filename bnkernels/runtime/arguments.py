"""The argument of a kernel, one struct by value: its data types, its layout, and how it is filled."""

from __future__ import annotations

import ctypes
import operator
import struct
from typing import Any

import numpy as np

from bnkernels.runtime.seam import Runtime

SUFFIX = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64"}
# By name, since bfloat16 is a data type of ml_dtypes, which need not be installed.
SUFFIX_16 = {"float16": "f16", "bfloat16": "bf16"}


def suffix(dtype: np.dtype) -> str | None:
    """Return the end of the names of the kernels for data of this type; None if there are none."""
    return SUFFIX.get(dtype) or (SUFFIX_16.get(dtype.name) if dtype.isnative else None)


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the type that kernels compute in, and keep sums and parameters in, for data of this type."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def arguments_type(pointers: str, sizes: str, scalars: str, integers: str) -> dict[np.dtype, np.dtype]:
    """Return the layout of a kernel's argument struct for every data type of the kernels.

    The four strings hold the names of the members, in this order in the struct: addresses, 64-bit sizes and strides,
    scalars of the accumulator's type, 32-bit integers. A test compares them with the structs in ``cuda/``.
    """
    return {
        accumulator: np.dtype(
            [(name, np.uint64) for name in pointers.split()]
            + [(name, np.int64) for name in sizes.split()]
            + [(name, accumulator) for name in scalars.split()]
            + [(name, np.int32) for name in integers.split()],
            align=True,
        )
        for accumulator in SUFFIX
    }


def pack(layout: np.dtype, *values: Any) -> np.ndarray:
    """Return the zero-dimensional structured array of `layout` that holds `values`, for `Runtime.launch`.

    Its memory is a buffer of ctypes: NumPy takes longer to say where its own is than a launch may take.
    """
    record = np.ndarray((), layout, (ctypes.c_char * layout.itemsize)())
    record[()] = values
    return record


def address_of(arguments: np.ndarray) -> int:
    """Return the address of an array that `pack` made; the caller keeps the array alive."""
    return ctypes.addressof(arguments.base)


def empty(runtime: Runtime | None, shape: tuple[int, ...], like: Any, dtype: np.dtype | None = None) -> Any:
    """Return a new array beside `like`, of its data type or another."""
    dtype = like.dtype if dtype is None else dtype
    return np.empty(shape, dtype) if runtime is None else runtime.empty(shape, dtype, like)


class Template:
    """Argument of a kernel but for its addresses: what a plan and its options decide, packed once.

    Parameters
    ----------
    layout : numpy.dtype
        Layout of the argument; its addresses come first, as `arguments_type` puts them.
    members : dict of str to number
        Members that are not addresses; those that are missing are 0.
    places : dict of str to int
        Place of every address member in the tuple that `filled` gets, whose last place is for those that are missing.
    """

    def __init__(self, layout: np.dtype, members: dict[str, Any], places: dict[str, int]) -> None:
        pointers = [name for name in layout.names if layout[name] == np.uint64]
        values = [0 if name in pointers else members.get(name, 0) for name in layout.names]
        self.layout, self._bytes = layout, pack(layout, *values).tobytes()
        self._pick = operator.itemgetter(*[places.get(name, -1) for name in pointers])
        self._write, self._block = struct.Struct(f"={len(pointers)}Q").pack_into, ctypes.c_char * layout.itemsize

    def filled(self, addresses: tuple[int, ...]) -> np.ndarray:
        """Return the argument with these addresses, as `pack` does."""
        block = self._block.from_buffer_copy(self._bytes)
        self._write(block, 0, *self._pick(addresses))
        return np.ndarray((), self.layout, block)


def addresses(runtime: Runtime | None, *arrays: Any) -> tuple[int, ...]:
    """Return the arrays' addresses, 0 for None."""
    pointer = host_pointer if runtime is None else runtime.pointer
    return tuple([0 if array is None else pointer(array) for array in arrays])


def host_pointer(array: np.ndarray) -> int:
    """Return the address of a NumPy array's first element.

    It is the member behind the object's head, part of NumPy's binary interface, in a fifth of the time that
    ``array.ctypes.data`` takes.
    """
    return _pointer_at(id(array) + _HEAD).value or 0


_pointer_at, _HEAD = ctypes.c_void_p.from_address, object.__basicsize__
_probe = np.empty(1)
if host_pointer(_probe) != _probe.ctypes.data:  # another interpreter than CPython may lay objects out otherwise

    def host_pointer(array: np.ndarray) -> int:
        """Return the address of a NumPy array's first element."""
        return array.ctypes.data
