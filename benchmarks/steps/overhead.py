"""The overhead figure: time of a training step with batch norm, or layer norm, relative to one without.

``python -m benchmarks.steps.overhead --place cpu --out DIR`` measures over the units of a layer and over the batch
size, in every framework that is installed; it writes ``overhead.csv``, ``overhead.json`` and two pictures. The most
telling points come first: when the seconds are over, or after Ctrl-C, what was measured is kept. ``--plot DIR`` draws
the pictures again from the CSV alone.

The network has five fully connected layers, as wide as the inputs, each followed by the norm and ReLU, and 10 outputs;
the optimiser is Adam, the data are random. A variant is timed only if its first losses are those of float64.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import steps
from benchmarks.harness.case import NotSupportedError, WrongResultError
from benchmarks.harness.places import keep_memory
from benchmarks.harness.timing import facts, interleave, quantiles, results_folder, write_json
from benchmarks.steps import overhead_plot
from benchmarks.steps.expression import ExpressionStep
from benchmarks.steps.step import Batches, Maker, Step, check_losses, initial_state, stopwatch
from bnkernels.runtime.cpu.threads import set_num_threads
from bnkernels.train.checkpoint import write_atomically

NORMS = ("none", "batch", "layer")
LAYERS, CLASSES, BATCH, UNITS = 5, 10, 128, 128  # where an axis does not say otherwise
OPTIMIZER, RATE = "adam", 1e-5  # Adam's first steps follow signs, also those of rounding; a small rate keeps them small
CHECKED = 3  # steps whose losses have to be right
LOSS_ROUNDINGS = 64  # float32 roundings: right variants stay below 8 at this rate, a misplaced eps is above 300
MOST_STEPS, ROUND_US = 20, 20_000  # steps of a variant's round, or microseconds, about
BLOCK, MOST_BLOCKS = 3, 10  # rounds are taken in blocks; an unfinished block is lost
LEFT_OUT = ("PyTorch, fused optimiser",)  # unless asked for: on the same side of both step times

MEASURED = "ok"
OUT_OF_TIME, INTERRUPTED = "not measured: out of time", "not measured: interrupted"
QUANTILES = ("median", "p20", "p80")
COLUMNS = (
    *("place", "device", "axis", "value", "framework", "norm"),
    *(f"{kind}_{quantile}" for kind in ("us", "ratio") for quantile in QUANTILES),
    *("rounds", "steps_per_round", "status"),
)

Row = dict[str, Any]


class Point(NamedTuple):
    """One place on one of the two axes."""

    axis: str  # units or batch
    value: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Inputs, units of every hidden layer, classes."""
        units = self.value if self.axis == "units" else UNITS
        return (*[units] * (LAYERS + 1), CLASSES)

    def batches(self) -> Batches:
        """Return the mini-batches that are checked, and then timed in turn."""
        rng = np.random.default_rng(0)
        rows, inputs = self.value if self.axis == "batch" else BATCH, self.sizes[0]
        draw = rng.standard_normal, rng.integers
        return [
            (draw[0]((rows, inputs), dtype=np.float32), draw[1](0, CLASSES, rows, dtype=np.int32))
            for _ in range(CHECKED)
        ]


# The most telling first.
POINTS = (
    *(Point("units", value) for value in (32, 128, 1024)),
    *(Point("batch", value) for value in (1024, 16384, 256)),
    *(Point("units", value) for value in (64, 256, 512)),
    *(Point("batch", value) for value in (4096, 512, 2048, 8192)),
)
QUICK = (Point("units", 32), Point("units", 64), Point("batch", 256))


@dataclass
class Ready:
    """The variants of a point that may be timed, and why others may not; by framework and norm."""

    networks: dict[tuple[str, str], Step]
    refused: dict[tuple[str, str], str]


# ---- one point ------------------------------------------------------------------------------------------------------


def prepare(point: Point, makers: Mapping[str, Maker], batches: Batches) -> Ready:
    """Make every variant and check its losses."""
    ready = Ready({}, {})
    for norm in NORMS:
        state = initial_state(point.sizes, norm)
        reference = ExpressionStep(state, OPTIMIZER, RATE, dtype="float64")
        exact = reference.losses(reference.prepare_all(batches))
        for name, maker in makers.items():
            try:
                step = maker.make(state, OPTIMIZER, RATE)
                found = step.losses(step.prepare_all(batches))
                check_losses(f"{name} (norm {norm})", found, exact, LOSS_ROUNDINGS)
            except NotSupportedError as error:
                ready.refused[name, norm] = str(error)
            except WrongResultError as error:
                ready.refused[name, norm] = f"wrong: {error}"
            except Exception as error:  # any error of a framework is shown; the others go on
                words = " ".join(str(error).split())[:200]
                ready.refused[name, norm] = f"failed: {type(error).__name__}: {words}"
            else:
                ready.networks[name, norm] = step
    return ready


