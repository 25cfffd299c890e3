"""Where the arrays of a call lie: what an op writes must be writable, and nothing that it reads may lie there too."""

from __future__ import annotations

from typing import Any

from bnkernels.runtime.checks import Signature
from bnkernels.runtime.seam import Runtime

WRITEABLE = 0x400  # bit of NumPy's flags
Reach = tuple[int, int]


def reach(signature: Signature | None) -> Reach | None:
    """Return start and end of an array's memory, in bytes from its first element; None if it has none."""
    if signature is None or 0 in signature[2]:
        return None
    _, dtype, shape, strides = signature
    ends = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    return sum(end for end in ends if end < 0), sum(end for end in ends if end > 0) + dtype.itemsize


def check_outputs(
    runtime: Runtime | None,
    names: tuple[str, ...],
    arrays: tuple,
    addresses: tuple[int, ...],
    reaches: tuple[Reach | None, ...],
    written: int,
    in_place: tuple[str, ...] = (),
) -> None:
    """Check that the first `written` arrays can be written, and share no memory with another one; any may be None.

    The first array may be exactly one of those named by `in_place`: the same memory in the same layout. The address and
    the `reach` of each array say where it lies.
    """
    if runtime is None:
        for name, array in zip(names[:written], arrays, strict=False):
            if array is not None and not array.flags.num & WRITEABLE:
                writable(name, array)
    ranges = [
        (address + reach[0], address + reach[1]) if reach else (0, 0)
        for address, reach in zip(addresses, reaches, strict=True)
    ]
    if _apart(ranges):
        return
    for i in range(written):
        for j in range(i + 1, len(arrays)):
            if ranges[i][0] >= ranges[j][1] or ranges[j][0] >= ranges[i][1]:
                continue
            if i == 0 and names[j] in in_place and ranges[i] == ranges[j] and _same_layout(arrays[i], arrays[j]):
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


def _same_layout(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.strides == b.strides
