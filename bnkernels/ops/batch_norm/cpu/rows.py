"""Rows of a mini-batch for the CPU kernels of batch norm: which numbers are worked on together.

A tensor is (groups, outer, C, inner), see ``problem.py``. All channels of an outer position make a row, (C inner)
numbers, which a kernel streams through in lines: narrow columns would take another page of memory with every row. Short
rows are taken together, `wide` of them as one, where they lie next to one another.

    slice   some channels, few enough for a line, or a single one; no two slices share a sum
    piece   columns of a slice, at most a line; all pieces of a row are of the same channels
    block   rows that one task sums, where there are too few slices to share

Below, `a` is the record of the argument, and `like` an example of the numbers in memory, see ``language.LIKE``:
numbers of 16 bits are read and written as float32. A line is passed by its address.
"""

from typing import NamedTuple

import numpy as np

from bnkernels.ops.batch_norm.problem import Problem
from bnkernels.runtime.cpu.language import (
    LINE,
    accumulator,
    address_of,
    as_number,
    as_stored,
    device,
    inner,
    int8s,
    numbers,
    part,
    size_of,
    widen,
)
from bnkernels.runtime.seam import ceil_div

TOGETHER = 8  # rows that are summed before their sum is added


class Tensor(NamedTuple):
    """A group of a tensor in memory: its first number, and the strides of its rows; address 0: not given."""

    address: int
    start: int
    outer: int
    channel: int
    inner: int


class Slices(NamedTuple):
    """Division of the channels: `count` slices of `channels` each, `wide` rows taken as one of `rows`, in pieces."""

    wide: int
    rows: int
    piece: int
    channels: int
    count: int


def slices_of(problem: Problem, masked: bool) -> Slices:
    """Return the slices of a tensor."""
    outer, channels, inner, wide = problem.outer, problem.channels, problem.inner, 1
    row = channels * inner
    in_order = (row, inner, 1) if inner > 1 else (row, 1, 0)
    if not masked and all(strides[: 2 + (inner > 1)] == in_order[: 2 + (inner > 1)] for strides in problem.strides):
        while 2 * wide * row <= LINE and 2 * wide * TOGETHER <= outer:
            wide *= 2
    each = channels if wide > 1 else 1 if inner > LINE // 2 else min(channels, LINE // inner)
    whole = wide * each * inner
    return Slices(wide, ceil_div(outer, wide), ceil_div(whole, ceil_div(whole, LINE)), each, ceil_div(channels, each))


@device
def channels_of(a, number):
    """Return the first channel of a slice, and their number."""
    first = number * a.slice_channels
    return first, min(a.slice_channels, a.channels - first)


@device
def columns_of(a, channels):
    """Return the columns of a slice, and those of a piece: all, or equal parts of a single channel's."""
    whole = a.wide * channels * a.inner
    return whole, min(whole, a.piece)


@device
def get(like, address, at):
    """Return a number from memory, in float64."""
    return np.float64(as_number(numbers(like, address, at, 1)[0]))


@device
def put(like, address, at, number):
    """Write a number to memory."""
    numbers(like, address, at, 1)[0] = as_stored(number, like)


@inner
def get_line(like, address, at, stride, line):
    """Write numbers from memory to a float64 line."""
    if stride == 1:
        source = numbers(like, address, at, len(line))
        for i in range(len(line)):
            line[i] = as_number(source[i])
    else:
        for i in range(len(line)):
            line[i] = get(like, address, at + i * stride)


@inner
def put_line(like, address, at, line):
    """Write float64 numbers to memory; the line has then what was written."""
    out = numbers(like, address, at, len(line))
    for i in range(len(line)):
        out[i] = as_stored(line[i], like)
    for i in range(len(line)):
        line[i] = as_number(out[i])


@inner
def _gather(like, address, at, stride, out, count):
    """Copy numbers from memory to the address of a line."""
    line = numbers(accumulator(like), out, 0, count)
    if stride == 1:
        widen(like, address, at, line)
    else:
        for i in range(count):
            line[i] = as_number(numbers(like, address, at + i * stride, 1)[0])


