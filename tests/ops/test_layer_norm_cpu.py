"""Compiled kernels of layer norm on the CPU: rows of any length, threads, places, memory."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.cpu import threads
from tests.ops.test_batch_norm_masked import DTYPES
from tests.ops.test_layer_norm import assert_right, make
from tools import backends

# Rows that are normalised together, one of a line, some of several lines, and too long for their values to be held.
LENGTHS = [1, 20, 128, 129, 1024, 1030, 8192, 8193]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", LENGTHS)
def test_rows_of_any_length(rng: np.random.Generator, columns: int, dtype: str) -> None:
    with backends.entered("compiled") as backend:
        assert_right(backend, *make(rng, (11, columns), dtype), "relu")


def results(x: np.ndarray, dy: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> list[np.ndarray]:
    y, statistics = bn.layer_norm_forward(x, gamma, beta, activation="silu")
    return [y, statistics, *bn.layer_norm_backward(dy, x, gamma, beta, statistics, activation="silu")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", LENGTHS)
def test_a_row_knows_of_no_other(rng: np.random.Generator, columns: int, dtype: str) -> None:
    """Neither of a NaN nor of a row whose sums have to be scaled."""
    x, dy, *vectors = make(rng, (21, columns), dtype)
    x[3], x[5] = np.nan, np.where(np.arange(columns) % 2, 1, -1) * float(ml_dtypes.finfo(x.dtype).max)
    with backends.entered("compiled"):
        y, statistics, dx, *_ = results(x, dy, *vectors)
        for n in range(21):
            alone = results(x[n : n + 1], dy[n : n + 1], *vectors)
            for one, two in zip(
                (y[n], statistics[:, n], dx[n]), (alone[0][0], alone[1][:, 0], alone[2][0]), strict=True
            ):
                np.testing.assert_array_equal(one.astype(float), two.astype(float))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("shape", [(700, 24), (130, 1030), (9, 20000)])
def test_the_same_bits_from_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, shape: tuple[int, int], dtype: str
) -> None:
    arrays = make(rng, shape, dtype)
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    with backends.entered("compiled"):
        found = []
        for number in (1, 2, 3):
            monkeypatch.setattr(threads, "get_num_threads", lambda number=number: number)
            monkeypatch.setattr(threads, "_pool", None)
            found.append(results(*arrays))
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("columns", LENGTHS[1:])
def test_results_may_take_the_place_of_what_they_are_made_of(rng: np.random.Generator, columns: int) -> None:
    x, dy, *vectors = make(rng, (9, columns), "float32")
    with backends.entered("compiled"):
        y, statistics, *grads = results(x, dy, *vectors)
        again = bn.layer_norm_backward(
            dy, x, *vectors, statistics, activation="silu", out=(dy, *map(np.empty_like, vectors))
        )
        bn.layer_norm_forward(x, *vectors, activation="silu", out=(x, statistics))
    for one, two in zip((x, *again), (y, *grads), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("columns", [4, 2000, 9000])
def test_float64_sums_that_overflow_where_no_value_does(columns: int) -> None:
    mixed = 1e308 * np.where(np.arange(columns) % 2, 1.0, -1.0)[None]
    x = np.arange(columns, dtype=float)[None] % 3 - 1
    with backends.entered("compiled"):
        np.testing.assert_array_equal(bn.layer_norm_forward(mixed)[0], 0)
        dx, *_ = bn.layer_norm_backward(np.full_like(x, 1e308), x, None, None, bn.layer_norm_forward(x)[1])
    assert np.abs(dx).max() <= 1e304


@pytest.mark.parametrize("shape", [(60_000, 20), (4000, 300), (6, 200_000)])
def test_memory_beside_the_arrays_is_bounded(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    x, dy, *vectors = make(rng, shape, "float32")
    with backends.entered("compiled"):
        y, statistics = bn.layer_norm_forward(x, *vectors)
        out = bn.layer_norm_backward(dy, x, *vectors, statistics)
        tracemalloc.start()
        try:
            bn.layer_norm_forward(x, *vectors, out=(y, statistics))
            bn.layer_norm_backward(dy, x, *vectors, statistics, out=out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak <= 4 * 2**20
