"""Where the arrays of a call lie: what an op writes must be writable, and nothing that it reads may lie there too."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.runtime.seam import Runtime

OWNDATA, WRITEABLE = 0x4, 0x400  # bits of NumPy's flags
FOREIGN = 0  # owns what NumPy does not: another library's memory, a mapped file, what `as_strided` makes


def check_outputs(
    runtime: Runtime | None, names: tuple[str, ...], arrays: tuple, written: int, in_place: tuple[str, ...] = ()
) -> None:
    """Check that the first `written` arrays can be written, and share no memory with another one; any may be None.

    The first array may be exactly one of those named by `in_place`: the same memory in the same layout.
    """
    if runtime is None:
        owners = _owners(names, arrays, written)
        if FOREIGN not in owners and len(set(owners)) == len(owners):
            return
    else:
        owners = [FOREIGN] * len(arrays)
        ranges = _byte_ranges(runtime, arrays)
        if _apart(ranges):
            return
    for i in range(written):
        if arrays[i] is None:
            continue
        for j in range(i + 1, len(arrays)):
            if arrays[j] is None or (owners[i] != owners[j] and FOREIGN not in (owners[i], owners[j])):
                continue
            if runtime is None:
                if not np.may_share_memory(arrays[i], arrays[j]):
                    continue
            elif ranges[i][0] >= ranges[j][1] or ranges[j][0] >= ranges[i][1]:
                continue
            if i == 0 and names[j] in in_place and _same_layout(runtime, arrays[i], arrays[j]):
                continue
            given = [name for name, array in zip(names, arrays, strict=True) if name in in_place and array is not None]
            hint = f"; {names[0]} may be exactly {' or '.join(given)}" if given else ""
            raise ValueError(f"{names[i]} overlaps {names[j]} in memory{hint}; pass a separate array")


def writable(name: str, array: Any) -> None:
    """Check that a NumPy array can be written."""
    if not array.flags.writeable:
        raise ValueError(f"{name} must be writable, got a read-only array; pass a copy, as {name}.copy() makes it")


def _apart(ranges: list[tuple[int, int]]) -> bool:
    """Return whether no two of these ranges overlap."""
    last = 0
    for start, end in sorted(ranges):
        if start < last:
            return False
        last = end
    return True


def _owners(names: tuple[str, ...], arrays: tuple, written: int) -> list[int]:
    """Return numbers that NumPy arrays share where they may share memory, and check that the first can be written.

    This is the hot path on the CPU: arrays that NumPy has allocated one by one are told apart by identity, and one look
    at its flags is all that such an array costs.
    """
    owners = []
    for place, array in enumerate(arrays):
        if array is None:
            owners.append(~place)
            continue
        flags = array.flags.num
        if place < written and not flags & WRITEABLE:
            writable(names[place], array)
        owners.append(id(array) if flags & OWNDATA else _owner(array.base))
    return owners


def _owner(base: Any) -> int:
    """Return the number of what a view looks at; `FOREIGN` for memory that NumPy does not own."""
    while isinstance(base, np.ndarray):
        if base.flags.owndata:
            return id(base)
        base = base.base
    return FOREIGN


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
    """Return start and end of the memory of an array, in bytes from its first element; None if it has none."""
    if 0 in shape:
        return None
    ends = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    return sum(end for end in ends if end < 0), sum(end for end in ends if end > 0) + dtype.itemsize
