"""Instance norm of images: group norm with a channel for each group. A case's shape is (N, C, H, W)."""

from __future__ import annotations

from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, Op, on_both
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


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's function."""

    def norm(library: Any, x: Any, *vectors: Any) -> Any:
        return library.instance_norm(x, None, None, *vectors, eps=EPSILON)

    return bench_group_norm.of_torch(case, arrays, norm)


OP = Op(
    "instance_norm",
    cases=[
        Case("instance_norm", direction, shape, dtype, layout="NCHW")
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for direction in ("forward", "backward")
    ],
    inputs=bench_group_norm.inputs,
    reference=bench_group_norm.reference,
    bytes_moved=bench_group_norm.bytes_moved,
    providers=(
        *on_both("bnkernels", ours),
        *expression.providers(bench_group_norm.formulas),
        *pytorch.providers(torch_eager),
    ),
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
