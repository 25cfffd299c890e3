"""A hundred training steps of a network with one hidden layer: one launch, or as many as there are layers and steps.

The rivals' steps, in frameworks, are in ``bench_train_step.py``, where ours takes part as "bnkernels fused" too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, Provider
from benchmarks.harness.places import why_absent
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.ops.fused_training.launch import Problem, why_not
from bnkernels.train.config import DEFAULT_LEARNING_RATES

STEPS, FEATURES, CLASSES = 100, 64, 10
LR = DEFAULT_LEARNING_RATES["sgd"]
NORMS = {"100 steps with batch norm": "batch", "100 steps without": "none"}


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return the examples of all steps and their labels; the shape is (mini-batch, units).

    Raises
    ------
    NotSupportedError
        For an epilogue, another layout, or 16-bit data.
    """
    if case.epilogue or len(case.shape) != 2 or case.itemsize == 2:
        raise NotSupportedError(f"{case.op} is for (mini-batch, units) in float32 or float64 and no epilogue")
    rows = STEPS * case.shape[0]
    return {"x": random((rows, FEATURES)), "labels": (abs(random((rows,))) * 1000).astype("int32") % CLASSES}


def network_of(case: Case, xp: Any) -> bn.MLP:
    """Return the network with its first weights."""
    dtype = case.dtype if xp is not None else "float64"
    return bn.MLP((FEATURES, case.shape[1], CLASSES), norm=NORMS[case.direction], dtype=dtype, xp=xp or np)


def ours(case: Case, arrays: Arrays, xp: Any = np) -> Call:
    """Prepare all steps as one call, from the first weights every time."""
    x, labels, batch = arrays["x"], arrays["labels"], case.shape[0]
    model = network_of(case, xp)
    first, running, network = model.parameters.copy(), model.running.copy(), model.fused
    tracked = model.running if model.running.size else None

    def call() -> tuple:
        model.parameters[...], model.running[...] = first, running
        return (bn.fused_training(network, model.parameters, (), tracked, x, labels, batch=batch, lr=LR),)

    return call


def on_cupy(prepare: Callable[..., Call], case: Case, arrays: Arrays) -> Call:
    """Prepare on a GPU.

    Raises
    ------
    NotSupportedError
        If the network does not fit.
    """
    import cupy

    from bnkernels.runtime.registry import runtime_of

    model = network_of(case, cupy)
    sizes = Problem(
        model.fused, case.shape[0], "sgd", model.parameters.dtype, model.parameters.size, model.running.size
    )
    if prepare is ours and (reason := why_not(sizes, runtime_of(type(model.parameters)).limits(model.parameters))):
        raise NotSupportedError(reason)
    return prepare(case, arrays, cupy)


def layers(case: Case, arrays: Arrays, xp: Any = np) -> Call:
    """Prepare the same steps layer by layer."""
    x, labels, batch = arrays["x"], arrays["labels"], case.shape[0]
    model = network_of(case, xp)
    first, running, optimizer = model.parameters.copy(), model.running.copy(), make_optimizer("sgd", model, LR)
    losses = xp.empty((STEPS, batch), case.dtype)

    def call() -> tuple:
        model.parameters[...], model.running[...] = first, running
        for step in range(STEPS):
            rows = slice(step * batch, (step + 1) * batch)
            logits = model.forward(x[rows], training=True)
            losses[step], dlogits = bn.softmax_cross_entropy(logits, labels[rows])
            model.backward(dlogits)
            optimizer.step()
        return (losses.mean(axis=1),)

    return call


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right losses from float64 arrays."""
    host = getattr(xp, "asnumpy", np.asarray)
    on_host = {name: host(array) for name, array in arrays.items()}
    model = network_of(case, None)
    given = model.parameters, (), model.running if model.running.size else None, on_host["x"], on_host["labels"]
    return (xp.asarray(bn.fused_training(model.fused, *given, batch=case.shape[0], lr=LR)),)


def bytes_moved(case: Case) -> int:
    """Return the bytes of examples, labels and losses."""
    rows = STEPS * case.shape[0]
    return rows * (FEATURES * case.itemsize + 4) + STEPS * case.itemsize


OP = Op(
    name="fused_training",
    cases=[Case("fused_training", direction, shape) for shape in ((64, 20), (64, 100)) for direction in NORMS],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(
        Provider("bnkernels", "cpu", ours),
        Provider("bnkernels", "cuda", partial(on_cupy, ours), engine="cupy"),
        Provider("bnkernels, layer by layer", "cpu", layers),
        Provider(
            "bnkernels, layer by layer", "cuda", partial(on_cupy, layers), partial(why_absent, "cuda"), engine="cupy"
        ),
    ),
)
