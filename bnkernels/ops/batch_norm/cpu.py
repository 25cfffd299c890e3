"""CPU kernels of batch norm: forward, backward, inference and the stages of both.

Forward    y = phi(((x - mean) - mean_low) scale + shift + residual), and 0 where the mask is False,
           with scale = gamma rstd r and shift = gamma d + beta
Backward   g = phi'(z) dy, dbeta = sum g, dgamma = r rstd sum g (x - mean) + d sum g, dresidual = g,
           dx = scale (g - sum g / N - (x - mean) rstd^2 sum g (x - mean) / N)
Arrays     those of ``cuda/batch_norm_*_masked_grouped.cu``, in the same struct, its scalars in float64
Calls      one that forms all sums of some slices and one that writes their outputs, while their rows are in the cache
Tasks      slices of channels, which share nothing; where there are few, blocks of rows, whose sums are merged in order
Traffic    x, and in the backward dy, are read once where the rows of a slice fit into the cache, else twice (float64:
           three times); y, dx and dresidual are written once
Numerics   numbers in the accumulator's type; sums, and dx, in float64; float64 data are summed about a first mean, with
           what rounding loses
Bits       depend on shapes and strides alone: neither on the number of threads nor on a column's place
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.activations_cpu import activate, differentiate
from bnkernels.ops.batch_norm import cpu_rows as lines_of
from bnkernels.ops.batch_norm.cpu_rows import (
    DOUBLE,
    FLOAT32,
    FLOAT64,
    SINGLE,
    STORAGE,
    TOGETHER,
    Tensor,
    add_product,
    add_product_exactly,
    add_products,
    add_row,
    add_row_exactly,
    add_rows,
    add_sums,
    clear,
    copy_line,
    count_valid,
    fold,
    get,
    line_of,
    load_row,
    piece_length,
    put,
    slices_of,
    spread,
    store,
    valid,
)
from bnkernels.ops.batch_norm.launch import ARGUMENTS
from bnkernels.ops.batch_norm.problem import Plan, Problem, Stage
from bnkernels.runtime.arguments import pack
from bnkernels.runtime.cpu.language import LINE, device, kernel, numbers, part, stack
from bnkernels.runtime.cpu.threads import WORTH_SHARING, share

WHOLE, COLLECT, APPLY, FROZEN = (int(stage) for stage in Stage)
ALL, CHOOSE, SUM, CENTRE, CONCLUDE = range(5)  # steps of the sums: all, or one for every block before the next
MOST_BLOCKS, BLOCK = 16, 2**17  # blocks of rows, and the numbers that each has at least
FEW_SLICES = 4  # up to which rows are divided among threads, and not slices
IN_CACHE = 2**17  # numbers of the slices that are summed before their output is written
# Rows of the state of a group, one number for a channel each; the last four once for every block.
SHIFT, UNIT, SUMS, SQUARES, RESTS, SQUARE_RESTS, OF_BLOCK = 0, 1, 2, 3, 4, 5, 4
SMALL_UNIT = 2.0**-64  # units in which a float64 sum that overflows is formed anew
# Lines of a normalisation, a number for a channel each, see `_normalise`.
MEAN, LOW, SCALE, SCALE_SHIFT, SLOPE, BEND, RSTD = range(7)


# How a call is divided, behind the members of the CUDA twin's argument.
DIVISION = "storage", "wide", "rows", "slice_channels", "slices", "blocks"
LAYOUTS = {
    direction: np.dtype(
        [(name, twin[np.dtype(np.float64)][name]) for name in twin[np.dtype(np.float64)].names]
        + [(name, np.int64) for name in DIVISION],
        align=True,
    )
    for direction in ("forward", "backward")
    for twin in (ARGUMENTS[f"{direction}_masked_grouped"],)
}


@device
def _input(a, address, group, strides):
    """Return a group of an input."""
    return Tensor(address, a.storage, group * strides[0], strides[1], strides[2], strides[3])


@device
def _output(a, address, group):
    """Return a group of an output, which lies in C order."""
    size = a.channels * a.inner
    return Tensor(address, a.storage, group * a.outer * size, size, a.inner, 1)


@device
def _own_columns(a, row, count):
    """Return the columns of a row of a piece: the last of joined rows may be shorter."""
    return min(count, (a.outer - row * a.wide) * a.channels * a.inner) if a.wide > 1 else count


@device
def _quantity(a, state, group, row, first, channels):
    """Return a row of the state for the channels of a slice."""
    rows = SUMS + OF_BLOCK * a.blocks
    return part(state, (group * rows + row) * a.channels + first, channels)


@device
def _rows_before(a, block):
    """Return the first row of a block: whole groups of rows that are summed together."""
    step = (a.rows + a.blocks * TOGETHER - 1) // (a.blocks * TOGETHER) * TOGETHER
    return min(a.rows, block * step)


@device
def _accumulator(a):
    """Return the storage of statistics and parameters."""
    return FLOAT64 if a.storage == FLOAT64 else FLOAT32


@kernel
def _choose_shift(a, x, group, first, shift, unit):
    """Write a number near the mean of each channel: the middle one of three, so that no outlier is taken."""
    size = a.outer * a.inner
    places = stack(np.int64(0), 3)
    for number in range(3):
        position = number * (size - 1) // 2
        while position < size - 1 and not valid(a, group, position // a.inner, position % a.inner):
            position += 1
        while position > 0 and not valid(a, group, position // a.inner, position % a.inner):
            position -= 1
        places[number] = x.start + position // a.inner * x.outer + position % a.inner * x.inner
    for i in range(len(shift)):
        of_channel = (first + i) * x.channel
        low = get(x.address, x.storage, places[0] + of_channel)
        high = get(x.address, x.storage, places[1] + of_channel)
        if low > high:
            low, high = high, low
        middle = max(low, min(high, get(x.address, x.storage, places[2] + of_channel)))
        shift[i] = middle if np.isfinite(middle) else 0.0
        unit[i] = 1.0


@kernel
def _spread_sums(a, channels, shift, unit, low, columns, count):
    """Begin the sums of a piece."""
    spread(shift, channels, a.inner, part(columns, lines_of.SHIFT, count))
    spread(unit, channels, a.inner, part(columns, lines_of.UNIT, count))
    spread(low, channels, a.inner, part(columns, lines_of.LOW, count))
    for line in (lines_of.SUMS, lines_of.SQUARES, lines_of.RESTS, lines_of.SQUARE_RESTS):
        sums = part(columns, line, count)
        for i in range(count):
            sums[i] = 0.0


@kernel
def _fold_sums(a, columns, count, sums, squares, rests, square_rests):
    """Add the sums of a piece to those of its channels."""
    channels = len(sums)
    fold(part(columns, lines_of.SUMS, LINE), part(columns, lines_of.RESTS, LINE), channels, a.inner, count, sums, rests)
    of_squares, of_rests = part(columns, lines_of.SQUARES, LINE), part(columns, lines_of.SQUARE_RESTS, LINE)
    fold(of_squares, of_rests, channels, a.inner, count, squares, square_rests)


@kernel
def _sum(arguments, x, group, first, channels, block, state):
    """Write the sums of the channels of a slice about their shift, over the rows of a block."""
    a = arguments[()]
    lines, columns, waiting = stack(1.0, 8192), stack(1.0, 7168), stack(np.uint64(0), 8)
    shift = _quantity(a, state, group, SHIFT, first, channels)
    unit = _quantity(a, state, group, UNIT, first, channels)
    sums = _quantity(a, state, group, SUMS + block * OF_BLOCK, first, channels)
    squares = _quantity(a, state, group, SQUARES + block * OF_BLOCK, first, channels)
    rests = _quantity(a, state, group, RESTS + block * OF_BLOCK, first, channels)
    square_rests = _quantity(a, state, group, SQUARE_RESTS + block * OF_BLOCK, first, channels)
    for i in range(channels):
        sums[i], squares[i], rests[i], square_rests[i] = 0.0, 0.0, 0.0, 0.0
    exact, masked = x.storage == FLOAT64, a.mask != 0
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    for column in range(0, whole, length):
        count, found = min(length, whole - column), 0
        _spread_sums(a, channels, shift, unit, unit, columns, count)
        for row in range(_rows_before(a, block), _rows_before(a, block + 1)):
            if masked and a.inner == 1 and not valid(a, group, row, 0):
                continue
            own, line = _own_columns(a, row, count), line_of(lines, found)
            values = load_row(a, x, row, first, column, own, line)
            if masked and a.inner > 1:
                if exact:
                    copy_line(DOUBLE, values, line, own)
                    clear(a, DOUBLE, group, row, column, part(columns, lines_of.SHIFT, own), line, own)
                else:
                    copy_line(SINGLE, values, line, own)
                    clear(a, SINGLE, group, row, column, part(columns, lines_of.SHIFT, own), line, own)
                values = line
            if exact:
                add_row_exactly(values, own, columns)
            elif own < count:
                add_row(values, own, columns)
            else:
                waiting[found] = values
                found += 1
                if found == TOGETHER:
                    add_rows(waiting, count, columns)
                    found = 0
        for number in range(found):
            add_row(waiting[number], count, columns)
        _fold_sums(a, columns, count, sums, squares, rests, square_rests)


@kernel
def _merge(arguments, group, first, channels, state):
    """Add the sums of all blocks, in order, to those of the first one."""
    a = arguments[()]
    for block in range(1, a.blocks):
        for quantity in (SUMS, SQUARES):
            rest, of_block = quantity + RESTS - SUMS, block * OF_BLOCK
            sums = _quantity(a, state, group, quantity, first, channels)
            rests = _quantity(a, state, group, rest, first, channels)
            more = _quantity(a, state, group, quantity + of_block, first, channels)
            add_sums(more, _quantity(a, state, group, rest + of_block, first, channels), sums, rests)


@kernel
def _recentre(arguments, group, first, channels, count, state):
    """Move the shift to the mean that was found; where the sum overflowed, form it in smaller units."""
    a = arguments[()]
    shift = _quantity(a, state, group, SHIFT, first, channels)
    unit = _quantity(a, state, group, UNIT, first, channels)
    sums = _quantity(a, state, group, SUMS, first, channels)
    rests = _quantity(a, state, group, RESTS, first, channels)
    for i in range(channels):
        mean = shift[i] + (sums[i] + rests[i]) / max(count, 1)
        if np.isfinite(mean):
            shift[i] = mean
        else:
            unit[i] = SMALL_UNIT


@device
def _move(a, address, storage, at, new):
    """Move a running statistic."""
    put(address, storage, at, (1.0 - a.momentum) * get(address, storage, at) + a.momentum * new)


@kernel
def _conclude_forward(arguments, group, first, channels, count, state):
    """Write what the sums of a slice say: moments, or statistics and running statistics."""
    a = arguments[()]
    acc, step = _accumulator(a), a.channels
    shift = _quantity(a, state, group, SHIFT, first, channels)
    unit = _quantity(a, state, group, UNIT, first, channels)
    sums = _quantity(a, state, group, SUMS, first, channels)
    squares = _quantity(a, state, group, SQUARES, first, channels)
    rests = _quantity(a, state, group, RESTS, first, channels)
    square_rests = _quantity(a, state, group, SQUARE_RESTS, first, channels)
    for i in range(channels):
        distance = (sums[i] + rests[i]) / max(count, 1)
        m2 = (squares[i] + square_rests[i]) - (sums[i] + rests[i]) * distance
        m2 = 0.0 if m2 < 0.0 else m2 / unit[i] / unit[i]
        distance /= unit[i]
        some = count > 0
        at = first + i if a.stage == COLLECT else (group * a.statistic_rows) * step + first + i
        out = a.moments + np.uint64(step * (8 if acc == FLOAT64 else 4)) if a.stage == COLLECT else a.statistics
        put(out, acc, at, shift[i] + distance if some else 0.0)
        mean = get(out, acc, at)
        put(out, acc, at + step, (shift[i] - mean) + distance if some else 0.0)
        if a.stage == COLLECT:
            put(a.moments, acc, at, np.float64(count))
            put(out, acc, at + 2 * step, m2 if some else 0.0)
            continue
        low = get(out, acc, at + step)
        put(out, acc, at + 2 * step, m2 / max(count, 1))  # rounded as the variance is
        put(out, acc, at + 2 * step, 1.0 / np.sqrt(get(out, acc, at + 2 * step) + a.eps) if some else 0.0)
        running = group * step + first + i
        if a.statistic_rows == 5:
            r, d = 1.0, 0.0
            if some:
                running_rstd = 1.0 / np.sqrt(get(a.running_var, acc, running) + a.eps)
                r = min(max(running_rstd / get(out, acc, at + 2 * step), 1.0 / a.r_max), a.r_max)
                d = ((mean - get(a.running_mean, acc, running)) + low) * running_rstd
                d = min(max(d, -a.d_max), a.d_max)
            put(out, acc, at + 3 * step, r)
            put(out, acc, at + 4 * step, d)
        if some and a.running_mean != 0:
            _move(a, a.running_mean, acc, running, mean + low)
        if count > a.correction and a.running_var != 0:
            _move(a, a.running_var, acc, running, m2 / (count - a.correction))


@kernel
def _normalise(arguments, group, first, channels, normalisation):
    """Write the normalisation of each channel, from the statistics as they are kept, or the running ones.

    In lines: mean, mean_low, scale and shift of ``y = phi(((x - mean) - mean_low) scale + shift)``; and of the backward
    the factors of ``dgamma = slope sum g (x - mean) + bend sum g``, and rstd.
    """
    a = arguments[()]
    acc, step = _accumulator(a), a.channels
    of_parameters = a.storage if a.params_in_storage_type else acc
    for i in range(channels):
        channel = first + i
        r, bend, low = 1.0, 0.0, 0.0
        if a.stage == FROZEN:
            mean = get(a.running_mean, acc, group * step + channel)
            rstd = 1.0 / np.sqrt(get(a.running_var, acc, group * step + channel) + a.eps)
        else:
            at = group * a.statistic_rows * step + channel
            mean, low = get(a.statistics, acc, at), get(a.statistics, acc, at + step)
            rstd = get(a.statistics, acc, at + 2 * step)
            if a.statistic_rows == 5:
                r, bend = get(a.statistics, acc, at + 3 * step), get(a.statistics, acc, at + 4 * step)
        gamma = get(a.gamma, of_parameters, channel) if a.gamma != 0 else 1.0
        beta = get(a.beta, of_parameters, channel) if a.beta != 0 else 0.0
        normalisation[MEAN * LINE + i], normalisation[LOW * LINE + i] = mean, low
        normalisation[SCALE * LINE + i], normalisation[SCALE_SHIFT * LINE + i] = gamma * rstd * r, gamma * bend + beta
        normalisation[SLOPE * LINE + i], normalisation[BEND * LINE + i] = rstd * r, bend
        normalisation[RSTD * LINE + i] = rstd


@kernel
def _spread_normalisation(a, like, normalisation, channels, count, columns):
    """Write mean, mean_low, scale and shift of each column of a piece, in the accumulator's type."""
    line = stack(1.0, 1024)
    for number in range(4):
        values, out = part(line, 0, count), numbers(like, line_of(columns, number), 0, count)
        spread(part(normalisation, number * LINE, channels), channels, a.inner, values)
        for i in range(count):
            out[i] = values[i]


