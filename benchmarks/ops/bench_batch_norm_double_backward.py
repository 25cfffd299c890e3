"""The double backward of batch norm: with respect to dy, x and gamma, for a gradient of dx alone.

That is what a penalty on the gradient of the input asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import EPSILON, expression, pytorch

SHAPES = [((64, 20), "NC"), ((256, 1024), "NC"), ((8192, 1024), "NC"), ((32, 64, 56, 56), "NCHW")]


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return ddx, dy, x, gamma and beta.

    Raises
    ------
    NotSupportedError
        For an epilogue: nothing follows the normalisation here.
    """
    if case.epilogue:
        raise NotSupportedError(f"{case.op} is for no epilogue")
    arrays = {name: random(case.memory_shape) for name in ("ddx", "dy", "x")}
    return arrays | {name: abs(random((case.shape[1],))) + 0.5 for name in ("gamma", "beta")}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    ddx, dy, x, gamma, beta = (arrays[name] for name in ("ddx", "dy", "x", "gamma", "beta"))
    axis = case.channel_axis
    _, statistics = bn.batch_norm_forward(x, gamma, beta, eps=EPSILON, axis=axis)
    given = ddx, None, None, dy, x, gamma, beta, statistics
    out = bn.batch_norm_double_backward(*given, axis=axis)
    return lambda: bn.batch_norm_double_backward(*given, axis=axis, out=out)[:3]


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. The sums of 16-bit data are computed in float32."""
    axes, broadcast = expression.axes_of(case)
    gamma = arrays["gamma"]
    ddx, g, x = (arrays[name].astype(gamma.dtype, copy=False) for name in ("ddx", "dy", "x"))
    mean, rstd = x.mean(axis=axes).reshape(broadcast), ((x.var(axis=axes) + EPSILON) ** -0.5).reshape(broadcast)
    count = case.size // case.shape[1]
    average = partial(type(x).mean, axis=axes, keepdims=True)

    def call() -> tuple:
        xhat, scale = (x - mean) * rstd, gamma.reshape(broadcast) * rstd
        project_g = g - average(g) - xhat * average(g * xhat)
        ddy = scale * (ddx - average(ddx) - xhat * average(ddx * xhat))
        e = (ddx * project_g).sum(axis=axes)
        h = -scale * (ddx * average(g * xhat) + g * average(ddx * xhat))
        dx = rstd * (h - average(h) - xhat * (average(h * xhat) + scale * e.reshape(broadcast) / count))
        dtype = arrays["x"].dtype
        return ddy.astype(dtype, copy=False), dx.astype(dtype, copy=False), rstd.reshape(-1) * e

    return call


def autograd(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's operator, as autograd calls it."""
    tensors = pytorch.tensors_of(case, arrays)
    ddx, dy, x, gamma = (tensors[name].detach() for name in ("ddx", "dy", "x", "gamma"))
    _, mean, rstd = pytorch.normalise_and_save(x, gamma, tensors["beta"])
    for tensor in (dy, x, gamma):
        tensor.requires_grad_()
    dx, _, _ = pytorch.native_backward(dy, x, gamma, mean, rstd)

    def call() -> tuple:
        ddy, of_x, of_gamma = pytorch.load().autograd.grad(dx, (dy, x, gamma), ddx, retain_graph=True)
        return pytorch.in_memory_order(case, ddy), pytorch.in_memory_order(case, of_x), of_gamma

    return call


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of the data alone: ddx, dy and x in, ddy and dx out."""
    return 5 * case.size * case.itemsize


OP = Op(
    "batch_norm_double_backward",
    cases=[
        Case("batch_norm_double_backward", "double backward", shape, dtype, layout)
        for dtype in ("float32", "float16")
        for shape, layout in SHAPES
    ],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(autograd)),
)


GIVEN = "ddx ddgamma ddbeta dy x gamma beta statistics"

SAMPLES = {
    "batch_norm_double_backward": Sample(
        GIVEN,
        "ddy dx dgamma dbeta",
        lambda a: bn.batch_norm_double_backward(*take(a, GIVEN), activation="tanh", out=take(a, "ddy dx dgamma dbeta")),
        any_strides="ddx dy x",
        sizes=({"N": 10, "C": 33}, {"N": 300, "C": 33}, {"N": 3, "C": 33, "L": 5}),
    ),
}
