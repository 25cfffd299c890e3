"""The instructions of a kernel cut into pieces that lanes enter at their beginning and leave at their end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .counts import KINDS, kind_of
from .parse import Instruction, Kernel, PtxError

_EXITS = {"ret", "exit"}
_WAITS_FOR_OTHERS = {"volatile", "relaxed", "acquire"}  # a load of what other blocks are about to write


@dataclass(frozen=True)
class Piece:
    """Instructions that follow one another.

    Attributes
    ----------
    instructions : tuple of Instruction
        All of it.
    end : {"", "branch", "exit", "barrier", "pause"}
        What happens behind the last one; nothing special is "".
    target : int
        Number of the piece that a branch leads to.
    meets : bool
        Whether its first instruction needs all lanes of a mask at once.
    kinds : dict of str to int
        How many instructions of each kind there are.
    """

    instructions: tuple[Instruction, ...]
    end: str
    target: int
    meets: bool
    kinds: dict[str, int]


def _end_of(instruction: Instruction) -> str:
    """Return how an instruction ends a piece, or "" if it does not."""
    root, *modifiers = instruction.opcode.split(".")
    if root == "bra":
        return "branch"
    if root in _EXITS:
        return "exit"
    if _is_barrier(instruction):
        return "barrier"
    return "pause" if root == "ld" and _WAITS_FOR_OTHERS & set(modifiers) else ""


def _is_barrier(instruction: Instruction) -> bool:
    """Tell whether all threads of the block wait here; barriers of some threads are not supported."""
    if instruction.opcode.split(".")[0] not in ("bar", "barrier") or "warp" in instruction.opcode:
        return False
    plain = instruction.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned")
    if not plain or len(instruction.operands) != 1 or instruction.guard:
        raise PtxError(f"not supported: {instruction}")
    return True


def meets(instruction: Instruction) -> bool:
    """Tell whether the lanes of a mask execute this instruction at once."""
    return instruction.opcode.startswith(("shfl.sync.", "bar.warp.sync"))


def pieces(kernel: Kernel) -> list[Piece]:
    """Return the pieces of a kernel, in the order of its text."""
    instructions = kernel.instructions
    cuts = {0, len(instructions), *kernel.labels.values()}
    for number, instruction in enumerate(instructions):
        if _end_of(instruction):
            cuts.add(number + 1)
        if meets(instruction):
            cuts.add(number)
    bounds = sorted(cuts)
    number_of = {first: number for number, first in enumerate(bounds)}
    found = []
    for first, behind in pairwise(bounds):
        part = tuple(instructions[first:behind])
        end = _end_of(part[-1])
        target = number_of[kernel.labels[part[-1].operands[0]]] if end == "branch" else -1
        counted = dict.fromkeys(KINDS, 0)
        for instruction in part:
            counted[kind_of(instruction.opcode)] += 1
        found.append(Piece(part, end, target, meets(part[0]), counted))
    return found
