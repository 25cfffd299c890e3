"""Launches and bytes of an LSTM's time step beside other libraries, from ``benchmarks/results/recurrent.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.text import ABSENT, paragraphs, table

NORMS = {"": "no norm", ", batch norm": "batch norm", ", layer norm": "layer norm"}
WAYS = "forward", "both ways"
NOTES = """\
Ours is counted on the emulator, planned for an H200: our launches by the bytes that they touch, each once, and those of
a library, products and what sets numbers, by their arrays. What the blocks of one launch read again from the L2 cache,
the hidden state and the weights, is not in the bytes; a launch that has all steps has one grid barrier a step in place
of launches, and with layer norm none. Of the others every operator is one launch and moves its arrays once, which is
the least it can be: batch norm of a matrix in PyTorch, for one, is three launches. A step is what a longer sequence has
more; its other launches are there once. Times follow from neither figure alone: they are not yet measured.

cuDNN's LSTM, which `torch.nn.LSTM` and Keras's layer call on a GPU, is one operator, and how many launches that makes
cannot be counted without a GPU. Documented, not counted: its standard algorithm executes a layer as a sequence of
operations, its persistent ones the recurrent part in one kernel, which PyTorch's page says it may choose for float16.
It has no norm in the recurrence, so an LSTM with batch norm or layer norm is left with the rows above."""


def page(document: Mapping[str, Any] | None) -> str:
    """Return a table for each shape, and what the figures mean."""
    if document is None:
        return f"Launches and bytes: {ABSENT}."
    shapes = dict.fromkeys(tuple(row["shape"]) for row in document["rows"])
    versions = ", ".join(f"{name.partition(',')[0]} {version}" for name, version in document["versions"].items())
    parts = (f"## {title(shape)}\n\n{of_shape(document['rows'], shape)}" for shape in shapes)
    return paragraphs(*parts, "## What is counted", NOTES, f"{', '.join(dict.fromkeys(versions.split(', ')))}.")


def title(shape: Sequence[int]) -> str:
    """Return what a shape is in words."""
    steps, rows, inputs, units = shape
    noun = "input" if inputs == 1 else "inputs"
    return f"{steps} time steps, {rows} examples, {inputs} {noun}, {units} hidden units"


def of_shape(rows: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> str:
    """Return a row for every norm and who computes it."""
    found = {(row["direction"], row["provider"]): row for row in rows if tuple(row["shape"]) == shape}
    cells = []
    for suffix, norm in NORMS.items():
        for provider in dict.fromkeys(name for direction, name in found if direction == WAYS[0] + suffix):
            forward, both = (found[way + suffix, provider] for way in WAYS)
            cells.append([norm, provider, *of_step(forward), *of_step(both), *of_sequence(both)])
    parts = "launches a step, forward", "bytes a step", "launches a step, both ways", "bytes a step"
    return table(["", "", *parts, "launches of a sequence, both ways", "bytes of a sequence"], cells)


def of_step(row: Mapping[str, Any]) -> list[str]:
    """Return launches and bytes of a step."""
    launches, size = row["step"]
    return [str(launches), f"{size:,}"]


def of_sequence(row: Mapping[str, Any]) -> list[str]:
    """Return launches and bytes of all steps."""
    launches, size = (once + row["shape"][0] * each for once, each in zip(row["once"], row["step"], strict=True))
    return [f"{launches:,}", f"{size:,}"]
