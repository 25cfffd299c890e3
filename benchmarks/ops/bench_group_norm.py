"""Group norm of images with 32 groups, in both layouts, without an activation. A case's shape is (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.places import array_module
from benchmarks.harness.samples import Sample, take
from benchmarks.ops.bench_layer_norm import is_backward
from benchmarks.peers import EPSILON, expression, pytorch

SHAPES = [(8, 320, 32, 32), (32, 256, 56, 56), (2, 512, 128, 128)]
GROUPS = 32


def groups_of(case: Case) -> int:
    """Return the number of groups: 32, or a channel each, of instance norm and where 32 do not divide them."""
    return GROUPS if case.op == "group_norm" and case.shape[1] % GROUPS == 0 else case.shape[1]


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, gamma, beta, and in a backward dy.

    Raises
    ------
    NotSupportedError
        For an epilogue, and of instance norm where channels come last.
    """
    if case.epilogue or (case.op != "group_norm" and case.layout == "NHWC"):
        raise NotSupportedError(f"{case.op} is for (N, C, ...) and no epilogue")
    vectors = {"gamma": abs(random(case.shape[1:2])) + 0.5, "beta": random(case.shape[1:2])}
    tensors = ("x", "dy") if is_backward(case) else ("x",)
    return {name: random(case.memory_shape) for name in tensors} | vectors


def axis_of(case: Case) -> int:
    """Return the axis of the channels."""
    return -1 if case.layout == "NHWC" else 1


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    given, axis = (arrays["x"], groups_of(case), arrays["gamma"], arrays["beta"]), axis_of(case)
    out = bn.group_norm_forward(*given, axis=axis, eps=EPSILON)
    if not is_backward(case):
        return lambda: bn.group_norm_forward(*given, axis=axis, eps=EPSILON, out=out)[:1]
    behind = arrays["dy"], *given, out[1]
    grads = bn.group_norm_backward(*behind, axis=axis)
    return lambda: bn.group_norm_backward(*behind, axis=axis, out=grads)


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. 16-bit data are computed in float32."""
    dtype, xp, groups = arrays["x"].dtype, array_module(arrays["x"]), groups_of(case)
    along = (1, -1, *[1] * (len(case.shape) - 2))
    gamma, beta = (arrays[name].reshape(along) for name in ("gamma", "beta"))
    x = xp.moveaxis(arrays["x"], axis_of(case), 1).astype(gamma.dtype, copy=False)
    axes = (0, *range(2, len(case.shape)))

    def in_memory_order(array: Any) -> Any:
        return xp.moveaxis(array.astype(dtype, copy=False), 1, axis_of(case))

    def rows(array: Any) -> Any:
        return array.reshape(len(array), groups, -1)

    def normalised() -> tuple:
        d = rows(x) - rows(x).mean(2, keepdims=True)
        rstd = (xp.square(d).mean(2, keepdims=True) + EPSILON) ** -0.5
        return d * rstd, rstd

    if not is_backward(case):
        return lambda: (in_memory_order(gamma * normalised()[0].reshape(x.shape) + beta),)
    xhat, rstd = normalised()
    dy = xp.moveaxis(arrays["dy"], axis_of(case), 1).astype(gamma.dtype, copy=False)

    def backward() -> tuple:
        h = rows(gamma * dy)
        dx = rstd * (h - h.mean(2, keepdims=True) - xhat * (h * xhat).mean(2, keepdims=True))
        sums = (dy * xhat.reshape(x.shape)).sum(axes), dy.sum(axes)
        return in_memory_order(dx.reshape(x.shape)), *sums

    return backward


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's function."""
    return of_torch(
        case, arrays, lambda library, x, *vectors: library.group_norm(x, groups_of(case), *vectors, EPSILON)
    )


def of_torch(case: Case, arrays: Arrays, norm: Callable[..., Any]) -> Call:
    """Prepare a norm of ``torch.nn.functional``, of x, gamma and beta in its type; autograd makes the backward."""
    torch = pytorch.load()
    tensors = pytorch.tensors_of(case, arrays)
    given = [tensors[name] for name in ("x", "gamma", "beta")]

    def layer(x: Any, gamma: Any, beta: Any) -> Any:
        return norm(torch.nn.functional, x, gamma.to(x.dtype), beta.to(x.dtype))

    if not is_backward(case):
        return lambda: (pytorch.in_memory_order(case, layer(*given)),)
    y = layer(*(tensor.requires_grad_() for tensor in given))

    def backward() -> tuple:
        dx, *sums = torch.autograd.grad(y, given, tensors["dy"], retain_graph=True)
        return pytorch.in_memory_order(case, dx), *sums

    return backward


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of x, y and the vectors, or of dy, x, dx and both pairs of vectors."""
    tensors, pairs = (3, 2) if is_backward(case) else (2, 1)
    vectors = 2 * pairs * case.shape[1] * (8 if case.dtype == "float64" else 4)
    return tensors * case.size * case.itemsize + vectors


OP = Op(
    "group_norm",
    cases=[
        Case("group_norm", direction, shape, dtype, layout)
        for layout in ("NCHW", "NHWC")
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for direction in ("forward", "backward")
    ],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(torch_eager)),
)


SAVED = "dy x gamma beta statistics"
SPECS = {"statistics": "A 3N1"} | dict.fromkeys(("x", "y", "dy", "dx"), "T NCL")
GROUPED = {**SPECS, "statistics": "A 3N2"}
# No whole vectors; several blocks of each group; rows that several blocks share.
SIZES = (
    {"N": 10, "C": 4, "L": 5},
    {"N": 600, "C": 8, "L": 6},
    {"N": 2, "C": 4, "L": 9000},
)


def forward(a: Arrays, groups: int = 1, axis: int = 1) -> Any:
    """Call our forward."""
    x, *vectors = take(a, "x gamma beta")
    return bn.group_norm_forward(x, groups, *vectors, axis=axis, activation="relu", out=take(a, "y statistics"))


def backward(a: Arrays, groups: int = 1, axis: int = 1, activation: str = "relu") -> Any:
    """Call our backward."""
    dy, x, *saved = take(a, SAVED)
    out = take(a, "dx dgamma dbeta")
    return bn.group_norm_backward(dy, x, groups, *saved, axis=axis, activation=activation, out=out)


SAMPLES = {
    "group_norm_forward": Sample("x gamma beta", "y statistics", forward, specs=SPECS, sizes=SIZES),
    "group_norm_backward": Sample(SAVED, "dx dgamma dbeta", backward, specs=SPECS, sizes=SIZES),
}
EVEN = {"C": 8}  # channels of two groups
LAST = {**GROUPED, **dict.fromkeys(("x", "y", "dy", "dx"), "T NLC")}
VARIANTS = {
    "two_group_norm_forward": Sample(
        "x gamma beta", "y statistics", partial(forward, groups=2), specs=GROUPED, fixed=EVEN, sizes=SIZES
    ),
    "two_group_norm_backward": Sample(
        SAVED, "dx dgamma dbeta", partial(backward, groups=2), specs=GROUPED, fixed=EVEN, sizes=SIZES
    ),
    "last_group_norm_forward": Sample(
        "x gamma beta", "y statistics", partial(forward, groups=2, axis=-1), specs=LAST, fixed=EVEN, sizes=SIZES
    ),
    **{
        f"last_group_norm_backward_{activation}": Sample(
            *(SAVED, "dx dgamma dbeta", partial(backward, groups=2, axis=-1, activation=activation)),
            specs=LAST,
            fixed=EVEN,
            sizes=SIZES,
        )
        for activation in ("relu", "gelu")
    },
}
