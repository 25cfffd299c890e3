"""The bugs that `mutants.py` plants in groups and masks of the cooperative batch-norm kernels."""

from __future__ import annotations

from .mutants import Mutant

BARRIER, SLICES, VECTOR = "lib/sync/grid_barrier.cuh", "lib/reduce/cooperative_slices.cuh", "lib/numbers/vector.cuh"
FORWARD, BACKWARD = "batch_norm_forward_cooperative.cu", "batch_norm_backward_cooperative.cu"

MASKED = ("tests/ops/test_batch_norm_cooperative_masked.py",)
GROUPS = ("tests/ops/test_batch_norm_cooperative_groups.py",)

MUTANTS = [
    Mutant(
        "forward cooperative groups: the flag of a slice is cleared while others read it",
        FORWARD,
        "    wait_for_copies();\n    __syncthreads();  // behind",
        "    if (threadIdx.x == 0 && threadIdx.y == 0) *reduction.flag = 0;\n"
        "    wait_for_copies();\n    __syncthreads();  // behind",
        ("tsan",),
        select="changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "cooperative groups: one block does not wait for its threads",
        SLICES,
        "        else\n            __syncthreads();\n    }\n\n    __device__",
        "    }\n\n    __device__",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "cooperative groups: a run takes neighbouring groups",
        SLICES,
        "(long long)(turn % groups) * runs",
        "turn % groups",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "forward cooperative groups: the statistics of the last group for all",
        FORWARD,
        "    a.statistics += group * 3 * a.channels;\n",
        "",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "backward cooperative groups: dgamma of the last group alone",
        BACKWARD,
        "if (number > 0)",
        "if (false)",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "backward cooperative groups: sums over groups where the workers' are",
        BACKWARD,
        "a.groups == 1 ? 15 : 19",
        "15",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "backward cooperative groups: one run for all",
        BACKWARD,
        "run < turns.runs; ++run",
        "run < 1; ++run",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "backward cooperative groups: the first run to be done adds up",
        BACKWARD,
        "        if (!arrive_last(counter, turns.runs, token, reduction.flag + 1)) return;",
        "        const bool later = arrive_last(counter, turns.runs, token, reduction.flag + 1);\n"
        "        if (!later && token & ~BARRIER_PHASE) return;",
        select="share_groups or changes_no_bit_of_groups",
        among=GROUPS,
    ),
    Mutant(
        "cooperative masked: rows that the mask excludes are kept",
        SLICES,
        "if ((bits >> i & 1u) == 0 || held == most) continue;",
        "if (held == most) continue;",
        among=MASKED,
    ),
    Mutant(
        "cooperative masked: rows behind those that are held begin a row late",
        SLICES,
        "valid.rest = first + i + 1;",
        "valid.rest = first + i + 2;",
        among=MASKED,
    ),
    Mutant(
        "cooperative masked: the number of valid rows of the turn before stays",
        SLICES,
        "*valid(!odd) = 0;",
        ";",
        among=MASKED,
    ),
    Mutant(
        "cooperative masked: the last block counts its rows twice",
        SLICES,
        "            if (block != blockIdx.y) sum",
        "            sum",
        among=MASKED,
    ),
    Mutant(
        "forward cooperative masked: the shift is that of a worker without a valid row",
        FORWARD,
        "tried < blockDim.y && held_of[worker] == 0; ++tried",
        "false; ++tried",
        among=MASKED,
    ),
    Mutant(
        "forward cooperative masked: few rows are summed about their median",
        FORWARD,
        "a.masked && *reduction.valid(odd) < blockDim.y",
        "a.masked && *reduction.valid(odd) == 0",
        among=MASKED,
    ),
    Mutant(
        "forward cooperative masked: differences from the mean of a block without a valid row",
        FORWARD,
        "of_column(counts(), odd)[block] == 0) ++block;",
        "of_column(counts(), odd)[block] == 0) return 0;",
        among=MASKED,
    ),
    Mutant(
        "forward cooperative masked: the mean is over all rows",
        FORWARD,
        "merged[0] * (values() / count)",
        "merged[0]",
        among=MASKED,
    ),
    Mutant(
        "forward cooperative masked: rows that are not held are all summed",
        FORWARD,
        "i + j < last && (bits >> j & 1u) != 0;",
        "i + j < last;",
        among=MASKED,
    ),
    Mutant(
        "forward cooperative masked: no valid row updates the running variance",
        FORWARD,
        "(!a.masked || divisor > A(0))",
        "true",
        among=MASKED,
    ),
    Mutant(
        "backward cooperative masked: residuals of rows that the mask excludes",
        BACKWARD,
        "while (!inputs.counts(row)) rows.advance(row);",
        ";",
        among=MASKED,
    ),
    Mutant(
        "backward cooperative masked: rows that are not held are all summed",
        BACKWARD,
        "if (a.masked && !inputs.counts(row)) continue;",
        "",
        among=MASKED,
    ),
    Mutant(
        "backward cooperative masked: gradients where the mask is false stay as they were",
        BACKWARD,
        "                store_words<BYTES>(rows.at(a.dx + output, a.channels * a.inner, row), RowVector{});\n",
        "",
        among=MASKED,
    ),
]
