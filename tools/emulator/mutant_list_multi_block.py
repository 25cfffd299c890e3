"""The bugs that `mutants.py` plants in the training steps of several blocks."""

from __future__ import annotations

from .mutants import Mutant

KERNEL, STEP, BARRIER = "fused_training_multi_block.cu", "lib/train/multi_block_step.cuh", "lib/sync/grid_barrier.cuh"
NETWORK = "lib/train/network.cuh"
BY_NEURON, BY_EXAMPLE = "lib/train/multi_block_step_by_neuron.cuh", "lib/train/multi_block_step_by_example.cuh"
STEPS = "test_steps_are_those_of_the_layers and 30 and sgd"
OF_BATCH, OF_LAYER = f"{STEPS} and batch", f"{STEPS} and layer"
ORDER = "order_of_blocks and multi_block"
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
        "bnk_wait<ACQUIRE>(counter, token);\n    __syncthreads();\n",
        "bnk_wait<ACQUIRE>(counter, token);\n",
        RACES,
        ORDER,
    ),
    Mutant(
        "multi-block: blocks arrive without release",
        BARRIER,
        "    return bnk_add<RELEASE>(counter, block",
        "    return bnk_add<RELAXED>(counter, block",
        ("tsan",),
        f"{ORDER} and grid",
    ),
    Mutant(
        "multi-block: blocks wait without acquire",
        BARRIER,
        "bnk_wait<ACQUIRE>(counter, token);",
        "bnk_wait<RELAXED>(counter, token);",
        ("tsan",),
        f"{ORDER} and grid",
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
        "            if (layer > 0) barrier.wait(token);\n",
        "            __syncthreads();\n",
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
        "            if (second) barrier.wait(token);\n",
        "            if (second) __syncthreads();\n",
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
        "multi-block: the mean is that of the values, not of their differences",
        STEP,
        ", first = z.row[0];",
        ", first = T(0);",
        select="constant_channels or far_from_0",
    ),
    Mutant(
        "multi-block: the running mean lacks what all values have in common",
        STEP,
        "return {first + mean, m2",
        "return {mean, m2",
        select="running_mean_of_equal",
    ),
    Mutant("multi-block: variance over N - 1", STEP, "fma(m2, share, eps)", "m2 / T(z.count - 1) + eps", select=STEPS),
    Mutant(
        "multi-block: the running variance is the biased one",
        BY_NEURON,
        "(T(a.batch) - a.correction)",
        "T(a.batch)",
        select="two_hundred or two_calls or takes_over or take_over",
    ),
    Mutant(
        "multi-block: a label outside the classes is taken for one",
        STEP,
        '? T(0) : T(nan(""))',
        "? T(0) : T(0)",
        select="wrong_label",
    ),
    Mutant("multi-block: the gradient lacks the label", STEP, "m == labels[n] ?", "m == -1 ?", select=STEPS),
    Mutant("multi-block: gradients of the sum of the losses", STEP, "(total * T(a.batch))", "total", select=STEPS),
    Mutant(
        "multi-block: only the first tile of neurons",
        STEP,
        "first < count; first += (int)(a.blocks * a.width)",
        "first < count; first += count",
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
        "mean_g = norm ? sum_g * share : T(0)",
        "mean_g = T(0)",
        select=OF_BATCH,
    ),
    Mutant(
        "multi-block: dz lacks the slope",
        BY_NEURON,
        "slope_z = norm ? product * saved.rstd * saved.rstd * share : T(0)",
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
        "multi-block: the mini-batch is replaced while others use the one before",
        BY_NEURON,
        "            if (layer == 0) barrier.wait(token);\n            if (is_last(layer)) fetch(step + 1);\n",
        "            if (is_last(layer)) fetch(step + 1);\n            if (layer == 0) barrier.wait(token);\n",
        ("tsan",),
        f"{ORDER} and batch and sizes1",
    ),
    Mutant(
        "multi-block: rows are chosen over those that are fetched",
        BY_NEURON,
        "        Base::choose_rows(step + 2);\n",
        "        Base::choose_rows(step + 3);\n",
        select="two_calls and batch",
    ),
    Mutant(
        "multi-block: z of a neuron is read before its copy is there",
        BY_NEURON,
        "                    commit_copies();\n                    wait_for_copies();\n",
        "                    commit_copies();\n",
        select=f"{STEPS} or 130 and sgd",
    ),
    Mutant(
        "product: sums of rows beyond those that a thread loads ahead are left out",
        "lib/gemm/matrix.cuh",
        "first += AHEAD * stride",
        "first += rows",
        select="several_stages and float32",
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
        "        barrier.wait(barrier.arrive());\n",
        "        __syncthreads();\n",
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
        "rows + first, count",
        "rows, count",
        select=OF_LAYER,
    ),
]
