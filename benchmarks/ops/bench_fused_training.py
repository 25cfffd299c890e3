"""A hundred training steps of a network with one hidden layer: one launch, or as many as there are layers and steps.

The rivals' steps, in frameworks, are in ``bench_train_step.py``, where ours takes part as "bnkernels fused" too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.places import array_module, why_absent
from benchmarks.harness.samples import Sample, take
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.ops.fused_training.launch import Problem, why_not
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.runtime.registry import runtime_of
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


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare all steps as one call, from the first weights every time.

    Raises
    ------
    NotSupportedError
        If the network does not fit the GPU.
    """
    x, labels, batch = arrays["x"], arrays["labels"], case.shape[0]
    model = network_of(case, array_module(x))
    sizes = Problem(model.fused, batch, "sgd", model.parameters.dtype, model.parameters.size, model.running.size)
    runtime = runtime_of(type(x))
    if runtime is not None and (reason := why_not(sizes, runtime.limits(x))):
        raise NotSupportedError(reason)
    first, running, network = model.parameters.copy(), model.running.copy(), model.fused
    tracked = model.running if model.running.size else None

    def call() -> tuple:
        model.parameters[...], model.running[...] = first, running
        return (bn.fused_training(network, model.parameters, (), tracked, x, labels, batch=batch, lr=LR),)

    return call


def layers(case: Case, arrays: Arrays) -> Call:
    """Prepare the same steps layer by layer."""
    x, labels, batch = arrays["x"], arrays["labels"], case.shape[0]
    xp = array_module(x)
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
    to_host = getattr(xp, "asnumpy", np.asarray)
    on_host = {name: to_host(array) for name, array in arrays.items()}
    model = network_of(case, None)
    given = model.parameters, (), model.running if model.running.size else None, on_host["x"], on_host["labels"]
    return (xp.asarray(bn.fused_training(model.fused, *given, batch=case.shape[0], lr=LR)),)


def bytes_moved(case: Case) -> int:
    """Return the bytes of examples, labels and losses."""
    rows = STEPS * case.shape[0]
    return rows * (FEATURES * case.itemsize + 4) + STEPS * case.itemsize


OP = Op(
    "fused_training",
    cases=[Case("fused_training", direction, shape) for shape in ((64, 20), (64, 100)) for direction in NORMS],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *on_both("bnkernels, layer by layer", layers, why_absent)),
)


def sample_of(network: NetworkSpec, sizes: dict[str, int], optimizer: str = "sgd") -> Sample:
    """Return a training of some steps; `sizes` has the number of parameters P, and of running statistics R if any."""
    writes = "losses parameters" + " velocity" * (optimizer == "momentum") + " running" * ("R" in sizes)

    def run(a: Arrays) -> Any:
        state = (a["velocity"],) if optimizer == "momentum" else ()
        return bn.fused_training(
            network,
            a["parameters"],
            state,
            a.get("running"),
            *take(a, "x labels"),
            batch=sizes["N"],
            indices=a["indices"],
            optimizer=optimizer,
            lr=0.1,
            out=a["losses"],
        )

    return Sample(
        "x labels indices",
        writes,
        run,
        specs={"x": "T EK", "labels": "int32 E", "indices": "int32 SN", "losses": "A MS"}
        | {"parameters": "A MP", "velocity": "A MP", "running": "A MR"},
        fixed=sizes,
        dtypes=("float32", "float64"),
    )


def sample_of_mlp(norm: str, hidden: int, rows: int, **more: int) -> Sample:
    """Return a training of a network with one hidden layer by mini-batches of so many rows."""
    model = bn.MLP((6, hidden, 3), norm=norm, activation="tanh")
    sizes = {"K": 6, "N": rows, "S": 2, "E": 2 * rows, "P": model.parameters.size, **more}
    return sample_of(model.fused, sizes | ({"R": model.running.size} if model.running.size else {}))


NETWORK = NetworkSpec((LayerSpec(4, 4, 0, 16, 20, 0, 4), LayerSpec(4, 3, 24, -1, 36)))
SAMPLES = {
    "fused_training": replace(  # the variants launch the kernels
        sample_of(NETWORK, {"K": 4, "N": 6, "S": 2, "E": 12, "P": 40, "R": 8}, "momentum"), sizes=()
    ),
}
VARIANTS = {
    "fused_training_models": sample_of_mlp("batch", 9, 20, M=2),
    # One block takes smaller mini-batches: several blocks, in a cluster up to 32 neurons, else in a grid.
    **{
        f"fused_training_{norm}_norm_{hidden}_{rows}": sample_of_mlp(norm, hidden, rows)
        for norm in ("batch", "layer")
        for hidden, rows in ((9, 20), (9, 260), (36, 260))
    },
}
