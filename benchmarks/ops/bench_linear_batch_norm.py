"""A linear layer, batch norm or a bias, and tanh: as one op, and as everybody else has it, as three or four.

A case's shape is (mini-batch, neurons). There are as many inputs as neurons, but for the question's layer: 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, Provider, on_both
from benchmarks.harness.places import array_module, why_absent
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import EPSILON, expression, pytorch, torch_compile

SHAPES = [(64, 20), (64, 100), (64, 512), (256, 256), (512, 1024)]
INPUTS = {20: 64}
NORMS = {"forward": "batch", "forward without norm": None, "backward": "batch", "backward without norm": None}


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, weight, beta, with batch norm gamma, and in a backward dy.

    Raises
    ------
    NotSupportedError
        For an epilogue, and for other shapes than (mini-batch, neurons).
    """
    if case.epilogue or len(case.shape) != 2:
        raise NotSupportedError(f"{case.op} is for (mini-batch, neurons) and no epilogue")
    rows, outputs = case.shape
    terms = INPUTS.get(outputs, outputs)
    arrays = {"x": random((rows, terms)), "weight": random((terms, outputs)) * terms**-0.5}
    if is_backward(case):
        arrays["dy"] = random(case.shape)
    if NORMS[case.direction]:
        arrays["gamma"] = abs(random((outputs,))) + 0.5
    return arrays | {"beta": random((outputs,))}


def is_backward(case: Case) -> bool:
    """Tell whether the case is a backward."""
    return case.direction.startswith("backward")


def ours(case: Case, arrays: Arrays, precision: str | None = None) -> Call:
    """Prepare our op."""
    x, weight, beta = (arrays[name] for name in ("x", "weight", "beta"))
    norm = NORMS[case.direction]
    given, options = (x, weight, arrays.get("gamma"), beta), {"activation": "tanh", "precision": precision}
    y, z, statistics = bn.linear_batch_norm_forward(*given, norm=norm, eps=EPSILON, **options)
    if is_backward(case):
        behind = arrays["dy"], *given, z, statistics
        grads = bn.linear_batch_norm_backward(*behind, **options)
        return lambda: present(bn.linear_batch_norm_backward(*behind, **options, out=grads))
    out = (y, z, statistics) if norm else (y, z)
    return lambda: bn.linear_batch_norm_forward(*given, norm=norm, eps=EPSILON, **options, out=out)[:1]


def tensor_cores(case: Case, arrays: Arrays) -> Call:
    """Prepare our op with float32 products on tensor cores.

    Raises
    ------
    NotSupportedError
        For other data.
    """
    if case.dtype != "float32":
        raise NotSupportedError("3xTF32 is for float32")
    return ours(case, arrays, "tf32x3")


def present(gradients: tuple) -> tuple:
    """Return dx, dweight, dgamma where there is one, and dbeta."""
    return tuple(array for array in gradients if array is not None)


def separate(case: Case, arrays: Arrays) -> Call:
    """Prepare products and our batch norm.

    Raises
    ------
    NotSupportedError
        Without a norm, and for 16-bit data.
    """
    if NORMS[case.direction] is None or case.itemsize == 2:
        raise NotSupportedError("products and a batch norm, in float32 or float64")
    x, weight, gamma, beta = (arrays[name] for name in ("x", "weight", "gamma", "beta"))
    xp, options = array_module(x), {"activation": "tanh"}
    z = xp.matmul(x, weight)
    out = bn.batch_norm_forward(z, gamma, beta, eps=EPSILON, **options)
    if not is_backward(case):

        def forward() -> tuple:
            xp.matmul(x, weight, out=z)
            return bn.batch_norm_forward(z, gamma, beta, eps=EPSILON, **options, out=out)[:1]

        return forward
    behind = arrays["dy"], z, gamma, beta, out[1]
    grads = bn.batch_norm_backward(*behind, **options)
    dx, dweight = xp.empty_like(x), xp.empty_like(weight)

    def backward() -> tuple:
        dz, dgamma, dbeta = bn.batch_norm_backward(*behind, **options, out=grads)
        return xp.matmul(dz, weight.T, out=dx), xp.matmul(x.T, dz, out=dweight), dgamma, dbeta

    return backward


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write. 16-bit data are computed in float32."""
    gamma, beta, dtype, xp = arrays.get("gamma"), arrays["beta"], arrays["x"].dtype, array_module(arrays["x"])
    x, weight = (arrays[name].astype(beta.dtype, copy=False) for name in ("x", "weight"))
    norm, rows = NORMS[case.direction], case.shape[0]

    def forward() -> tuple:
        z = x @ weight
        if norm is None:
            return xp.tanh(z + beta), z, 1
        centred = z - z.mean(0)
        rstd = ((centred * centred).mean(0) + EPSILON) ** -0.5
        return xp.tanh(gamma * rstd * centred + beta), centred * rstd, rstd

    if not is_backward(case):
        return lambda: (forward()[0].astype(dtype, copy=False),)
    y, xhat, rstd = forward()
    dy = arrays["dy"].astype(beta.dtype, copy=False)

    def backward() -> tuple:
        g = dy * (1 - y * y)
        dbeta = g.sum(0)
        if norm is None:
            return (g @ weight.T).astype(dtype, copy=False), (x.T @ g).astype(dtype, copy=False), dbeta
        dgamma = (g * xhat).sum(0)
        dz = gamma * rstd * (g - (dbeta + xhat * dgamma) / rows)
        return (dz @ weight.T).astype(dtype, copy=False), (x.T @ dz).astype(dtype, copy=False), dgamma, dbeta

    return backward


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare the layer of PyTorch, whose autograd makes the backward."""
    return _torch(case, arrays, lambda layer: layer)


