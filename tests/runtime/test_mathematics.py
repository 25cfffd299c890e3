"""Elementary functions of the CPU kernels: last places against float64 over all numbers, special values, vectors."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed: there are no compiled kernels")

from bnkernels.ops import activations  # noqa: E402
from bnkernels.runtime.cpu import language, mathematics  # noqa: E402
from tools import oracle  # noqa: E402

LIBM = re.compile(r"\$(exp|expm1|log|tanh|erfc)f?\b")


def loop_over(function: Callable, part: int | None = None) -> Callable:
    """Return the kernel that writes a function of x, or a part of it, to `out`."""
    if part is None:

        @numba.njit(**language._OPTIONS)
        def loop(x, out):
            for i in range(len(x)):
                out[i] = function(x[i])
    else:

        @numba.njit(**language._OPTIONS)
        def loop(x, out):
            for i in range(len(x)):
                out[i] = function(x[i])[part]

    return loop


def exact_sigmoid(z: Any) -> Any:
    decay = np.exp(-np.abs(z))
    return np.where(z < 0, decay, 1) / (1 + decay)


def exact_distribution(z: Any) -> Any:
    """Return the normal distribution, of float64 numbers by our array form: exact enough for float32, and fast."""
    erfc = oracle.erfc if z.dtype == oracle.Extended else partial(activations._erfc, np)
    return erfc(-z / np.sqrt(z.dtype.type(2))) / 2


def exact_density(z: Any) -> Any:
    return np.exp(z * z / -2) / np.sqrt(2 * np.pi)


# By name: the kernel, the exact function, and the error in last places that float32 is allowed.
FUNCTIONS: dict[str, tuple[Callable, Callable, float]] = {
    "exp": (loop_over(mathematics.exp), np.exp, 1.0),
    "expm1": (loop_over(mathematics.expm1), np.expm1, 1.5),
    "log": (loop_over(mathematics.log), np.log, 0.8),
    "tanh": (loop_over(mathematics.tanh), np.tanh, 2.4),
    "sigmoid": (loop_over(mathematics.sigmoid, 0), exact_sigmoid, 2.3),
    "sigmoid's derivative": (loop_over(mathematics.sigmoid, 1), lambda z: exact_sigmoid(z) * exact_sigmoid(-z), 5.0),
    "normal distribution": (loop_over(mathematics.normal, 0), exact_distribution, 4.0),
    "normal density": (loop_over(mathematics.normal, 1), exact_density, 3.0),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def computed(name: str, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    FUNCTIONS[name][0](x, out)
    return out


def last_places(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return the errors in last places of `got`'s type; equal infinities and NaN have none, unequal ones infinite."""
    rounded = want.astype(got.dtype)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    unit = np.spacing(np.abs(np.where(np.isfinite(rounded), rounded, 1)))
    error = np.abs(got.astype(want.dtype) - want) / unit
    return np.where(same & ~np.isfinite(rounded), 0, np.where(np.isfinite(error), error, np.inf))


def every_1499th_float32() -> np.ndarray:
    """Return numbers of all magnitudes and both signs, subnormal ones, infinity and NaN."""
    return np.arange(0, 2**32, 1499, dtype=np.uint32).view(np.float32)


@each_function
@np.errstate(all="ignore")
def test_last_places_of_float32(name: str) -> None:
    _, exact, allowed = FUNCTIONS[name]
    for x in (every_1499th_float32(), np.linspace(-106, 91, 2**20).astype(np.float32)):
        error = last_places(computed(name, x), exact(x.astype(np.float64)))
        assert error.max() <= allowed, f"{error.max()} last places at {x[error.argmax()]}"


@each_function
@np.errstate(all="ignore")
def test_last_places_of_float64(name: str) -> None:
    """The argument of the normal distribution is rounded, which its tail multiplies by the square of the argument."""
    x = np.linspace(-30 if name.startswith("normal") else -700, 700, 2**14)
    _, exact, _ = FUNCTIONS[name]
    error = last_places(computed(name, x), exact(x.astype(oracle.Extended)))
    conditioning = 2 * np.minimum(x * x, 900) if name.startswith("normal") else 0
    assert (error <= 5 + conditioning).all(), f"{error.max()} last places at {x[error.argmax()]}"


SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]
AT_SPECIAL = {
    "exp": [np.nan, np.inf, 0, 1, 1],
    "expm1": [np.nan, np.inf, -1, 0, 0],
    "log": [np.nan, np.inf, np.nan, -np.inf, -np.inf],
    "tanh": [np.nan, 1, -1, 0, 0],
    "sigmoid": [np.nan, 1, 0, 0.5, 0.5],
    "sigmoid's derivative": [np.nan, 0, 0, 0.25, 0.25],
    "normal distribution": [np.nan, 1, 0, 0.5, 0.5],
    "normal density": [np.nan, 0, 0, 1 / np.sqrt(2 * np.pi), 1 / np.sqrt(2 * np.pi)],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_function
def test_special_values(name: str, dtype: Any) -> None:
    np.testing.assert_array_equal(computed(name, np.array(SPECIAL, dtype)), np.array(AT_SPECIAL[name], dtype))


def test_ends_of_exp() -> None:
    """The last finite result, infinity, subnormal results, the smallest of them, and zero."""
    x = np.float32([88.72283, 88.72284, -87.5, -103.9, -103.98])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(computed("exp", x), np.exp(x.astype(np.float64)).astype(np.float32))


@each_function
def test_a_result_does_not_depend_on_its_place(name: str, rng: np.random.Generator) -> None:
    """In a vector or behind the last one, the bits are the same."""
    x = rng.uniform(0.1, 9, 75).astype(np.float32)
    whole = computed(name, x)
    for first in range(17):
        for count in (1, 3, 9, 40):
            part = computed(name, x[first : first + count].copy())
            np.testing.assert_array_equal(part, whole[first : first + count])


def avx2() -> bool:
    from llvmlite import binding

    return platform.machine() in ("x86_64", "AMD64") and bool(binding.get_host_cpu_features().get("avx2"))


needs_avx2 = pytest.mark.skipif(not avx2(), reason="The processor has no AVX2, whose instructions are looked for")


@needs_avx2
@each_function
def test_loops_of_float32_are_vectorised(name: str) -> None:
    x = np.ones(64, np.float32)
    computed(name, x)
    loop = FUNCTIONS[name][0]
    (text,) = [loop.inspect_asm(found) for found in loop.signatures if found[0].dtype == numba.float32]
    assert re.search(r"vf\w+ps\s.*%[yz]mm", text), "no packed multiply-add"
    assert not LIBM.search(text)


@numba.njit(**language._OPTIONS)
def raise_to(x, y):
    """Raise the numbers of y to those of x."""
    for i in range(len(x)):
        y[i] = mathematics.maximum(x[i], y[i])


@numba.njit(**language._OPTIONS)
def clear_below(x, y):
    """Set the numbers of y to 0 where those of x are not above 0."""
    for i in range(len(x)):
        y[i] = mathematics.keep_where(x[i] > 0, y[i])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loops_that_keep_some_of_their_numbers(dtype: Any) -> None:
    """The larger number, NaN if one is NaN; and numbers where a condition holds, whatever the others are."""
    x = np.array([*SPECIAL, 1, -1] * 7, dtype)
    y = np.repeat(np.array([*SPECIAL, 1, -1], dtype), 7)
    for kernel, want in ((raise_to, np.maximum(x, y)), (clear_below, np.where(x > 0, y, 0))):
        got = y.copy()
        kernel(x, got)
        np.testing.assert_array_equal(got, want)


@needs_avx2
@pytest.mark.parametrize("kernel", [raise_to, clear_below])
def test_they_store_whole_vectors(kernel: Any) -> None:
    """LLVM would make masked stores of branches and selections, which are slow on AMD's processors."""
    x = np.ones(64, np.float32)
    kernel(x, x.copy())
    (text,) = [kernel.inspect_asm(found) for found in kernel.signatures if found[0].dtype == numba.float32]
    assert re.search(r"vmovups\s+%[yz]mm", text)
    assert "maskmov" not in text
