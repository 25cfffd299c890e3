"""Activations of the CPU kernels against the array forms in float64: forward, and both derivatives."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed: there are no compiled kernels")

from bnkernels.ops import activations_cpu  # noqa: E402
from bnkernels.ops.activations import ACTIVATIONS, Activation, activation_named  # noqa: E402
from bnkernels.runtime.cpu import language  # noqa: E402
from tests.runtime.test_mathematics import LIBM, needs_avx2  # noqa: E402


@language.kernel
def activate(code, alpha, z):
    """Call it from Python, as the next two."""
    activations_cpu.activate(code, alpha, z)


@language.kernel
def differentiate(code, alpha, z, g):
    activations_cpu.differentiate(code, alpha, z, g)


@language.kernel
def second(code, alpha, z, out):
    activations_cpu.second(code, alpha, z, out)


CASES = [(name, None) for name in ACTIVATIONS] + [("leaky_relu", 0.0), ("leaky_relu", 0.3), ("elu", 0.0), ("elu", 2.0)]
each_activation = pytest.mark.parametrize(
    "phi", [activation_named(*case) for case in CASES], ids=["-".join(map(str, filter(None, case))) for case in CASES]
)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
ROUNDINGS = 3  # units of the last place; of the values that add up


def numbers(dtype: str) -> np.ndarray:
    """Return dense numbers around the kinks and into the tails, and what overflows or is not finite."""
    large = float(np.finfo(dtype).max)
    ends = [
        np.nan,
        np.inf,
        -np.inf,
        0,
        1e-40,
        -1e-40,
        large,
        -large,
        np.sqrt(large) * 8,
        -np.sqrt(large) * 8,
        1e19,
        -1e19,
    ]
    return np.concatenate([np.linspace(-12, 12, 24001), np.linspace(-120, 120, 2401), ends]).astype(dtype)


def assert_close(got: np.ndarray, want: np.ndarray, unit: Any) -> None:
    """Compare within roundings; what is not finite must be equal, and no infinity may come of what is finite."""
    with np.errstate(over="ignore"):
        rounded = want.astype(got.dtype)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    with np.errstate(invalid="ignore"):
        close = np.abs(got - want) <= ROUNDINGS * np.finfo(got.dtype).eps * unit
    assert (same | close).all(), (got[~(same | close)][:5], want[~(same | close)][:5])


def slope(phi: Activation, g: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return g phi'(z) by the array form."""
    return phi.backward(np, g, phi.forward(np, z.copy()) if phi.from_output else z)


@each_dtype
@each_activation
@np.errstate(all="ignore")
def test_forward(phi: Activation, dtype: str) -> None:
    z = numbers(dtype)
    got = z.copy()
    activate(phi.code, phi.alpha, got)
    assert_close(got, phi.forward(np, z.astype(np.float64)), np.maximum(1, np.abs(z)))


@each_dtype
@each_activation
@np.errstate(all="ignore")
def test_derivative(phi: Activation, dtype: str) -> None:
    z = numbers(dtype)
    g = np.linspace(-2, 3, z.size).astype(dtype)
    got = g.copy()
    differentiate(phi.code, phi.alpha, z, got)
    assert_close(got, slope(phi, g.astype(np.float64), z.astype(np.float64)), np.abs(g))
    np.testing.assert_array_equal(z, numbers(dtype))


@each_dtype
@each_activation
@np.errstate(all="ignore")
def test_second_derivative(phi: Activation, dtype: str) -> None:
    z = numbers(dtype)
    got = np.empty_like(z)
    second(phi.code, phi.alpha, z, got)
    assert_close(got, phi.second(np, z.astype(np.float64)), 1)
    np.testing.assert_array_equal(z, numbers(dtype))
    second(phi.code, phi.alpha, z, z)
    np.testing.assert_array_equal(z, got)


@each_dtype
@each_activation
def test_small_results_keep_their_digits(phi: Activation, dtype: str) -> None:
    """Left of zero the tails of gates and of the sigmoid, and small numbers, have small relative errors."""
    z = np.concatenate(
        [np.linspace(-8, -1e-3, 2001), -(10.0 ** np.arange(-30, -3)), 10.0 ** np.arange(-30, -3)]
    ).astype(dtype)
    got = z.copy()
    activate(phi.code, phi.alpha, got)
    want = phi.forward(np, z.astype(np.longdouble if phi.code < 4 else np.float64))
    # The rounded argument of a tail's exponential, up to 38 there, is multiplied.
    np.testing.assert_allclose(got, want.astype(np.float64), rtol=48 * np.finfo(dtype).eps)


@each_activation
def test_the_last_of_a_line_are_computed_as_the_first(phi: Activation, rng: np.random.Generator) -> None:
    """Numbers behind the last vector of a line have the bits that they have within one."""
    z = rng.standard_normal(67).astype(np.float32)
    for function in (differentiate, second):
        whole = np.ones_like(z)
        function(phi.code, phi.alpha, z, whole)
        for first, count in ((5, 1), (30, 13), (64, 3)):
            some = np.ones(count, np.float32)
            function(phi.code, phi.alpha, z[first : first + count].copy(), some)
            np.testing.assert_array_equal(some, whole[first : first + count])


@needs_avx2
@pytest.mark.parametrize("function", ["activate", "differentiate", "second"])
def test_every_loop_of_float32_is_vectorised(function: str) -> None:
    kernel = numba.njit(**language._OPTIONS)(getattr(activations_cpu, function).py_func)
    line = np.ones(64, np.float32)
    kernel(0, 0.0, *[line.copy() for _ in range(1 if function == "activate" else 2)])
    text = kernel.inspect_asm(kernel.signatures[0])
    # Each of sigmoid, tanh, silu, gelu_tanh and gelu divides; gelu's second derivative does not.
    assert len(re.findall(r"vdivps\s.*%[yz]mm", text)) >= (4 if function == "second" else 5)
    assert not LIBM.search(text)
    assert "maskmov" not in text, "a masked store, which is slow on AMD's processors"
