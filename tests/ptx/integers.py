"""Integers, bits, predicates, moves, selections and comparisons."""

from __future__ import annotations

import re

import numpy as np

from .frame import SHARED_WINDOW, Frame, Mask, Run, operation, put
from .parse import Instruction
from .rounding import flushed

_PLAIN = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,  # of bool: not
    "neg": np.negative,
    "abs": np.abs,
}


@operation(r"(?P<root>add|sub|mul\.lo|min|max|neg|abs)\.(?P<kind>[su](16|32|64))")
@operation(r"(?P<root>and|or|xor|not)\.(?P<kind>b16|b32|b64|pred)")
def plain(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Integers wrap around, as those of NumPy do."""
    function, kind = _PLAIN[match["root"]], match["kind"]
    target, sources = frame.target(instruction.operands[0], kind), frame.sources(instruction, kind)

    def run(mask: Mask) -> None:
        function(*sources, out=target, where=mask)

    return run


@operation(r"mad\.lo\.(?P<kind>[su](32|64))")
def multiply_and_add(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return a b + c."""
    target, (a, b, c) = frame.target(instruction.operands[0], match["kind"]), frame.sources(instruction, match["kind"])
    return lambda mask: put(target, a * b + c, mask)


@operation(r"(?P<root>mul|mad)\.(?P<part>wide|hi)\.(?P<kind>[su]32)")
def wide_product(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return all bits of a product of 32-bit integers, or the upper half; perhaps with a sum behind."""
    narrow, wide = match["kind"], match["kind"][0] + "64"
    of_result = wide if match["part"] == "wide" else narrow
    first, a, b, *more = instruction.operands
    target = frame.target(first, of_result)
    factors = frame.read(a, narrow), frame.read(b, narrow)
    addends = [frame.read(c, of_result) for c in more]

    def run(mask: Mask) -> None:
        product = np.multiply(*factors, dtype=np.int64 if narrow == "s32" else np.uint64)
        if match["part"] == "hi":
            product = (product >> 32).astype(target.dtype)
        put(target, product + addends[0] if addends else product, mask)

    return run


@operation(r"(?P<root>div|rem)\.(?P<kind>[su](32|64))")
def quotient(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return a quotient, rounded towards 0, or its remainder, which has the sign of the dividend."""
    target, (a, b) = frame.target(instruction.operands[0], match["kind"]), frame.sources(instruction, match["kind"])
    whole = match["root"] == "div"

    def run(mask: Mask) -> None:
        remainder = np.fmod(a, b)
        put(target, (a - remainder) // b if whole else remainder, mask)

    return run


@operation(r"(?P<root>shl|shr)\.(?P<kind>[bsu](16|32|64))")
def shift(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Shift by any number of places: beyond the width nothing is left but zeros, or signs."""
    kind = match["kind"]
    first, *operands = instruction.operands
    target, a, places = frame.target(first, kind), frame.read(operands[0], kind), frame.read(operands[1], "u32")
    width = 8 * target.dtype.itemsize
    left, signed = match["root"] == "shl", target.dtype.kind == "i"
    function = np.left_shift if left else np.right_shift

    def run(mask: Mask) -> None:
        within = np.minimum(places, width - 1).astype(target.dtype)
        shifted = function(a, within)
        put(target, shifted if signed and not left else np.where(places < width, shifted, 0), mask)

    return run


@operation(r"popc\.b32")
def count_bits(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return how many bits are 1."""
    first, second = instruction.operands
    target, bits = frame.target(first, "u32"), frame.read(second, "u32")

    def run(mask: Mask) -> None:
        each = np.atleast_1d(bits).astype("<u4").view(np.uint8).reshape(-1, 4)
        put(target, np.unpackbits(each, axis=1).sum(axis=1, dtype=np.uint32), mask)

    return run


@operation(r"mov\.(?P<kind>pred|[bus](16|64)|[busf]32)")
def move(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Copy, or make 64 bits of two registers, or two of 64."""
    kind, (first, second) = match["kind"], instruction.operands
    if first.startswith("{"):
        source = frame.read(second, kind).view(np.uint32)
        targets = [frame.target(one, "b32") for one in parts(first)]

        def split(mask: Mask) -> None:
            halves = [source[i::2].copy() for i in range(2)]
            for target, half in zip(targets, halves, strict=True):
                put(target, half, mask)

        return split
    target = frame.target(first, kind)
    if second.startswith("{"):
        low, high = (frame.read(one, "b32") for one in parts(second))
        shift = np.uint64(32)
        return lambda mask: put(target, low.astype(np.uint64) | high.astype(np.uint64) << shift, mask)
    source = frame.read(second, kind)
    return lambda mask: put(target, source, mask)


def parts(operand: str) -> list[str]:
    """Return the names in ``{a, b}``; a single one is a vector of one."""
    return [part.strip() for part in operand.strip("{}").split(",")]


@operation(r"cvta(?P<way>(\.to)?)\.(?P<space>global|shared)\.u64")
def generic_address(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Global addresses are generic ones; shared memory is a window among these."""
    first, second = instruction.operands
    target, source = frame.target(first, "u64"), frame.read(second, "u64")
    begin = np.uint64(SHARED_WINDOW if match["space"] == "shared" else 0)
    return lambda mask: put(target, source - begin if match["way"] else source + begin, mask)


@operation(r"selp\.(?P<kind>[bus](16|64)|[busf]32)")
def select(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Return the first where the predicate holds, else the second."""
    target = frame.target(instruction.operands[0], match["kind"])
    one, two = (frame.read(operand, match["kind"]) for operand in instruction.operands[1:3])
    predicate = frame.read(instruction.operands[3], "pred")
    return lambda mask: put(target, np.where(predicate, one, two), mask)


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@operation(r"setp\.(?P<test>eq|ne|lt|le|gt|ge)\.(?P<kind>[bsu](16|32|64))")
def compare(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Compare integers."""
    target, (a, b) = frame.target(instruction.operands[0], "pred"), frame.sources(instruction, match["kind"])
    function = _COMPARISONS[match["test"]]

    def run(mask: Mask) -> None:
        function(a, b, out=target, where=mask)

    return run


@operation(r"setp\.(?P<test>eq|ne|lt|le|gt|ge|num|nan)(?P<unordered>u?)(?P<ftz>(\.ftz)?)\.f32")
def compare_floats(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """With NaN a comparison is false, one that ends with ``u`` true."""
    target, (a, b) = frame.target(instruction.operands[0], "pred"), frame.sources(instruction, "f32")
    test, flush = match["test"], flushed if match["ftz"] else np.asarray

    def run(mask: Mask) -> None:
        nan = np.isnan(a) | np.isnan(b)
        if test in ("num", "nan"):
            holds = nan == (test == "nan")
        else:
            holds = _COMPARISONS[test](flush(a), flush(b))
            holds = holds | nan if match["unordered"] else holds & ~nan
        put(target, holds, mask)

    return run