@kernel
def _before_activation(like, row, added, columns, out, count):
    """Write the argument of the activation to an address; `added` is 0 where there is no residual."""
    x, z, residual = numbers(like, row, 0, count), numbers(like, out, 0, count), numbers(like, added, 0, count)
    mean, low = numbers(like, line_of(columns, MEAN), 0, count), numbers(like, line_of(columns, LOW), 0, count)
    scale, shift = numbers(like, line_of(columns, SCALE), 0, count), numbers(like, line_of(columns, SCALE_SHIFT), 0, count)
    if added == 0:
        for i in range(count):
            z[i] = ((x[i] - mean[i]) - low[i]) * scale[i] + shift[i]
    else:
        for i in range(count):
            z[i] = (((x[i] - mean[i]) - low[i]) * scale[i] + shift[i]) + residual[i]


@device
def _place(a, tensor, row, first, column):
    """Return the place of a row of an output, in numbers."""
    return tensor.start + row * a.wide * tensor.outer + first * tensor.channel + column


@kernel
def _write_slice(arguments, x, residual, y, group, first, channels, block):
    """Write the rows of a block of a slice of the output."""
    a = arguments[()]
    lines, columns, normalisation = stack(1.0, 4096), stack(1.0, 4096), stack(1.0, 7168)
    double, masked = x.storage == FLOAT64, a.mask != 0
    z, nothing = line_of(lines, 0), part(lines, 3 * LINE, LINE)
    for i in range(LINE):
        nothing[i] = 0.0
    # In place a row is computed in a line: what may overlap is not vectorised.
    direct = y.storage <= FLOAT64 and y.address != x.address and y.address != residual.address
    _normalise(arguments, group, first, channels, normalisation)
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    for column in range(0, whole, length):
        count = min(length, whole - column)
        if double:
            _spread_normalisation(a, DOUBLE, normalisation, channels, count, columns)
        else:
            _spread_normalisation(a, SINGLE, normalisation, channels, count, columns)
        for row in range(_rows_before(a, block), _rows_before(a, block + 1)):
            own, place = _own_columns(a, row, count), _place(a, y, row, first, column)
            if masked and a.inner == 1 and not valid(a, group, row, 0):
                store(y.address, y.storage, place, line_of(lines, 3), own)
                continue
            values = load_row(a, x, row, first, column, own, line_of(lines, 1))
            added = residual.address
            if added != 0:
                added = load_row(a, residual, row, first, column, own, line_of(lines, 2))
            if direct:
                z = y.address + np.uint64(place * (8 if double else 4))
            if double:
                _before_activation(DOUBLE, values, added, columns, z, own)
                activate(a.activation, a.alpha, numbers(DOUBLE, z, 0, own))
            else:
                _before_activation(SINGLE, values, added, columns, z, own)
                activate(a.activation, np.float32(a.alpha), numbers(SINGLE, z, 0, own))
            if masked and a.inner > 1:
                if double:
                    clear(a, DOUBLE, group, row, column, nothing, z, own)
                else:
                    clear(a, SINGLE, group, row, column, nothing, z, own)
            if not direct:
                store(y.address, y.storage, place, z, own)


