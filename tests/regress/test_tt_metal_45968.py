"""E[x^2] - E[x]^2 of 16-bit data: all digits cancelled, and the root of what was left was NaN."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_exact_data import dtype_named
from tests.ops.test_batch_norm_layouts import as_rows
from tools import oracle
from tools.backends import Backend


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tt_metal_45968_small_deviation_around_five(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """The upstream input: channels of mean 5 or -5 and deviation 0.1. The output's deviation must be 1."""
    x = rng.choice([-5, 5], (64, 1, 1)) + 0.1 * rng.standard_normal((2, 64, 32, 32))
    x = x.astype(dtype_named(dtype))
    y, _ = bn.batch_norm_forward(backend.asarray(x), eps=1e-30)
    rows, y = as_rows(x, 1), as_rows(backend.asnumpy(y), 1)
    exact = oracle.forward(rows, None, None, 0.0)
    oracle.assert_within(y, exact.y, exact.z_bound, "y")
    np.testing.assert_allclose(y.astype(np.float64).std(0), 1, rtol=1e-2 if dtype == "bfloat16" else 1e-3)
