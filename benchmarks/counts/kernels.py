"""What each kernel does at the size of the question, counted on the emulator: launch, bytes, barriers.

``python -m benchmarks.counts.kernels`` prints it and writes ``benchmarks/results/kernels.json``; with
``benchmarks.report`` it gets into ``docs/generated/kernels.md``. It needs g++ and no GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.counts.devices import H200
from benchmarks.harness.timing import RESULTS, write_json
from tools.backends import emulated_runtime

ROWS, INPUTS, NEURONS, CLASSES = 64, 64, 20, 10


def count() -> list[dict[str, Any]]:
    """Call every op once on emulated kernels, in the shapes of a 64-20-10 network's training step with 64 examples.

    Returns
    -------
    list of dict
        For each launch `op`, `source` (stem in ``cuda/``), `kernel`, `grid`, `block`, `barriers`, and `read` and
        `written`: bytes of global memory that were touched, each counted once.
    """
    runtime = emulated_runtime()
    rng = np.random.default_rng(0)

    def new(*shape: int) -> Any:
        return runtime.asarray(rng.uniform(0.5, 1.5, shape).astype(np.float32))

    x, dy, logits = new(ROWS, NEURONS), new(ROWS, NEURONS), new(ROWS, CLASSES)
    gamma, beta, running_mean, running_var = (new(NEURONS) for _ in range(4))
    labels = runtime.asarray(rng.integers(CLASSES, size=ROWS).astype(np.int32))
    parameters, gradients, first, second = (new(bn.MLP((64, NEURONS, CLASSES)).parameters.size) for _ in range(4))
    _, statistics = bn.batch_norm_forward(x, gamma, beta)
    inputs, weight = new(ROWS, INPUTS), new(INPUTS, NEURONS)
    layer, behind = bn.linear_batch_norm_forward, bn.linear_batch_norm_backward
    _, *kept = layer(inputs, weight, gamma, beta)
    of_rows = bn.layer_norm_forward(x, gamma, beta)[1]
    schedule, counter = new(1, 3), runtime.asarray(np.zeros(2, np.uint32))
    out = new(ROWS, INPUTS), runtime.asarray(np.zeros(ROWS, np.int32)), new(3)
    affine, running = (gamma, beta), (running_mean, running_var)
    calls = {
        "batch_norm_forward": lambda: bn.batch_norm_forward(x, *affine, *running, activation="relu"),
        "batch_norm_backward": lambda: bn.batch_norm_backward(dy, x, *affine, statistics, activation="relu"),
        "batch_norm_inference": lambda: bn.batch_norm_inference(x, *affine, *running, activation="relu"),
        "batch_norm_inference_backward": lambda: bn.batch_norm_inference_backward(
            dy, x, *affine, *running, activation="relu"
        ),
        "layer_norm_forward": lambda: bn.layer_norm_forward(x, *affine, activation="relu"),
        "layer_norm_backward": lambda: bn.layer_norm_backward(dy, x, *affine, of_rows, activation="relu"),
        "linear_batch_norm_forward": lambda: layer(inputs, weight, *affine, *running, activation="relu"),
        "linear_batch_norm_backward": lambda: behind(dy, inputs, weight, *affine, *kept, activation="relu"),
        "mini_batch": lambda: bn.mini_batch(inputs, labels, schedule, counter, out=out),
        "softmax_cross_entropy": lambda: bn.softmax_cross_entropy(logits, labels),
        "sgd_update": lambda: bn.sgd_update(parameters, gradients, lr=0.1),
        "momentum_update": lambda: bn.momentum_update(parameters, gradients, first, lr=0.1),
        "adam_update": lambda: bn.adam_update(parameters, gradients, first, second, step=1, lr=0.1),
    }
    rows = []
    for op, call in calls.items():
        runtime.reset()
        with runtime.device_limits(H200.choice):  # as the launches of an H200
            call()
        for record in runtime.launches:
            total = record.counts.total
            rows.append(
                {
                    "op": op,
                    "source": record.source,
                    "kernel": record.entry_point,
                    "grid": list(record.launch.grid),
                    "block": list(record.launch.block),
                    "barriers": record.counts.barriers,
                    "read": total.unique_bytes_read,
                    "written": total.unique_bytes_written,
                }
            )
    return rows


def main() -> None:
    """Count, print and write."""
    rows = count()
    for row in rows:
        print(row)
    write_json(RESULTS / "kernels.json", {"rows": ROWS, "neurons": NEURONS, "classes": CLASSES, "kernels": rows})


if __name__ == "__main__":
    main()
