"""Compiled kernels of the LSTM on the CPU: several blocks of examples, several strips of units, threads, memory."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.cpu import threads
from tests.ops.test_lstm import NORMS, call, gradients
from tools import backends, oracle_lstm

# Two blocks of examples and a rest; two strips of units and a rest; products for the BLAS.
SIZES = [(3, 131, 2, 5), (3, 9, 2, 261), (2, 70, 200, 300)]


def results(sizes: tuple[int, int, int, int], norm: str | None, lengths: np.ndarray | None, dtype: str) -> list:
    """Return outputs and gradients of a random LSTM."""
    rng, backend = np.random.default_rng(4), backends.make("numpy")
    given = oracle_lstm.arguments(rng, sizes, norm, dtype)
    steps, rows, _, units = sizes
    weights = [rng.standard_normal(shape).astype(dtype) for shape in ((steps, rows, units), (rows, units))]
    *found, saved = call(backend, given, norm=norm, lengths=lengths, eps=0.1)
    return [*found, *gradients(backend, saved, *weights, None).values()]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_and_strips_are_the_reference(sizes: tuple[int, int, int, int], norm: str | None, ragged: bool) -> None:
    lengths = 1 + np.arange(sizes[1]) % sizes[0] if ragged else None
    with backends.entered("reference"):
        right = results(sizes, norm, lengths, "float64")
    with backends.entered("compiled"):
        found = results(sizes, norm, lengths, "float64")
    for got, wanted in zip(found, right, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11 * np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", SIZES[:2])
def test_the_same_bits_from_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int], norm: str | None
) -> None:
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    with backends.entered("compiled"):
        found = []
        for number in (1, 2, 3):
            monkeypatch.setattr(threads, "get_num_threads", lambda number=number: number)
            monkeypatch.setattr(threads, "_pool", None)
            found.append(results(sizes, norm, None, "float32"))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("norm", NORMS)
def test_backward_changes_nothing_that_was_saved(norm: str | None) -> None:
    """So that it can be taken again."""
    rng = np.random.default_rng(5)
    with backends.entered("compiled") as backend:
        saved = call(backend, oracle_lstm.arguments(rng, (3, 4, 2, 5), norm, "float32"), norm=norm)[3]
        dy = rng.standard_normal((3, 4, 5)).astype("float32")
        first, again = (bn.lstm_backward(dy, None, None, saved) for _ in range(2))
    for one, two in zip(first[:6], again[:6], strict=True):
        np.testing.assert_array_equal(one, two)
