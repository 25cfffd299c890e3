"""Batch norm in training: the whole list of cases, of which some wait for the op to support them.

Sizes: mini-batches of fully connected layers around the question's 64 x 20, and convolutional layers in both layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import (
    EPSILON,
    MOMENTUM,
    apex,
    cudnn_frontend,
    cupy_kernels,
    expression,
    jax_xla,
    pytorch,
    three_launches,
    three_phase,
    tileops,
    torch_compile,
    triton_kernels,
)

BOTH = [(64, 20), (128, 20), (256, 64), (256, 1024), (1024, 1024), (4096, 1024), (8192, 1024)]  # float32 and bfloat16
IMAGES = [(20, 6, 65536), (16, 64, 256, 256), (256, 256, 56, 56), (128, 2048, 4, 4)]  # float16
EPILOGUES = ("", "relu", "add_relu")
DIRECTIONS = ("forward", "backward")
VECTORS = ("gamma", "beta", "running_mean", "running_var")


def shapes() -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Yield shape, data type and layout; what says most comes first."""
    for dtype in ("float32", "bfloat16"):
        yield from ((shape, dtype, "NC") for shape in BOTH)
        yield ((100_000, 32), "float32", "NC") if dtype == "float32" else ((65_536, 4096), "bfloat16", "NC")
    for shape in IMAGES:
        yield shape, "float16", "NCL" if len(shape) == 3 else "NCHW"
        yield shape if len(shape) == 4 else (*shape, 1), "float16", "NHWC"
    yield from ((shape, "float16", "NC" if len(shape) == 2 else "NCHW") for shape in tileops.SHAPES)


CASES = [
    Case("batch_norm", direction, shape, dtype, layout, epilogue)
    for epilogue in EPILOGUES
    for shape, dtype, layout in shapes()
    for direction in DIRECTIONS
]


def input_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the shapes of data, gradient, parameters and running statistics, those that the direction needs."""
    data = ["x"] + ["dy"] * (case.direction == "backward") + ["residual"] * (case.epilogue == "add_relu")
    vectors = VECTORS if case.direction == "forward" else VECTORS[:2]
    return dict.fromkeys(data, case.memory_shape) | dict.fromkeys(vectors, (case.shape[1],))


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return random arrays of these shapes; those of parameters and running statistics are positive.

    The gradient is 0 where rounding may decide whether a ReLU lets it through: the right result is then one, and one
    flipped element among millions is not taken for an error.
    """
    arrays = {name: random(shape) for name, shape in input_shapes(case).items()}
    arrays |= {name: abs(array) + 0.5 for name, array in arrays.items() if name in VECTORS}
    if case.direction == "backward" and case.epilogue:
        arrays["dy"] = arrays["dy"] * expression.decided(case, arrays)
    return arrays


def bytes_moved(case: Case) -> int:
    """Return the bytes of the data alone: forward x in, y out; backward x and dy in, dx out; and the residual's."""
    passes = 2 if case.direction == "forward" else 3
    if case.epilogue == "add_relu":
        # Forward reads the residual. Backward writes its gradient; it could read one bit of mask for the residual.
        passes += 1
    return passes * case.size * case.itemsize


def options(case: Case, arrays: Arrays) -> dict[str, Any]:
    """Return the keywords with which our op does the case."""
    given: dict[str, Any] = {"eps": EPSILON}
    if case.epilogue:
        given["activation"] = "relu"
    if case.layout != "NC":
        given["axis"] = case.channel_axis
    if "residual" in arrays:
        given["residual"] = arrays["residual"]
    return given


def forward(case: Case, arrays: Arrays) -> Call:
    """Prepare our forward."""
    x, *vectors = (arrays[name] for name in ("x", *VECTORS))
    given = options(case, arrays) | {"momentum": MOMENTUM}
    out = bn.batch_norm_forward(x, *(vector.copy() for vector in vectors), **given)

    def call() -> tuple:
        y, _ = bn.batch_norm_forward(x, *vectors, **given, out=out)
        return y, *vectors[2:]

    return call


