"""The bugs that `mutants.py` plants. Each is a mistake that somebody has made, or might.

Long because it is a list.
"""

from __future__ import annotations

from .mutant_list_cooperative import MUTANTS as COOPERATIVE
from .mutant_list_cooperative_options import MUTANTS as COOPERATIVE_OPTIONS
from .mutant_list_double_backward import MUTANTS as DOUBLE_BACKWARD
from .mutant_list_fused import MUTANTS as FUSED
from .mutant_list_group_norm import MUTANTS as GROUP_NORM
from .mutant_list_layer_norm import MUTANTS as LAYER_NORM
from .mutant_list_linear import MUTANTS as LINEAR
from .mutant_list_linear_softmax import MUTANTS as LINEAR_SOFTMAX
from .mutant_list_long_rows import MUTANTS as LONG_ROWS
from .mutant_list_lstm import MUTANTS as LSTM
from .mutant_list_lstm_sequence import MUTANTS as LSTM_SEQUENCE
from .mutant_list_matmul import MUTANTS as MATMUL
from .mutant_list_multi_block import MUTANTS as MULTI_BLOCK
from .mutant_list_one_block import MUTANTS as ONE_BLOCK
from .mutant_list_options import MUTANTS as OPTIONS
from .mutant_list_rms_norm import MUTANTS as RMS_NORM
from .mutant_list_tf32x3 import MUTANTS as TF32X3
from .mutants import Mutant

PAIR, FORWARD, BACKWARD = "lib/numbers/pair.cuh", "batch_norm_forward.cu", "batch_norm_backward.cu"
SUMS, WARP = "lib/reduce/sums.cuh", "lib/reduce/warp.cuh"
HALF, ACTIVATION, ROWS = "lib/numbers/half.cuh", "lib/numbers/activation.cuh", "lib/reduce/rows.cuh"
PARTS, GRADIENT_SUMS = "lib/reduce/parts.cuh", "lib/reduce/gradient_sums.cuh"
RSQRT, NORMALISATION = "lib/numbers/rsqrt.cuh", "lib/reduce/normalisation.cuh"
SOFTMAX, UPDATE, MINI_BATCH = "softmax_cross_entropy.cu", "parameter_update.cu", "mini_batch.cu"

