"""Budget of a kernel: what a warp executes on its usual path, against what the memory rate leaves room for.

``python -m benchmarks.counts.budget`` (which ``make sass`` runs too) prints the table and writes
``benchmarks/results/budget.json``, a function of the sources alone. The kernels are compiled as they are launched on an
H200, with the constants of the launch; `tools.compile.paths` finds the path. Nothing here was measured.

A multiprocessor issues `LANES` thread-instructions a cycle. While memory moves the vectors of 16 bytes of an
instruction's share, that many fit; a kernel with more is bound by instructions. By Little's law the rate needs so many
bytes on their way at any time: rate times latency. A warp has what it loads on its way for the latency of global
memory, once in the time that it takes. A small kernel is judged by the cycles of its longest warp.
Shared memory serves 128 bytes a cycle: its turns are another bound, counted as if quarters of a warp that want the same
vectors were served one after the other, which hardware may do better, and as g++ accesses them, which splits some.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from math import ceil, prod
from typing import Any

import numpy as np

from benchmarks.counts.budget_rows import ROWS, Array, Row
from benchmarks.counts.counting import planner
from benchmarks.counts.devices import H100, H200, Device
from benchmarks.counts.limits import WARP, occupancy
from benchmarks.harness.case import native_dtype
from benchmarks.harness.timing import RESULTS, ROOT, round4, write_json
from bnkernels.runtime import source
from bnkernels.runtime.seam import Launch, ceil_div
from tools.backends import emulated_runtime
from tools.compile import nvrtc, paths

PATH = RESULTS / "budget.json"
METHOD = [f"benchmarks/counts/{name}.py" for name in ("budget", "budget_rows", "counting", "devices", "limits")]
METHOD += [f"tools/{name}.py" for name in ("compile/nvrtc", "compile/paths", "compile/sass", "emulator/runtime")]
LANES, SCHEDULERS, VECTOR = 128, 4, 16
DRAM_LATENCY = 1400  # cycles of a load from memory at full load: about twice an idle one's (arXiv:2402.13499)
COPY_RATES = {H200: 4.3e12, H100: 3.0e12}  # bytes per second that copies reach (published)


def issue_budget(device: Device, moved: int) -> float:
    """Return the thread-instructions that a multiprocessor can issue while memory moves so many vectors for it.

    Examples
    --------
    >>> round(issue_budget(H200, 2)), round(issue_budget(H200, 3))
    (249, 373)
    """
    return LANES * device.clock * moved * VECTOR / (COPY_RATES[device] / device.sms)


def bytes_needed(device: Device) -> float:
    """Return the bytes that a multiprocessor needs on their way, by Little's law."""
    return COPY_RATES[device] / device.sms * DRAM_LATENCY / device.clock


@cache
def _method() -> str:
    """Return the texts of all that makes figures of a kernel."""
    emulator = ROOT / "tools" / "emulator"
    files = [*sorted(emulator.rglob("*.h")), *sorted(emulator.rglob("*.cpp")), *[ROOT / name for name in METHOD]]
    return "".join(path.read_text(encoding="utf-8") for path in files)


def digest(row: Row) -> str:
    """Return a digest of kernel, launch, compiler and method: what the figures of a row depend on."""
    stem, kernel, launch = launched(row)
    text = source.read(stem, kernel, launch.constants), repr(launch), nvrtc.NEWEST, _method()
    return sha256("\0".join(text).encode()).hexdigest()[:16]


def figures(row: Row) -> dict[str, Any]:
    """Return the figures of a row."""
    stem, kernel, launch = launched(row)
    machine, threads = paths.machine(stem, kernel, launch.constants), prod(launch.block)
    registers = nvrtc.resources(source.read(stem, kernel, launch.constants), 90)[kernel].registers
    fits = occupancy(H200.architecture, threads, registers, launch.shared_bytes)
    found = {"op": row.op, "shape": list(row.shape), "dtype": row.dtype, "kernel": kernel, "target": row.target}
    found |= {"grid": list(launch.grid), "block": list(launch.block), "registers": registers}
    found |= {"blocks_per_sm": fits.blocks, "code_bytes": 16 * len(machine.code)}
    found |= {"loop_bytes": 16 * longest_loop(machine)}
    instructions, cycles, loaded = walked(row, machine, launch, row.avoid)
    instructions = ceil(instructions)
    if row.rare:
        line, every = row.rare
        few, fast, _ = walked(row, machine, launch, (*row.avoid, line))
        instructions = few + ceil_div(instructions - few, every)
        cycles = fast + ceil_div(cycles - fast, every)
    found |= {"instructions": instructions, "cycles": cycles}
    if row.vectors is None:
        return found | turns(row)
    vectors, warps = row.vectors(launch), fits.blocks * ceil_div(threads, WARP)
    check_turns(row, machine, launch, vectors)
    _, slow, _ = walked(row, machine, launch, row.avoid, DRAM_LATENCY)
    time = max(slow, instructions * warps / SCHEDULERS)
    in_flight = float(loaded) * threads * fits.blocks * DRAM_LATENCY / time
    budgets = {device.name: round4(issue_budget(device, row.moved)) for device in COPY_RATES}
    found |= {"moved": row.moved, "instructions_per_vector": round4(instructions / vectors), "budget": budgets}
    return found | {"bytes_in_flight": round4(in_flight), "bytes_needed": round4(bytes_needed(H200))}


