"""From the events of emulated launches to the steps of every block: what it reads, writes, and waits for.

A step is what a block does between two waits, or between a barrier behind which it turns from reading `x` to writing
`y` and the next one. The cells that it touches are rectangles of rows and columns; where they were not, recording
fails. Its length is counted in words: those of four bytes that its busiest thread moves, and one for every barrier
within the block. By example has about as many threads as by neuron, so that what differs is who waits. Blocks that wait
for others go on when the last of these is there, and have paid for a wait: so a step begins at ``start + waits cost``,
whatever a wait costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import bnkernels as bn
from benchmarks.counts.devices import H200
from benchmarks.harness.timing import RESULTS
from benchmarks.peers import three_launches
from bnkernels.runtime.arguments import pack
from bnkernels.runtime.seam import Launch, ceil_div
from tools.backends import emulated_runtime
from tools.emulator import EmulatorRuntime
from tools.emulator.binding import KINDS
from tools.emulator.build import read_sources
from tools.emulator.runtime import LaunchRecord

RESULT = RESULTS / "step_through.json"
EXAMPLES, NEURONS = (8, 16, 64, 256, 1024, 4096), (4, 20, 64, 256)
WAYS = ("example", "neuron")
BLOCKS, MOST_THREADS, MERGERS = 16, 256, 32  # by example: blocks at least, threads of one, threads that merge a neuron
WORD = 4  # bytes
READ, WRITE, BARRIER, WAIT = range(len(KINDS))


class Step(NamedTuple):
    """One step of a block.

    Attributes
    ----------
    block : int
        Number of the block.
    start, waits, length : int
        Words before it and waits for other blocks before it, on the longest way there; words that it takes.
    read, written : list of list of int
        First row, end, first column and end of each rectangle that it touches of `x` and `y`.
    """

    block: int
    start: int
    waits: int
    length: int
    read: list[list[int]]
    written: list[list[int]]


def cases() -> Iterator[tuple[str, int, int]]:
    """Yield way, number of examples, and number of neurons of every case."""
    yield from product(WAYS, EXAMPLES, NEURONS)


def case(way: str, examples: int, neurons: int) -> dict[str, Any]:
    """Return the forward of a layer, launch by launch, as on an H200."""
    x = np.random.default_rng(0).standard_normal((examples, neurons)).astype(np.float32)
    x, y, records = (by_example if way == "example" else by_neuron)(x)
    launches, start = [], 0
    for number, record in enumerate(records):
        steps = list(steps_of(record, {"x": x, "y": y}, start, number))
        start = max(step.start + step.length for step in steps)
        name = {"kernel": record.entry_point, "grid": record.launch.grid[:2], "block": record.launch.block[:2]}
        launches.append(name | {"steps": steps})
    return {"way": way, "examples": examples, "neurons": neurons, "launches": launches}


def by_neuron(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[LaunchRecord]]:
    """Return x, y and the one launch that `batch_norm_forward` makes."""
    runtime = emulated_runtime()
    runtime.reset()
    x = runtime.asarray(values)
    with runtime.device_limits(H200.choice), runtime.tracing():
        y, _ = bn.batch_norm_forward(x)
    return x, y, list(runtime.launches)


def by_example(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[LaunchRecord]]:
    """Return x, y and the launches of `benchmarks.peers.three_launches`, with about as many threads as by neuron."""
    *_, (record,) = by_neuron(values)
    sources = read_sources() | {"three_launches.cu": three_launches.SOURCE.read_text(encoding="utf-8")}
    runtime = EmulatorRuntime(sources=sources)
    (rows, channels), dtype = values.shape, np.dtype(np.float32)
    threads = record.launch.blocks * record.launch.threads
    rows_of_block = ceil_div(rows, max(BLOCKS, ceil_div(threads, MOST_THREADS)))
    blocks = ceil_div(rows, rows_of_block)
    workers = max(1, min(ceil_div(threads, blocks * channels), MOST_THREADS // channels))
    vectors = {
        name: runtime.asarray(np.ones(channels, dtype)) for name in "gamma beta running_mean running_var".split()
    }
    x, y, partial = runtime.asarray(values), *(runtime.empty(s, dtype) for s in (values.shape, (3, blocks, channels)))
    mean, rstd = (runtime.empty((channels,), dtype) for _ in range(2))
    used = (x, *vectors.values(), mean, rstd, partial, y)
    sizes = rows, channels, rows_of_block, blocks, 0.1, 1e-5, False
    arguments = pack(three_launches.FORWARD[dtype], *map(runtime.pointer, used), *sizes)
    width = min(channels, 32)
    plans = {
        "sums": Launch((1, blocks, 1), (channels, workers, 1), 12 * channels * workers),
        "finalise": Launch((ceil_div(channels, width), 1, 1), (width, MERGERS, 1), 12 * width * MERGERS),
        "apply": Launch((1, blocks, 1), (channels, workers, 1)),
    }
    with runtime.tracing():
        for phase, launch in plans.items():
            runtime.launch("three_launches", f"three_launches_forward_{phase}", launch, arguments)
    centred = values - values.mean(0)
    np.testing.assert_allclose(y, centred / np.sqrt(centred.var(0) + 1e-5) + 1, atol=1e-4)
    return x, y, runtime.launches


def steps_of(record: LaunchRecord, arrays: dict[str, np.ndarray], start: int, waits: int) -> Iterator[Step]:
    """Yield the steps of a launch whose blocks begin at a time, behind so many waits."""
    events = record.events
    own = [list(parts(events[events["block"] == number], arrays)) for number in range(record.launch.blocks)]
    columns = record.launch.grid[0]  # blocks of a column wait for one another
    for number, steps in enumerate(own):
        now, waited = start, waits
        for length, waiting, read, written in steps:
            if waiting:
                now = start + max(before(steps) for steps in own[number % columns :: columns])
                waited += 1
            yield Step(number, now, waited, length, read, written)
            now += length


def before(steps: Sequence[tuple]) -> int:
    """Return the length of a block's steps before it waits; of the block that waits for none, before it writes."""
    count = next((i for i, step in enumerate(steps) if step[1] or (i and step[3])), len(steps))
    return sum(length for length, *_ in steps[:count])


