"""Arithmetic of float32, and conversions.

Sums, products, quotients, roots and ``fma`` are rounded exactly as IEEE 754 says. Of ``ex2.approx`` and ``rcp.approx``
the nearest float32 is returned; a GPU's may differ from that by the errors that the PTX manual documents, a unit or two
in the last place.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .frame import KINDS, Frame, Mask, Run, operation, put
from .parse import Instruction
from .rounding import flushed, fma

_EXACT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": lambda a: np.float32(1) / a,
    "fma": fma,
    "copysign": lambda sign, a: np.copysign(a, sign),
}
_APPROXIMATE = {
    "ex2": lambda a: np.asarray(np.exp2(a.astype(np.float64))).astype(np.float32),
    "rcp": _EXACT["rcp"],
}


@operation(r"(?P<root>add|sub|mul|div|sqrt|rcp|fma)\.rn(?P<ftz>(\.ftz)?)\.f32")
@operation(r"(?P<root>neg|abs)(?P<ftz>(\.ftz)?)\.f32")
def exact(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Round to nearest."""
    return _arithmetic(frame, instruction, _EXACT[match["root"]], bool(match["ftz"]))


@operation(r"fma\.rm(?P<ftz>(\.ftz)?)\.f32")
def fma_downwards(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Round towards minus infinity."""
    return _arithmetic(frame, instruction, lambda a, b, c: fma(a, b, c, downwards=True), bool(match["ftz"]))


@operation(r"copysign\.f32")
def copy_sign(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return the second number with the sign of the first."""
    return _arithmetic(frame, instruction, _EXACT["copysign"], False)


@operation(r"(?P<root>ex2|rcp)\.approx(?P<ftz>(\.ftz)?)\.f32")
def approximate(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return the nearest number."""
    return _arithmetic(frame, instruction, _APPROXIMATE[match["root"]], bool(match["ftz"]))


def _arithmetic(frame: Frame, instruction: Instruction, function: Callable[..., np.ndarray], ftz: bool) -> Run:
    target, sources = frame.target(instruction.operands[0], "f32"), frame.sources(instruction, "f32")

    def run(mask: Mask) -> None:
        if ftz:
            put(target, flushed(function(*map(flushed, sources))), mask)
        else:
            put(target, function(*sources), mask)

    return run


# ---- conversions ----------------------------------------------------------------------------------------------------

_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@operation(r"cvt\.(?P<to>[su](8|16|32|64))\.(?P<source>[su](8|16|32|64))")
def integer_to_integer(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Extend by the sign of the source, or cut off."""
    first, second = instruction.operands
    target, source = frame.target(first, match["to"]), frame.read(second, match["source"])
    return lambda mask: put(target, source.astype(KINDS[match["to"]]), mask)


@operation(r"cvt\.rn\.f32\.(?P<source>[su](32|64))")
def integer_to_float(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Round to nearest."""
    first, second = instruction.operands
    target, source = frame.target(first, "f32"), frame.read(second, match["source"])
    return lambda mask: put(target, source.astype(np.float32), mask)


@operation(r"cvt\.(?P<rounding>r[nzmp]i)(\.ftz)?\.(?P<to>[su]32)\.f32")
def float_to_integer(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Round; what is beyond the integers becomes the last of them, NaN becomes 0."""
    first, second = instruction.operands
    target, source = frame.target(first, match["to"]), frame.read(second, "f32")
    limits = np.iinfo(KINDS[match["to"]])
    around = _TO_INTEGER[match["rounding"]]
    flush = flushed if ".ftz." in instruction.opcode else np.asarray

    def run(mask: Mask) -> None:
        whole = np.clip(around(flush(source).astype(np.float64)), limits.min, limits.max)
        put(target, np.where(np.isnan(whole), 0, whole).astype(np.int64).astype(KINDS[match["to"]]), mask)

    return run


@operation(r"cvt(\.(?P<rounding>r[nzmp]i))?(?P<ftz>(\.ftz)?)(?P<sat>(\.sat)?)\.f32\.f32")
def float_to_float(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Round to a whole number, and with ``sat`` to what is between 0 and 1, of NaN to 0."""

    def function(a: np.ndarray) -> np.ndarray:
        if match["rounding"]:
            a = _TO_INTEGER[match["rounding"]](a)
        return np.where(np.isnan(a), np.float32(0), np.clip(a, np.float32(0), np.float32(1))) if match["sat"] else a

    return _arithmetic(frame, instruction, function, bool(match["ftz"]))
