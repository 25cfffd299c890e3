"""Sums of a line of numbers for the CPU kernels, in float64 and in one order on every machine.

A sum in a loop is one chain of additions, which the compiler may not reorder. Here the lanes are written out: 32
numbers at a time, each of which is added to a sum of its own; these are then added by halves.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from bnkernels.runtime.cpu.language import device

WIDE, NARROW = 32, 8  # lanes: of whole lines, and of what is left of them
DOUBLE, INDEX = ir.DoubleType(), ir.IntType(64)


def _halves(builder: ir.IRBuilder, lanes: Any, width: int) -> Any:
    """Return as many lanes as `width`: the upper half is added to the lower one until so many are left."""
    while lanes.type.count > width:
        half = lanes.type.count // 2
        low, high = (
            builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(ir.IntType(32), half), list(places)))
            for places in (range(half), range(half, 2 * half))
        )
        lanes = builder.fadd(low, high)
    return lanes


def _sum_of_products(context: Any, builder: ir.IRBuilder, lines: list[Any], number: Any, count: Any) -> Any:
    """Return the sum of the products of the numbers of one or two lines."""

    def products(index: Any, width: int) -> Any:
        """Return the next products, of `width` places."""
        vector, wide = ir.VectorType(number, width), ir.VectorType(DOUBLE, width)
        factors = []
        for line in lines:
            place = builder.bitcast(builder.gep(line, [index]), vector.as_pointer())
            loaded = builder.load(place, align=context.get_abi_sizeof(number))
            factors.append(loaded if number == DOUBLE else builder.fpext(loaded, wide))
        return factors[0] if len(lines) == 1 else builder.fmul(*factors, flags=("contract",))

    start = INDEX(0)
    lanes = None
    for width in (WIDE, NARROW, 1):
        total = cgutils.alloca_once(builder, ir.VectorType(DOUBLE, width))
        vector = ir.VectorType(DOUBLE, width)
        builder.store(ir.Constant(vector, [0.0] * width) if lanes is None else _halves(builder, lanes, width), total)
        end = builder.sub(count, builder.urem(count, INDEX(width)))
        with cgutils.for_range_slice(builder, start, end, INDEX(width), INDEX) as (index, _):
            builder.store(builder.fadd(builder.load(total), products(index, width), flags=("contract",)), total)
        lanes, start = builder.load(total), end
    return builder.extract_element(lanes, ir.IntType(32)(0))


def _data(context: Any, builder: ir.IRBuilder, array_type: types.Array, array: Any) -> Any:
    return make_array(array_type)(context, builder, array)


@intrinsic
def total(typing_context: Any, line: Any) -> Any:
    """Return the float64 sum of a line."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = _data(context, builder, line, arguments[0])
        number = context.get_data_type(line.dtype)
        return _sum_of_products(context, builder, [array.data], number, array.nitems)

    return types.float64(line), generate


@intrinsic
def dot(typing_context: Any, line: Any, other: Any) -> Any:
    """Return the float64 sum of the products of two lines of one length; float32 is multiplied exactly."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [_data(context, builder, kind, one) for kind, one in zip((line, other), arguments, strict=True)]
        number = context.get_data_type(line.dtype)
        lines = [array.data for array in arrays]
        return _sum_of_products(context, builder, lines, number, arrays[0].nitems)

    return types.float64(line, other), generate


@device
def add(pair, number):
    """Return a pair `(high, low)` with a number added to it, whose rounding error goes to `low`."""
    high, low = pair
    total = high + number
    added = total - high
    return total, low + ((high - (total - added)) + (number - added))