def parts(events: np.ndarray, arrays: dict[str, np.ndarray]) -> Iterator[tuple[int, bool, list, list]]:
    """Yield length, whether it begins with a wait, and what is read and written, of every step of one block."""
    ends = np.flatnonzero(events["kind"] >= BARRIER)
    open_step: list[np.ndarray] = []
    waiting, length = False, 0
    for part, end in zip(np.split(events, ends), [None, *ends], strict=True):
        meeting = None if end is None else int(events["kind"][end])
        so_far = np.concatenate([part[:0], *open_step])
        turned = touches(part, WRITE, arrays["y"]) and touches(so_far, READ, arrays["x"])
        if open_step and (meeting == WAIT or (turned and meeting == BARRIER)):
            yield finished(open_step, length, waiting, arrays)
            open_step, waiting, length = [], meeting == WAIT, 0
        accesses = part[part["kind"] <= WRITE]
        busiest = int(np.bincount(accesses["thread"], accesses["bytes"]).max()) // WORD if accesses.size else 0
        length += busiest + int(meeting == BARRIER)
        open_step.append(accesses)
    yield finished(open_step, length, waiting, arrays)


def touches(events: np.ndarray, kind: int, array: np.ndarray) -> bool:
    """Tell whether events read, or write, an array."""
    return bool(cells(events[events["kind"] == kind], array).size)


def finished(step: Sequence[np.ndarray], length: int, waiting: bool, arrays: dict[str, np.ndarray]) -> tuple:
    """Return a step as `parts` yields it."""
    events = np.concatenate(step)
    read, written = (
        rectangles(cells(events[events["kind"] == kind], arrays[name]), arrays[name].shape[1])
        for kind, name in ((READ, "x"), (WRITE, "y"))
    )
    return length, waiting, read, written


def cells(events: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Return the numbers of an array's elements that events touch, without repetition."""
    first = array.ctypes.data
    inside = events[(events["address"] >= first) & (events["address"] < first + array.nbytes)]
    found = [(inside["address"] - np.uint64(first)) // 4 + np.uint64(i) for i in range(4)]
    return np.unique(np.concatenate([f[inside["bytes"] > 4 * i] for i, f in enumerate(found)])).astype(np.int64)


def rectangles(touched: np.ndarray, columns: int) -> list[list[int]]:
    """Return first row, end, first column and end of the rectangles of rows that elements fill."""
    if touched.size == 0:
        return []
    rows, places = np.unique(touched // columns), np.unique(touched % columns)
    if touched.size != rows.size * places.size or np.ptp(places) + 1 != places.size:
        raise ValueError(f"expected whole rows of some columns, got {touched.size} elements in {rows.size} rows")
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [[int(run[0]), int(run[-1]) + 1, int(places[0]), int(places[-1]) + 1] for run in runs]


def text(found: Sequence[dict[str, Any]]) -> str:
    """Return the cases as JSON, a line each."""
    return "[\n" + ",\n".join(json.dumps(one, separators=(",", ":")) for one in found) + "\n]\n"
