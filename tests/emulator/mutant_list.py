"""The bugs that `mutants.py` plants. Each is a mistake that somebody has made, or might."""

from __future__ import annotations

from .mutants import Mutant

COMMON, FORWARD, BACKWARD = "common.cuh", "batch_norm_forward.cu", "batch_norm_backward.cu"
SOFTMAX, UPDATE = "softmax_cross_entropy.cu", "parameter_update.cu"

MUTANTS = [
    # ---- barriers, warps, races
    Mutant(
        "forward: no barrier before the merge",
        FORWARD,
        "    __syncthreads();\n    if (!active) return;\n",
        "    if (!active) return;\n",
    ),
    Mutant(
        "forward: threads without a channel return before the barrier",
        FORWARD,
        "    __syncthreads();\n    if (!active) return;\n",
        "    if (!active) return;\n    __syncthreads();\n",
    ),
    Mutant("backward: no barrier before the sums", BACKWARD, "    __syncthreads();\n", ""),
    Mutant(
        "forward: every lane updates the running statistics",
        FORWARD,
        "if (lane == 0) write_statistics",
        "write_statistics",
    ),
    Mutant(
        "backward: every lane writes the parameter gradients, the same values",
        BACKWARD,
        "if (threadIdx.y != 0 || c >= a.channels) return;",
        "if (c >= a.channels) return;",
        ("plain", "tsan"),
        "test_forward_and_backward_match_extended_precision and shape2",
    ),
    Mutant(
        "softmax: half a warp in the mask of a shuffle",
        SOFTMAX,
        "v += __shfl_xor_sync(0xffffffffu,",
        "v += __shfl_xor_sync(0x0000ffffu,",
    ),
    Mutant(
        "softmax: the sum skips a distance",
        SOFTMAX,
        "for (int apart = 16; apart > 0; apart /= 2) v +=",
        "for (int apart = 8; apart > 0; apart /= 2) v +=",
    ),
    # ---- memory and indices
    Mutant("forward: reads one row past the tail", FORWARD, "if (row < rows) {", "if (row <= rows) {"),
    Mutant("forward: shared memory one plane short", FORWARD, "slot[2 * plane] =", "slot[3 * plane] ="),
    Mutant(
        "backward: a sum that is never stored, uninitialised",
        BACKWARD,
        "    partial[plane + slot] = value(own.g_centred);\n",
        "",
    ),
    Mutant(
        "forward: the index of y in 32 bits",
        FORWARD,
        "a.y[(row + (long long)i * lanes) * a.channels + c]",
        "a.y[(int)(row + (long long)i * lanes) * (int)a.channels + c]",
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
        "backward: rows past the tail", BACKWARD, "row < a.rows; row += blockDim.y", "row <= a.rows; row += blockDim.y"
    ),
    Mutant("backward: the last lane is left out", BACKWARD, "other < plane;", "other < plane - width;"),
    Mutant("softmax: a label one past the last class", SOFTMAX, "label < a.classes;", "label <= a.classes;"),
    Mutant("update: writes one past the end", UPDATE, "i < a.size;", "i <= a.size;"),
    Mutant(
        "update: the stride is one block's",
        UPDATE,
        "stride = (long long)gridDim.x * blockDim.x;",
        "stride = blockDim.x;",
    ),
    # ---- formulas
    Mutant(
        "forward: running_var takes the biased variance",
        FORWARD,
        "unbiased = value(all.m2) / A(a.rows - 1);",
        "unbiased = value(all.m2) / A(a.rows);",
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
    Mutant("forward: all lanes weigh the same", FORWARD, "longer = (int)(rows - rounds * lanes);", "longer = 0;"),
    Mutant(
        "forward: the merge forgets how many rows a lane has",
        FORWARD,
        "delta * delta * A(rounds + (j < longer))",
        "delta * delta",
    ),
    Mutant("common: the low part of the mean is dropped", COMMON, "return (x - a.high) - a.low;", "return x - a.high;"),
    Mutant("common: relu turns NaN into 0", COMMON, "return z <= A(0) ? A(0) : z;", "return z > A(0) ? z : A(0);"),
    Mutant("common: half of the sigmoid's derivative", COMMON, "dy * (h * (A(1) - h))", "dy * (A(1) - h)"),
    Mutant("common: tanh is not squared in its derivative", COMMON, "fma(-h, h, A(1))", "(A(1) - h)"),
    Mutant("backward: dx without gamma", BACKWARD, "channel.scale * (g[i] -", "channel.rstd * (g[i] -"),
    Mutant("backward: dgamma is not normalised", BACKWARD, "value(total.g_centred) * rstd;", "value(total.g_centred);"),
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
        "(sqrt(second / a.correction2) + a.eps)",
        "sqrt(second / a.correction2 + a.eps)",
    ),
]
