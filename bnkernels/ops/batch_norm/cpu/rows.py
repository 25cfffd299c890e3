"""Rows of a mini-batch for the CPU kernels of batch norm: which numbers are worked on together.

A tensor is (groups, outer, C, inner), see ``problem.py``. All channels of an outer position make a row, (C inner)
numbers, which a kernel streams through in lines: narrow columns would take another page of memory with every row. Short
rows are taken together, `wide` of them as one, where they lie next to one another.

    slice   some channels, few enough for a line, or a single one; no two slices share a sum
    piece   columns of a slice, at most a line
    block   rows that one task sums, where there are too few slices to share

Kernels pass addresses of rows, so that all but the loops over numbers is compiled once for all data types. Below, `a`
is the record of the kernel's argument.
"""

from typing import NamedTuple

import numpy as np

from bnkernels.ops.batch_norm.problem import Problem
from bnkernels.runtime.cpu.language import (
    LINE,
    address_of,
    as_float,
    bfloat16s,
    device,
    doubles,
    float16s,
    float_to_half,
    half_to_float,
    inner,
    int8s,
    numbers,
    part,
    singles,
    to_bfloat16,
)

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
STORAGE = {"float32": FLOAT32, "float64": FLOAT64, "float16": FLOAT16, "bfloat16": BFLOAT16}
SINGLE, DOUBLE = np.float32(0), np.float64(0)  # examples that give a loop the type of the numbers at its addresses
TOGETHER = 8  # rows that are summed before their sum is added
WIDE = 512  # numbers that rows are joined up to


class Tensor(NamedTuple):
    """A group of a tensor in memory: its first number, and the strides of its rows; address 0: not given."""

    address: int
    storage: int
    start: int
    outer: int
    channel: int
    inner: int


class Slices(NamedTuple):
    """Division of the channels: `count` slices of `channels` each, `wide` rows taken as one of `rows`."""

    wide: int
    rows: int
    channels: int
    count: int


