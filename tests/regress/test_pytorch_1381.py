"""One value per channel: its variance is unknown, and N / (N - 1) is a division by zero."""

from __future__ import annotations

import re

import numpy as np
import pytest

import bnkernels as bn
from tests.regress.refusal import refused
from tools.backends import Backend


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_pytorch_1381_one_value_is_an_error_that_names_the_size(backend: Backend, shape: tuple[int, ...]) -> None:
    """Training on one example gave all zeros without a word; the error must say what came and the way out."""
    x, mean, var = backend.arrays(*(np.full(s, 2, "float32") for s in (shape, (3,), (3,))))
    message = re.escape(str(shape)) + ".*at least two examples.*batch_norm_inference"
    with refused(backend, ValueError, message, mean, var):
        bn.batch_norm_forward(x, None, None, mean, var)


def test_pytorch_7716_one_example_of_several_values_is_fine(backend: Backend) -> None:
    """The check counted examples and not values: one image of 2 x 2 has four of each channel."""
    x = np.float32([[[[1, 2], [3, 4]], [[0, 0], [0, 4]], [[5, 5], [5, 5]]]])
    mean, var = backend.arrays(np.zeros(3, "float32"), np.zeros(3, "float32"))
    y, _ = bn.batch_norm_forward(backend.asarray(x), None, None, mean, var, momentum=1.0, eps=1.0)
    np.testing.assert_array_equal(backend.asnumpy(mean), [2.5, 1, 5])
    np.testing.assert_allclose(backend.asnumpy(var), [5 / 3, 4, 0], rtol=1e-6)
    np.testing.assert_array_equal(backend.asnumpy(y)[0, 1:], [[[-0.5, -0.5], [-0.5, 1.5]], [[0, 0], [0, 0]]])


def test_mxnet_21111_no_nan_in_the_running_variance(backend: Backend) -> None:
    """On one device alone, 1 / 0 put NaN in running_var; two examples are the fewest that train."""
    x, mean, var = backend.arrays(np.float32([[1, 2], [3, 2]]), np.zeros(2, "float32"), np.ones(2, "float32"))
    bn.batch_norm_forward(x, None, None, mean, var, momentum=1.0)
    np.testing.assert_array_equal(backend.asnumpy(mean), [2, 2])
    np.testing.assert_array_equal(backend.asnumpy(var), [2, 0])
    frozen = bn.batch_norm_inference(x[:1], None, None, mean, var, eps=2.0)
    np.testing.assert_array_equal(backend.asnumpy(frozen), [[-0.5, 0]])
