"""The channels in any axis, inputs with any strides: the formulas, the bits of the matrix, and no copy without need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.registry import runtime_of
from tools import oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# Short and long inner axes, one below, at and above a sector; workers that merge in one level or two; held; streamed.
TENSORS = [
    ((6, 5, 7), 1),
    ((3, 4, 5, 6), 1),
    ((3, 33, 2), 1),
    ((2, 3, 2, 3, 2), 1),
    ((4, 5, 6, 3), -1),
    ((4, 5, 6, 40), 3),
    ((5, 9), 0),
    ((3, 70, 4), -3),
    ((2, 3, 16, 17), 1),
    ((5, 2, 45, 40), 1),
    ((1, 1, 5), 1),
    ((7, 1, 1), 1),
]


def as_rows(array: np.ndarray, axis: int) -> np.ndarray:
    """Return the matrix (rows, C) of a tensor."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def make_tensors(rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: Any) -> tuple[np.ndarray, ...]:
    """Return x, dy and a residual, and gamma and beta in the accumulator's type."""
    channels = shape[axis]
    acc_dtype = np.dtype("float32") if np.dtype(dtype).itemsize == 2 else np.dtype(dtype)
    x, dy, residual = (rng.standard_normal(shape) + offset for offset in (2, 0.3, -0.1))
    gamma = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
    tensors = (array.astype(dtype) for array in (x, dy, residual))
    return *tensors, gamma.astype(acc_dtype), rng.standard_normal(channels).astype(acc_dtype)


def assert_tensor(backend: Backend, got: Any, exact: np.ndarray, bound: np.ndarray, axis: int, what: str) -> None:
    assert got.flags.c_contiguous
    oracle.assert_within(as_rows(backend.asnumpy(got), axis), exact, bound, what)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), TENSORS)
def test_any_channel_axis_matches_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, dy, residual, gamma, beta = make_tensors(rng, shape, axis, dtype)
    running = rng.standard_normal(shape[axis]).astype(gamma.dtype), rng.uniform(0.1, 3, shape[axis]).astype(gamma.dtype)
    on_x, on_dy, on_residual, *vectors = backend.arrays(x, dy, residual, gamma, beta)
    on_running = backend.arrays(*running)
    options = {"axis": axis, "residual": on_residual, "activation": "sigmoid"}
    rows = [as_rows(array, axis) for array in (dy, x)]
    extra = {"residual": as_rows(residual, axis)}

    y = bn.batch_norm_inference(on_x, *vectors, *on_running, eps=1e-3, **options)
    exact = oracle.forward(rows[1], gamma, beta, 1e-3, "sigmoid", running, **extra)
    assert_tensor(backend, y, exact.y, exact.z_bound, axis, "y")
    grads = [bn.batch_norm_inference_backward(on_dy, on_x, *vectors, *on_running, eps=1e-3, **options)]
    exact_grads = [oracle.backward(*rows, gamma, beta, 1e-3, "sigmoid", running, **extra)]
    if len(rows[1]) > 1:
        y, statistics = bn.batch_norm_forward(on_x, *vectors, eps=1e-3, **options)
        exact = oracle.forward(rows[1], gamma, beta, 1e-3, "sigmoid", **extra)
        assert_tensor(backend, y, exact.y, exact.z_bound, axis, "y")
        grads.append(bn.batch_norm_backward(on_dy, on_x, *vectors, statistics, **options))
        exact_grads.append(oracle.backward(*rows, gamma, beta, 1e-3, "sigmoid", **extra))
    for (dx, dgamma, dbeta, dresidual), exact in zip(grads, exact_grads, strict=True):
        assert_tensor(backend, dx, exact.dx, exact.dx_bound, axis, "dx")
        assert_tensor(backend, dresidual, exact.dresidual, exact.dresidual_bound, axis, "dresidual")
        oracle.assert_within(backend.asnumpy(dgamma), exact.dgamma, exact.dgamma_bound, "dgamma")
        oracle.assert_within(backend.asnumpy(dbeta), exact.dbeta, exact.dbeta_bound, "dbeta")


