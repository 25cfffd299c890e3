"""Softmax cross-entropy with its gradient: losses and gradient of their mean, from logits and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import expression, pytorch

SHAPES = [(64, 10), (256, 1000), (4096, 1000)]  # examples, classes
LABEL_BYTES = 4
SPREAD = 1e6  # times a normal number, modulo the classes: a label


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return logits and labels.

    Raises
    ------
    NotSupportedError
        For 16-bit logits, and for what belongs to other ops: layouts and epilogues.
    """
    if case.dtype not in ("float32", "float64") or case.layout != "NC" or case.epilogue:
        raise NotSupportedError("softmax_cross_entropy is for (N, K) in float32 or float64")
    examples, classes = case.shape
    labels = (abs(random((examples,))) * SPREAD).astype(np.int32) % classes
    return {"logits": random(case.shape), "labels": labels}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare ours."""
    logits, labels = arrays["logits"], arrays["labels"]
    out = bn.softmax_cross_entropy(logits, labels)
    return lambda: bn.softmax_cross_entropy(logits, labels, out=out)


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write."""
    logits, labels = arrays["logits"], arrays["labels"]
    classes = np.arange(logits.shape[1], like=labels)  # for CuPy arrays NumPy hands this on to CuPy

    def call() -> tuple:
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        totals = exponentials.sum(axis=1, keepdims=True)
        at_label = labels[:, np.newaxis] == classes
        losses = np.log(totals[:, 0]) - (shifted * at_label).sum(axis=1)
        return losses, (exponentials / totals - at_label) / len(labels)

    return call


def eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's loss, and its gradient by autograd."""
    torch = pytorch.load()
    logits, labels = (pytorch.tensor_of(arrays[name]) for name in ("logits", "labels"))
    logits.requires_grad_()
    labels = labels.long()  # PyTorch needs int64

    def call() -> tuple:
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        (dlogits,) = torch.autograd.grad(losses.mean(), logits)
        return losses.detach(), dlogits

    return call


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return losses and gradient of float64 logits."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of logits and labels, which are read, and of gradient and losses, which are written."""
    examples = case.shape[0]
    return 2 * case.size * case.itemsize + examples * (LABEL_BYTES + case.itemsize)


OP = Op(
    "softmax_cross_entropy",
    cases=[Case("softmax_cross_entropy", "forward+backward", shape) for shape in SHAPES],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(formulas), *pytorch.providers(eager)),
)


FORWARD = Sample(
    "logits labels",
    "loss dlogits",
    lambda a: bn.softmax_cross_entropy(*take(a, "logits labels"), out=take(a, "loss dlogits")),
    sizes=({"N": 10, "O": 33}, {"N": 300, "O": 33}, {"N": 3, "O": 150}),  # classes in registers, or not
    dtypes=("float32", "float64"),
    counted=True,
)
SAMPLES = {"softmax_cross_entropy": FORWARD}
VARIANTS = {"softmax_cross_entropy_int64": replace(FORWARD, specs={"labels": "int64 N"})}
