"""A variance formed as the difference of two large numbers; here squares are taken about the mean, never about zero."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests import oracle
from tests.backends import Backend


def check_against_oracle(
    backend: Backend, x: np.ndarray, eps: float = 1e-5, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Compare y and dx of `x`, whose dy is not constant, with extended precision; return y and rstd.

    The oracle takes `offset` off first, which is exact: for float64 it has too few digits to spare otherwise.
    """
    near = x - x.dtype.type(offset)
    np.testing.assert_array_equal(near.astype(oracle.Wide) + offset, x)
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


def test_tt_metal_45968_half_spread_around_five(backend: Backend, rng: np.random.Generator) -> None:
    """E[x^2] - E[x]^2 lost all digits and gave NaN; the output's deviation must be 1."""
    x = (rng.choice([-5, 5], 64) + 0.1 * rng.standard_normal((128, 64))).astype(np.float32)
    y, _ = check_against_oracle(backend, x, eps=0.0)
    np.testing.assert_allclose(y.astype(np.float64).std(0), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_flax_1491_variance_is_never_negative(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """The cancelled variance came out below zero and its root NaN; rstd must not exceed that of a zero variance."""
    x = (1e3 + 1e-3 * rng.standard_normal((4096, 2))).astype(dtype)
    running = backend.arrays(np.zeros(2, dtype), np.zeros(2, dtype))
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
