"""The registers of all lanes, and how instructions are bound to them.

A lane is a thread, or fills up the last warp of a block and never runs. An instruction becomes a function of the mask
of the lanes that execute it, or of True where all do; NumPy's ``where`` takes either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import BlockMemory, GlobalMemory
from .parse import Instruction, Kernel, PtxError

WARP = 32
SHARED_WINDOW = 1 << 60  # where shared memory begins among generic addresses: no array is there

Mask = Any  # bool, or an array of bool
Run = Callable[[Mask], None]
Builder = Callable[["Frame", Instruction, "re.Match[str]"], Run]

KINDS = {"pred": np.dtype(bool), "f32": np.dtype(np.float32)}
for _bits in (8, 16, 32, 64):
    KINDS |= {f"{letter}{_bits}": np.dtype(f"{'i' if letter == 's' else 'u'}{_bits // 8}") for letter in "bus"}
_STORAGE = {"pred": np.dtype(bool)}
_STORAGE |= {f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "busf" for bits in (8, 16, 32, 64)}
_FLOAT_BITS = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")

_BUILDERS: list[tuple[re.Pattern[str], Builder]] = []


def operation(pattern: str) -> Callable[[Builder], Builder]:
    """Make a function the one that binds instructions whose whole opcode matches `pattern`."""

    def known(builder: Builder) -> Builder:
        _BUILDERS.append((re.compile(pattern), builder))
        return builder

    return known


class Frame:
    """What instructions are bound to.

    Parameters
    ----------
    kernel : Kernel
        Whose registers these are.
    special : dict of str to array of uint32, shape (lanes,)
        ``%tid.x`` and its like.
    arrays : GlobalMemory
        Global memory.
    shared, arguments : BlockMemory
        The other memories.
    """

    def __init__(
        self,
        kernel: Kernel,
        special: dict[str, np.ndarray],
        arrays: GlobalMemory,
        shared: BlockMemory,
        arguments: BlockMemory,
    ) -> None:
        self.kernel = kernel
        self.memories = {"global": arrays, "shared": shared, "param": arguments}
        self.lanes = special["%laneid"].size
        self._special = special
        self._registers: dict[str, np.ndarray] = {}
        self._symbols = kernel.shared | kernel.parameters

    def bind(self, instruction: Instruction) -> Run:
        """Return what executes an instruction, its guard included.

        Raises
        ------
        PtxError
            If it is not supported.
        """
        for pattern, builder in _BUILDERS:
            if match := pattern.fullmatch(instruction.opcode):
                try:
                    run = builder(self, instruction, match)
                except (LookupError, ValueError) as error:
                    raise PtxError(f"{self.kernel.name}: not supported: {instruction} ({error})") from error
                return self._guarded(instruction, run)
        raise PtxError(f"{self.kernel.name}: not supported: {instruction}")

    def guard(self, instruction: Instruction, mask: Mask) -> Mask:
        """Return the lanes of `mask` for which the instruction's guard holds."""
        if instruction.guard is None:
            return mask
        holds = self.register(instruction.guard)
        return mask & (~holds if instruction.negated else holds)

    def _guarded(self, instruction: Instruction, run: Run) -> Run:
        if instruction.guard is None:
            return run
        return lambda mask: run(self.guard(instruction, mask))

    # ---- operands ---------------------------------------------------------------------------------------------------

    def register(self, name: str) -> np.ndarray:
        """Return the register of all lanes, as unsigned integers or bool."""
        if name not in self._registers:
            kind = _STORAGE[self.kernel.registers[name]]
            # Nobody may read what was never written: it is as odd as can be.
            self._registers[name] = np.full(self.lanes, True if kind.kind == "b" else np.iinfo(kind).max, kind)
        return self._registers[name]

    def read(self, operand: str, kind: str) -> np.ndarray:
        """Return a source as numbers of a kind: a register of all lanes, or one number for all."""
        dtype = KINDS[kind]
        if operand in self._special:
            return self._as(self._special[operand], dtype)
        if operand in self.kernel.registers:
            return self._as(self.register(operand), dtype)
        if operand in self._symbols:
            return np.asarray(self._symbols[operand], dtype)
        return _immediate(operand, dtype)

    def target(self, operand: str, kind: str) -> np.ndarray:
        """Return the register to write numbers of a kind to; it may be wider, then they are extended by their sign."""
        dtype = KINDS[kind]
        if operand == "_":
            return np.empty(self.lanes, dtype)
        register = self.register(operand)
        if register.dtype.itemsize > dtype.itemsize and dtype.kind in "iu":
            return register.view(np.dtype(f"{dtype.kind}{register.dtype.itemsize}"))
        return self._as(register, dtype)

    @staticmethod
    def _as(register: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return a register as numbers of another kind; of a wider one their low bits."""
        if (register.dtype.kind == "b") != (dtype.kind == "b") or register.dtype.itemsize < dtype.itemsize:
            raise ValueError(f"a register of {register.dtype} does not hold {dtype}")
        return register.view(dtype)[:: register.dtype.itemsize // dtype.itemsize]

    def sources(self, instruction: Instruction, kind: str) -> list[np.ndarray]:
        """Return all operands but the first."""
        return [self.read(operand, kind) for operand in instruction.operands[1:]]

    def address(self, operand: str) -> Callable[[Mask], np.ndarray]:
        """Return what gives the addresses of the lanes of a mask, of the operand ``[base+offset]``."""
        found = _ADDRESS.fullmatch(operand)
        if not found:
            raise ValueError(f"{operand} is not an address")
        base, offset = found[1], int(found[2] or 0)
        if base not in self.kernel.registers:
            fixed = np.full(self.lanes, int(self.read(base, "s64")) + offset, np.int64)
            return lambda mask: fixed if mask is True else fixed[mask]
        register = self.register(base)
        if register.dtype.itemsize == 8:
            register = register.view(np.int64)

        def addresses(mask: Mask) -> np.ndarray:
            return (register if mask is True else register[mask]).astype(np.int64) + offset

        return addresses


def _immediate(operand: str, dtype: np.dtype) -> np.ndarray:
    """Return the number that is written in an instruction."""
    if bits := _FLOAT_BITS.fullmatch(operand):
        return np.asarray(int(bits[1], 16), np.uint32).view(dtype)
    if not _INTEGER.fullmatch(operand):
        raise ValueError(f"{operand} is neither a register nor a number")
    number = int(operand.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.asarray(number != 0)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.asarray(number % (1 << 8 * dtype.itemsize), unsigned).view(dtype)


def put(target: np.ndarray, values: np.ndarray, mask: Mask) -> None:
    """Write `values` to the lanes of `mask`."""
    np.copyto(target, values, where=mask, casting="unsafe")
