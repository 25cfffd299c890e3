"""Batch norm as a user of NumPy or CuPy would write it; in float64 the reference for everybody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.harness.case import EPS, Arrays, Call, Case, Provider, on_both, one_thread
from benchmarks.harness.places import why_absent
from benchmarks.peers import EPSILON, MOMENTUM

# Closer to 0, rounding may decide on which side of a ReLU an element is, the more so where frameworks round in between.
KINK = {"float16": 16 * EPS["float16"], "bfloat16": 16 * EPS["bfloat16"], "float32": 1e-4, "float64": 1e-9}


def prepare(case: Case, arrays: Arrays) -> Call:
    """Prepare a case. The sums of 16-bit data are computed in float32, as a careful user would."""
    if case.direction == "backward":
        h, mean, _, rstd = forward(case, arrays)
        return lambda: backward(case, arrays, h, mean, rstd)

    def call() -> tuple:
        h, mean, variance, _ = forward(case, arrays)
        update(case, arrays, mean, variance)
        return h, arrays["running_mean"], arrays["running_var"]

    return call


def axes_of(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes that are summed over, and the shape in which a vector of channels meets the data."""
    ndim = len(case.shape)
    channels = case.channel_axis % ndim
    return tuple(axis for axis in range(ndim) if axis != channels), tuple(
        -1 if axis == channels else 1 for axis in range(ndim)
    )


def forward(case: Case, a: Arrays) -> tuple[Any, Any, Any, Any]:
    """Return the output, and mean, variance and 1/deviation of every channel."""
    axes, broadcast = axes_of(case)
    x = a["x"].astype(a["gamma"].dtype, copy=False)
    mean, variance = x.mean(axis=axes), x.var(axis=axes)
    rstd = (variance + EPSILON) ** -0.5
    y = (x - mean.reshape(broadcast)) * (a["gamma"] * rstd).reshape(broadcast) + a["beta"].reshape(broadcast)
    if case.epilogue == "add_relu":
        y += a["residual"]
    if case.epilogue:
        y = y.clip(0, None)
    return y.astype(a["x"].dtype, copy=False), mean, variance, rstd


def update(case: Case, a: Arrays, mean: Any, variance: Any) -> None:
    """Update the running statistics, in place."""
    count = case.size // case.shape[1]
    for running, new in ((a["running_mean"], mean), (a["running_var"], variance * (count / (count - 1)))):
        running *= 1 - MOMENTUM
        running += MOMENTUM * new


def backward(case: Case, a: Arrays, h: Any, mean: Any, rstd: Any) -> tuple:
    """Return the gradients, by the formulas of Ioffe and Szegedy (2015)."""
    axes, broadcast = axes_of(case)
    dz = a["dy"] * (h > 0) if case.epilogue else a["dy"]
    g = dz.astype(a["gamma"].dtype, copy=False)
    xhat = (a["x"] - mean.reshape(broadcast)) * rstd.reshape(broadcast)
    dbeta, dgamma = g.sum(axis=axes), (g * xhat).sum(axis=axes)
    count = case.size // case.shape[1]
    g = g - (dbeta.reshape(broadcast) + xhat * dgamma.reshape(broadcast)) / count
    g *= (a["gamma"] * rstd).reshape(broadcast)
    gradients = g.astype(a["x"].dtype, copy=False), dgamma, dbeta
    return (*gradients, dz) if case.epilogue == "add_relu" else gradients


def decided(case: Case, arrays: Arrays) -> Any:
    """Return where rounding cannot decide on which side of the ReLU an element is."""
    z, *_ = forward(replace(case, epilogue=""), arrays)
    if case.epilogue == "add_relu":
        z = z + arrays["residual"]
    return abs(z) >= KINK[case.dtype]


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return prepare(case, arrays)()


def providers(prepare: Callable[[Case, Arrays], Call]) -> tuple[Provider, Provider]:
    """Return the providers of an op that is written in NumPy or CuPy."""

    def prepare_one(case: Case, arrays: Arrays) -> Call:
        one_thread(case)
        return prepare(case, arrays)

    return on_both(("NumPy expression", "CuPy expression"), prepare_one, why_absent)


PROVIDERS = providers(prepare)
