"""The bugs that `mutants.py` plants in group norm: in what the kernels of layer norm do for groups of channels."""

from __future__ import annotations

from .mutants import Mutant

ROW, GRADIENTS, SHARED = "lib/reduce/vector_rows.cuh", "lib/reduce/row_gradients.cuh", "lib/reduce/shared_rows.cuh"
BACKWARD, COOPERATIVE = "layer_norm_backward.cu", "layer_norm_backward_cooperative.cu"
TESTS = "tests/ops/test_group_norm.py", "tests/ops/test_group_norm_launch.py"
FORMULAS = "test_is_what_the_formulas_say and float32"
MEET, LONG, ORDER = "several_blocks_meet and float32", "test_long_groups_of_several_blocks", "test_the_order_of_blocks"

MUTANTS = [
    Mutant(
        "group norm: all groups have the parameters of the first",
        ROW,
        "a.channel_groups == 1 ? 0 :",
        "true ? 0 :",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm: a column each has a parameter",
        ROW,
        "(own + i) / place.inner",
        "min(own + i, (long long)place.inner - 1)",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm: a unit is always within a channel",
        ROW,
        "within = place.inner % UNIT<T> == 0",
        "within = true",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm: the columns before a span are forgotten",
        ROW,
        "own = place.column + column + k * step;\n        const bool",
        "own = column + k * step;\n        const bool",
        select=LONG,
        among=TESTS,
    ),
    Mutant(
        "group norm: 16-bit parameters of channels are read as float32",
        ROW,
        "one = kind == IN_STORAGE_TYPE ?",
        "one = kind > IN_STORAGE_TYPE ?",
        select="test_16_bit_parameters and float16 and 12",
        among=TESTS,
    ),
    Mutant(
        "group norm backward: a block has rows of all groups",
        GRADIENTS,
        "return i * groups + group;",
        "return i * groups + i % groups;",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm backward: rows beyond the last",
        GRADIENTS,
        "all(a.rows / groups)",
        "all(a.rows / groups - 1)",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm backward: half of a warp's pairs",
        GRADIENTS,
        "offset = WARP / 2; offset > 0; offset /= 2)\n        sum = add(sum",
        "offset = WARP / 4; offset > 0; offset /= 2)\n        sum = add(sum",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm backward: the first columns of a channel alone",
        BACKWARD,
        "i < inner; i += WARP)",
        "i < min(inner, WARP); i += WARP)",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm backward: partial sums of other groups",
        BACKWARD,
        "a.partial[rows.row(block) * 2 * channels",
        "a.partial[(long long)block * 2 * channels",
        select=MEET,
        among=TESTS,
    ),
    Mutant(
        "group norm backward: sums of all groups in one place",
        BACKWARD,
        "store_sum<T>(a, quantity, rows.group * channels + channel, sum);",
        "store_sum<T>(a, quantity, channel, sum);",
        select=FORMULAS,
        among=TESTS,
    ),
    Mutant(
        "group norm backward of long rows: sums over other groups",
        SHARED,
        "group < gridDim.x; group += step)",
        "group < gridDim.x; ++group)",
        select=LONG,
        among=TESTS,
    ),
    Mutant(
        "group norm backward of long rows: channels before all splits are there",
        COOPERATIVE,
        "if (sharers > 1)",
        "if (false)",
        select=f"{LONG} or {ORDER}",
        among=TESTS,
    ),
    Mutant(
        "group norm backward of long rows: the first warp's pairs alone",
        COOPERATIVE,
        "i < blockDim.x / WARP; ++i)",
        "i < 1; ++i)",
        select=LONG,
        among=TESTS,
    ),
    Mutant(
        "group norm backward of long rows: pairs over those still read",
        COOPERATIVE,
        "value(sum));\n            }\n            __syncthreads();\n",
        "value(sum));\n            }\n",
        ("plain", "tsan"),
        select=ORDER,
        among=TESTS,
    ),
]
