"""The answer as a picture: time of one batch-norm layer against the number of threads, cut in two ways.

``python -m benchmarks.partition --out DIR`` measures both partitions of `benchmarks.peers.three_phase`, compiled, with
barriers that spin: three phases, with two barriers among all threads in the forward and two in the backward, and by
neuron, with none. It writes ``partition.json`` and ``partition.png``.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.harness.case import Call, Case, cores
from benchmarks.harness.clocks import awaken
from benchmarks.harness.measure import error_of
from benchmarks.harness.places import Host, cast, copies, to_float64
from benchmarks.harness.timing import facts, interleave, quantiles, results_folder, write_json
from benchmarks.ops.bench_batch_norm import inputs
from benchmarks.peers import expression, three_phase
from bnkernels.train.checkpoint import write_atomically
from bnkernels.train.plots import require_matplotlib

SHAPES = ((64, 20), (64, 1024))  # the question's layer, and a wide one of the same mini-batch
THREADS = (1, 2, 3, 4, 8, 16, 32, 64)  # up to a thread for every example
ROUNDS, BATCH_SECONDS = 40, 2e-3
WAYS = {"by example, three phases": True, "by neuron": False}
COLOURS = dict(zip(WAYS, ("#D55E00", "#000000"), strict=True))  # Okabe and Ito's


def layer(shape: tuple[int, int], by_example: bool, threads: int) -> Call:
    """Return a call that computes forward and backward of a layer, which have been compared with float64."""
    calls = []
    for direction in ("forward", "backward"):
        case = Case("batch_norm", direction, shape)
        arrays = cast(case, inputs(case, Host().random))
        exact = expression.reference(case, to_float64(arrays), np)
        calls.append(three_phase.prepare(case, copies(arrays, 1)[0], by_example, threads))
        error_of(case, calls[-1](), exact)
    forward, backward = calls
    return lambda: (*forward(), *backward())


def stopwatch(call: Call) -> Callable[[], float]:
    """Return what makes as many calls as fill a moment and returns the microseconds of one."""

    def run(count: int) -> float:
        awaken(call)
        started = perf_counter()
        for _ in range(count):
            call()
        return 1e6 * (perf_counter() - started) / count

    count = int(np.clip(BATCH_SECONDS / (1e-6 * run(3)), 1, 300))
    return lambda: run(count)


def measure(shapes: Sequence[tuple[int, int]] = SHAPES, most: int = THREADS[-1], rounds: int = ROUNDS) -> list[dict]:
    """Return a row for every shape, partition and number of threads; those of a shape are from the same rounds."""
    rows = []
    for shape in shapes:
        keys = [(way, threads) for way in WAYS for threads in THREADS if threads <= most]
        watches = {str(i): stopwatch(layer(shape, WAYS[way], threads)) for i, (way, threads) in enumerate(keys)}
        figures = interleave(watches, rounds)
        for i, (way, threads) in enumerate(keys):
            where = {"shape": "x".join(map(str, shape)), "partition": way, "threads": threads}
            rows.append(where | {"us": quantiles(figures[str(i)])})
    return rows


def draw(document: Mapping[str, Any]) -> bytes:
    """Return a PNG image: a panel per shape, a line per partition with a band from p20 to p80."""
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: no global state, no window, no backend to choose
    from matplotlib.ticker import LogLocator

    rows, available = document["rows"], document["cores"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained", facecolor="white")
    figure.suptitle(
        f"One batch-norm layer, forward and backward, cut in two ways\n{document['device']}; compiled, float32",
        fontsize=10,
    )
    for axes, shape in zip(np.atleast_1d(figure.subplots(1, len(shapes))), shapes, strict=True):
        these = [row for row in rows if row["shape"] == shape]
        counts = sorted({row["threads"] for row in these})
        examples, neurons = shape.split("x")
        axes.set_title(f"{examples} examples, {neurons} neurons", fontsize=10)
        for way, colour in COLOURS.items():
            mine = sorted((row for row in these if row["partition"] == way), key=lambda row: row["threads"])
            low, median, high = ([row["us"][name] for row in mine] for name in ("p20", "median", "p80"))
            axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(counts, median, color=colour, marker="o", markersize=4, linewidth=1.6, label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=9)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel("threads")
        left, right = axes.get_xlim()
        axes.axvspan(available * 2**0.5, right, color="#DDDDDD", alpha=0.5, linewidth=0)
        axes.set_xlim(left, right)
        corner = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 8, "color": "#555555"}
        axes.text(0.98, 0.02, f"more threads than the {available} cores", **corner)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("µs per layer, median")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})  # the same rows, the same bytes
    return image.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partition", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default the device's results")
    parser.add_argument("--quick", action="store_true", help="few threads and rounds: to see that it works")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="only draw the picture of the JSON in this folder")
    options = parser.parse_args(arguments)
    if options.plot:
        document = json.loads((options.plot / "partition.json").read_text(encoding="utf-8"))
        write_atomically(options.plot / "partition.png", draw(document))
        return
    if reason := three_phase.absent():
        sys.exit(f"error: {reason}")
    about = facts() | {"cores": cores()}
    folder = options.out or results_folder(about)
    document = about | {"rows": measure(most=2, rounds=3) if options.quick else measure()}
    write_json(folder / "partition.json", document)
    print(text(document["rows"]))
    write_atomically(folder / "partition.png", draw(document))
    print(folder / "partition.png")


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as lines for a terminal."""
    return "\n".join(
        f"{row['shape']:10}{row['partition']:26}{row['threads']:3} threads {row['us']['median']:10.4g} us"
        for row in rows
    )


if __name__ == "__main__":
    main()
