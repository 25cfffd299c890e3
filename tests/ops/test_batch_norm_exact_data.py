"""Data whose every sum, root and quotient is exact: results must have the bits of the formulas, wherever they run.

Values lie in symmetric pairs about a dyadic mean, as many as a power of two, and their mean square is 4^k - 1: with
eps = 1 the root of the variance is a power of two. So no order of summation and no rounding can excuse a difference.
A backend is compared with the formulas, not with another one. oneDNN's benchdnn makes its data in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.seam import Limits
from tools import backends
from tools.backends import Backend

# Distances from the mean, of one sign; the squares of a row have the mean 4^k - 1. Few bits, for bfloat16 has eight.
DISTANCES = np.array(
    [
        [4, 2, 2, 0, 0, 0, 0, 0],
        [3, 3, 2, 1, 1, 0, 0, 0],
        [7, 7, 4, 2, 1, 1, 0, 0],
        [10, 4, 2, 0, 0, 0, 0, 0],
        [20, 10, 2, 0, 0, 0, 0, 0],
        [17, 13, 6, 3, 1, 0, 0, 0],
    ],
    np.float64,
)
MEAN = np.array([0.25, -4, 64, 0, -100, 1.5])
GAMMA, BETA = np.array([1, -2, 0.5, 4, -0.25, -1, 1]), np.array([0, 0.5, -3, 0.25, 1])
OPTIONS: dict[str, Any] = {"eps": 1.0, "activation": "leaky_relu", "alpha": 0.25}
KEPT, NEW = 0.75, 0.25  # weights of the old and of the new running statistics
TINY = Limits(2, 64 * 1024, 66 * 1024, cooperative=True)  # four blocks that hold 32 KiB each

DTYPES = ["float16", "bfloat16", "float32", "float64"]
# Shapes (outer, C, inner): one level of merging, two, streamed; an inner axis; a short one.
SHAPES = [(64, 20, 1), (1024, 3, 1), (4096, 3, 1), (16, 6, 64), (32, 5, 4)]
# Rows of 16 bytes, large: blocks that share a slice of channels, and more than they keep; the same along inner.
LARGE = [(1024, 64, 1), (4096, 16, 1), (16, 6, 1024)]


class Case(NamedTuple):
    """Inputs, tensors as (outer, C, inner), and the outputs expected, by name."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    expected: dict[str, np.ndarray]


def dtype_named(name: str) -> np.dtype:
    """Return a data type; skips where it needs ml_dtypes and there is none."""
    if name != "bfloat16":
        return np.dtype(name)
    return np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: no bfloat16").bfloat16)


