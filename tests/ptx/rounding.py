"""Arithmetic of float32 as the GPU rounds it: one rounding for a product and a sum, and numbers flushed to zero."""

from __future__ import annotations

import numpy as np

TINY = np.float32(2.0**-126)  # the smallest normal number
_LEFT_OVER = np.uint64(0x1FFFFFFF)  # the bits that a float64 has and a float32 has not
_HALFWAY = np.uint64(0x10000000)
_ONE = np.uint64(1)


def flushed(a: np.ndarray) -> np.ndarray:
    """Return `a` with zeros, of the same sign, for the subnormal numbers."""
    small = np.abs(a) < TINY
    return np.where(small, np.copysign(np.float32(0), a), a) if small.any() else a


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, downwards: bool = False) -> np.ndarray:
    """Return a b + c of float32, rounded once: to nearest, or `downwards`.

    A product of two float32 numbers is exact in float64, and the sum of that and `c` is off by an error that is known
    exactly (Knuth's two-sum; nothing over- or underflows, since the exponents of float64 reach far enough). Rounding
    the rounded sum to float32 would round twice. So, where that could matter, the sum is first rounded to odd: of the
    two float64 numbers around the exact one it is that whose last bit is 1. It lies on the same side of every float32
    number, and of every number halfway between two of them, as the exact one, hence rounds to the same float32 (Boldo
    and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Transactions on Computers 57, 2008).
    """
    product = a.astype(np.float64) * b
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    near_halfway = (total.view(np.uint64) & _LEFT_OVER) == _HALFWAY
    # Below 2^-125 a float32 has fewer bits, so the halfway points are others.
    if downwards or near_halfway.any() or (np.abs(total) < 2 * TINY).any():
        total = _rounded_to_odd(total, product, addend)
    nearest = total.astype(np.float32)
    if downwards:
        above = nearest.astype(np.float64) > total
        nearest = np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)
        # x - x is -0 in this direction; a sum of two +0 is +0.
        both_plus = ~np.signbit(product) & ~np.signbit(addend)
        nearest = np.where((total == 0) & ~both_plus, np.float32(-0.0), nearest)
    return nearest


def _rounded_to_odd(total: np.ndarray, product: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """Return the sum of `product` and `addend`, whose nearest float64 is `total`, rounded to odd."""
    of_addend = total - product
    error = (product - (total - of_addend)) + (addend - of_addend)
    bits = total.view(np.uint64)
    # NaN and infinity have errors of NaN, which are neither above nor below 0.
    inexact = (error > 0) | (error < 0)
    outwards = np.signbit(error) == np.signbit(total)
    neighbour = np.where(outwards, bits + _ONE, bits - _ONE)
    return np.where(inexact & (bits & _ONE == 0), neighbour, bits).view(np.float64)
