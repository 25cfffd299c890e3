"""Mean and sum of squares of every channel, what a part of a synchronised mini-batch is asked for; and their merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import EPSILON, expression, pytorch

SHAPES = [((64, 20), "NC"), ((256, 1024), "NC"), ((8192, 1024), "NC"), ((32, 64, 56, 56), "NCHW")]
MERGED = (8, 1024)  # parts, channels
ROWS = 256.0  # rows of every part


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, or of a merge the moments of all parts.

    Raises
    ------
    NotSupportedError
        For an epilogue: nothing follows; and for other parts than matrices of float32 or float64.
    """
    if case.epilogue:
        raise NotSupportedError(f"{case.op} is for no epilogue")
    if case.direction == "moments":
        return {"x": random(case.memory_shape)}
    if len(case.shape) != 2 or case.itemsize == 2:
        raise NotSupportedError("a merge is for (parts, channels) in float32 or float64")
    parts, channels = case.shape
    moments = random((parts, 4, channels))
    moments[:, 0], moments[:, 2], moments[:, 3] = ROWS, 0, abs(moments[:, 3]) * ROWS
    return {"parts": moments}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our ops."""
    if case.direction == "merge":
        parts = arrays["parts"]
        out = bn.batch_norm_statistics(parts, eps=EPSILON)

        def merge() -> tuple:
            (mean, _, rstd), _ = bn.batch_norm_statistics(parts, eps=EPSILON, out=out)
            return mean, rstd

        return merge
    x, axis = arrays["x"], case.channel_axis
    moments = bn.batch_norm_moments(x, axis=axis)

    def call() -> tuple:
        bn.batch_norm_moments(x, axis=axis, out=moments)
        return moments[1], moments[3]

    return call


def merged(parts: Any) -> tuple:
    """Return mean and 1/deviation of all parts, after Chan, Golub and LeVeque; they have the same number of rows."""
    means, squares = parts[:, 1], parts[:, 3]
    mean = means.mean(0)
    return mean, (squares.mean(0) / ROWS + ((means - mean) ** 2).mean(0) + EPSILON) ** -0.5


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. The sums of 16-bit data are computed in float32."""
    if case.direction == "merge":
        return lambda: merged(arrays["parts"])
    axes, _ = expression.axes_of(case)
    x = arrays["x"].astype(case.accumulator if arrays["x"].dtype.itemsize < 8 else "float64", copy=False)
    count = case.size // case.shape[1]
    return lambda: (x.mean(axis=axes), x.var(axis=axes) * count)


def var_mean(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's reduction of both, or the merge as a user would write it."""
    if case.direction == "merge":
        parts = pytorch.tensor_of(arrays["parts"])
        return lambda: merged(parts)
    axes, _ = expression.axes_of(case)
    x = pytorch.tensor_of(arrays["x"])
    torch, count = pytorch.load(), case.size // case.shape[1]

    def call() -> tuple:
        var, mean = torch.var_mean(x, axes, correction=0)
        return mean, var * count

    return call


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of the data and of what is returned."""
    if case.direction == "merge":
        return (4 * case.size + 2 * case.shape[1]) * case.itemsize
    return case.size * case.itemsize + 2 * case.shape[1] * (8 if case.dtype == "float64" else 4)


OP = Op(
    "batch_norm_statistics",
    cases=[
        *(Case("batch_norm_statistics", "moments", shape, "float32", layout) for shape, layout in SHAPES),
        Case("batch_norm_statistics", "merge", MERGED),
    ],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(var_mean)),
)


SAVED = "dy x gamma beta statistics"

SAMPLES = {
    "batch_norm_moments": Sample(
        "x mask",
        "moments",
        lambda a: bn.batch_norm_moments(a["x"], mask=a["mask"], out=a["moments"]),
        any_strides="x mask",
    ),
    "batch_norm_statistics": Sample(
        "parts",
        "running_mean running_var statistics merged",
        lambda a: bn.batch_norm_statistics(
            *take(a, "parts running_mean running_var"), out=take(a, "statistics merged")
        ),
    ),
    "batch_norm_normalise": Sample(
        "x gamma beta statistics",
        "out",
        lambda a: bn.batch_norm_normalise(*take(a, "x gamma beta statistics"), out=a["out"]),
        any_strides="x",
    ),
    "batch_norm_gradient_sums": Sample(
        SAVED,
        "sums",
        lambda a: bn.batch_norm_gradient_sums(*take(a, SAVED), out=a["sums"]),
        any_strides="dy x",
    ),
    "batch_norm_input_gradient": Sample(
        f"{SAVED} sums",
        "dx",
        lambda a: bn.batch_norm_input_gradient(*take(a, f"{SAVED} sums"), out=(a["dx"],)),
        any_strides="dy x",
    ),
}
