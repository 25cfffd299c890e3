"""The bugs that `mutants.py` plants in the general batch-norm kernels and in the merge of statistics."""

from __future__ import annotations

from .mutants import Mutant

FORWARD, BACKWARD = "batch_norm_forward_general.cu", "batch_norm_backward_general.cu"
SHARED, MOMENTS, STATISTICS = "general.cuh", "moments.cuh", "batch_norm_statistics.cu"
ORDER = "test_one_launch_whose_order_changes_no_bit"

MUTANTS = [
    Mutant(
        "general: the mask is not looked at",
        SHARED,
        "if (!mask || mask[rows.at(outer_stride, inner_stride)] != 0) ",
        "",
    ),
    Mutant(
        "general: invalid rows are read",
        SHARED,
        "chunk.has(i) ? A(channel[row.at(outer_stride, inner_stride)]) : A(0)",
        "A(channel[row.at(outer_stride, inner_stride)])",
    ),
    Mutant(
        "general: parameters of 16 bits are taken for float32",
        SHARED,
        "return narrow ? A(static_cast<const T*>(parameters)[c]) : static_cast<const A*>(parameters)[c];",
        "return static_cast<const A*>(parameters)[c];",
        select="parameters",
    ),
    Mutant("general: the shift forgets d", SHARED, "shift = fma(gamma, d, ", "shift = fma(gamma, A(0), "),
    Mutant(
        "forward general: no barrier between the groups",
        FORWARD,
        "    __syncthreads();  // the next group stores in the same places\n",
        "",
        select="more_groups",
    ),
    Mutant(
        "forward general: every group is the first", FORWARD, "a.x + group * a.x_group + c", "a.x + c", select="group"
    ),
    Mutant(
        "forward general: renormalised with what was just written",
        FORWARD,
        "            if (active && a.statistic_rows > 3) before = slice.running();\n"
        "            const Moments<A> all = merge_block(own);\n",
        "            const Moments<A> all = merge_block(own);\n"
        "            if (active && a.statistic_rows > 3) before = slice.running();\n",
        select="renorm",
    ),
    Mutant(
        "forward general: d in the units of x",
        FORWARD,
        "clip(distance * before.rstd,",
        "clip(distance,",
        select="renorm",
    ),
    Mutant(
        "forward general: r has no lower limit",
        FORWARD,
        "clip(before.rstd / of.rstd, A(1) / a.r_max, a.r_max)",
        "clip(before.rstd / of.rstd, A(0), a.r_max)",
        select="renorm",
    ),
    Mutant("forward general: one value has a variance", FORWARD, " && divisor > A(0))", ")"),
    Mutant(
        "backward general: the mean over all rows, valid or not",
        BACKWARD,
        "count = value(total.of[COUNT]);",
        "count = A(a.outer * a.inner);",
    ),
    Mutant(
        "backward general: dgamma without d",
        BACKWARD,
        "fma(slice.of.r, sum_g_xhat, slice.of.d * sum_g)",
        "slice.of.r * sum_g_xhat",
        select="renorm",
    ),
    Mutant(
        "backward general: running statistics depend on x", BACKWARD, "frozen ? A(0) : sum_g / count", "sum_g / count"
    ),
    Mutant(
        "backward general: the counter is left where it is",
        BACKWARD,
        "            if (last) a.arrivals[blockIdx.x] = 0;  // as the next launch finds it\n",
        "",
        select="group",
    ),
    Mutant(
        "backward general: a block arrives without a fence",
        BACKWARD,
        "            __threadfence();\n            const bool last",
        "            const bool last",
        ("tsan",),
        ORDER,
    ),
    Mutant(
        "backward general: the last block reads without a fence",
        BACKWARD,
        "            __threadfence();\n            if (last)",
        "            if (last)",
        ("tsan",),
        ORDER,
    ),
    Mutant(
        "backward general: the next group's sums over those of this one",
        BACKWARD,
        "            __syncthreads();  // the next group shares its sums in the same places\n",
        "",
        select="test_every_group_is_a_mini_batch and float32",
    ),
    Mutant(
        "moments: a part without rows has a mean",
        MOMENTS,
        "        if (slot[0] == A(0)) continue;  // whatever its mean says\n",
        "",
        select="statistics",
    ),
    Mutant(
        "moments: parts of any size weigh the same",
        MOMENTS,
        "delta * delta * slot[0])",
        "delta * delta)",
        select="statistics",
    ),
    Mutant("statistics: rstd of the sum of squares", STATISTICS, "m2 / all.count + a.eps", "m2 + a.eps"),
    Mutant("statistics: the biased variance", STATISTICS, "m2 / divisor, keep", "m2 / all.count, keep"),
]
