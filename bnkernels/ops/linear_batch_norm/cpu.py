"""Bias, activation and 16-bit storage around the products of linear layers on the CPU.

Formulas:  y = phi(z + beta);  dz = dy phi'(z + beta),  dbeta = sum_n dz
Arrays:    z, y, dy, dz (N, M) of type T, C order; y may be z, and dz may be dy or none. beta, dbeta (M,) of the
           accumulator's type A, may be none.
Tasks:     Forward: rows. Backward: blocks of `height` rows.
Traffic:   All read once and written once. Sums of columns: 8 bytes a column for every block, 2 MiB at most.
Numerics:  In A; sums of columns are of A over 8 rows, and then of float64.
Order:     Sums of columns are of blocks that the shape fixes, merged in order: the same bits for any number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.activations_cpu import activate, differentiate
from bnkernels.runtime.arguments import addresses, host_pointer
from bnkernels.runtime.cpu.language import (
    LIKE,
    LINE,
    accumulator,
    cast,
    device,
    doubles,
    kernel,
    load,
    numbers,
    part,
    place,
    size_of,
    stack,
    store,
    widen,
)
from bnkernels.runtime.cpu.sums import MOST_SUMS, fill_line, flush, merge, round_to
from bnkernels.runtime.cpu.threads import share
from bnkernels.runtime.seam import ceil_div

GROUP = 8  # rows whose columns are summed in the accumulator's type
HEIGHT = 64  # rows of a block, unless there would be too many blocks


def forward(z: np.ndarray, beta: np.ndarray | None, phi: Activation, y: np.ndarray) -> None:
    """Write the activations of ``z + beta``; `y` may be `z`."""
    rows, columns = z.shape
    like = _like(z.dtype)
    share(_forward, rows, z.size, like, *addresses(None, z, beta, y), columns, phi.alpha, phi.code)


def backward(
    dy: np.ndarray,
    z: np.ndarray,
    beta: np.ndarray | None,
    phi: Activation,
    dz: np.ndarray | None,
    dbeta: np.ndarray | None,
) -> None:
    """Write the gradients that are wanted; `dz` may be `dy`."""
    rows, columns = dy.shape
    if not dy.size:
        if dbeta is not None:
            dbeta[...] = 0
        return
    like = _like(dy.dtype)
    height, blocks = _blocks(rows, columns)
    sums = np.empty(blocks * columns) if dbeta is not None and blocks > 1 else None
    pointers = addresses(None, dy, z, beta, dz, dbeta, sums)
    share(_backward, blocks, dy.size, like, *pointers, rows, columns, phi.alpha, phi.code, height)
    if sums is not None:
        merge(LIKE[dbeta.dtype.name], host_pointer(sums), 0, columns, blocks, columns, host_pointer(dbeta))


def single(array: np.ndarray) -> np.ndarray:
    """Return a contiguous array of 16-bit numbers, or a transposed one, in float32."""
    if not array.flags.c_contiguous:
        return single(array.T).T
    found = np.empty(array.shape, np.float32)
    given = _like(array.dtype), *addresses(None, array, found), array.size
    share(_widen, ceil_div(array.size, LINE), array.size, *given)
    return found


def round_into(array: np.ndarray, out: np.ndarray) -> None:
    """Round float32 numbers to 16 bits; both arrays are contiguous."""
    given = _like(out.dtype), *addresses(None, array, out), out.size
    share(_round, ceil_div(out.size, LINE), out.size, *given)


@lru_cache(maxsize=16)
def _like(dtype: np.dtype) -> Any:
    """Return an example of the numbers of a data type, whose name NumPy takes a microsecond to tell."""
    return LIKE[dtype.name]


@lru_cache(maxsize=1024)
def _blocks(rows: int, columns: int) -> tuple[int, int]:
    """Return height and number of the blocks of rows."""
    height = GROUP * ceil_div(max(HEIGHT, ceil_div(rows, max(1, MOST_SUMS // columns))), GROUP)
    return height, ceil_div(rows, height)


@device
def _added(values, beta, start, out):
    """Write values plus a part of beta."""
    if beta:
        shifts = numbers(out[0], beta, start, len(out))
        for j in range(len(out)):
            out[j] = values[j] + shifts[j]
    else:
        for j in range(len(out)):
            out[j] = values[j]


@kernel
def _forward(like, z, beta, y, columns, alpha, code, first, last):
    acc = accumulator(like)
    line, result = stack(acc, LINE), stack(acc, LINE)
    alpha, together = cast(alpha, acc), max(1, LINE // columns)
    for n in range(first, last, together):
        rows = min(together, last - n)
        for start in range(0, columns, LINE):
            count, offset = min(LINE, columns - start), n * columns + start
            values = load(like, z, offset, part(line, 0, rows * count))
            out = place(like, y, offset, part(result, 0, rows * count))
            for i in range(rows):
                _added(part(values, i * count, count), beta, start, part(out, i * count, count))
            if code != 0 or alpha != 1:
                activate(code, alpha, out)
            store(like, y, offset, out)


@kernel
def _backward(like, dy, z, beta, dz, dbeta, sums, rows, columns, alpha, code, height, first, last):
    acc = accumulator(like)
    line, g, shifted = stack(acc, LINE), stack(acc, LINE), stack(acc, LINE)
    of_beta, beta_sums = stack(acc, LINE), stack(0.0, LINE)
    fill_line(of_beta, acc)
    summed, written, alpha, identity = dbeta != 0, dz != 0, cast(alpha, acc), code == 0 and alpha == 1
    for block in range(first, last):
        end = min(rows, (block + 1) * height)
        for start in range(0, columns, LINE):
            count = min(LINE, columns - start)
            fill_line(part(beta_sums, 0, count), 0.0)
            for n in range(block * height, end):
                offset = n * columns + start
                gradient = load(like, dy, offset, part(g, 0, count))
                if not identity:
                    out = part(g, 0, count)
                    if size_of(like) > 2:
                        for j in range(count):
                            out[j] = gradient[j]
                    values = load(like, z, offset, part(line, 0, count))
                    _added(values, beta, start, part(shifted, 0, count))
                    differentiate(code, alpha, part(shifted, 0, count), out)
                    gradient = out
                if summed:
                    for j in range(count):
                        of_beta[j] += gradient[j]
                    if n % GROUP == GROUP - 1 or n == end - 1:
                        flush(of_beta, part(beta_sums, 0, count))
                if written:
                    out = place(like, dz, offset, part(line, 0, count))
                    for j in range(count):
                        out[j] = gradient[j]
                    store(like, dz, offset, out)
            if summed and height < rows:
                round_to(part(beta_sums, 0, count), doubles(sums, block * columns + start, count))
            elif summed:
                round_to(part(beta_sums, 0, count), numbers(acc, dbeta, start, count))


@kernel
def _widen(like, source, found, size, first, last):
    for start in range(first * LINE, min(last * LINE, size), LINE):
        widen(like, source, start, numbers(accumulator(like), found, start, min(LINE, size - start)))


@kernel
def _round(like, source, out, size, first, last):
    for start in range(first * LINE, min(last * LINE, size), LINE):
        store(like, out, start, numbers(accumulator(like), source, start, min(LINE, size - start)))
