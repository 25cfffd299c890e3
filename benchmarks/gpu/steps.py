"""The steps of ``make gpu``: which program each one runs, how long it may take, and what the last table shows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PARTS = ("facts", "test", "sanitize", "bench")
OURS, EXPRESSION = "bnkernels", "CuPy expression"
MARGIN = 12.0  # seconds between a program's own end of time and the limit at which it is stopped

Command = Callable[[Path, float, bool], list[str]]
Document = Mapping[str, Any]


class Step(NamedTuple):
    """One program.

    Attributes
    ----------
    part, name : str
        Part that it belongs to, and its name.
    least, most : float
        Seconds it needs to be worth a start, and seconds it may take while others wait.
    document : str
        The JSON it writes into the folder of results.
    command : callable
        ``command(folder, seconds, dry_run)`` returns module and arguments.
    figures : callable
        ``figures(document)`` returns what matters most, as short texts.
    merged : bool
        Whether the document becomes part of the summary and the file goes: a run leaves at most eight files.
    measured : callable
        ``measured(document)`` tells whether there is anything in it.
    superfluous : tuple of str
        Further files that go: pictures, which can be drawn again from the figures.
    keeps_older : bool
        Whether an older document stays until this step has a better one.
    optional : bool
        Whether to be stopped at the limit is no failure.
    only_on_a_gpu : bool
        Whether a dry run leaves it out, because another step walks through the same program.
    """

    part: str
    name: str
    least: float
    most: float
    document: str
    command: Command
    figures: Callable[[Document], list[str]]
    merged: bool = False
    measured: Callable[[Document], bool] = lambda document: True
    superfluous: tuple[str, ...] = ()
    keeps_older: bool = False
    optional: bool = False
    only_on_a_gpu: bool = False


# ---- commands -------------------------------------------------------------------------------------------------------


def checking(module: str, document: str) -> Command:
    """Return the command of a program that knows about its time and about dry runs."""

    def command(folder: Path, seconds: float, dry_run: bool) -> list[str]:
        given = ["--out", str(folder / document), "--seconds", f"{max(seconds - MARGIN, 1):.0f}"]
        return [module, *given, *(["--dry-run"] if dry_run else [])]

    return command


def measuring(module: str, dry_run: bool) -> list[str]:
    """Return the beginning of a benchmark's command: in a dry run on the stand-in for CuPy."""
    return [*(["benchmarks.gpu.dry_run"] if dry_run else []), module, "--place", "cuda"]


def train_step_quick(folder: Path, seconds: float, dry_run: bool) -> list[str]:
    """Return the command for the training step with SGD alone."""
    only = ["--only", EXPRESSION] if dry_run else []
    return [
        *measuring("benchmarks.steps.bench_train_step", dry_run),
        "--quick",
        *only,
        "--json",
        f"{folder}/train_step.json",
    ]


def train_step(folder: Path, seconds: float, dry_run: bool) -> list[str]:
    """Return the command for the training step with all optimisers."""
    return [*measuring("benchmarks.steps.bench_train_step", dry_run), "--json", f"{folder}/train_step.json"]


def ops(folder: Path, seconds: float, dry_run: bool) -> list[str]:
    """Return the command for the ops, whose list begins with what says most."""
    # A case that has begun is finished: the limit leaves time for one in which something compiles.
    own = [
        "--seconds",
        f"{max(seconds - 3 * MARGIN, 1):.0f}",
        "--seconds-per-case",
        "0.5",
        "--out",
        f"{folder}/ops.json",
    ]
    quick = ["--quick", "--providers", OURS] if dry_run else []
    return [*measuring("benchmarks.__main__" if dry_run else "benchmarks", dry_run), *own, *quick]


def overhead(folder: Path, seconds: float, dry_run: bool) -> list[str]:
    """Return the command for the overhead of normalisation over units and batch sizes."""
    own = ["--seconds", f"{max(seconds - MARGIN, 1):.0f}", "--out", str(folder)]
    quick = ["--quick", "--only", EXPRESSION] if dry_run else []
    return [*measuring("benchmarks.steps.overhead", dry_run), *own, *quick]


# ---- figures --------------------------------------------------------------------------------------------------------


def own_figures(document: Document) -> list[str]:
    """Return what the program itself finds most telling."""
    return list(document["figures"])


def train_step_figures(document: Document) -> list[str]:
    """Return our step with batch norm beside the fastest of the others."""
    rows = [row for row in document["rows"] if row["norm"] == "batch" and row["optimizer"] == "sgd"]
    fastest = sorted(rows, key=lambda row: row["us"]["median"])[:3]
    shown = {row["maker"]: row for row in [*(row for row in rows if row["maker"] == OURS), *fastest]}
    return [f"{maker} {row['us']['median']:.4g} us" for maker, row in shown.items()]


def ops_figures(document: Document) -> list[str]:
    """Return how much was measured, and our first case, forward and backward."""
    rows = document["rows"]
    measured = [row for row in rows if row["status"] == "ok"]
    bad = [row for row in rows if row["status"].startswith(("failed", "wrong"))]
    figures = [f"{len(measured)} of {len(rows)} rows measured, {len(bad)} failed or wrong"]
    for row in [row for row in measured if row["provider"] == OURS and row["shape"] == "64x20"][:2]:
        figures.append(
            f"{row['direction']} {row['shape']} {row['hot_us_median']:.3g} us = {row['times_empty']:.3g} x empty"
        )
    return figures


def any_row_ok(document: Document) -> bool:
    """Tell whether a row was measured, one of ours if the rows name providers."""
    return any(row.get("status", "ok") == "ok" and row.get("provider", OURS) == OURS for row in document["rows"])


def overhead_figures(document: Document) -> list[str]:
    """Return our ratio with and without batch norm, at the fewest and at the most units."""
    rows = [
        row
        for row in document["rows"]
        if row["framework"] == OURS and row["norm"] == "batch" and row["axis"] == "units" and row["status"] == "ok"
    ]
    ends = sorted(rows, key=lambda row: row["value"])
    return [f"{row['value']} units: {row['ratio_median']:.3g} x" for row in (ends[:1] + ends[1:][-1:])]


STEPS = (
    Step("facts", "facts", 40, 75, "facts.json", checking("benchmarks.gpu.facts", "facts.json"), own_figures),
    Step(
        "test", "test", 100, 240, "test.json", checking("benchmarks.gpu.suite", "test.json"), own_figures, merged=True
    ),
    Step(
        *("sanitize", "sanitize", 60, 110, "sanitize.json"),
        *(checking("benchmarks.gpu.sanitize", "sanitize.json"), own_figures),
        merged=True,
    ),
    Step(
        *("facts", "profile", 20, 60, "profile.json"),
        *(checking("benchmarks.gpu.profile", "profile.json"), own_figures),
        merged=True,
        optional=True,
        only_on_a_gpu=True,
    ),
    Step(
        *("bench", "train step, quick", 30, 60, "train_step.json", train_step_quick, train_step_figures),
        measured=any_row_ok,
    ),
    Step("bench", "ops", 90, 240, "ops.json", ops, ops_figures, measured=any_row_ok),
    Step(
        *("bench", "overhead", 35, 80, "overhead.json", overhead, overhead_figures),
        measured=any_row_ok,
        superfluous=("overhead_units.png", "overhead_batch.png"),
    ),
    Step(
        *("bench", "train step", 60, 200, "train_step.json", train_step, train_step_figures),
        measured=any_row_ok,
        keeps_older=True,
        optional=True,
        only_on_a_gpu=True,
    ),
)
