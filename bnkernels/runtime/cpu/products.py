"""Products of matrices for the CPU kernels: tiles in registers, or the BLAS where matrices are large.

A tile of a product, at most 8 rows by 3 vectors, stays in registers while its sums run over `depth` in order. The
rows of the second factor and of the result are contiguous, the first factor may have any strides: transposed, it gives
the gradient of weights. Nothing is packed, so factors should fit into the L2 cache; the BLAS takes those that do not.

Traffic: of a strip of 3 vectors of columns the second factor is read once for every 4 rows, from the cache; results are
written once.
Numerics: sums in the type of the data, in the order of `depth`, by fused multiply-adds where the processor has them.
Determinism: the order of a sum does not depend on where its row and column lie.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.linalg import ensure_blas

from bnkernels.runtime.cpu.language import inner
from bnkernels.runtime.cpu.vectors import FLAGS, first_lanes, pointer_of, read, spread, write

VECTORS = 3  # columns of a tile
# Bytes of its vectors: 12 of them fill the registers, or half of those of AVX-512, of which there are 32.
BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
WORTH_BLAS = 2**23  # multiply-adds from which on the BLAS is faster, as measured: 128 x 256 x 256


def _rows(builder: Any, data: Any, start: Any, row: Any, count: int) -> list[Any]:
    """Return the pointers to the first rows from an offset on."""
    return [builder.gep(data, [builder.add(start, builder.mul(row, row.type(i)))]) for i in range(count)]


def _add_products(
    builder: Any,
    tile: list[list[Any]],
    lanes: int,
    masks: list[Any],
    a_rows: list[Any],
    a_column: Any,
    b_start: Any,
    b_row: Any,
    depth: Any,
    starts: list[Any],
) -> None:
    """Add the products of rows of a and of vectors of b to a tile, over the depth."""
    with cgutils.for_range(builder, depth) as loop:
        b_line = builder.gep(b_start, [builder.mul(loop.index, b_row)])
        right = [read(builder, b_line, start, lanes, mask) for start, mask in zip(starts, masks, strict=True)]
        a_offset = builder.mul(loop.index, a_column)
        for row, pointers in zip(a_rows, tile, strict=True):
            left = spread(builder, builder.load(builder.gep(row, [a_offset])), lanes)
            for factor, pointer in zip(right, pointers, strict=True):
                product = builder.fmul(left, factor, flags=FLAGS)
                builder.store(builder.fadd(builder.load(pointer), product, flags=FLAGS), pointer)


@intrinsic
def _tile(
    typing_context: Any,
    a: Any,
    a_at: Any,
    a_row: Any,
    a_column: Any,
    b: Any,
    b_at: Any,
    b_row: Any,
    c: Any,
    c_at: Any,
    c_row: Any,
    depth: Any,
    columns: Any,
    add: Any,
    rows: Any,
    vectors: Any,
) -> Any:
    """Compute a tile of literally so many rows and vectors; only its first `columns` are read and written."""
    if not all(isinstance(size, types.IntegerLiteral) for size in (rows, vectors)):
        return None
    sizes = rows.literal_value, vectors.literal_value
    lanes = BYTES * 8 // c.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a_, a_at, a_row, a_column, b_, b_at, b_row, c_, c_at, c_row, depth, columns, add = arguments[:13]
        row_count, vector_count = sizes
        a_, b_, c_ = (pointer_of(context, builder, kind, array) for kind, array in ((a, a_), (b, b_), (c, c_)))
        number = context.get_constant
        element = c_.type.pointee
        kind = ir.VectorType(element, lanes)
        before = number(types.intp, (vector_count - 1) * lanes)
        mask = first_lanes(builder, builder.sub(columns, before), lanes)
        masks = [None] * (vector_count - 1) + [mask]
        tile = [[cgutils.alloca_once(builder, kind) for _ in range(vector_count)] for _ in range(row_count)]
        c_rows = _rows(builder, c_, c_at, c_row, row_count)
        starts = [number(types.intp, v * lanes) for v in range(vector_count)]
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (then, otherwise):
            with then:
                for row, pointers in zip(c_rows, tile, strict=True):
                    for start, of_vector, pointer in zip(starts, masks, pointers, strict=True):
                        builder.store(read(builder, row, start, lanes, of_vector), pointer)
            with otherwise:
                for pointers in tile:
                    for pointer in pointers:
                        builder.store(ir.Constant(kind, None), pointer)
        a_rows, b_start = _rows(builder, a_, a_at, a_row, row_count), builder.gep(b_, [b_at])
        factors = a_rows, a_column, b_start, b_row, depth, starts

        if row_count == 1:
            _add_products(builder, tile, lanes, masks, *factors)
        else:  # a mask takes a register, which the tile needs
            whole = builder.icmp_signed("==", columns, number(types.intp, vector_count * lanes))
            with builder.if_else(whole) as (then, otherwise):
                with then:
                    _add_products(builder, tile, lanes, [None] * vector_count, *factors)
                with otherwise:
                    _add_products(builder, tile, lanes, masks, *factors)
        for row, pointers in zip(c_rows, tile, strict=True):
            for start, of_vector, pointer in zip(starts, masks, pointers, strict=True):
                write(builder, row, start, builder.load(pointer), of_vector)
        return context.get_dummy_value()

    given = a, types.intp, types.intp, types.intp, b, types.intp, types.intp, c, types.intp, types.intp
    return types.void(*given, types.intp, types.intp, types.intp, rows, vectors), generate


@intrinsic
def _gemm(
    typing_context: Any,
    m: Any,
    n: Any,
    depth: Any,
    a: Any,
    a_at: Any,
    a_row: Any,
    a_turned: Any,
    b: Any,
    b_at: Any,
    b_row: Any,
    b_turned: Any,
    c: Any,
    c_at: Any,
    c_row: Any,
    add: Any,
) -> Any:
    """Call the BLAS that Numba found, for matrices in C order: to it they are transposed, so b comes first."""
    ensure_blas()
    letter = "s" if c.dtype == types.float32 else "d"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        m, n, depth, a_, a_at, a_row, a_turned, b_, b_at, b_row, b_turned, c_, c_at, c_row, add = arguments
        char, size, pointer = ir.IntType(8), ir.IntType(64), ir.IntType(8).as_pointer()
        a_, b_, c_ = (
            builder.gep(pointer_of(context, builder, kind, array), [start])
            for kind, array, start in ((a, a_, a_at), (b, b_, b_at), (c, c_, c_at))
        )
        element = c_.type.pointee
        no = add.type(0)
        beta = builder.select(builder.icmp_signed("!=", add, no), element(1.0), element(0.0))
        alphas = [cgutils.alloca_once_value(builder, number) for number in (element(1.0), beta)]
        turns = [
            builder.select(builder.icmp_signed("!=", turned, no), char(ord("t")), char(ord("n")))
            for turned in (b_turned, a_turned)
        ]
        kind = ir.FunctionType(
            ir.IntType(32), [char] * 3 + [size] * 3 + [pointer, pointer, size, pointer, size, pointer, pointer, size]
        )
        function = cgutils.get_or_insert_function(builder.module, kind, "numba_xxgemm")
        alpha, beta, a_, b_, c_ = (builder.bitcast(each, pointer) for each in (*alphas, a_, b_, c_))
        builder.call(function, [char(ord(letter)), *turns, n, m, depth, alpha, b_, b_row, a_, a_row, beta, c_, c_row])
        return context.get_dummy_value()

    integers = types.intp
    of_a = a, integers, integers, integers
    of_b = b, integers, integers, integers
    return types.void(integers, integers, integers, *of_a, *of_b, c, integers, integers, integers), generate


@inner
def product(m, n, depth, a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_row, add):
    """Write the product of a (m, depth) and b (depth, n) to c, or add it if `add`.

    Of each matrix an array is given, an offset in it, and the distances of rows and columns, those of c next to one
    another. Where those of b are not, the BLAS computes.
    """
    if b_column != 1 or worth_blas(m, n, depth):
        _gemm(
            m, n, depth, a, a_at, max(a_row, a_column), int(a_column != 1),
            b, b_at, max(b_row, b_column), int(b_column != 1), c, c_at, c_row, add,
        )  # fmt: skip
        return
    lanes = BYTES // c.itemsize
    vectors = (n + lanes - 1) // lanes
    strips, done = (vectors + 2) // 3, 0
    for number in range(strips):
        width = (vectors - done + strips - number - 1) // (strips - number)
        b_from, c_from, columns = b_at + done * lanes, c_at + done * lanes, min(n - done * lanes, width * lanes)
        done += width
        i = 0
        while i < m:
            a_from, to = a_at + i * a_row, c_from + i * c_row
            if i + 4 > m:
                if width == 3:
                    _tile(a, a_from, a_row, a_column, b, b_from, b_row, c, to, c_row, depth, columns, add, 1, 3)
                elif width == 2:
                    _tile(a, a_from, a_row, a_column, b, b_from, b_row, c, to, c_row, depth, columns, add, 1, 2)
                else:
                    _tile(a, a_from, a_row, a_column, b, b_from, b_row, c, to, c_row, depth, columns, add, 1, 1)
                i += 1
            elif width == 3:
                _tile(a, a_from, a_row, a_column, b, b_from, b_row, c, to, c_row, depth, columns, add, 4, 3)
                i += 4
            elif width == 2:
                _tile(a, a_from, a_row, a_column, b, b_from, b_row, c, to, c_row, depth, columns, add, 4, 2)
                i += 4
            else:
                _tile(a, a_from, a_row, a_column, b, b_from, b_row, c, to, c_row, depth, columns, add, 4, 1)
                i += 4


@inner
def worth_blas(m, n, depth):
    """Return whether the BLAS is faster."""
    return m * n * depth >= WORTH_BLAS
