"""The next mini-batch, by indices in an order that a counter on the device goes through: against indexing.

Whoever indexes knows on the host which step it is; only ours can be replayed in a graph and go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import expression, pytorch

SHAPES = [(64, 64), (60, 784), (512, 1024)]  # mini-batch, inputs
EXAMPLES = 4096


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return all examples, their labels, and which rows are the mini-batch.

    Raises
    ------
    NotSupportedError
        For 16-bit data, and for what belongs to other ops.
    """
    if case.dtype not in ("float32", "float64") or case.layout != "NC" or case.epilogue:
        raise NotSupportedError("mini_batch is for (N, K) in float32 or float64")
    labels, indices = ((abs(random(shape)) * 1e6).astype("int32") for shape in ((EXAMPLES,), (1, case.shape[0])))
    return {"x": random((EXAMPLES, case.shape[1])), "labels": labels % 10, "indices": indices % EXAMPLES}


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare ours; the counter is put back, since there is one mini-batch."""
    x, labels, indices = (arrays[name] for name in ("x", "labels", "indices"))
    schedule, counter = x[:1, :1].copy(), (labels[:2] * 0).astype("uint32")
    zero = counter.copy()
    out = x[: case.shape[0]].copy(), labels[: case.shape[0]].copy(), schedule[0].copy()

    def call() -> tuple:
        counter[...] = zero
        return bn.mini_batch(x, labels, schedule, counter, indices=indices, out=out)[:2]

    return call


def indexing(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write."""
    x, labels, indices = (arrays[name] for name in ("x", "labels", "indices"))
    return lambda: (x[indices[0]], labels[indices[0]])


def eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's indexing."""
    x, labels, indices = (pytorch.tensor_of(arrays[name]) for name in ("x", "labels", "indices"))
    rows = indices[0].long()  # PyTorch needs int64
    return lambda: (x[rows], labels[rows])


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the mini-batch of float64 examples."""
    return indexing(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of the mini-batch, its labels and indices; the first two are read and written."""
    return 2 * case.size * case.itemsize + case.shape[0] * 12


OP = Op(
    "mini_batch",
    cases=[Case("mini_batch", "forward", shape) for shape in SHAPES],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(indexing), *pytorch.providers(eager)),
)


OUTPUTS = "x_out labels_out scalars"
FIRST = Sample(
    "x labels schedule",
    f"{OUTPUTS} counter",
    lambda a: bn.mini_batch(*take(a, "x labels schedule counter"), out=take(a, OUTPUTS)),
    specs={"x": "T EK", "labels": "int32 E", "schedule": "A S3", "indices": "int32 SN", "counter": "uint32 2"}
    | {"x_out": "T NK", "labels_out": "int32 N"},
    sizes=(
        {"S": 5, "N": 20, "E": 100, "K": 6},
        {"S": 5, "N": 20, "E": 100, "K": 7},
        {"S": 5, "N": 20, "E": 100, "K": 8},
    ),  # vectors, or not
    dtypes=("float32", "float64"),
    counted=True,
)
SAMPLES = {
    "mini_batch": FIRST,
    "mini_batch_by_indices": replace(
        FIRST,
        reads="x labels schedule indices",
        run=lambda a: bn.mini_batch(*take(a, "x labels schedule counter"), indices=a["indices"], out=take(a, OUTPUTS)),
        counted=False,
    ),
}
