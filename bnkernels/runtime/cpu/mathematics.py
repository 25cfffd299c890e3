"""Elementary functions for the CPU kernels: of float32 without branches, so that loops vectorise; of float64 by libm.

Loops that call libm are not vectorised, and take 5 ns a number. The functions here take 0.3 to 1 ns in float32. exp and
log are right to 1 last place, the others to 1.5 to 5 (``tests/runtime/test_mathematics.py`` has the bounds), also for
subnormal numbers, infinity and NaN. The coefficients are minimax fits of the relative error (Remez's exchange algorithm
in 40 digits), rounded to float32 one after the other, the rest fitted again each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, overload

from bnkernels.runtime.cpu.language import as_bits, as_float, cast, device

_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_INFINITY, _NAN = np.float32(np.inf), np.float32(np.nan)
_LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two parts; the first has 9 bits, so that its product with an exponent is exact even without fma.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
# A number t + _SHIFT has the nearest integer k of t in its last bits, as k + 254: twice the bias of an exponent.
_SHIFT = np.float32(1.5 * 2**23 + 254)
_TINY, _UP = np.float32(2.0**-126), np.float32(2.0**23)
_SQRT_HALF, _EXPONENT_OF_ONE = 0x3F3504F3, 0x3F800000  # bits of sqrt(1/2) and of 1


@intrinsic
def select(typing_context: Any, condition: Any, this: Any, other: Any) -> Any:
    """Return one of two numbers of the same type, both of which are computed: a loop with a branch stays scalar."""
    if this != other:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return this(types.boolean, this, this), generate


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, a, a), generate


def _of_two(builder: Any, name: str, a: Any, b: Any, **options: Any) -> Any:
    """Call an intrinsic of LLVM on two values of the same type."""
    of_two = ir.FunctionType(a.type, [a.type, a.type])
    return builder.call(builder.module.declare_intrinsic(name, [a.type], of_two), [a, b], **options)


# LLVM turns `x[i] = select(condition, other, x[i])` into a masked store, which takes AMD's processors ten times as long
# as a store. `maximum` and `keep_where` write the same numbers as values that are computed.


@intrinsic
def maximum(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the larger number; NaN if one is NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if binding.llvm_version_info >= (18,):
            return _of_two(builder, "llvm.maximum", *arguments, fastmath=("nsz",))
        # Older versions cannot compile it for x86, but make no masked stores either.
        this, other = arguments
        larger = builder.select(builder.fcmp_unordered(">", this, other), this, other)
        return builder.select(builder.fcmp_unordered("uno", other, other), other, larger)

    return a(a, a), generate


@intrinsic
def keep_where(typing_context: Any, condition: Any, number: Any) -> Any:
    """Return the number where the condition holds, else 0, also of infinity and NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        holds, x = arguments
        bits = ir.IntType(number.bitwidth)
        mask = builder.select(holds, ir.Constant(bits, -1), ir.Constant(bits, 0))
        # The smaller of bits and mask is their conjunction, which LLVM would make a masked store.
        kept = _of_two(builder, "llvm.umin", builder.bitcast(x, bits), mask)
        return builder.bitcast(kept, x.type)

    return number(types.boolean, number), generate


def _by_type(single: Callable, double: Callable) -> Callable:
    """Return the function that is `single` of float32 and `double` of float64 numbers, in kernels only."""

    def function(x: Any) -> Any:
        raise TypeError("only kernels can call it")

    @overload(function, jit_options={"forceinline": True})
    def choose(x):
        chosen = {types.float32: single, types.float64: double}.get(x)
        return None if chosen is None else lambda x: chosen(x)

    return function


@device
def _reduced(x):
    """Return a number with k in its last bits, and exp(r) - 1, where x = k ln 2 + r and abs(r) <= ln 2 / 2."""
    shifted = x * _LOG2_E + _SHIFT
    k = shifted - _SHIFT
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    # (exp(r) - 1 - r) / r^2, such that exp(r) - 1 has an error of 5e-10
    p = np.float32(0.00019741859)
    p = p * r + np.float32(0.0013933728)
    p = p * r + np.float32(0.008333568)
    p = p * r + np.float32(0.041666478)
    p = p * r + np.float32(0.16666666)
    p = p * r + np.float32(0.5)
    return shifted, p * (r * r) + r


@device
def _exp32(x):
    x = select(x > np.float32(89), np.float32(89), x)  # beyond, infinity and 0; NaN stays
    x = select(x < np.float32(-104), np.float32(-104), x)
    shifted, power = _reduced(x)
    bits = as_bits(shifted)
    half = bits >> np.uint32(1)
    # 2^k in two factors: k reaches from -150 to 128. The second product is the one that rounds subnormal results.
    first = as_float(np.uint32(half << np.uint32(23)))
    second = as_float(np.uint32((bits - half) << np.uint32(23)))
    return (power + _ONE) * first * second


