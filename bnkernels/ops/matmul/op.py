"""Matrix product by a kernel of ours, which a CUDA graph can capture as CuPy's products cannot."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops import gemm
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import SUFFIX, addresses, arguments_type, empty, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.occupancy import most_shared
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import NEW, Call, ReplayCache
from bnkernels.runtime.seam import Launch, LaunchPlan, Limits, Runtime, ceil_div

ARGUMENTS = arguments_type(
    "left right out", "rows columns terms left_pitch right_pitch tile_rows width part buffers", "", ""
)
TILE_ROWS = 256  # rows of a block
TERMS, UNIT = 256, 16  # terms of a part, at least, and what their number is a multiple of
MOST = 2**31 - 1  # elements of a matrix, which kernels count in 32 bits
MOST_TILES = 2**16 - 1  # blocks of a grid along its second axis, that of the rows


def _check(args: dict[str, check.Argument | None]) -> None:
    """Check all arrays."""
    a, b = args["a"], args["b"]
    check.float32_or_float64(a)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b must have the shapes (M, K) and (K, N), got {a.shape} and {b.shape}")
    check.like(b, b.shape, a.dtype)
    check.contiguous(args["out"], (a.shape[0], b.shape[1]), a.dtype)
    for one in (a, b, args["out"]):
        if one is not None and one.shape[0] * one.shape[1] > MOST:
            raise ValueError(f"{one.name} must have at most 2**31 - 1 elements, got the shape {one.shape}; split it")
    if ceil_div(a.shape[0], TILE_ROWS) > MOST_TILES:
        raise ValueError(f"a must have at most {TILE_ROWS * MOST_TILES} rows, got the shape {a.shape}; split it")
    for one in (a, b):
        if not (one.contiguous or _transposed(one).contiguous):
            raise ValueError(
                f"{one.name} must be contiguous in C order, got strides {one.strides}, nor its transpose; pass a copy"
            )


def _transposed(one: check.Argument) -> check.Argument:
    return check.Argument(one.name, one.kind, one.dtype, one.shape[::-1], one.strides[::-1])


CALLS = ReplayCache()
OPERANDS = Operands("out", "a b", _check, optional="out")


def matmul(a: Array, b: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Return the product of two matrices.

    Parameters
    ----------
    a, b : array, shapes (M, K) and (K, N), float32 or float64
        Factors, each in C order or the transpose of such an array; at most 2**31 - 1 elements. Never written.
    out : array, shape (M, N), dtype of `a`, optional
        Array for the product; C order.

    Returns
    -------
    array, shape (M, N), dtype of `a`
        The product.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    For a step that is captured as a CUDA graph, which CuPy's own product refuses; elsewhere that is faster.
    Deterministic, all sums in the type of `a`. Where there are too few tiles for the device, the terms are divided into
    parts, whose sums another launch adds. NumPy arrays take NumPy's product. Source: ``cuda/matmul.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> matmul(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]))
    array([[11.]])
    """
    call = CALLS.replay(None if out is None else (out,), (a, b))
    if call.replayed:
        return out
    runtime, _ = OPERANDS.check(out, a, b)
    if out is None:
        out = empty(runtime, (a.shape[0], b.shape[1]), a)
    if runtime is None:
        call.compute(_multiply_on_host, (out, a, b))
    else:
        multiply(runtime, a, b, out, call=call)
    return out


@np.errstate(all="ignore")  # kernels have no warnings either
def _multiply_on_host(arrays: tuple) -> None:
    out, a, b = arrays
    np.matmul(a, b, out=out)


@np.errstate(all="ignore")  # kernels have no warnings either
def multiply(runtime: Runtime | None, a: Any, b: Any, out: Any, *, capturable: bool = True, call: Call = NEW) -> None:
    """Write the product of two matrices that have been checked; if it need not be capturable, by the library's."""
    if runtime is None or not capturable:
        (np if runtime is None else runtime.xp).matmul(a, b, out=out)
        return
    if not out.size:
        return
    (rows, terms), columns = a.shape, b.shape[1]
    plan = choose(rows, columns, terms, a.dtype, runtime.limits(out))
    whole = plan.splits == 1
    partial = out if whole else empty(runtime, (plan.splits, rows * columns), out)
    (left, left_pitch), (right, right_pitch) = _layout(a), _layout(b)
    arguments = pack(
        plan.arguments, *addresses(runtime, a, b, partial), rows, columns, terms, left_pitch, right_pitch,
        TILE_ROWS, plan.width, plan.held, plan.stages,
    )  # fmt: skip
    kernel = plan.kernel.format(left + right)
    call.launch(runtime, plan.source, kernel, plan.launch, arguments, out, replayable=whole)
    if not whole:
        add_rows(runtime, partial, out.reshape(1, -1))


def add_rows(runtime: Runtime, matrix: Any, out: Any, *, capturable: bool = True) -> None:
    """Write the sum of the rows of a matrix, shape (1, columns)."""
    ones = empty(runtime, (1, len(matrix)), matrix)
    ones[...] = 1
    multiply(runtime, ones, matrix, out, capturable=capturable)


def _layout(matrix: Any) -> tuple[str, int]:
    """Return whether rows or columns are contiguous, as kernels name it, and the numbers from one to the next."""
    number, (rows, columns) = matrix.dtype.itemsize, matrix.shape
    if columns == 1 or matrix.strides[1] == number:
        return "n", (matrix.strides[0] // number if rows > 1 else columns)
    return "t", (matrix.strides[1] // number if rows > 1 else 1)


@lru_cache(maxsize=1024)
def choose(rows: int, columns: int, terms: int, dtype: np.dtype, limits: Limits) -> LaunchPlan:
    """Return the launch of a product, with a gap for its layouts in the name of the kernel.

    `splits` is the number of parts and `held` that of the terms of one.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose(4096, 400, 28, np.dtype("float32"), h200).launch
    Launch(grid=(13, 16, 1), block=(256, 1, 1), shared_bytes=98304, cooperative=False)
    >>> choose(400, 100, 4096, np.dtype("float32"), h200).launch
    Launch(grid=(4, 2, 16), block=(256, 1, 1), shared_bytes=98304, cooperative=False)
    """
    down, most_parts = ceil_div(rows, TILE_ROWS), max(1, terms // TERMS)
    width = gemm.tile_width(columns, max(1, limits.sms // (down * most_parts)), dtype)
    buffers, shared = gemm.buffers_and_bytes(width, dtype, most_shared(limits, gemm.MIN_BLOCKS), 0)
    across = ceil_div(columns, width)
    part = ceil_div(terms, max(1, min(most_parts, limits.sms // (across * down))))
    part = max(1, ceil_div(part, UNIT)) * UNIT
    parts = max(1, ceil_div(terms, part))
    launch = Launch((across, down, parts), (gemm.THREADS, 1, 1), shared)
    kernel = f"bnk_matmul_{{}}_{SUFFIX[dtype]}"
    return LaunchPlan("matmul", kernel, launch, ARGUMENTS[dtype], parts, width, part, buffers)
