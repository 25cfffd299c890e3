"""Cooperative batch-norm kernels where rows are not whole vectors of 16 bytes: one element or two an access."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_cooperative import (
    DTYPES,
    KIB,
    assert_moved_once,
    check_against_oracle,
    kernels,
    on_device,
    tiny,
)
from tools import backends
from tools.emulator import EmulatorRuntime

F32, F16, BF16, F64 = *DTYPES, np.dtype("float64")
# Shapes as in test_batch_norm_cooperative.py.
NARROW = [((1111, 17, 1), F32), ((257, 199, 1), F32), ((5000, 7, 1), F32), ((700, 99, 1), F16), ((1300, 70, 1), BF16)]
NARROW += [((17000, 2, 1), F16), ((300, 52, 1), F64), ((3, 4, 2505), F32), ((2, 2, 17001), F32), ((2000, 3, 7), F32)]
NARROW += [
    ((700, 101, 1), BF16),
    ((300, 5, 49), BF16),
    ((300, 6, 49), F16),
    ((90, 5, 14 * 14), BF16),
    ((2, 3, 34002), F16),
    ((60, 5, 121), F64),
]


@pytest.mark.emulator
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("shape", "dtype"), NARROW, ids=str)
def test_rows_that_are_not_whole_vectors_match_extended_precision(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    activation: str,
) -> None:
    with tiny(emulated, seed=1):
        check_against_oracle(backends.make("emulator"), rng, shape, dtype, activation, activation == "gelu")
    count = 2 if dtype.itemsize == 2 and (shape[1] if shape[2] == 1 else shape[2]) % 2 == 0 else 1
    assert [kernel.rsplit("_", 2)[1] for kernel in kernels(emulated)] == 2 * ["pair" if count == 2 else "single"]


@pytest.mark.emulator
@pytest.mark.parametrize(("shape", "dtype"), [((3800, 33, 1), F32), ((3000, 65, 1), F16)], ids=str)
def test_many_blocks_of_few_workers_merge_without_touching_rows(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int, int], dtype: np.dtype
) -> None:
    """The block that merges the results of all had written them over its own rows."""
    with tiny(emulated, limits=Limits(8, 64 * KIB, 66 * KIB, cooperative=True)):
        check_against_oracle(backends.make("emulator"), rng, shape, dtype, "relu", False)
    forward = emulated.launches[0]
    assert "_cooperative_single_" in forward.entry_point
    assert 3 * forward.launch.grid[1] > 2 * forward.launch.block[1], "three numbers a block, room for two a worker"


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("shape", "dtype", "axis"),
    [
        ((256, 1023), "float32", 1),
        ((5000, 33), "float16", 1),
        ((5000, 66), "float16", 1),
        ((30, 32, 7, 7), "float16", 1),
        ((30, 16, 14, 14), "float16", 1),
        ((1000, 50), "float64", 1),
    ],
    ids=str,
)
def test_every_byte_is_moved_once_where_rows_are_not_whole_vectors(
    counting_emulator: EmulatorRuntime, shape: tuple[int, ...], dtype: str, axis: int
) -> None:
    limits = Limits(8, 227 * KIB, 228 * KIB, cooperative=True)
    for record, reads in zip(on_device(counting_emulator, limits, shape, dtype, axis), (1, 2), strict=True):
        assert_moved_once(record, prod(shape) * np.dtype(dtype).itemsize, reads)


@pytest.mark.emulator
@pytest.mark.parametrize("what", ["x", "dy", "residual", "out"])
def test_arrays_that_no_vector_starts_at_move_single_elements(
    emulated: EmulatorRuntime, rng: np.random.Generator, what: str
) -> None:
    arrays = {name: rng.standard_normal((1024, 64)).astype("f4") for name in ("x", "dy", "residual", "out")}
    on = {name: emulated.asarray(array, offset_elements=name == what) for name, array in arrays.items()}
    aligned = [emulated.asarray(arrays[name]) for name in ("dy", "x", "residual")]
    vectors = [emulated.asarray(np.empty(64, "f4")) for _ in range(2)]
    _, statistics = bn.batch_norm_forward(aligned[1], residual=aligned[2])
    want = bn.batch_norm_backward(*aligned[:2], None, None, statistics, residual=aligned[2])
    emulated.reset()
    out = (on["out"], *vectors, emulated.asarray(arrays["x"]))
    got = bn.batch_norm_backward(on["dy"], on["x"], None, None, statistics, residual=on["residual"], out=out)
    assert kernels(emulated) == ["bnk_batch_norm_backward_cooperative_single_f32"]
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(4096, 32), (64, 4, 1024)])
def test_gradients_take_the_low_part_of_a_mean_between_two_numbers(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    # Between 2^23 and 2^23 + 1 there is no float32: what the mean loses is of the size of a deviation.
    x = (2.0**23 + (rng.random(shape) < 0.3)).astype("float32")
    dy = rng.standard_normal(shape).astype("float32")
    axes = tuple(axis for axis in range(len(shape)) if axis != 1)
    on_x, on_dy = map(emulated.asarray, (x, dy))
    _, statistics = bn.batch_norm_forward(on_x)
    assert np.abs(np.asarray(statistics)[1] * np.asarray(statistics)[2]).min() > 0.1
    dx, dgamma, dbeta = (np.asarray(array) for array in bn.batch_norm_backward(on_dy, on_x, None, None, statistics))
    wide = x.astype("float64")
    rstd = 1 / np.sqrt(wide.var(axes, keepdims=True) + 1e-5)
    xhat = (wide - wide.mean(axes, keepdims=True)) * rstd
    product = (dy * xhat).mean(axes, keepdims=True)
    np.testing.assert_allclose(dx, rstd * (dy - dy.mean(axes, dtype=float, keepdims=True) - xhat * product), atol=1e-4)
    np.testing.assert_allclose(dgamma, (dy * xhat).sum(axes), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dbeta, dy.sum(axes, dtype=float), rtol=1e-4, atol=1e-3)
