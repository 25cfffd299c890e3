"""Language of the CPU kernels: Numba's decorators, arrays at addresses, and the four data types in memory.

A kernel takes the argument struct of its CUDA twin, with the same members. An address is turned into an array without
a reference count, and a kernel's own arrays lie on its stack: LLVM then knows that nothing else can alias them, and
vectorises loops over them. Loops run over one-dimensional arrays from their start; two-dimensional indexing, or an
offset within the brackets, is not vectorised.

All kernels compute in the type of the accumulator, float32 or float64, and sum in float64. Numbers of 16 bits are
converted in lines, rounded to nearest even, which two instructions of x86-64 and of ARM do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array, populate_array

from bnkernels.runtime.cpu.caching import cached

# Contraction gives fused multiply-adds. Nothing may be reordered, and NaN and infinity count.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
kernel = cached(**_OPTIONS)  # called from Python; kernels that call it compile it again
device = cached(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)  # part of its callers
# Called from kernels only: without what Python would call, it compiles faster.
inner = cached(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)

LINE = 1024  # numbers that are worked on at a time: 4 KiB of float32, and a few such lines fit into the L1 cache
# Examples of the numbers of a data type: by the type of such an argument, `like`, a kernel is compiled for that of its
# data. Those of 16 bits are bits, and told apart by these types.
LIKE = {"float32": np.float32(0), "float64": np.float64(0), "float16": np.int16(0), "bfloat16": np.uint16(0)}


class View(types.Array):
    """Type of an array that owns nothing: no reference is counted, which in short loops takes most of the time."""

    def __init__(self, dtype: types.Type) -> None:
        super().__init__(dtype, 1, "C", name=f"view({dtype})")


@register_model(View)
class _ViewModel(models.StructModel):
    """The members of Numba's arrays; what owns the memory is a mere pointer."""

    def __init__(self, manager: Any, view: View) -> None:
        of_axes = types.UniTuple(types.intp, 1)
        names = "meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides"
        of = types.voidptr, types.voidptr, types.intp, types.intp, types.CPointer(view.dtype), of_axes, of_axes
        super().__init__(manager, view, list(zip(names, of, strict=True)))


def _view(context: Any, builder: Any, array_type: types.Array, data: Any, count: Any) -> Any:
    """Return an array without a reference count."""
    array = make_array(array_type)(context, builder)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
    populate_array(array, data=data, shape=[count], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return array._getvalue()


def _pointer(context: Any, builder: Any, dtype: types.Type, address: Any) -> Any:
    return builder.inttoptr(address, context.get_data_type(dtype).as_pointer())


def _array_at(dtype: types.Type) -> Any:
    """Return the intrinsic that makes arrays of a data type at addresses."""

    @intrinsic
    def array_at(typing_context: Any, address: Any, offset: Any, count: Any) -> Any:
        """Return the array of `count` numbers that begins `offset` numbers behind the address."""
        array_type = View(dtype)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, offset, count = arguments
            data = builder.gep(_pointer(context, builder, dtype, address), [offset])
            return _view(context, builder, array_type, data, count)

        return array_type(types.uint64, types.intp, types.intp), generate

    return array_at


int8s, int32s, int64s = _array_at(types.uint8), _array_at(types.int32), _array_at(types.int64)
doubles = _array_at(types.float64)


@intrinsic
def numbers(typing_context: Any, like: Any, address: Any, offset: Any, count: Any) -> Any:
    """Return the array of `count` numbers of the type of `like`, `offset` numbers behind the address."""
    array_type = View(like)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, offset, count = arguments
        data = builder.gep(_pointer(context, builder, like, address), [offset])
        return _view(context, builder, array_type, data, count)

    return array_type(like, types.uint64, types.intp, types.intp), generate


@intrinsic
def part(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """Return `count` numbers of an array from an offset on; a slice would count references."""
    array_type = View(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, offset, count = arguments
        data = builder.gep(make_array(array)(context, builder, whole).data, [offset])
        return _view(context, builder, array_type, data, count)

    return array_type(array, types.intp, types.intp), generate


@intrinsic
def stack(typing_context: Any, like: Any, count: Any) -> Any:
    """Return a new array of a literal number of numbers of the type of `like`, until the kernel returns."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    array_type, size = View(like), count.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():  # once per call, however often the line is executed
            data = builder.alloca(context.get_data_type(like), size=ir.Constant(ir.IntType(64), size))
            data.align = 64
        return _view(context, builder, array_type, data, context.get_constant(types.intp, size))

    return array_type(like, count), generate


@intrinsic
def size_of(typing_context: Any, like: Any) -> Any:
    """Return the bytes of a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(like)))

    return types.intp(like), generate


@device
def is_double(like):
    """Return whether this is a float64."""
    return size_of(like) == 8


@intrinsic
def address_of(typing_context: Any, array: Any) -> Any:
    """Return the address of an array's first number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = make_array(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.uint64))

    return types.uint64(array), generate


@intrinsic
def cast(typing_context: Any, number: Any, like: Any) -> Any:
    """Return a number in the type of another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], number, like)

    return like(number, like), generate


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """Return the float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def as_bits(typing_context: Any, number: Any) -> Any:
    """Return the 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def accumulator(typing_context: Any, like: Any) -> Any:
    """Return 0 of the type in which numbers of a data type are computed."""
    of = types.float64 if like == types.float64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(of, 0.0)

    return of(like), generate


@intrinsic
def as_number(typing_context: Any, stored: Any) -> Any:
    """Return what is stored as a number, float32 of 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if stored == types.int16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        if stored == types.uint16:
            bits = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(arguments[0], bits), bits(16)), ir.FloatType())
        return arguments[0]

    return (types.float32 if stored in (types.int16, types.uint16) else stored)(stored), generate


@intrinsic
def as_stored(typing_context: Any, number: Any, like: Any) -> Any:
    """Return a number as it is stored, rounded to nearest even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like not in (types.int16, types.uint16):
            return context.cast(builder, arguments[0], number, like)
        single = context.cast(builder, arguments[0], number, types.float32)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(single, ir.HalfType()), ir.IntType(16))
        of = ir.IntType(32)
        bits = builder.bitcast(single, of)
        high = builder.lshr(bits, of(16))
        up = builder.add(builder.and_(high, of(1)), of(0x7FFF))
        rounded, quiet = builder.lshr(builder.add(bits, up), of(16)), builder.or_(high, of(64))
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, of(0x7FFFFFFF)), of(0x7F800000))
        return builder.trunc(builder.select(is_nan, quiet, rounded), ir.IntType(16))

    return like(number, like), generate


@device
def load(like, address, offset, line):
    """Return as many numbers as `line` has: where they lie, if they can be read there, else converted in `line`."""
    if size_of(like) > 2:
        return numbers(accumulator(like), address, offset, len(line))
    widen(like, address, offset, line)
    return line


@inner
def widen(like, address, offset, line):
    """Read numbers from memory into a line."""
    source = numbers(like, address, offset, len(line))
    for i in range(len(line)):
        line[i] = as_number(source[i])


@device
def place(like, address, offset, line):
    """Return where to compute numbers that are to be stored: there, or in `line`, which `store` then converts."""
    if size_of(like) > 2:
        return numbers(accumulator(like), address, offset, len(line))
    return line


@inner
def store(like, address, offset, line):
    """Write a line that `place` gave, if it is not there already."""
    if size_of(like) > 2:
        return
    out = numbers(like, address, offset, len(line))
    for i in range(len(line)):
        out[i] = as_stored(line[i], like)
