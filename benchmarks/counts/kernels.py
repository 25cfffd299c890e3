"""Counts of the kernels of one training step, 64-20-10, on the emulator: launch, bytes, barriers.

``python -m benchmarks.counts.kernels`` prints it and writes ``benchmarks/results/kernels.json``; with
``benchmarks.report`` it gets into ``docs/generated/kernels.md``. It needs g++ and no GPU.
"""

from __future__ import annotations

from typing import Any

import bnkernels as bn
from benchmarks.counts.devices import H200
from benchmarks.harness.timing import RESULTS, write_json
from benchmarks.ops import every_sample
from tools.backends import emulated_runtime
from tools.emulator import LaunchRecord

ROWS, INPUTS, NEURONS, CLASSES = 64, 64, 20, 10
SIZES = {"N": ROWS, "K": INPUTS, "C": NEURONS, "O": CLASSES, "S": 1, "E": ROWS}


def count() -> list[dict[str, Any]]:
    """Make the sample calls of a 64-20-10 network's training step with 64 examples on emulated kernels.

    Returns
    -------
    list of dict
        For each launch `op`, `source` (stem in ``cuda/``), `kernel`, `grid`, `block`, `barriers`, and `read` and
        `written`: bytes of global memory that were touched, each counted once.
    """
    runtime = emulated_runtime()
    sizes = SIZES | {"P": bn.MLP((INPUTS, NEURONS, CLASSES)).parameters.size}
    rows = []
    for op, sample in every_sample().items():
        if not sample.counted:
            continue
        arrays = {name: runtime.asarray(array) for name, array in sample.arrays(sizes).items()}
        runtime.reset()
        with runtime.device_limits(H200.choice):  # as the launches of an H200
            sample.run(arrays)
        rows += [{"op": op} | row_of(record) for record in runtime.launches]
    return rows


def row_of(record: LaunchRecord) -> dict[str, Any]:
    """Return the counts of a launch."""
    total = record.counts.total
    return {
        "source": record.source,
        "kernel": record.entry_point,
        "grid": list(record.launch.grid),
        "block": list(record.launch.block),
        "barriers": record.counts.barriers,
        "read": total.unique_bytes_read,
        "written": total.unique_bytes_written,
    }


def main() -> None:
    """Count, print and write."""
    rows = count()
    for row in rows:
        print(row)
    write_json(RESULTS / "kernels.json", {"rows": ROWS, "neurons": NEURONS, "classes": CLASSES, "kernels": rows})


if __name__ == "__main__":
    main()
