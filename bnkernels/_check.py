"""Argument checks of the ops: everything is checked before the first launch and before anything is written.

`TypeError` for a wrong container or data type, `ValueError` for a wrong shape, layout or value. Every message names the
argument and says what was expected, what came, and the way out.

Most checks depend on nothing but each array's type, data type, shape and strides: its signature. So the ops make them
in cached functions of signatures, once per combination and not once per call.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels._runtime import SUFFIX, Runtime, runtime_of, suffix

Signature = tuple[type, np.dtype, tuple[int, ...], tuple[int, ...]]


def signature(array: Any) -> Signature | None:
    """Return what a cached check needs to know of an array; None for None."""
    if array is None:
        return None
    try:
        return type(array), array.dtype, array.shape, array.strides
    except AttributeError:
        runtime_of(type(array))  # says what was expected
        raise


def signatures(arrays: tuple) -> list[Signature | None]:
    """Return the signature of each array."""
    try:
        return [None if array is None else (type(array), array.dtype, array.shape, array.strides) for array in arrays]
    except AttributeError:
        return [signature(array) for array in arrays]  # says which


@dataclass(frozen=True)
class Argument:
    """A named array argument, known by its signature."""

    name: str
    kind: type
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the array lies in memory in C order."""
        expected = self.dtype.itemsize
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent > 1 and stride != expected and 0 not in self.shape:
                return False
            expected *= extent
        return True

    @property
    def element_strides(self) -> tuple[int, ...]:
        """The strides in elements."""
        return tuple(stride // self.dtype.itemsize for stride in self.strides)


def arguments(signatures: dict[str, Signature | None], optional: tuple[str, ...] = ()) -> dict[str, Argument | None]:
    """Return the arguments of these signatures; all must be arrays of one kind, and None only where optional."""
    found: dict[str, Argument | None] = {}
    first: Argument | None = None
    for name, given in signatures.items():
        if given is None:
            if name not in optional:
                raise TypeError(f"{name} must be an array, got None")
            found[name] = None
            continue
        found[name] = argument = Argument(name, *given)
        first = first or argument
        if runtime_of(argument.kind) is not runtime_of(first.kind):
            raise TypeError(
                f"{name} is a {_kind(argument)} but {first.name} is a {_kind(first)}; nothing is transferred silently: "
                "convert one of them with cupy.asarray or cupy.asnumpy"
            )
    return found


def _kind(argument: Argument) -> str:
    return f"{argument.kind.__module__}.{argument.kind.__qualname__}"


def matrix(argument: Argument) -> tuple[int, int]:
    """Check for a floating-point matrix; return its shape."""
    name = argument.name
    if argument.dtype not in SUFFIX:
        raise TypeError(
            f"{name} must be float32 or float64, got {argument.dtype}; convert it with {name}.astype('float32')"
        )
    if len(argument.shape) != 2:
        raise ValueError(f"{name} must have the shape (N, C), got {argument.shape}; reshape it to two dimensions")
    return argument.shape


def floating(argument: Argument) -> None:
    """Check for a data type of the batch-norm kernels."""
    if suffix(argument.dtype) is None:
        name = argument.name
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {argument.dtype}; convert it with "
            f"{name}.astype('float32')"
        )


