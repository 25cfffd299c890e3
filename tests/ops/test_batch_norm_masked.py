"""Masked batch norm: what it computes is batch norm of the valid rows alone, whatever lies in the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_layouts import as_rows, make_tensors
from tools import oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# Few rows and many; workers that merge in one level and in two; rows held and read again; masks of either extent.
CASES = [
    ((6, 3), 1, (6,)),
    ((64, 20), 1, (64,)),
    ((300, 33), 1, (300,)),
    ((3000, 5), 1, (3000,)),
    ((5, 4, 7), 1, (5,)),
    ((5, 4, 7), 1, (5, 7)),
    ((7, 9, 4), -1, (7, 9)),
    ((7, 9, 4), -1, (7,)),
    ((2, 3, 50, 50), 1, (2, 50, 50)),
    ((3, 4, 5, 6), 1, (3, 5)),
]
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def dtype_named(name: str) -> Any:
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def make_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask with at least two valid positions."""
    mask = rng.random(shape) < 0.6
    mask.ravel()[[0, -1]] = True
    return mask


def spread_mask(mask: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return which rows of the matrix (rows, C) are valid."""
    positions = np.delete(np.array(shape), axis)
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim)), positions).ravel()


def spoiled(array: np.ndarray, rows: np.ndarray, axis: int) -> np.ndarray:
    """Return a copy with NaN and infinity where it is invalid."""
    copy = array.copy()
    flat = as_rows(copy, axis)
    flat[~rows] = np.where(np.arange(flat[~rows].size).reshape(flat[~rows].shape) % 2, np.nan, np.inf)
    return np.moveaxis(flat.reshape(np.moveaxis(copy, axis, -1).shape), -1, axis)


def assert_valid_rows(
    backend: Backend, got: Any, rows: np.ndarray, axis: int, exact: Any, bound: Any, what: str
) -> None:
    """Check the valid rows against their bound, and that the others are 0."""
    assert got.flags.c_contiguous
    flat = as_rows(backend.asnumpy(got), axis)
    oracle.assert_within(flat[rows], exact, bound, what)
    np.testing.assert_array_equal(flat[~rows].astype("float64"), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3), 1), ((64, 20), 1), ((250, 8), 1), ((5, 4, 7), 1)])
def test_a_mask_of_all_true_changes_no_bit(
    backend: Backend, rng: np.random.Generator, shape: tuple, axis: int, dtype: str
) -> None:
    """Nor does a group: as long as a thread of a kernel keeps its rows, it does the same arithmetic."""
    *tensors, gamma, beta = make_tensors(rng, shape, axis, dtype_named(dtype))
    gamma, beta = backend.arrays(gamma, beta)
    found = []
    for grouped, mask in ((False, None), (False, np.ones(shape[0], bool)), (True, None)):
        x, dy, residual = (backend.asarray(np.stack([a, a]) if grouped else a) for a in tensors)
        options = {"mask": mask if mask is None else backend.asarray(mask), "grouped": grouped, "activation": "tanh"}
        options |= {"axis": axis, "residual": residual}
        y, statistics = bn.batch_norm_forward(x, gamma, beta, **options)
        dx, dgamma, dbeta, dresidual = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)
        arrays = [backend.asnumpy(array) for array in (y, statistics, dx, dresidual)]
        found.append([array[1] if grouped else array for array in arrays])
        if not grouped:
            found[-1] += [backend.asnumpy(array) for array in (dgamma, dbeta)]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=False):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("rows", [64, 2000])
def test_threads_without_a_valid_row_cost_no_digits(backend: Backend, rng: np.random.Generator, rows: int) -> None:
    """They have no mean, and distances from 0 would lose what lies beyond the seventh digit."""
    x = (1e6 + rng.standard_normal((rows, 8))).astype(np.float32)
    mask = np.arange(rows) % 16 >= 12
    y, _ = bn.batch_norm_forward(backend.asarray(x), mask=backend.asarray(mask))
    exact = oracle.forward(x[mask], None, None, 1e-5)
    oracle.assert_within(backend.asnumpy(y)[mask], exact.y, exact.z_bound, "y")


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "mask_shape"), CASES)
def test_is_batch_norm_of_the_valid_rows(
    backend: Backend, rng: np.random.Generator, shape: tuple, axis: int, mask_shape: tuple, dtype: str, activation: str
) -> None:
    tensors = make_tensors(rng, shape, axis, dtype_named(dtype))
    mask = make_mask(rng, mask_shape)
    rows = spread_mask(mask, shape, axis)
    x, dy, residual, *_ = backend.arrays(*(spoiled(array, rows, axis) for array in tensors[:3]))
    gamma, beta, on_mask = backend.arrays(*tensors[3:], mask)
    x_rows, dy_rows, residual_rows = (as_rows(array, axis)[rows] for array in tensors[:3])
    options = {"axis": axis, "residual": residual, "activation": activation, "mask": on_mask}
    vectors, extra = tensors[3:], {"residual": residual_rows}

    y, statistics = bn.batch_norm_forward(x, gamma, beta, eps=1e-3, **options)
    exact = oracle.forward(x_rows, *vectors, 1e-3, activation, **extra)
    assert_valid_rows(backend, y, rows, axis, exact.y, exact.z_bound, "y")
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)
    exact = oracle.backward(dy_rows, x_rows, *vectors, 1e-3, activation, **extra)
    assert_gradients(backend, grads, rows, axis, exact)

    running = rng.standard_normal(shape[axis]), rng.uniform(0.1, 3, shape[axis])
    running = [array.astype(vectors[0].dtype) for array in running]
    on_running = backend.arrays(*running)
    y = bn.batch_norm_inference(x, gamma, beta, *on_running, eps=1e-3, **options)
    exact = oracle.forward(x_rows, *vectors, 1e-3, activation, running, **extra)
    assert_valid_rows(backend, y, rows, axis, exact.y, exact.z_bound, "y of inference")
    grads = bn.batch_norm_inference_backward(dy, x, gamma, beta, *on_running, eps=1e-3, **options)
    exact = oracle.backward(dy_rows, x_rows, *vectors, 1e-3, activation, running, **extra)
    assert_gradients(backend, grads, rows, axis, exact)


def assert_gradients(backend: Backend, grads: tuple, rows: np.ndarray, axis: int, exact: oracle.Backward) -> None:
    dx, dgamma, dbeta, dresidual = grads
    assert_valid_rows(backend, dx, rows, axis, exact.dx, exact.dx_bound, "dx")
    assert_valid_rows(backend, dresidual, rows, axis, exact.dresidual, exact.dresidual_bound, "dresidual")
    oracle.assert_within(backend.asnumpy(dgamma), exact.dgamma, exact.dgamma_bound, "dgamma")
    oracle.assert_within(backend.asnumpy(dbeta), exact.dbeta, exact.dbeta_bound, "dbeta")


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_move_by_the_valid_rows(backend: Backend, rng: np.random.Generator, unbiased: bool) -> None:
    x, mask = rng.standard_normal((30, 4)), make_mask(rng, (30,))
    on_x, on_mask, mean, var = backend.arrays(x, mask, np.full(4, 2.0), np.full(4, 3.0))
    bn.batch_norm_forward(on_x, None, None, mean, var, momentum=0.25, unbiased=unbiased, mask=on_mask)
    valid = x[mask]
    np.testing.assert_allclose(backend.asnumpy(mean), 0.75 * 2 + 0.25 * valid.mean(0), rtol=1e-13)
    np.testing.assert_allclose(backend.asnumpy(var), 0.75 * 3 + 0.25 * valid.var(0, ddof=unbiased), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("valid", [0, 1])
def test_no_valid_row_gives_0_and_one_gives_beta(
    backend: Backend, rng: np.random.Generator, valid: int, dtype: str
) -> None:
    x, dy = (rng.standard_normal((40, 3)).astype(dtype) for _ in range(2))
    mask = np.arange(40) < valid
    gamma, beta = np.array([2, -1, 3], dtype), np.array([0.5, -0.5, 0], dtype)
    on_x, on_dy, on_mask, on_gamma, on_beta = backend.arrays(x, dy, mask, gamma, beta)
    mean, var = backend.arrays(np.full(3, 2, dtype), np.full(3, 3, dtype))
    options = {"mask": on_mask, "activation": "relu"}
    y, statistics = bn.batch_norm_forward(on_x, on_gamma, on_beta, mean, var, momentum=0.5, **options)
    grads = bn.batch_norm_backward(on_dy, on_x, on_gamma, on_beta, statistics, **options)
    y, statistics, mean, var, dx, dgamma, dbeta = map(backend.asnumpy, (y, statistics, mean, var, *grads))
    np.testing.assert_array_equal(y[valid:], 0)
    np.testing.assert_array_equal(var, 3)  # a single value has no unbiased variance
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dgamma, 0)
    if valid:
        np.testing.assert_array_equal(y[0], np.maximum(beta, 0))
        np.testing.assert_array_equal(mean, (2 + x[0]) / 2)
        np.testing.assert_array_equal(dbeta, np.where(beta > 0, dy[0], 0))
    else:
        np.testing.assert_array_equal(statistics, 0)
        np.testing.assert_array_equal(mean, 2)
        np.testing.assert_array_equal(dbeta, 0)


def test_a_constant_channel_gives_beta(backend: Backend, rng: np.random.Generator) -> None:
    x, mask = np.full((1000, 2), 12345.678, "float32"), make_mask(rng, (1000,))
    x[~mask] = np.nan
    on_x, on_mask, beta = backend.arrays(x, mask, np.array([0.25, -3], "float32"))
    y, _ = bn.batch_norm_forward(on_x, None, beta, mask=on_mask)
    np.testing.assert_array_equal(backend.asnumpy(y)[mask], np.tile([0.25, -3], (mask.sum(), 1)))


def test_padding_gives_the_bits_of_other_padding(backend: Backend, rng: np.random.Generator) -> None:
    x, dy, mask = rng.standard_normal((50, 6)), rng.standard_normal((50, 6)), make_mask(rng, (50,))
    found = []
    for padding in (0.0, 1e30, np.nan):
        given = [np.where(mask[:, None], array, padding) for array in (x, dy)]
        on_x, on_dy, on_mask = backend.arrays(*given, mask)
        y, statistics = bn.batch_norm_forward(on_x, mask=on_mask, activation="tanh")
        grads = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, mask=on_mask, activation="tanh")
        found.append([backend.asnumpy(array) for array in (y, statistics, *grads)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("steps", [(2,), (-1,), (0,)], ids=["every other", "reversed", "one for all"])
def test_a_mask_may_have_any_strides(backend: Backend, rng: np.random.Generator, steps: tuple) -> None:
    x = rng.standard_normal((40, 3))
    base = make_mask(rng, (80,))
    (step,) = steps
    mask = np.lib.stride_tricks.as_strided(base[79 if step < 0 else 0 :], (40,), (step,))
    on_x = backend.asarray(x)
    results = [bn.batch_norm_forward(on_x, mask=each)[0] for each in (backend.like(mask), backend.asarray(mask.copy()))]
    np.testing.assert_array_equal(*map(backend.asnumpy, results))


def test_results_may_replace_what_they_are_made_of(backend: Backend, rng: np.random.Generator) -> None:
    x, dy, mask = rng.standard_normal((30, 4)), rng.standard_normal((30, 4)), make_mask(rng, (30,))
    on_x, on_dy, on_mask = backend.arrays(x, dy, mask)
    y, statistics = bn.batch_norm_forward(on_x, mask=on_mask)
    grads = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, mask=on_mask)
    in_place, other = backend.arrays(x, x)
    same, _ = bn.batch_norm_forward(in_place, mask=on_mask, out=(in_place, backend.empty((3, 4), "float64")))
    assert same is in_place
    np.testing.assert_array_equal(*map(backend.asnumpy, (in_place, y)))
    out = (on_dy, *(backend.empty((4,), "float64") for _ in range(2)))
    found = bn.batch_norm_backward(on_dy, other, None, None, statistics, mask=on_mask, out=out)
    assert found[0] is on_dy
    for one, two in zip(found, grads, strict=True):
        np.testing.assert_array_equal(*map(backend.asnumpy, (one, two)))


@pytest.mark.emulator
@pytest.mark.parametrize(("rows", "step", "reads"), [(64, 1, 1), (2000, 2, 2), (2000, 1, 1)])
def test_of_invalid_rows_nothing_is_read(
    emulated: EmulatorRuntime, rng: np.random.Generator, rows: int, step: int, reads: int
) -> None:
    """In registers, read twice since channels do not lie side by side, and on the chip."""
    if emulated.build not in ("plain", "coverage"):
        pytest.skip(f"the build {emulated.build} counts no accesses")
    x, dy, mask = rng.standard_normal((rows, 20)), rng.standard_normal((rows, 20)), make_mask(rng, (rows,))
    on_x, on_dy, on_mask = (emulated.like(array.repeat(step, -1)) for array in (x, dy, mask))
    on_x, on_dy, on_mask = on_x[:, ::step], on_dy[:, ::step], on_mask[::step]
    y, statistics = bn.batch_norm_forward(on_x, mask=on_mask)
    dx, *_ = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, mask=on_mask)
    forward, backward = (record.counts for record in emulated.launches)
    valid = int(mask.sum()) * 20 * 8
    assert forward.of(on_x).bytes_read == reads * valid
    assert backward.of(on_x).bytes_read == backward.of(on_dy).bytes_read == reads * valid
    assert forward.of(y).bytes_written == backward.of(dx).bytes_written == y.nbytes


BAD_MASKS = [
    (np.ones(6, "int8"), TypeError, r"mask must be bool, True where valid, got int8; convert it with mask\.astype"),
    (np.ones(5, bool), ValueError, r"mask must have the shape \(6, 7\).*or of the first axes of that, got \(5,\)"),
    (np.ones((6, 3, 7), bool), ValueError, r"mask must have the shape \(6, 7\).*got \(6, 3, 7\)"),
    (np.ones((), bool), ValueError, r"mask must have the shape \(6, 7\).*got \(\)"),
    ([True] * 6, TypeError, r"expected a NumPy or a CuPy array"),
]


@pytest.mark.parametrize(("mask", "error", "message"), BAD_MASKS)
def test_a_wrong_mask_says_what_was_expected(
    backend: Backend, rng: np.random.Generator, mask: Any, error: type, message: str
) -> None:
    x = backend.asarray(rng.standard_normal((6, 3, 7)))
    given = mask if isinstance(mask, list) else backend.asarray(mask)
    with pytest.raises(error, match=message):
        bn.batch_norm_forward(x, mask=given)


def test_a_mask_must_lie_where_the_data_do(rng: np.random.Generator) -> None:
    from tools import backends

    x = backends.make("emulator").asarray(rng.standard_normal((6, 3)))
    with pytest.raises(TypeError, match=r"mask is a numpy\.ndarray but x is a .*EmulatedArray"):
        bn.batch_norm_forward(x, mask=np.ones(6, bool))
