"""The bugs that `mutants.py` plants in the training steps of several blocks."""

from __future__ import annotations

from .mutants import Mutant

KERNEL, STEP, MEETING = "fused_training_group.cu", "group_step.cuh", "meet.cuh"
NEURONS, EXAMPLES = "group_step_of_neurons.cuh", "group_step_of_examples.cuh"
STEPS = "test_steps_are_those_of_the_layers and 30 and sgd"
OF_BATCH, OF_LAYER = f"{STEPS} and batch", f"{STEPS} and layer"
ORDER = "order_of_blocks"
RACES = ("plain", "tsan")

MUTANTS = [
    *(
        Mutant(f"group: all models share {what}", KERNEL, original, mutated, select="many_models")
        for what, original, mutated in (
            ("running statistics", "a.running += model * a.running_count", "a.running += 0"),
            ("losses", "a.losses += model * a.steps", "a.losses += 0"),
            ("memory", "a.memory += model * a.memory_count", "a.memory += 0"),
            ("parameters", "a.parameters += model * a.parameter_count", "a.parameters += 0"),
        )
    ),
    Mutant(
        "group: one thread waits for the blocks, the others do not",
        MEETING,
        "        __threadfence();\n    }\n    __syncthreads();\n",
        "        __threadfence();\n    }\n",
        RACES,
        ORDER,
    ),
    Mutant(
        "cluster: what its threads did since they arrived is not waited for",
        MEETING,
        "        bnk_wait_for_cluster();\n        __syncthreads();",
        "        bnk_wait_for_cluster();",
        RACES,
        f"{ORDER} and cluster",
    ),
    Mutant("cluster: nobody waits", MEETING, "        bnk_wait_for_cluster();\n", "", RACES, f"{ORDER} and cluster"),
    Mutant(
        "group: no meeting behind a layer",
        NEURONS,
        "            forward(layer, step);\n            meeting.wait_for(meeting.arrive());\n",
        "            forward(layer, step);\n            __syncthreads();\n",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "group: no meeting behind the gradients of a layer",
        NEURONS,
        "if (layer > 0) meeting.wait_for(meeting.arrive());",
        "__syncthreads();",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "group: the second layer's weights change while others use them",
        NEURONS,
        "            if (layer != 1) update_layer",
        "            update_layer",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "group: the first layer has one copy of its outputs",
        NEURONS,
        "layer == 0 && (step & 1) ? a.rows",
        "false ? a.rows",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "group: the next mini-batch over this one",
        NEURONS,
        "kept.x + (step & 1) * field(0, INPUTS) * a.batch",
        "kept.x",
        RACES,
        f"{ORDER} and batch or {OF_BATCH}",
    ),
    Mutant(
        "group: what rounding left of the mean stays",
        STEP,
        "z.subtract_and_sum(rest, ",
        "z.subtract_and_sum(T(0), ",
        select="constant_channels",
    ),
    Mutant(
        "group: the running mean lacks what rounding left",
        STEP,
        "return {mean + rest, m2",
        "return {mean, m2",
        select="running_mean_of_equal",
    ),
    Mutant("group: variance over N - 1", STEP, "sqrt(m2 / n + eps)", "sqrt(m2 / (n - T(1)) + eps)", select=STEPS),
    Mutant(
        "group: the running variance is the biased one",
        NEURONS,
        "of.m2 / (T(z.count) - a.correction)",
        "of.m2 / T(z.count)",
        select="two_hundred or two_calls or takes_over or take_over",
    ),
    Mutant(
        "group: a label outside the classes is taken for one",
        STEP,
        'valid ? top : T(nan(""))',
        "top",
        select="wrong_label",
    ),
    Mutant("group: the gradient lacks the label", STEP, "(m == label[n] ? T(1) : T(0))", "T(0)", select=STEPS),
    Mutant("group: gradients of the sum of the losses", STEP, " / T(Matrix<T>::rows);", ";", select=STEPS),
    Mutant(
        "group: only the first tile of neurons",
        STEP,
        "first < count; first += a.blocks * a.width",
        "first < min(count, a.blocks * a.width); first += a.blocks * a.width",
        select=STEPS,
    ),
    Mutant(
        "group: the last layer is activated", NEURONS, "h[n] = last ? u : activate", "h[n] = activate", select=STEPS
    ),
    Mutant(
        "group: dz lacks the mean of the gradients",
        NEURONS,
        "mean_g = norm ? sum_g / n : T(0)",
        "mean_g = T(0)",
        select=OF_BATCH,
    ),
    Mutant(
        "group: dz lacks the slope",
        NEURONS,
        "slope_z = norm ? product * rstd * rstd / n : T(0)",
        "slope_z = T(0)",
        select=OF_BATCH,
    ),
    Mutant(
        "group: gamma moves before others have read it",
        NEURONS,
        "        __syncwarp();  // all",
        "        // all",
        RACES,
        f"{ORDER} and batch",
    ),
    Mutant(
        "group: the bias of the last layer stays",
        NEURONS,
        "if (examples.lane == 0) move(field(layer, SHIFT) + column + c, sum, step);",
        "",
        select=STEPS,
    ),
    Mutant(
        "group of examples: weights move while others still use them",
        EXAMPLES,
        "meeting.wait_for(meeting.arrive());\n        for",
        "__syncthreads();\n        for",
        RACES,
        f"{ORDER} and layer",
    ),
    Mutant(
        "group of examples: no barrier behind a layer",
        EXAMPLES,
        "activate(u, a.activation, a.alpha);\n            }\n        });\n        __syncthreads();\n",
        "activate(u, a.activation, a.alpha);\n            }\n        });\n",
        RACES,
        f"{ORDER} and layer",
    ),
    Mutant(
        "group of examples: dgamma without xhat",
        EXAMPLES,
        "g[n * outputs + m] * z[n * outputs + m]",
        "g[n * outputs + m]",
        select=OF_LAYER,
    ),
    Mutant(
        "group of examples: dz lacks the mean",
        EXAMPLES,
        "scale * (row.row[m] - fma(z[m], slope, mean))",
        "scale * (row.row[m] - z[m] * slope)",
        select=OF_LAYER,
    ),
    Mutant(
        "group of examples: rstd of the first example for all",
        EXAMPLES,
        "rstd[layer * a.width + c] : T(1)",
        "rstd[layer * a.width] : T(1)",
        select=OF_LAYER,
    ),
    Mutant(
        "group of examples: every block fetches the first examples",
        EXAMPLES,
        "rows[first + i / inputs]",
        "rows[i / inputs]",
        select=OF_LAYER,
    ),
]
