"""Vectors of eight numbers for the CPU kernels, where a loop sums what it computes.

A compiler may not reorder the one chain of additions that a sum in a loop is. So the lanes are written out: the order
of the additions is the same on every machine. Contraction to fused multiply-adds is allowed, as in all kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model
from numba.np.arrayobj import make_array

from bnkernels.runtime.cpu.language import device

WIDTH = 8
FLAGS = ("contract", "nsz")


class Vector(types.Type):
    """Type of eight numbers of a data type."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(manager[vector.dtype].get_value_type(), WIDTH))


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> tuple[Any, int]:
    """Return the pointer to a vector in an array, and its alignment."""
    vector = context.get_value_type(Vector(array_type.dtype))
    data = builder.gep(make_array(array_type)(context, builder, array).data, [index])
    return builder.bitcast(data, vector.as_pointer()), context.get_abi_sizeof(vector.element)


@intrinsic
def get(typing_context: Any, array: Any, index: Any) -> Any:
    """Return the eight numbers of an array from an index on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, align = _place(context, builder, array, *arguments)
        return builder.load(pointer, align=align)

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Fetch what lies an index behind the start of an array into the cache; it may lie behind its end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, _ = _place(context, builder, array, *arguments)
        number = ir.IntType(32)
        byte = ir.IntType(8).as_pointer()
        of = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(pointer, byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def put(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector into an array from an index on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, align = _place(context, builder, array, *arguments[:2])
        builder.store(arguments[2], pointer, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def fill(typing_context: Any, number: Any) -> Any:
    """Return a vector of equal numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index = ir.IntType(32)
        undefined = ir.Constant(ir.VectorType(arguments[0].type, WIDTH), ir.Undefined)
        one = builder.insert_element(undefined, arguments[0], index(0))
        return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(index, WIDTH), [0] * WIDTH))

    return Vector(number)(number), generate


@intrinsic
def widen(typing_context: Any, vector: Any) -> Any:
    """Return a vector in float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        doubles = ir.VectorType(ir.DoubleType(), WIDTH)
        return arguments[0] if arguments[0].type == doubles else builder.fpext(arguments[0], doubles)

    return Vector(types.float64)(vector), generate


@intrinsic
def _item(typing_context: Any, vector: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(arguments[0], builder.trunc(arguments[1], ir.IntType(32)))

    return vector.dtype(vector, types.intp), generate


@device
def fold(v):
    """Return the sum of a vector, by halves."""
    a, b = _item(v, 0) + _item(v, 4), _item(v, 1) + _item(v, 5)
    c, d = _item(v, 2) + _item(v, 6), _item(v, 3) + _item(v, 7)
    return (a + c) + (b + d)


def _operation(operation: Callable, instruction: str) -> None:
    """Make an operator of Python work on vectors."""

    @intrinsic
    def compute(typing_context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, instruction)(*arguments, flags=FLAGS)

        return a(a, b), generate

    @overload(operation)
    def of_vectors(a, b):  # as Numba compares the names
        if isinstance(a, Vector) and a == b:
            return lambda a, b: compute(a, b)
        return None


for _given in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operation(*_given)
