"""How many instructions warps execute, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("float", "integer", "shared", "global", "control", "shuffle", "barrier", "special", "other", "move")
_CONTROL = {"bra", "ret", "exit"}
_BARRIERS = {"bar", "barrier", "membar", "fence"}
_SPECIAL = {"div", "rem", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"}
_ARITHMETIC = {
    *("add", "sub", "mul", "mad", "fma", "neg", "abs", "min", "max", "copysign"),
    *("and", "or", "xor", "not", "shl", "shr", "popc"),
}


def kind_of(opcode: str) -> str:
    """Return the kind of an instruction.

    ``float`` and ``integer`` are arithmetic and logic; ``special`` are quotients, remainders, roots and exponentials,
    each of which becomes several machine instructions; ``shared`` and ``global`` are loads, stores and atomics;
    ``other`` are conversions, comparisons, selections, logic of predicates, and loads of arguments; ``move`` are moves.
    """
    root, *modifiers = opcode.split(".")
    if root in _SPECIAL:
        return "special"
    if root in _CONTROL:
        return "control"
    if root in _BARRIERS:
        return "barrier"
    if root == "mov":
        return "move"
    if root == "shfl":
        return "shuffle"
    if root in ("ld", "st", "atom", "red"):
        return next((space for space in ("shared", "global") if space in modifiers), "other")
    if root in _ARITHMETIC and "pred" not in modifiers:
        return "float" if modifiers[-1].startswith("f") else "integer"
    return "other"


@dataclass
class Counts:
    """Instructions executed by warps: one that a warp issues for any of its threads counts once.

    It counts also where a guard in front of it holds for none of them. Adds and subtracts kind by kind.
    """

    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def total(self) -> int:
        """Of all kinds together but moves, which machine code mostly does without: it gives the values one register."""
        return sum(self.by_kind.values()) - self.by_kind["move"]

    def __add__(self, other: Counts) -> Counts:
        return Counts({kind: self.by_kind[kind] + other.by_kind[kind] for kind in KINDS})

    def __sub__(self, other: Counts) -> Counts:
        return Counts({kind: self.by_kind[kind] - other.by_kind[kind] for kind in KINDS})
