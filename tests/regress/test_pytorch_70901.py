"""Counts kept in a type too small for them; here the number of rows is exact, however many there are."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from tests.ops.test_batch_norm_layouts import as_rows
from tools import oracle
from tools.backends import Backend


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pytorch_70901_seventy_five_thousand_rows(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """75,000 overflowed a half-precision count, and the mean became 0."""
    x = (rng.standard_normal((75000, 1)) + 2).astype(dtype)
    acc_dtype = accumulator(x.dtype)
    running = backend.arrays(np.zeros(1, acc_dtype), np.zeros(1, acc_dtype))
    y, _ = bn.batch_norm_forward(backend.asarray(x), None, None, *running, momentum=1.0)
    exact = oracle.forward(x, None, None, 1e-5)
    u = oracle.unit_roundoff(x.dtype)
    oracle.assert_within(backend.asnumpy(running[0]), exact.mean, 2 * u * np.abs(exact.mean), "running_mean")
    oracle.assert_within(backend.asnumpy(running[1]), exact.var * 75000 / 74999, 12 * u * exact.var, "running_var")
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")


@pytest.mark.parametrize(("shape", "low"), [((4096, 8), -2), ((8, 64, 16, 16), -2), ((8, 64, 16, 16), 0)])
def test_onnxruntime_831_training_and_inference_agree(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], low: int
) -> None:
    """A vendor's fast path was wrong on ordinary input, and only inference afterwards showed it. cumo 339 too."""
    x = rng.uniform(low, 2, shape).astype(np.float32)
    channels = shape[1]
    on_x, running = backend.asarray(x), backend.arrays(np.zeros(channels, "float32"), np.ones(channels, "float32"))
    trained, _ = bn.batch_norm_forward(on_x, None, None, *running, momentum=1.0)
    frozen = backend.asnumpy(bn.batch_norm_inference(on_x, None, None, *running))
    rows = x.size // channels
    exact = oracle.forward(as_rows(x, 1), None, None, 1e-5)
    oracle.assert_within(as_rows(backend.asnumpy(trained), 1), exact.y, exact.z_bound, "training")
    biased = np.sqrt(oracle.Extended(rows - 1) / rows)  # running_var is the unbiased one
    oracle.assert_within(as_rows(frozen, 1), exact.y * biased, exact.z_bound, "inference")
