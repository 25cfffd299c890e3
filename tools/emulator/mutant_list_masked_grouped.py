"""The bugs that `mutants.py` plants in the masked and grouped batch-norm kernels and in the merge of statistics."""

from __future__ import annotations

from .mutants import Mutant

FORWARD, BACKWARD = "batch_norm_forward_masked_grouped.cu", "batch_norm_backward_masked_grouped.cu"
SHARED, MOMENTS, STATISTICS = "lib/reduce/masked_rows.cuh", "lib/reduce/moments.cuh", "batch_norm_statistics.cu"
ORDER = "test_one_launch_whose_order_changes_no_bit"

MUTANTS = [
    Mutant(
        "masked: the mask is not looked at",
        SHARED,
        "if (!mask || mask[rows.at(outer_stride, inner_stride)] != 0) ",
        "",
    ),
    Mutant(
        "masked: invalid rows are read",
        SHARED,
        "chunk.has(i) ? A(channel[row.at(outer_stride, inner_stride)]) : A(0)",
        "A(channel[row.at(outer_stride, inner_stride)])",
    ),
    Mutant(
        "masked: parameters of 16 bits are taken for float32",
        SHARED,
        "return params_in_storage_type ? A(static_cast<const T*>(parameters)[c]) : "
        "static_cast<const A*>(parameters)[c];",
        "return static_cast<const A*>(parameters)[c];",
        select="parameters",
    ),
    Mutant("masked: the shift forgets d", SHARED, "shift = fma(gamma, d, ", "shift = fma(gamma, A(0), "),
    Mutant(
        "forward masked: no barrier between the groups",
        FORWARD,
        "    __syncthreads();  // the next group uses the same shared memory\n",
        "",
        select="more_groups",
    ),
    Mutant(
        "forward masked: every group is the first",
        FORWARD,
        "a.x + group * a.x_group + c",
        "a.x + c",
        select="group",
    ),
    Mutant(
        "forward masked: renormalised with what was just written",
        FORWARD,
        "            if (active && a.statistic_rows > 3) before = channel.running();\n"
        "            const Moments<A> all = merge_block(own);\n",
        "            const Moments<A> all = merge_block(own);\n"
        "            if (active && a.statistic_rows > 3) before = channel.running();\n",
        select="renorm",
    ),
    Mutant(
        "forward masked: d in the units of x",
        FORWARD,
        "clip(distance * before.rstd,",
        "clip(distance,",
        select="renorm",
    ),
    Mutant(
        "forward masked: r has no lower limit",
        FORWARD,
        "clip(before.rstd / norm.rstd, A(1) / a.r_max, a.r_max)",
        "clip(before.rstd / norm.rstd, A(0), a.r_max)",
        select="renorm",
    ),
    Mutant("forward masked: one value has a variance", FORWARD, " && divisor > A(0))", ")"),
    Mutant(
        "backward masked: the mean over all rows, valid or not",
        BACKWARD,
        "count = value(total.sums[COUNT]);",
        "count = A(a.outer * a.inner);",
    ),
    Mutant(
        "backward masked: dgamma without d",
        BACKWARD,
        "fma(channel.norm.r, sum_g_xhat, channel.norm.d * sum_g)",
        "channel.norm.r * sum_g_xhat",
        select="renorm",
    ),
    Mutant(
        "backward masked: running statistics depend on x",
        BACKWARD,
        "frozen ? A(0) : sum_g / count",
        "sum_g / count",
    ),
    Mutant(
        "backward masked: the counter is left where it is",
        BACKWARD,
        "            if (last) a.finished_blocks[blockIdx.x] = 0;  // reset for the next launch\n",
        "",
        select="group",
    ),
    Mutant(
        "backward masked: a block arrives without a fence",
        BACKWARD,
        "            __threadfence();\n            const bool last",
        "            const bool last",
        ("tsan",),
        ORDER,
    ),
    Mutant(
        "backward masked: the last block reads without a fence",
        BACKWARD,
        "            __threadfence();\n            if (last)",
        "            if (last)",
        ("tsan",),
        ORDER,
    ),
    Mutant(
        "backward masked: the next group's sums over those of this one",
        BACKWARD,
        "            __syncthreads();  // the next group uses the same shared memory\n",
        "",
        select="test_every_group_is_a_mini_batch and float32",
    ),
    Mutant(
        "moments: a part without rows has a mean",
        MOMENTS,
        "        if (slot[0] == A(0)) continue;  // its mean is undefined\n",
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
