"""The bugs that `mutants.py` plants in the training steps of several blocks."""

from __future__ import annotations

from .mutants import Mutant

KERNEL, STEP, BARRIER = "fused_training_multi_block.cu", "lib/train/multi_block_step.cuh", "lib/sync/grid_barrier.cuh"
NETWORK = "lib/train/network.cuh"
BY_NEURON, BY_EXAMPLE = "lib/train/multi_block_step_by_neuron.cuh", "lib/train/multi_block_step_by_example.cuh"
STEPS = "test_steps_are_those_of_the_layers and 30 and sgd"
OF_BATCH, OF_LAYER = f"{STEPS} and batch", f"{STEPS} and layer"
ORDER = "order_of_blocks"
RACES = ("plain", "tsan")

MUTANTS = [
    *(
        Mutant(f"multi-block: all models share {what}", NETWORK, original, mutated, select="many_models")
        for what, original, mutated in (
            ("running statistics", "a.running += model * a.running_count", "a.running += 0"),
            ("losses", "a.losses += model * a.steps", "a.losses += 0"),
            ("the workspace", "a.workspace += model * a.workspace_count", "a.workspace += 0"),
            ("parameters", "a.parameters += model * a.parameter_count", "a.parameters += 0"),
        )
    ),
    Mutant(
        "multi-block: one thread waits for the blocks, the others do not",
        BARRIER,
        "        __threadfence();\n    }\n    __syncthreads();\n",
        "        __threadfence();\n    }\n",
        RACES,
        ORDER,
    ),
    Mutant(
        "cluster: what its threads did since they arrived is not waited for",
        BARRIER,
        "        bnk_wait_for_cluster();\n        __syncthreads();",
        "        bnk_wait_for_cluster();",
        RACES,
        f"{ORDER} and cluster",
    ),
    Mutant("cluster: nobody waits", BARRIER, "        bnk_wait_for_cluster();\n", "", RACES, f"{ORDER} and cluster"),
    Mutant(
        "multi-block: no grid barrier behind a layer",
        BY_NEURON,
        "            forward(layer, step);\n            barrier.wait(barrier.arrive());\n",
        "            forward(layer, step);\n            __syncthreads();\n",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "multi-block: no grid barrier behind the gradients of a layer",
        BY_NEURON,
        "if (layer > 0) barrier.wait(barrier.arrive());",
        "__syncthreads();",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "multi-block: the second layer's weights change while others use them",
        BY_NEURON,
        "            if (layer != 1) update_layer",
        "            update_layer",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "multi-block: the first layer has one copy of its outputs",
        BY_NEURON,
        "layer == 0 && (step & 1) ? a.rows",
        "false ? a.rows",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "multi-block: the next mini-batch over this one",
        BY_NEURON,
        "workspace.x + (step & 1) * field(0, INPUTS) * a.batch",
        "smem.x",
        RACES,
        f"{ORDER} and batch or {OF_BATCH}",
    ),
    Mutant(
        "multi-block: what rounding left of the mean stays",
        STEP,
        "z.subtract_and_sum(remainder, ",
        "z.subtract_and_sum(T(0), ",
        select="constant_channels",
    ),
    Mutant(
        "multi-block: the running mean lacks what rounding left",
        STEP,
        "return {mean + remainder, m2",
        "return {mean, m2",
        select="running_mean_of_equal",
    ),
    Mutant("multi-block: variance over N - 1", STEP, "sqrt(m2 / n + eps)", "sqrt(m2 / (n - T(1)) + eps)", select=STEPS),
    Mutant(
        "multi-block: the running variance is the biased one",
        BY_NEURON,
        "centred.m2 / (T(z.count) - a.correction)",
        "centred.m2 / T(z.count)",
        select="two_hundred or two_calls or takes_over or take_over",
    ),
    Mutant(
        "multi-block: a label outside the classes is taken for one",
        STEP,
        'valid ? top : T(nan(""))',
        "top",
        select="wrong_label",
    ),
    Mutant("multi-block: the gradient lacks the label", STEP, "(m == label[n] ? T(1) : T(0))", "T(0)", select=STEPS),
    Mutant("multi-block: gradients of the sum of the losses", STEP, " / T(Matrix<T>::rows);", ";", select=STEPS),
    Mutant(
        "multi-block: only the first tile of neurons",
        STEP,
        "first < count; first += a.blocks * a.width",
        "first < min(count, a.blocks * a.width); first += a.blocks * a.width",
        select=STEPS,
    ),
    Mutant(
        "multi-block: the last layer is activated",
        BY_NEURON,
        "h[n] = last ? u : activate",
        "h[n] = activate",
        select=STEPS,
    ),
    Mutant(
        "multi-block: dz lacks the mean of the gradients",
        BY_NEURON,
        "mean_g = norm ? sum_g / n : T(0)",
        "mean_g = T(0)",
        select=OF_BATCH,
    ),
    Mutant(
        "multi-block: dz lacks the slope",
        BY_NEURON,
        "slope_z = norm ? product * rstd * rstd / n : T(0)",
        "slope_z = T(0)",
        select=OF_BATCH,
    ),
    Mutant(
        "multi-block: gamma moves before others have read it",
        BY_NEURON,
        "        __syncwarp();  // all",
        "        // all",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "multi-block: the bias of the last layer stays",
        BY_NEURON,
        "if (examples.lane == 0) move(field(layer, SHIFT) + column + c, sum, step);",
        "",
        select=STEPS,
    ),
    Mutant(
        "multi-block by example: weights move while others still use them",
        BY_EXAMPLE,
        "barrier.wait(barrier.arrive());\n        for",
        "__syncthreads();\n        for",
        RACES,
        f"{ORDER} and layer",
    ),
    Mutant(
        "multi-block by example: no barrier behind a layer",
        BY_EXAMPLE,
        "activate(u, a.activation, a.alpha);\n            }\n        });\n        __syncthreads();\n",
        "activate(u, a.activation, a.alpha);\n            }\n        });\n",
        RACES,
        f"{ORDER} and layer",
    ),
    Mutant(
        "multi-block by example: dgamma without xhat",
        BY_EXAMPLE,
        "g[n * outputs + m] * z[n * outputs + m]",
        "g[n * outputs + m]",
        select=OF_LAYER,
    ),
    Mutant(
        "multi-block by example: dz lacks the mean",
        BY_EXAMPLE,
        "scale * (row.row[m] - fma(z[m], slope, mean))",
        "scale * (row.row[m] - z[m] * slope)",
        select=OF_LAYER,
    ),
    Mutant(
        "multi-block by example: rstd of the first example for all",
        BY_EXAMPLE,
        "rstd[layer * a.width + c] : T(1)",
        "rstd[layer * a.width] : T(1)",
        select=OF_LAYER,
    ),
    Mutant(
        "multi-block by example: every block fetches the first examples",
        BY_EXAMPLE,
        "rows[first + i / inputs]",
        "rows[i / inputs]",
        select=OF_LAYER,
    ),
]
