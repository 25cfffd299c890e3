"""The bugs that `mutants.py` plants in the fused training steps."""

from __future__ import annotations

from .mutants import Mutant

FUSED, STEP, SUBWARP, NETWORK = (
    "fused_training.cu",
    "lib/train/block_step.cuh",
    "lib/gemm/subwarp.cuh",
    "lib/train/network.cuh",
)
OF_LAYER = "test_steps_are_those_of_the_layers and sgd and layer"
STEPS = "test_steps_are_those_of_the_layers and sgd"

MUTANTS = [
    Mutant(
        "fused: all models have the learning rate of the first",
        NETWORK,
        "a.rates += model",
        "a.rates += 0",
        select="model_of_an_ensemble",
    ),
    Mutant(
        "fused: all models have the indices of the first",
        NETWORK,
        "a.indices += model * a.index_stride",
        "a.indices += 0",
        select="model_of_an_ensemble",
    ),
    Mutant(
        "fused: no barrier behind a layer",
        STEP,
        "            forward(layer, step);\n            __syncthreads();\n",
        "            forward(layer, step);\n",
        select=STEPS,
    ),
    Mutant(
        "fused: weights change before the gradients have used them",
        STEP,
        "            backward(layer, step);\n            __syncthreads();\n",
        "            backward(layer, step);\n",
        select=STEPS,
    ),
    Mutant(
        "fused: the next step begins before this one has ended",
        STEP,
        "        wait_for_copies();\n        __syncthreads();\n",
        "        wait_for_copies();\n",
        ("plain", "tsan"),
        "test_steps_are_those_of_the_layers and sgd and sizes0",
    ),
    Mutant(
        "fused: the next mini-batch is not waited for",
        STEP,
        "        wait_for_copies();\n        __syncthreads();\n",
        "        if (step + 1 >= a.steps) wait_for_copies();\n        __syncthreads();\n",
        select=STEPS,
    ),
    Mutant(
        "fused: rows are looked up a step too late",
        STEP,
        "choose_rows(step + 2);",
        "choose_rows(step + 1);",
        select="indices",
    ),
    Mutant(
        "fused: labels of the step before",
        STEP,
        "labels_of(step)[n];",
        "labels_of(step + 1)[n];",
        select=STEPS,
    ),
    Mutant(
        "fused: a tile reads the rows of its neighbour",
        STEP,
        "min(input + i * apart, inputs - 1)",
        "min(input + i, inputs - 1)",
        select=STEPS,
    ),
    Mutant(
        "fused: a tile is left out",
        STEP,
        "            tile -= tiles;  // its",
        "            tile -= tiles - 1;  // its",
        select=STEPS,
    ),
    Mutant(
        "fused: half of the classes are not added",
        STEP,
        "            total += __shfl_xor_sync(0xffffffffu, total, 1);\n",
        "",
        select=STEPS,
    ),
    Mutant(
        "fused: the next mini-batch over this one",
        STEP,
        "smem.x + (int)(step & 1) * field(0, INPUTS) * subwarp.pitch",
        "smem.x",
        select=STEPS,
    ),
    Mutant(
        "fused: what all examples have in common stays",
        STEP,
        "subwarp.subtract(z, shift);",
        "subwarp.subtract(z, T(0));",
        select="equal_examples_and_neurons",
    ),
    Mutant(
        "fused: the running mean lacks the first example",
        STEP,
        "return {shift + mean, m2,",
        "return {mean, m2,",
        select="running_mean_of_equal",
    ),
    Mutant("fused: dz without the mean of g", STEP, "fma(z[i], slope_z, mean_g)", "z[i] * slope_z", select=STEPS),
    Mutant(
        "fused: beta's gradient goes to gamma",
        STEP,
        "move(gamma + neuron, sum_product * rstd, step)",
        "move(gamma + neuron, sum_g, step)",
        select=STEPS,
    ),
    Mutant(
        "fused: Adam without its first correction",
        NETWORK,
        "+ a.optimizer_eps) / step[1]",
        "+ a.optimizer_eps)",
        select="adam and 30",
    ),
    Mutant(
        "fused: Adam's second moment is divided before its root is taken",
        NETWORK,
        "sqrt(square) / step[2]",
        "sqrt(square / (step[2] * step[2]))",
        select="adams_first_step",
    ),
    Mutant(
        "fused: rows are taken in their order",
        NETWORK,
        "a.indices ? a.indices[n] : (int)n",
        "(int)n",
        select="indices",
    ),
    Mutant("fused: every call draws the same", NETWORK, "a.first_step * a.batch + n", "n", select="draws_on"),
    Mutant("fused: a round of Philox less", NETWORK, "round < 10", "round < 9", select="random_rows"),
    Mutant(
        "fused: all models draw what the first does", NETWORK, "a.seeds += model", "a.seeds += 0", select="draw_its_own"
    ),
    Mutant(
        "fused: the gradient of a sum, not of a mean",
        STEP,
        "const T scale = share / total;",
        "const T scale = T(1) / total;",
        select=STEPS,
    ),
    Mutant(
        "fused: the state is not written back",
        FUSED,
        "    copy(a.first, smem.first, a.parameter_count);\n",
        "",
        select="two_calls",
    ),
    Mutant(
        "subwarp: examples that are not there are added",
        SUBWARP,
        "has(i) ? values[i] - less : T(0)",
        "values[i] - less",
        select=STEPS,
    ),
    Mutant(
        "subwarp: examples that are not there are kept",
        SUBWARP,
        "has(i + j) ? values[i + j] : T(0)",
        "values[i + j]",
        select=STEPS,
    ),
    Mutant(
        "fused layer norm: dz without the mean",
        STEP,
        "z[m * pitch], slope, mean)",
        "z[m * pitch], slope, T(0))",
        select=OF_LAYER,
    ),
    Mutant(
        "fused layer norm: rstd of the layer before",
        STEP,
        "smem.rstd[layer * pitch + n] = rstd",
        "smem.rstd[n] = rstd",
        select=OF_LAYER,
    ),
    Mutant(
        "fused layer norm: the next layer reads what is not normalised yet",
        STEP,
        "normalise_examples(layer);\n                __syncthreads();",
        "normalise_examples(layer);",
        ("plain", "tsan"),
        OF_LAYER,
    ),
    Mutant(
        "fused layer norm: the mean keeps what rounding left",
        STEP,
        "((z[m * pitch] - mean) - remainder) * rstd",
        "(z[m * pitch] - mean) * rstd",
        select="layer_norm_far",
    ),
    Mutant("subwarp: half of it is added up", SUBWARP, "if (size == 32) own", "if (size == 64) own", select=STEPS),
]
