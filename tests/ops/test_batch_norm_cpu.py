"""Compiled kernels of batch norm: how they divide their work, what memory they take, and calls that are repeated."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.cpu import using

pytestmark = pytest.mark.filterwarnings("error")
MOST_MEMORY = 4 * 2**20  # bytes beside inputs and outputs


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    pytest.importorskip("numba")
    with using("compiled"):
        yield


def passes(x: np.ndarray, dy: np.ndarray, **options: Any) -> list[np.ndarray]:
    """Return the results of forward and backward."""
    y, statistics = bn.batch_norm_forward(x, activation="relu", **options)
    return [y, statistics, *bn.batch_norm_backward(dy, x, None, None, statistics, activation="relu", **options)]


# Joined rows with a shorter last one; several slices; many groups, a chunk of which has a state; pieces of a channel;
# slices of which a wave has several; channels of which a line holds no whole one.
SHAPES = [(67, 20), (9, 2500), (700, 3, 40), (2, 3, 5000), (40, 300, 7), (3, 7, 600), (1000, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_division_gives_what_the_reference_gives(rng: np.random.Generator, shape: tuple, masked: bool) -> None:
    x, dy = rng.standard_normal((2, *shape))
    options: dict[str, Any] = {"grouped": True} if shape[0] == 700 else {}
    if masked:
        front = shape[:2] if options else (shape[0], *shape[2:])
        options["mask"] = rng.random(front) < 0.8
    found = passes(x, dy, **options)
    with using("reference"):
        expected = passes(x, dy, **options)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(4096, 512), (2, 200_000), (300, 16, 400), (4, 16, 40_000)], ids=str)
def test_memory_beside_inputs_and_outputs_is_small(rng: np.random.Generator, shape: tuple, dtype: str) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    options: dict[str, Any] = {"grouped": True} if shape[0] == 300 else {}
    y, statistics = bn.batch_norm_forward(x, **options)
    gradients = bn.batch_norm_backward(y, x, None, None, statistics, **options)
    tracemalloc.start()
    try:
        bn.batch_norm_forward(x, out=(y, statistics), **options)
        bn.batch_norm_backward(y, x, None, None, statistics, out=gradients, **options)
        assert tracemalloc.get_traced_memory()[1] <= MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_a_repeated_call_looks_at_its_arrays_anew(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 4)).astype("float32")
    y, statistics = np.empty_like(x), np.empty((3, 4), "float32")
    for _ in range(3):
        x += 1
        assert bn.batch_norm_forward(x, out=(y, statistics)) == (y, statistics)
        np.testing.assert_allclose(statistics[0], x.mean(0), rtol=1e-6)
    y.flags.writeable = False
    before = y.copy()
    with pytest.raises(ValueError, match="y must be writable"):
        bn.batch_norm_forward(x + 1, out=(y, statistics))
    with pytest.raises(ValueError, match="y must be writable"):
        bn.batch_norm_forward(x, out=(y, statistics))
    np.testing.assert_array_equal(y, before)
    y.flags.writeable = True
    x.shape = (3, 8)
    with pytest.raises(ValueError, match="y must have the shape"):
        bn.batch_norm_forward(x, out=(y, statistics))


def test_repeated_calls_that_share_their_output_are_told_apart(rng: np.random.Generator) -> None:
    out = np.empty((6, 4)), np.empty((3, 4))
    calls = [(rng.standard_normal((6, 4)), eps) for eps in (0.25, 0.5)]
    calls += [(calls[0][0], 0.5), (calls[0][0], 1)]  # an eps of 1 is no float
    expected = [bn.batch_norm_forward(x, eps=eps) for x, eps in calls]
    for _ in range(3):
        for (x, eps), (y, statistics) in zip(calls, expected, strict=True):
            bn.batch_norm_forward(x, eps=eps, out=out)
            np.testing.assert_array_equal(out[0], y)
            np.testing.assert_array_equal(out[1], statistics)
        with pytest.raises(TypeError, match="eps must be a number"):
            bn.batch_norm_forward(calls[0][0], eps=True, out=out)


def test_a_repeated_call_follows_the_engine(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 4))
    out = np.empty_like(x), np.empty((3, 4))
    for engine in ("compiled", "reference", "compiled"):
        with using(engine):
            for _ in range(2):
                bn.batch_norm_forward(x, out=out)
                np.testing.assert_allclose(out[0].var(0), 1, rtol=1e-3)
