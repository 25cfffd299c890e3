"""A variance formed as the difference of two large numbers; here squares are taken about the mean, never about zero."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_layouts import as_rows
from tools import oracle
from tools.backends import Backend


def check_against_oracle(
    backend: Backend, x: np.ndarray, eps: float = 1e-5, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Compare y and dx of `x`, whose dy is not constant, with extended precision; return y and rstd.

    The oracle takes `offset` off first, which is exact: for float64 it has too few digits to spare otherwise.
    """
    near = x - x.dtype.type(offset)
    np.testing.assert_array_equal(near.astype(oracle.Extended) + offset, x)
    dy = np.linspace(-1, 2, x.size, dtype=x.dtype).reshape(x.shape)
    on_x = backend.asarray(x)
    y, statistics = bn.batch_norm_forward(on_x, eps=eps)
    dx, *_ = bn.batch_norm_backward(backend.asarray(dy), on_x, None, None, statistics)
    exact, bound = oracle.forward(near, None, None, eps), oracle.forward(x, None, None, eps).z_bound
    y = backend.asnumpy(y)
    oracle.assert_within(y, exact.y, bound, "y")
    exact, bound = oracle.backward(dy, near, None, None, eps), oracle.backward(dy, x, None, None, eps).dx_bound
    oracle.assert_within(backend.asnumpy(dx), exact.dx, bound, "dx")
    return y, backend.asnumpy(statistics)[2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5, 1e6, 1e7])
def test_tensorflow_118701_offsets(
    backend: Backend, rng: np.random.Generator, offset: float, channels: int, dtype: str
) -> None:
    """A compiler turned the variance into one pass: NaN at 1e4, in the gradient at 1e6."""
    x = (offset + rng.standard_normal((96, channels))).astype(dtype)
    check_against_oracle(backend, x, offset=offset)


@pytest.mark.parametrize("offset", [1e4, 1e7])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1024, 64)])
def test_tensorflow_118701_large_tensors(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], offset: float
) -> None:
    """Images of three channels, as upstream, and a matrix: both take the cooperative kernels."""
    x = (offset + rng.standard_normal(shape)).astype(np.float32)
    dy = np.linspace(-1, 2, x.size, dtype=np.float32).reshape(shape)
    on_x = backend.asarray(x)
    y, statistics = bn.batch_norm_forward(on_x)
    dx, *_ = bn.batch_norm_backward(backend.asarray(dy), on_x, None, None, statistics)
    rows = as_rows(x, 1)
    exact = oracle.forward(rows, None, None, 1e-5)
    oracle.assert_within(as_rows(backend.asnumpy(y), 1), exact.y, exact.z_bound, "y")
    exact = oracle.backward(as_rows(dy, 1), rows, None, None, 1e-5)
    oracle.assert_within(as_rows(backend.asnumpy(dx), 1), exact.dx, exact.dx_bound, "dx")


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 2), ("float64", 2), ("float32", 8)])
def test_flax_1491_variance_is_never_negative(
    backend: Backend, rng: np.random.Generator, channels: int, dtype: str
) -> None:
    """The cancelled variance came out below zero and its root NaN; rstd must not exceed that of a zero variance."""
    x = (1e3 + 1e-3 * rng.standard_normal((4096, channels))).astype(dtype)
    running = backend.arrays(np.zeros(channels, dtype), np.zeros(channels, dtype))
    bn.batch_norm_forward(backend.asarray(x), None, None, *running, momentum=1.0)
    _, rstd = check_against_oracle(backend, x, offset=1e3)
    assert (rstd <= 1 / np.sqrt(1e-5)).all()
    assert (backend.asnumpy(running[1]) > 0).all()


def test_tvm_19592_four_neighbours_of_80000(backend: Backend) -> None:
    """The fix was tested on its code and not on the input that failed: this is the input, as a channel."""
    x = np.float32([[80000], [80001], [80002], [80003]])
    y, _ = check_against_oracle(backend, x, offset=80000)
    np.testing.assert_allclose(y[:, 0], [-1.3416, -0.4472, 0.4472, 1.3416], atol=1e-4)


def test_outlier_in_the_first_row(backend: Backend, rng: np.random.Generator) -> None:
    """A one-pass sum shifted by the first value fails where that value is the outlier."""
    x = rng.standard_normal((300, 3)).astype(np.float32)
    x[0] = 1e4
    check_against_oracle(backend, x)
