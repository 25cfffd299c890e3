"""Runs kernels from their PTX: the lanes of many blocks side by side, each with a place of its own in the program.

It always goes on with the lanes that are furthest back in the text and wait for nobody, all of them together. Loops and
branches join again behind their ends that way, as they do on a GPU where the compiler keeps the order of the text.
"""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.seam import Launch

from . import floats, integers, transfers  # noqa: F401  (they bind the instructions)
from .counts import KINDS, Counts
from .frame import WARP, Frame, Mask, Run, operation
from .memory import AccessError, BlockMemory, GlobalMemory
from .parse import Instruction, Kernel, PtxError
from .program import pieces

MOST_LANES = 4096  # side by side, where blocks are independent
MOST_PAUSES = 1000  # how often lanes look whether others are there before that is called a deadlock
_POWERS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)


@operation(r"bar\.sync|barrier\.sync(\.aligned)?|bar\.warp\.sync|bra(\.uni)?|ret|exit")
def by_the_machine(frame: Frame, instruction: Instruction, match: object) -> Run:
    """Do nothing: where lanes go on is decided between pieces."""
    return lambda mask: None


def run(kernel: Kernel, launch: Launch, arguments: bytes, memory: GlobalMemory) -> Counts:
    """Run a launch to its end; return how many instructions its warps have executed.

    Parameters
    ----------
    kernel : Kernel
        From `parse`.
    launch : Launch
        Blocks of a cooperative one run at the same time, others so many at a time that they are quick.
    arguments : bytes
        The parameters, at their places.
    memory : GlobalMemory
        What the kernel may touch.

    Raises
    ------
    PtxError
        For an instruction that is not supported, an access outside of the arrays or of shared memory or at a misaligned
        address, and threads that wait for one another; with the kernel and the instruction.
    """
    if len(arguments) != kernel.parameter_bytes:
        raise PtxError(f"{kernel.name} takes {kernel.parameter_bytes} bytes of arguments, got {len(arguments)}")
    blocks = [(x, y, z) for z in range(launch.grid[2]) for y in range(launch.grid[1]) for x in range(launch.grid[0])]
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    together = len(blocks) if launch.cooperative else max(1, MOST_LANES // threads)
    counts = Counts()
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), together):
            wave = _Wave(kernel, launch, blocks[first : first + together], arguments, memory)
            wave.run()
            counts += wave.counts()
    return counts