@device
def in_order(a, tensor):
    """Return whether the numbers of a piece follow one another in memory."""
    if a.inner == 1:
        return tensor.channel == 1
    return tensor.inner == 1 and (a.slice_channels == 1 or tensor.channel == a.inner)


@device
def row_of(a, like, tensor, row, first, column):
    """Return the address of a row, from `column` of channel `first` on, of a tensor in order."""
    at = tensor.start + row * a.wide * tensor.outer + first * tensor.channel + column
    return tensor.address + np.uint64(at * size_of(like))


@inner
def load_row(a, like, tensor, row, first, column, count, line):
    """Return the address of `count` numbers of a row, to compute with: in memory, or `line`, where they are copied."""
    if in_order(a, tensor):
        address = row_of(a, like, tensor, row, first, column)
        if size_of(like) > 2:
            return address
        _gather(like, address, 0, 1, line, count)
        return line
    at, size = tensor.start + row * a.wide * tensor.outer + first * tensor.channel, size_of(accumulator(like))
    if a.inner == 1:
        _gather(like, tensor.address, at + column * tensor.channel, tensor.channel, line, count)
        return line
    if column + count <= a.inner:
        _gather(like, tensor.address, at + column * tensor.inner, tensor.inner, line, count)
        return line
    for number in range(count // a.inner):
        out = line + np.uint64(number * a.inner * size)
        _gather(like, tensor.address, at + number * tensor.channel, tensor.inner, out, a.inner)
    return line


@inner
def copy_line(like, source, out, count):
    """Copy a line."""
    line, copy = numbers(like, source, 0, count), numbers(like, out, 0, count)
    for i in range(count):
        copy[i] = line[i]


@inner
def store(like, out, source, count):
    """Write a line to the address of an output's row."""
    line, copy = numbers(accumulator(like), source, 0, count), numbers(like, out, 0, count)
    for i in range(count):
        copy[i] = as_stored(line[i], like)


@inner
def store_zeros(like, out, count):
    """Write zeros to the address of an output's row."""
    zeros, zero = numbers(like, out, 0, count), as_stored(0.0, like)
    for i in range(count):
        zeros[i] = zero


@inner
def spread(values, channels, inner, out):
    """Write to each column the number of its channel; of a piece of a single channel all are equal."""
    if channels == 1:
        for i in range(len(out)):
            out[i] = values[0]
        return
    done = min(channels * inner, len(out))
    if inner == 1:
        for i in range(done):
            out[i] = values[i]
    else:
        for channel in range(channels):
            run, value = part(out, channel * inner, inner), values[channel]
            for i in range(inner):
                run[i] = value
    while done < len(out):  # joined rows
        count = min(done, len(out) - done)
        copy = part(out, done, count)
        for i in range(count):
            copy[i] = out[i]
        done += count


@device
def valid(a, group, outer, inner):
    """Return whether a position counts."""
    at = group * a.mask_group + outer * a.mask_outer + inner * a.mask_inner
    return a.mask == 0 or int8s(a.mask, at, 1)[0] != 0


@device
def skipped(a, group, row):
    """Return whether no position of a row counts: a row is one position, or has to be looked at by `clear`."""
    return a.mask != 0 and a.inner == 1 and not valid(a, group, row, 0)


@device
def to_be_cleared(a):
    """Return whether some columns of a row may count and others not."""
    return a.mask != 0 and a.inner > 1


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
def input_of(address, group, strides):
    """Return a group of an input."""
    return Tensor(address, group * strides[0], strides[1], strides[2], strides[3])


@device
def output_of(a, address, group):
    """Return a group of an output, which lies in C order."""
    size = a.channels * a.inner
    return Tensor(address, group * a.outer * size, size, a.inner, 1)


@device
def own_columns(a, row, count):
    """Return the columns of a row of a piece: the last of joined rows may be shorter."""
    return min(count, (a.outer - row * a.wide) * a.channels * a.inner) if a.wide > 1 else count