def run_all(x: Any, dy: Any, residual: Any, gamma: Any, beta: Any, running: list, axis: int) -> list[Any]:
    """Return the outputs of all four ops."""
    options = {"axis": axis, "residual": residual, "activation": "relu"}
    y, statistics = bn.batch_norm_forward(x, gamma, beta, **options)
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)
    frozen = bn.batch_norm_inference(x, gamma, beta, *running, **options)
    frozen_grads = bn.batch_norm_inference_backward(dy, x, gamma, beta, *running, **options)
    return [y, statistics, *grads, frozen, *frozen_grads]


@pytest.mark.parametrize("shape", [(5, 4, 6, 7), (64, 20)])
def test_channels_last_has_the_bits_of_the_matrix(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    *tensors, gamma, beta = make_tensors(rng, shape, -1, "float32")
    vectors, running = backend.arrays(gamma, beta), backend.arrays(beta, np.abs(gamma))
    whole = run_all(*backend.arrays(*tensors), *vectors, running, -1)
    matrices = [as_rows(array, -1) for array in tensors]
    flat = run_all(*backend.arrays(*matrices), *vectors, running, 1)
    for tensor, matrix in zip(whole, flat, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(tensor).reshape(matrix.shape), backend.asnumpy(matrix))


# Views of an array of shape (4, 6, 8, 10), channels in axis 1, and whether three strides describe them.
VIEWS = {
    "channels last in memory": (lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1), True),
    "batch last in memory": (lambda a: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0), True),
    "every other example": (lambda a: np.repeat(a, 2, 0)[::2], True),
    "every other channel": (lambda a: np.repeat(a, 2, 1)[:, ::2], True),
    "every other column": (lambda a: np.repeat(a, 2, 3)[..., ::2], True),
    "every other line": (lambda a: np.repeat(a, 2, 2)[:, :, ::2], False),
    "image transposed": (lambda a: a.swapaxes(2, 3).copy().swapaxes(2, 3), False),
    "all reversed": (lambda a: a[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1], True),
    "lines reversed": (lambda a: a[:, :, ::-1].copy()[:, :, ::-1], False),
    "one number": (lambda a: np.broadcast_to(a[:1, :1, :1, :1], a.shape), True),
    "one number a channel": (lambda a: np.broadcast_to(a[:1, :, :1, :1], a.shape), True),
    "one image": (lambda a: np.broadcast_to(a[:1], a.shape), True),
    "one column": (lambda a: np.broadcast_to(a[..., :1], a.shape), False),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "dy", "residual"])
