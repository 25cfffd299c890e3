"""Squares of half-precision numbers formed in half precision, where they overflow from 256 on."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools import oracle
from tools.backends import Backend


@pytest.mark.parametrize("shape", [(64, 20), (300, 3), (64, 1280), (1024, 64)])
@pytest.mark.parametrize("largest", [7616, 65504])
def test_onnxruntime_29034_halves_whose_squares_overflow(
    backend: Backend, rng: np.random.Generator, largest: int, shape: tuple[int, int]
) -> None:
    """A kernel that summed squares in float16 was called, silently: infinity, then 0. LeetCUDA 335 too.

    The output is that of exact arithmetic, rounded once.
    """
    x, dy = (940 * rng.standard_normal(shape)).astype(np.float16), rng.standard_normal(shape).astype(np.float16)
    x[3, 1] = largest
    on_x = backend.asarray(x)
    y, statistics = bn.batch_norm_forward(on_x)
    grads = bn.batch_norm_backward(backend.asarray(dy), on_x, None, None, statistics)
    exact = oracle.forward(x, None, None, 1e-5)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    exact = oracle.backward(dy, x, None, None, 1e-5)
    for name, grad in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        oracle.assert_within(backend.asnumpy(grad), getattr(exact, name), getattr(exact, f"{name}_bound"), name)


def test_onnxruntime_17692_statistics_of_halves_are_float32(backend: Backend, rng: np.random.Generator) -> None:
    """The variance of data with deviation 496 is 246,419: beyond float16, in which it was kept."""
    x = rng.standard_normal((256, 4))
    x = ((x - x.mean(0)) / x.std(0) * np.sqrt(246419)).astype(np.float16)
    running = backend.arrays(np.zeros(4, "float32"), np.zeros(4, "float32"))
    on_x = backend.asarray(x)
    _, statistics = bn.batch_norm_forward(on_x, None, None, *running, momentum=1.0, unbiased=False)
    var = x.astype(np.float64).var(0)
    assert (var > 65504).all()
    assert statistics.dtype == np.float32
    np.testing.assert_allclose(backend.asnumpy(running[1]), var, rtol=1e-6)
    np.testing.assert_allclose(backend.asnumpy(statistics)[2], 1 / np.sqrt(var), rtol=1e-6)
    y = backend.asnumpy(bn.batch_norm_inference(on_x, None, None, *running))
    exact = oracle.forward(x, None, None, 1e-5)
    oracle.assert_within(y, exact.y, exact.z_bound + oracle.SLACK * 2**-24 * np.abs(exact.y), "inference")
