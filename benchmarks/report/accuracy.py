"""The accuracy contract beside what was measured: a table for every data type."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from benchmarks.report.text import ABSENT, table

QUANTITIES = ("mean", "rstd", "y", "dx", "dgamma", "dbeta")
Row = Mapping[str, Any]


def tables(results: Mapping[str, Any] | None) -> str:
    """Return the errors of `benchmarks.accuracy.contract`, bold beyond what is promised, and whose are all within."""
    if results is None:
        return f"Errors of our results and of PyTorch's: {ABSENT}."
    parts = [verdict(results["errors"])]
    for dtype, rows in groupby(results["errors"], key=lambda row: row["dtype"]):
        lines = [line for _, of_input in groupby(rows, key=lambda row: row["input"]) for line in block(list(of_input))]
        parts.append(f"## {dtype}\n\n{table(['x =', 'computed by', *QUANTITIES, 'kept'], lines)}")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    parts.append(f"{results['rows']} rows, {results['channels']} channels; {versions}; {results['date']}.")
    return "\n\n".join(parts)


def verdict(rows: list[Row]) -> str:
    """Return how often each way keeps the contract."""
    measured = [row for row in rows if "kept" in row]
    lines = []
    for way in dict.fromkeys(row["way"] for row in measured):
        outcomes = [row["kept"] for row in measured if row["way"] == way]
        lines.append([way, str(len(outcomes)), str(sum(outcomes))])
    return table(["computed by", "inputs, all data types", "contract kept"], lines)


def block(rows: list[Row]) -> list[list[str]]:
    """Return the lines of one input: what is promised, then what was found."""
    promised, *found = rows
    lines = [[promised["input"], promised["way"], *(f"{promised[name]:g}" for name in QUANTITIES), ""]]
    for row in found:
        cells = [cell(row[name], promised[name]) for name in QUANTITIES]
        lines.append(["", row["way"], *cells, "yes" if row["kept"] else "**no**"])
    return lines


def cell(error: float | str, limit: float) -> str:
    """Return an error to two digits; in bold where it is larger than promised, or no number at all."""
    if isinstance(error, str):
        return f"**{error}**"
    return f"{error:.2g}" if error <= limit else f"**{error:.2g}**"
