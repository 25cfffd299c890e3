"""The arithmetic of the machine that runs PTX: integers that wrap around, and floats that are rounded exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.rounding import fma
from tests.ptx.tiny import compute, floats, ints

# ---- integers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("add.s32 %out, %a, %b;", ints(2**31 - 1 + 5, -7 + 2, 10 + 3, -(2**31) + 33)),
        ("sub.u32 %out, %b, %a;", ints(5 - (2**31 - 1), 9, -7, 33 + 2**31)),
        ("mul.lo.s32 %out, %a, %a;", ints(1, 49, 100, 0)),
        ("mad.lo.s32 %out, %a, %b, 1;", ints(5 * (2**31 - 1) + 1, -13, 31, -(2**31) * 33 + 1)),
        ("mul.hi.u32 %out, %a, 16;", ints(7, 15, 0, 8)),
        ("div.s32 %out, %a, %b;", ints((2**31 - 1) // 5, -3, 3, -65075262)),
        ("rem.s32 %out, %a, %b;", ints((2**31 - 1) % 5, -1, 1, -(2**31) + 65075262 * 33)),
        ("div.u32 %out, %a, 2;", ints(2**30 - 1, 2**31 - 4, 5, 2**30)),
        ("shl.b32 %out, %a, %b;", ints(0xFFFFFFE0, -28, 80, 0)),
        ("shr.s32 %out, %a, %b;", ints(2**26 - 1, -2, 1, -1)),
        ("popc.b32 %out, %a;", ints(31, 30, 2, 1)),
        ("shr.u32 %out, %a, %b;", ints(2**26 - 1, (2**32 - 7) >> 2, 1, 0)),
        ("min.s32 %out, %a, %b;", ints(5, -7, 3, -(2**31))),
        ("max.u32 %out, %a, %b;", ints(2**31 - 1, -7, 10, 2**31)),
        ("not.b32 %out, %a;", ints(-(2**31), 6, -11, 2**31 - 1)),
        ("setp.lt.s32 %p1, %a, 0; selp.b32 %out, -1, %b, %p1;", ints(5, -1, 3, -1)),
        ("setp.ge.u32 %p1, %a, %b; not.pred %p2, %p1; selp.u32 %out, 1, 0, %p2;", ints(0, 0, 0, 0)),
        ("cvt.u32.u64 %out, 0x100000005;", ints(5, 5, 5, 5)),
        ("{ .reg .b32 %a; mov.u32 %a, 4; { .reg .b32 %a; mov.u32 %a, 9; } mov.u32 %out, %a; }", ints(4, 4, 4, 4)),
        ("st.shared.u32 [fixed], -2; ld.shared.u8 %rs1, [fixed]; cvt.u32.u16 %out, %rs1;", ints(254, 254, 254, 254)),
        ("mov.b64 %rd1, {%a, %b}; shr.u64 %rd1, %rd1, 32; mov.b64 {%out, _}, %rd1;", ints(5, 2, 3, 33)),
    ],
)
def test_integers_wrap_around(body: str, wanted: np.ndarray) -> None:
    found, _ = compute(body, ints(2**31 - 1, -7, 10, 2**31), ints(5, 2, 3, 33))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("cvt.s64.s32 %wide, %a;", [-7, 2**31 - 1]),
        ("cvt.u64.u32 %wide, %a;", [2**32 - 7, 2**31 - 1]),
        ("mul.wide.s32 %wide, %a, %a;", [49, (2**31 - 1) ** 2]),
        ("ld.param.u64 %rd1, [p+8]; ld.global.s32 %wide, [%rd1];", [-7, -7]),
        ("cvta.shared.u64 %rd1, 12; cvta.to.shared.u64 %wide, %rd1;", [12, 12]),
    ],
)
def test_wider_integers_keep_value_or_bits(body: str, wanted: list[int]) -> None:
    assert compute(body, ints(-7, 2**31 - 1), out="i8")[0].tolist() == wanted


# ---- floats ---------------------------------------------------------------------------------------------------------

HALVES = floats(2.5, -2.5, 1.7, -1.7, np.nan, 3e9, -3e9, 0.5)


@pytest.mark.parametrize(
    ("opcode", "wanted"),
    [
        ("cvt.rni.s32.f32", [2, -2, 2, -2, 0, 2**31 - 1, -(2**31), 0]),
        ("cvt.rzi.s32.f32", [2, -2, 1, -1, 0, 2**31 - 1, -(2**31), 0]),
        ("cvt.rmi.s32.f32", [2, -3, 1, -2, 0, 2**31 - 1, -(2**31), 0]),
        ("cvt.rpi.s32.f32", [3, -2, 2, -1, 0, 2**31 - 1, -(2**31), 1]),
        ("cvt.rzi.ftz.u32.f32", [2, 0, 1, 0, 0, 3_000_000_000, 0, 0]),
    ],
)
def test_floats_become_integers_as_they_are_told(opcode: str, wanted: list[int]) -> None:
    np.testing.assert_array_equal(compute(f"{opcode} %out, %a;", HALVES)[0], ints(*wanted))


def test_conversions_to_float() -> None:
    found, _ = compute("cvt.rn.f32.s32 %out, %a;", ints(2**24 + 1, 2**24 + 3, -(2**31), 7), out="f4")
    np.testing.assert_array_equal(found, floats(2**24, 2**24 + 4, -(2**31), 7))
    found, _ = compute("cvt.rzi.f32.f32 %out, %a;", HALVES, out="f4")
    np.testing.assert_array_equal(found, np.trunc(HALVES))
    found, _ = compute("cvt.ftz.sat.f32.f32 %out, %a;", HALVES, out="f4")
    np.testing.assert_array_equal(found, floats(1, 0, 1, 0, 0, 1, 0, 0.5))


def test_comparisons_with_nan() -> None:
    a, b = floats(1, np.nan, 2, 2), floats(2, 2, np.nan, 2)
    for test, wanted in {"lt": [1, 0, 0, 0], "ltu": [1, 1, 1, 0], "ne": [1, 0, 0, 0], "neu": [1, 1, 1, 0]}.items():
        body = f"setp.{test}.ftz.f32 %p1, %a, %b; selp.u32 %out, 1, 0, %p1;"
        assert compute(body, a, b)[0].tolist() == wanted, test
    assert compute("setp.num.f32 %p1, %a, %b; selp.u32 %out, 1, 0, %p1;", a, b)[0].tolist() == [1, 0, 0, 1]


def test_subnormal_numbers_are_zero_where_the_instruction_says_so() -> None:
    a, b = floats(1e-40, -1e-40, 2e-38, 1, 1e-40), floats(1, 1, 0.5, 1e-40, 1e10)
    found, _ = compute("mul.rn.ftz.f32 %out, %a, %b;", a, b, out="f4")
    assert found.tolist() == [0] * 5
    assert np.signbit(found).tolist() == [False, True, False, False, False]
    np.testing.assert_array_equal(compute("mul.rn.f32 %out, %a, %b;", a, b, out="f4")[0], a * b)
    assert compute("setp.eq.ftz.f32 %p1, %a, 0f00000000; selp.u32 %out, 1, 0, %p1;", a)[0].tolist() == [1, 1, 0, 0, 1]


def test_elementary_functions() -> None:
    a = floats(0.25, 2, 9, 3)
    for opcode, wanted in {
        "sqrt.rn.f32": np.sqrt(a),
        "rcp.rn.ftz.f32": 1 / a,
        "ex2.approx.ftz.f32": np.exp2(a.astype("f8")),
        "neg.ftz.f32": -a,
        "abs.f32": a,
    }.items():
        np.testing.assert_array_equal(compute(f"{opcode} %out, %a;", a, out="f4")[0], wanted.astype("f4"), opcode)
    found, _ = compute("copysign.f32 %out, %a, %b;", floats(-0.0, 3), floats(5, -6), out="f4")
    assert found.tolist() == [-5, 6]


def rounded(exact: Fraction, downwards: bool) -> np.float32:
    """Return the float32 that is nearest to a number, to the even one of two; or the next below."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    if downwards:
        return max(one for one in near if Fraction(float(one)) <= exact)
    return min(near, key=lambda one: (abs(Fraction(float(one)) - exact), one.view(np.uint32) & 1))


