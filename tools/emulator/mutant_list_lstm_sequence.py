"""The bugs that `mutants.py` plants in a sequence of the LSTM in one launch."""

from __future__ import annotations

from .mutant_list_lstm import FORMULAS, GRADIENTS, ITEMS, POPULATION, RAGGED, SCHEDULES
from .mutants import Mutant

SEQUENCE, SEQUENCE_BACKWARD = "lstm_forward_cooperative.cu", "lstm_backward_cooperative.cu"

MUTANTS = [
    Mutant(
        "lstm sequence: the next step before all hidden states are there",
        SEQUENCE,
        "grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);",
        "__syncthreads();",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm sequence: the gates of an example before all products are there",
        SEQUENCE,
        "a.h_part[pair.gate(gate)] = sums[gate];\n    }\n    __syncthreads();",
        "a.h_part[pair.gate(gate)] = sums[gate];\n    }",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm sequence: the weights of another unit",
        SEQUENCE,
        "weight_hh[(gate * a.units + u) * a.units + k]",
        "weight_hh[(gate * a.units + u) * a.units + u]",
        select=FORMULAS,
    ),
    Mutant(
        "lstm sequence: weights before all are there",
        SEQUENCE,
        "load_weights<NORM>(a, weights);\n    __syncthreads();",
        "load_weights<NORM>(a, weights);",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm sequence: every step begins with the first state", SEQUENCE, "        h = step.h;\n", "", select=FORMULAS
    ),
    Mutant(
        "lstm sequence: the cell of the first step stays",
        SEQUENCE,
        "if (t > 0) a.before =",
        "if (false) a.before =",
        select=FORMULAS,
    ),
    Mutant(
        "lstm sequence: steps beyond move the last population",
        SEQUENCE,
        "a.live && t < a.tracked && a.count",
        "a.live && a.count",
        select=POPULATION,
    ),
    Mutant(
        "lstm sequence: one example moves the population",
        SEQUENCE,
        "a.count > A(1)",
        "a.count > A(0)",
        select=POPULATION,
    ),
    Mutant(
        "lstm sequence: the examples of the first step in all",
        SEQUENCE,
        "a.count = a.counts[t];",
        "a.count = a.counts[0];",
        select=RAGGED,
    ),
    Mutant(
        "lstm sequence backward: the step before, before all gradients are there",
        SEQUENCE_BACKWARD,
        "grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);",
        "__syncthreads();",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm sequence backward: half of the gates",
        SEQUENCE_BACKWARD,
        "c < units; ++c",
        "c < units / 2; ++c",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm sequence backward: gradients of inputs go to the state",
        SEQUENCE_BACKWARD,
        "NORM == PLAIN ? step.dx_part : step.dh_part",
        "step.dx_part",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm sequence backward: the sums of one step",
        SEQUENCE_BACKWARD,
        "if (a.sums) a.sums += t * a.sums_pitch;",
        "",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm sequence backward: the examples of the first step in all",
        SEQUENCE_BACKWARD,
        "A(1) / a.counts[t]",
        "A(1) / a.counts[0]",
        select=RAGGED,
    ),
    Mutant(
        "lstm sequence by example: weights of the first warp's units alone",
        SEQUENCE,
        "u < (int)a.units; u += warps",
        "u < warps; u += warps",
        select=FORMULAS,
    ),
    Mutant(
        "lstm sequence by example: weights for the units of the first warp",
        SEQUENCE,
        "k < (int)a.units; k += WARP",
        "k < WARP; k += WARP",
        select=FORMULAS,
    ),
    Mutant(
        "lstm sequence by example: the products before all hidden states are there",
        SEQUENCE,
        "= h[pair.state()];\n        __syncthreads();",
        "= h[pair.state()];",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm sequence by example: all examples have the states of the first",
        SEQUENCE,
        "rows + threadIdx.y * units : h",
        "rows : h",
        select=FORMULAS,
    ),
    Mutant(
        "lstm sequence by example: weights of the unit before",
        ITEMS,
        "NORM == LAYER ? (int)u : threadIdx.x;",
        "NORM == LAYER ? max((int)u - 1, 0) : threadIdx.x;",
        select=FORMULAS,
    ),
    Mutant(
        "lstm sequence backward by example: the products before all gradients are there",
        SEQUENCE_BACKWARD,
        "= dh_part[pair.gate(gate)];\n        __syncthreads();",
        "= dh_part[pair.gate(gate)];",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm sequence backward by example: gradients of the gates of one step",
        SEQUENCE_BACKWARD,
        "        a.da += t * GATES * state;\n",
        "",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm sequence backward by example: gradients of the cell's norm of one step",
        SEQUENCE_BACKWARD,
        "        a.dz += t * state;\n",
        "",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm sequence backward by example: weights of units that are not there",
        SEQUENCE_BACKWARD,
        "        if (NORM != LAYER || there)\n",
        "",
        select=GRADIENTS,
    ),
]
