"""``python -m tools.emulator.planted KERNEL[:CHOICE] ...`` runs planted.cu and prints what becomes of each kernel."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnkernels.runtime.seam import Launch

from .build import BUILD_VARIABLE, CUDA, EmulatorError, read_sources
from .runtime import LIMITS, EmulatedArray, EmulatorRuntime

SOURCES = read_sources(CUDA) | {"planted.cu": Path(__file__).with_suffix(".cu").read_text()}
ARGUMENTS = np.dtype(
    [("x", np.uint64), ("y", np.uint64), ("ticket", np.uint64), ("n", np.int64), ("choice", np.int32)], align=True
)


# Differences from one block of a warp, with 32 elements of x, y and shared memory.
SETTINGS: dict[str, dict] = {
    "async_copy": {"shared_bytes": 256},
    "columns": {"shared_bytes": 32 * 33 * 4},
    "copy_vectors": {"x_size": 128, "y_size": 128},
    "absent_lane": {"block": (24, 1, 1)},
    "blocks_write_the_same": {"grid": (2, 1, 1)},
    "last_block": {"grid": (4, 1, 1)},
    "meeting": {"grid": (4, 1, 1), "y_size": 256, "cooperative": True},
    "misaligned": {"x_size": 66},
    "misaligned_vector": {"x_size": 64},
    "narrow_index": {"grid": (2, 1, 1)},
    "order": {"y_size": 64},
    "shuffles": {"y_size": 128},
}


@dataclass(frozen=True)
class Result:
    """Arrays of a planted kernel, before and after its launch."""

    x: EmulatedArray
    y: EmulatedArray
    ticket: EmulatedArray


def launch(
    runtime: EmulatorRuntime,
    kernel: str,
    x_size: int = 32,
    y_size: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared_bytes: int = 128,
    choice: int = 0,
    cooperative: bool = False,
) -> Result:
    """Run a kernel of planted.cu; x counts from 0, y is poisoned, the ticket is 0."""
    x = runtime.asarray(np.arange(x_size, dtype=np.float32), read_only=True)
    y, ticket = runtime.empty((y_size,), np.float32), runtime.asarray(np.zeros(1, np.uint32))
    arguments = np.zeros((), ARGUMENTS)
    arguments[()] = (*(runtime.pointer(array) for array in (x, y, ticket)), y_size, choice)
    with runtime.device_limits(LIMITS):
        runtime.launch("planted", f"bnk_planted_{kernel}", Launch(grid, block, shared_bytes, cooperative), arguments)
    return Result(x, y, ticket)


def launch_case(runtime: EmulatorRuntime, case: str) -> Result:
    """Run the case ``KERNEL`` or ``KERNEL:CHOICE`` with its settings."""
    kernel, _, choice = case.partition(":")
    return launch(runtime, kernel, choice=int(choice or 0), **SETTINGS.get(kernel, {}))


def main() -> int:
    """Run the cases named on the command line; a line for each says whether it was noticed, and as what."""
    runtime = EmulatorRuntime(os.environ.get(BUILD_VARIABLE) or "plain", SOURCES)
    noticed = 0
    for case in sys.argv[1:]:
        try:
            launch_case(runtime, case)
            print(f"{case}: not noticed")
        except EmulatorError as error:
            noticed += 1
            print(f"{case}: {' '.join(str(error).split())}")
    return min(noticed, 1)


if __name__ == "__main__":
    sys.exit(main())
