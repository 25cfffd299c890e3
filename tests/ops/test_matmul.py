"""The product that a CUDA graph can capture: every layout, tile and part, and what may not come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.matmul.op import MOST_TILES, TILE_ROWS, choose
from bnkernels.runtime.seam import Limits
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# (M, K, N): one of each; nothing that divides; more rows than a tile has; many terms, in parts and not; none.
SIZES = [(1, 1, 1), (5, 7, 33), (259, 20, 40), (20, 1031, 3), (4, 2048, 16), (3, 0, 2), (0, 4, 2), (64, 100, 400)]


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return numbers whose sums of products are exact, in whatever order."""
    return rng.integers(-8, 9, shape)


def factor(backend: Backend, array: np.ndarray, layout: str, dtype: str) -> Any:
    """Return an array by rows, "n", or by columns, "t"."""
    array = array.astype(dtype)
    return backend.asarray(array) if layout == "n" else backend.asarray(np.ascontiguousarray(array.T)).T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layouts", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("size", SIZES)
def test_every_layout_tile_and_part(
    backend: Backend, rng: np.random.Generator, size: tuple[int, int, int], layouts: str, dtype: str
) -> None:
    rows, terms, columns = size
    a, b = integers(rng, rows, terms), integers(rng, terms, columns)
    given = [factor(backend, one, layout, dtype) for one, layout in zip((a, b), layouts, strict=True)]
    found = bn.matmul(*given)
    assert found.dtype == dtype
    np.testing.assert_array_equal(backend.asnumpy(found), a @ b)
    out = backend.empty((rows, columns), dtype)
    assert bn.matmul(*given, out=out) is out
    np.testing.assert_array_equal(backend.asnumpy(out), a @ b)


@pytest.mark.emulator
def test_the_order_of_blocks_and_threads_changes_no_bit(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    backend = backends.make("emulator")
    a, b = (backend.asarray(rng.standard_normal(shape).astype("float32")) for shape in ((300, 600), (600, 9)))
    first = backend.asnumpy(bn.matmul(a, b))
    assert {record.launch.grid[2] > 1 for record in emulated.launches} == {True, False}, "parts, and their sum"
    for seed in range(1, 4):
        with emulated.schedule(seed, resident=2):
            np.testing.assert_array_equal(backend.asnumpy(bn.matmul(a, b)), first)


def test_nan_and_infinity_are_where_numpy_has_them(backend: Backend, rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((9, 12)).astype("float32"), rng.standard_normal((12, 5)).astype("float32")
    a[2, 3], a[4, 11], b[0, 1] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        wanted = a @ b
    found = backend.asnumpy(bn.matmul(backend.asarray(a), backend.asarray(b)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_large_device_has_enough_blocks() -> None:
    h200, single = Limits(132, 227 * 1024, 228 * 1024, True), np.dtype("float32")
    for size in ((64, 400, 100), (400, 100, 4096), (4096, 400, 28), (100, 100, 50_000)):
        plan = choose(*size, single, h200)
        assert np.prod(plan.launch.grid) >= 64
        assert plan.splits * plan.held >= size[2] > (plan.splits - 1) * plan.held


def plain(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": plain(2, 3, dtype="int32")}, TypeError, "a must be float32 or float64, got int32"),
        ({"a": plain(2, 3, dtype="float16")}, TypeError, "a must be float32 or float64, got float16"),
        ({"b": plain(3, 4, dtype="float64")}, TypeError, "b must be float32, got float64"),
        ({"b": plain(2, 4)}, ValueError, r"a and b must have the shapes \(M, K\) and \(K, N\), got"),
        ({"a": plain(3)}, ValueError, r"a and b must have the shapes \(M, K\) and \(K, N\), got"),
        ({"out": plain(4, 2)}, ValueError, r"out must have the shape \(2, 4\), got \(4, 2\)"),
        ({"out": plain(4, 2).T}, ValueError, "out must be contiguous in C order"),
        ({"a": plain(2, 6)[:, ::2]}, ValueError, "a must be contiguous in C order, got strides .*nor its transpose"),
        ({"b": plain(6, 4)[::2]}, ValueError, "b must be contiguous in C order, got strides .*nor its transpose"),
        ({"a": None}, TypeError, "a must be an array, got None"),
    ],
)
def test_wrong_arguments_are_refused(backend: Backend, change: dict, error: type[Exception], message: str) -> None:
    given = {"a": plain(2, 3), "b": plain(3, 4), "out": plain(2, 4)} | change
    arrays = {name: moved(backend, array) for name, array in given.items()}
    with refused(backend, error, message, *[array for array in arrays.values() if array is not None]):
        bn.matmul(arrays["a"], arrays["b"], out=arrays["out"])


def moved(backend: Backend, array: Any) -> Any:
    """Return an array of the backend with the same strides."""
    if array is None or array.base is None:
        return None if array is None else backend.asarray(array)
    base = backend.asarray(array.base)
    return base.T if array.strides[0] < array.strides[1] else base[:, ::2] if array.base.shape[1] == 6 else base[::2]


def test_an_output_may_not_be_a_factor(backend: Backend) -> None:
    a = backend.asarray(plain(3, 3))
    with refused(backend, ValueError, "out overlaps a in memory", a):
        bn.matmul(a, backend.asarray(plain(3, 3)), out=a)


@pytest.mark.parametrize(("rows", "terms"), [(2**16, 2**15), (TILE_ROWS * MOST_TILES + 1, 1)])
def test_sizes_beyond_32_bits_are_refused(rows: int, terms: int) -> None:
    """Without the memory: one row that is all rows is not contiguous, but its sizes come first."""
    a = np.lib.stride_tricks.as_strided(plain(1), (rows, terms), (0, 0))
    with pytest.raises(ValueError, match=r"a must have at most .*; split it"):
        bn.matmul(a, plain(terms, 1))
