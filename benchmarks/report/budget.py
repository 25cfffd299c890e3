"""The budget of the kernels, from machine code, beside what a GPU took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.counts.budget import COPY_RATES, LANES, VECTOR
from benchmarks.counts.devices import H200
from benchmarks.harness.measure import OK
from benchmarks.report import ops as report_ops
from benchmarks.report.text import ABSENT, paragraphs, table

REACHED = 0.7  # share of its issue slots that a busy multiprocessor uses
Row = Mapping[str, Any]
Document = Mapping[str, Any] | None


def page(counts: Document, ops: Document, step: Document) -> str:
    """Return the tables of large and of small kernels.

    Parameters
    ----------
    counts : mapping or None
        ``budget.json``.
    ops, step : mapping or None
        The newest ``ops.json`` and ``train_step.json`` of a GPU.
    """
    if counts is None:
        return f"Budgets: {ABSENT}."
    large = [row for row in counts["rows"] if "budget" in row]
    small = [row for row in counts["rows"] if "budget" not in row]
    times = {id(row): times_of(row, ops, step) for row in counts["rows"]}
    of_large = [
        "instructions a vector",
        "target",
        *(f"budget {device.name}" for device in COPY_RATES),
        "KiB in flight",
        "needed",
    ]
    of_small = ["cycles of the longest warp", "target", "turns of shared memory", "without conflicts"]
    of_all = ["registers", "blocks an SM", "KiB of code", "longest loop, KiB", "predicted us", "measured us"]
    return paragraphs(
        "## Large tensors",
        table(
            ["case", *of_large, *of_all],
            ([name(row), *large_cells(row), *cells(row, *times[id(row)])] for row in large),
        ),
        "## Small kernels",
        table(
            ["case", *of_small, *of_all],
            ([name(row), *small_cells(row), *cells(row, *times[id(row)])] for row in small),
        ),
    )


def name(row: Row) -> str:
    """Return the case in words."""
    return f"{row['op'].replace('_', ' ')}, {' x '.join(map(str, row['shape']))} {row['dtype']}: `{row['kernel']}`"


def large_cells(row: Row) -> list[str]:
    """Return the cells of a kernel that memory should bound."""
    found = row["instructions_per_vector"]
    budgets = [f"{row['budget'][device.name]:.0f}" for device in COPY_RATES]
    in_flight, needed = (f"{row[key] / 1024:.0f}" for key in ("bytes_in_flight", "bytes_needed"))
    return [bold(f"{found:.0f}", found > row["target"]), str(row["target"]), *budgets, in_flight, needed]


def small_cells(row: Row) -> list[str]:
    """Return the cells of a kernel that latencies bound."""
    cycles = bold(f"{row['cycles']:,}", row["cycles"] > row["target"])
    return [cycles, f"{row['target']:,}", f"{row['shared_turns']:,}", f"{row['fewest_shared_turns']:,}"]


def cells(row: Row, predicted: float, measured: float | None) -> list[str]:
    """Return the cells of every kernel."""
    sizes = [f"{row[key] / 1024:.1f}" for key in ("code_bytes", "loop_bytes")]
    found = ABSENT if measured is None else f"{measured:.3g}, predicted / measured {predicted / measured:.2f}"
    return [str(row["registers"]), str(row["blocks_per_sm"]), *sizes, f"{predicted:.3g}", found]


def bold(text: str, missed: bool) -> str:
    """Return the text, bold where its target is missed."""
    return f"**{text}**" if missed else text


def times_of(row: Row, ops: Document, step: Document) -> tuple[float, float | None]:
    """Return the predicted time in microseconds on an H200, and the measured one of a GPU or None."""
    if row["op"] == "fused_training step":
        network = "-".join(map(str, row["shape"]))
        rows = [] if step is None else step["rows"]
        ours = (one for one in rows if one["network"] == network and one["maker"] == "bnkernels fused")
        return row["cycles"] / H200.clock * 1e6, next((one["us"]["median"] for one in ours), None)
    if row["op"].endswith(" step"):  # nobody times the steps of a sequence
        return row["cycles"] / H200.clock * 1e6, None
    measured = None if ops is None else measured_of(row, ops["rows"])
    if "budget" not in row:
        return (row["cycles"] / H200.clock + H200.launch_floor) * 1e6, measured
    vectors = bytes_of(row) / VECTOR
    issued = row["instructions_per_vector"] * vectors / (LANES * H200.clock * H200.sms * REACHED)
    moved = row["moved"] * vectors * VECTOR / COPY_RATES[H200]
    return max(issued, moved) * 1e6, measured


def bytes_of(row: Row) -> int:
    """Return the bytes of x."""
    numbers = 1
    for size in row["shape"]:
        numbers *= size
    return numbers * (4 if row["dtype"] == "float32" else 2)


def measured_of(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the time of our op, cold for a large tensor and hot for a small one."""
    op, direction = row["op"].partition(",")[0].split(" ")
    wanted = op, direction, "x".join(map(str, row["shape"])), row["dtype"]
    key = "cold_us_median" if "budget" in row else "hot_us_median"
    return next(
        (
            one[key]
            for one in rows
            if one["status"] == OK
            and one["provider"] == report_ops.OURS
            and (one["op"], one["direction"].removesuffix(" alone"), one["shape"], one["dtype"]) == wanted
            and one["layout"] != "NHWC"
            and one["epilogue"] in ("relu" if op == "batch_norm" else "", "")
        ),
        None,
    )
