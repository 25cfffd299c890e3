"""Vectors of the CPU kernels: 32 bytes of neighbours in a register, for loops that the compiler would not vectorise.

A loop over rows that keeps a few columns in registers, as sums of columns and products of matrices do, is written with
them. LLVM cuts them in two where registers are narrower. Sums are vectors of float64, with as many lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array

BYTES = 32
FLAGS = ("contract", "nsz")  # as in language.py
_INT = ir.IntType(32)


class Vector(types.Type):
    """Type of `lanes` numbers in registers."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector_of(manager.lookup(vector.dtype).get_value_type(), vector.lanes))


def vector_of(kind: ir.Type, lanes: int) -> ir.VectorType:
    """Return LLVM's type of a vector."""
    return ir.VectorType(kind, lanes)


def lanes_of(dtype: types.Type) -> int:
    """Return the number of lanes of a vector of this type."""
    return BYTES * 8 // dtype.bitwidth


def constant(lanes: list[int]) -> ir.Constant:
    """Return the numbers of lanes of a shuffle."""
    return ir.Constant(vector_of(_INT, len(lanes)), lanes)


def spread(builder: Any, number: Any, lanes: int) -> Any:
    """Return a vector of equal numbers."""
    one = builder.insert_element(ir.Constant(vector_of(number.type, lanes), ir.Undefined), number, _INT(0))
    return builder.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), constant([0] * lanes))


def first_lanes(builder: Any, count: Any, lanes: int) -> Any:
    """Return the mask of the first `count` lanes."""
    count = builder.trunc(count, _INT) if count.type.width > 32 else count
    return builder.icmp_signed("<", constant(list(range(lanes))), spread(builder, count, lanes))


def at(builder: Any, data: Any, offset: Any, kind: ir.Type) -> Any:
    """Return the pointer to the vector that begins `offset` numbers behind a pointer."""
    return builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())


def read(builder: Any, data: Any, offset: Any, lanes: int, mask: Any = None) -> Any:
    """Return the vector at an offset, of aligned numbers; 0 and unread where the mask is false."""
    element = data.type.pointee
    kind = vector_of(element, lanes)
    size = {"float": 4, "double": 8}[str(element)]
    if mask is None:
        return builder.load(at(builder, data, offset, kind), align=size)
    name = f"llvm.masked.load.v{lanes}f{8 * size}.p0"
    types_ = [kind.as_pointer(), _INT, mask.type, kind]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, types_), name)
    return builder.call(function, [at(builder, data, offset, kind), _INT(size), mask, ir.Constant(kind, None)])


def write(builder: Any, data: Any, offset: Any, vector: Any, mask: Any = None) -> None:
    """Write a vector at an offset, where the mask is true."""
    size = {"float": 4, "double": 8}[str(data.type.pointee)]
    pointer = at(builder, data, offset, vector.type)
    if mask is None:
        builder.store(vector, pointer, align=size)
        return
    name = f"llvm.masked.store.v{vector.type.count}f{8 * size}.p0"
    types_ = [vector.type, pointer.type, _INT, mask.type]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), types_), name)
    builder.call(function, [vector, pointer, _INT(size), mask])


def pointer_of(context: Any, builder: Any, array_type: types.Array, array: Any) -> Any:
    """Return the pointer to an array's first number."""
    return make_array(array_type)(context, builder, array).data


@intrinsic
def load(typing_context: Any, array: Any, offset: Any) -> Any:
    """Return the vector at an offset of a contiguous array."""
    vector = Vector(array.dtype, lanes_of(array.dtype))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return read(builder, pointer_of(context, builder, array, arguments[0]), arguments[1], vector.lanes)

    return vector(array, types.intp), generate


