"""CPU kernels of the forward of batch norm: the statistics of slices of channels, and their output."""

import numpy as np

from bnkernels.ops.activations_cpu import activate
from bnkernels.ops.batch_norm.cpu.normalisation import (
    COLLECT,
    before_activation,
    normalise,
    rstd_of,
    spread_normalisation,
)
from bnkernels.ops.batch_norm.cpu.rows import (
    DOUBLE,
    FLOAT64,
    SINGLE,
    TOGETHER,
    accumulator_of,
    clear,
    copy_line,
    get_line,
    input_of,
    line_of,
    load_row,
    output_of,
    own_columns,
    piece_length,
    place_of,
    put_line,
    store,
    valid,
)
from bnkernels.ops.batch_norm.cpu.sums import (
    ALL,
    AT_SHIFT,
    CENTRE,
    CHOOSE,
    CONCLUDE,
    OF_BLOCK,
    RESTS,
    SHIFT,
    SQUARE_RESTS,
    SQUARES,
    SUM,
    SUMS,
    UNIT,
    add_row,
    add_row_exactly,
    add_rows,
    begin_sums,
    end_sums,
    merge,
    quantity_of,
    recentre,
    rows_before,
    state_from,
    whole_sum,
)
from bnkernels.runtime.cpu.language import LINE, inner, kernel, numbers, part, stack


@inner
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
    lines = stack(1.0, 2048)
    low, high = part(lines, 0, len(shift)), part(lines, LINE, len(shift))
    get_line(x.address, x.storage, places[0] + first * x.channel, x.channel, low)
    get_line(x.address, x.storage, places[1] + first * x.channel, x.channel, high)
    get_line(x.address, x.storage, places[2] + first * x.channel, x.channel, shift)
    for i in range(len(shift)):
        middle = max(min(low[i], high[i]), min(max(low[i], high[i]), shift[i]))
        shift[i] = middle if np.isfinite(middle) else 0.0
        unit[i] = 1.0


@inner
def _sum(arguments, x, group, first, channels, block, state):
    """Write the sums of the channels of a slice about their shift, over the rows of a block."""
    a = arguments[()]
    lines, columns, waiting = stack(1.0, 8192), stack(1.0, 7168), stack(np.uint64(0), 8)
    shift = quantity_of(a, state, group, SHIFT, first, channels)
    unit = quantity_of(a, state, group, UNIT, first, channels)
    sums = quantity_of(a, state, group, SUMS + block * OF_BLOCK, first, channels)
    squares = quantity_of(a, state, group, SQUARES + block * OF_BLOCK, first, channels)
    rests = quantity_of(a, state, group, RESTS + block * OF_BLOCK, first, channels)
    square_rests = quantity_of(a, state, group, SQUARE_RESTS + block * OF_BLOCK, first, channels)
    for i in range(channels):
        sums[i], squares[i], rests[i], square_rests[i] = 0.0, 0.0, 0.0, 0.0
    exact, masked = x.storage == FLOAT64, a.mask != 0
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    begin_sums(a, channels, shift, unit, unit, columns, length)  # all pieces of a single channel share them
    found = 0
    for row in range(rows_before(a, block), rows_before(a, block + 1)):
        if masked and a.inner == 1 and not valid(a, group, row, 0):
            continue
        for column in range(0, whole, length):
            count, line = own_columns(a, row, min(length, whole - column)), line_of(lines, found)
            values = load_row(a, x, row, first, column, count, line)
            if masked and a.inner > 1:
                if exact:
                    copy_line(DOUBLE, values, line, count)
                    clear(a, DOUBLE, group, row, column, part(columns, AT_SHIFT, count), line, count)
                else:
                    copy_line(SINGLE, values, line, count)
                    clear(a, SINGLE, group, row, column, part(columns, AT_SHIFT, count), line, count)
                values = line
            if exact:
                add_row_exactly(values, count, columns)
            elif count < length:
                add_row(values, count, columns)
            else:
                waiting[found] = values
                found += 1
                if found == TOGETHER:
                    add_rows(waiting, length, columns)
                    found = 0
    for number in range(found):
        add_row(waiting[number], length, columns)
    end_sums(a, columns, length, sums, squares, rests, square_rests)