def test_views_give_the_bits_of_a_dense_array(
    backend: Backend, rng: np.random.Generator, which: int, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels walk through the strides; only what outer, channel and inner stride cannot describe is copied."""
    spread, walkable = VIEWS[view]
    *tensors, gamma, beta = make_tensors(rng, (4, 6, 8, 10), 1, "float32")
    vectors, running = backend.arrays(gamma, beta), backend.arrays(beta, np.abs(gamma))
    dense = tensors.copy()
    dense[which] = np.ascontiguousarray(spread(tensors[which]))
    copies = []
    if backend.name == "emulator":
        kind = type(backend.asarray(beta))
        runtime = runtime_of(kind)
        copy = runtime.contiguous
        monkeypatch.setattr(runtime, "contiguous", lambda array: copies.append(array) or copy(array))
    expected = run_all(*backend.arrays(*dense), *vectors, running, 1)
    assert copies == []
    on = backend.arrays(*tensors)
    on[which] = backend.like(spread(tensors[which]))
    got = run_all(*on, *vectors, running, 1)
    if backend.name == "emulator":
        assert len(copies) == (0 if walkable else 2 if which == 1 else 4)
    for array, want in zip(got, expected, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(array), backend.asnumpy(want))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_empty_tensors(backend: Backend, shape: tuple[int, ...]) -> None:
    x, gamma = backend.arrays(np.zeros(shape, "float32"), np.ones(shape[1], "float32"))
    y, statistics = bn.batch_norm_forward(x, gamma)
    dx, dgamma, dbeta, dresidual = bn.batch_norm_backward(x, x, gamma, None, statistics, residual=x)
    assert y.shape == dx.shape == dresidual.shape == shape
    for array in (statistics, dgamma, dbeta):
        np.testing.assert_array_equal(backend.asnumpy(array), 0)


def test_one_value_a_channel_is_refused_in_training(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"x has the shape \(1, 3, 1\): one value per channel has no variance"):
        bn.batch_norm_forward(backend.asarray(np.zeros((1, 3, 1), "float32")))


@pytest.mark.parametrize("shape", [(4, 3, 50), (2, 3, 70, 70)])
@pytest.mark.parametrize("aliased", ["dy", "x", "residual"])
def test_outputs_in_the_place_of_inputs(
    backend: Backend, rng: np.random.Generator, aliased: str, shape: tuple[int, ...]
) -> None:
    *tensors, gamma, beta = make_tensors(rng, shape, 1, "float32")
    vectors = backend.arrays(gamma, beta)
    names = ("x", "dy", "residual")
    fresh = dict(zip(names, backend.arrays(*tensors), strict=True))
    options = {"activation": "silu"}
    y, statistics = bn.batch_norm_forward(fresh["x"], *vectors, residual=fresh["residual"], **options)
    grads = bn.batch_norm_backward(fresh["dy"], fresh["x"], *vectors, statistics, residual=fresh["residual"], **options)
    on = dict(zip(names, backend.arrays(*tensors), strict=True))
    out = on[aliased], *(backend.empty(array.shape, "float32") for array in grads[1:])
    bn.batch_norm_backward(on["dy"], on["x"], *vectors, statistics, residual=on["residual"], out=out, **options)
    for array, want in zip(out, grads, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(array), backend.asnumpy(want))
    if aliased != "dy":
        on = dict(zip(names, backend.arrays(*tensors), strict=True))
        out = on[aliased], backend.empty((3, 3), "float32")
        bn.batch_norm_forward(on["x"], *vectors, residual=on["residual"], out=out, **options)
        np.testing.assert_array_equal(backend.asnumpy(out[0]), backend.asnumpy(y))


@pytest.mark.emulator
def test_last_channel_of_a_huge_tensor(emulated: EmulatorRuntime) -> None:
    """2.4e9 elements, of which the last block alone runs, the one whose indices are the largest."""
    channels = 2**27 + 1
    try:
        x, dy, y, dx = (emulated.sparse((2, channels, 9), np.float32) for _ in range(4))
        statistics = emulated.sparse((3, channels), np.float32)
        dgamma, dbeta = (emulated.sparse((channels,), np.float32) for _ in range(2))
    except MemoryError as error:
        pytest.skip(str(error))
    x[:, -1] = np.arange(18).reshape(2, 9) ** 2
    dy[:, -1] = np.cos(x[:, -1])
    with emulated.only_blocks([channels - 1]):
        bn.batch_norm_forward(x, out=(y, statistics))
        bn.batch_norm_backward(dy, x, None, None, statistics, out=(dx, dgamma, dbeta))
    small_x, small_dy = (emulated.asarray(array[:, -1:]) for array in (x, dy))
    small_y, small_statistics = bn.batch_norm_forward(small_x)
    small = bn.batch_norm_backward(small_dy, small_x, None, None, small_statistics)
    for huge, expected in zip((y, dx), (small_y, small[0]), strict=True):
        np.testing.assert_array_equal(huge[:, -1:], expected)
    for huge, expected in zip((statistics, dgamma, dbeta), (small_statistics, *small[1:3]), strict=True):
        np.testing.assert_array_equal(huge[..., -1:], expected)