MUTANTS = [
    *ONE_BLOCK,
    *DOUBLE_BACKWARD,
    *OPTIONS,
    *FUSED,
    *MATMUL,
    *MULTI_BLOCK,
    *LAYER_NORM,
    *LONG_ROWS,
    *RMS_NORM,
    *GROUP_NORM,
    *LINEAR,
    *LINEAR_SOFTMAX,
    *LSTM,
    *LSTM_SEQUENCE,
    *TF32X3,
    *COOPERATIVE,
    *COOPERATIVE_OPTIONS,
    # ---- barriers, warps, races
    Mutant(
        "forward: every worker updates the running statistics",
        FORWARD,
        "if (threadIdx.y == 0) write_statistics",
        "write_statistics",
    ),
    Mutant(
        "backward: every worker writes the parameter gradients, the same values",
        BACKWARD,
        "return threadIdx.y == 0 && (a.full || c < (Index)a.channels);",
        "return a.full || c < (Index)a.channels;",
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
    Mutant(
        "parts: a place more a worker than the launch has",
        PARTS,
        "return threadIdx.x * (workers + 1) + worker;",
        "return threadIdx.x * (workers + 2) + worker;",
    ),
    Mutant(
        "gradient sums: the scaled ones beyond shared memory",
        GRADIENT_SUMS,
        "scaled(sums + width * (workers + 1))",
        "scaled(sums + 2 * width * (workers + 1))",
    ),
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
        "for (long long i = thread; i < a.vectors;",
        "for (int i = (int)thread; i < a.vectors;",
    ),
    Mutant(
        "backward: parameter gradients of channels that do not exist",
        BACKWARD,
        "return threadIdx.y == 0 && (a.full || c < (Index)a.channels);",
        "return threadIdx.y == 0;",
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
        "of_dy[rows.at(a.dy_outer, a.dy_inner)]",
        "of_dy[rows.at(a.x_outer, a.x_inner)]",
    ),
    Mutant(
        "forward: the residual of the first channel for all",
        FORWARD,
        "a.residual + c * (Index)a.residual_channel",
        "a.residual",
    ),
    Mutant("softmax: a label one past the last class", SOFTMAX, "label < a.classes;", "label <= a.classes;"),
    Mutant("update: writes one past the end", UPDATE, "i < a.size;", "i <= a.size;"),
    Mutant("update: one vector too many", UPDATE, "i < a.vectors;", "i <= a.vectors;"),
    Mutant("update: the numbers behind the vectors are left", UPDATE, "update_unit<Rule, 1>(a, step, i);", ";"),
    Mutant(
        "update: the stride is one block's",
        UPDATE,
        "threads = (long long)gridDim.x * blockDim.x;",
        "threads = blockDim.x;",
    ),
    Mutant("update: the velocity is not kept", UPDATE, "if (Rule::STATES > 0) store(a.first + i, first);", ""),
    Mutant("update: the schedule is ignored", UPDATE, "a.scalars ? a.scalars[1] :", ""),
    # ---- formulas
    Mutant("mini-batch: the labels are those of the first examples", MINI_BATCH, "a.labels[row];", "a.labels[n];"),
    Mutant("mini-batch: a thread copies one unit", MINI_BATCH, "i < units; i += blockDim.x", "i < 1; i += blockDim.x"),
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
        "all.m2 * (masked ? A(1) / divisor : a.inverse_divisor);",
        "all.m2 * (masked ? A(1) / divisor : a.inverse_rows);",
    ),
    Mutant(
        "forward: running_var takes the unbiased variance whatever was asked for",
        FORWARD,
        "all.m2 * (masked ? A(1) / divisor : a.inverse_divisor);",
        "all.m2 / (a.rows - A(1));",
        select="n_minus_1",
    ),
    Mutant(
        "forward: normalises with the unbiased variance",
        FORWARD,
        "reciprocal_sqrt(fma(all.m2, inverse_rows, a.eps))",
        "reciprocal_sqrt(fma(all.m2, a.inverse_divisor, a.eps))",
    ),
    Mutant(
        "forward: eps outside the square root",
        FORWARD,
        "reciprocal_sqrt(fma(all.m2, inverse_rows, a.eps))",
        "A(1) / (sqrt(all.m2 * inverse_rows) + a.eps)",
    ),
    Mutant(
        "forward: momentum weighs the old value",
        FORWARD,
        "fma(a.momentum, all.high, keep * running.mean)",
        "fma(keep, all.high, a.momentum * running.mean)",
    ),
    Mutant("parts: all workers weigh the same", PARTS, "m2, A(count)};\n    A half", "m2, A(VALUES)};\n    A half"),
    Mutant(
        "parts: the merge forgets how many rows a worker has",
        PARTS,
        "fma(rest * part.count, rest,",
        "fma(rest, rest,",
    ),
    Mutant("pair: the low part of the mean is dropped", PAIR, "return (x - a.high) - a.low;", "return x - a.high;"),
    Mutant(
        "normalisation: the low part of the mean is not in the shift",
        NORMALISATION,
        "fma(-scale, mean.low, shift)",
        "shift",
    ),
    Mutant(
        "normalisation: xhat without the low part of the mean",
        NORMALISATION,
        "rest = -this->mean.low * rstd",
        "rest = A(0)",
    ),
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
    Mutant(
        "half: NaN becomes a number",
        HALF,
        "value == value ? (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16 : 0x7fffu",
        "(wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16",
    ),
    Mutant(
        "half: the second of two numbers takes the place of the first",
        HALF,
        "bnk_float_to_half(first) | (unsigned)bnk_float_to_half(second) << 16",
        "bnk_float_to_half(second) | (unsigned)bnk_float_to_half(first) << 16",
    ),
    Mutant("rsqrt: no Newton step", RSQRT, "? refined : root", "? root : root"),
    Mutant(
        "rsqrt: a Newton step at zero and infinity",
        RSQRT,
        "value >= 1.17549435e-38f && value <= 3.40282347e38f ?",
        "true ?",
    ),
    Mutant("backward: dx without gamma", BACKWARD, "channel.scale * (g[i] -", "channel.rstd * (g[i] -"),
    Mutant(
        "backward: the gradient of the residual is not written",
        BACKWARD,
        "if (a.given & RESIDUAL) store(a.dresidual[at], has(i) ? g[i] : A(0));",
        "",
    ),
    Mutant(
        "backward: the residual's gradient is dy, not g",
        BACKWARD,
        "store(a.dresidual[at], has(i) ? g[i] : A(0))",
        "store(a.dresidual[at], a.dy[at])",
    ),
    Mutant(
        "backward: the activation is taken without the residual",
        BACKWARD,
        "if (a.given & RESIDUAL) z[i] += residual;",
        "",
    ),
    Mutant("activation: a curved gradient out of turn", ACTIVATION, "        rotate(dy);\n", ""),
    Mutant(
        "backward: dgamma is not normalised",
        BACKWARD,
        "x[i] = channel.xhat(centred);",
        "x[i] = centred;",
    ),
    Mutant(
        "softmax: exp of logits that were not shifted",
        SOFTMAX,
        "values[i] = exp(values[i] - top);",
        "values[i] = exp(values[i]);",
    ),
    Mutant("softmax: the gradient of a sum, not of a mean", SOFTMAX, "A(1) / A(examples_of_mean(a, lane))", "A(1)"),
    Mutant("softmax: ignored examples count in the mean", SOFTMAX, "count += a.labels[i] != a.ignored;", "count += 1;"),
    Mutant("softmax: ignored examples have a gradient", SOFTMAX, "a.dlogits[begin + k] = T(0);", ";"),
    Mutant(
        "softmax: one round of examples of each block",
        SOFTMAX,
        "row += (long long)gridDim.x * blockDim.y) {",
        "row += a.rows) {",
    ),
    Mutant("softmax: the label has no share of what all have", SOFTMAX, "a.smoothing + share;", "a.smoothing;"),
    Mutant("softmax: classes that are not there have a share", SOFTMAX, "if (first + i * WARP < a.classes) sum", "sum"),
    Mutant(
        "update: RMSProp's eps inside the square root",
        UPDATE,
        "(sqrt(first) + a.eps)",
        "sqrt(fma(a.eps, a.eps, first))",
    ),
    Mutant("update: RMSProp averages the gradients", UPDATE, "a.one_minus_beta1 * g * g)", "a.one_minus_beta1 * g)"),
    Mutant(
        "update: RMSProp's rate multiplies before the division",
        UPDATE,
        "step.rate * (g / (sqrt(first) + a.eps))",
        "(step.rate * g) / (sqrt(first) + a.eps)",
        select="beyond_the_type",
    ),
    Mutant(
        "update: Adam's eps inside the square root",
        UPDATE,
        "fma(sqrt(second), step.inverse_root, a.eps)",
        "sqrt(fma(second, step.inverse_root * step.inverse_root, a.eps))",
    ),
    Mutant(
        "update: Adam's second moment is divided before its root is taken",
        UPDATE,
        "fma(sqrt(second), step.inverse_root, a.eps)",
        "(sqrt(second * (step.inverse_root * step.inverse_root)) + a.eps)",
        select="first_steps",
    ),
]
