"""What a normalisation costs a training step: pictures and table, from the files of `benchmarks.steps.overhead`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.timing import results_folder
from benchmarks.report.text import ABSENT, origin, table

OURS, MEASURED = "bnkernels", "ok"
PLACES = {"cpu": "On a CPU", "cuda": "On a GPU"}
AXES = {"units": "units of each layer", "batch": "batch size"}
NORMS = {"batch": "batch norm", "layer": "layer norm"}

Documents = Mapping[str, Mapping[str, Any] | None]  # by place: cpu, cuda


def pictures(documents: Documents, folder: str) -> str:
    """Return the pictures of every place; `folder` leads from the page to the results."""
    parts = []
    for place, title in PLACES.items():
        document = documents.get(place)
        if document is None:
            parts.append(f"{title}: {ABSENT}.")
            continue
        where = f"{folder}/{results_folder(document).name}"
        links = [
            f"![time of a training step relative to none, over the {words}]({where}/overhead_{axis}.png)"
            for axis, words in AXES.items()
        ]
        parts.append("\n\n".join([f"{title}, {origin(document)}", *links]))
    return "\n\n".join(parts)


def tables(documents: Documents) -> str:
    """Return the ratios of every place: a row for every framework and norm, a column for every size."""
    parts = []
    for place, title in PLACES.items():
        document = documents.get(place)
        if document is None:
            parts.append(f"{title}: {ABSENT}.")
            continue
        parts.append(f"{title}, {origin(document)}")
        parts += [of_axis(document["rows"], axis, words) for axis, words in AXES.items()]
    return "\n\n".join(parts)


def of_axis(rows: Sequence[Mapping[str, Any]], axis: str, words: str) -> str:
    """Return the table of one axis; what was not measured says why below it."""
    these = [row for row in rows if row["axis"] == axis]
    values = sorted({row["value"] for row in these})
    cells = {(row["framework"], row["norm"], row["value"]): row for row in these}
    lines, reasons = [], {}
    for framework in dict.fromkeys(row["framework"] for row in these):
        for norm, title in NORMS.items():
            found = [cells.get((framework, norm, value)) for value in values]
            if any(row and row["status"] == MEASURED for row in found):
                lines.append([f"{framework}, {title}", *map(ratio, found)])
            else:
                reasons |= {f"{framework}, {title}": row["status"] for row in found if row}
    text = table([words, *map(str, values)], lines)
    return text + "".join(f"\n\n{who}: {status}." for who, status in reasons.items())


def ratio(row: Mapping[str, Any] | None) -> str:
    """Return a ratio, or a dash where there is none."""
    return f"{row['ratio_median']:.2f}" if row and row["status"] == MEASURED and "ratio_median" in row else "-"