def walked(
    row: Row, machine: paths.Machine, launch: Launch, avoid: Sequence[str], latency: int = paths.LATENCIES["LDG"]
) -> tuple[int, int, int]:
    """Return instructions, cycles, and bytes that a thread loads: of the whole path, or of a turn of a loop."""
    found = []
    for path in ways(row, machine, launch, avoid):
        loaded = machine.instructions(path, lambda one: one.bytes_loaded)
        found.append((machine.instructions(path), machine.cycles(path, latency), loaded))
    return tuple(np.subtract(found[-1], found[0]).tolist()) if row.repeated else found[0]


def ways(row: Row, machine: paths.Machine, launch: Launch, avoid: Sequence[str]) -> list[tuple[paths.Step, ...]]:
    """Return the path, or those with one turn of the loop and with two."""
    trips = dict(row.trips(launch))
    if not row.repeated:
        return [machine.path(trips, avoid)]
    return [machine.path(trips | {row.repeated: (turns,)}, avoid) for turns in (1, 2)]


def check_turns(row: Row, machine: paths.Machine, launch: Launch, vectors: int) -> None:
    """Raise a `ValueError` if the path copies, sums or stores another number of vectors."""
    if not row.summed:
        return
    elements = VECTOR // native_dtype(row.dtype).itemsize
    expected = {
        "copies": ((row.moved - 1) * vectors, lambda one: one.kind == "LDGSTS"),
        "sums": (elements * vectors, lambda one: one.kind == "FFMA" and row.summed in machine.lines(one)[0]),
        "stores": (vectors, lambda one: one.name == "STG.E.128"),
    }
    for what, (number, counts) in expected.items():
        once, twice = (machine.instructions(path, counts) for path in ways(row, machine, launch, row.avoid))
        if twice - once != number:
            raise ValueError(f"{row.name}: {twice - once} {what} of {vectors} vectors, not {number}")


def longest_loop(machine: paths.Machine) -> int:
    """Return the instructions of the longest loop without another in it, which the instruction cache should hold."""

    def longest(within: frozenset[int], entry: int, *, body: bool) -> int:
        loops = machine.loops(within - {entry} if body else within, entry)
        own = sum(len(machine.blocks[block]) for block in within) if body else 0
        return max((longest(loop.blocks, loop.header, body=True) for loop in loops), default=own)

    return longest(machine.reachable(), 0, body=False)


def launched(row: Row) -> tuple[str, str, Launch]:
    """Return source, kernel and launch on an H200."""
    plan = planner()
    call = row.call(lambda shape, dtype="float32": plan.empty(shape, native_dtype(dtype)), 1)
    plan.launches.clear()
    call()
    (only,) = plan.launches
    return only


def turns(row: Row) -> dict[str, int]:
    """Return how many turns shared memory takes, and how many without bank conflicts, by a call on the emulator."""
    runtime, rng = emulated_runtime(), np.random.default_rng(0)

    def random(shape: tuple[int, ...], dtype: str = "float32") -> Array:
        whole = np.dtype(dtype).kind in "iu"
        return runtime.asarray(np.zeros(shape, dtype) if whole else rng.uniform(0.5, 2, shape).astype(dtype))

    found = []
    with runtime.device_limits(H200.choice), runtime.counting_turns():
        for repetitions in (1, 2) if row.repeated else (1,):
            call = row.call(random, repetitions)
            runtime.reset()
            call()
            counts = runtime.launches[-1].counts
            found.append(np.array([counts.shared_turns, counts.fewest_shared_turns]))
    runtime.reset()
    taken, fewest = (found[1] - found[0] if row.repeated else found[0]).tolist()
    return {"shared_turns": taken, "fewest_shared_turns": fewest}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as text."""
    lines = []
    for row in rows:
        line = f"{row['op']} {'x'.join(map(str, row['shape']))} {row['dtype']} ({row['kernel']}): "
        line += f"{row['registers']} registers, {row['code_bytes']:,} bytes of code"
        if "budget" in row:
            budgets = ", ".join(f"{name} {budget:.0f}" for name, budget in row["budget"].items())
            line += f"; {row['instructions_per_vector']:.0f} instructions a vector, target {row['target']}, {budgets}"
            line += f"; {row['bytes_in_flight'] / 1024:.0f} KiB in flight of {row['bytes_needed'] / 1024:.0f} needed"
        else:
            line += (
                f"; {row['cycles']:,} cycles, target {row['target']:,}; shared memory takes {row['shared_turns']:,} "
            )
            line += f"turns, {row['fewest_shared_turns']:,} without conflicts"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts.budget", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this; nothing is written then")
    options = parser.parse_args(arguments)
    rows = [figures(row) | {"digest": digest(row)} for row in ROWS if options.only in row.name]
    print(table(rows))
    if not options.only:
        write_json(PATH, {"nvrtc": nvrtc.NEWEST, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
