"""Indices that overflowed 32 bits: here every element lies where only 64 bits reach, in memory that is never touched.

Nothing is that large but the address space, which the system promises without giving it.
"""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

FAR = 2**30  # elements between neighbours, so that the third value is at 2^31


def untouched(backend: Backend, size: int) -> np.ndarray:
    """Return `size` float32 zeros that take no memory before they are touched; on a GPU they take it."""
    try:
        if backend.name == "emulator":
            return backends.emulated_runtime().sparse((size,), np.float32)
        if backend.is_numpy:
            return np.zeros(size, np.float32)
        import cupy

        return cupy.zeros(size, np.float32)
    except MemoryError as error:
        pytest.skip(f"no address space for {size} numbers: {error}")


@pytest.mark.parametrize("axis", [0, 1])
def test_pytorch_181555_strides_beyond_32_bits(backend: Backend, axis: int) -> None:
    """The product of a row and its stride was an int; the same values from far apart must give the same bits."""
    values = np.float32([[1, 2, 6], [3, 3, 1], [7, -1, 2]])
    near_x, near_dy = backend.arrays(values, values.T + 1)
    far = {}
    for name, array in (("x", near_x), ("dy", near_dy)):
        gaps = untouched(backend, 2 * FAR + 3).reshape(-1)
        strides = (4 * FAR, 4) if axis == 0 else (4, 4 * FAR)
        if backend.name == "cuda":
            import cupy

            far[name] = cupy.lib.stride_tricks.as_strided(gaps, (3, 3), strides)
        else:
            far[name] = np.lib.stride_tricks.as_strided(gaps, (3, 3), strides, subok=True)
        far[name][...] = array

    def run(x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        running = backend.arrays(np.zeros(3, "float32"), np.ones(3, "float32"))
        y, statistics = bn.batch_norm_forward(x)
        grads = bn.batch_norm_backward(dy, x, None, None, statistics)
        frozen = bn.batch_norm_inference(x, None, None, *running)
        frozen_grads = bn.batch_norm_inference_backward(dy, x, None, None, *running)
        return [backend.asnumpy(array) for array in (y, statistics, *grads, frozen, *frozen_grads)]

    for close, apart in zip(run(near_x, near_dy), run(far["x"], far["dy"]), strict=True):
        np.testing.assert_allclose(apart, close, rtol=0 if backend.name != "reference" else 1e-6, atol=1e-6)


def sparse(runtime: EmulatorRuntime, *shape: int) -> np.ndarray:
    """Return float32 zeros on the emulator that take memory only where they are touched."""
    try:
        return runtime.sparse(shape, np.float32)
    except MemoryError as error:
        pytest.skip(str(error))


@pytest.mark.emulator
def test_cupy_7539_last_channel_of_a_huge_array(emulated: EmulatorRuntime) -> None:
    """3 x 2^30 elements, of which the last block alone runs, the one whose indices are the largest."""
    channels = FAR
    x, dy, y, dx, statistics = (sparse(emulated, 3, channels) for _ in range(5))
    dgamma, dbeta = sparse(emulated, channels), sparse(emulated, channels)
    x[:, -2:] = [[1, 4], [2, 4], [6, 4]]
    dy[:, -2:] = [[1, 1], [0, 0], [0, 3]]
    with emulated.only_blocks([channels // 32 - 1]):
        bn.batch_norm_forward(x, out=(y, statistics))
        bn.batch_norm_backward(dy, x, None, None, statistics, out=(dx, dgamma, dbeta))

    small_x, small_dy = (emulated.asarray(array[:, -2:]) for array in (x, dy))
    small_y, small_statistics = bn.batch_norm_forward(small_x)
    small = (small_y, small_statistics, *bn.batch_norm_backward(small_dy, small_x, None, None, small_statistics))
    for huge, expected in zip((y, statistics, dx, dgamma, dbeta), small, strict=True):
        np.testing.assert_array_equal(huge[..., -2:], expected)
    assert len(emulated.launches) == 4


@pytest.mark.emulator
def test_flashinfer_3391_last_row_of_a_huge_array(emulated: EmulatorRuntime) -> None:
    """More than 2^31 elements in rows: inference and softmax, where the last block alone runs."""
    rows, channels = FAR + 1, 3
    x, y = sparse(emulated, rows, channels), sparse(emulated, rows, channels)
    mean, var = emulated.asarray(np.float32([1, 0, 0])), emulated.asarray(np.ones(3, np.float32))
    # The grid strides over rows: block k owns rows k L .. k L + L - 1 of every G L, for L workers and G blocks.
    workers, blocks = 512 // channels, 65535
    x[-1] = [1, 2, 3]
    with emulated.only_blocks([(rows - 1) // workers % blocks]):
        bn.batch_norm_inference(x, None, None, mean, var, eps=1e-30, out=y)
    assert emulated.launches[-1].launch.grid == (1, 1, blocks)
    assert emulated.launches[-1].launch.block == (channels, workers, 1)
    np.testing.assert_array_equal(y[-1], [0, 2, 3])

    labels = emulated.sparse((rows,), np.int64)
    labels[-1] = 2
    loss = sparse(emulated, rows)
    with emulated.only_blocks([(rows - 1) // 8]):
        bn.softmax_cross_entropy(x, labels, out=(loss, y))
    expected = np.exp(np.float64([1, 2, 3])) / np.exp(np.float64([1, 2, 3])).sum()
    np.testing.assert_allclose(loss[-1], -np.log(expected[2]), rtol=1e-6)
    np.testing.assert_allclose(y[-1] * np.float64(rows), expected - [0, 0, 1], rtol=1e-5)


@pytest.mark.emulator
@pytest.mark.slow  # under a sanitizer
def test_cupy_7539_optimiser_beyond_32_bits(emulated: EmulatorRuntime) -> None:
    """The last parameter of 2^31 + 5, which the grid reaches after thousands of strides."""
    size = 2**31 + 5
    parameters, gradients = sparse(emulated, size), sparse(emulated, size)
    gradients[-1] = 4
    with emulated.only_blocks([(size - 1) // 256 % 1024]):
        bn.sgd_update(parameters, gradients, lr=0.5)
    assert emulated.launches[-1].launch.grid == (1024, 1, 1)
    assert parameters[-1] == -2