@inner
def _move(a, address, at, new):
    """Move a running statistic."""
    acc, running = accumulator_of(a), part(stack(1.0, 1024), 0, len(new))
    get_line(address, acc, at, 1, running)
    for i in range(len(new)):
        running[i] = (1.0 - a.momentum) * running[i] + a.momentum * new[i]
    put_line(address, acc, at, running)


@inner
def _renormalise(a, group, first, mean, low, rstd):
    """Write r and d of renormalisation, of a group that has values."""
    acc, step = accumulator_of(a), a.channels
    lines = stack(1.0, 2048)
    running_mean, running_rstd = part(lines, 0, len(mean)), part(lines, LINE, len(mean))
    get_line(a.running_mean, acc, group * step + first, 1, running_mean)
    get_line(a.running_var, acc, group * step + first, 1, running_rstd)
    for i in range(len(mean)):
        running_rstd[i] = rstd_of(acc, running_rstd[i], a.eps)
        d = ((mean[i] - running_mean[i]) + low[i]) * running_rstd[i]
        running_rstd[i] = min(max(running_rstd[i] / rstd[i], 1.0 / a.r_max), a.r_max)
        running_mean[i] = min(max(d, -a.d_max), a.d_max)
    at = (group * a.statistic_rows + 3) * step + first
    put_line(a.statistics, acc, at, running_rstd)
    put_line(a.statistics, acc, at + step, running_mean)


@inner
def _conclude(arguments, group, first, channels, count, state):
    """Write what the sums of a slice say: moments, or statistics and running statistics."""
    a = arguments[()]
    acc, step, divisor, lines = accumulator_of(a), a.channels, max(count, 1), stack(1.0, 5120)
    shift = quantity_of(a, state, group, SHIFT, first, channels)
    unit = quantity_of(a, state, group, UNIT, first, channels)
    sums = quantity_of(a, state, group, SUMS, first, channels)
    squares = quantity_of(a, state, group, SQUARES, first, channels)
    rests = quantity_of(a, state, group, RESTS, first, channels)
    square_rests = quantity_of(a, state, group, SQUARE_RESTS, first, channels)
    mean, low, rstd = part(lines, 0, channels), part(lines, LINE, channels), part(lines, 2 * LINE, channels)
    distance, m2 = part(lines, 3 * LINE, channels), part(lines, 4 * LINE, channels)
    for i in range(channels):
        total = whole_sum(sums[i], rests[i])
        distance[i] = total / divisor
        square = whole_sum(squares[i], square_rests[i]) - total * distance[i]
        m2[i] = 0.0 if square < 0.0 or count == 0 else square / unit[i] / unit[i]
        distance[i] /= unit[i]
        mean[i] = shift[i] + distance[i] if count > 0 else 0.0
    collected = a.stage == COLLECT
    out = a.moments if collected else a.statistics
    at = step + first if collected else group * a.statistic_rows * step + first
    put_line(out, acc, at, mean)
    for i in range(channels):
        low[i] = (shift[i] - mean[i]) + distance[i] if count > 0 else 0.0
        rstd[i] = m2[i] / divisor
        distance[i] = count
    put_line(out, acc, at + step, low)
    if collected:
        put_line(out, acc, first, distance)
        put_line(out, acc, at + 2 * step, m2)
        return
    put_line(out, acc, at + 2 * step, rstd)  # rounded as the variance is
    for i in range(channels):
        rstd[i] = rstd_of(acc, rstd[i], a.eps) if count > 0 else 0.0
    put_line(out, acc, at + 2 * step, rstd)
    if a.statistic_rows == 5:
        if count > 0:
            _renormalise(a, group, first, mean, low, rstd)
        else:
            for i in range(channels):
                distance[i] = 1.0
            put_line(out, acc, at + 3 * step, distance)
            put_line(out, acc, at + 4 * step, low)
    if count > 0 and a.running_mean != 0:
        for i in range(channels):
            mean[i] += low[i]
        _move(a, a.running_mean, group * step + first, mean)
    if count > a.correction and a.running_var != 0:
        for i in range(channels):
            m2[i] /= count - a.correction
        _move(a, a.running_var, group * step + first, m2)


