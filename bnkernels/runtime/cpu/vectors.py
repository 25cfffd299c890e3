"""Vectors of the CPU kernels: eight neighbours in registers, for loops that the compiler would not vectorise.

It may not reorder the chain of additions that a sum in a loop is, and does not keep a few columns of many rows in
registers. So the lanes are written out, and the order of the additions is the same on every machine; LLVM cuts a vector
into as many registers as it takes. ``+``, ``-`` and ``*`` compute with vectors, or with a vector and a number of its
type; float32 with float64 gives float64. Contraction to fused multiply-adds is allowed, as in all kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numba.np.arrayobj import make_array

WIDTH = 8
FLAGS = ("contract", "nsz")  # as in language.py
_INT = ir.IntType(32)


class Vector(types.Type):
    """Type of eight numbers in registers."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(manager[vector.dtype].get_value_type(), WIDTH))


def constant(lanes: list[int]) -> ir.Constant:
    """Return the numbers of lanes of a shuffle."""
    return ir.Constant(ir.VectorType(_INT, len(lanes)), lanes)


def spread(builder: Any, number: Any, lanes: int = WIDTH) -> Any:
    """Return a vector of equal numbers."""
    undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, number, _INT(0)), undefined, constant([0] * lanes))


def first_lanes(builder: Any, count: Any, lanes: int = WIDTH) -> Any:
    """Return the mask of the first `count` lanes."""
    return builder.icmp_signed("<", constant(list(range(lanes))), spread(builder, builder.trunc(count, _INT), lanes))


def pointer_of(context: Any, builder: Any, array_type: types.Array, array: Any) -> Any:
    """Return the pointer to an array's first number."""
    return make_array(array_type)(context, builder, array).data


def _at(builder: Any, data: Any, offset: Any, kind: ir.Type) -> tuple[Any, int]:
    """Return the pointer to the vector that begins `offset` numbers behind a pointer, and its alignment."""
    size = {"float": 4, "double": 8}[str(kind.element)]
    return builder.bitcast(builder.gep(data, [offset]), kind.as_pointer()), size


def read(builder: Any, data: Any, offset: Any, lanes: int = WIDTH, mask: Any = None) -> Any:
    """Return the vector at an offset, of aligned numbers; 0 and unread where the mask is false."""
    kind = ir.VectorType(data.type.pointee, lanes)
    pointer, size = _at(builder, data, offset, kind)
    if mask is None:
        return builder.load(pointer, align=size)
    of = ir.FunctionType(kind, [pointer.type, _INT, mask.type, kind])
    function = cgutils.get_or_insert_function(builder.module, of, f"llvm.masked.load.v{lanes}f{8 * size}.p0")
    return builder.call(function, [pointer, _INT(size), mask, ir.Constant(kind, None)])


def write(builder: Any, data: Any, offset: Any, vector: Any, mask: Any = None) -> None:
    """Write a vector at an offset, where the mask is true."""
    pointer, size = _at(builder, data, offset, vector.type)
    if mask is None:
        builder.store(vector, pointer, align=size)
        return
    of = ir.FunctionType(ir.VoidType(), [vector.type, pointer.type, _INT, mask.type])
    name = f"llvm.masked.store.v{vector.type.count}f{8 * size}.p0"
    builder.call(cgutils.get_or_insert_function(builder.module, of, name), [vector, pointer, _INT(size), mask])


@intrinsic
def get(typing_context: Any, array: Any, offset: Any) -> Any:
    """Return the vector at an offset of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return read(builder, pointer_of(context, builder, array, arguments[0]), arguments[1])

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def get_first(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """Return the vector at an offset of an array, of which only the first `count` numbers are read; others are 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, mask = pointer_of(context, builder, array, arguments[0]), first_lanes(builder, arguments[2])
        return read(builder, data, arguments[1], mask=mask)

    return Vector(array.dtype)(array, types.intp, types.intp), generate


@intrinsic
def put(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write a vector at an offset of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(builder, pointer_of(context, builder, array, arguments[0]), arguments[1], arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Fetch what lies at an offset of an array into the cache; it may lie behind its end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        of = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0")
        data = builder.gep(pointer_of(context, builder, array, arguments[0]), [arguments[1]])
        builder.call(function, [builder.bitcast(data, byte), _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def splat(typing_context: Any, number: Any) -> Any:
    """Return a vector of equal numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread(builder, *arguments)

    return Vector(number)(number), generate


def _in_type_of(builder: Any, vector: Any, kind: ir.Type) -> Any:
    """Return a vector in the type of another, of 32 or of 64 bits."""
    if vector.type == kind:
        return vector
    return builder.fpext(vector, kind) if vector.type.element == ir.FloatType() else builder.fptrunc(vector, kind)


@intrinsic
def widen(typing_context: Any, vector: Any) -> Any:
    """Return a vector in float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _in_type_of(builder, *arguments, ir.VectorType(ir.DoubleType(), WIDTH))

    return Vector(types.float64)(vector), generate


@intrinsic
def narrow(typing_context: Any, vector: Any, like: Any) -> Any:
    """Return a vector in the type of another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _in_type_of(builder, arguments[0], arguments[1].type)

    return like(vector, like), generate


def _of_operands(a: Any, b: Any) -> types.Type | None:
    """Return the type of what an operator makes of two operands; None if it is not ours."""
    dtypes = [getattr(each, "dtype", each) for each in (a, b) if isinstance(each, (Vector, types.Float))]
    vectors = [each for each in (a, b) if isinstance(each, Vector)]
    if not vectors or len(dtypes) < 2 or (len(vectors) < 2 and dtypes[0] != dtypes[1]):
        return None
    return Vector(max(dtypes, key=lambda dtype: dtype.bitwidth))


def _operator(operation: Callable, instruction: str) -> None:
    """Make an operator of Python work on vectors; as an overload it would compile twice as long."""

    @type_callable(operation)
    def typed(context: Any) -> Callable:
        return lambda a, b: _of_operands(a, b)

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        a, b = (
            _in_type_of(builder, each if isinstance(given, Vector) else spread(builder, each), kind)
            for each, given in zip(arguments, signature.args, strict=True)
        )
        return getattr(builder, instruction)(a, b, flags=FLAGS)

    for given in (Vector, Vector), (Vector, types.Float), (types.Float, Vector):
        lower_builtin(operation, *given)(lower)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


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


@intrinsic
def first(typing_context: Any, vector: Any, count: Any, other: Any) -> Any:
    """Return the first `count` lanes of a vector, and a number in the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, count, other = arguments
        return builder.select(first_lanes(builder, count), vector, spread(builder, other))

    return vector(vector, types.intp, vector.dtype), generate


def _folded(of_two: Callable[[Any, Any, Any], Any]) -> Any:
    """Return the intrinsic that folds the lanes of a vector by halves, always in the same order."""

    @intrinsic
    def fold(typing_context: Any, vector: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (found,) = arguments
            while (half := found.type.count // 2) > 0:
                starts = [constant(list(range(start, start + half))) for start in (0, half)]
                found = of_two(builder, *(builder.shuffle_vector(found, found, lanes) for lanes in starts))
            return builder.extract_element(found, _INT(0))

        return vector.dtype(vector), generate

    return fold


fold = _folded(lambda builder, left, right: builder.fadd(left, right, flags=FLAGS))  # their sum
largest = _folded(lambda builder, left, right: builder.select(builder.fcmp_ordered(">", left, right), left, right))