class _Wave:
    """Blocks that run side by side."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        blocks: list[tuple[int, int, int]],
        arguments: bytes,
        memory: GlobalMemory,
    ) -> None:
        self._kernel = kernel
        self._pieces = pieces(kernel)
        size = launch.block[0] * launch.block[1] * launch.block[2]
        self._width = -(-size // WARP) * WARP  # lanes of a block
        special = _special_registers(launch, blocks, self._width)
        number = np.repeat(np.arange(len(blocks)), self._width)
        # Nobody may read what was never written: it is NaN.
        shared_bytes = kernel.shared_bytes + launch.shared_bytes
        shared = np.full((len(blocks), -(-shared_bytes // 16) * 16), 0xFF, np.uint8)
        given = np.frombuffer(arguments.ljust(-(-len(arguments) // 16) * 16, b"\xff"), np.uint8)[None]
        of_arguments = BlockMemory(given, len(arguments), np.zeros_like(number))
        self._frame = Frame(kernel, special, memory, BlockMemory(shared, shared_bytes, number), of_arguments)
        self._runs = [[self._frame.bind(one) for one in piece.instructions] for piece in self._pieces]

        # Where a lane goes on, and the same if it can, else why not. Numbers behind the last piece: not a place.
        self._end = len(self._pieces)
        self._paused, self._at_barrier, self._done = self._end + 1, self._end + 2, self._end + 3
        self._place = np.zeros(number.size, np.int64)
        self._state = np.where(np.arange(number.size) % self._width < size, 0, self._done)
        self._executed = np.zeros(self._end, np.int64)  # by warps, of every piece

    def counts(self) -> Counts:
        """Return what has been executed so far."""
        executed = list(zip(self._pieces, self._executed.tolist(), strict=True))
        return Counts({kind: sum(piece.kinds[kind] * times for piece, times in executed) for kind in KINDS})

    # ---- which lanes go on ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all lanes to their end."""
        pauses = 0
        while True:
            number = int(self._state.min())
            if number < self._end:
                self._step(number)
            elif number == self._end:
                raise PtxError(f"{self._kernel.name} ends without a ret")
            elif self._release_barriers():
                pauses = 0
            elif number == self._done:
                return
            elif number == self._paused and pauses < MOST_PAUSES:
                waiting = self._state == self._paused
                np.copyto(self._state, self._place, where=waiting)
                pauses += 1
            else:
                raise PtxError(f"{self._kernel.name}: deadlock: {self._waiting()}")

    def _waiting(self) -> str:
        """Tell who waits where."""
        lanes = np.flatnonzero(self._state != self._done)
        paused = int((self._state == self._paused).sum())
        return f"{lanes.size - paused} threads wait at a barrier, {paused} for others of their warp or grid"

    def _release_barriers(self) -> bool:
        """Let blocks go on whose threads have all come to a barrier; tell whether there are any."""
        state = self._state.reshape(-1, self._width)
        waiting = state == self._at_barrier
        complete = (waiting | (state == self._done)).all(axis=1) & waiting.any(axis=1)
        released = (waiting & complete[:, None]).reshape(-1)
        np.copyto(self._state, self._place, where=released)
        return bool(released.any())

    def _step(self, number: int) -> None:
        """Run one piece for the lanes that are there."""
        piece = self._pieces[number]
        here = self._state == number
        if piece.meets:
            here = self._met(piece.instructions[0], here, number)
            if not here.any():
                return
        everyone = bool(here.all())
        mask = True if everyone else here
        self._executed[number] += self._warps(here, everyone)
        self._execute(number, mask)
        after = number + 1
        if piece.end == "branch":
            taken = self._frame.guard(piece.instructions[-1], here)
            self._move(here & ~taken, after)
            self._move(taken, piece.target)
        elif piece.end == "exit":
            left = self._frame.guard(piece.instructions[-1], here)
            self._move(here & ~left, after)
            np.copyto(self._state, self._done, where=left)
        else:
            self._move(here, after)
            if piece.end:
                np.copyto(self._state, self._at_barrier if piece.end == "barrier" else self._paused, where=here)

    def _execute(self, number: int, mask: Mask) -> None:
        at = 0
        try:
            for run_one in self._runs[number]:
                run_one(mask)
                at += 1
        except AccessError as error:
            raise PtxError(f"{self._kernel.name}: {self._pieces[number].instructions[at]} {error}") from error

    @staticmethod
    def _warps(here: np.ndarray, everyone: bool) -> int:
        return here.size // WARP if everyone else int(here.reshape(-1, WARP).any(axis=1).sum())

    def _move(self, lanes: np.ndarray, place: int) -> None:
        np.copyto(self._place, place, where=lanes)
        np.copyto(self._state, place, where=lanes)

    def _met(self, instruction: Instruction, here: np.ndarray, number: int) -> np.ndarray:
        """Return the lanes whose masks are complete; the others wait."""
        lanes = self._frame.read(instruction.operands[-1], "b32")
        wanted = np.broadcast_to(lanes, here.shape).astype(np.uint64).reshape(-1, WARP)
        active = here.reshape(-1, WARP)
        if (active & (wanted & _POWERS == 0)).any():
            raise PtxError(f"{self._kernel.name}: {instruction} by a lane that is not in its own mask")
        arrived = (active * _POWERS).sum(axis=1, dtype=np.uint64)[:, None]
        complete = (active & (wanted & ~arrived == 0)).reshape(-1)
        np.copyto(self._state, self._paused, where=here & ~complete)
        return complete


def _special_registers(launch: Launch, blocks: list[tuple[int, int, int]], width: int) -> dict[str, np.ndarray]:
    """Return what the registers of position hold, for the lanes of these blocks."""
    lane = np.arange(width)
    x, y, _ = launch.block
    threads = (lane % x, lane // x % y, lane // (x * y))
    count = len(blocks)

    def everywhere(values: np.ndarray | int) -> np.ndarray:
        return np.broadcast_to(values, count * width).astype(np.uint32)

    special = {"%laneid": everywhere(np.tile(lane % WARP, count))}
    for axis, name in enumerate("xyz"):
        special[f"%tid.{name}"] = everywhere(np.tile(threads[axis], count))
        special[f"%ntid.{name}"] = everywhere(launch.block[axis])
        special[f"%nctaid.{name}"] = everywhere(launch.grid[axis])
        special[f"%ctaid.{name}"] = everywhere(np.repeat([block[axis] for block in blocks], width))
    return special