def backward(case: Case, arrays: Arrays) -> Call:
    """Prepare our backward."""
    dy, x, gamma, beta = (arrays[name] for name in ("dy", "x", "gamma", "beta"))
    given = options(case, arrays)
    _, statistics = bn.batch_norm_forward(x, gamma, beta, **given)
    del given["eps"]  # it is in the statistics
    out = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **given)
    return lambda: bn.batch_norm_backward(dy, x, gamma, beta, statistics, **given, out=out)


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op, after a try on three examples of two channels: what it refuses there it does not support yet."""
    few = tuple(slice(0, 2 if axis == case.channel_axis % len(case.shape) else 3) for axis in range(len(case.shape)))
    small = {name: array[few if array.ndim > 1 else slice(0, 2)].copy() for name, array in arrays.items()}
    prepare = forward if case.direction == "forward" else backward
    try:
        prepare(case, small)()
    except (TypeError, ValueError) as refusal:
        raise NotSupportedError(f"not supported yet: {refusal}") from refusal
    return prepare(case, arrays)


OP = Op(
    "batch_norm",
    cases=CASES,
    inputs=inputs,
    reference=expression.reference,
    bytes_moved=bytes_moved,
    providers=(
        *on_both("bnkernels", ours),
        *expression.PROVIDERS,
        *three_phase.PROVIDERS,
        *three_launches.PROVIDERS,
        *cupy_kernels.PROVIDERS,
        *pytorch.PROVIDERS,
        *torch_compile.PROVIDERS,
        *tileops.PROVIDERS,
        *cudnn_frontend.PROVIDERS,
        *apex.PROVIDERS,
        *triton_kernels.PROVIDERS,
        *jax_xla.PROVIDERS,
    ),
)


SLICES = tuple({"N": rows, "C": 33} for rows in (10, 100, 240, 300))  # every variant, and a slice of one channel
IMAGES = tuple({"N": 3, "C": 33, "L": size} for size in (5, 49))  # neighbouring threads read channels, or values
SHARED = ({"N": 20_000, "C": 8}, {"N": 6, "C": 2, "L": 30_000})  # slices that several blocks share, on any GPU
# Rows of two elements and of one.
NARROW = ({"N": 600, "C": 58}, {"N": 600, "C": 57}, {"N": 60, "C": 3, "L": 202}, {"N": 60, "C": 3, "L": 201})
RUNNING = "x gamma beta running_mean running_var"
SAVED = "dy x gamma beta statistics"

SAMPLES = {
    "batch_norm_forward": Sample(
        "x gamma beta",
        "running_mean running_var y statistics",
        lambda a: bn.batch_norm_forward(*take(a, RUNNING), activation="relu", out=take(a, "y statistics")),
        any_strides="x",
        sizes=SLICES + IMAGES,
        counted=True,
    ),
    "batch_norm_backward": Sample(
        SAVED,
        "dx dgamma dbeta",
        lambda a: bn.batch_norm_backward(*take(a, SAVED), activation="relu", out=take(a, "dx dgamma dbeta")),
        any_strides="dy x",
        sizes=SLICES + IMAGES,
        counted=True,
    ),
    "batch_norm_inference": Sample(
        RUNNING,
        "out",
        lambda a: bn.batch_norm_inference(*take(a, RUNNING), activation="relu", out=a["out"]),
        any_strides="x",
        sizes=SLICES[:1] + IMAGES,
        counted=True,
    ),
    "batch_norm_inference_backward": Sample(
        f"dy {RUNNING}",
        "dx dgamma dbeta",
        lambda a: bn.batch_norm_inference_backward(
            *take(a, f"dy {RUNNING}"), activation="relu", out=take(a, "dx dgamma dbeta")
        ),
        any_strides="dy x",
        sizes=SLICES[:1] + IMAGES,
        counted=True,
    ),
    "batch_norm_residual_backward": Sample(
        "dy x residual gamma beta statistics",
        "dx dgamma dbeta dresidual",
        lambda a: bn.batch_norm_backward(
            *take(a, SAVED), residual=a["residual"], activation="relu", out=take(a, "dx dgamma dbeta dresidual")
        ),
        any_strides="dy x residual",
        sizes=IMAGES + SHARED + NARROW,
    ),
}
VARIANTS = {
    "batch_norm_residual_forward": Sample(
        "x residual gamma beta",
        "running_mean running_var y statistics",
        lambda a: bn.batch_norm_forward(
            *take(a, RUNNING), residual=a["residual"], activation="tanh", out=take(a, "y statistics")
        ),
        any_strides="x residual",
        sizes=IMAGES + SHARED + NARROW,
    ),
}
