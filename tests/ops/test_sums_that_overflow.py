"""Channels whose values are within range and whose sums are not: the mean is within range too, and so is the result.

On NumPy arrays such a sum is formed anew in smaller units. The CUDA kernels add before they divide and are expected to
fail. A case that passes there fails here, strictly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from tests.ops.test_batch_norm_exact_data import dtype_named
from tools.backends import NAMES, NUMPY, Backend

KERNELS = "kernels at the limit: a sum overflows where no value does, and the channel becomes NaN"
MIXED = np.array([[1.0], [1], [-1], [-1]])
# By name: the data type, x, and who is right today.
CASES: dict[str, tuple[str, np.ndarray, tuple[str, ...]]] = {
    "2 of 2e38": ("float32", np.full((2, 1), 2e38), NUMPY),
    "4 of both signs": ("float32", 3e38 * MIXED, NUMPY),
    "5000 x 8 of 1e35": ("float32", np.full((5000, 8), 1e35), NUMPY),
    "bfloat16: 2 of 2e38": ("bfloat16", np.full((2, 1), 2e38), NUMPY),
    "bfloat16: 4 of both signs": ("bfloat16", 3e38 * MIXED, NUMPY),
    "float64: 4 of 1e308": ("float64", np.full((4, 1), 1e308), NUMPY),
    "float64: 5000 x 8 of 1e305": ("float64", np.full((5000, 8), 1e305), NUMPY),
    "float64: 2 of both signs": ("float64", np.array([[1e308], [-1e308]]), (*NUMPY, "emulator", "cuda")),
    "float64: 4 of both signs": ("float64", 1e308 * MIXED, NUMPY),
}


def on_backends(right: tuple[str, ...], *values: Any) -> list[Any]:
    """Return the values on each backend, strictly expected to fail on those that are not `right`."""
    found = []
    for name in NAMES:
        marks = [] if name in NUMPY else [getattr(pytest.mark, name)]
        if name not in right:
            marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=KERNELS))
        found.append(pytest.param(name, *values, marks=marks, id="-".join([name, *map(str, values)])))
    return found


def whole(backend: Backend, x: np.ndarray) -> Any:
    return bn.batch_norm_forward(backend.asarray(x))[0]


def masked(backend: Backend, x: np.ndarray) -> Any:
    return bn.batch_norm_forward(backend.asarray(x), mask=backend.asarray(np.ones(len(x), bool)))[0]


def grouped(backend: Backend, x: np.ndarray) -> Any:
    return bn.batch_norm_forward(backend.asarray(np.stack([x, x])), grouped=True)[0]


def in_parts(backend: Backend, x: np.ndarray) -> Any:
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(backend.asarray(x)))])
    statistics, _ = bn.batch_norm_statistics(backend.asarray(moments))
    return bn.batch_norm_normalise(backend.asarray(x), None, None, statistics)


def of_rows(backend: Backend, x: np.ndarray) -> Any:
    return bn.layer_norm_forward(backend.asarray(x.T))[0]


OPS: dict[str, Callable[[Backend, np.ndarray], Any]] = {
    "batch norm": whole,
    "masked": masked,
    "grouped": grouped,
    "in parts": in_parts,
    "layer norm": of_rows,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "case"), [one for case, row in CASES.items() for one in on_backends(row[2], case)], indirect=["backend"]
)
def test_a_channel_without_a_variance_in_range_is_beta(backend: Backend, case: str, op: str) -> None:
    """A constant one has none, and that of the others is out of range, which counts as infinite."""
    dtype, x, _ = CASES[case]
    y = backend.asnumpy(OPS[op](backend, x.astype(dtype_named(dtype))))
    np.testing.assert_array_equal(y.astype(np.float64), 0)


CONSTANT = {case: row for case, row in CASES.items() if (row[1] == row[1][0]).all()}


@pytest.mark.parametrize(
    ("backend", "case"),
    [one for case, row in CONSTANT.items() for one in on_backends(row[2], case)],
    indirect=["backend"],
)
def test_the_mean_of_equal_numbers_is_that_number(backend: Backend, case: str) -> None:
    dtype, x, _ = CASES[case]
    x = x.astype(dtype_named(dtype))
    acc_dtype = accumulator(x.dtype)
    running = backend.asarray(np.zeros(x.shape[1], acc_dtype))
    moments = backend.asnumpy(bn.batch_norm_moments(backend.asarray(x)))
    bn.batch_norm_forward(backend.asarray(x), None, None, running, None, momentum=1.0)
    np.testing.assert_array_equal(moments[1], x[0].astype(acc_dtype))
    np.testing.assert_array_equal(backend.asnumpy(running), x[0].astype(acc_dtype))


@pytest.mark.parametrize(
    ("backend", "case"),
    [one for case, row in CONSTANT.items() if row[1].shape[1] == 1 for one in on_backends(row[2], case)],
    indirect=["backend"],
)
def test_a_constant_product_is_beta(backend: Backend, case: str) -> None:
    dtype, x, _ = CASES[case]
    on = backend.arrays(x.astype(dtype_named(dtype)), np.ones((1, 1), dtype_named(dtype)))
    y, *_ = bn.linear_batch_norm_forward(*on)
    np.testing.assert_array_equal(backend.asnumpy(y).astype(np.float64), 0)


@pytest.mark.parametrize("op", ["batch norm", "layer norm"])
@pytest.mark.parametrize(
    ("backend", "case"),
    [one for case, row in CONSTANT.items() for one in on_backends(row[2], case)],
    indirect=["backend"],
)
def test_equal_gradients_move_nothing(backend: Backend, case: str, op: str) -> None:
    """Their mean is what they are, so dx is 0, where the other numbers are of no size."""
    dtype, dy, _ = CASES[case]
    dy = dy.astype(dtype_named(dtype))
    x = (np.arange(dy.size).reshape(dy.shape) % 3 - 1).astype(dy.dtype)
    if op == "batch norm":
        on_dy, on_x = backend.arrays(dy, x)
        dx, *_ = bn.batch_norm_backward(on_dy, on_x, None, None, bn.batch_norm_forward(on_x)[1])
    else:
        on_dy, on_x = backend.arrays(dy.T, x.T)
        dx, *_ = bn.layer_norm_backward(on_dy, on_x, None, None, bn.layer_norm_forward(on_x)[1])
    found, size = np.abs(backend.asnumpy(dx).astype(np.float64)).max(), float(dy.astype(np.float64).max())
    assert found <= 1e-4 * size
