"""The table of speed on the front page: one op and one training step, ours and PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness.measure import Row
from benchmarks.harness.places import COPY
from benchmarks.report import ops
from benchmarks.report.text import ABSENT, PLACES, Documents, figure, paragraphs, table

OURS, PYTORCH = "bnkernels", ("PyTorch", "torch.compile")
NETWORK, OPTIMIZER = "64-20-10", "sgd"
SHAPES = {"cpu": ("64x20", "4096x1024"), "cuda": ("64x20",)}
STEPS = {"batch": f"{NETWORK}, training step with batch norm", "none": f"{NETWORK}, training step without"}

Line = tuple[str, float, float | None, float | None]  # name; µs of ours, of the fastest PyTorch, and of a copy


def speed(cases: Documents, steps: Documents) -> str:
    """Return a table for every place, and below it what batch norm costs a training step."""
    return paragraphs(*(of_place(title, cases.get(place), steps.get(place)) for place, title in PLACES.items()))


def of_place(title: str, cases: Mapping[str, Any] | None, steps: Mapping[str, Any] | None) -> str:
    """Return the part of one place; it needs a run of the ops and one of the training step."""
    lines = [*op_lines(cases), *step_lines(steps)] if cases and steps else []
    if not lines:
        return f"{title}: {ABSENT}."
    rows = [
        [
            what,
            *("" if us is None else figure(us) for us in (ours, theirs)),
            f"{ours / theirs:.2f}" if theirs else "",
            "" if copy is None else figure(copy),
        ]
        for what, ours, theirs, copy in lines
    ]
    header = ["µs, median", OURS, "PyTorch", "ours / PyTorch", "copy"]
    where = f"{title}, {cases['device']}, {cases['date']}:"
    ratios = [row["ratios"] for row in steps["ratios"] if (row["network"], row["optimizer"]) == (NETWORK, OPTIMIZER)]
    return paragraphs(where, table(header, rows), *map(cost, ratios))


def op_lines(document: Mapping[str, Any]) -> list[Line]:
    """Return batch norm at the size of the question and, on a CPU, of a large layer, in both directions."""
    found = []
    for rows in ops.cases(document):
        first = rows[0]
        plain = first["op"] == "batch_norm" and (first["dtype"], first["epilogue"]) == ("float32", "")
        if plain and first["shape"] in SHAPES[document["place"]] and not ops.shared(first):
            kind = ops.kind_of(rows)
            times = {row["provider"]: us for row in rows if (us := ops.median(row, kind)) is not None}
            if OURS in times:
                what = f"batch norm {rows[0]['direction']}, {rows[0]['shape'].replace('x', ' x ')}"
                found.append((what, times[OURS], pytorch(times), times.get(COPY)))
    return found


def step_lines(document: Mapping[str, Any]) -> list[Line]:
    """Return the training step with batch norm and without."""
    found = []
    for norm, what in STEPS.items():
        wanted = NETWORK, norm, OPTIMIZER
        these: list[Row] = [r for r in document["rows"] if (r["network"], r["norm"], r["optimizer"]) == wanted]
        times = {row["maker"]: row["us"]["median"] for row in these}
        ours = min((us for name, us in times.items() if name.startswith(OURS)), default=None)
        if ours is not None:
            found.append((what, ours, pytorch(times), None))
    return found


def pytorch(times: Mapping[str, float]) -> float | None:
    """Return the time of the fastest of PyTorch's ways, or None."""
    return min((us for name, us in times.items() if name.startswith(PYTORCH)), default=None)


def cost(ratios: Mapping[str, Any]) -> str:
    """Return the cost of batch norm in a training step, ours and PyTorch's."""
    if "with / without" not in ratios:
        return ""
    ours = f"A step of ours with batch norm takes {ratios['with / without']['median']:.2f} times one without"
    theirs = ratios.get("PyTorch with / without")
    return ours + (f", one of PyTorch's {theirs['median']:.2f} times." if theirs else ".")
