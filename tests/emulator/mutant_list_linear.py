"""The bugs that `mutants.py` plants in the linear batch norm."""

from __future__ import annotations

from .mutants import Mutant

PRODUCT, SHARED = "product.cuh", "linear_batch_norm.cuh"
FORWARD, BACKWARD = "linear_batch_norm_forward.cu", "linear_batch_norm_backward.cu"
WHOLE = "test_is_a_product and float32 and relu"
OF_LAYER = "test_is_a_product_and_its_layer_norm and float32"
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
    Mutant(
        "linear: the running variance is biased", FORWARD, "(A(z.count) - a.correction)", "A(z.count)", select="running"
    ),
    Mutant(
        "linear: only the first tile of rows",
        FORWARD,
        "row < a.rows; row += PRODUCT_ROWS",
        "row < min(a.rows, (long long)PRODUCT_ROWS); row += PRODUCT_ROWS",
        select=WHOLE,
    ),
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
        "if (gridDim.x > 1) meet(a.arrivals, gridDim.x);  // dz of all neurons",
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
    Mutant(
        "linear layer norm: statistics of a product that is not rounded",
        FORWARD,
        "= A(T(value));",
        "= value;",
        select="test_is_a_product_and_its_layer_norm and bfloat16",
    ),
    Mutant(
        "linear layer norm: gamma of another neuron",
        FORWARD,
        "load_affine(a, m);\n            of",
        "load_affine(a, c);\n            of",
        select=OF_LAYER,
    ),
    Mutant(
        "linear layer norm: the output is stored early",
        FORWARD,
        "    __syncthreads();\n    store_rows(a.y",
        "    store_rows(a.y",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant("linear layer norm: dz without the mean of h", BACKWARD, "slope, of_h)", "slope, A(0))", select=OF_LAYER),
    Mutant(
        "linear layer norm: dz without gamma",
        BACKWARD,
        "a.gamma ? a.gamma[m] * slope : slope",
        "slope",
        select=OF_LAYER,
    ),
    Mutant(
        "linear layer norm: dgamma without rstd",
        BACKWARD,
        " * a.statistics[2 * a.rows + n];\n    }\n    const A dbeta",
        ";\n    }\n    const A dbeta",
        select=OF_LAYER,
    ),
    Mutant(
        "linear layer norm: dweight before all dz are there",
        BACKWARD,
        "    if (gridDim.x > 1) meet(a.arrivals, gridDim.x);  // dz of all examples\n",
        "",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "linear layer norm: one tile of the columns of dweight",
        BACKWARD,
        "column < a.outputs; column += step) {\n        A *const",
        "column < min(a.outputs, first + width); column += step) {\n        A *const",
        select=OF_LAYER,
    ),
]