def make_case(rng: np.random.Generator, shape: tuple[int, int, int], dtype: np.dtype) -> Case:
    """Return exact data; all is computed in float64, without rounding, and then rounded once."""
    outer, channels, inner = shape
    count = outer * inner
    assert count % 16 == 0
    assert count & (count - 1) == 0

    def per_channel(values: np.ndarray) -> np.ndarray:
        return values[np.arange(channels) % len(values)]

    signed = per_channel(np.concatenate([DISTANCES, -DISTANCES], axis=1))
    centred = rng.permuted(np.tile(signed, count // 16), axis=1).reshape(channels, outer, inner).swapaxes(0, 1)
    dy = rng.integers(-2, 3, centred.shape).astype(np.float64)
    residual = rng.integers(-4, 5, centred.shape) / 4
    mean, gamma, beta = map(per_channel, (MEAN, GAMMA, BETA))
    var = per_channel((DISTANCES**2).mean(1))
    rstd = 1 / np.sqrt(var + OPTIONS["eps"])

    def along(vector: np.ndarray) -> np.ndarray:
        return vector[:, None]

    xhat = centred * along(rstd)
    z = along(gamma) * xhat + along(beta) + residual
    g = np.where(z <= 0, OPTIONS["alpha"] * dy, dy)
    dgamma, dbeta = (g * xhat).sum((0, 2)), g.sum((0, 2))
    through_sums = (along(dbeta) + xhat * along(dgamma)) / count
    expected = {
        "y": np.where(z <= 0, OPTIONS["alpha"] * z, z),
        "statistics": np.stack([mean, np.zeros(channels), rstd]),
        "running_mean": KEPT * 0.5 + NEW * mean,
        "running_var": KEPT * 2 + NEW * var,
        "dx": along(gamma * rstd) * (g - through_sums),
        "dgamma": dgamma,
        "dbeta": dbeta,
        "dresidual": g,
        "frozen_dx": along(gamma * rstd) * g,
    }
    acc_dtype = accumulator(dtype)
    for name, array in expected.items():
        np.testing.assert_array_equal(array.astype(acc_dtype), array, err_msg=f"{name} has too many bits")
        expected[name] = array.astype(dtype if array.ndim == 3 else acc_dtype)
    x = centred + along(mean)
    np.testing.assert_array_equal(x.astype(dtype).astype(np.float64), x, err_msg="x has too many bits")
    vectors = (array.astype(acc_dtype) for array in (gamma, beta, mean, var))
    return Case(*(array.astype(dtype) for array in (x, dy, residual)), *vectors, expected)


def assert_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """Fail unless all bits are the same, also those of zeros."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want, err_msg=what)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want), err_msg=f"signs of {what}")


def check(
    backend: Backend,
    case: Case,
    arrange: Callable[[np.ndarray], np.ndarray],
    put: Callable[[np.ndarray], Any],
    axis: int = 1,
) -> None:
    """Run all four ops on tensors that are arranged and put so, and compare all that they write with the formulas."""
    x, dy, residual = (put(arrange(array)) for array in case[:3])
    gamma, beta, mean, var = backend.arrays(*case[3:7])
    running = backend.arrays(np.full_like(case.mean, 0.5), np.full_like(case.var, 2))
    options = {**OPTIONS, "axis": axis, "residual": residual}
    y, statistics = bn.batch_norm_forward(x, gamma, beta, *running, momentum=NEW, unbiased=False, **options)
    frozen = bn.batch_norm_inference(x, gamma, beta, mean, var, **options)
    frozen_grads = bn.batch_norm_inference_backward(dy, x, gamma, beta, mean, var, **options)
    options.pop("eps")
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)

    names = "y statistics running_mean running_var dx dgamma dbeta dresidual y frozen_dx dgamma dbeta dresidual"
    results = (y, statistics, *running, *grads, frozen, *frozen_grads)
    for name, got in zip(names.split(), results, strict=True):
        want = case.expected[name]
        if name == "running_var" and want.dtype == np.float32 and case.x.size // len(want) > 1024:
            # The means of so many workers have too many bits for squares of their distances that are exact.
            np.testing.assert_array_max_ulp(backend.asnumpy(got), want, 1)
            continue
        assert_bits(backend.asnumpy(got), arrange(want) if want.ndim == 3 else want, name)


def as_tensor(array: np.ndarray) -> np.ndarray:
    """Return (N, C), or (N, C, H, W), in C order."""
    outer, channels, inner = array.shape
    return np.ascontiguousarray(array).reshape((outer, channels) if inner == 1 else (outer, channels, inner // 4, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_data_give_the_bits_of_the_formulas(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int, int], dtype: str
) -> None:
    check(backend, make_case(rng, shape, dtype_named(dtype)), as_tensor, backend.asarray)


def test_exact_data_with_the_channels_last(backend: Backend, rng: np.random.Generator) -> None:
    case = make_case(rng, (16, 6, 64), np.dtype("float16"))
    check(backend, case, lambda array: np.moveaxis(as_tensor(array), 1, -1), backend.asarray, axis=-1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_exact_data_in_strides_of_any_sign(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Each channel's rows reversed, every other example of a larger array, channels last in memory."""

    def put(array: np.ndarray) -> Any:
        last = np.moveaxis(np.repeat(array, 2, 0)[:, :, ::-1], 1, -1).copy()
        return backend.like(np.moveaxis(last, -1, 1)[::2, :, ::-1])

    check(backend, make_case(rng, (16, 6, 64), np.dtype(dtype)), as_tensor, put)


@contextmanager
def small_device(backend: Backend) -> Iterator[None]:
    """Let the emulator be a device that needs cooperative kernels above 64 KiB, blocks and threads in another order."""
    if backend.name != "emulator":
        yield
        return
    runtime = backends.emulated_runtime()
    with runtime.device_limits(TINY), runtime.schedule(seed=1):
        yield


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_exact_data_that_spread_over_the_device(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int, int], dtype: str
) -> None:
    case = make_case(rng, shape, dtype_named(dtype))
    with small_device(backend):
        check(backend, case, as_tensor, backend.asarray)
    if backend.name == "emulator":
        names = [record.entry_point for record in backends.emulated_runtime().launches[-4:]]
        assert ["_cooperative" in name for name in names] == [True, False, False, True]


@pytest.mark.parametrize("offset", [1, 4, 7])
def test_exact_data_that_no_vector_starts_at(backend: Backend, rng: np.random.Generator, offset: int) -> None:
    """Other kernels than for aligned data of the same shape, and the same bits."""

    def put(array: np.ndarray) -> Any:
        longer = np.concatenate([np.zeros(offset, array.dtype), array.ravel()])
        return backend.asarray(longer)[offset:].reshape(array.shape)

    check(backend, make_case(rng, (1024, 64, 1), np.dtype("float16")), as_tensor, put)
