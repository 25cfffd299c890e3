"""Products of matrices in registers, and by the BLAS: every size of tile, any strides, nothing written beyond."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")
products = pytest.importorskip("bnkernels.runtime.cpu.products")

from bnkernels.runtime.cpu.language import kernel  # noqa: E402


@kernel
def product(m, n, depth, a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_row, add):
    """Call the product from Python."""
    products.product(m, n, depth, a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_row, add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_is_numpys(rng: np.random.Generator, dtype: str, turned: bool, add: bool) -> None:
    depth, limits = 17, {"float32": 2e-5, "float64": 1e-13}
    for m in (1, 4, 7):
        for n in (1, 7, 8, 10, 16, 20, 24, 33, 100):
            a = rng.standard_normal((depth, m + 3) if turned else (m, depth + 3)).astype(dtype)
            b, c = rng.standard_normal((depth, n + 5)).astype(dtype), rng.standard_normal((m, n + 2)).astype(dtype)
            want = c.copy()
            left = a[:, :m].T if turned else a[:, :depth]
            want[:, :n] = left.astype(float) @ b[:, :n].astype(float) + (c[:, :n] if add else 0)
            strides = (1, m + 3) if turned else (depth + 3, 1)
            product(m, n, depth, a.ravel(), 0, *strides, b.ravel(), 0, n + 5, 1, c.reshape(-1), 0, n + 2, add)
            np.testing.assert_allclose(c[:, :n], want[:, :n], rtol=limits[dtype], atol=limits[dtype])
            np.testing.assert_array_equal(c[:, n:], want[:, n:])


@pytest.mark.parametrize("b_turned", [False, True])
@pytest.mark.parametrize("a_turned", [False, True])
def test_large_or_turned_factors_go_to_the_blas(rng: np.random.Generator, a_turned: bool, b_turned: bool) -> None:
    m, n, depth = 256, 192, 200
    assert products.worth_blas.py_func(m, n, depth)
    a = rng.standard_normal((depth, m) if a_turned else (m, depth))
    b = rng.standard_normal((n, depth) if b_turned else (depth, n))
    c = np.ones((m, n))
    of_a, of_b = (1, m) if a_turned else (depth, 1), (1, depth) if b_turned else (n, 1)
    product(m, n, depth, a.ravel(), 0, *of_a, b.ravel(), 0, *of_b, c.reshape(-1), 0, n, True)
    np.testing.assert_allclose(c, (a.T if a_turned else a) @ (b.T if b_turned else b) + 1, rtol=1e-10, atol=1e-10)


def test_the_position_of_a_column_changes_no_bit(rng: np.random.Generator) -> None:
    """But for the BLAS: equal columns give equal sums."""
    a, column = rng.standard_normal((9, 40)).astype("float32"), rng.standard_normal((40, 1)).astype("float32")
    c = np.empty((9, 45), "float32")
    b = np.repeat(column, 45, axis=1)
    product(9, 45, 40, a.ravel(), 0, 40, 1, b.ravel(), 0, 45, 1, c.reshape(-1), 0, 45, False)
    np.testing.assert_array_equal(c, np.repeat(c[:, :1], 45, axis=1))
