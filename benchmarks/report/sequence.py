"""LSTMs with a norm and without: picture and table, from the files of the sequence benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.harness.timing import results_folder
from benchmarks.report.text import Documents, by_place, figure, paragraphs, table
from bnkernels.train.run_config import LABELS

GOALS = (0.8, 0.9, 0.95)


def tables(documents: Documents, folder: str) -> str:
    """Return picture and steps of every place; `folder` leads from the page to the results."""

    def of_place(document: Mapping[str, Any]) -> str:
        picture = f"{folder}/{results_folder(document).name}/sequence.png"
        parts = [f"## {way[0].upper()}{way[1:]}\n\n{of_way(networks)}" for way, networks in document["ways"].items()]
        return paragraphs(settings(document["settings"]), f"![test accuracy over the steps]({picture})", *parts)

    return by_place(documents, of_place)


def settings(options: Mapping[str, Any]) -> str:
    """Return the sentence that says what was trained."""
    return (
        f"{options['dataset']}, {options['hidden']} units, mini-batches of {options['batch_size']}, "
        f"{options['optimizer']} at {options['lr']:g}, clipped to a norm of {options['clip']:g}, noise of "
        f"{options['noise']:g} on h_0, {options['models']} seeds from {options['seed']} on."
    )


def of_way(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row for every network: steps to each accuracy, accuracy at the end, time of a step."""
    rows = []
    for norm, curves in networks.items():
        accuracies = list(zip(*curves["accuracy"], strict=True))  # a column of the document each
        reached = [first_steps(curves["steps"], accuracies, goal) for goal in GOALS]
        last = [model[-1] for model in accuracies]
        end = f"{fmean(last):.1%} ({min(last):.1%} to {max(last):.1%})"
        rows.append([LABELS[norm], *map(shown, reached), end, figure(curves["us_per_step"])])
    return table(["", *(f"steps to {goal:.0%}" for goal in GOALS), "at the end", "µs per step"], rows)


def first_steps(steps: Sequence[int], models: Sequence[Sequence[float]], goal: float) -> list[int | None]:
    """Return for each model the step of the first evaluation at or above an accuracy; None if there is none."""
    return [
        next((step for step, accuracy in zip(steps, model, strict=True) if accuracy >= goal), None) for model in models
    ]


def shown(steps: Sequence[int | None]) -> str:
    """Return median and range of the steps of the models that got there, and how many did.

    Examples
    --------
    >>> shown([300, 100, 200]), shown([300, None]), shown([None, None])
    ('200 (100 to 300)', '300 (1 of 2)', 'not reached')
    """
    found = [step for step in steps if step is not None]
    if not found:
        return "not reached"
    if len(found) < len(steps):
        return f"{median(found):.0f} ({len(found)} of {len(steps)})"
    return f"{median(found):.0f} ({min(found)} to {max(found)})"
