"""Batch norm of padded examples: statistics over the valid ones alone. Nobody else has it as one op.

So the rivals are formulas, as Keras and Flax compute it, in every framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, Sizes, take
from benchmarks.peers import EPSILON, expression, pytorch

SHAPES = [(64, 20), (256, 1024), (8192, 1024), (100_000, 32)]


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, in the backward dy, gamma, beta, and a mask of which about three quarters are True.

    Raises
    ------
    NotSupportedError
        For an epilogue, and for other shapes than (N, C).
    """
    if case.epilogue or len(case.shape) != 2:
        raise NotSupportedError(f"{case.op} is for (N, C) and no epilogue")
    rows, channels = case.shape
    data = ("x",) if case.direction == "forward" else ("x", "dy")
    arrays = {name: random(case.shape) for name in data} | {"mask": random((rows,)) > -0.67}
    return arrays | {name: abs(random((channels,))) + 0.5 for name in ("gamma", "beta")}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    x, gamma, beta, mask = (arrays[name] for name in ("x", "gamma", "beta", "mask"))
    options = {"mask": mask}
    out = bn.batch_norm_forward(x, gamma, beta, eps=EPSILON, **options)
    if case.direction == "forward":
        return lambda: bn.batch_norm_forward(x, gamma, beta, eps=EPSILON, **options, out=out)[:1]
    dy, statistics = arrays["dy"], out[1]
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)
    return lambda: bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options, out=grads)


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. 16-bit data are computed in float32."""
    gamma, beta, dtype = arrays["gamma"], arrays["beta"], arrays["x"].dtype
    weight = arrays["mask"].astype(gamma.dtype)[:, None]
    x = arrays["x"].astype(gamma.dtype, copy=False)

    def normalised() -> tuple:
        count = weight.sum()
        centred = (x - (x * weight).sum(0) / count) * weight
        rstd = ((centred * centred).sum(0) / count + EPSILON) ** -0.5
        return centred * rstd, rstd, count

    if case.direction == "forward":
        return lambda: (((normalised()[0] * gamma + beta) * weight).astype(dtype, copy=False),)
    xhat, rstd, count = normalised()
    dy = arrays["dy"].astype(gamma.dtype, copy=False)

    def backward() -> tuple:
        g = dy * weight
        dgamma, dbeta = (g * xhat).sum(0), g.sum(0)
        dx = gamma * rstd * (g - (dbeta + xhat * dgamma) * (weight / count))
        return dx.astype(dtype, copy=False), dgamma, dbeta

    return backward


def torch_formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare the same for PyTorch, whose autograd makes the backward."""
    torch = pytorch.load()
    x, gamma, beta, mask = (pytorch.tensor_of(arrays[name]) for name in ("x", "gamma", "beta", "mask"))
    weight = mask.to(gamma.dtype)[:, None]

    def forward() -> Any:
        acc_x = x.to(gamma.dtype)
        count = weight.sum()
        centred = (acc_x - (acc_x * weight).sum(0) / count) * weight
        rstd = ((centred * centred).sum(0) / count + EPSILON).rsqrt()
        return ((centred * rstd * gamma + beta) * weight).to(x.dtype)

    if case.direction == "forward":
        return lambda: (forward(),)
    inputs = [tensor.requires_grad_() for tensor in (x, gamma, beta)]
    y, dy = forward(), pytorch.tensor_of(arrays["dy"])
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of data, mask and parameters, as if all were valid."""
    passes = 1 if case.direction == "forward" else 2
    vectors = 2 * passes * case.shape[1] * (8 if case.dtype == "float64" else 4)
    return (passes + 1) * case.size * case.itemsize + case.shape[0] + vectors


OP = Op(
    "batch_norm_masked",
    cases=[
        Case("batch_norm_masked", direction, shape, dtype)
        for direction in ("forward", "backward")
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
    ],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(torch_formulas)),
)


RUNNING = "x gamma beta running_mean running_var"
SAVED = "dy x gamma beta statistics"
GROUPED = {"statistics": "A G5C"}  # renormalised
LARGE = ({"N": 1200, "C": 16}, {"N": 62, "C": 3, "L": 404})  # that cooperative kernels take, of three groups

SAMPLES = {
    "batch_norm_masked_forward": Sample(
        "x mask gamma beta",
        "running_mean running_var y statistics",
        lambda a: bn.batch_norm_forward(*take(a, RUNNING), mask=a["mask"], out=take(a, "y statistics")),
        any_strides="x mask",
        sizes=({}, {"N": 1100}),  # rows that a thread holds, and that it reads twice
    ),
    "batch_norm_masked_backward": Sample(
        "dy x mask gamma beta statistics",
        "dx dgamma dbeta",
        lambda a: bn.batch_norm_backward(*take(a, SAVED), mask=a["mask"], out=take(a, "dx dgamma dbeta")),
        any_strides="dy x mask",
        sizes=({}, {"N": 1100}),  # rows that a thread holds, and that it reads twice
    ),
    "batch_norm_grouped_forward": Sample(
        "x mask residual gamma beta",
        "y statistics running_mean running_var",
        lambda a: bn.batch_norm_forward(
            *take(a, RUNNING),
            mask=a["mask"],
            residual=a["residual"],
            grouped=True,
            renorm=(3.0, 5.0),
            out=take(a, "y statistics"),
        ),
        any_strides="x mask residual",
        specs=GROUPED,
        fixed={"G": 3},
        sizes=({"N": 20, "C": 33},),
    ),
}


def grouped_backward(activation: str, specs: dict[str, str], sizes: tuple[Sizes, ...]) -> Sample:
    """Return the backward of three groups, with a mask and a residual."""
    return Sample(
        "dy x mask residual gamma beta statistics",
        "dx dgamma dbeta dresidual",
        lambda a: bn.batch_norm_backward(
            *take(a, SAVED),
            mask=a["mask"],
            residual=a["residual"],
            grouped=True,
            activation=activation,
            out=take(a, "dx dgamma dbeta dresidual"),
        ),
        any_strides="dy x mask residual",
        specs=specs,
        fixed={"G": 3},
        sizes=sizes,
    )


VARIANTS = {
    "batch_norm_grouped_backward": grouped_backward("tanh", GROUPED, ({"N": 20, "C": 33},)),
    "batch_norm_large_groups_forward": Sample(
        "x mask residual gamma beta",
        "y statistics running_mean running_var",
        lambda a: bn.batch_norm_forward(
            *take(a, RUNNING), mask=a["mask"], residual=a["residual"], grouped=True, out=take(a, "y statistics")
        ),
        any_strides="x mask residual",
        specs={"statistics": "A G3C"},
        fixed={"G": 3},
        sizes=LARGE,
    ),
    "batch_norm_large_groups_backward": grouped_backward("relu", {"statistics": "A G3C"}, LARGE),
}
