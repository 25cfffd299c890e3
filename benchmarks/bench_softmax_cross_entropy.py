"""Softmax cross-entropy with its gradient: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.op_cases import Arrays, Op, bench, on_cupy, require_torch

SHAPES = [(64, 10), (256, 1000), (4096, 1000)]


def inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Arrays:
    """Return logits and labels."""
    return {"logits": rng.standard_normal(shape).astype(dtype), "labels": rng.integers(shape[1], size=shape[0])}


def ours(a: Arrays) -> Any:
    """Prepare ours."""
    out = bn.softmax_cross_entropy(a["logits"], a["labels"])
    return lambda: bn.softmax_cross_entropy(a["logits"], a["labels"], out=out)


def expression(a: Arrays) -> Any:
    """Prepare what a user would write."""
    logits, labels = a["logits"], a["labels"]

    def call() -> tuple:
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)  # for CuPy arrays NumPy hands this on to CuPy
        totals = exponentials.sum(axis=1, keepdims=True)
        dlogits = exponentials / totals
        at_label = labels[:, np.newaxis] == np.arange(logits.shape[1], like=labels)
        dlogits -= at_label
        return np.log(totals[:, 0]) - (shifted * at_label).sum(axis=1), dlogits / len(labels)

    return call


def torch(a: Arrays) -> Any:
    """Prepare PyTorch's loss and its gradient."""
    library = require_torch()
    logits, labels = library.from_numpy(a["logits"]).requires_grad_(), library.from_numpy(a["labels"])

    def call() -> tuple:
        losses = library.nn.functional.cross_entropy(logits, labels, reduction="none")
        (dlogits,) = library.autograd.grad(losses.mean(), logits)
        return losses.detach(), dlogits

    return call


OP = Op(
    inputs,
    lambda a: expression(a)(),
    lambda a: 2 * a["logits"].nbytes + a["labels"].nbytes,  # logits and labels in, dlogits out
    {
        "bnkernels": ours,
        "NumPy expression": expression,
        "PyTorch": torch,
        "bnkernels, CuPy": on_cupy(ours),
        "CuPy expression": on_cupy(expression),
    },
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", OP.providers)
def test_softmax_cross_entropy(benchmark: Any, provider: str, shape: tuple[int, int]) -> None:
    """Time loss and gradient."""
    bench(benchmark, OP, provider, shape, "float32")