@pytest.mark.parametrize("downwards", [False, True])
def test_fma_rounds_once(rng: np.random.Generator, downwards: bool) -> None:
    a, b = (rng.standard_normal(500).astype(np.float32) for _ in range(2))
    c = (rng.standard_normal(500) * 2.0 ** rng.integers(-30, 30, 500)).astype(np.float32)
    # A product of 2^36 + 1, scaled, beside a number so large that float64 loses the 1: what is left is halfway between
    # two float32, above and below 1 and among those of fewer bits. And sums whose small part is lost altogether.
    odd, rest = 2.0**12 + 1, 2.0**24 - 2.0**12 + 1
    a = np.append(a, floats(odd, -odd, odd * 2.0**-60, 2.0**-30, -(2.0**-30), 2.0**-70))
    b = np.append(b, floats(rest * 2.0**-60, rest * 2.0**-60, rest * 2.0**-126, 2.0**-30, 2.0**-30, 2.0**-79))
    c = np.append(c, floats(1, 1 + 2.0**-22, 2.0**-127, -1, 1, 2.0**-126))
    found = fma(a, b, c, downwards)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        alone = fma(floats(x), floats(y), floats(z), downwards)  # nobody else there to be careful for
        assert got == alone == rounded(exact, downwards), (x, y, z)
    with np.errstate(invalid="ignore"):
        assert np.isnan(fma(floats(np.inf), floats(0), floats(1))).all()
    assert fma(floats(3e38), floats(10), floats(-np.inf)) == -np.inf
