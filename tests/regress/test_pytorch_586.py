"""Inference that used the batch's statistics, or changed the running ones."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn import BatchNorm
from tools import oracle
from tools.backends import Backend


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch_586_gradient_of_inference_is_a_scaling(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """The backward of inference used the batch's formula, and a second call differed. mxnet 9648 and xla 913 too."""
    x, dy = (rng.standard_normal((33, 5)).astype(dtype) for _ in range(2))
    gamma, mean = (rng.standard_normal(5).astype(dtype) for _ in range(2))
    var = rng.uniform(0.1, 3, 5).astype(dtype)
    on = backend.arrays(x, gamma, None, mean, var)
    first = bn.batch_norm_inference_backward(backend.asarray(dy), *on)
    second = bn.batch_norm_inference_backward(backend.asarray(dy), *on)

    scale = gamma * (1 / np.sqrt(var + var.dtype.type(1e-5)))  # rounded as the reference rounds
    # The CPU path computes dx in float64 and rounds it once; kernels refine an approximation of the root.
    places = {"reference": 0, "compiled": 1}.get(backend.name, 4)
    np.testing.assert_allclose(backend.asnumpy(first[0]), dy * scale, rtol=places * np.finfo(dtype).eps, atol=0)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))
    np.testing.assert_array_equal(backend.asnumpy(on[3]), mean)
    np.testing.assert_array_equal(backend.asnumpy(on[4]), var)


def test_tvm_19574_inference_of_a_constant_is_not_zero(backend: Backend) -> None:
    """Inference was compiled with the batch's statistics, under which every constant becomes 0."""
    x, mean, var = backend.arrays(np.ones((4, 2), "float32"), np.zeros(2, "float32"), np.ones(2, "float32"))
    y = bn.batch_norm_inference(x, None, None, mean, var)
    np.testing.assert_array_equal(backend.asnumpy(y), 1 / np.sqrt(np.float32(1) + np.float32(1e-5)))


def test_equinox_1010_inference_before_any_training(backend: Backend, rng: np.random.Generator) -> None:
    """Debiased running statistics divided by 1 - decay^0 when nothing had been trained; a fresh layer is near x."""
    x = rng.standard_normal((5, 3)).astype(np.float32)
    gamma, beta, mean, var = backend.arrays(*np.float32([[1, 2, -1], [0, 0.5, 0], [0, 0, 0], [1, 1, 1]]))
    layer = BatchNorm.from_arrays(gamma, beta, mean, var, momentum=None)
    exact = oracle.forward(x, *np.float32([[1, 2, -1], [0, 0.5, 0]]), 1e-5, running=np.float32([[0, 0, 0], [1, 1, 1]]))
    y = backend.asnumpy(layer.forward(backend.asarray(x), training=False))
    oracle.assert_within(y, exact.y, exact.z_bound, "y")
    assert layer.batches == 0
