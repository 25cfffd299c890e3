"""Counts what batch norm moves, against the fewest bytes that any kernel has to, without a GPU.

``python -m benchmarks.counts.traffic`` (``make traffic``) runs each size on the emulator with the launch that it has on
an H200. The limit is one launch, one read of every input and one write of every output. What is larger than the chip
must read the rest twice: there the limit is what the shared memory of the launch has no room for.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from benchmarks.counts.counting import DEVICE, Count, counted, elements_of_access, extent, fewest_bytes
from benchmarks.harness.case import Case
from bnkernels.ops.batch_norm.launch import PLANES, own_bytes

SIZES = [
    ((64, 20), "float32", "NC"),
    ((256, 1024), "float32", "NC"),
    ((8192, 1024), "float32", "NC"),
    ((8192, 1024), "bfloat16", "NC"),
    ((65536, 4096), "bfloat16", "NC"),
    ((100_000, 32), "float32", "NC"),
    ((20, 6, 65536), "float16", "NCL"),
    ((16, 64, 256, 256), "float16", "NCHW"),
    ((16, 64, 128, 128), "float16", "NHWC"),
    ((256, 256, 56, 56), "float16", "NCHW"),
    ((256, 256, 56, 56), "float16", "NHWC"),
    ((16, 64, 256, 256), "float16", "NHWC"),
]
MOST = 2**26  # numbers that are counted of a case: a minute on the emulator
CASES = [
    Case("batch_norm", direction, shape, dtype, layout)
    for shape, dtype, layout in SIZES
    for direction in ("forward", "backward")
]


class Line(NamedTuple):
    """Bytes that one case moved, and the fewest possible."""

    case: Case
    launches: int
    kernel: str
    moved: int
    limit: int
    on_chip: float  # the share of the inputs that stays there

    @property
    def at_the_limit(self) -> bool:
        """Whether it is one launch that moves no byte more."""
        return self.launches == 1 and self.moved == self.limit

    def __str__(self) -> str:
        """Return the line of the table."""
        name = f"{extent(self.case.shape)} {self.case.dtype} {self.case.layout} {self.case.direction}"
        chip = "" if self.on_chip == 1 else f"; {self.on_chip:.0%} of the inputs fit on the chip"
        verdict = "at the limit" if self.at_the_limit else "NOT at the limit"
        return f"{name:44} {self.launches} launch {self.moved:>14,} of {self.limit:>14,} bytes  {verdict}{chip}"


def line_of(case: Case) -> Line:
    """Count a case."""
    counts, _ = counted(case, most=MOST)
    moved = sum(count.data_read + count.data_written for count in counts)
    share = on_chip(case, counts[0])
    inputs = PLANES[case.direction] * case.size * case.itemsize
    limit = fewest_bytes(case) + round((1 - share) * inputs)
    return Line(case, len(counts), counts[0].kernel, moved, limit, share)


def on_chip(case: Case, count: Count) -> float:
    """Return the share of the inputs that a launch can keep: all of its registers', or what its shared memory holds."""
    if "cooperative" not in count.kernel:
        return 1.0
    (columns, workers, _), (_, together, _) = count.launch.block, count.launch.grid
    inner = "inner" in count.kernel
    numbers = elements_of_access(case, count.kernel)
    channels = 1 if inner else columns * numbers
    partial = own_bytes(case.direction, channels, workers)
    held = (count.launch.shared_bytes - partial) // (
        PLANES[case.direction] * numbers * case.itemsize
    )  # rows of a block
    rows = case.size // case.shape[1] * channels // numbers  # per slice
    return min(1.0, held * together / rows)


def main() -> int:
    """Print the table; return 0 if every case is at the limit."""
    print(f"Launches of the {DEVICE.name}, run on the emulator; of the largest, some slices of channels.")
    lines = []
    for case in CASES:
        lines.append(line_of(case))
        print(lines[-1], flush=True)
    met = sum(line.at_the_limit for line in lines)
    print(f"{met} of {len(lines)} at the limit")
    return 0 if met == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
