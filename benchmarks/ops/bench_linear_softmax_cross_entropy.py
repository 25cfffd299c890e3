"""The last layer of a classifier with its loss: losses and all gradients, as one op and as everybody else has it.

A case's shape is (mini-batch, classes). There are 512 inputs, but for the question's layer: 20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, Provider, on_both
from benchmarks.harness.places import array_module, why_absent
from benchmarks.harness.samples import Sample, take
from benchmarks.ops.bench_softmax_cross_entropy import LABEL_BYTES, SPREAD
from benchmarks.peers import expression, pytorch, torch_compile

SHAPES = [(64, 10), (256, 1000)]
INPUTS = {10: 20}


def sizes_of(case: Case) -> tuple[int, int, int]:
    """Return the numbers of examples, inputs and classes."""
    rows, classes = case.shape
    return rows, INPUTS.get(classes, 512), classes


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return x, weight, bias and labels.

    Raises
    ------
    NotSupportedError
        For 16-bit data, and for what belongs to other ops: layouts and epilogues.
    """
    if case.dtype not in ("float32", "float64") or case.layout != "NC" or case.epilogue:
        raise NotSupportedError("linear_softmax_cross_entropy is for (N, M) in float32 or float64")
    rows, terms, classes = sizes_of(case)
    labels = (abs(random((rows,))) * SPREAD).astype(np.int32) % classes
    weight = random((terms, classes)) * terms**-0.5
    return {"x": random((rows, terms)), "weight": weight, "bias": random((classes,)), "labels": labels}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare ours."""
    given = take(arrays, "x weight bias labels")
    out = bn.linear_softmax_cross_entropy(*given)
    workspace = array_module(given[0]).empty(case.shape, case.dtype)
    return lambda: bn.linear_softmax_cross_entropy(*given, workspace=workspace, out=out)


def separate(case: Case, arrays: Arrays) -> Call:
    """Prepare products of a library around our loss."""
    x, weight, bias, labels = take(arrays, "x weight bias labels")
    xp = array_module(x)
    logits, dx, dweight, dbias = xp.matmul(x, weight), *map(xp.empty_like, (x, weight, bias))
    loss = xp.empty(len(x), x.dtype)

    def call() -> tuple:
        xp.matmul(x, weight, out=logits)
        xp.add(logits, bias, out=logits)
        bn.softmax_cross_entropy(logits, labels, out=(loss, logits))
        xp.matmul(logits, weight.T, out=dx)
        return loss, dx, xp.matmul(x.T, logits, out=dweight), logits.sum(axis=0, out=dbias)

    return call


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write."""
    x, weight, bias, labels = take(arrays, "x weight bias labels")
    classes = np.arange(weight.shape[1], like=labels)  # for CuPy arrays NumPy hands this on to CuPy

    def call() -> tuple:
        logits = x @ weight + bias
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        totals = exponentials.sum(axis=1, keepdims=True)
        at_label = labels[:, np.newaxis] == classes
        losses = np.log(totals[:, 0]) - (shifted * at_label).sum(axis=1)
        dlogits = (exponentials / totals - at_label) / len(labels)
        return losses, dlogits @ weight.T, x.T @ dlogits, dlogits.sum(axis=0)

    return call


def eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's layer and loss, and the gradients by autograd."""
    return _torch(arrays, lambda function: function)


def compiled(case: Case, arrays: Arrays) -> Call:
    """Prepare the same compiled."""
    return _torch(arrays, partial(pytorch.load().compile, fullgraph=True, dynamic=False))


def _torch(arrays: Arrays, prepare: Callable[[Callable], Callable]) -> Call:
    torch = pytorch.load()
    *given, labels = (pytorch.tensor_of(array) for array in take(arrays, "x weight bias labels"))
    labels = labels.long()  # PyTorch needs int64
    wanted = [tensor.requires_grad_() for tensor in given]

    def losses_of(x: Any, weight: Any, bias: Any) -> Any:
        return torch.nn.functional.cross_entropy(torch.addmm(bias, x, weight), labels, reduction="none")

    function = prepare(losses_of)

    def call() -> tuple:
        losses = function(*given)
        return losses.detach(), *torch.autograd.grad(losses.mean(), wanted)

    return call


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return losses and gradients of float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of inputs, parameters and labels, which are read, and of losses and gradients."""
    rows, terms, classes = sizes_of(case)
    numbers = 2 * (rows * terms + terms * classes + classes) + rows
    return numbers * case.itemsize + rows * LABEL_BYTES


OP = Op(
    "linear_softmax_cross_entropy",
    cases=[Case("linear_softmax_cross_entropy", "forward+backward", shape) for shape in SHAPES],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(
        *on_both("bnkernels", ours),
        *on_both("bnkernels, separate ops", separate, why_absent),
        *expression.providers(formulas),
        *pytorch.providers(eager),
        Provider("torch.compile", "cuda", compiled, torch_compile.absent, engine="torch", slow_start=True),
    ),
)


GRADIENTS = "dx dweight dbias"
WHOLE = Sample(
    "x weight bias labels",
    f"loss {GRADIENTS} workspace",
    lambda a: bn.linear_softmax_cross_entropy(
        *take(a, "x weight bias labels"), workspace=a["workspace"], out=take(a, f"loss {GRADIENTS}")
    ),
    specs={
        **dict.fromkeys(("x", "dx"), "T NK"),
        **dict.fromkeys(("weight", "dweight"), "T KO"),
        **dict.fromkeys(("bias", "dbias"), "A O"),
        "workspace": "T NO",
    },
    sizes=tuple({"N": rows, "K": 40, "O": 33} for rows in (10, 100, 300)),  # up to two tiles of rows
    dtypes=("float32", "float64"),
    counted=True,
)
SAMPLES = {"linear_softmax_cross_entropy": WHOLE}
VARIANTS = {"linear_softmax_cross_entropy_int64": replace(WHOLE, specs={**WHOLE.specs, "labels": "int64 N"})}
