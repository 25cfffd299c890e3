"""Bugs of the kernels that spread over the whole device: see `mutant_list.py`."""

from __future__ import annotations

from .mutants import Mutant

MEET, SPREAD, VECTOR = "meet.cuh", "spread.cuh", "vector.cuh"
FORWARD_SPREAD, BACKWARD_SPREAD = "batch_norm_forward_spread.cu", "batch_norm_backward_spread.cu"

MUTANTS = [
    Mutant(
        "spread: a block arrives without a fence",
        MEET,
        "    __threadfence();\n    return atomicAdd",
        "    return atomicAdd",
        ("tsan",),
        "test_the_order_of_blocks_and_threads_changes_no_bit and shape1",
    ),
    Mutant(
        "spread: no barrier behind the meeting",
        MEET,
        "        __threadfence();\n    }\n    __syncthreads();\n",
        "        __threadfence();\n    }\n",
    ),
    Mutant("spread: nobody waits", MEET, "        bnk_wait(counter, ticket);\n", ""),
    Mutant("spread: the first block arrives as the others", MEET, "block == 0 ?", "block == blocks ?"),
    Mutant("spread: a meeting waits for one block more", MEET, "MEETING - (blocks - 1)", "MEETING - blocks"),
    Mutant("spread: a meeting waits for one block less", MEET, "MEETING - (blocks - 1)", "MEETING - (blocks - 2)"),
    Mutant(
        "spread: the next slice's partial results over those of this one",
        SPREAD,
        "(odd ? gridDim.x : 0)",
        "0",
        ("plain", "tsan"),
        "test_the_order_of_blocks_and_threads_changes_no_bit and shape0",
    ),
    Mutant("spread: all threads keep their rows in the same place", SPREAD, "own[row * threads]", "own[row]"),
    Mutant("spread: the last eight of the partial results are not whole", SPREAD, "min(first + FAN_IN, blocks)", "8"),
    Mutant("vector: the second half of a word erases the first", VECTOR, "& 0xffffu : 0u", "& 0u : 0u"),
    Mutant(
        "forward spread: every block updates the running statistics",
        FORWARD_SPREAD,
        "if (threadIdx.y == 0 && blockIdx.y == 0) write",
        "if (threadIdx.y == 0) write",
    ),
    Mutant(
        "forward spread: rows that are not held are looked for in shared memory",
        FORWARD_SPREAD,
        "first + i < a.held ? held",
        "true ? held",
    ),
    Mutant(
        "forward spread: no barrier before the next slice",
        FORWARD_SPREAD,
        "        __syncthreads();  // all have seen the merged moments\n",
        "",
        ("plain", "tsan"),
        "test_the_order_of_blocks_and_threads_changes_no_bit and shape0",
    ),
    Mutant(
        "forward spread: a chunk that is not the first replaces the others",
        FORWARD_SPREAD,
        "if (!first) moments",
        "if (false) moments",
    ),
    Mutant(
        "backward spread: dx without the mean of g xhat",
        BACKWARD_SPREAD,
        "fma(gradient.centred[j], means.slope[own], means.g[own])",
        "means.g[own]",
    ),
    Mutant(
        "backward spread: dy is kept where x is",
        BACKWARD_SPREAD,
        "held_dy[first + i] = chunk[0].dy",
        "held_x[first + i] = chunk[0].dy",
    ),
]
