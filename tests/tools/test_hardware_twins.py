"""Emulated instructions: conversions to 16 bits and to TF32, 1 / sqrt(x), asynchronous copies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bnkernels.runtime.seam import Launch
from tests.ops.test_batch_norm_masked import dtype_named
from tools.emulator import EmulatorRuntime, planted
from tools.emulator.binding import RSQRT_BOUND
from tools.emulator.build import CUDA, CUDA_VARIABLE, read_sources

pytestmark = [
    pytest.mark.emulator,  # so that mutants of these headers are tried on them
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
]

SOURCE = """
#include "lib/gemm/tensor_product.cuh"
#include "lib/kernel.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/numbers/vector.cuh"

struct Numbers {
    const float* x;
    void* y;
    long long n;
};

template <typename T>
__device__ __forceinline__ void convert(const Numbers& a) {
    constexpr int COUNT = Packed<T>::COUNT;
    for (long long i = threadIdx.x; i < a.n / COUNT; i += blockDim.x) {
        Unpacked<T> values, back;
        for (int j = 0; j < COUNT; ++j) values[j] = a.x[i * COUNT + j];
        const Vector vector = pack<T>(values);
        unpack<T>(vector, back);
        for (int j = 0; j < COUNT; ++j) {
            T* const y = static_cast<T*>(a.y) + i * COUNT + j;
            store(*y, values[j]);
            if (Packed<T>::get(vector, j) != back[j] && back[j] == back[j]) y->bits = 0x7fffu;
            if ((float)*y != back[j] && back[j] == back[j]) y->bits = 0x7fffu;  // one by one as two at a time
        }
    }
}

__device__ __forceinline__ void invert(const Numbers& a) {
    for (long long i = threadIdx.x; i < a.n; i += blockDim.x) static_cast<float*>(a.y)[i] = reciprocal_sqrt(a.x[i]);
}

__device__ __forceinline__ void shorten(const Numbers& a) {
    for (long long i = threadIdx.x; i < a.n; i += blockDim.x)
        static_cast<unsigned*>(a.y)[i] = bnk_float_to_tf32(a.x[i]);
}

