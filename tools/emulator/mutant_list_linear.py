"""The bugs that `mutants.py` plants in the linear batch norm."""

from __future__ import annotations

from .mutants import Mutant

PRODUCT, SHARED, MATRIX, TENSOR = (
    "lib/gemm/product.cuh",
    "lib/gemm/warp_rows.cuh",
    "lib/gemm/matrix.cuh",
    "lib/gemm/tensor_product.cuh",
)
FORWARD, BACKWARD = "linear_batch_norm_forward.cu", "linear_batch_norm_backward.cu"
HALVES = "test_is_a_product_and_its_batch_norm and float16"
EXACT = "test_sums_of_integers_are_exact and float16"
HALVES_SCHEDULES = "test_the_order_of_blocks_and_threads_changes_no_bit and float16"
WHOLE = "test_is_a_product and float32 and relu"
OF_LAYER = "test_is_a_product_and_its_layer_norm and float32"
SCHEDULES = "test_the_order_of_blocks_and_threads_changes_no_bit and float32"

MUTANTS = [
    Mutant(
        "tensor cores: two rows of a fragment change places",
        TENSOR,
        "{above.at(0), below.at(0)",
        "{below.at(0), above.at(0)",
        select=HALVES,
    ),
    Mutant(
        "tensor cores: two terms of a fragment change places",
        TENSOR,
        "b[c][1] = column.at(8)",
        "b[c][1] = column.at(0)",
        select=HALVES,
    ),
    Mutant(
        "tensor cores: a thread has its neighbour's terms",
        TENSOR,
        "pair(2 * (threadIdx.x % 4))",
        "pair(2 * (threadIdx.x / 8 % 4))",
        select=HALVES,
    ),
    Mutant(
        "tensor cores: sums go to the rows of others", TENSOR, "at[8] = sums", "at[pitch + 8] = sums", select=HALVES
    ),
    Mutant(
        "tensor cores: the second slice takes what the first does",
        TENSOR,
        "int term = own.k_split * MMA_K",
        "int term = 0",
        select=HALVES,
    ),
    Mutant(
        "tensor cores: no barrier before the terms are multiplied",
        TENSOR,
        "        __syncthreads();\n        multiply_terms",
        "        multiply_terms",
        ("plain", "tsan"),
        HALVES_SCHEDULES,
    ),
    Mutant(
        "tensor cores: the next terms over those that are still multiplied",
        TENSOR,
        "own, column_tiles);\n        __syncthreads();\n",
        "own, column_tiles);\n",
        ("plain", "tsan"),
        HALVES_SCHEDULES,
    ),
    Mutant(
        "tensor cores: two rows of the second 8 terms change places",
        TENSOR,
        "above.at(8), below.at(8)",
        "below.at(8), above.at(8)",
        select=EXACT,
    ),
    Mutant(
        "tensor cores: every tile has the columns of the first",
        TENSOR,
        "(c * MMA_N + own.group_id) * HALF_PITCH",
        "own.group_id * HALF_PITCH",
        select=EXACT,
    ),
    Mutant(
        "tensor cores: a warp's second rows are its first",
        TENSOR,
        "return (first + tile * WARPS) * MMA_M + group_id",
        "return first * MMA_M + group_id",
        select=EXACT,
    ),
    Mutant(
        "tensor cores: the slices' sums in one place",
        TENSOR,
        "(own.k_split * columns + c * MMA_N + own.pair)",
        "(c * MMA_N + own.pair)",
        select=EXACT,
    ),
    Mutant(
        "tensor cores: the last tile of columns is left out",
        TENSOR,
        "column_tiles = (width + MMA_N - 1) / MMA_N",
        "column_tiles = max(1, width / MMA_N - 1)",
        select=EXACT,
    ),
    Mutant(
        "tensor cores: sums in 16 bits",
        TENSOR,
        "if (c < column_tiles) bnk_mma(T(0.0f), sums[tile][c], a, b[c]);",
        "if (c < column_tiles) {\n"
        "                    bnk_mma(T(0.0f), sums[tile][c], a, b[c]);\n"
        "                    for (float& sum : sums[tile][c]) sum = float(T(sum));\n"
        "                }",
        select="test_tensor_cores_sum or " + HALVES,
    ),
    Mutant(
        "matrix: the rest of the terms is not 0",
        MATRIX,
        "values[j] = has ? value : To(0);",
        "values[j] = value;",
        select=HALVES,
    ),
    Mutant(
        "matrix: what is behind its end",
        MATRIX,
        "factor.value(has ? at : origin,",
        "factor.value(at,",
        ("plain", "asan"),
        HALVES,
    ),
    Mutant(
        "product: the last slice of the terms is left out",
        MATRIX,
        "s < k_splits; ++s",
        "s < k_splits - 1; ++s",
        select=WHOLE,
    ),
    Mutant(
        "product: every slice takes all terms",
        PRODUCT,
        "int t = k_split; t < TILE_K; t += k_splits",
        "int t = 0; t < TILE_K; ++t",
        select=WHOLE,
    ),
    Mutant(
        "product: no barrier before the terms are multiplied",
        PRODUCT,
        "        __syncthreads();\n#pragma unroll 1\n",
        "#pragma unroll 1\n",
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
        MATRIX,
        "r < rows && c < left",
        "r < rows",
        ("plain", "asan"),
        WHOLE,
    ),
    Mutant(
        "product: zeros are not filled in",
        MATRIX,
        "if (moving + (UNROLL - 1) * stride < end)",
        "if (moving < end)",
        ("plain", "asan"),
        WHOLE,
    ),
    Mutant(
        "linear: the mean keeps what rounding left",
        FORWARD,
        "quick_two_sum(first, remainder)",
        "Pair<A>{first, A(0)}",
        select="constant_channel_is_phi and linear",
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
        "if (gridDim.x > 1) grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);  // dz of all neurons",
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
        "load_affine(a, m);\n            affine",
        "load_affine(a, c);\n            affine",
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
    Mutant("linear layer norm: dz without the mean of h", BACKWARD, "slope, mean_h)", "slope, A(0))", select=OF_LAYER),
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
        "    if (gridDim.x > 1) grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);  // dz of all examples\n",
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
