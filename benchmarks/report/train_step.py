"""The training step of 64-20-10, from the files of the training-step benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import ABSENT, Documents, by_place, missing, paragraphs, spread, table

NORMS = {"batch": "batch norm", "none": "no norm"}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam"}
RATIOS = {
    "with / without": "ours: batch norm / no norm",
    "PyTorch with / without": "PyTorch: batch norm / no norm",
    "ours / PyTorch, batch norm": "batch norm: ours / PyTorch",
    "ours / NumPy expression, batch norm": "batch norm: ours / NumPy expression",
    "ours / CuPy expression, batch norm": "batch norm: ours / CuPy expression",
}


def figures(documents: Documents) -> str:
    """Return times, ratios, accuracies and targets in every place."""
    return by_place(documents, of_place)


def of_place(document: Mapping[str, Any]) -> str:
    """Return the tables of one document: times, ratios, accuracies, targets."""
    used = [name for name in OPTIMIZERS if name in document["ratios"]]
    titles = [OPTIMIZERS[name] for name in used]
    times = {(row["maker"], row["norm"], row["optimizer"]): row["us"] for row in document["rows"]}
    rows = [
        [f"{maker}, {title}", *(spread(times[maker, norm, name]) for name in used)]
        for maker in dict.fromkeys(row["maker"] for row in document["rows"])
        for norm, title in NORMS.items()
    ]
    ratios = [
        [title, *(f"{document['ratios'][name][key]['median']:.2f}" for name in used)]
        for key, title in RATIOS.items()
        if key in document["ratios"][used[0]]
    ]
    protocol = document["protocol"]
    return paragraphs(
        f"Microseconds per training step: median (p20 to p80) of {protocol['rounds']} interleaved rounds of "
        f"{protocol['steps_per_round']} steps.",
        table(["µs per step", *titles], rows),
        missing(document["absent"]),
        "Ratios of times, each the median over the rounds:",
        table(["ratio", *titles], ratios),
        accuracy(document["accuracy"]) if document["accuracy"] else "",
        table(["target", "found", ""], map(target_row, document["targets"])) if document["targets"] else "",
    )


def accuracy(found: Mapping[str, Any]) -> str:
    """Return what the trainer's defaults reach."""
    rows = []
    for norm, title in NORMS.items():
        steps = ["never" if count is None else str(count) for count in found[norm]["steps_to_95"]]
        seeds = ", ".join(f"{value:.4f}" for value in found[norm]["seeds"])
        rows.append([title, f"{found[norm]['mean']:.4f}", seeds, ", ".join(steps)])
    return table(["digits, default options", "mean test accuracy", "by seed", "steps to 95 %, by seed"], rows)


def target_row(target: Mapping[str, Any]) -> list[str]:
    """Return the row of one target."""
    outcome = {True: "met", False: "**not met**", None: ABSENT}[target["met"]]
    return [target["target"], ABSENT if target["found"] is None else f"{target['found']:.4g}", outcome]