def torch_compiled(case: Case, arrays: Arrays) -> Call:
    """Prepare the same compiled."""
    return _torch(case, arrays, partial(pytorch.load().compile, fullgraph=True, dynamic=False))


def _torch(case: Case, arrays: Arrays, compiled: Callable[[Callable], Callable]) -> Call:
    torch = pytorch.load()
    tensors = {name: pytorch.tensor_of(array) for name, array in arrays.items()}
    norm = NORMS[case.direction]

    def layer(x: Any, weight: Any, gamma: Any, beta: Any) -> Any:
        if norm is None:
            return torch.tanh(x @ weight + beta.to(x.dtype))
        return torch.tanh(torch.nn.functional.batch_norm(x @ weight, None, None, gamma, beta, True, 0.1, EPSILON))

    function = compiled(layer)
    given = [tensors.get(name) for name in ("x", "weight", "gamma", "beta")]
    if not is_backward(case):
        return lambda: (function(*given),)
    wanted = [tensor.requires_grad_() for tensor in given if tensor is not None]
    y = function(*given)
    return lambda: torch.autograd.grad(y, wanted, tensors["dy"], retain_graph=True)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of factors, parameters and outputs; without those of the product, which is kept in between."""
    rows, outputs = case.shape
    terms = INPUTS.get(outputs, outputs)
    matrices = (rows * terms + terms * outputs + rows * outputs) * case.itemsize
    vectors = outputs * (2 if NORMS[case.direction] else 1) * (8 if case.dtype == "float64" else 4)
    return 2 * (matrices + vectors) if is_backward(case) else matrices + vectors


OP = Op(
    "linear_batch_norm",
    cases=[
        Case("linear_batch_norm", direction, shape, dtype)
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for direction in NORMS
    ],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(
        *on_both("bnkernels", ours),
        Provider("bnkernels, 3xTF32", "cuda", tensor_cores, engine="cupy"),
        *on_both("bnkernels, separate ops", separate, why_absent),
        *expression.providers(formulas),
        *pytorch.providers(torch_eager),
        Provider("torch.compile", "cuda", torch_compiled, torch_compile.absent, engine="torch", slow_start=True),
    ),
)


GIVEN = "x weight gamma beta"
SAVED = f"dy {GIVEN} z statistics"
GRADIENTS = "dx dweight dgamma dbeta"
AXES = {"x": "T NK", "dx": "T NK", "workspace": "T NC"}
TILES = tuple({"N": rows, "K": 40, "C": 33} for rows in (10, 100, 300))  # up to two tiles of rows


def forward(a: Arrays, norm: str = "batch", **options: Any) -> None:
    """Call the forward; with batch norm it updates running statistics."""
    running = take(a, "running_mean running_var") if norm == "batch" else ()
    bn.linear_batch_norm_forward(*take(a, GIVEN), *running, norm=norm, **options, out=take(a, "y z statistics"))


def backward(a: Arrays, **options: Any) -> None:
    """Call the backward."""
    bn.linear_batch_norm_backward(*take(a, SAVED), **options, workspace=a["workspace"], out=take(a, GRADIENTS))


FORWARD = Sample(
    GIVEN,
    "y z statistics running_mean running_var",
    partial(forward, activation="relu"),
    specs=AXES,
    sizes=TILES,
    counted=True,
)
BACKWARD = Sample(
    SAVED,
    f"{GRADIENTS} workspace",
    partial(backward, activation="relu"),
    specs=AXES,
    sizes=TILES,
    counted=True,
)
SAMPLES = {
    "linear_batch_norm_forward": FORWARD,
    "linear_batch_norm_backward": BACKWARD,
}
OF_LAYER = {"specs": AXES | {"statistics": "A 3N"}}
TF32X3 = {"dtypes": ("float32",)}
VARIANTS = {
    "linear_layer_norm_forward": replace(
        FORWARD, writes="y z statistics", run=partial(forward, norm="layer"), **OF_LAYER
    ),
    "linear_layer_norm_backward": replace(BACKWARD, run=partial(backward, norm="layer"), **OF_LAYER),
    "linear_batch_norm_forward_tf32x3": replace(FORWARD, run=partial(forward, precision="tf32x3"), **TF32X3),
    "linear_batch_norm_backward_tf32x3": replace(BACKWARD, run=partial(backward, precision="tf32x3"), **TF32X3),
}
VARIANTS |= {
    f"linear_layer_norm_{name}_tf32x3": replace(
        VARIANTS[f"linear_layer_norm_{name}"], run=partial(call, norm="layer", precision="tf32x3"), **TF32X3
    )
    for name, call in (("forward", forward), ("backward", backward))
}
