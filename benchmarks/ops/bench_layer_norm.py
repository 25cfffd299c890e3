"""Layer norm, alone or with silu: of every example over its features. A case's shape is (examples, features)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, Provider, on_both
from benchmarks.harness.places import array_module
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import EPSILON, expression, pytorch, torch_compile

SHAPES = [(64, 20), (256, 1024), (8192, 1024), (4096, 8192)]
ALONE = ("forward alone", "backward alone")  # directions without silu


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, gamma, beta, and in a backward dy.

    Raises
    ------
    NotSupportedError
        For an epilogue, and for other shapes than (examples, features).
    """
    if case.epilogue or len(case.shape) != 2:
        raise NotSupportedError(f"{case.op} is for (examples, features) and no epilogue")
    vectors = {"gamma": abs(random(case.shape[1:])) + 0.5, "beta": random(case.shape[1:])}
    return {"x": random(case.shape)} | ({"dy": random(case.shape)} if is_backward(case) else {}) | vectors


def is_backward(case: Case) -> bool:
    """Tell whether the case is a backward."""
    return case.direction.startswith("backward")


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    given, options = (arrays["x"], arrays["gamma"], arrays["beta"]), {}
    if case.direction not in ALONE:
        options = {"activation": "silu"}
    out = bn.layer_norm_forward(*given, eps=EPSILON, **options)
    if not is_backward(case):
        return lambda: bn.layer_norm_forward(*given, eps=EPSILON, **options, out=out)[:1]
    behind = arrays["dy"], *given, out[1]
    grads = bn.layer_norm_backward(*behind, **options)
    return lambda: bn.layer_norm_backward(*behind, **options, out=grads)


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. 16-bit data are computed in float32."""
    gamma, beta, dtype, xp = arrays["gamma"], arrays["beta"], arrays["x"].dtype, array_module(arrays["x"])
    x = arrays["x"].astype(beta.dtype, copy=False)

    def forward() -> tuple:
        d = x - x.mean(1, keepdims=True)
        rstd = (xp.square(d).mean(1, keepdims=True) + EPSILON) ** -0.5
        xhat = d * rstd
        z = gamma * xhat + beta
        return z, None if case.direction in ALONE else 1 / (1 + xp.exp(-z)), xhat, rstd

    def output() -> tuple:
        z, gate, *_ = forward()
        return ((z if gate is None else z * gate).astype(dtype, copy=False),)

    if not is_backward(case):
        return output
    z, gate, xhat, rstd = forward()
    dy = arrays["dy"].astype(beta.dtype, copy=False)

    def backward() -> tuple:
        g = dy if gate is None else dy * gate * (1 + z * (1 - gate))
        h = gamma * g
        dx = rstd * (h - h.mean(1, keepdims=True) - xhat * (h * xhat).mean(1, keepdims=True))
        return dx.astype(dtype, copy=False), (g * xhat).sum(0), g.sum(0)

    return backward


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare the layer of PyTorch, whose autograd makes the backward; alone it is the operator that autograd calls."""
    if case.direction == "backward alone":
        return _torch_operator(case, arrays)
    return _torch(case, arrays, lambda layer: layer)


def _torch_operator(case: Case, arrays: Arrays) -> Call:
    dy, x, *vectors = (pytorch.tensor_of(arrays[name]) for name in ("dy", "x", "gamma", "beta"))
    gamma, beta = (vector.to(x.dtype) for vector in vectors)
    aten, features = pytorch.load().ops.aten, x.shape[1:]
    _, mean, rstd = aten.native_layer_norm.default(x, features, gamma, beta, EPSILON)
    given = dy, x, features, mean, rstd, gamma, beta, [True] * 3
    return lambda: aten.native_layer_norm_backward.default(*given)


def torch_compiled(case: Case, arrays: Arrays) -> Call:
    """Prepare the same compiled."""
    return _torch(case, arrays, partial(pytorch.load().compile, fullgraph=True, dynamic=False))


def _torch(case: Case, arrays: Arrays, compiled: Callable[[Callable], Callable]) -> Call:
    torch = pytorch.load()
    tensors = {name: pytorch.tensor_of(array) for name, array in arrays.items()}

    def layer(x: Any, gamma: Any, beta: Any) -> Any:
        vectors = gamma.to(x.dtype), beta.to(x.dtype)
        z = torch.nn.functional.layer_norm(x, x.shape[1:], *vectors, EPSILON)
        return z if case.direction in ALONE else torch.nn.functional.silu(z)

    function, given = compiled(layer), [tensors[name] for name in ("x", "gamma", "beta")]
    if not is_backward(case):
        return lambda: (function(*given),)
    wanted = [tensor.requires_grad_() for tensor in given]
    y = function(*given)
    return lambda: torch.autograd.grad(y, wanted, tensors["dy"], retain_graph=True)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of x, y and the vectors, or of dy, x, dx and both pairs of vectors."""
    matrices, pairs = (3, 2) if is_backward(case) else (2, 1)
    vectors = 2 * pairs * case.shape[1] * (8 if case.dtype == "float64" else 4)
    return matrices * case.size * case.itemsize + vectors


OP = Op(
    "layer_norm",
    cases=[
        Case("layer_norm", direction, shape, dtype)
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for direction in ("forward", "backward")
    ]
    + [Case("layer_norm", direction, (4096, 4096)) for direction in ALONE],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(
        *on_both("bnkernels", ours),
        *expression.providers(formulas),
        *pytorch.providers(torch_eager),
        Provider("torch.compile", "cuda", torch_compiled, torch_compile.absent, engine="torch", slow_start=True),
    ),
)


SAVED = "dy x gamma beta statistics"
OF_ROWS = {"statistics": "A 3N", "workspace": "A 512*C"}
LONG = {"N": 3, "C": 16_390}  # rows that several blocks share
# A part of a unit at the end of every row; several blocks.
SIZES = ({"N": 10, "C": 33}, {"N": 5, "C": 4000}, LONG)

SAMPLES = {
    "layer_norm_forward": Sample(
        "x gamma beta",
        "y statistics",
        lambda a: bn.layer_norm_forward(*take(a, "x gamma beta"), activation="relu", out=take(a, "y statistics")),
        specs=OF_ROWS,
        sizes=SIZES,
        counted=True,
    ),
    "layer_norm_backward": Sample(
        SAVED,
        "dx dgamma dbeta workspace",
        lambda a: bn.layer_norm_backward(
            *take(a, SAVED), activation="relu", workspace=a["workspace"], out=take(a, "dx dgamma dbeta")
        ),
        specs=OF_ROWS,
        sizes=SIZES,
        counted=True,
    ),
    "layer_norm_backward_curved": Sample(
        SAVED,
        "dx dgamma dbeta workspace",
        lambda a: bn.layer_norm_backward(
            *take(a, SAVED), activation="silu", workspace=a["workspace"], out=take(a, "dx dgamma dbeta")
        ),
        specs=OF_ROWS,
        sizes=SIZES,
    ),
}
