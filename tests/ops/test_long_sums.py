"""Long sums of float64 data keep the accuracy contract, where every addition of a plain sum rounds the same way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.accuracy import contract as accuracy
from tools.backends import NUMPY, Backend
from tools.oracle import Extended

FEW = 6.0  # last places, as docs/accuracy.md promises


def signs(rows: int) -> np.ndarray:
    """Return 1 and -1 in turn, as many of each, whose mean is 0 and whose squares are equal."""
    return np.where(np.arange(rows) % 2, 1.0, -1.0)[:, None]


def last_places(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error, in last places of the exact number."""
    return float((np.abs(found.astype(Extended) - exact) / np.abs(exact)).max() / np.finfo(np.float64).eps)


@pytest.mark.parametrize(("rows", "masked"), [(100_000, True), (100_000, False), (7834, False)])
def test_a_long_channel_keeps_the_contract(backend: Backend, rows: int, masked: bool) -> None:
    """Without a mask, and with one of all rows."""
    size = np.array([0.7, 1.3])
    x = signs(rows) * size
    options = {"mask": backend.asarray(np.ones(rows, bool))} if masked else {}
    on_x, dy = backend.arrays(x, np.broadcast_to(size, x.shape))
    _, statistics = bn.batch_norm_forward(on_x, eps=accuracy.EPS, **options)
    _, _, dbeta = bn.batch_norm_backward(dy, on_x, None, None, statistics, **options)
    squares = size.astype(Extended) ** 2
    off = {
        "rstd": last_places(backend.asnumpy(statistics)[2], 1 / np.sqrt(squares + Extended(accuracy.EPS))),
        "dbeta": last_places(backend.asnumpy(dbeta), size.astype(Extended) * rows),
    }
    assert max(off.values()) <= FEW, off


def test_a_long_row_keeps_the_contract(backend: Backend) -> None:
    size = np.array([0.7, 1.3])
    x = backend.asarray((signs(100_000) * size).T)
    _, statistics = bn.layer_norm_forward(x, eps=accuracy.EPS)
    exact = 1 / np.sqrt(size.astype(Extended) ** 2 + Extended(accuracy.EPS))
    assert last_places(backend.asnumpy(statistics)[2], exact) <= FEW


@pytest.mark.parametrize("masked", [False, True])
def test_the_running_mean_is_the_whole_mean(backend: Backend, masked: bool) -> None:
    """With a momentum of 1 it is the sum of mean and mean_low, rounded once: no digit of that is lost.

    On NumPy arrays the mean is right to the last place. In kernels the last places are those of a standard deviation,
    as docs/accuracy.md promises for the mean: they sum distances from a value of the channel.
    """
    small = np.array([2.0**-30 / 3, 2.0**-31 / 7])
    x = np.array([[1.0], small[:1], [-1.0], small[1:]] * 5)
    options = {"mask": backend.asarray(np.ones(len(x), bool))} if masked else {}
    running = backend.asarray(np.zeros(1))
    bn.batch_norm_forward(backend.asarray(x), None, None, running, None, momentum=1.0, **options)
    exact = small.astype(Extended).sum(keepdims=True) / 4
    unit = np.abs(exact) if backend.name in NUMPY else x.astype(Extended).std(0)
    assert np.abs(backend.asnumpy(running) - exact) <= FEW * np.finfo(np.float64).eps * unit


@pytest.mark.parametrize("masked", [False, True])
def test_equal_columns_have_equal_bits(backend: Backend, rng: np.random.Generator, masked: bool) -> None:
    """True for any number of them."""

    def statistics(x: np.ndarray) -> Any:
        options = {"mask": backend.asarray(np.ones(len(x), bool))} if masked else {}
        return backend.asnumpy(bn.batch_norm_forward(backend.asarray(x), **options)[1])

    for rows in (1000, 7833):
        column = rng.standard_normal((rows, 1))
        for columns in range(2, 18):
            found = statistics(np.repeat(column, columns, 1))
            np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1], found.shape), err_msg=f"{columns}")