def slices_of(problem: Problem, masked: bool) -> Slices:
    """Return the slices of a tensor."""
    outer, channels, inner, wide = problem.outer, problem.channels, problem.inner, 1
    row = channels * inner
    in_order = (row, inner, 1) if inner > 1 else (row, 1, 0)
    if not masked and all(strides[: 2 + (inner > 1)] == in_order[: 2 + (inner > 1)] for strides in problem.strides):
        while 2 * wide * row <= WIDE and 2 * wide * TOGETHER <= outer:
            wide *= 2
    each = channels if wide > 1 else 1 if inner > LINE // 2 else min(channels, LINE // inner)
    return Slices(wide, -(-outer // wide), each, -(-channels // each))


@device
def piece_length(columns):
    """Return the columns of a piece: all of a slice's, or equal parts of a single channel's."""
    pieces = (columns + LINE - 1) // LINE
    return (columns + pieces - 1) // pieces


@device
def get(address, storage, at):
    """Return a number from memory."""
    if storage == FLOAT32:
        return np.float64(singles(address, at, 1)[0])
    if storage == FLOAT64:
        return doubles(address, at, 1)[0]
    if storage == FLOAT16:
        return np.float64(half_to_float(float16s(address, at, 1)[0]))
    return np.float64(as_float(np.uint32(np.uint32(bfloat16s(address, at, 1)[0]) << np.uint32(16))))


@inner
def put(address, storage, at, number):
    """Write a number to memory, rounded to nearest even."""
    if storage == FLOAT32:
        singles(address, at, 1)[0] = np.float32(number)
    elif storage == FLOAT64:
        doubles(address, at, 1)[0] = number
    elif storage == FLOAT16:
        float16s(address, at, 1)[0] = float_to_half(np.float32(number))
    else:
        bfloat16s(address, at, 1)[0] = np.uint16(to_bfloat16(np.float32(number)))


@inner
def get_line(address, storage, at, stride, line):
    """Write numbers from memory to a line, in float64."""
    if stride == 1 and storage == FLOAT32:
        numbers_32 = singles(address, at, len(line))
        for i in range(len(line)):
            line[i] = numbers_32[i]
    elif stride == 1 and storage == FLOAT64:
        numbers_64 = doubles(address, at, len(line))
        for i in range(len(line)):
            line[i] = numbers_64[i]
    else:
        for i in range(len(line)):
            line[i] = get(address, storage, at + i * stride)


@inner
def put_line(address, storage, at, line):
    """Write float64 numbers to memory, rounded to nearest even; the line has then what was written."""
    if storage == FLOAT32:
        numbers_32 = singles(address, at, len(line))
        for i in range(len(line)):
            numbers_32[i] = np.float32(line[i])
        for i in range(len(line)):
            line[i] = numbers_32[i]
    elif storage == FLOAT64:
        numbers_64 = doubles(address, at, len(line))
        for i in range(len(line)):
            numbers_64[i] = line[i]
    else:
        for i in range(len(line)):
            put(address, storage, at + i, line[i])
            line[i] = get(address, storage, at + i)


@inner
def _gather(address, storage, at, stride, out, count):
    """Copy numbers from memory to the address of a line; those of 16 bits as float32."""
    if storage == FLOAT64:
        line = doubles(out, 0, count)
        for i in range(count):
            line[i] = doubles(address, at + i * stride, 1)[0]
        return
    line = singles(out, 0, count)
    if stride == 1 and storage == FLOAT16:
        halves = float16s(address, at, count)
        for i in range(count):
            line[i] = half_to_float(halves[i])
    elif stride == 1 and storage == BFLOAT16:
        truncated = bfloat16s(address, at, count)
        for i in range(count):
            line[i] = as_float(np.uint32(np.uint32(truncated[i]) << np.uint32(16)))
    else:
        for i in range(count):
            line[i] = np.float32(get(address, storage, at + i * stride))


@inner
def load_row(a, tensor, row, first, column, count, line):
    """Return the address of `count` numbers of a row, from `column` of channel `first` on: in memory, or `line`."""
    at = tensor.start + row * a.wide * tensor.outer + first * tensor.channel
    stride, inner = tensor.channel if a.inner == 1 else tensor.inner, a.inner
    size = 8 if tensor.storage == FLOAT64 else 4
    if inner == 1 or column + count <= inner or tensor.channel == inner * stride:
        at += column * stride
        if stride == 1 and tensor.storage <= FLOAT64:
            return tensor.address + np.uint64(at * size)
        _gather(tensor.address, tensor.storage, at, stride, line, count)
        return line
    for number in range(count // inner):
        out = line + np.uint64(number * inner * size)
        _gather(tensor.address, tensor.storage, at + number * tensor.channel, stride, out, inner)
    return line


@inner
def copy_line(like, source, out, count):
    """Copy a line."""
    line, copy = numbers(like, source, 0, count), numbers(like, out, 0, count)
    for i in range(count):
        copy[i] = line[i]


@inner
def store(address, storage, at, source, count):
    """Write a line to an output."""
    if storage == FLOAT64:
        copy_line(DOUBLE, source, address + np.uint64(8 * at), count)
        return
    line = singles(source, 0, count)
    if storage == FLOAT32:
        copy_line(SINGLE, source, address + np.uint64(4 * at), count)
    elif storage == FLOAT16:
        halves = float16s(address, at, count)
        for i in range(count):
            halves[i] = float_to_half(line[i])
    else:
        truncated = bfloat16s(address, at, count)
        for i in range(count):
            truncated[i] = np.uint16(to_bfloat16(line[i]))


@inner
def spread(values, channels, inner, out):
    """Write to each column the number of its channel; of a piece of a single channel all are equal."""
    if channels == 1:
        for i in range(len(out)):
            out[i] = values[0]
        return
    row = min(channels * inner, len(out))
    if inner == 1:
        for i in range(row):
            out[i] = values[i]
    else:
        for channel in range(channels):
            run, value = part(out, channel * inner, inner), values[channel]
            for i in range(inner):
                run[i] = value
    for start in range(row, len(out), row):
        copy = part(out, start, row)
        for i in range(row):
            copy[i] = out[i]


@device
def valid(a, group, outer, inner):
    """Return whether a position counts."""
    at = group * a.mask_group + outer * a.mask_outer + inner * a.mask_inner
    return a.mask == 0 or int8s(a.mask, at, 1)[0] != 0


@inner
def count_valid(a, group):
    """Return the number of positions that count."""
    if a.mask == 0:
        return a.outer * a.inner
    count = 0
    for outer in range(a.outer):
        for along in range(a.inner):
            count += 1 if valid(a, group, outer, along) else 0
    return count


@inner
def clear(a, like, group, row, column, values, line, count):
    """Write `values` to the columns of the line at an address that do not count."""
    out, at = numbers(like, line, 0, count), column % a.inner
    for i in range(count):
        if not valid(a, group, row, at):
            out[i] = values[i]
        at = at + 1 if at + 1 < a.inner else 0


@device
def line_of(lines, number):
    """Return the address of a line in an array of float64 lines."""
    return address_of(lines) + np.uint64(8 * LINE * number)


@device
def input_of(a, address, group, strides):
    """Return a group of an input."""
    return Tensor(address, a.storage, group * strides[0], strides[1], strides[2], strides[3])


@device
def output_of(a, address, group):
    """Return a group of an output, which lies in C order."""
    size = a.channels * a.inner
    return Tensor(address, a.storage, group * a.outer * size, size, a.inner, 1)


@device
def own_columns(a, row, count):
    """Return the columns of a row of a piece: the last of joined rows may be shorter."""
    return min(count, (a.outer - row * a.wide) * a.channels * a.inner) if a.wide > 1 else count


@device
def place_of(a, tensor, row, first, column):
    """Return the place of a row of an output, in numbers."""
    return tensor.start + row * a.wide * tensor.outer + first * tensor.channel + column


@device
def accumulator_of(a):
    """Return the storage of statistics and parameters."""
    return FLOAT64 if a.storage == FLOAT64 else FLOAT32
