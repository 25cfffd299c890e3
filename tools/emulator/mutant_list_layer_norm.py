"""The bugs that `mutants.py` plants in layer norm."""

from __future__ import annotations

from .mutants import Mutant

ROW, FORWARD, BACKWARD = "lib/reduce/vector_rows.cuh", "layer_norm_forward.cu", "layer_norm_backward.cu"
FORMULAS = "test_is_what_the_formulas_say and float32"
SCHEDULES = "test_the_order_of_blocks"

MUTANTS = [
    Mutant(
        "row: a unit beyond the end of the row is read",
        ROW,
        "return aligned16 || unit",
        "return true || unit",
        select=FORMULAS,
    ),
    Mutant("row: half of a warp's sum", ROW, "min(width, 32) / 2", "min(width, 16) / 2", select=FORMULAS),
    Mutant(
        "row: the sum of the first warps alone",
        ROW,
        "warp < warps; ++warp",
        "warp < warps - 1; ++warp",
        select=FORMULAS,
    ),
    Mutant(
        "row: the next sum over one that is still read",
        ROW,
        "    __syncthreads();  // the next sum uses the same scratch\n",
        "",
        ("plain", "tsan"),
        "test_is_what_the_formulas_say and shape7-float32",
    ),
    Mutant("row: rows share a scratch", ROW, "scratch + threadIdx.y * warps", "scratch", ("plain", "tsan"), FORMULAS),
    Mutant("row: all take the same unit", ROW, "work(k++, unit)", "work(k, unit)", select=FORMULAS),
    Mutant(
        "layer norm: zeros beyond the end are squared",
        FORWARD,
        "if (rows.has<T>(unit, i)) square",
        "square",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm: the mean in one float",
        FORWARD,
        "get(values, i), mean);",
        "get(values, i), Pair<A>{mean.high, A(0)});",
        select="far_from",
    ),
    Mutant(
        "layer norm: the variance is unbiased",
        FORWARD,
        "/ A(a.columns) + a.eps",
        "/ A(a.columns - 1) + a.eps",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm: eps outside of the root",
        FORWARD,
        "A(a.columns) + a.eps)",
        "A(a.columns)) + a.eps",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm: rows beyond the last",
        FORWARD,
        "n < a.rows ? rows.units<T>() : 0",
        "rows.units<T>()",
        ("plain", "asan"),
        FORMULAS,
    ),
    Mutant(
        "layer norm backward: dx without the mean of h",
        BACKWARD,
        "fma(d[i], slope, mean)",
        "d[i] * slope",
        select=FORMULAS,
    ),
    Mutant("layer norm backward: dx without gamma", BACKWARD, "(gamma[i] * g[i] -", "(g[i] -", select=FORMULAS),
    Mutant(
        "layer norm backward: the slope by one rstd", BACKWARD, "* row.rstd * row.rstd", "* row.rstd", select=FORMULAS
    ),
    Mutant(
        "layer norm backward: sums of the first row of threads alone",
        BACKWARD,
        "row < (int)blockDim.y",
        "row < 1",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm backward: sums are not cleared",
        BACKWARD,
        "        sums.clear(last - first);\n",
        "",
        select="read_again",
    ),
    Mutant(
        "layer norm backward: blocks do not wait",
        BACKWARD,
        "    grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);\n",
        "",
        select="several_blocks or " + SCHEDULES,
    ),
    Mutant(
        "layer norm backward: the first chunk of the columns comes first",
        BACKWARD,
        "first = (units - 1) / a.chunk * a.chunk; first >= 0; first -= a.chunk",
        "first = 0; first < units; first += a.chunk",
        select="read_again",
    ),
    Mutant(
        "layer norm backward: blocks' parts are not all merged",
        BACKWARD,
        "i < parts; ++i",
        "i < parts - 1; ++i",
        select="several_blocks",
    ),
    Mutant(
        "layer norm backward: rows of threads are merged before all are there",
        BACKWARD,
        "        }\n        __syncthreads();\n        sums.merge",
        "        }\n        sums.merge",
        ("plain", "tsan"),
        SCHEDULES,
    ),
]