@inner
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
    normalise(arguments, group, first, channels, normalisation)
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    if double:
        spread_normalisation(a, DOUBLE, normalisation, channels, length, columns)
    else:
        spread_normalisation(a, SINGLE, normalisation, channels, length, columns)
    pieces = (whole + length - 1) // length
    for row in range(rows_before(a, block + 1) - 1, rows_before(a, block) - 1, -1):  # the last are still in the cache
        for piece in range(pieces - 1, -1, -1):
            column = piece * length
            count, place = own_columns(a, row, min(length, whole - column)), place_of(a, y, row, first, column)
            if masked and a.inner == 1 and not valid(a, group, row, 0):
                store(y.address, y.storage, place, line_of(lines, 3), count)
                continue
            values = load_row(a, x, row, first, column, count, line_of(lines, 1))
            added = residual.address
            if added != 0:
                added = load_row(a, residual, row, first, column, count, line_of(lines, 2))
            if direct:
                z = y.address + np.uint64(place * (8 if double else 4))
            if double:
                before_activation(DOUBLE, values, added, columns, z, count)
                activate(a.activation, a.alpha, numbers(DOUBLE, z, 0, count))
            else:
                before_activation(SINGLE, values, added, columns, z, count)
                activate(a.activation, np.float32(a.alpha), numbers(SINGLE, z, 0, count))
            if masked and a.inner > 1:
                if double:
                    clear(a, DOUBLE, group, row, column, nothing, z, count)
                else:
                    clear(a, SINGLE, group, row, column, nothing, z, count)
            if not direct:
                store(y.address, y.storage, place, z, count)


@kernel
def statistics(arguments, counts, state, step, first_task, last_task):
    """Form the statistics of slices; or with several blocks of rows make one step, whose tasks are these."""
    a = arguments[()]
    several = a.blocks > 1
    state = state_from(a, state, first_task)
    for group in range(a.first_group, a.last_group):
        x = input_of(a, a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
        count = counts[group]
        for number in range(0 if several else first_task, a.slices if several else last_task):
            first = number * a.slice_channels
            channels = min(a.slice_channels, a.channels - first)
            if step in (ALL, CHOOSE):
                shift = quantity_of(a, state, group, SHIFT, first, channels)
                _choose_shift(a, x, group, first, shift, quantity_of(a, state, group, UNIT, first, channels))
            if step in (ALL, SUM):
                blocks = range(first_task, last_task) if several else range(1)
                for again in range(2 if step == ALL and a.storage == FLOAT64 else 1):
                    if again:
                        recentre(arguments, group, first, channels, count, state)
                    for block in blocks:
                        _sum(arguments, x, group, first, channels, block, state)
            if step in (CENTRE, CONCLUDE):
                merge(arguments, group, first, channels, state)
            if step == CENTRE:
                recentre(arguments, group, first, channels, count, state)
            if step in (ALL, CONCLUDE):
                _conclude(arguments, group, first, channels, count, state)


@kernel
def write(arguments, counts, state, first_task, last_task):
    """Write the output of slices, or with several blocks of blocks of rows."""
    a = arguments[()]
    several = a.blocks > 1
    for group in range(a.first_group, a.last_group):
        x = input_of(a, a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
        strides = a.residual_group, a.residual_outer, a.residual_channel, a.residual_inner
        residual, y = input_of(a, a.residual, group, strides), output_of(a, a.y, group)
        for number in range(0 if several else first_task, a.slices if several else last_task):
            first = number * a.slice_channels
            channels = min(a.slice_channels, a.channels - first)
            for block in range(first_task if several else 0, last_task if several else 1):
                _write_slice(arguments, x, residual, y, group, first, channels, block)
