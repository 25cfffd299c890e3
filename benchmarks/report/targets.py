"""Targets on a CPU: every ratio beside its limit, and of those that are missed the roofline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.case import Case
from benchmarks.harness.measure import OK, Row
from benchmarks.harness.places import COPY
from benchmarks.harness.targets import TARGETS, Target
from benchmarks.report import ops
from benchmarks.report.text import ABSENT, figure, origin, paragraphs, table

FEW_BYTES = 2**16  # less than about 10 us of a copy: such a call is as long as its Python part
OUTCOMES = {True: "met", False: "**missed**", None: ABSENT}


class Found(NamedTuple):
    """Figures of a target: rows of ours and of the fastest rival that counts, and a copy's time."""

    target: Target
    ours: Row
    rival: Row
    copy: float

    @property
    def ratio(self) -> float:
        """Time of ours, by that of the rival."""
        return self.ours["hot_us_median"] / self.rival["hot_us_median"]

    @property
    def least(self) -> float:
        """Ratio that a copy of the same bytes would have."""
        return self.copy / self.rival["hot_us_median"]

    @property
    def met(self) -> bool:
        """Whether the ratio meets the target."""
        return self.target.met(self.ratio)


def page(cases: Mapping[str, Any] | None, steps: Mapping[str, Any] | None, cost: Mapping[str, Any] | None) -> str:
    """Return the tables of all targets."""
    return paragraphs(
        "## Ops",
        of_ops(cases) if cases else f"Ops: {ABSENT}.",
        "## Training steps",
        of_steps([*(steps["targets"] if steps else ()), *(overhead_targets(cost["rows"]) if cost else ())]),
    )


def of_ops(document: Mapping[str, Any]) -> str:
    """Return a table of every group of targets, and the roofline of those that are missed."""
    rows = {str(target.case): found(target, document) for target in TARGETS}
    parts = [origin(document)]
    for group in dict.fromkeys(target.group for target in TARGETS):
        parts.append(f"### {group}")
        lines = [line(target, rows[str(target.case)]) for target in TARGETS if target.group == group]
        parts.append(table(["case", "ours, µs", "rival", "its µs", "a copy, µs", "ratio", "target", ""], lines))
    missed = [one for one in rows.values() if one and not one.met]
    roofline = "### Missed: what limits" if missed else ""
    header = [
        "case",
        "bytes",
        "ours, GB/s",
        "a copy, GB/s",
        "flops",
        "Gflop/s",
        "a copy / rival",
        "target",
        "what limits",
    ]
    return paragraphs(*parts, roofline, table(header, map(limits, missed)) if missed else "")


def found(target: Target, document: Mapping[str, Any]) -> Found | None:
    """Return what was measured for a target, or None."""
    for rows in ops.cases(document):
        if ops.name_of(rows[0] | {"threads": 1}) == name_of(target.case) and target.case.all_cores == ops.shared(
            rows[0]
        ):
            timed = {row["provider"]: row for row in rows if ops.median(row, "hot") is not None}
            rivals = [
                row for name, row in timed.items() if name in (target.rivals or timed.keys() - {ops.OURS, *ops.LIMITS})
            ]
            if ops.OURS in timed and COPY in timed and rivals:
                rival = min(rivals, key=lambda row: row["hot_us_median"])
                return Found(target, timed[ops.OURS], rival, timed[COPY]["hot_us_median"])
    return None


def name_of(case: Case) -> str:
    """Return a case as the tables show it, but for the number of threads, which is that of a machine."""
    fields = {name: getattr(case, name) for name in ("op", "direction", "dtype", "layout", "epilogue")}
    return ops.name_of(fields | {"shape": "x".join(map(str, case.shape))})


def line(target: Target, one: Found | None) -> list[str]:
    """Return the cells of a target."""
    limit = f"{'<' if target.below else '<='} {target.limit:g}"
    if one is None:
        name = name_of(target.case) + (", all cores" if target.case.all_cores else "")
        return [name, "", "", "", "", "", limit, ABSENT]
    times = figure(one.ours["hot_us_median"]), one.rival["provider"], figure(one.rival["hot_us_median"])
    return [ops.name_of(one.ours), *times, figure(one.copy), f"{one.ratio:.2f}", limit, OUTCOMES[one.met]]


def limits(one: Found) -> list[str]:
    """Return the cells of a target's roofline."""
    nbytes, ours = one.ours["bytes"], one.ours["hot_us_median"]
    if one.least > one.target.limit:
        what = "memory: a copy alone misses it"
    elif nbytes <= FEW_BYTES:
        what = "the call: its bytes are few"
    else:
        what = "memory" if one.copy > 0.6 * ours else "arithmetic, or further passes over the data"
    rates = (f"{nbytes / us / 1e3:.3g}" for us in (ours, one.copy))
    flops = f"{one.target.flops:,}", f"{one.target.flops / ours / 1e3:.3g}"
    return [ops.name_of(one.ours), f"{nbytes:,}", *rates, *flops, f"{one.least:.2f}", f"{one.target.limit:g}", what]


def overhead_targets(rows: Sequence[Row]) -> list[Row]:
    """Return the targets on a CPU with the largest ratio of any point, that of the faster of our engines.

    Parameters
    ----------
    rows : sequence of dict
        Rows of the overhead figure.

    Returns
    -------
    list of dict
        Target, what was found (None where nothing was), and whether it is met.
    """

    def fastest(names: str, norm: str) -> dict[tuple[str, int], float]:
        these = [r for r in rows if r["framework"].startswith(names) and r["norm"] == norm and r["status"] == OK]
        points = {(row["axis"], row["value"]) for row in these}
        return {p: min(r["us_median"] for r in these if (r["axis"], r["value"]) == p) for p in points}

    ours, plain, torch = fastest("bnkernels", "batch"), fastest("bnkernels", "none"), fastest("PyTorch", "none")
    found = []
    for name, other, limit in (("ours without", plain, 1.15), ("PyTorch's without", torch, 1.0)):
        ratios = [us / other[point] for point, us in ours.items() if point in other]
        worst = max(ratios, default=None)
        target = f"five layers, every width and batch size: ours with batch norm / {name} <= {limit:g}"
        found.append({"target": target, "found": worst, "met": None if worst is None else worst <= limit})
    return found


def of_steps(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the targets of training steps."""
    return table(["target", "found", ""], step_lines(rows)) if rows else f"Training steps: {ABSENT}."


def step_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the cells of every target."""
    for row in rows:
        yield [row["target"], ABSENT if row["found"] is None else f"{row['found']:.3g}", OUTCOMES[row["met"]]]