BNK_KERNEL(bnk_twins_float16, (Numbers), 32, 0, (convert<Float16>))
BNK_KERNEL(bnk_twins_bfloat16, (Numbers), 32, 0, (convert<BFloat16>))
BNK_KERNEL(bnk_twins_rsqrt, (Numbers), 32, 0, (invert))
BNK_KERNEL(bnk_twins_tf32, (Numbers), 32, 0, (shorten))
"""
ARGUMENTS = np.dtype([("x", "u8"), ("y", "u8"), ("n", "i8")])


@pytest.fixture(scope="module")
def runtime() -> EmulatorRuntime:
    folder = Path(os.environ.get(CUDA_VARIABLE) or CUDA)
    return EmulatorRuntime("plain", read_sources(folder) | {"twins.cu": SOURCE})


def ran(runtime: EmulatorRuntime, kernel: str, numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return what a kernel makes of float32 numbers."""
    x, y = runtime.asarray(numbers, read_only=True), runtime.empty(numbers.shape, dtype)
    arguments = np.array((runtime.pointer(x), runtime.pointer(y), x.size), ARGUMENTS)
    runtime.launch("twins", f"bnk_twins_{kernel}", Launch((1, 1, 1), (32, 1, 1)), arguments)
    return np.asarray(y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_to_16_bits_round_to_nearest_even(runtime: EmulatorRuntime, dtype: str) -> None:
    dtype = np.dtype(dtype_named(dtype))
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    halfway = (finite[:-1].astype(np.float64) + finite[1:]) / 2  # exact in float32, as its neighbours there are
    close = [np.nextafter(halfway.astype(np.float32), np.float32(side)) for side in (-np.inf, np.inf)]
    beyond = np.float32([65519.996, 65520, -65520, 3.3961776e38, 3.39e38, 3.4028235e38, 1e-45, -1e-45, 0, -0.0])
    numbers = np.concatenate([every, halfway.astype(np.float32), *close, beyond])
    numbers = np.concatenate([numbers, np.zeros(-numbers.size % 8, np.float32)])
    found = ran(runtime, dtype.name, numbers, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(dtype)
    numeric = ~np.isnan(numbers)
    np.testing.assert_array_equal(found[numeric].view(np.uint16), expected[numeric].view(np.uint16))
    assert np.isnan(found[~numeric].astype(np.float32)).all()


def test_conversion_to_tf32_rounds_to_nearest_and_ties_away_from_zero(runtime: EmulatorRuntime) -> None:
    """The PTX ISA's cvt.rna.tf32.f32: 11 binary digits, or those above 2^-136, and infinity beyond the largest."""
    kept = np.arange(0, 2**19, 7, dtype=np.uint32)[:, None] << 13  # all exponents, both signs, most digits
    dropped = np.uint32([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    ends = np.uint32([0x7F7FEFFF, 0x7F7FF000, 0xFF7FF000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFC00001])
    numbers = np.concatenate([(kept | dropped).ravel(), ends]).view(np.float32)
    numbers = numbers[~np.isnan(numbers) | ((numbers.view(np.uint32) & 0x7FE000) != 0)]  # NaN has a digit that is kept
    found = ran(runtime, "tf32", numbers, np.dtype(np.uint32))
    assert not (found & 0x1FFF).any()
    wide = np.abs(numbers[np.isfinite(numbers)].astype(np.float64))
    unit = np.exp2(np.maximum(np.frexp(wide)[1] - 1, -126) - 10.0)
    nearest = np.floor(wide / unit + 0.5) * unit  # exact: there are few digits
    expected = np.array(numbers)
    expected[np.isfinite(numbers)] = np.where(nearest < 2.0**128, nearest, np.inf).astype(np.float32)
    numeric = ~np.isnan(numbers)
    expected = np.copysign(expected, numbers)
    np.testing.assert_array_equal(found[numeric], expected[numeric].view(np.uint32))
    assert np.isnan(found[~numeric].view(np.float32)).all()


@pytest.mark.parametrize("end", [-1, 0, 1])
def test_reciprocal_sqrt_is_within_one_and_a_half_units_at_both_ends_of_the_bound(
    runtime: EmulatorRuntime, end: int
) -> None:
    rng = np.random.default_rng(5)
    numbers = np.exp2(rng.uniform(-126, 128, 20000)).astype(np.float32)
    numbers = np.concatenate([numbers, np.float32([1, 4, 2.0**-126, np.finfo(np.float32).max, 1 + 2**-23])])
    with runtime.rsqrt_error(end * RSQRT_BOUND):
        found = ran(runtime, "rsqrt", numbers, np.dtype("f4"))
    exact = 1 / np.sqrt(numbers.astype(np.float64))
    error = np.abs(found - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() <= 1.5


@pytest.mark.parametrize("end", [-1, 1])
def test_reciprocal_sqrt_keeps_the_special_values(runtime: EmulatorRuntime, end: int) -> None:
    numbers = np.float32([0, np.inf, np.nan, -1, -np.inf])
    with runtime.rsqrt_error(end * RSQRT_BOUND):
        found = ran(runtime, "rsqrt", numbers, np.dtype("f4"))
    np.testing.assert_array_equal(found, np.float32([np.inf, 0, np.nan, np.nan, np.nan]))


def test_an_asynchronous_copy_is_there_after_its_wait_and_not_before() -> None:
    runtime = EmulatorRuntime("plain", planted.SOURCES)
    neighbours = np.arange(32) ^ 1
    np.testing.assert_array_equal(planted.launch_case(runtime, "async_copy").y, 2 * neighbours)
    for too_early in ("async_copy:1", "async_copy:2"):
        assert np.isnan(planted.launch_case(runtime, too_early).y).all()


@pytest.mark.parametrize(("words", "turns"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts_are_counted(words: int, turns: int) -> None:
    runtime = EmulatorRuntime("plain", planted.SOURCES)
    with runtime.counting_turns():
        planted.launch_case(runtime, f"columns:{words}")
    counts = runtime.launches[-1].counts
    assert (counts.shared_turns, counts.fewest_shared_turns) == (2 * turns, 2)


def test_vectors_are_served_eight_lanes_at_a_time() -> None:
    text = """
#include "lib/kernel.cuh"
#include "lib/numbers/vector.cuh"
struct Nothing {};
__device__ __forceinline__ void keep(const Nothing&) {
    BNK_DYNAMIC_SHARED(Vector, vectors);
    bnk_store_vector(vectors + threadIdx.x, Vector{});
}
BNK_KERNEL(bnk_vectors, (Nothing), 32, 0, (keep))
"""
    runtime = EmulatorRuntime("plain", read_sources(CUDA) | {"vectors.cu": text})
    with runtime.counting_turns():
        runtime.launch("vectors", "bnk_vectors", Launch((1, 1, 1), (32, 1, 1), 512), np.zeros((), "V1"))
    counts = runtime.launches[-1].counts
    assert (counts.shared_turns, counts.fewest_shared_turns) == (4, 4)
