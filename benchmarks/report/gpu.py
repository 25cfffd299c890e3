"""Targets, facts and ops of a GPU, from the files that ``make gpu`` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.measure import OK, Row
from benchmarks.harness.timing import results_folder
from benchmarks.report import ops as report_ops
from benchmarks.report.text import ABSENT, origin, table

PYTORCH = ("PyTorch eager, native", "PyTorch eager, cuDNN", "torch.compile")


class Target(NamedTuple):
    """A promise about one case: what is measured of it, and the bound."""

    title: str
    direction: str
    shape: str
    dtype: str
    measure: str  # times_empty, percent_of_copy, or the time of the best PyTorch over ours: faster
    sign: str
    limit: float


TARGETS = [
    Target("an empty kernel", direction, "64x20", "float32", "times_empty", "<=", 1.5)
    for direction in ("forward", "backward")
] + [
    Target(title, direction, shape, dtype, measure, ">=", limit)
    for shape, dtype, forward, backward in (
        ("65536x4096", "bfloat16", 1.4, 1.5),
        ("256x256x56x56", "float16", 1.4, 1.5),
        ("100000x32", "float32", 5.0, 5.0),
    )
    for direction, faster in (("forward", forward), ("backward", backward))
    for title, measure, limit in (
        ("per cent of a copy", "percent_of_copy", 92.0),
        ("the best of PyTorch", "faster", faster),
    )
]


def page(results: Path, ops: Mapping[str, Any] | None) -> str:
    """Return targets, facts, and the table of the ops of the newest run on a GPU.

    Parameters
    ----------
    results : Path
        Folder of all results.
    ops : mapping or None
        The newest ``ops.json`` of a GPU.
    """
    if ops is None:
        targets = "\n".join(f"* {promise(target)}" for target in TARGETS)
        return f"All of it is {ABSENT}; `make gpu` measures it. Targets, from cold caches:\n\n{targets}"
    targets = table(["target, from cold caches", "found", ""], (row_of(target, ops["rows"]) for target in TARGETS))
    parts = [origin(ops), targets, facts(results / results_folder(ops).name / "facts.json")]
    explanation = results / results_folder(ops).name / "notes.md"
    parts += [explanation.read_text(encoding="utf-8").strip()] if explanation.exists() else []
    return "\n\n".join([*parts, report_ops.summary(ops)])


def promise(target: Target) -> str:
    """Return a target in words."""
    name = f"batch norm {target.direction}, {target.shape.replace('x', ' x ')} {target.dtype}"
    unit = {
        "times_empty": "times an empty kernel",
        "percent_of_copy": "% of a copy",
        "faster": "times the best of PyTorch",
    }
    return f"{name}: {target.sign} {target.limit:g} {unit[target.measure]}"


def row_of(target: Target, rows: Sequence[Row]) -> list[str]:
    """Return target, what was found, and whether it is met."""
    value = found(target, rows)
    if value is None:
        return [promise(target), ABSENT, ""]
    met = value <= target.limit if target.sign == "<=" else value >= target.limit
    return [promise(target), f"{value:.3g}", "met" if met else "**not met**"]


def found(target: Target, rows: Sequence[Row]) -> float | None:
    """Return what was measured for a target, or None."""
    wanted = (target.direction, target.shape, target.dtype, "")
    these = {
        row["provider"]: row
        for row in rows
        if row["op"] == "batch_norm"
        and row["status"] == OK
        and (row["direction"], row["shape"], row["dtype"], row["epilogue"]) == wanted
        and row["layout"] != "NHWC"
    }
    ours = these.get(report_ops.OURS)
    if ours is None:
        return None
    if target.measure != "faster":
        return ours.get(target.measure)
    best = min((these[name]["cold_us_median"] for name in PYTORCH if name in these), default=None)
    return None if best is None else best / ours["cold_us_median"]


def facts(path: Path) -> str:
    """Return the measured facts of the device as a table."""
    if not path.exists():
        return f"Facts of the device (launch costs, barriers, bandwidths): {ABSENT}."
    rows = [
        [row["fact"], str(row["value"]), row["unit"]] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    return table(["fact", "measured", "unit"], rows)
