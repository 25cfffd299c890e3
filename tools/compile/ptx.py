"""PTX of the kernels: parameters of the entry points, and floating-point instructions that are not allowed."""

from __future__ import annotations

import re

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)\s+(?:\.ptr[^,]*?)?\w+(?:\[(\d+)\])?")
# An atomic addition of floating-point numbers, whose order, so whose result, changes from run to run.
_FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.(?:[\w:]+\.)*add\.(?:\w+\.)*b?f\d+\w*")
# Without .rn ptxas may contract a product and a sum; mad on floats is contracted already.
_CONTRACTIBLE = re.compile(r"\b(?:(?:add|sub|mul)\.(?!r[nzmp]\b)|mad\.)(?:\w+\.)*f(?:32|64)\b")


def entries(ptx: str) -> dict[str, str]:
    """Return the text of every kernel, that of the first one with the functions before it."""
    starts = list(_ENTRY.finditer(ptx))
    bounds = [0, *[start.start() for start in starts[1:]], len(ptx)]
    return {start[1]: ptx[bounds[i] : bounds[i + 1]] for i, start in enumerate(starts)}


def parameter_bytes(ptx: str) -> dict[str, int]:
    """Return the bytes of every kernel's one parameter.

    Raises
    ------
    ValueError
        If a kernel has no or several parameters.
    """
    sizes = {}
    for kernel, parameters in _ENTRY.findall(ptx):
        found = _PARAMETER.findall(parameters)
        if len(found) != 1:
            raise ValueError(f"{kernel} must have one parameter, a struct by value; it has {len(found)}")
        bits, count = found[0]
        sizes[kernel] = int(bits) // 8 * int(count or 1)
    return sizes


def float_atomics(ptx: str) -> list[str]:
    """Return the atomic floating-point additions."""
    return _FLOAT_ATOMIC.findall(ptx)


def contractible(ptx: str) -> list[str]:
    """Return the floating-point instructions that are not rounded exactly as the source says."""
    return _CONTRACTIBLE.findall(ptx)
