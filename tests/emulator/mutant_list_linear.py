"""The bugs that `mutants.py` plants in the linear batch norm."""

from __future__ import annotations

from .mutants import Mutant

PRODUCT, SHARED = "product.cuh", "linear_batch_norm.cuh"
FORWARD, BACKWARD = "linear_batch_norm_forward.cu", "linear_batch_norm_backward.cu"
WHOLE = "test_is_a_product and float32 and relu"
SCHEDULES = "test_the_order_of_blocks_and_threads_changes_no_bit and float32"

MUTANTS = [
    Mutant(
        "product: the last slice of the terms is left out",
        PRODUCT,
        "s < slices; ++s",
        "s < slices - 1; ++s",
        select=WHOLE,
    ),
    Mutant(
        "product: every slice takes all terms",
        PRODUCT,
        "int t = slice; t < TERMS; t += slices",
        "int t = 0; t < TERMS; ++t",
        select=WHOLE,
    ),
    Mutant(
        "product: no barrier before the terms are multiplied",
        PRODUCT,
        "        }\n        __syncthreads();\n#pragma unroll 2\n",
        "        }\n#pragma unroll 2\n",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "product: the next terms over those that are still multiplied",
        PRODUCT,
        "sums[c][i]);\n        }\n        __syncthreads();\n",
        "sums[c][i]);\n        }\n",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "product: columns beyond the matrix are written",
        PRODUCT,
        "if (column + c < right.columns) emit",
        "emit",
        ("plain", "asan"),
        WHOLE,
    ),
    Mutant(
        "product: zeros are not filled in",
        PRODUCT,
        "row < rows && column < columns ?",
        "true ?",
        ("plain", "asan"),
        WHOLE,
    ),
    Mutant(
        "linear: the mean keeps what rounding left",
        FORWARD,
        "quick_two_sum(first, rest)",
        "Pair<A>{first, A(0)}",
        select="far_from",
    ),
    Mutant(
        "linear: statistics of a product that is not rounded",
        FORWARD,
        "= A(z);",
        "= value;",
        select="test_is_a_product and bfloat16",
    ),
    Mutant("linear: the running variance is biased", FORWARD, "(n - a.correction)", "n", select="running"),
    Mutant("linear: only the first tile of rows", FORWARD, "row += PRODUCT_ROWS", "row += a.rows", select=WHOLE),
    Mutant(
        "linear: no barrier before the output is stored",
        FORWARD,
        "    });\n    __syncthreads();\n    store_tile",
        "    });\n    store_tile",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "linear: the sum of a warp misses half of it",
        SHARED,
        "int apart = WARP / 2;",
        "int apart = WARP / 4;",
        select=WHOLE,
    ),
    Mutant("linear backward: dz without the mean of g", BACKWARD, "slope, mean)", "slope, A(0))", select=WHOLE),
    Mutant(
        "linear backward: dgamma without rstd",
        BACKWARD,
        "a.dgamma[m] = product * rstd",
        "a.dgamma[m] = product",
        select=WHOLE,
    ),
    Mutant(
        "linear backward: dx before all dz are there",
        BACKWARD,
        "if (gridDim.x > 1) meet(a.arrivals, gridDim.x);",
        "",
        select=WHOLE,
    ),
    Mutant(
        "linear backward: each block multiplies one tile of dx",
        BACKWARD,
        "column < a.inputs; column += step",
        "column < min(a.inputs, first + width); column += step",
        select=WHOLE,
    ),
    Mutant(
        "linear backward: dz is multiplied before it is stored",
        BACKWARD,
        "column, width);\n        __syncthreads();\n#pragma unroll 1\n",
        "column, width);\n#pragma unroll 1\n",
        ("plain", "tsan"),
        SCHEDULES,
    ),
]
