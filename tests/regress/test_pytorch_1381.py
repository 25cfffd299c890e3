"""One value per channel: its variance is unknown, and N / (N - 1) is a division by zero."""

from __future__ import annotations

import numpy as np

import bnkernels as bn
from tests.backends import Backend
from tests.regress.refusal import refused


def test_pytorch_1381_one_example_is_an_error_that_names_the_size(backend: Backend) -> None:
    """Training on one example gave all zeros without a word; the error must say what came and the way out."""
    x, mean, var = backend.arrays(*(np.full(shape, 2, "float32") for shape in ((1, 3), (3,), (3,))))
    with refused(backend, ValueError, r"\(1, 3\).*at least two examples.*batch_norm_inference", mean, var):
        bn.batch_norm_forward(x, None, None, mean, var)


def test_mxnet_21111_no_nan_in_the_running_variance(backend: Backend) -> None:
    """On one device alone, 1 / 0 put NaN in running_var; two examples are the fewest that train."""
    x, mean, var = backend.arrays(np.float32([[1, 2], [3, 2]]), np.zeros(2, "float32"), np.ones(2, "float32"))
    bn.batch_norm_forward(x, None, None, mean, var, momentum=1.0)
    np.testing.assert_array_equal(backend.asnumpy(mean), [2, 2])
    np.testing.assert_array_equal(backend.asnumpy(var), [2, 0])
    frozen = bn.batch_norm_inference(x[:1], None, None, mean, var, eps=2.0)
    np.testing.assert_array_equal(backend.asnumpy(frozen), [[-0.5, 0]])
