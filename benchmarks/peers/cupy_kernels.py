"""Batch norm with CuPy's own means beyond plain expressions: kernels of one's own, and fusion.

"CuPy, Chainer style" is how the last deep-learning framework on CuPy did it without cuDNN: reductions for mean and
variance, and one elementwise kernel per direction. "cupy.fuse" lets CuPy make one kernel of the whole expression, which
waits for the whole grid at each reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider
from benchmarks.harness.places import why_absent
from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.peers.expression import axes_of


def _cupy() -> ModuleType:
    import cupy

    return cupy


# ---- kernels in the style of Chainer --------------------------------------------------------------------------------


@cache
def _kernels() -> tuple[Any, Any, Any]:
    """Return the elementwise kernels: normalise, update of the running statistics, gradient of the input."""
    make = _cupy().ElementwiseKernel
    normalise = make(
        "T x, U mean, U rstd, U gamma, U beta",
        "T y",
        "y = T(gamma * ((U(x) - mean) * rstd) + beta)",
        "benchmark_normalise",
    )
    update = make(
        "U mean, U variance, float64 unbiased, float64 momentum",
        "U running_mean, U running_var",
        """
        running_mean += U(momentum) * (mean - running_mean);
        running_var += U(momentum) * (U(unbiased) * variance - running_var);
        """,
        "benchmark_update",
    )
    gradient = make(
        "T dy, T x, U mean, U rstd, U gamma, U dgamma, U dbeta, float64 inverse_count",
        "T dx",
        """
        const U xhat = (U(x) - mean) * rstd;
        dx = T(gamma * rstd * (U(dy) - (dbeta + xhat * dgamma) * U(inverse_count)));
        """,
        "benchmark_gradient",
    )
    return normalise, update, gradient


@cache
def _products() -> Any:
    """Return the reduction of dy times the normalised x."""
    return _cupy().ReductionKernel(
        "T dy, T x, U mean, U rstd",
        "U dgamma",
        "U(dy) * ((U(x) - mean) * rstd)",
        "a + b",
        "dgamma = a",
        "0",
        "benchmark_products",
    )


def prepare_kernels(case: Case, arrays: Arrays) -> Call:
    """Prepare a case in the style of Chainer."""
    cupy = _cupy()
    axes, broadcast = axes_of(case)
    x, gamma, beta = arrays["x"], arrays["gamma"], arrays["beta"]
    normalise, update, gradient = _kernels()
    count = case.size // case.shape[1]

    def statistics() -> tuple[Any, Any, Any]:
        mean, variance = x.mean(axis=axes, dtype=gamma.dtype), x.var(axis=axes, dtype=gamma.dtype)
        return mean, variance, 1 / cupy.sqrt(variance + gamma.dtype.type(EPSILON))

    def output(mean: Any, rstd: Any) -> Any:
        y = normalise(x, *(vector.reshape(broadcast) for vector in (mean, rstd, gamma, beta)))
        if case.epilogue == "add_relu":
            y += arrays["residual"]
        return cupy.maximum(y, 0, out=y) if case.epilogue else y

    if case.direction == "forward":
        running = arrays["running_mean"], arrays["running_var"]

        def forward() -> tuple:
            mean, variance, rstd = statistics()
            update(mean, variance, count / (count - 1), MOMENTUM, *running)
            return output(mean, rstd), *running

        return forward
    mean, _, rstd = statistics()
    h = output(mean, rstd) if case.epilogue else None

    def backward() -> tuple:
        dz = arrays["dy"] * (h > 0) if case.epilogue else arrays["dy"]
        dbeta = dz.sum(axis=axes, dtype=gamma.dtype)
        dgamma = _products()(dz, x, mean.reshape(broadcast), rstd.reshape(broadcast), axis=axes)
        vectors = (vector.reshape(broadcast) for vector in (mean, rstd, gamma, dgamma, dbeta))
        dx = gradient(dz, x, *vectors, 1 / count)
        return (dx, dgamma, dbeta, dz) if case.epilogue == "add_relu" else (dx, dgamma, dbeta)

    return backward


# ---- cupy.fuse ------------------------------------------------------------------------------------------------------


@cache
def fused(kind: Case) -> Callable[..., Any]:
    """Return all cases of a kind, whatever their sizes, as one function that CuPy fuses: compiling takes seconds."""
    cupy = _cupy()
    return cupy.fuse(kernel_name=f"benchmark_fused_{kind.direction}")(unfused(kind, cupy))


def unfused(kind: Case, xp: Any) -> Callable[..., Any]:
    """Return a kind of cases as a function of arrays and numbers, in the words that fusion understands."""
    axes, broadcast = axes_of(kind)
    expand = tuple(slice(None) if extent == -1 else None for extent in broadcast)  # fusion has no reshape

    def forward(x: Any, gamma: Any, beta: Any, running: tuple[Any, Any], count: float, step: float) -> Any:
        running_mean, running_var = running
        mean = xp.sum(x, axis=axes) / count  # fusion has no mean and no var
        centred = x - mean[expand]
        variance = xp.sum(centred * centred, axis=axes) / count
        rstd = 1.0 / xp.sqrt(variance + EPSILON)
        running_mean *= 1 - MOMENTUM
        running_mean += MOMENTUM * mean
        running_var *= 1 - MOMENTUM
        running_var += step * variance  # unbiased
        return gamma[expand] * centred * rstd[expand] + beta[expand]

    def backward(dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, count: float) -> tuple[Any, Any, Any]:
        xhat = (x - mean[expand]) * rstd[expand]
        dbeta, dgamma = xp.sum(dy, axis=axes), xp.sum(dy * xhat, axis=axes)
        inner = dy - (dbeta[expand] + xhat * dgamma[expand]) / count
        return (gamma * rstd)[expand] * inner, dgamma, dbeta

    chosen = {
        ("forward", ""): lambda x, g, b, m, v, n, s: forward(x, g, b, (m, v), n, s),
        ("forward", "relu"): lambda x, g, b, m, v, n, s: xp.maximum(forward(x, g, b, (m, v), n, s), 0),
        ("forward", "add_relu"): lambda r, x, g, b, m, v, n, s: xp.maximum(forward(x, g, b, (m, v), n, s) + r, 0),
        ("backward", ""): backward,
        ("backward", "relu"): lambda h, dy, x, m, s, g, n: backward(dy * (h > 0), x, m, s, g, n),
        ("backward", "add_relu"): lambda h, dy, x, m, s, g, n: (*backward(dy * (h > 0), x, m, s, g, n), dy * (h > 0)),
    }
    return chosen[kind.direction, kind.epilogue]


def prepare_fused(case: Case, arrays: Arrays, make: Callable[[Case], Callable[..., Any]] = fused) -> Call:
    """Prepare a case with ``cupy.fuse``.

    Raises
    ------
    NotSupportedError
        For 16-bit data, whose sums fusion would keep in 16 bits.
    """
    if case.itemsize == 2:
        raise NotSupportedError("not supported: cupy.fuse keeps the sums of 16-bit data in 16 bits")
    function, a = make(replace(case, shape=(0,) * len(case.shape))), arrays
    axes, broadcast = axes_of(case)
    count = float(case.size // case.shape[1])
    first = [a["residual"]] if case.epilogue == "add_relu" else []
    if case.direction == "forward":
        running = a["running_mean"], a["running_var"]
        given = (*first, a["x"], a["gamma"], a["beta"], *running, count, MOMENTUM * count / (count - 1))
        return lambda: (function(*given), *running)
    mean, rstd = a["x"].mean(axis=axes), (a["x"].var(axis=axes) + EPSILON) ** -0.5
    h = (a["x"] - mean.reshape(broadcast)) * (rstd * a["gamma"]).reshape(broadcast) + a["beta"].reshape(broadcast)
    if first:
        h += first[0]
    masks = [h] if case.epilogue else []
    given = (*masks, a["dy"], a["x"], mean, rstd, a["gamma"], count)
    return lambda: function(*given)


def tried(case: Case, arrays: Arrays) -> Call:
    """Prepare a fused case, after a try on three examples of two channels.

    Raises
    ------
    NotSupportedError
        Where CuPy cannot fuse it, with CuPy's words.
    """
    small = replace(case, shape=tuple(min(n, 2 if axis == 1 else 3) for axis, n in enumerate(case.shape)))
    few = tuple(map(slice, small.memory_shape))
    parts = {name: array[few if array.ndim > 1 else slice(small.shape[1])] for name, array in arrays.items()}
    try:
        prepare_fused(small, {name: part.copy() for name, part in parts.items()})()
    except NotSupportedError:
        raise
    except Exception as refusal:  # fusion traces Python code, and says in many ways what it cannot trace
        raise NotSupportedError(f"not supported: cupy.fuse: {type(refusal).__name__}: {refusal}") from refusal
    return prepare_fused(case, arrays)


PROVIDERS = (
    Provider("CuPy, Chainer style", "cuda", prepare_kernels, partial(why_absent, "cuda"), engine="cupy"),
    Provider("cupy.fuse", "cuda", tried, partial(why_absent, "cuda"), engine="cupy"),
)
