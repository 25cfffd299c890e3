"""The bugs that `mutants.py` plants in RMS norm: in what the kernels of layer norm do for rows that are not centred."""

from __future__ import annotations

from .mutants import Mutant

FORWARD, FORWARD_COOPERATIVE = "layer_norm_forward.cu", "layer_norm_forward_cooperative.cu"
BACKWARD = "layer_norm_backward.cu"
MOMENTS, GRADIENTS = "lib/reduce/row_moments.cuh", "lib/reduce/row_gradients.cuh"
TESTS = ("tests/ops/test_rms_norm.py",)
FORMULAS = "test_is_what_the_formulas_say and float32"
LONG, MEET = "several_blocks and stages", "several_blocks_meet and float32"

MUTANTS = [
    Mutant(
        "rms norm: the mean is subtracted", FORWARD, "if (!a.centred) {", "if (false) {", select=FORMULAS, among=TESTS
    ),
    Mutant(
        "rms norm of long rows: the mean is subtracted",
        FORWARD_COOPERATIVE,
        "if (!a.centred) {",
        "if (false) {",
        select=LONG,
        among=TESTS,
    ),
    Mutant(
        "rms norm: squares of a thread alone",
        FORWARD,
        "        row_sums(squares, a.width, scratch);\n",
        "",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "rms norm of long rows: squares of a thread alone",
        FORWARD_COOPERATIVE,
        "            row_sums(squares, blockDim.x, scratch);\n",
        "",
        select=LONG,
        among=TESTS,
    ),
    Mutant(
        "rms norm: no squares but the last",
        MOMENTS,
        "fma(x[i], x[i], squares)",
        "x[i] * x[i]",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "rms norm: statistics where layer norm has them",
        MOMENTS,
        "a.statistics[a.centred ? 2 * a.rows + n : n] = rstd;",
        "a.statistics[n] = rstd;",
        select="where_the_mean_is_0",
        among=TESTS,
    ),
    Mutant(
        "rms norm backward: the mean of h",
        GRADIENTS,
        "if (a.centred) sum += h;",
        "sum += h;",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "rms norm backward: the product of a thread alone",
        GRADIENTS,
        "    row_sums(product, width, scratch);\n",
        "",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "rms norm backward: statistics with a mean",
        GRADIENTS,
        "    if (!a.centred) return RowStatistics<A>{{A(0), A(0)}, a.statistics[n]};\n",
        "    if (!a.centred) return RowStatistics<A>{{a.statistics[n], A(0)}, a.statistics[n]};\n",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "rms norm backward: half of the columns are merged",
        BACKWARD,
        "item < columns * quantities",
        "item < columns * quantities / 2",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "rms norm backward: half of the blocks' columns are merged",
        BACKWARD,
        "all = quantities(a) * channels",
        "all = quantities(a) * channels / 2",
        select=MEET,
        among=TESTS,
    ),
]
