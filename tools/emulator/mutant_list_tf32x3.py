"""The bugs that `mutants.py` plants in the float32 products on tensor cores."""

from __future__ import annotations

from .mutants import Mutant

TENSOR, PRODUCT = "lib/gemm/tensor_product.cuh", "lib/gemm/product.cuh"
PARTS = "test_both_parts_of_a_number"
SPECIAL = "test_infinity_and_nan_are_those_of_float32"
HUGE = "test_the_last_numbers_below_infinity"

MUTANTS = [
    Mutant(
        "tf32x3: the low part of a number is forgotten",
        TENSOR,
        "low[i] = bnk_bits_of(value - bnk_float_of(high[i])) & 0xffffe000u;",
        "low[i] = 0;",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: the low part belongs to a number that is cut off",
        TENSOR,
        "value - bnk_float_of(high[i])",
        "value - bnk_float_of(word & 0xffffe000u)",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: the left factor's low part twice, the right one's never",
        TENSOR,
        "bnk_mma(TensorFloat32(), small, a.high, b.low)",
        "bnk_mma(TensorFloat32(), small, a.low, b.high)",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: the product of the low parts in place of one with a high part",
        TENSOR,
        "bnk_mma(TensorFloat32(), small, a.low, b.high)",
        "bnk_mma(TensorFloat32(), small, a.low, b.low)",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: only the last large products are kept",
        TENSOR,
        "sums[i] += large[i];",
        "sums[i] = large[i];",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: a thread has the terms of 16-bit fragments",
        TENSOR,
        "own.pair * Terms<T>::WORD / 2",
        "own.pair",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: the small products are not added",
        TENSOR,
        "? sums[i] + small[i] : sums[i]",
        "? sums[i] : sums[i]",
        select=PARTS,
    ),
    Mutant(
        "tf32x3: the low part of infinity is added",
        TENSOR,
        "? sums[i] + small[i] : sums[i]",
        "? sums[i] + small[i] : sums[i] + small[i]",
        select=SPECIAL,
    ),
    Mutant(
        "tf32x3: single floats behind the end of a matrix",
        TENSOR,
        "first + other),\n                                      other < others_left && term < terms_left);",
        "first + other),\n                                      true);",
        ("plain", "asan"),
        PARTS,
        ("tests/ops/test_linear_batch_norm_tf32x3.py",),
    ),
    Mutant(
        "tf32x3: products of float32 in place of it",
        PRODUCT,
        "|| PRECISION == TF32X3)",
        "|| (PRECISION == TF32X3 && sizeof(A) == 2))",
        select=HUGE,
        among=("tests/ops/test_linear_batch_norm_tf32x3.py",),
    ),
]
