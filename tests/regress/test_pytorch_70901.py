"""Counts kept in a type too small for them; here the number of rows is exact, however many there are."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests import oracle
from tests.backends import Backend


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch_70901_seventy_five_thousand_rows(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """75,000 overflowed a half-precision count, and the mean became 0."""
    x = (rng.standard_normal((75000, 1)) + 2).astype(dtype)
    running = backend.arrays(np.zeros(1, dtype), np.zeros(1, dtype))
    y, _ = bn.batch_norm_forward(backend.asarray(x), None, None, *running, momentum=1.0)
    exact = oracle.forward(x, None, None, 1e-5)
    u = oracle.unit_roundoff(x.dtype)
    oracle.assert_within(backend.asnumpy(running[0]), exact.mean, 2 * u * np.abs(exact.mean), "running_mean")
    oracle.assert_within(backend.asnumpy(running[1]), exact.var * 75000 / 74999, 12 * u * exact.var, "running_var")
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")


def test_onnxruntime_831_training_and_inference_agree(backend: Backend, rng: np.random.Generator) -> None:
    """A vendor's fast path was wrong on ordinary input, and only inference afterwards showed it."""
    x = rng.uniform(-2, 2, (4096, 8)).astype(np.float32)
    on_x, running = backend.asarray(x), backend.arrays(np.zeros(8, "float32"), np.ones(8, "float32"))
    trained, _ = bn.batch_norm_forward(on_x, None, None, *running, momentum=1.0)
    frozen = backend.asnumpy(bn.batch_norm_inference(on_x, None, None, *running))
    exact = oracle.forward(x, None, None, 1e-5)
    oracle.assert_within(backend.asnumpy(trained), exact.y, exact.z_bound, "training")
    biased = np.sqrt(oracle.Wide(4095) / 4096)  # running_var is the unbiased one
    oracle.assert_within(frozen, exact.y * biased, exact.z_bound, "inference")
