"""Products on tensor cores: the host version by the PTX ISA, then exact sums of 16-bit numbers, of every shape."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.seam import Launch
from tests.ops.test_batch_norm_masked import dtype_named
from tests.ops.test_linear_batch_norm import H200
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.emulator.build import CUDA, read_sources

DTYPES = ["float16", "bfloat16"]
# (N, K, M): the terms of one instruction, one fewer and one more, and more than lie in shared memory at once; rows and
# columns that fill no tile; both sets of a warp's rows; one of each.
SIZES = [(2, 1, 5), (5, 7, 33), (64, 16, 8), (65, 17, 20), (512, 33, 1), (20, 100, 33)]

FRAGMENTS = """
#include "lib/gemm/tensor_product.cuh"
#include "lib/kernel.cuh"

struct Fragments {
    const unsigned* a;
    const unsigned* b;
    float* d;
};

template <typename T>
__device__ __forceinline__ T zero() {
    return {};
}

template <typename T>
__device__ __forceinline__ void multiply(const Fragments& all) {
    const int lane = threadIdx.x;
    unsigned a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = all.a[4 * lane + i];
    for (int i = 0; i < 2; ++i) b[i] = all.b[2 * lane + i];
    for (int i = 0; i < 4; ++i) d[i] = all.d[4 * lane + i];
    bnk_mma(zero<T>(), d, a, b);
    for (int i = 0; i < 4; ++i) all.d[4 * lane + i] = d[i];
}
BNK_KERNEL(bnk_fragments_float16, (Fragments), 32, 0, (multiply<Float16>))
BNK_KERNEL(bnk_fragments_bfloat16, (Fragments), 32, 0, (multiply<BFloat16>))
BNK_KERNEL(bnk_fragments_tf32, (Fragments), 32, 0, (multiply<TensorFloat32>))
"""


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, most: int = 1) -> np.ndarray:
    """Return numbers whose sums of products are exact, in whatever order and however they are rounded."""
    return rng.integers(-most, most + 1, shape).astype(dtype_named(dtype))


@pytest.mark.emulator
@pytest.mark.plain_build
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_version_has_the_fragments_of_the_ptx_isa(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str
) -> None:
    """PTX ISA 9.2, section 9.7.14.5.8, element by element; the kernel and the host version could be wrong together."""
    runtime = EmulatorRuntime("plain", read_sources(CUDA) | {"fragments.cu": FRAGMENTS})
    a, b = (integers(rng, shape, dtype, 8) for shape in ((16, 16), (16, 8)))
    c = rng.integers(-1000, 1000, (16, 8)).astype("float32")
    lane, i = np.arange(32)[:, None], np.arange(8)
    group, in_group = lane >> 2, lane % 4
    of_a = a[np.where((i < 2) | ((4 <= i) & (i < 6)), group, group + 8), in_group * 2 + (i & 1) + 8 * (i >= 4)]
    i = np.arange(4)
    of_b = b[in_group * 2 + (i & 1) + 8 * (i >= 2), group + 0 * i]
    of_c = np.where(i < 2, group, group + 8), in_group * 2 + (i & 1)
    words = [np.ascontiguousarray(of).view(np.uint32) for of in (of_a, of_b)]
    d = multiplied(runtime, dtype, *words, c[of_c])
    np.testing.assert_array_equal(d, (a.astype("float64") @ b.astype("float64") + c)[of_c])


def multiplied(runtime: EmulatorRuntime, dtype: str, a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return what one instruction of a warp makes of the registers of its threads."""
    *words, sums = (runtime.asarray(array) for array in (a, b, d))
    record = np.array([runtime.pointer(array) for array in (*words, sums)], np.uint64).view("V24").reshape(())
    runtime.launch("fragments", f"bnk_fragments_{dtype}", Launch((1, 1, 1), (32, 1, 1)), record)
    return np.asarray(sums)


@pytest.mark.emulator
@pytest.mark.plain_build
def test_the_host_version_has_the_tf32_fragments_of_the_ptx_isa(
    emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    """The section on mma.m16n8k8 for .tf32; of a register only the first 19 bits count."""
    runtime = EmulatorRuntime("plain", read_sources(CUDA) | {"fragments.cu": FRAGMENTS})
    a, b = (rng.integers(-2047, 2048, shape).astype("float32") for shape in ((16, 8), (8, 8)))
    c = rng.integers(-1000, 1000, (16, 8)).astype("float32")
    lane, i = np.arange(32)[:, None], np.arange(4)
    group, in_group = lane >> 2, lane % 4
    of_a = a[np.where(i % 2 == 0, group, group + 8), in_group + 4 * (i >= 2)]
    of_b = b[in_group + 4 * i[:2], group + 0 * i[:2]]
    of_c = np.where(i < 2, group, group + 8), in_group * 2 + (i & 1)
    words = [
        np.ascontiguousarray(of).view(np.uint32) | rng.integers(0, 2**13, of.shape, np.uint32) for of in (of_a, of_b)
    ]
    d = multiplied(runtime, "tf32", *words, c[of_c])
    np.testing.assert_array_equal(d, (a.astype("float64") @ b.astype("float64") + c)[of_c])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_of_integers_are_exact(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str
) -> None:
    """Narrow blocks and wide ones, both directions, and layer norm's forward, whose matrices are transposed."""
    rows, inputs, outputs = sizes
    x, weight, dy = (integers(rng, s, dtype) for s in ((rows, inputs), (inputs, outputs), (rows, outputs)))
    wide_x, wide_weight, wide_dy = (array.astype("float64") for array in (x, weight, dy))
    exact = {"z": wide_x @ wide_weight, "dx": wide_dy @ wide_weight.T, "dweight": wide_x.T @ wide_dy}
    assert all(np.abs(array).max() <= 256 for array in exact.values()), "then bfloat16 has them"
    emulated = backends.emulated_runtime() if backend.name == "emulator" else None
    on_x, on_weight, on_dy = backend.arrays(x, weight, dy)
    for sms in (132, 1) if emulated else (None,):
        with emulated.device_limits(H200._replace(sms=sms)) if emulated else nullcontext():
            _, z, _ = bn.linear_batch_norm_forward(on_x, on_weight, norm=None)
            dx, dweight, *_ = bn.linear_batch_norm_backward(on_dy, on_x, on_weight, None, None, z, None)
            of_layer = bn.linear_batch_norm_forward(on_x, on_weight, norm="layer")[1] if outputs > 1 else z
        for name, got in (("z", z), ("z", of_layer), ("dx", dx), ("dweight", dweight)):
            np.testing.assert_array_equal(backend.asnumpy(got).astype("float64"), exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_column(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """A fragment holds 16 rows and 8 columns, and zeros beyond the last of them: no NaN may cross."""
    x, weight = (integers(rng, shape, dtype) for shape in ((21, 7), (7, 11)))
    finite = np.ones((21, 11), bool)
    x[[3, 20], [6, 0]] = np.nan, np.inf
    weight[0], weight[2, 9] = 1, np.nan  # infinity times 0 would be NaN too
    finite[[3, 20]], finite[:, 9] = False, False
    _, z, _ = bn.linear_batch_norm_forward(*backend.arrays(x, weight), norm=None)
    got = backend.asnumpy(z).astype("float64")
    np.testing.assert_array_equal(np.isfinite(got), finite)
    assert np.isinf(np.delete(got[20], 9)).all()
