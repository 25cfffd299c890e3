"""Tables of the ops for the documents, from the rows of ``python -m benchmarks``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.harness.measure import OK, Row
from benchmarks.harness.places import COPY, COPY_MEMCPY, EMPTY
from benchmarks.harness.records import key_of
from benchmarks.report.text import ABSENT, Documents, by_place, missing, origin, paragraphs, spread, table

OURS = "bnkernels"
LIMITS = (COPY, COPY_MEMCPY, EMPTY)
QUESTION = ("64x20", "float32", "")


def kind_of(rows: Sequence[Row]) -> str:
    """Return the kind of time that rows are compared by: from cold caches on a GPU, hot on a CPU."""
    return "cold" if any("cold_us_median" in row for row in rows) else "hot"


def median(row: Row | None, kind: str) -> float | None:
    """Return a row's median, or None where it has none."""
    return row.get(f"{kind}_us_median") if row and row["status"] == OK else None


def cases(document: Mapping[str, Any]) -> Iterator[list[Row]]:
    """Yield the rows of every case."""
    for _, rows in groupby(document["rows"], key=key_of):
        yield list(rows)


def name_of(row: Row) -> str:
    """Return a case as the tables show it."""
    op = row["op"].replace("_", " ")
    layout = "" if row["layout"] == "NC" else f" {row['layout']}"
    epilogue = {"": "", "relu": " + ReLU", "add_relu": " + sum + ReLU"}[row["epilogue"]]
    threads = f", {row['threads']} threads" if shared(row) else ""
    return f"{op} {row['direction']}{epilogue}, {row['shape'].replace('x', ' x ')} {row['dtype']}{layout}{threads}"


def shared(row: Row) -> bool:
    """Tell whether everybody had several threads."""
    return row.get("threads", 1) > 1


def summary(document: Mapping[str, Any] | None) -> str:
    """Return a line per measured case: ours, the share of a copy, and the fastest of the peers."""
    if document is None:
        return f"Ops: {ABSENT}."
    lines, left = [], 0
    for rows in cases(document):
        if all(row["status"].startswith("not measured") for row in rows):
            left += 1
            continue
        lines.append(line_of(rows))
    header = ["case", "ours, µs", "% of a copy", "fastest peer", "its µs", "ours / fastest peer"]
    text = f"{origin(document)}\n\n{table(header, lines)}"
    if left:
        text += f"\n\n{left} more cases of the list are {ABSENT} here: they are left to a GPU, or the time was up."
    return text


def line_of(rows: Sequence[Row]) -> list[str]:
    """Return the cells of one case."""
    kind = kind_of(rows)
    ours = next((row for row in rows if row["provider"] == OURS), None)
    peers = [row for row in rows if row["provider"] not in (OURS, *LIMITS) and median(row, kind)]
    best = min(peers, key=lambda row: median(row, kind), default=None)
    mine, theirs = median(ours, kind), median(best, kind)
    return [
        name_of(rows[0]),
        spread(ours, f"{kind}_us_") if mine else short(ours["status"] if ours else ABSENT),
        f"{ours['percent_of_copy']:.0f}" if mine and "percent_of_copy" in ours else "",
        best["provider"] if best else "none",
        spread(best, f"{kind}_us_") if theirs else "",
        f"{mine / theirs:.2f}" if mine and theirs else "",
    ]


def short(status: str) -> str:
    """Return a status without its explanation."""
    return status.partition(":")[0]


def of_the_question(documents: Documents) -> str:
    """Return the times of all providers for the size of the question, in every place."""
    return by_place(documents, of_place)


def of_place(document: Mapping[str, Any]) -> str:
    """Return a table with a row for every provider that was measured, the fastest forward first."""
    found = {row["direction"]: rows for rows in cases(document) if (row := asked(rows))}
    if not found:
        return f"This size: {ABSENT}."
    kind = kind_of(found["forward"])
    by_name = {direction: {row["provider"]: row for row in rows} for direction, rows in found.items()}
    names = [name for name in by_name["forward"] if any(median(rows.get(name), kind) for rows in by_name.values())]
    names.sort(key=lambda name: median(by_name["forward"].get(name), kind) or float("inf"))
    columns = ["kernels"] if kind == "cold" else []
    rows = []
    for name in names:
        row = [f"**{name}**" if name == OURS else name]
        for direction in by_name:
            one = by_name[direction].get(name)
            row.append(spread(one, f"{kind}_us_") if median(one, kind) else short(one["status"]) if one else "")
            row += [f"{one['kernels']:g}" if one and "kernels" in one else ""] if columns else []
        rows.append(row)
    header = ["µs"]
    for direction in by_name:
        header += [direction, *columns]
    reasons = {
        row["provider"]: row["status"].partition(": ")[2]
        for row in found["forward"]
        if row["status"].startswith("absent")
    }
    return paragraphs(table(header, rows), missing(reasons))


def asked(rows: Sequence[Row]) -> Row | None:
    """Return a row of these if they are about the size of the question."""
    row = rows[0]
    wanted = row["op"] == "batch_norm" and (row["shape"], row["dtype"], row["epilogue"]) == QUESTION
    return row if wanted else None