@kernel
def _statistics(arguments, counts, state, step, first_task, last_task):
    """Form the statistics of slices; or with several blocks of rows make one step, whose tasks are these."""
    a = arguments[()]
    several = a.blocks > 1
    for group in range(a.groups):
        x = _input(a, a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
        count = counts[group]
        for number in range(0 if several else first_task, a.slices if several else last_task):
            first = number * a.slice_channels
            channels = min(a.slice_channels, a.channels - first)
            if step in (ALL, CHOOSE):
                shift = _quantity(a, state, group, SHIFT, first, channels)
                _choose_shift(a, x, group, first, shift, _quantity(a, state, group, UNIT, first, channels))
            if step in (ALL, SUM):
                blocks = range(first_task, last_task) if several else range(1)
                for again in range(2 if step == ALL and a.storage == FLOAT64 else 1):
                    if again:
                        _recentre(arguments, group, first, channels, count, state)
                    for block in blocks:
                        _sum(arguments, x, group, first, channels, block, state)
            if step in (CENTRE, CONCLUDE):
                _merge(arguments, group, first, channels, state)
            if step == CENTRE:
                _recentre(arguments, group, first, channels, count, state)
            if step in (ALL, CONCLUDE):
                _conclude_forward(arguments, group, first, channels, count, state)


@kernel
def _write(arguments, counts, state, first_task, last_task):
    """Write the output of slices, or with several blocks of blocks of rows."""
    a = arguments[()]
    several = a.blocks > 1
    for group in range(a.groups):
        x = _input(a, a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
        strides = a.residual_group, a.residual_outer, a.residual_channel, a.residual_inner
        residual, y = _input(a, a.residual, group, strides), _output(a, a.y, group)
        for number in range(0 if several else first_task, a.slices if several else last_task):
            first = number * a.slice_channels
            channels = min(a.slice_channels, a.channels - first)
            for block in range(first_task if several else 0, last_task if several else 1):
                _write_slice(arguments, x, residual, y, group, first, channels, block)


@kernel
def _gradient(a, dy, x, residual, group, row, first, column, own, columns, lines):
    """Return the addresses of a row of g, the gradient before the activation, and of the row of x.

    Where the mask is False, g is 0 and x is the mean, whatever they hold.
    """
    double = x.storage == FLOAT64
    values = load_row(a, x, row, first, column, own, line_of(lines, 1))
    g = load_row(a, dy, row, first, column, own, line_of(lines, 0))
    curved, masked = a.activation != 0 or a.alpha != 1.0, a.mask != 0 and a.inner > 1
    if (curved or masked) and g != line_of(lines, 0):
        if double:
            copy_line(DOUBLE, g, line_of(lines, 0), own)
        else:
            copy_line(SINGLE, g, line_of(lines, 0), own)
        g = line_of(lines, 0)
    if curved:
        added, z = residual.address, line_of(lines, 2)
        if added != 0:
            added = load_row(a, residual, row, first, column, own, line_of(lines, 3))
        if double:
            _before_activation(DOUBLE, values, added, columns, z, own)
            differentiate(a.activation, a.alpha, numbers(DOUBLE, z, 0, own), numbers(DOUBLE, g, 0, own))
        else:
            _before_activation(SINGLE, values, added, columns, z, own)
            differentiate(a.activation, np.float32(a.alpha), numbers(SINGLE, z, 0, own), numbers(SINGLE, g, 0, own))
    if masked:
        nothing = part(lines, 3 * LINE, own)
        for i in range(own):
            nothing[i] = 0.0
        if double:
            copy_line(DOUBLE, values, line_of(lines, 1), own)
            clear(a, DOUBLE, group, row, column, nothing, g, own)
            clear(a, DOUBLE, group, row, column, numbers(DOUBLE, line_of(columns, 0), 0, own), line_of(lines, 1), own)
        else:
            copy_line(SINGLE, values, line_of(lines, 1), own)
            clear(a, SINGLE, group, row, column, nothing, g, own)
            clear(a, SINGLE, group, row, column, numbers(SINGLE, line_of(columns, 0), 0, own), line_of(lines, 1), own)
        values = line_of(lines, 1)
    return g, values


@kernel
def _sum_gradients(arguments, dy, x, residual, group, first, channels, block, state):
    """Write the sums of g and of g (x - mean) of the channels of a slice, over the rows of a block."""
    a = arguments[()]
    lines, columns, sums_of = stack(1.0, 16384), stack(1.0, 4096), stack(1.0, 7168)
    normalisation, waiting, waiting_x = stack(1.0, 7168), stack(np.uint64(0), 4), stack(np.uint64(0), 4)
    sums = _quantity(a, state, group, SUMS + block * OF_BLOCK, first, channels)
    squares = _quantity(a, state, group, SQUARES + block * OF_BLOCK, first, channels)
    rests = _quantity(a, state, group, RESTS + block * OF_BLOCK, first, channels)
    square_rests = _quantity(a, state, group, SQUARE_RESTS + block * OF_BLOCK, first, channels)
    unit = _quantity(a, state, group, UNIT, first, channels)
    exact = x.storage == FLOAT64
    _normalise(arguments, group, first, channels, normalisation)
    mean, low = part(normalisation, MEAN * LINE, channels), part(normalisation, LOW * LINE, channels)
    shift = part(normalisation, RSTD * LINE, channels)
    for i in range(channels):
        sums[i], squares[i], rests[i], square_rests[i] = 0.0, 0.0, 0.0, 0.0
        shift[i] = mean[i] if exact else mean[i] + low[i]
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    for column in range(0, whole, length):
        count, found = min(length, whole - column), 0
        _spread_sums(a, channels, shift, unit, low, sums_of, count)
        if exact:
            _spread_normalisation(a, DOUBLE, normalisation, channels, count, columns)
        else:
            _spread_normalisation(a, SINGLE, normalisation, channels, count, columns)
        for row in range(_rows_before(a, block), _rows_before(a, block + 1)):
            if a.mask != 0 and a.inner == 1 and not valid(a, group, row, 0):
                continue
            own, own_lines = _own_columns(a, row, count), part(lines, found * 4 * LINE, 4 * LINE)
            g, values = _gradient(a, dy, x, residual, group, row, first, column, own, columns, own_lines)
            if exact:
                add_product_exactly(g, values, own, sums_of)
            elif own < count:
                add_product(g, values, own, sums_of)
            else:
                waiting[found], waiting_x[found] = g, values
                found += 1
                if found == 4:
                    add_products(waiting, waiting_x, count, sums_of)
                    found = 0
        for number in range(found):
            add_product(waiting[number], waiting_x[number], count, sums_of)
        _fold_sums(a, sums_of, count, sums, squares, rests, square_rests)


@kernel
def _conclude_backward(arguments, first, channels, counts, state):
    """Write dgamma and dbeta of a slice, over all groups; or the sums, with the count."""
    a = arguments[()]
    acc, step = _accumulator(a), a.channels
    of_parameters = a.storage if a.params_in_storage_type else acc
    normalisation = stack(1.0, 7168)
    slope, bend = part(normalisation, SLOPE * LINE, channels), part(normalisation, BEND * LINE, channels)
    rstd = part(normalisation, RSTD * LINE, channels)
    dgamma, dbeta = stack(1.0, 1024), stack(1.0, 1024)
    for i in range(channels):
        dgamma[i], dbeta[i] = 0.0, 0.0
    for group in range(a.groups):
        _normalise(arguments, group, first, channels, normalisation)
        unit = _quantity(a, state, group, UNIT, first, channels)
        sums = _quantity(a, state, group, SUMS, first, channels)
        squares = _quantity(a, state, group, SQUARES, first, channels)
        rests = _quantity(a, state, group, RESTS, first, channels)
        square_rests = _quantity(a, state, group, SQUARE_RESTS, first, channels)
        for i in range(channels):
            sums[i], squares[i] = sums[i] + rests[i], squares[i] + square_rests[i]
            dbeta[i] += sums[i] / unit[i]
            dgamma[i] += squares[i] / unit[i] * slope[i] + (bend[i] * (sums[i] / unit[i]) if bend[i] != 0.0 else 0.0)
            if a.stage == COLLECT:
                put(a.sums, acc, first + i, sums[i] / unit[i])
                put(a.sums, acc, first + i + step, squares[i] / unit[i] * rstd[i])
                put(a.sums, acc, first + i + 2 * step, np.float64(counts[group]))
    if a.stage != COLLECT:
        for i in range(channels):
            put(a.dgamma, of_parameters, first + i, dgamma[i])
            put(a.dbeta, of_parameters, first + i, dbeta[i])


@kernel
def _gradient_of_input(like, g, row, columns, means, out, count):
    """Write a row of dx to an address: ``scale (g - mean of g - (x - mean) slope)``, computed in float64."""
    gradient, x, dx = numbers(like, g, 0, count), numbers(like, row, 0, count), numbers(like, out, 0, count)
    mean, low, scale = part(means, 0, count), part(means, LINE, count), part(means, 2 * LINE, count)
    mean_g, slope = part(means, 3 * LINE, count), part(means, 4 * LINE, count)
    for i in range(count):
        centred = (np.float64(x[i]) - mean[i]) - low[i]
        dx[i] = scale[i] * ((np.float64(gradient[i]) - mean_g[i]) - centred * slope[i])


@kernel
def _write_gradients(arguments, dy, x, residual, dx, dresidual, group, first, channels, count_of_group, block, state):
    """Write the rows of a block of a slice of dx and dresidual."""
    a = arguments[()]
    lines, columns, means = stack(1.0, 6144), stack(1.0, 4096), stack(1.0, 5120)
    normalisation, slope, mean_g = stack(1.0, 7168), stack(1.0, 1024), stack(1.0, 1024)
    acc, step, double, masked = _accumulator(a), a.channels, x.storage == FLOAT64, a.mask != 0
    nothing = part(lines, 5 * LINE, LINE)
    for i in range(LINE):
        nothing[i] = 0.0
    _normalise(arguments, group, first, channels, normalisation)
    for i in range(channels):
        mean_g[i], slope[i] = 0.0, 0.0
        rstd = normalisation[RSTD * LINE + i]
        if a.stage == APPLY:
            divisor = max(get(a.sums, acc, first + i + 2 * step), 1.0)
            mean_g[i] = get(a.sums, acc, first + i) / divisor
            slope[i] = get(a.sums, acc, first + i + step) * rstd / divisor
        elif a.stage == WHOLE:
            unit = _quantity(a, state, group, UNIT, first, channels)[i]
            divisor = np.float64(max(count_of_group, 1))
            mean_g[i] = _quantity(a, state, group, SUMS, first, channels)[i] / divisor / unit
            slope[i] = _quantity(a, state, group, SQUARES, first, channels)[i] / divisor / unit * rstd * rstd
    direct = dx.storage <= FLOAT64 and dx.address != x.address and dx.address != dy.address
    direct = direct and dx.address != residual.address
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    for column in range(0, whole, length):
        count = min(length, whole - column)
        if double:
            _spread_normalisation(a, DOUBLE, normalisation, channels, count, columns)
        else:
            _spread_normalisation(a, SINGLE, normalisation, channels, count, columns)
        for number in range(3):
            spread(part(normalisation, number * LINE, channels), channels, a.inner, part(means, number * LINE, count))
            if a.stage == FROZEN and number < SCALE:  # dx does not depend on x
                spread(part(mean_g, 0, channels), channels, a.inner, part(means, number * LINE, count))
        spread(part(mean_g, 0, channels), channels, a.inner, part(means, 3 * LINE, count))
        spread(part(slope, 0, channels), channels, a.inner, part(means, 4 * LINE, count))
        for row in range(_rows_before(a, block), _rows_before(a, block + 1)):
            own, place = _own_columns(a, row, count), _place(a, dx, row, first, column)
            if masked and a.inner == 1 and not valid(a, group, row, 0):
                store(dx.address, dx.storage, place, line_of(lines, 5), own)
                if dresidual.address != 0:
                    store(dresidual.address, dresidual.storage, place, line_of(lines, 5), own)
                continue
            g, values = _gradient(a, dy, x, residual, group, row, first, column, own, columns, lines)
            if dresidual.address != 0:
                store(dresidual.address, dresidual.storage, place, g, own)
            if a.stage == FROZEN:
                values = line_of(lines, 5)
            out = dx.address + np.uint64(place * (8 if double else 4)) if direct else line_of(lines, 4)
            if double:
                _gradient_of_input(DOUBLE, g, values, columns, means, out, own)
            else:
                _gradient_of_input(SINGLE, g, values, columns, means, out, own)
            if masked and a.inner > 1:
                if double:
                    clear(a, DOUBLE, group, row, column, nothing, out, own)
                else:
                    clear(a, SINGLE, group, row, column, nothing, out, own)
            if not direct:
                store(dx.address, dx.storage, place, out, own)


@device
def _inputs(a, group):
    """Return dy, x and the residual."""
    strides = a.residual_group, a.residual_outer, a.residual_channel, a.residual_inner
    dy = _input(a, a.dy, group, (a.dy_group, a.dy_outer, a.dy_channel, a.dy_inner))
    x = _input(a, a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
    return dy, x, _input(a, a.residual, group, strides)


@kernel
def _gradient_sums(arguments, counts, state, step, first_task, last_task):
    """Form the sums of slices; or with several blocks of rows make one step, whose tasks are these."""
    a = arguments[()]
    several = a.blocks > 1
    for number in range(0 if several else first_task, a.slices if several else last_task):
        first = number * a.slice_channels
        channels = min(a.slice_channels, a.channels - first)
        for group in range(a.groups):
            dy, x, residual = _inputs(a, group)
            unit = _quantity(a, state, group, UNIT, first, channels)
            shift = _quantity(a, state, group, SHIFT, first, channels)
            if step in (ALL, CHOOSE):
                for i in range(channels):
                    shift[i], unit[i] = 0.0, 1.0
            if step in (ALL, SUM):
                blocks = range(first_task, last_task) if several else range(1)
                for again in range(2 if step == ALL and a.storage == FLOAT64 else 1):
                    if again:
                        _recentre(arguments, group, first, channels, counts[group], state)
                    for block in blocks:
                        _sum_gradients(arguments, dy, x, residual, group, first, channels, block, state)
            if step in (CENTRE, CONCLUDE):
                _merge(arguments, group, first, channels, state)
            if step == CENTRE:
                _recentre(arguments, group, first, channels, counts[group], state)
        if step in (ALL, CONCLUDE):
            _conclude_backward(arguments, first, channels, counts, state)


@kernel
def _input_gradients(arguments, counts, state, first_task, last_task):
    """Write dx and dresidual of slices, or with several blocks of blocks of rows."""
    a = arguments[()]
    several = a.blocks > 1
    for group in range(a.groups):
        dy, x, residual = _inputs(a, group)
        dx, dresidual = _output(a, a.dx, group), _output(a, a.dresidual, group)
        for number in range(0 if several else first_task, a.slices if several else last_task):
            first = number * a.slice_channels
            channels = min(a.slice_channels, a.channels - first)
            for block in range(first_task if several else 0, last_task if several else 1):
                _write_gradients(
                    arguments, dy, x, residual, dx, dresidual, group, first, channels, counts[group], block, state
                )


@kernel
def _count_all(arguments, counts):
    """Write the number of positions that count, of every group."""
    for group in range(len(counts)):
        counts[group] = count_valid(arguments[()], group)


KERNELS = {"forward": (_statistics, _write), "backward": (_gradient_sums, _input_gradients)}


@lru_cache(maxsize=1024)
def _division(problem: Problem, masked: bool) -> tuple[dict[str, int], int]:
    """Return the members that divide a call, and the number of slices whose rows are in the cache together."""
    wide, rows, channels, count = slices_of(problem, masked)
    size, blocks = problem.rows * problem.channels, 1
    if problem.groups == 1 and problem.inner == 1 and count < FEW_SLICES and size >= WORTH_SHARING:
        blocks = min(MOST_BLOCKS, size // BLOCK)
    division = (STORAGE[problem.dtype.name], wide, rows, channels, count, blocks)
    return dict(zip(DIVISION, division, strict=True)), max(1, IN_CACHE * count // (size * problem.groups))


def run(plan: Plan, members: dict[str, Any]) -> None:
    """Compute a pass, from the members of its argument."""
    problem, stage, layout = plan.problem, plan.kind.stage, LAYOUTS[plan.kind.direction]
    division, together = _division(problem, "mask" in members)
    members |= division
    arguments = pack(layout, *[members.get(name, 0) for name in layout.names])
    blocks, slices = division["blocks"], division["slices"]
    size = problem.rows * problem.channels * problem.groups
    counts = np.full(problem.groups, problem.rows)
    if "mask" in members:
        _count_all(arguments, counts)
    state = np.empty(problem.groups * (SUMS + OF_BLOCK * blocks) * problem.channels)
    form, write = KERNELS[plan.kind.direction]
    forms = stage in (Stage.WHOLE, Stage.COLLECT) or (stage == Stage.FROZEN and plan.kind.direction == "backward")
    writes = stage != Stage.COLLECT
    if blocks > 1:
        steps = [(CHOOSE, 1), (SUM, blocks), (CONCLUDE, 1)]
        if problem.dtype == np.float64:
            steps[2:2] = [(CENTRE, 1), (SUM, blocks)]
        for step, tasks in steps if forms else []:
            share(form, tasks, size if tasks > 1 else 0, arguments, counts, state, step)
        if writes:
            share(write, blocks, size, arguments, counts, state)
        return

    def compute(first: int, last: int) -> None:
        for start in range(first, last, together):
            stop = min(last, start + together)
            if forms:
                form(arguments, counts, state, ALL, start, stop)
            if writes:
                write(arguments, counts, state, start, stop)

    share(compute, slices, size)