@intrinsic
def load_sum(typing_context: Any, sums: Any, offset: Any, like: Any) -> Any:
    """Return the vector of float64 at an offset, with the lanes of another vector."""
    vector = Vector(types.float64, like.lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return read(builder, pointer_of(context, builder, sums, arguments[0]), arguments[1], vector.lanes)

    return vector(sums, types.intp, like), generate


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write a vector at an offset of a contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(builder, pointer_of(context, builder, array, arguments[0]), arguments[1], arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(typing_context: Any, number: Any) -> Any:
    """Return a vector of equal numbers."""
    vector = Vector(number, lanes_of(number))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread(builder, arguments[0], vector.lanes)

    return vector(number), generate


@intrinsic
def splat_wide(typing_context: Any, number: Any, like: Any) -> Any:
    """Return a vector of equal float64 with the lanes of another vector."""
    vector = Vector(types.float64, like.lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread(builder, arguments[0], vector.lanes)

    return vector(types.float64, like), generate


@intrinsic
def narrow(typing_context: Any, wide: Any, like: Any) -> Any:
    """Return a vector of float64 in the type of another vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found, like_ = arguments
        return found if like.dtype == types.float64 else builder.fptrunc(found, like_.type)

    return like(wide, like), generate


@intrinsic
def where_at_most(typing_context: Any, left: Any, right: Any, one: Any, other: Any) -> Any:
    """Return `one` in the lanes where left <= right, and `other` where it is not, or one of both is NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, one, other = arguments
        return builder.select(builder.fcmp_ordered("<=", left, right), one, other)

    return one(left, right, one, other), generate


@intrinsic
def rectified(typing_context: Any, y: Any, slope: Any, vector: Any) -> Any:
    """Return a vector where y is above 0 or NaN, elsewhere `slope` times it, and 0 where both are 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        y, slope, vector = arguments
        zero = ir.Constant(y.type, None)
        below = builder.select(  # not slope times infinity
            builder.fcmp_ordered("==", slope, zero), zero, builder.fmul(slope, vector, flags=FLAGS)
        )
        return builder.select(builder.fcmp_ordered("<=", y, zero), below, vector)

    return vector(y, slope, vector), generate


def _elementwise(of_values: Callable[..., Any]) -> Any:
    """Return the intrinsic that computes with vectors of one type; operators of Numba's compile much longer."""
    count = of_values.__code__.co_argcount - 1

    def typed(*vectors: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return of_values(builder, *arguments)

        return vectors[0](*vectors), generate

    if count == 2:

        @intrinsic
        def of_two(typing_context: Any, a: Any, b: Any) -> Any:
            return typed(a, b)

        return of_two

    @intrinsic
    def of_three(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
        return typed(a, b, c)

    return of_three


def _product_and_sum(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=FLAGS), c, flags=FLAGS)


add = _elementwise(lambda builder, a, b: builder.fadd(a, b, flags=FLAGS))
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b, flags=FLAGS))
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b, flags=FLAGS))
multiply_add = _elementwise(_product_and_sum)
# (a - b) - c
distance = _elementwise(lambda builder, a, b, c: builder.fsub(builder.fsub(a, b, flags=FLAGS), c, flags=FLAGS))


def _wide(builder: Any, vector: Any) -> Any:
    """Return a vector in float64."""
    kind = vector_of(ir.DoubleType(), vector.type.count)
    return vector if vector.type == kind else builder.fpext(vector, kind)


@intrinsic
def widen(typing_context: Any, vector: Any) -> Any:
    """Return a vector in float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _wide(builder, *arguments)

    return Vector(types.float64, vector.lanes)(vector), generate


@intrinsic
def add_wide(typing_context: Any, wide: Any, vector: Any) -> Any:
    """Return a sum in float64 with a vector added."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(arguments[0], _wide(builder, arguments[1]), flags=FLAGS)

    return wide(wide, vector), generate


@intrinsic
def add_product(typing_context: Any, wide: Any, a: Any, b: Any) -> Any:
    """Return a sum in float64 with the product of two vectors added."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, a, b = arguments
        return _product_and_sum(builder, _wide(builder, a), _wide(builder, b), wide)

    return wide(wide, a, b), generate


@intrinsic
def first(typing_context: Any, vector: Any, count: Any, other: Any) -> Any:
    """Return the first `count` lanes of a vector, and a number in the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector_, count, other = arguments
        mask = first_lanes(builder, count, vector.lanes)
        return builder.select(mask, vector_, spread(builder, other, vector.lanes))

    return vector(vector, types.intp, vector.dtype), generate


def _folded(of_two: Callable[[Any, Any, Any], Any]) -> Any:
    """Return the intrinsic that folds the lanes of a vector by halves, always in the same order."""

    @intrinsic
    def fold(typing_context: Any, vector: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (found,) = arguments
            while (half := found.type.count // 2) > 0:
                parts = [
                    builder.shuffle_vector(found, found, constant(list(range(start, start + half))))
                    for start in (0, half)
                ]
                found = of_two(builder, *parts)
            return builder.extract_element(found, _INT(0))

        return vector.dtype(vector), generate

    return fold


total = _folded(lambda builder, left, right: builder.fadd(left, right, flags=FLAGS))
largest = _folded(lambda builder, left, right: builder.select(builder.fcmp_ordered(">", left, right), left, right))
