"""Loads, stores, atomics, shuffles, and what only orders them."""

from __future__ import annotations

import re

import numpy as np

from .frame import KINDS, WARP, Frame, Mask, Run, operation, put
from .integers import parts
from .memory import AccessError
from .parse import Instruction

_SPACE = r"(?P<space>global|shared|param)"
_KIND = r"(?P<kind>[bus](8|16|32|64)|f32)"


@operation(rf"ld(\.volatile|\.relaxed\.\w+|\.acquire\.\w+)?\.{_SPACE}(\.nc)?(\.v(?P<count>[24]))?\.{_KIND}")
def load(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Load a number or a vector."""
    first, where = instruction.operands
    targets = [frame.target(name, match["kind"]) for name in parts(first)]
    _check_count(match, len(targets))
    addresses, kind, memory = frame.address(where), KINDS[match["kind"]], frame.memories[match["space"]]

    def run(mask: Mask) -> None:
        values = memory.load(addresses(mask), kind, len(targets), mask)
        for i, target in enumerate(targets):
            target[... if mask is True else mask] = values[:, i]

    return run


@operation(rf"st(\.volatile|\.relaxed\.\w+|\.release\.\w+)?\.{_SPACE}(\.v(?P<count>[24]))?\.{_KIND}")
def store(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Store a number or a vector."""
    where, second = instruction.operands
    sources = [np.broadcast_to(frame.read(name, match["kind"]), frame.lanes) for name in parts(second)]
    _check_count(match, len(sources))
    addresses, memory = frame.address(where), frame.memories[match["space"]]

    def run(mask: Mask) -> None:
        values = np.stack([source if mask is True else source[mask] for source in sources], axis=1)
        memory.store(addresses(mask), values, mask)

    return run


def _check_count(match: re.Match[str], count: int) -> None:
    if count != int(match["count"] or 1):
        raise ValueError(f"{count} registers")


@operation(r"(?P<root>atom|red)(\.\w+)*?\.global(\.\w+)*?\.add\.(?P<kind>[su]32|[su]64)")
def atomic_add(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Add one lane after the other; return what was there before."""
    *result, where, operand = instruction.operands
    targets = [frame.target(name, match["kind"]) for name in result]
    source = np.broadcast_to(frame.read(operand, match["kind"]), frame.lanes)
    addresses, kind, memory = frame.address(where), KINDS[match["kind"]], frame.memories["global"]

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(np.broadcast_to(mask, frame.lanes))
        for lane, address in zip(lanes, addresses(mask), strict=True):
            at = np.array([address])
            before = memory.load(at, kind, 1, True)
            memory.store(at, before + source[lane : lane + 1], True)
            for target in targets:
                target[lane] = before[0, 0]

    return run


@operation(r"(membar|fence)(\.\w+)+")
def fence(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Do nothing: what is written here can be read at once."""
    return lambda mask: None


@operation(r"shfl\.sync\.(?P<way>bfly|up|down|idx)\.b32")
def shuffle(frame: Frame, instruction: Instruction, match: re.Match[str]) -> Run:
    """Take the value of another lane of the warp; that it takes part is checked before, but for the source."""
    first, *operands = instruction.operands
    names = [name.strip() for name in first.split("|")]
    target = frame.target(names[0], "b32")
    inside = frame.target(names[1], "pred") if len(names) > 1 else None
    value, places, clamps, _ = (np.broadcast_to(frame.read(one, "b32"), frame.lanes) for one in operands)
    lanes = np.arange(frame.lanes)
    own, warp = lanes % WARP, lanes // WARP * WARP

    def run(mask: Mask) -> None:
        source, there = _source_lanes(match["way"], own, places.astype(np.int64), clamps.astype(np.int64))
        source = np.where(there, source, own) + warp
        if mask is not True and not mask[source[mask]].all():
            raise AccessError("a shuffle from a lane that takes no part in it")
        put(target, value[source], mask)
        if inside is not None:
            put(inside, there, mask)

    return run


def _source_lanes(way: str, own: np.ndarray, places: np.ndarray, clamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lane within the warp that each lane asks for, and whether it is inside the segment."""
    places, clamp, segment = places & 31, clamps & 31, clamps >> 8 & 31
    last, first = (own & segment) | (clamp & ~segment), own & segment
    if way == "up":
        return own - places, own - places >= last
    wanted = {"down": own + places, "bfly": own ^ places, "idx": first | (places & ~segment)}[way]
    return wanted, wanted <= last