def steps_per_round(networks: Mapping[tuple[str, str], Step], batches: Batches) -> int:
    """Return the number of steps of the slowest variant that fill a round."""
    slowest = max(stopwatch(step, batches, warm_up=0)() for step in networks.values())
    return int(np.clip(ROUND_US // slowest, 1, MOST_STEPS))


def take_rounds(watches: Mapping[str, Callable[[], float]], until: float) -> tuple[dict[str, np.ndarray], bool]:
    """Take interleaved rounds until a time of `time.monotonic`, at least one block; say whether Ctrl-C ended them."""
    blocks: list[dict[str, np.ndarray]] = []
    try:
        while len(blocks) < MOST_BLOCKS:
            started = time.monotonic()
            blocks.append(interleave(watches, BLOCK, seed=len(blocks)))
            if 2 * time.monotonic() - started > until:  # another one would end too late
                break
    except KeyboardInterrupt:
        return _join(watches, blocks), True
    return _join(watches, blocks), False


def _join(names: Mapping[str, Any], blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in names} if blocks else {}


def measure_point(point: Point, makers: Mapping[str, Maker], until: float) -> tuple[list[Row], bool]:
    """Check and time a point.

    Parameters
    ----------
    point : Point
        Network, mini-batch and optimiser.
    makers : dict of str to Maker
        All of them installed.
    until : float
        When to end, as `time.monotonic` tells time; one block of rounds is taken in any case.

    Returns
    -------
    rows : list of dict
        A row per framework and norm.
    interrupted : bool
        Whether Ctrl-C ended the rounds.
    """
    batches = point.batches()
    ready = prepare(point, makers, batches)
    count, figures, interrupted = 0, {}, False
    if ready.networks:
        count = steps_per_round(ready.networks, batches)
        warm_up = CHECKED if count > CHECKED else 1  # the `lax.scan` of CHECKED steps is compiled already
        turns = [batches[i % len(batches)] for i in range(warm_up + count)]
        # By number: NumPy, which shuffles the names, would take tuples apart.
        watches = {str(i): stopwatch(step, turns, warm_up) for i, step in enumerate(ready.networks.values())}
        taken, interrupted = take_rounds(watches, until)
        figures = {key: taken[str(i)] for i, key in enumerate(ready.networks) if taken}
    rows = []
    for name in makers:
        for norm in NORMS:
            status = ready.refused.get((name, norm), MEASURED if figures else INTERRUPTED)
            row = empty_row(point, name, norm, status)
            rows.append(row | (figures_of(figures, name, norm, count) if status == MEASURED else {}))
    return rows, interrupted


def figures_of(figures: Mapping[tuple[str, str], np.ndarray], name: str, norm: str, count: int) -> Row:
    """Return the columns of a measured row; the ratio is that to the framework's own step without a norm."""
    us = figures[name, norm]
    found: Row = {f"us_{quantile}": figure for quantile, figure in quantiles(us).items()}
    if norm != "none" and (name, "none") in figures:
        ratios = quantiles(us / figures[name, "none"])  # round by round: both saw the same clocks and load
        found |= {f"ratio_{quantile}": figure for quantile, figure in ratios.items()}
    return found | {"rounds": len(us), "steps_per_round": count}


def empty_row(point: Point, framework: str, norm: str, status: str) -> Row:
    """Return a row without figures."""
    named = {"axis": point.axis, "value": point.value, "framework": framework, "norm": norm, "status": status}
    return dict.fromkeys(COLUMNS) | named


# ---- a run ----------------------------------------------------------------------------------------------------------


def measure(
    makers: Mapping[str, Maker], points: Sequence[Point], seconds: float, save: Callable[[list[Row]], None]
) -> bool:
    """Measure every point; those who compile for long come after all others.

    Parameters
    ----------
    makers : dict of str to Maker
        Makers that take part, installed or not.
    points : sequence of Point
        In this order.
    seconds : float
        After which no further point is begun; shared evenly by the points.
    save : callable
        Gets the rows of all points, measured so far or not, at the start and after every point.

    Returns
    -------
    bool
        Whether Ctrl-C ended it.
    """
    deadline = time.monotonic() + seconds
    absent = {name: f"absent: {reason}" for name, maker in makers.items() if (reason := maker.absent())}
    here = {name: maker for name, maker in makers.items() if name not in absent}
    groups = [{name: maker for name, maker in here.items() if maker.slow_start == slow} for slow in (False, True)]
    tasks = [(point, group) for group in groups if group for point in points]
    rows = {
        (point, name, norm): empty_row(point, name, norm, absent.get(name, OUT_OF_TIME))
        for point in points
        for name in makers
        for norm in NORMS
    }
    save(list(rows.values()))
    for done, (point, group) in enumerate(tasks):
        now = time.monotonic()
        if now >= deadline:
            break
        try:
            found, interrupted = measure_point(point, group, now + (deadline - now) / (len(tasks) - done))
        except KeyboardInterrupt:
            found, interrupted = [], True
        rows |= {(point, row["framework"], row["norm"]): row for row in found}
        if interrupted:
            rows = {
                key: row | {"status": INTERRUPTED} if row["status"] == OUT_OF_TIME else row for key, row in rows.items()
            }
        save(list(rows.values()))
        print(f"{point.axis} {point.value}: {time.monotonic() - now:.0f} s", file=sys.stderr, flush=True)
        if interrupted:
            return True
    return False


def write(folder: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write both files; every row of the CSV says place and device, so that it stands alone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {name: about[name] for name in ("place", "device")} for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "overhead.csv", text.getvalue().encode())
    told = [name for name in COLUMNS if name not in ("place", "device")]
    kept = [{name: row[name] for name in told if row[name] is not None} for row in rows]
    write_json(folder / "overhead.json", {**about, "rows": kept})


def table(rows: Sequence[Row]) -> str:
    """Return the ratios as lines for a terminal: a line per framework and norm, a column per point of the axis."""
    lines = []
    for axis in ("units", "batch"):
        mine = [row for row in rows if row["axis"] == axis and row["norm"] != "none"]
        values = sorted({row["value"] for row in mine})
        lines += [
            "",
            f"{'step time relative to no norm':32}{'norm':6}" + "".join(f"{axis} {v}".rjust(13) for v in values),
        ]
        for key in dict.fromkeys((row["framework"], row["norm"]) for row in mine):
            by_value = {row["value"]: row for row in mine if (row["framework"], row["norm"]) == key}
            medians = [by_value[value]["ratio_median"] for value in values]
            if any(median is not None for median in medians):
                cells = ["-" if median is None else f"{median:.2f}" for median in medians]
                lines.append(f"{key[0]:32}{key[1]:6}" + "".join(cell.rjust(13) for cell in cells))
    reasons = dict.fromkeys(
        f"{row['framework']}, {row['norm']}: {row['status']}" for row in rows if row["status"] != MEASURED
    )
    return "\n".join([*lines[1:], "", *reasons])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--place", choices=("cpu", "cuda"), default="cpu", help="where; default cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go; default the device's results")
    parser.add_argument("--quick", action="store_true", help="three small points: to see that it works")
    parser.add_argument("--seconds", type=float, default=170, metavar="S", help="begin no point later; default 170")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="frameworks, as the table names them")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="only draw the pictures of the CSV in this folder")
    options = parser.parse_args(arguments)
    if options.plot:
        print(*overhead_plot.plot(options.plot), sep="\n")
        return
    set_num_threads(1)
    try:
        makers = steps.makers(options.place, tuple(options.only))
    except ValueError as error:
        sys.exit(f"error: {error}")
    makers = {name: maker for name, maker in makers.items() if options.only or name not in LEFT_OUT}
    if all(maker.absent() for maker in makers.values()):
        sys.exit("\n".join(f"{name}: {maker.absent()}" for name, maker in makers.items()))
    about = facts("torch", "jax", place=options.place)
    about["protocol"] = {"layers": LAYERS, "batch": BATCH, "units": UNITS, "optimizer": OPTIMIZER, "dtype": "float32"}
    folder = options.out or results_folder(about)
    finish(folder, *_run(makers, about, folder, options))


def _run(makers: Mapping[str, Maker], about: Row, folder: Path, options: argparse.Namespace) -> tuple[list[Row], bool]:
    latest: list[Row] = []

    def save(rows: list[Row]) -> None:
        latest[:] = rows
        write(folder, about, rows)

    interrupted = measure(makers, QUICK if options.quick else POINTS, options.seconds, save)
    return latest, interrupted


def finish(folder: Path, rows: Sequence[Row], interrupted: bool) -> None:
    """Print the table, draw the pictures where Matplotlib is installed, and exit with what went wrong."""
    print(table(rows))
    try:
        print(*overhead_plot.plot(folder), sep="\n")
    except ImportError as error:
        print(f"no pictures: {error}")
    if interrupted:
        sys.exit(130)
    if bad := [row for row in rows if row["status"].startswith(("wrong", "failed"))]:
        sys.exit(f"error: {len(bad)} rows are wrong or failed")


if __name__ == "__main__":
    keep_memory()
    main()