def like(argument: Argument | None, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check for exactly this shape and data type, where given."""
    if argument is None:
        return
    name = argument.name
    if argument.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {argument.dtype}; convert it with {name}.astype('{dtype}')")
    if argument.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {argument.shape}")


def contiguous(argument: Argument | None, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check for exactly this shape and data type, in C order, where given."""
    like(argument, shape, dtype)
    if argument is not None and not argument.contiguous:
        raise ValueError(
            f"{argument.name} must be contiguous in C order, got strides {argument.strides}; pass a contiguous array"
            " (writing to a silent copy would lose the result)"
        )


def one_device(runtime: Runtime, names: tuple[str, ...], arrays: tuple) -> None:
    """Check that all arrays of a runtime, None apart, are on one of its devices."""
    devices = [runtime.device(array) for array in arrays if array is not None]
    if devices.count(devices[0]) == len(devices):
        return
    given = [name for name, array in zip(names, arrays, strict=True) if array is not None]
    first, wanted = given[0], devices[0]
    for name, device in zip(given, devices, strict=True):
        if device != wanted:
            raise ValueError(f"{name} is on device {device} but {first} is on device {wanted}; move one of them")


def no_overlap(
    runtime: Runtime | None, names: tuple[str, ...], arrays: tuple, written: int, in_place: tuple[str, ...] = ()
) -> None:
    """Check that none of the first `written` arrays shares memory with another one; any may be None.

    The first array may be exactly one of those named by `in_place`: the same memory in the same layout.
    """
    if runtime is None:
        # Arrays that are not views of the same array are told apart by identity: this is the hot path on the CPU.
        owners = [_owner(array) for array in arrays]
        ranges = [(0, 0)] * len(arrays)
    else:
        owners = [0] * len(arrays)
        ranges = _byte_ranges(runtime, arrays)
        if _apart(ranges):
            return
    for i in range(written):
        if owners.count(owners[i]) == 1 or arrays[i] is None:
            continue
        start, end = ranges[i]
        for j in range(i + 1, len(arrays)):
            if owners[i] != owners[j] or arrays[j] is None:
                continue
            if runtime is None:
                if not np.may_share_memory(arrays[i], arrays[j]):
                    continue
            elif start >= ranges[j][1] or ranges[j][0] >= end:
                continue
            if i == 0 and names[j] in in_place and _same_layout(runtime, arrays[i], arrays[j]):
                continue
            given = [name for name, array in zip(names, arrays, strict=True) if name in in_place and array is not None]
            hint = f"; {names[0]} may be exactly {' or '.join(given)}" if given else ""
            raise ValueError(f"{names[i]} overlaps {names[j]} in memory{hint}; pass a separate array")


def _apart(ranges: list[tuple[int, int]]) -> bool:
    """Return whether no two of these ranges overlap."""
    last = 0
    for start, end in sorted(ranges):
        if start < last:
            return False
        last = end
    return True


def _owner(array: np.ndarray | None) -> int:
    """Return a number that arrays share where they may share memory: 0 for all memory that NumPy does not own."""
    if array is None:
        return -1
    base = array.base
    if base is None:
        return id(array)
    return _owner(base) if isinstance(base, np.ndarray) else 0


def _same_layout(runtime: Runtime | None, a: Any, b: Any) -> bool:
    if a is b:
        return True
    address = (lambda array: array.ctypes.data) if runtime is None else runtime.pointer
    return a.shape == b.shape and a.strides == b.strides and address(a) == address(b)


def _byte_ranges(runtime: Runtime, arrays: tuple) -> list[tuple[int, int]]:
    """Return of each array the first address of its memory and the one behind its last; (0, 0) for no memory."""
    ranges = []
    for array in arrays:
        reach = None if array is None else _reach(array.shape, array.strides, array.dtype)
        if reach is None:
            ranges.append((0, 0))
        else:
            address = runtime.pointer(array)
            ranges.append((address + reach[0], address + reach[1]))
    return ranges


@lru_cache(maxsize=1024)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> tuple[int, int] | None:
    """Return where the memory of an array starts and ends, in bytes from its first element; None if it has none."""
    if 0 in shape:
        return None
    ends = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    return sum(end for end in ends if end < 0), sum(end for end in ends if end > 0) + dtype.itemsize


def number(name: str, given: float, low: float, high: float = sys.float_info.max) -> float:
    """Check for a finite real number between two bounds, both allowed; return it as a float."""
    if type(given) is float and low <= given <= high:
        return given + 0.0  # -0.0 is 0
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {given!r}") from None
    if not (low <= number <= high and math.isfinite(number)):
        wanted = f"at least {low}" if high == sys.float_info.max else f"between {low} and {high}"
        raise ValueError(f"{name} must be {wanted} and finite, got {given!r}")
    return number + 0.0


def integer(name: str, given: Any) -> int:
    """Check for an integer; return it as an int."""
    if type(given) is int:
        return given
    try:
        return operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {given!r}") from None


def boolean(name: str, given: Any) -> bool:
    """Check for True or False; return it as a bool."""
    if not isinstance(given, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {given!r}")
    return bool(given)


def renorm_limits(given: Any) -> tuple[float, float] | None:
    """Check for the limits of batch renormalisation, or None; return them as floats."""
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"renorm must be a tuple (r_max, d_max), such as (3.0, 5.0), got {given!r}")
    return number("r_max", given[0], 1), number("d_max", given[1], 0)


def pack_outputs(out: Any, names: tuple[str, ...]) -> tuple:
    """Check `out`, a tuple with one array for every name, or None; return it, or as many None."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, tuple) or len(out) != len(names) or type(None) in map(type, out):
        raise TypeError(f"out must be a tuple of the {len(names)} arrays ({', '.join(names)}), got {out!r}")
    return out


def pack_gradients(out: Any, residual: Any) -> tuple[Any, ...]:
    """Return the four arrays of `out`, or None for each; the last is None without a residual."""
    if residual is not None:
        return pack_outputs(out, ("dx", "dgamma", "dbeta", "dresidual"))
    return *pack_outputs(out, ("dx", "dgamma", "dbeta")), None
