"""One optimiser step over all parameters of a network: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.op_cases import Arrays, Op, bench, on_cupy, require_torch

SIZES = [1568, 1_000_000]  # of 64-20-10 with batch norm, padding included; and beyond a core's own caches
LR = 0.01
STATES = {"sgd": (), "momentum": ("first",), "adam": ("first", "second")}


def inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Arrays:
    """Return parameters, gradients and two fresh state arrays."""
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name in ("parameters", "gradients")}
    return arrays | {name: np.zeros(shape, dtype) for name in ("first", "second")}


def ours(a: Arrays, rule: str) -> Any:
    """Prepare our update."""
    arrays = [a[name] for name in ("parameters", "gradients", *STATES[rule])]
    steps = count(1)

    def call() -> tuple:
        extra = {"step": next(steps)} if rule == "adam" else {}
        getattr(bn, f"{rule}_update")(*arrays, lr=LR, **extra)
        return (arrays[0],)

    return call


def expression(a: Arrays, rule: str) -> Any:
    """Prepare the update that a user would write."""
    p, g, m, s = (a[name] for name in ("parameters", "gradients", "first", "second"))
    steps = count(1)

    def call() -> tuple:
        nonlocal m, s, p
        if rule == "sgd":
            p = p - LR * g
        elif rule == "momentum":
            m = 0.9 * m + g
            p = p - LR * m
        else:
            t = next(steps)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            p = p - LR * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)) ** 0.5 + 1e-8)
        return (p,)

    return call


def torch(a: Arrays, rule: str) -> Any:
    """Prepare PyTorch's optimiser."""
    library = require_torch()
    parameters = library.from_numpy(a["parameters"]).requires_grad_()
    parameters.grad = library.from_numpy(a["gradients"])
    kind = library.optim.Adam if rule == "adam" else library.optim.SGD
    optimizer = kind([parameters], lr=LR, **({"momentum": 0.9} if rule == "momentum" else {}))

    def call() -> tuple:
        optimizer.step()
        return (parameters.detach(),)

    return call


def make_op(rule: str) -> Op:
    """Return one rule with its providers."""

    def of(provider: Any) -> Any:
        return lambda a: provider(a, rule)

    providers = {"bnkernels": of(ours), "NumPy expression": of(expression), "PyTorch": of(torch)}
    providers |= {"bnkernels, CuPy": on_cupy(of(ours)), "CuPy expression": on_cupy(of(expression))}
    passes = 3 + 2 * len(STATES[rule])  # parameters in and out, gradients in, state in and out
    return Op(inputs, lambda a: expression(a, rule)(), lambda a: passes * a["parameters"].nbytes, providers)


OPS = {rule: make_op(rule) for rule in STATES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", OPS["sgd"].providers)
@pytest.mark.parametrize("rule", OPS)
def test_parameter_update(benchmark: Any, rule: str, provider: str, size: int) -> None:
    """Time one step."""
    bench(benchmark, OPS[rule], provider, (size,), "float32")
