"""Launches and bytes of an LSTM, ours and others', without a GPU: those of a time step, and those of a sequence.

``python -m benchmarks.counts.recurrent`` counts and writes ``benchmarks/results/recurrent.json``. Who is not installed
keeps the rows of that file: TensorFlow, whose packages exclude ours, counts from an environment of its own.

Ours is run on the emulator, planned for an H200. A launch of our kernels counts the bytes that it touches, each once;
a launch by a library, a product or what sets numbers, those of its arrays. The others count their operators, each of
which is a launch at least and moves its arrays at least: see `benchmarks.counts.recurrent_peers`. Sequences of 3 and 4
steps tell what a step adds, and what is there once: all that depends on the number of steps is proportional to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.counts import recurrent_peers
from benchmarks.counts.devices import H200
from benchmarks.harness.case import Case
from benchmarks.harness.timing import RESULTS, write_json
from benchmarks.ops import bench_lstm

PATH = RESULTS / "recurrent.json"
FEW = 3  # steps of the shorter sequence: from two on, a step is like another
OURS = "bnkernels"


class Work(NamedTuple):
    """Launches, and bytes that they move."""

    launches: int
    bytes: int


Counter = Callable[[Case], list[int]]  # the bytes of every launch of a call


def of_step(case: Case, count: Counter) -> tuple[Work, Work]:
    """Return the work of a step, and that which a sequence has once, whatever its length."""
    few, more = (
        Work(len(found), sum(found))
        for found in (count(replace(case, shape=(steps, *case.shape[1:]))) for steps in (FEW, FEW + 1))
    )
    step = Work(*np.subtract(more, few).tolist())
    return step, Work(*(whole - FEW * each for whole, each in zip(few, step, strict=True)))


@contextmanager
def library_calls(kind: type) -> Iterator[list[int]]:
    """Note the bytes of everything that is done to arrays of the emulator outside of our kernels, in this context."""
    calls: list[int] = []

    def bare(array: Any) -> Any:
        return array.view(np.ndarray) if isinstance(array, np.ndarray) else array

    def note(*arrays: Any) -> None:
        calls.append(sum(array.nbytes for array in arrays if isinstance(array, np.ndarray)))

    def ufunc(self: Any, function: Any, method: str, *inputs: Any, out: tuple = (), **options: Any) -> Any:
        where = {"out": tuple(map(bare, out))} if out else {}
        result = getattr(function, method)(*map(bare, inputs), **where, **options)
        note(*inputs, result)
        return out[0] if out else np.asarray(result).view(kind)

    def setitem(self: Any, key: Any, value: Any) -> None:
        view = bare(self)[key]
        view[...] = bare(value)
        if view.size:
            note(view, value)

    kind.__array_ufunc__, kind.__setitem__ = ufunc, setitem
    try:
        yield calls
    finally:
        del kind.__array_ufunc__, kind.__setitem__


def ours(case: Case) -> list[int]:
    """Return the bytes of every launch of our op."""
    from tools.backends import emulated_runtime
    from tools.emulator import EmulatedArray

    runtime, rng = emulated_runtime(), np.random.default_rng(0)
    random = bench_lstm.inputs(case, lambda shape: rng.standard_normal(shape).astype(case.dtype))
    with runtime.device_limits(H200.choice):
        call = bench_lstm.ours(case, {name: runtime.asarray(array) for name, array in random.items()})
        runtime.reset()
        with library_calls(EmulatedArray) as calls:
            call()
    totals = [record.counts.total for record in runtime.launches]
    runtime.reset()
    return [total.unique_bytes_read + total.unique_bytes_written for total in totals] + calls


def rows(name: str, count: Counter, cases: list[Case]) -> list[dict[str, Any]]:
    """Return a row for every case that somebody computes."""
    found = []
    for case in cases:
        step, once = of_step(case, count)
        row = {"provider": name, "direction": case.direction, "shape": list(case.shape)}
        found.append(row | {"step": list(step), "once": list(once)})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Count, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts.recurrent", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="providers whose name begins so; the others keep their rows")
    options = parser.parse_args(arguments)
    document = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {"versions": {}, "rows": []}
    for name, (version, count, cases) in {OURS: (None, ours, bench_lstm.OP.cases), **recurrent_peers.found()}.items():
        if not name.startswith(options.only):
            continue
        kept = [row for row in document["rows"] if row["provider"] != name]
        document["rows"] = kept + rows(name, count, cases)
        if version:
            document["versions"][name] = version
        print(name, *document["rows"][len(kept) :], sep="\n")
    document["rows"].sort(key=lambda row: row["provider"] != OURS)
    write_json(PATH, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