@device
def _expm1_32(x):
    x = select(x > np.float32(89), np.float32(89), x)
    x = select(x < np.float32(-20), np.float32(-20), x)  # below, -1
    shifted, power = _reduced(x)
    half = as_float(np.uint32((as_bits(shifted) - np.uint32(128)) << np.uint32(23)))  # 2^k / 2; 2^128 is none
    return (power * half + (half - _HALF)) * _TWO


@device
def _log32(x):
    small = x < _TINY
    normal = select(small, x * _UP, x)
    # The exponent e of x = m 2^e with m between sqrt(1/2) and sqrt(2), biased by 127
    above = np.uint32(as_bits(normal) + np.uint32(_EXPONENT_OF_ONE - _SQRT_HALF))
    biased = np.float32(np.int32(above >> np.uint32(23)))
    e = biased - select(small, np.float32(150), np.float32(127))
    f = as_float(np.uint32((above & np.uint32(0x7FFFFF)) + np.uint32(_SQRT_HALF))) - _ONE
    # (log(1 + f) - f + f^2 / 2) / f^3, such that the logarithm has an error of 7e-9
    p = np.float32(-0.07546305)
    p = p * f + np.float32(0.1272441)
    p = p * f + np.float32(-0.13174821)
    p = p * f + np.float32(0.14207241)
    p = p * f + np.float32(-0.16622466)
    p = p * f + np.float32(0.20001034)
    p = p * f + np.float32(-0.25000843)
    p = p * f + np.float32(0.3333333)
    square = f * f
    y = p * (f * square) + e * _LN2_LOW
    y = (y - _HALF * square) + f + e * _LN2_HIGH
    defined = select(x < _INFINITY, y, _INFINITY)
    return select(x > np.float32(0), defined, select(x == np.float32(0), -_INFINITY, _NAN))


@device
def _tanh32(x):
    e = expm1(_TWO * abs(x))
    small = e < _TWO
    # e / (e + 2), or 1 - 2 / (e + 2): a rounded sum is then divided into something small
    h = select(small, np.float32(0), _ONE) + select(small, e, -_TWO) / (e + _TWO)
    return select(x < np.float32(0), -h, h)


@device
def _normal32(z):
    x = abs(z)
    x = select(x > np.float32(15), np.float32(15), x)  # beyond, both are 0
    square = x * x
    # The rounding of the square alone would cost the power up to 50 last places.
    low = fma(x, x, -square)
    power = _exp32(np.float32(-0.5) * square)
    power -= power * (_HALF * low)
    q = _ONE / (x + np.float32(4))
    t = (x + x) * q - _ONE  # (x - 4) / (x + 4), without its rounding for small x
    # (x + 4) exp(x^2 / 2) (distribution of -x), for x from 0 to 15; an error of 9e-9
    p = np.float32(-0.00013419644)
    p = p * t + np.float32(0.00017465945)
    p = p * t + np.float32(0.0015684085)
    p = p * t + np.float32(-0.0035102114)
    p = p * t + np.float32(-0.0075240047)
    p = p * t + np.float32(0.06040349)
    p = p * t + np.float32(-0.18652366)
    p = p * t + np.float32(0.3871369)
    p = p * t + np.float32(-0.60789657)
    p = p * t + np.float32(0.75528514)
    tail = power * (p * q)
    return select(z < np.float32(0), tail, _ONE - tail), power * np.float32(1 / math.sqrt(2 * math.pi))


@device
def _exp64(x):
    return np.exp(x)


@device
def _expm1_64(x):
    return np.expm1(x)


@device
def _log64(x):
    return np.log(x)


@device
def _tanh64(x):
    return np.tanh(x)


@device
def _normal64(z):
    return math.erfc(z * -math.sqrt(0.5)) / 2, np.exp(z * z / -2) * (1 / math.sqrt(2 * math.pi))


exp = _by_type(_exp32, _exp64)
expm1 = _by_type(_expm1_32, _expm1_64)
log = _by_type(_log32, _log64)
tanh = _by_type(_tanh32, _tanh64)
normal = _by_type(_normal32, _normal64)  # the normal distribution and its density


@device
def sigmoid(z):
    """Return sigmoid(z) and its derivative, of which neither loses digits where the sigmoid is nearly 0 or 1."""
    one = cast(1.0, z)
    decay = exp(-abs(z))  # never overflows
    above = one / (one + decay)
    return select(z < cast(0.0, z), decay, one) / (one + decay), decay * above * above
