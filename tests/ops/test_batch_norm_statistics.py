"""Statistics as ops: the pieces of synchronised batch norm, put together over parts, are batch norm of the whole."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_layouts import as_rows, make_tensors
from tests.ops.test_batch_norm_masked import dtype_named, make_mask
from tools import oracle
from tools.backends import Backend
from tools.oracle import Extended

# Numbers of examples of the parts: a single part, uneven ones, empty ones among them.
SPLITS = [(40,), (10, 25, 5), (0, 39, 0, 1)]


def parts_of(array: np.ndarray, split: tuple[int, ...]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(split)[:-1])


def synchronised(backend: Backend, tensors: list, vectors: list, split: tuple, options: dict, **running: Any) -> tuple:
    """Train a step over parts as several devices would: only moments and sums are exchanged."""
    xs, dys, residuals = ([backend.asarray(part) for part in parts_of(array, split)] for array in tensors)
    gamma, beta = vectors
    axis = options["axis"]
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(x, axis=axis)) for x in xs])
    statistics, merged = bn.batch_norm_statistics(backend.asarray(moments), eps=1e-3, **running)
    ys, sums = [], []
    for x, dy, residual in zip(xs, dys, residuals, strict=True):
        ys.append(bn.batch_norm_normalise(x, gamma, beta, statistics, residual=residual, **options))
        given = (dy, x, gamma, beta, statistics)
        sums.append(backend.asnumpy(bn.batch_norm_gradient_sums(*given, residual=residual, **options)))
    total = backend.asarray(sum(sums))
    grads = [
        bn.batch_norm_input_gradient(dy, x, gamma, beta, statistics, total, residual=residual, **options)
        for x, dy, residual in zip(xs, dys, residuals, strict=True)
    ]
    dx, dresidual = (np.concatenate([backend.asnumpy(grad[i]) for grad in grads]) for i in range(2))
    y = np.concatenate([backend.asnumpy(y) for y in ys])
    return y, statistics, merged, dx, dresidual, total


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((40, 7), 1), ((40, 3, 9), 1), ((40, 4, 5), -1)])
def test_parts_together_are_the_mini_batch(
    backend: Backend, rng: np.random.Generator, shape: tuple, axis: int, dtype: str, split: tuple
) -> None:
    *tensors, gamma, beta = make_tensors(rng, shape, axis, dtype_named(dtype))
    options = {"axis": axis, "activation": "tanh"}
    found = synchronised(backend, tensors, backend.arrays(gamma, beta), split, options)
    y, _, merged, dx, dresidual, total = found
    x_rows, dy_rows, residual_rows = (as_rows(array, axis) for array in tensors)
    exact = oracle.forward(x_rows, gamma, beta, 1e-3, "tanh", residual=residual_rows)
    oracle.assert_within(as_rows(y, axis), exact.y, 2 * exact.z_bound, "y")
    np.testing.assert_array_equal(backend.asnumpy(merged)[0], len(x_rows))
    grads = oracle.backward(dy_rows, x_rows, gamma, beta, 1e-3, "tanh", residual=residual_rows)
    oracle.assert_within(as_rows(dx, axis), grads.dx, 2 * grads.dx_bound, "dx")
    oracle.assert_within(as_rows(dresidual, axis), grads.dresidual, 2 * grads.dresidual_bound, "dresidual")
    sum_g, sum_g_xhat, count = backend.asnumpy(total)
    oracle.assert_within(sum_g, grads.dbeta, 2 * grads.dbeta_bound, "dbeta")
    oracle.assert_within(sum_g_xhat, grads.dgamma, 2 * grads.dgamma_bound, "dgamma")
    np.testing.assert_array_equal(count, len(x_rows))


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_move_as_those_of_the_whole(
    backend: Backend, rng: np.random.Generator, unbiased: bool
) -> None:
    x = rng.standard_normal((40, 3))
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(backend.asarray(part))) for part in parts_of(x, (1, 39))])
    mean, var = backend.arrays(np.full(3, 2.0), np.full(3, 3.0))
    bn.batch_norm_statistics(backend.asarray(moments), mean, var, momentum=0.25, unbiased=unbiased)
    np.testing.assert_allclose(backend.asnumpy(mean), 1.5 + 0.25 * x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(backend.asnumpy(var), 2.25 + 0.25 * x.var(0, ddof=unbiased), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [0, 1e4, 1e7])
def test_moments_of_a_large_mean_keep_their_digits(
    backend: Backend, rng: np.random.Generator, offset: float, dtype: str
) -> None:
    x = (rng.standard_normal((500, 4)) + offset).astype(dtype)
    parts = [bn.batch_norm_moments(backend.asarray(part)) for part in parts_of(x, (100, 399, 1))]
    moments = np.stack([backend.asnumpy(part) for part in parts])
    statistics, merged = bn.batch_norm_statistics(backend.asarray(moments), eps=1e-30)
    _, mean, low, m2 = backend.asnumpy(merged).astype(Extended)
    exact_x = x.astype(Extended)
    u = oracle.unit_roundoff(x.dtype)
    oracle.assert_within(
        (mean + low).astype("float64"), exact_x.mean(0), 1e-15 * offset + 8 * u * u * offset + 8 * u, "mean"
    )
    oracle.assert_within(m2, exact_x.var(0) * 500, 16 * u * exact_x.var(0) * 500, "m2")
    np.testing.assert_array_equal(backend.asnumpy(statistics)[:2].astype(Extended), [mean, low])
    oracle.assert_within(backend.asnumpy(statistics)[2], 1 / exact_x.std(0), 16 * u / exact_x.std(0), "rstd")


def test_constant_parts_have_exactly_no_variance(backend: Backend) -> None:
    x = np.full((30, 2), 12345.678, "float32")
    parts = [backend.asnumpy(bn.batch_norm_moments(backend.asarray(part))) for part in parts_of(x, (7, 0, 23))]
    statistics, merged = bn.batch_norm_statistics(backend.asarray(np.stack(parts)))
    np.testing.assert_array_equal(backend.asnumpy(merged), [[30] * 2, [x[0, 0]] * 2, [0] * 2, [0] * 2])
    y = bn.batch_norm_normalise(backend.asarray(x), None, None, statistics)
    np.testing.assert_array_equal(backend.asnumpy(y), 0)


def test_of_an_empty_part_only_the_count_counts(backend: Backend, rng: np.random.Generator) -> None:
    moments = backend.asnumpy(bn.batch_norm_moments(backend.asarray(rng.standard_normal((20, 3)))))
    empty = np.array([[0] * 3, [np.nan] * 3, [np.inf] * 3, [np.nan] * 3])
    parts = [np.stack(each) for each in ([moments], [empty, moments, empty])]
    (alone, _), (among, _) = (bn.batch_norm_statistics(backend.asarray(each)) for each in parts)
    np.testing.assert_array_equal(backend.asnumpy(alone), backend.asnumpy(among))
    mean, var = backend.arrays(np.full(3, 2.0), np.full(3, 3.0))
    statistics, merged = bn.batch_norm_statistics(backend.asarray(empty[None]), mean, var)
    for array, value in ((statistics, 0), (merged, 0), (mean, 2), (var, 3)):
        np.testing.assert_array_equal(backend.asnumpy(array), value)


def test_a_merge_in_steps_is_a_merge_at_once(backend: Backend, rng: np.random.Generator) -> None:
    parts = [rng.standard_normal((size, 5)) + size for size in (3, 50, 8, 20)]
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(backend.asarray(part))) for part in parts])
    at_once, _ = bn.batch_norm_statistics(backend.asarray(moments))
    halves = [
        backend.asnumpy(bn.batch_norm_statistics(backend.asarray(half))[1]) for half in (moments[:2], moments[2:])
    ]
    in_steps, _ = bn.batch_norm_statistics(backend.asarray(np.stack(halves)))
    one, two = (backend.asnumpy(array) for array in (at_once, in_steps))
    np.testing.assert_allclose(one[0] + one[1], two[0] + two[1], rtol=1e-14)
    np.testing.assert_allclose(one[2], two[2], rtol=1e-14)


def test_masked_parts(backend: Backend, rng: np.random.Generator) -> None:
    x, mask = rng.standard_normal((40, 3)), make_mask(rng, (40,))
    on_x, on_mask = backend.arrays(np.where(mask[:, None], x, np.nan), mask)
    moments = bn.batch_norm_moments(on_x, mask=on_mask)
    want = x[mask]
    found = backend.asnumpy(moments)
    np.testing.assert_array_equal(found[0], len(want))
    np.testing.assert_allclose(found[1], want.mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found[3], want.var(0) * len(want), rtol=1e-13)
    sums = bn.batch_norm_gradient_sums(on_x, on_x, None, None, backend.asarray(np.ones((3, 3))), mask=on_mask)
    np.testing.assert_allclose(backend.asnumpy(sums)[0], want.sum(0), rtol=1e-12)
    np.testing.assert_array_equal(backend.asnumpy(sums)[2], len(want))


def test_out_is_filled_and_returned(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = backend.arrays(rng.standard_normal((40, 3)), rng.standard_normal((40, 3)))
    moments, merged = (backend.empty((4, 3), "float64") for _ in range(2))
    statistics, sums = (backend.empty((3, 3), "float64") for _ in range(2))
    y = backend.empty((40, 3), "float64")
    assert bn.batch_norm_moments(x, out=moments) is moments
    stacked = backend.asarray(backend.asnumpy(moments)[None])
    found = bn.batch_norm_statistics(stacked, out=(statistics, merged))
    assert found[0] is statistics
    assert found[1] is merged
    assert bn.batch_norm_normalise(x, None, None, statistics, out=y) is y
    assert bn.batch_norm_gradient_sums(dy, x, None, None, statistics, out=sums) is sums
    (dx,) = bn.batch_norm_input_gradient(dy, x, None, None, statistics, sums, out=(dy,))
    assert dx is dy
    for array in (moments, merged, statistics, sums, y, dx):
        assert np.isfinite(backend.asnumpy(array)).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((4, 3), "float64", ValueError, r"moments must have the shape \(K, 4, C\), of K parts, got \(4, 3\); stack"),
        ((2, 3, 3), "float64", ValueError, r"moments must have the shape \(K, 4, C\)"),
        ((2, 4, 3), "float16", TypeError, "moments must be float32 or float64, as batch_norm_moments returns them"),
        ((2, 4, 3), "int64", TypeError, "moments must be float32 or float64"),
    ],
)
def test_wrong_moments_are_refused(backend: Backend, shape: tuple, dtype: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        bn.batch_norm_statistics(backend.asarray(np.ones(shape, dtype)))


def test_wrong_statistics_and_sums_are_refused(backend: Backend) -> None:
    x, good, bad = backend.arrays(np.ones((5, 3)), np.ones((3, 3)), np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"statistics must have the shape \(3, 3\), got \(4, 3\)"):
        bn.batch_norm_normalise(x, None, None, bad)
    with pytest.raises(ValueError, match=r"sums must have the shape \(3, 3\), got \(4, 3\)"):
        bn.batch_norm_input_gradient(x, x, None, None, good, bad)
    with pytest.raises(TypeError, match="statistics must be an array, got None"):
        bn.batch_norm_normalise(x, None, None, None)
    with pytest.raises(TypeError, match="sums must be an array, got None"):
        bn.batch_norm_input_gradient(x, x, None, None, good, None)


def test_the_page_does_what_it_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "synchronised.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0
