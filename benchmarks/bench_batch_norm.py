"""Batch norm of (N, C) mini-batches, forward and backward: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.op_cases import Arrays, Op, Provider, bench, on_cupy, require_torch

SHAPES = [(64, 20), (128, 20), (256, 64), (256, 1024), (4096, 1024)]
EPS, MOMENTUM = 1e-5, 0.1
VECTORS = ("gamma", "beta", "running_mean", "running_var")


def inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Arrays:
    """Return mini-batch, gradient, parameters and running statistics."""
    matrices = {name: rng.standard_normal(shape).astype(dtype) for name in ("x", "dy")}
    return matrices | {name: rng.uniform(0.5, 1.5, shape[1]).astype(dtype) for name in VECTORS}


def moments(a: Arrays) -> tuple[Any, Any, Any]:
    """Return mean, variance and rstd of every channel, as one would write them."""
    mean, var = a["x"].mean(axis=0), a["x"].var(axis=0)
    return mean, var, 1 / (var + EPS) ** 0.5


def ours_forward(a: Arrays) -> Any:
    """Prepare our forward."""
    vectors = [a[name] for name in VECTORS]
    y, statistics = bn.batch_norm_forward(a["x"], *vectors, momentum=MOMENTUM, eps=EPS)
    return lambda: bn.batch_norm_forward(a["x"], *vectors, momentum=MOMENTUM, eps=EPS, out=(y, statistics))[:1]


def expression_forward(a: Arrays) -> Any:
    """Prepare the forward that a user would write."""

    def call() -> tuple:
        mean, var, rstd = moments(a)
        rows = len(a["x"])
        a["running_mean"] = (1 - MOMENTUM) * a["running_mean"] + MOMENTUM * mean
        a["running_var"] = (1 - MOMENTUM) * a["running_var"] + MOMENTUM * var * rows / (rows - 1)
        return (a["gamma"] * ((a["x"] - mean) * rstd) + a["beta"],)

    return call


def torch_forward(a: Arrays) -> Any:
    """Prepare PyTorch's forward."""
    torch = require_torch()
    x, gamma, beta, mean, var = (torch.from_numpy(a[name]) for name in ("x", *VECTORS))
    return lambda: (torch.nn.functional.batch_norm(x, mean, var, gamma, beta, True, MOMENTUM, EPS),)


def ours_backward(a: Arrays) -> Any:
    """Prepare our backward."""
    _, statistics = bn.batch_norm_forward(a["x"], a["gamma"], a["beta"], eps=EPS)
    out = bn.batch_norm_backward(a["dy"], a["x"], a["gamma"], a["beta"], statistics)
    return lambda: bn.batch_norm_backward(a["dy"], a["x"], a["gamma"], a["beta"], statistics, out=out)


def expression_backward(a: Arrays) -> Any:
    """Prepare the backward that a user would write."""
    mean, _, rstd = moments(a)

    def call() -> tuple:
        xhat = (a["x"] - mean) * rstd
        dgamma, dbeta = (a["dy"] * xhat).sum(axis=0), a["dy"].sum(axis=0)
        return a["gamma"] * rstd * (a["dy"] - (dbeta + xhat * dgamma) / len(xhat)), dgamma, dbeta

    return call


def torch_backward(a: Arrays) -> Any:
    """Prepare PyTorch's backward, without autograd."""
    torch = require_torch()
    mean, _, rstd = moments(a)
    dy, x, gamma, running_mean, running_var, mean, rstd = map(
        torch.from_numpy, (a["dy"], a["x"], a["gamma"], a["running_mean"], a["running_var"], mean, rstd)
    )
    arguments = (dy, x, gamma, running_mean, running_var, mean, rstd, True, EPS, [True] * 3)
    return lambda: torch.ops.aten.native_batch_norm_backward(*arguments)


def make_op(ours: Provider, expression: Provider, torch: Provider, matrices: int) -> Op:
    """Return a pass with its providers; it has to move this many (N, C) matrices."""
    providers = {"bnkernels": ours, "NumPy expression": expression, "PyTorch": torch}
    providers |= {"bnkernels, CuPy": on_cupy(ours), "CuPy expression": on_cupy(expression)}
    return Op(inputs, lambda a: expression(a)(), lambda a: matrices * a["x"].nbytes, providers)


FORWARD = make_op(ours_forward, expression_forward, torch_forward, matrices=2)  # x in, y out
BACKWARD = make_op(ours_backward, expression_backward, torch_backward, matrices=3)  # x and dy in, dx out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", FORWARD.providers)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_batch_norm(benchmark: Any, op: Op, provider: str, shape: tuple[int, int]) -> None:
    """Time one pass."""
    bench(benchmark, op, provider, shape, "float32")
