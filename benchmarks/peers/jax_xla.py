"""JAX: plain functions, compiled by XLA with `jax.jit`.

The forward is Flax's with its defaults: statistics in float32, the variance as the mean of the squares less the square
of the mean, which needs one pass over `x` but loses digits where the mean is large. The backward is the formula, from
what the forward saved: `jax.vjp` would compute the forward again.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider, one_thread
from benchmarks.peers import EPSILON, MOMENTUM

ENVIRONMENT = {  # read when JAX first looks for devices
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # it shares the GPU with CuPy and PyTorch
    "NPROC": "1",  # threads on the CPU: one, as everybody here has
}


@cache
def load() -> ModuleType:
    """Return JAX, with its environment set."""
    os.environ.update(ENVIRONMENT)
    import jax

    return jax


@cache
def absent(place: str) -> str | None:
    """Return why JAX cannot run in a place, or None."""
    if find_spec("jax") is None:
        return "JAX is not installed"
    if place == "cuda":
        try:
            load().devices("cuda")
        except RuntimeError:
            return "JAX finds no GPU"
    return None


def array_of(array: Any) -> Any:
    """Return a NumPy or CuPy array as JAX's, on the CPU or in the same memory of the GPU.

    CuPy's bfloat16 travels as int16, as DLPack does not take the type that ml_dtypes adds to NumPy; that copies it.
    """
    jax = load()
    if isinstance(array, np.ndarray):
        return jax.device_put(array, jax.devices("cpu")[0])
    if array.dtype.name != "bfloat16":
        return jax.dlpack.from_dlpack(array)
    return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(array.view(np.int16)), jax.numpy.bfloat16)


def prepare(case: Case, arrays: Arrays) -> Call:
    """Prepare a case; its first call compiles.

    Raises
    ------
    NotSupportedError
        For float64, and for all cores.
    """
    one_thread(case)  # the number of its threads is read when it starts
    if case.dtype == "float64":
        raise NotSupportedError("JAX computes in float32 unless jax_enable_x64 is set")
    jax = load()
    inputs = {name: array_of(array) for name, array in arrays.items()}
    x, gamma, beta, residual = (inputs.get(name) for name in ("x", "gamma", "beta", "residual"))
    if case.direction == "forward":
        step = compiled(forward, case)
        running = [inputs["running_mean"], inputs["running_var"]]

        def call() -> tuple:
            y, *running[:] = step(x, gamma, beta, *running, residual)
            return y, *running

        return call
    dy = inputs["dy"]
    y, mean, rstd = jax.block_until_ready(compiled(normalise, case)(x, gamma, beta, residual))
    step = compiled(backward, case)
    return lambda: step(dy, x, gamma, y, mean, rstd)


@lru_cache(maxsize=8)
def compiled(function: Any, case: Case) -> Any:
    """Return one of the functions below, compiled for a case."""
    return load().jit(partial(function, case=case))


def normalise(x: Any, gamma: Any, beta: Any, residual: Any, case: Case) -> tuple:
    """Return y, mean and 1/deviation."""
    y, mean, variance = _normalise(x, gamma, beta, residual, case)
    return y, mean, load().lax.rsqrt(variance + EPSILON)


def forward(
    x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any, case: Case
) -> tuple[Any, Any, Any]:
    """Return y and the new running statistics."""
    y, mean, variance = _normalise(x, gamma, beta, residual, case)
    count = x.size // x.shape[case.channel_axis]
    running_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
    running_var = (1 - MOMENTUM) * running_var + MOMENTUM * variance * (count / (count - 1))
    return y, running_mean, running_var


def backward(dy: Any, x: Any, gamma: Any, y: Any, mean: Any, rstd: Any, case: Case) -> tuple:
    """Return the gradients."""
    jnp = load().numpy
    axes, broadcast = _axes(x, case)
    g = jnp.where(y > 0, dy, jnp.zeros_like(dy)) if case.epilogue else dy
    acc_g = g.astype(mean.dtype)
    scaled = (x.astype(mean.dtype) - broadcast(mean)) * broadcast(rstd)
    dbeta = acc_g.sum(axes)
    dgamma = (acc_g * scaled).sum(axes)
    count = x.size // x.shape[case.channel_axis]
    dx = broadcast(gamma * rstd) * (acc_g - broadcast(dbeta / count) - scaled * broadcast(dgamma / count))
    return dx.astype(x.dtype), dgamma, dbeta, *((g,) if case.epilogue == "add_relu" else ())


def _normalise(x: Any, gamma: Any, beta: Any, residual: Any, case: Case) -> tuple:
    """Return y, mean and variance."""
    jnp = load().numpy
    axes, broadcast = _axes(x, case)
    single = x.astype(gamma.dtype)
    mean = single.mean(axes)
    variance = jnp.maximum((single * single).mean(axes) - mean * mean, 0)
    rstd = load().lax.rsqrt(variance + EPSILON)
    y = ((single - broadcast(mean)) * broadcast(gamma * rstd) + broadcast(beta)).astype(x.dtype)
    if residual is not None:
        y = y + residual
    return jnp.maximum(y, 0) if case.epilogue else y, mean, variance


def _axes(x: Any, case: Case) -> tuple[tuple[int, ...], Any]:
    """Return the axes that are summed over, and the function that gives a vector of channels the others back."""
    channels = case.channel_axis % x.ndim
    axes = tuple(axis for axis in range(x.ndim) if axis != channels)
    return axes, lambda vector: load().numpy.expand_dims(vector, axes)


PROVIDERS = tuple(
    Provider("JAX jit", place, prepare, partial(absent, place), engine="jax") for place in ("cpu", "cuda")
)
