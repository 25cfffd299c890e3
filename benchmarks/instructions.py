"""Counts the instructions that batch norm adds to a training step and to a linear layer, without a GPU.

``python -m benchmarks.instructions`` runs the PTX that NVRTC makes of the kernels, at the launches that they have on an
H200, and counts what their warps execute with batch norm and without. It prints a table in Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from tests.ptx import ARCHITECTURE, KINDS, Counts, PtxRuntime, registered
from tools.compile import nvrtc

MOST = 1.10  # times the instructions of the same without batch norm
SPECIAL = 20  # machine instructions of a quotient or a root: a rough figure, to see whether it matters
BATCH = 64
TRAINERS = [(64, 20, 10), (64, 100, 10), (64, 20, 20, 20, 10)]
PAPER = (784, 100, 100, 100, 10)  # by a group of blocks; it takes a minute
LAYERS = [(64, 64, 20), (256, 256, 100)]  # (N, K, M)
NORMS = (None, "batch")
ABOUT = """\
Instructions executed by warps, counted in the PTX for sm_{sm} of NVRTC {nvrtc}, before ptxas makes machine code of it,
of float32 kernels at the launches of an H200. Moves between registers, most of which ptxas resolves by naming one
register for both, are shown and not counted in the sums. special: quotients, remainders, roots and exponentials, each
of which becomes several machine instructions; the second ratio takes {special} for each, a rough figure.
"""


class Line(NamedTuple):
    """What is executed without a norm and with batch norm."""

    name: str
    without: Counts
    batch: Counts

    @property
    def ratio(self) -> float:
        """Instructions with batch norm over those without."""
        return self.batch.total / self.without.total

    @property
    def weighted_ratio(self) -> float:
        """The same, where a quotient, remainder, root or exponential counts as `SPECIAL` instructions."""
        weighted = [counts.total + (SPECIAL - 1) * counts.by_kind["special"] for counts in (self.batch, self.without)]
        return weighted[0] / weighted[1]


def _executed(runtime: PtxRuntime, call: Callable[[], object]) -> Counts:
    """Return what a call executes, in all its launches."""
    runtime.reset()
    call()
    return sum((record.counts for record in runtime.launches), Counts())


@cache
def training_step(sizes: tuple[int, ...], norm: str | None) -> Counts:
    """Return what the fused trainer executes for a step of SGD; not what brings weights to the chip and back."""
    runtime, rng = registered(), np.random.default_rng(0)
    model = MLP(sizes, norm=norm or "none", seed=0)
    x = rng.standard_normal((3 * BATCH, sizes[0])).astype(np.float32)
    labels = rng.integers(0, sizes[-1], len(x)).astype(np.int32)

    def steps(count: int) -> Counts:
        rows = count * BATCH
        arrays = [runtime.asarray(array) for array in (model.parameters, model.running, x[:rows], labels[:rows])]
        parameters, running, *data = arrays
        given = (model.fused, parameters, (), running if running.size else None, *data)
        return _executed(runtime, lambda: bn.fused_training(*given, batch=BATCH, lr=0.1))

    return steps(3) - steps(2)


@cache
def linear_layer(sizes: tuple[int, int, int], norm: str | None) -> tuple[Counts, Counts]:
    """Return what a linear layer with a relu executes forwards, and backwards to its input and parameters."""
    runtime, rng = registered(), np.random.default_rng(0)
    rows, inputs, outputs = sizes
    shapes = (rows, inputs), (inputs, outputs), (rows, outputs), (outputs,)
    x, weight, dy, beta = (runtime.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
    gamma = None if norm is None else runtime.asarray(np.ones(outputs, np.float32))
    given, how = (x, weight, gamma, beta), {"norm": norm, "activation": "relu"}
    results: list = []
    forward = _executed(runtime, lambda: results.extend(bn.linear_batch_norm_forward(*given, **how)))
    _, z, statistics = results
    backward = _executed(runtime, lambda: bn.linear_batch_norm_backward(dy, *given, z, statistics, **how))
    return forward, backward


def lines() -> list[Line]:
    """Count everything."""
    found = []
    for sizes in (*TRAINERS, PAPER):
        name = f"fused training step, {'-'.join(map(str, sizes))}, batch {BATCH}, SGD"
        found.append(Line(name, *(training_step(sizes, norm) for norm in NORMS)))
    for rows, inputs, outputs in LAYERS:
        both = [linear_layer((rows, inputs, outputs), norm) for norm in NORMS]
        for direction, counts in zip(("forward", "backward"), zip(*both, strict=True), strict=True):
            found.append(Line(f"linear layer, {rows}x{inputs} -> {outputs}, relu, {direction}", *counts))
    return found


def table(found: list[Line]) -> str:
    """Return the table in Markdown, two rows for each line."""
    head = ["", "norm", "instructions", "ratio", f"ratio, special x {SPECIAL}", *KINDS]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for line in found:
        rows.append([line.name, "none", *_numbers(line.without, "", "")])
        rows.append(["", "batch", *_numbers(line.batch, f"{line.ratio:.3f}", f"{line.weighted_ratio:.3f}")])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _numbers(counts: Counts, *ratios: str) -> list[str]:
    return [f"{counts.total:,}", *ratios, *(f"{number:,}" for number in counts.by_kind.values())]


def main() -> int:
    """Print the table; return 0 if batch norm adds no more anywhere than it may."""
    print(ABOUT.format(sm=ARCHITECTURE, nvrtc=nvrtc.NEWEST, special=SPECIAL))
    found = lines()
    print(table(found))
    met = sum(line.ratio <= MOST for line in found)
    print(f"\n{met} of {len(found)} at most {MOST:.2f} times the instructions of the same without batch norm")
    return 0 if met == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
