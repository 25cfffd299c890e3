"""Gradients and inputs that were not dense: broadcast, transposed, sliced, reversed."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools import oracle
from tools.backends import Backend

LAYOUTS = {
    "rows apart": lambda a: np.repeat(a, 2, 0)[::2],
    "channels apart": lambda a: np.repeat(a, 3, 1)[:, ::3],
    "reversed rows": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "reversed channels": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "Fortran order": np.asfortranarray,
    "transposed and reversed": lambda a: np.ascontiguousarray(a.T[::-1])[::-1].T,
}


def assert_close(backend: Backend, got: np.ndarray, want: np.ndarray) -> None:
    """Compare the same result from two layouts: the same bits from kernels, rounding apart from NumPy's sums."""
    tolerance = 0 if backend.name != "reference" else 1e-6
    np.testing.assert_allclose(backend.asnumpy(got), backend.asnumpy(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [7, 70, 600])
def test_pytorch_1866_gradient_of_a_sum_is_a_broadcast(backend: Backend, rng: np.random.Generator, rows: int) -> None:
    """The gradient of y.sum() is one number with strides 0; dx is 0 by the formula, dbeta the number of rows."""
    x = rng.standard_normal((rows, 4)).astype(np.float32)
    dy = np.broadcast_to(np.float32(1), x.shape)
    on_x = backend.asarray(x)
    _, statistics = bn.batch_norm_forward(on_x)
    grads = bn.batch_norm_backward(backend.like(dy), on_x, None, None, statistics)
    exact = oracle.backward(dy, x, None, None, 1e-5)
    for name, grad in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        oracle.assert_within(backend.asnumpy(grad), getattr(exact, name), getattr(exact, f"{name}_bound"), name)
    np.testing.assert_array_equal(backend.asnumpy(grads[2]), rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "dy", "both"])
def test_pytorch_42588_each_operand_in_each_layout(
    backend: Backend, rng: np.random.Generator, which: str, layout: str
) -> None:
    """A kernel took the strides of one operand for those of the other."""
    arrays = {name: rng.standard_normal((70, 6)).astype(np.float32) for name in ("x", "dy")}
    dense = {name: backend.asarray(array) for name, array in arrays.items()}
    spread = {
        name: backend.like(LAYOUTS[layout](array)) if which in (name, "both") else dense[name]
        for name, array in arrays.items()
    }
    _, statistics = bn.batch_norm_forward(dense["x"])
    for want, got in zip(
        bn.batch_norm_backward(dense["dy"], dense["x"], None, None, statistics, activation="relu"),
        bn.batch_norm_backward(spread["dy"], spread["x"], None, None, statistics, activation="relu"),
        strict=True,
    ):
        assert_close(backend, got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorch_107199_outputs_are_in_c_order(backend: Backend, rng: np.random.Generator, layout: str) -> None:
    """Another layout of the input changed values, and nobody said how the output would lie."""
    x = rng.standard_normal((70, 6)).astype(np.float32)
    spread = backend.like(LAYOUTS[layout](x))
    y, statistics = bn.batch_norm_forward(spread)
    dx, *_ = bn.batch_norm_backward(spread, spread, None, None, statistics)
    frozen = bn.batch_norm_inference(spread, None, None, *backend.arrays(x[0], np.abs(x[1])))
    for array in (y, dx, frozen):
        assert array.flags.c_contiguous
    want, _ = bn.batch_norm_forward(backend.asarray(x))
    assert_close(backend, y, want)


@pytest.mark.parametrize("how", ["one number", "one row", "one column"])
def test_pytorch_2000_broadcast_gradients_of_large_tensors(
    backend: Backend, rng: np.random.Generator, how: str
) -> None:
    """Strides of 0 where kernels would move 16 bytes at a time."""
    x, dy = (rng.standard_normal((1024, 64)).astype(np.float32) for _ in range(2))
    part = {"one number": dy[:1, :1], "one row": dy[:1], "one column": dy[:, :1]}[how]
    dy = np.broadcast_to(part, x.shape)
    on_x = backend.asarray(x)
    _, statistics = bn.batch_norm_forward(on_x)
    grads = bn.batch_norm_backward(backend.like(dy), on_x, None, None, statistics)
    exact = oracle.backward(dy, x, None, None, 1e-5)
    for name, grad in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        oracle.assert_within(backend.asnumpy(grad), getattr(exact, name), getattr(exact, f"{name}_bound"), name)
