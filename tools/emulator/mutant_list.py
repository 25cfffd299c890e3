"""The bugs that `mutants.py` plants. Each is a mistake that somebody has made, or might."""

from __future__ import annotations

from .mutant_list_cooperative import MUTANTS as COOPERATIVE
from .mutant_list_double_backward import MUTANTS as DOUBLE_BACKWARD
from .mutant_list_fused import MUTANTS as FUSED
from .mutant_list_layer_norm import MUTANTS as LAYER_NORM
from .mutant_list_linear import MUTANTS as LINEAR
from .mutant_list_masked_grouped import MUTANTS as MASKED_GROUPED
from .mutant_list_multi_block import MUTANTS as MULTI_BLOCK
from .mutants import Mutant

PAIR, FORWARD, BACKWARD = "lib/numbers/pair.cuh", "batch_norm_forward.cu", "batch_norm_backward.cu"
MOMENTS, SUMS, WARP = "lib/reduce/moments.cuh", "lib/reduce/sums.cuh", "lib/reduce/warp.cuh"
HALF, ACTIVATION, ROWS = "lib/numbers/half.cuh", "lib/numbers/activation.cuh", "lib/reduce/rows.cuh"
SOFTMAX, UPDATE, MINI_BATCH = "softmax_cross_entropy.cu", "parameter_update.cu", "mini_batch.cu"

