"""The bugs that `mutants.py` plants in the last layer with its loss."""

from __future__ import annotations

from .mutants import Mutant

KERNEL = "linear_softmax_cross_entropy.cu"
EXACT = "test_matches_extended_precision"
SCHEDULES = "test_the_order_of_blocks_and_threads_changes_no_bit"

MUTANTS = [
    Mutant(
        "linear softmax: a label one past the last class", KERNEL, "label < logits.count ?", "label <= logits.count ?"
    ),
    Mutant(
        "linear softmax: exp of logits that were not shifted", KERNEL, "exp(logits.row[m] - top)", "exp(logits.row[m])"
    ),
    Mutant("linear softmax: the gradient of a sum", KERNEL, "T(1) / T(a.rows)", "T(1)", select=EXACT),
    Mutant("linear softmax: the bias of another class", KERNEL, "a.bias[r]", "a.bias[c]", select=EXACT),
    Mutant(
        "linear softmax: dlogits are stored early",
        KERNEL,
        "        __syncthreads();\n        store_rows",
        "        store_rows",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "linear softmax: dweight before all dlogits are there",
        KERNEL,
        "    if (gridDim.x > 1) grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);  // dlogits of all examples\n",
        "",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "linear softmax: dbias of dlogits that are still being loaded",
        KERNEL,
        "  // (width, examples)\n        __syncthreads();",
        "",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "linear softmax: one tile of classes of each block",
        KERNEL,
        "column < outputs; column += step",
        "column < min(outputs, first + width); column += step",
        select=EXACT,
    ),
]
