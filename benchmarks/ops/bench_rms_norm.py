"""RMS norm of every example over its features, without an activation. A case's shape is (examples, features)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, Op, on_both
from benchmarks.harness.places import array_module
from benchmarks.harness.samples import Sample, take
from benchmarks.ops import bench_layer_norm
from benchmarks.ops.bench_layer_norm import is_backward
from benchmarks.peers import EPSILON, expression, pytorch

SHAPES = [(256, 1024), (8192, 1024), (4096, 8192)]


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, gamma, and in a backward dy."""
    return {name: array for name, array in bench_layer_norm.inputs(case, random).items() if name != "beta"}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    given = arrays["x"], arrays["gamma"]
    out = bn.rms_norm_forward(*given, eps=EPSILON)
    if not is_backward(case):
        return lambda: bn.rms_norm_forward(*given, eps=EPSILON, out=out)[:1]
    behind = arrays["dy"], *given, out[1]
    grads = bn.rms_norm_backward(*behind)
    return lambda: bn.rms_norm_backward(*behind, out=grads)


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. 16-bit data are computed in float32."""
    gamma, dtype, xp = arrays["gamma"], arrays["x"].dtype, array_module(arrays["x"])
    x = arrays["x"].astype(gamma.dtype, copy=False)

    def normalised() -> tuple:
        rrms = (xp.square(x).mean(1, keepdims=True) + EPSILON) ** -0.5
        return x * rrms, rrms

    if not is_backward(case):
        return lambda: ((gamma * normalised()[0]).astype(dtype, copy=False),)
    xhat, rrms = normalised()
    dy = arrays["dy"].astype(gamma.dtype, copy=False)

    def backward() -> tuple:
        h = gamma * dy
        dx = rrms * (h - xhat * (h * xhat).mean(1, keepdims=True))
        return dx.astype(dtype, copy=False), (dy * xhat).sum(0)

    return backward


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's function, whose autograd makes the backward."""
    torch = pytorch.load()
    tensors = {name: pytorch.tensor_of(array) for name, array in arrays.items()}
    given = [tensors[name] for name in ("x", "gamma")]

    def layer(x: Any, gamma: Any) -> Any:
        return torch.nn.functional.rms_norm(x, x.shape[1:], gamma.to(x.dtype), EPSILON)

    if not is_backward(case):
        return lambda: (layer(*given),)
    y = layer(*(tensor.requires_grad_() for tensor in given))
    return lambda: torch.autograd.grad(y, given, tensors["dy"], retain_graph=True)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of x, y and gamma, or of dy, x, dx, gamma and dgamma."""
    matrices, vectors = (3, 2) if is_backward(case) else (2, 1)
    return matrices * case.size * case.itemsize + vectors * case.shape[1] * (8 if case.dtype == "float64" else 4)


OP = Op(
    "rms_norm",
    cases=[
        Case("rms_norm", direction, shape, dtype)
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for direction in ("forward", "backward")
    ],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(torch_eager)),
)


SAVED = "dy x gamma statistics"
OF_ROWS = {"statistics": "A 1N", "workspace": "A 512*C"}

SAMPLES = {
    "rms_norm_forward": Sample(
        "x gamma",
        "y statistics",
        lambda a: bn.rms_norm_forward(*take(a, "x gamma"), activation="relu", out=take(a, "y statistics")),
        specs=OF_ROWS,
        sizes=bench_layer_norm.SIZES,
    ),
    "rms_norm_backward": Sample(
        SAVED,
        "dx dgamma workspace",
        lambda a: bn.rms_norm_backward(
            *take(a, SAVED), activation="relu", workspace=a["workspace"], out=take(a, "dx dgamma")
        ),
        specs=OF_ROWS,
        sizes=bench_layer_norm.SIZES,
    ),
}
