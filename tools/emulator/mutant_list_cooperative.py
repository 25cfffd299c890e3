"""The bugs that `mutants.py` plants in the cooperative batch-norm kernels."""

from __future__ import annotations

from .mutants import Mutant

BARRIER, SLICES, VECTOR = "lib/sync/grid_barrier.cuh", "lib/reduce/cooperative_slices.cuh", "lib/numbers/vector.cuh"
FORWARD, BACKWARD = "batch_norm_forward_cooperative.cu", "batch_norm_backward_cooperative.cu"

MUTANTS = [
    Mutant(
        "cooperative: a block arrives without a fence",
        BARRIER,
        "    __threadfence();\n    return atomicAdd",
        "    return atomicAdd",
        ("tsan",),
        "test_the_order_of_blocks_and_threads_changes_no_bit and shape1",
    ),
    Mutant(
        "cooperative: no block barrier behind the grid barrier",
        BARRIER,
        "        __threadfence();\n    }\n    __syncthreads();\n",
        "        __threadfence();\n    }\n",
    ),
    Mutant("cooperative: nobody waits", BARRIER, "        bnk_wait(counter, token);\n", ""),
    Mutant("cooperative: the first block arrives as the others", BARRIER, "block == 0 ?", "block == blocks ?"),
    Mutant(
        "cooperative: a grid barrier waits for one block more",
        BARRIER,
        "BARRIER_PHASE - (blocks - 1)",
        "BARRIER_PHASE - blocks",
    ),
    Mutant(
        "cooperative: a grid barrier waits for one block less",
        BARRIER,
        "BARRIER_PHASE - (blocks - 1)",
        "BARRIER_PHASE - (blocks - 2)",
    ),
    Mutant(
        "cooperative: the next slice's partial results over those of this one",
        SLICES,
        "(odd ? gridDim.x : 0)",
        "0",
        ("plain", "tsan"),
        "test_the_order_of_blocks_and_threads_changes_no_bit and shape0",
    ),
    Mutant("cooperative: all threads keep their rows in the same place", VECTOR, "own[i * threads]", "own[i]"),
    Mutant(
        "cooperative: the last eight of the partial results are not whole",
        SLICES,
        "min(first + COOPERATIVE_FAN_IN, blocks)",
        "8",
    ),
    Mutant("vector: the second half of a word erases the first", VECTOR, "& 0xffffu : 0u", "& 0u : 0u"),
    Mutant(
        "forward cooperative: every block updates the running statistics",
        FORWARD,
        "if (threadIdx.y == 0 && blockIdx.y == 0) write",
        "if (threadIdx.y == 0) write",
    ),
    Mutant(
        "forward cooperative: rows that are not held are looked for in shared memory",
        FORWARD,
        "first + i < a.held ? held",
        "true ? held",
    ),
    Mutant(
        "forward cooperative: no barrier before the next slice",
        FORWARD,
        "        __syncthreads();  // all threads have read the merged moments\n",
        "",
        ("plain", "tsan"),
        "test_the_order_of_blocks_and_threads_changes_no_bit and shape0",
    ),
    Mutant(
        "forward cooperative: a chunk that is not the first replaces the others",
        FORWARD,
        "if (!first) moments",
        "if (false) moments",
    ),
    Mutant(
        "backward cooperative: dx without the mean of g xhat",
        BACKWARD,
        "fma(gradient.centred[j], means.slope[own], means.g[own])",
        "means.g[own]",
    ),
    Mutant(
        "backward cooperative: dy is kept where x is",
        BACKWARD,
        "held_dy[first + i] = chunk[0].dy",
        "held_x[first + i] = chunk[0].dy",
    ),
]
