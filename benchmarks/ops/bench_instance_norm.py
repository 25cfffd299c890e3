"""Instance norm of images, without an activation. A case's shape is (N, C, H, W)."""

from __future__ import annotations

from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, Op, on_both
from benchmarks.harness.places import array_module
from benchmarks.harness.samples import Sample, take
from benchmarks.ops import bench_group_norm
from benchmarks.ops.bench_layer_norm import is_backward
from benchmarks.peers import EPSILON, expression, pytorch

SHAPES = [(8, 64, 64, 64), (32, 256, 56, 56), (2, 128, 256, 256)]


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    given = arrays["x"], arrays["gamma"], arrays["beta"]
    out = bn.instance_norm_forward(*given, eps=EPSILON)
    if not is_backward(case):
        return lambda: bn.instance_norm_forward(*given, eps=EPSILON, out=out)[:1]
    behind = arrays["dy"], *given, out[1]
    grads = bn.instance_norm_backward(*behind)
    return lambda: bn.instance_norm_backward(*behind, out=grads)


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. 16-bit data are computed in float32."""
    dtype, xp = arrays["x"].dtype, array_module(arrays["x"])
    along, axes = (1, -1, *[1] * (len(case.shape) - 2)), tuple(range(2, len(case.shape)))
    gamma, beta = (arrays[name].reshape(along) for name in ("gamma", "beta"))
    x = arrays["x"].astype(gamma.dtype, copy=False)

    def normalised() -> tuple:
        d = x - x.mean(axes, keepdims=True)
        rstd = (xp.square(d).mean(axes, keepdims=True) + EPSILON) ** -0.5
        return d * rstd, rstd

    if not is_backward(case):
        return lambda: ((gamma * normalised()[0] + beta).astype(dtype, copy=False),)
    xhat, rstd = normalised()
    dy = arrays["dy"].astype(gamma.dtype, copy=False)

    def backward() -> tuple:
        h = gamma * dy
        dx = rstd * (h - h.mean(axes, keepdims=True) - xhat * (h * xhat).mean(axes, keepdims=True))
        return dx.astype(dtype, copy=False), (dy * xhat).sum((0, *axes)), dy.sum((0, *axes))

    return backward


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's function, whose autograd makes the backward."""
    torch = pytorch.load()
    tensors = {name: pytorch.tensor_of(array) for name, array in arrays.items()}
    given = [tensors[name] for name in ("x", "gamma", "beta")]

    def layer(x: Any, gamma: Any, beta: Any) -> Any:
        vectors = gamma.to(x.dtype), beta.to(x.dtype)
        return torch.nn.functional.instance_norm(x, None, None, *vectors, eps=EPSILON)

    if not is_backward(case):
        return lambda: (layer(*given),)
    y = layer(*(tensor.requires_grad_() for tensor in given))
    return lambda: torch.autograd.grad(y, given, tensors["dy"], retain_graph=True)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


OP = Op(
    "instance_norm",
    cases=[
        Case("instance_norm", direction, shape, dtype, layout="NCHW")
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for direction in ("forward", "backward")
    ],
    inputs=bench_group_norm.inputs,
    reference=reference,
    bytes_moved=bench_group_norm.bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(torch_eager)),
)


SAVED = "dy x gamma beta statistics"
SPECS = {"statistics": "A N3C"} | dict.fromkeys(("x", "y", "dy", "dx"), "T NCS")  # positions that are always there
SIZES = ({"N": 4, "C": 5, "S": 6}, {"N": 2, "C": 3, "S": 9000})


def forward(a: Arrays) -> Any:
    """Call our forward."""
    return bn.instance_norm_forward(*take(a, "x gamma beta"), activation="relu", out=take(a, "y statistics"))


def backward(a: Arrays) -> Any:
    """Call our backward."""
    return bn.instance_norm_backward(*take(a, SAVED), activation="relu", out=take(a, "dx dgamma dbeta"))


SAMPLES = {
    "instance_norm_forward": Sample("x gamma beta", "y statistics", forward, specs=SPECS, sizes=SIZES, any_strides="x"),
    "instance_norm_backward": Sample(SAVED, "dx dgamma dbeta", backward, specs=SPECS, sizes=SIZES, any_strides="dy x"),
}
