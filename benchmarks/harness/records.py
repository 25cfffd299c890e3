"""Rows of a run as a table for a terminal, and as JSON and CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import OK, Row
from benchmarks.harness.timing import write_json
from bnkernels.train.checkpoint import write_atomically

KINDS = ("cold", "hot", "host", "end_to_end")
CASE = ("op", "direction", "shape", "dtype", "layout", "epilogue", "threads", "place")
COLUMNS = (
    *CASE,
    "provider",
    "status",
    "backend",
    "method",
    *(f"{kind}_us_{quantile}" for kind in KINDS for quantile in ("median", "p20", "p80")),
    "kernels",
    "bytes",
    "GB_per_s",
    "percent_of_copy",
    "times_empty",
    "error",
    "rounds",
    "sets",
)
FIGURES = ("kernels", "percent_of_copy", "times_empty")
TITLES = {"cold": "cold us", "hot": "hot us", "host": "host us", "end_to_end": "end to end us"}
TITLES |= {"kernels": "kernels", "percent_of_copy": "% of copy", "times_empty": "x empty"}
WIDTH = 24  # characters of a time with its quartiles


def key_of(row: Row) -> tuple[str, ...]:
    """Return the fields that identify the case of a row."""
    return tuple(row.get(name, 1) for name in CASE)


def write(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the rows with the facts of the run as JSON to `path`, and as CSV beside it."""
    write_json(path, {**facts, "rows": list(rows)})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path.with_suffix(".csv"), text.getvalue().encode())


def table(rows: Sequence[Row]) -> str:
    """Return a block of lines per case, the fastest provider first; those without figures below, with the reason."""
    return "\n\n".join("\n".join(block(list(group))) for _, group in groupby(rows, key=key_of))


def block(rows: Sequence[Row]) -> list[str]:
    """Return the lines of one case."""
    first = rows[0]
    title = " ".join(first[name] for name in ("op", "direction", "shape", "dtype", "layout"))
    title += f" +{first['epilogue']}" if first["epilogue"] else ""
    title += f", {first['threads']} threads" if first["threads"] > 1 else ""
    kinds = [kind for kind in KINDS if any(f"{kind}_us_median" in row for row in rows)]
    figures = [name for name in FIGURES if any(name in row for row in rows)]
    header = "".join(f"{TITLES[name]:>{WIDTH if name in KINDS else 11}}" for name in (*kinds, *figures))
    lines = [f"{title + ' on ' + first['place']:58}{header}".rstrip()]
    for row in sorted((row for row in rows if row["status"] == OK), key=lambda row: row[f"{kinds[0]}_us_median"]):
        name = f"  {row['provider']}" + (f" ({row['backend']})" if row.get("backend") else "")
        cells = [f"{spread(row, kind):>{WIDTH}}" for kind in kinds]
        cells += [f"{row[figure]:>11.3g}" if figure in row else f"{'-':>11}" for figure in figures]
        lines.append(f"{name:57} {''.join(cells)}")
    lines += [f"  {row['provider']:56}{row['status']}" for row in rows if row["status"] != OK]
    return lines


def spread(row: Row, kind: str) -> str:
    """Return median (p20 to p80) of a kind, in microseconds."""
    if f"{kind}_us_median" not in row:
        return "-"
    median, p20, p80 = (row[f"{kind}_us_{quantile}"] for quantile in ("median", "p20", "p80"))
    return f"{median:.4g} ({p20:.3g} to {p80:.3g})"
