"""Argument checks of the ops: everything is checked before the first launch and before anything is written.

`TypeError` for a wrong container or data type, `ValueError` for a wrong shape, layout or value. Every message names the
argument and says what was expected, what came, and the way out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bnkernels._runtime import SUFFIX, Runtime, runtime_of

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


def same_device(arrays: dict[str, Any]) -> Runtime | None:
    """Check that all arrays that are not None live in one place; return its runtime (None for NumPy)."""
    given = [(name, array) for name, array in arrays.items() if array is not None]
    first_name, first = given[0]
    runtime = runtime_of(first)
    for name, array in given[1:]:
        if type(array) is not type(first) and runtime_of(array) is not runtime:
            raise TypeError(
                f"{name} is a {type(array).__module__}.{type(array).__qualname__} but {first_name} is a "
                f"{type(first).__module__}.{type(first).__qualname__}; nothing is transferred silently: convert one "
                "with cupy.asarray or cupy.asnumpy"
            )
        if runtime is not None and runtime.device(array) != runtime.device(first):
            raise ValueError(
                f"{name} is on device {runtime.device(array)} but {first_name} is on device {runtime.device(first)}; "
                "move one of them"
            )
    return runtime


def matrix(name: str, array: Any) -> tuple[int, int]:
    """Check for a floating-point matrix; return its shape."""
    if array.dtype not in SUFFIX:
        raise TypeError(f"{name} must be float32 or float64, got {array.dtype}; convert it with {name}.astype('float32')")
    if array.ndim != 2:
        raise ValueError(f"{name} must have the shape (N, C), got {array.shape}; reshape it to two dimensions")
    return array.shape


def like(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check for exactly this shape and data type."""
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {array.dtype}; convert it with {name}.astype('{dtype}')")
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {array.shape}")


def contiguous(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check for exactly this shape and data type, in C order: what kernels write to."""
    like(name, array, shape, dtype)
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous in C order, got strides {array.strides}; writing to a copy would lose the "
            "result: pass a contiguous array and copy from it"
        )


def vectors(arrays: dict[str, Any], channels: int, dtype: np.dtype) -> None:
    """Check for contiguous vectors of one value per channel, where given."""
    for name, array in arrays.items():
        if array is not None:
            contiguous(name, array, (channels,), dtype)


def byte_range(runtime: Runtime, array: Any) -> tuple[int, int]:
    """Return the first address of the array's memory and the one behind its last."""
    start = end = runtime.pointer(array)
    if 0 in array.shape:
        return start, start
    for extent, stride in zip(array.shape, array.strides, strict=True):
        reach = (extent - 1) * stride
        start, end = (start + reach, end) if reach < 0 else (start, end + reach)
    return start, end + array.dtype.itemsize


def _share_bytes(runtime: Runtime | None, a: Any, b: Any) -> bool:
    if runtime is None:
        return np.may_share_memory(a, b)
    (start, end), (other_start, other_end) = byte_range(runtime, a), byte_range(runtime, b)
    return start < other_end and other_start < end


def _same_layout(runtime: Runtime | None, a: Any, b: Any) -> bool:
    address = (lambda array: array.ctypes.data) if runtime is None else runtime.pointer
    return a.shape == b.shape and a.strides == b.strides and address(a) == address(b)


def overlaps(
    runtime: Runtime | None, outputs: dict[str, Any], inputs: dict[str, Any], in_place: tuple[str, ...] = ()
) -> None:
    """Check that no output shares memory with an input or another output.

    The first output may be exactly one of the inputs named by `in_place` (the same memory in the same layout).
    """
    arrays = [(name, array) for name, array in (*outputs.items(), *inputs.items()) if array is not None]
    first = next(iter(outputs))
    for i, (name, out) in enumerate(arrays):
        if name not in outputs:
            break
        for other, array in arrays[i + 1 :]:
            if not _share_bytes(runtime, out, array):
                continue
            if name == first and other in in_place and _same_layout(runtime, out, array):
                continue
            hint = f"; {first} may be exactly {' or '.join(in_place)}" if in_place else ""
            raise ValueError(f"{name} overlaps {other} in memory{hint}; pass a separate array")


def number(name: str, given: float, low: float, high: float = math.inf) -> float:
    """Check for a finite real number between two bounds, both allowed; return it as a float."""
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {given!r}") from None
    if not (low <= number <= high and math.isfinite(number)):
        wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {wanted} and finite, got {given!r}")
    return number
