"""The bugs that `mutants.py` plants in layer norm."""

from __future__ import annotations

from .mutants import Mutant

ROW, FORWARD, BACKWARD = "lib/reduce/vector_rows.cuh", "layer_norm_forward.cu", "layer_norm_backward.cu"
MOMENTS, GRADIENTS = "lib/reduce/row_moments.cuh", "lib/reduce/row_gradients.cuh"
FORMULAS = "test_is_what_the_formulas_say and float32"
SCHEDULES = "test_the_order_of_blocks"
FINITE = "finite_rows"
PARAMETERS = ("tests/ops/test_layer_norm_parameters.py",)

MUTANTS = [
    Mutant(
        "row: a unit beyond the end of the row is read",
        ROW,
        "return shape != ANY || k * step + i",
        "return true || k * step + i",
        select=FORMULAS,
    ),
    Mutant("row: half of a warp's sum", ROW, "if (offset < width) {", "if (offset < width / 2) {", select=FORMULAS),
    Mutant(
        "row: the sum of half of the warps", ROW, "if (offset < warps) {", "if (offset < warps / 2) {", select=FORMULAS
    ),
    Mutant(
        "row: rows share a scratch",
        ROW,
        "scratch + threadIdx.y * warps * COUNT",
        "scratch",
        ("plain", "tsan"),
        select=FORMULAS,
    ),
    Mutant(
        "row: warps are summed before all are there",
        ROW,
        "    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < COUNT; ++i) sums[i] = own",
        "#pragma unroll\n    for (int i = 0; i < COUNT; ++i) sums[i] = own",
        ("plain", "tsan"),
        select="test_is_what_the_formulas_say and shape7-float32",
    ),
    Mutant("row: all threads take neighbouring units", ROW, "step(width * UNIT<T>)", "step(UNIT<T>)", select=FORMULAS),
    Mutant("row: missing parameters are 0", ROW, "values[i] = missing;", "values[i] = A(0);", select="optional"),
    Mutant(
        "layer norm: zeros beyond the end count",
        MOMENTS,
        "        if (units.has(k, i)) {\n            const A distance",
        "        {\n            const A distance",
        select=FORMULAS,
    ),
    Mutant("layer norm: the mean in one float", MOMENTS, "rest = -mean.low * rstd", "rest = A(0)", select="far_from"),
    Mutant(
        "layer norm: the variance about a number near the mean",
        MOMENTS,
        "m2 = fma(-sums[0], low, sums[1]);",
        "m2 = sums[1];",
        select="far_from",
    ),
    Mutant(
        "layer norm: the number near the mean is far from it",
        FORWARD,
        "fma(A(4), near[0], first)",
        "first",
        select="outlier",
    ),
    Mutant(
        "layer norm: the variance is unbiased",
        FORWARD,
        "m2 * share + a.eps",
        "m2 / A(a.columns - 1) + a.eps",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm: eps outside of the root",
        FORWARD,
        "reciprocal_sqrt(moments.m2 * share + a.eps)",
        "(reciprocal_sqrt(moments.m2 * share) + a.eps)",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm: rows beyond the last",
        FORWARD,
        "is_there(n < a.rows)",
        "is_there(true)",
        ("plain", "asan"),
        select=FORMULAS,
    ),
    Mutant(
        "layer norm: the second sums over the first",
        FORWARD,
        "row_sums(sums, a.width, scratch + blockDim.x * blockDim.y / WARP)",
        "row_sums(sums, a.width, scratch)",
        ("plain", "tsan"),
        select="test_is_what_the_formulas_say and shape7-float32",
    ),
    Mutant(
        "layer norm: a distance overflows",
        MOMENTS,
        "fma(A(0.5), x[i], -half_first)",
        "A(0.5) * (x[i] - A(2) * half_first)",
        select=FINITE,
    ),
    Mutant(
        "layer norm: a sum of distances overflows",
        MOMENTS,
        "if (sums[1] * A(0) != A(0)) {",
        "if (false) {",
        select=FINITE,
    ),
    Mutant("layer norm: infinity times rstd 0", FORWARD, "if (rstd == A(0)) mean", "if (false) mean", select=FINITE),
    Mutant("layer norm backward: the mean in one float", GRADIENTS, "-mean.low * rstd)", "A(0))", select="far_from"),
    Mutant(
        "layer norm backward: dx without the mean of h",
        GRADIENTS,
        "-fma(xhat[i], slope, mean_h)",
        "-xhat[i] * slope",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm backward: dx without gamma",
        GRADIENTS,
        "fma(gamma[i], g[i], -fma",
        "fma(A(1), g[i], -fma",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm backward: half of the slope",
        GRADIENTS,
        "slope = flat ? A(0) : A(2) * sums[1]",
        "slope = flat ? A(0) : sums[1]",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm backward: infinity times rstd 0",
        GRADIENTS,
        "mean(statistics.rstd == A(0) ?",
        "mean(false ?",
        select=FINITE,
    ),
    Mutant(
        "layer norm backward: sums of the first row of threads alone",
        BACKWARD,
        "row < threads / width",
        "row < 1",
        select=FORMULAS,
    ),
    Mutant("layer norm backward: sums are not cleared", BACKWARD, "    sums.clear();\n", "", select=FORMULAS),
    Mutant(
        "layer norm backward: terms are added twice", BACKWARD, "            terms[k] = {};\n", "", select="many_rows"
    ),
    Mutant(
        "layer norm backward: hundreds of rows in registers",
        GRADIENTS,
        "ROWS_IN_REGISTERS = 16",
        "ROWS_IN_REGISTERS = 1024",
        select="many_rows",
    ),
    Mutant(
        "layer norm backward: the copies of a row are not waited for",
        BACKWARD,
        "            wait_for_copies<1>();\n",
        "            wait_for_copies<2>();\n",
        select=FORMULAS,
    ),
    Mutant(
        "layer norm backward: the copies of the only row are not waited for",
        BACKWARD,
        "        else\n            wait_for_copies<0>();\n",
        "        else\n            wait_for_copies<1>();\n",
        select="no_room_for_two",
    ),
    Mutant(
        "layer norm backward: the next row over the one in use",
        BACKWARD,
        "? 1 - odd : 0",
        "? odd : 0",
        select="several_blocks",
    ),
    Mutant(
        "layer norm backward: always the first stage",
        BACKWARD,
        "a.stages == 2 ? odd : 0, next",
        "0, next",
        select="several_blocks or many_rows",
    ),
    Mutant(
        "layer norm backward: the statistics of the row before",
        BACKWARD,
        "next = statistics_of(a, own.row(n + step))",
        "next = statistics_of(a, own.row(n))",
        select="several_blocks",
    ),
    Mutant(
        "layer norm backward: a sum over one that is still read",
        BACKWARD,
        "scratch + odd * 2 * a.threads / WARP",
        "scratch",
        ("plain", "tsan"),
        select=SCHEDULES,
    ),
    Mutant(
        "layer norm backward: blocks do not wait",
        BACKWARD,
        "    grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);\n",
        "",
        select="several_blocks or " + SCHEDULES,
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
        "    __syncthreads();\n    const GroupRows rows(a);",
        "    const GroupRows rows(a);",
        ("plain", "tsan"),
        select=SCHEDULES,
    ),
    Mutant(
        "parameters of 16 bits are read as float32",
        ROW,
        "if (sizeof(T) == 2 && kind == IN_STORAGE_TYPE) return",
        "if (sizeof(T) == 2 && kind > IN_STORAGE_TYPE) return",
        among=PARAMETERS,
        select="shape1-bfloat16-gamma-identity",
    ),
    Mutant(
        "the gradient of a shift of 16 bits is stored as float32",
        GRADIENTS,
        "|| a.shifted == IN_STORAGE_TYPE",
        "",
        among=PARAMETERS,
        select="shape1-float16-beta-identity",
    ),
]