MUTANTS = [
    *DOUBLE_BACKWARD,
    *MASKED_GROUPED,
    *FUSED,
    *MULTI_BLOCK,
    *LAYER_NORM,
    *LINEAR,
    *COOPERATIVE,
    # ---- barriers, warps, races
    Mutant(
        "forward: no barrier before the merge",
        FORWARD,
        "    __syncthreads();\n    const A* const slots",
        "    const A* const slots",
    ),
    Mutant(
        "forward: threads without a channel return before the barrier",
        FORWARD,
        "    __syncthreads();\n    const A* const slots",
        "    if (!active) return;\n    __syncthreads();\n    const A* const slots",
    ),
    Mutant(
        "forward: no barrier between the levels of the merge", FORWARD, "        __syncthreads();\n    }\n", "    }\n"
    ),
    Mutant(
        "forward: every worker updates the running statistics",
        FORWARD,
        "if (worker == 0) write_statistics",
        "write_statistics",
    ),
    Mutant(
        "backward: every worker writes the parameter gradients, the same values",
        BACKWARD,
        "if (threadIdx.y != 0 || c >= a.channels) return;",
        "if (c >= a.channels) return;",
        ("plain", "tsan"),
        "test_forward_and_backward_match_extended_precision and shape2",
    ),
    Mutant(
        "warp: half a warp in the mask of a shuffle",
        WARP,
        "value += __shfl_xor_sync(0xffffffffu,",
        "value += __shfl_xor_sync(0x0000ffffu,",
    ),
    Mutant(
        "warp: the sum skips a distance",
        WARP,
        "for (int offset = WARP / 2; offset > 0; offset /= 2) value +=",
        "for (int offset = WARP / 4; offset > 0; offset /= 2) value +=",
    ),
    # ---- memory and indices
    Mutant("rows: one row past the tail", ROWS, "return outer < outers;", "return outer <= outers;"),
    Mutant("forward: shared memory one plane short", FORWARD, "slot[2 * plane] =", "slot[3 * plane] ="),
    Mutant(
        "sums: the first is never stored, uninitialised",
        SUMS,
        "for (int i = 0; i < COUNT; ++i) slot[",
        "for (int i = 1; i < COUNT; ++i) slot[",
    ),
    Mutant(
        "rows: the index of an output in 32 bits",
        ROWS,
        "MATRIX ? outer * channels + c :",
        "MATRIX ? (int)outer * (int)channels + (int)c :",
    ),
    Mutant(
        "update: the index in 32 bits",
        UPDATE,
        "for (long long i = (long long)blockIdx.x",
        "for (int i = blockIdx.x",
    ),
    Mutant(
        "backward: parameter gradients of channels that do not exist",
        BACKWARD,
        "if (threadIdx.y != 0 || c >= a.channels) return;",
        "if (threadIdx.y != 0) return;",
    ),
    Mutant(
        "sums: the last worker is left out", SUMS, "worker < last; worker += step", "worker + 1 < last; worker += step"
    ),
    Mutant("rows: the inner index is never carried", ROWS, "            ++outer;\n", ""),
    Mutant(
        "rows: outer and inner strides exchanged",
        ROWS,
        "outer * outer_stride + index * inner_stride",
        "outer * inner_stride + index * outer_stride",
    ),
    Mutant(
        "rows: an output in channels-last order",
        ROWS,
        "(outer * channels + c) * inner + index",
        "(outer * inner + index) * channels + c",
    ),
    Mutant(
        "rows: the output of an inner axis in 32 bits",
        ROWS,
        "(outer * channels + c) * inner + index",
        "((int)outer * (int)channels + (int)c) * (int)inner + index",
    ),
    Mutant(
        "backward: dy walked through with the strides of x",
        BACKWARD,
        "dy[row.at(a.dy_outer, a.dy_inner)]",
        "dy[row.at(a.x_outer, a.x_inner)]",
    ),
    Mutant(
        "forward: the residual of the first channel for all",
        FORWARD,
        "a.residual + c * a.residual_channel",
        "a.residual",
    ),
    Mutant("softmax: a label one past the last class", SOFTMAX, "label < a.classes;", "label <= a.classes;"),
    Mutant("update: writes one past the end", UPDATE, "i < a.size;", "i <= a.size;"),
    Mutant(
        "update: the stride is one block's",
        UPDATE,
        "stride = (long long)gridDim.x * blockDim.x;",
        "stride = blockDim.x;",
    ),
    Mutant("update: the schedule is ignored", UPDATE, "a.scalars ? a.scalars[1] :", ""),
    # ---- formulas
    Mutant("mini-batch: every block moves the counter", MINI_BATCH, "1u) != gridDim.x - 1", "1u) == 77u"),
    Mutant(
        "mini-batch: a block arrives before all of it have read the counter",
        MINI_BATCH,
        "    __syncthreads();  // all threads of the block have read the counter\n",
        "",
        ("plain", "tsan"),
    ),
    Mutant(
        "mini-batch: a block arrives without a fence",
        MINI_BATCH,
        "    __threadfence();\n    if",
        "    if",
        ("tsan",),
    ),
    Mutant("mini-batch: arrivals are not forgotten", MINI_BATCH, "a.counter[1] = 0;", ""),
    Mutant(
        "forward: running_var takes the biased variance",
        FORWARD,
        "value(all.m2) / a.divisor;",
        "value(all.m2) / A(a.outer * a.inner);",
    ),
    Mutant(
        "forward: running_var takes the unbiased variance whatever was asked for",
        FORWARD,
        "value(all.m2) / a.divisor;",
        "value(all.m2) / A(a.outer * a.inner - 1);",
        select="n_minus_1",
    ),
    Mutant(
        "forward: normalises with the unbiased variance",
        FORWARD,
        "sqrt(value(all.m2) / all.count + a.eps)",
        "sqrt(value(all.m2) / (all.count - A(1)) + a.eps)",
    ),
    Mutant(
        "forward: eps outside the square root",
        FORWARD,
        "A(1) / sqrt(value(all.m2) / all.count + a.eps)",
        "A(1) / (sqrt(value(all.m2) / all.count) + a.eps)",
    ),
    Mutant(
        "forward: momentum weighs the old value",
        FORWARD,
        "fma(a.momentum, all.mean.high, keep * a.running_mean[c])",
        "fma(keep, all.mean.high, a.momentum * a.running_mean[c])",
    ),
    Mutant("forward: all workers weigh the same", MOMENTS, "longer((int)(rows - rounds * workers))", "longer(0)"),
    Mutant(
        "forward: the merge forgets how many rows a worker has",
        MOMENTS,
        "delta * delta * A(counts.count(j, min(j + step, last)))",
        "delta * delta",
    ),
    Mutant("pair: the low part of the mean is dropped", PAIR, "return (x - a.high) - a.low;", "return x - a.high;"),
    Mutant("activation: relu turns NaN into 0", ACTIVATION, "return z <= A(0) ? (alpha", "return !(z > A(0)) ? (alpha"),
    Mutant("activation: the slope of leaky_relu is ignored", ACTIVATION, "alpha * value) : value", "A(0)) : value"),
    Mutant(
        "activation: elu's factor is forgotten in its derivative",
        ACTIVATION,
        "return alpha * gate.density;",
        "return gate.density;",
    ),
    Mutant("activation: half of the sigmoid's derivative", ACTIVATION, "decay * above * above", "decay * above"),
    Mutant("activation: tanh is not squared in its derivative", ACTIVATION, "fma(-h, h, A(1))", "(A(1) - h)"),
    Mutant(
        "activation: the gradient of a gate without the gate's own",
        ACTIVATION,
        "gate.gate + z * gate.density",
        "gate.gate",
    ),
    Mutant(
        "activation: NaN from minus infinity times 0",
        ACTIVATION,
        "return gate == A(0) ? A(0) : z * gate;",
        "return z * gate;",
    ),
    Mutant(
        "activation: gelu_tanh takes b for 3 b in its derivative",
        ACTIVATION,
        "fma(A(3) * b, z * z, a)",
        "fma(b, z * z, a)",
    ),
    Mutant(
        "activation: gelu by 1 + erf without its digits below zero",
        ACTIVATION,
        "erfc_inline(z * A(-0.70710678118654752440))",
        "(A(1) + erf(z * A(0.70710678118654752440)))",
    ),
    Mutant("half: bfloat16 is truncated", HALF, "(wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16", "wide >> 16"),
    Mutant(
        "half: ties of bfloat16 go up", HALF, "(wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16", "(wide + 0x8000u) >> 16"
    ),
    Mutant("half: NaN becomes a number", HALF, "value == value ? rounded : nan", "rounded"),
    Mutant("backward: dx without gamma", BACKWARD, "channel.scale * (g[i] -", "channel.rstd * (g[i] -"),
    Mutant(
        "backward: the gradient of the residual is not written",
        BACKWARD,
        "if (a.dresidual) store(a.dresidual[at], g[i]);",
        "",
    ),
    Mutant(
        "backward: the residual's gradient is dy, not g",
        BACKWARD,
        "store(a.dresidual[at], g[i])",
        "store(a.dresidual[at], a.dy[at])",
    ),
    Mutant(
        "backward: the activation is taken without the residual", BACKWARD, "if (!a.residual) return z;", "return z;"
    ),
    Mutant("backward: a curved gradient out of turn", BACKWARD, "        rotate(g);\n", ""),
    Mutant(
        "backward: dgamma is not normalised",
        BACKWARD,
        "value(total.sums[G_CENTRED]) * rstd;",
        "value(total.sums[G_CENTRED]);",
    ),
    Mutant(
        "softmax: exp of logits that were not shifted",
        SOFTMAX,
        "total += exp(A(logits[k]) - top)",
        "total += exp(A(logits[k]))",
    ),
    Mutant("softmax: the gradient of a sum, not of a mean", SOFTMAX, "each = A(1) / A(a.rows);", "each = A(1);"),
    Mutant(
        "update: Adam's eps inside the square root",
        UPDATE,
        "(sqrt(second) / step.root_correction2 + a.eps)",
        "sqrt(second / (step.root_correction2 * step.root_correction2) + a.eps)",
    ),
    Mutant(
        "update: Adam's second moment is divided before its root is taken",
        UPDATE,
        "sqrt(second) / step.root_correction2",
        "sqrt(second / (step.root_correction2 * step.root_correction2))",
        select="first_steps",
    ),
]
