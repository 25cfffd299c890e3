"""Overhead of a normalisation in a training step: pictures and table, from the files of the overhead benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.timing import results_folder
from benchmarks.report.text import Documents, by_place, missing, paragraphs, table

MEASURED = "ok"
AXES = {"units": "units of each layer", "batch": "batch size"}
NORMS = {"batch": "batch norm", "layer": "layer norm"}


def tables(documents: Documents, folder: str) -> str:
    """Return picture and ratios of every axis in every place; `folder` leads from the page to the results."""

    def of_place(document: Mapping[str, Any]) -> str:
        rows, where = document["rows"], f"{folder}/{results_folder(document).name}"
        parts = [
            f"![time of a training step relative to none, over the {words}]({where}/overhead_{axis}.png)\n\n"
            f"{of_axis(rows, axis, words)}"
            for axis, words in AXES.items()
        ]
        return paragraphs(*parts, missing(reasons(rows)))

    return by_place(documents, of_place)


def of_axis(rows: Sequence[Mapping[str, Any]], axis: str, words: str) -> str:
    """Return a row for every framework and norm that was measured, a column for every size."""
    these = [row for row in rows if row["axis"] == axis]
    values = sorted({row["value"] for row in these})
    cells = {(row["framework"], row["norm"], row["value"]): row for row in these}
    lines = []
    for framework in dict.fromkeys(row["framework"] for row in these):
        for norm, title in NORMS.items():
            found = [cells.get((framework, norm, value)) for value in values]
            if any(row and row["status"] == MEASURED for row in found):
                lines.append([f"{framework}, {title}", *map(ratio, found)])
    return table([words, *map(str, values)], lines)


def reasons(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return why a framework has no figure with a norm, by both of their names."""
    named = [(f"{row['framework']}, {NORMS[row['norm']]}", row["status"]) for row in rows if row["norm"] in NORMS]
    measured = {name for name, status in named if status == MEASURED}
    return {name: status for name, status in named if name not in measured}


def ratio(row: Mapping[str, Any] | None) -> str:
    """Return a ratio, or a dash where there is none."""
    return f"{row['ratio_median']:.2f}" if row and row["status"] == MEASURED and "ratio_median" in row else "-"
