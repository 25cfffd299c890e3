"""CPU kernels of the forward of batch norm: the statistics of slices of channels, and their output."""

import numpy as np

from bnkernels.ops.activations_cpu import activate
from bnkernels.ops.batch_norm.cpu.normalisation import (
    APPLY,
    COLLECT,
    FROZEN,
    before_activation,
    normalise,
    rstd_of,
    spread_normalisation,
)
from bnkernels.ops.batch_norm.cpu.rows import (
    TOGETHER,
    channels_of,
    clear,
    columns_of,
    copy_line,
    get_line,
    in_order,
    input_of,
    line_of,
    load_row,
    output_of,
    own_columns,
    put_line,
    row_of,
    skipped,
    store,
    store_zeros,
    to_be_cleared,
    valid,
)
from bnkernels.ops.batch_norm.cpu.sums import (
    AT_SHIFT,
    CENTRE,
    CHOOSE,
    CONCLUDE,
    RESTS,
    SHIFT,
    SQUARE_RESTS,
    SQUARES,
    SUM,
    SUMS,
    UNIT,
    WRITE,
    add_row_exactly,
    add_rows,
    begin_sums,
    clear_sums,
    end_sums,
    merge,
    quantity_of,
    recentre,
    rows_before,
    whole_sum,
)
from bnkernels.runtime.cpu.language import (
    LINE,
    accumulator,
    cast,
    inner,
    is_double,
    kernel,
    numbers,
    part,
    size_of,
    stack,
)


@inner
def _choose_shift(a, like, x, group, first, channels, state):
    """Choose a number near the mean of each channel: the middle one of three, so that no outlier is taken."""
    shift, unit = quantity_of(a, state, SHIFT, first, channels), quantity_of(a, state, UNIT, first, channels)
    size = a.outer * a.inner
    places = stack(np.int64(0), 3)
    for number in range(3):
        position = number * (size - 1) // 2
        while a.mask != 0 and position < size - 1 and not valid(a, group, position // a.inner, position % a.inner):
            position += 1
        while a.mask != 0 and position > 0 and not valid(a, group, position // a.inner, position % a.inner):
            position -= 1
        places[number] = x.start + position // a.inner * x.outer + position % a.inner * x.inner
    lines = stack(1.0, 2048)
    low, high = part(lines, 0, channels), part(lines, LINE, channels)
    get_line(like, x.address, places[0] + first * x.channel, x.channel, low)
    get_line(like, x.address, places[1] + first * x.channel, x.channel, high)
    get_line(like, x.address, places[2] + first * x.channel, x.channel, shift)
    for i in range(channels):
        middle = max(min(low[i], high[i]), min(max(low[i], high[i]), shift[i]))
        shift[i] = middle if np.isfinite(middle) else 0.0
        unit[i] = 1.0


@inner
def _sum(a, like, x, group, first, channels, first_block, last_block, state):
    """Form the sums of the channels of a slice about their shift, over the rows of each of some blocks."""
    lines, columns, waiting = stack(1.0, 8192), stack(1.0, 7168), stack(np.uint64(0), 8)
    shift, unit = quantity_of(a, state, SHIFT, first, channels), quantity_of(a, state, UNIT, first, channels)
    acc, clears = accumulator(like), to_be_cleared(a)
    raw = in_order(a, x) and not clears
    whole, length = columns_of(a, channels)
    for block in range(first_block, last_block):
        found = 0
        begin_sums(a, like, channels, shift, unit, unit, columns, length)
        for row in range(rows_before(a, block), rows_before(a, block + 1)):
            if skipped(a, group, row):
                continue
            for column in range(0, whole, length):
                count, line = own_columns(a, row, min(length, whole - column)), line_of(lines, found)
                if raw:
                    values = row_of(a, like, x, row, first, column)
                else:
                    values = load_row(a, like, x, row, first, column, count, line)
                if clears:
                    copy_line(acc, values, line, count)
                    clear(a, acc, group, row, column, part(columns, AT_SHIFT, count), line, count)
                    values = line
                waiting[found] = values
                if is_double(like):
                    add_row_exactly(values, count, columns)
                elif count < length:
                    _add(like, raw, part(waiting, found, 1), 1, count, columns)
                else:
                    found += 1
                    if found == TOGETHER:
                        _add(like, raw, waiting, found, length, columns)
                        found = 0
        _add(like, raw, waiting, found, length, columns)
        end_sums(a, columns, length, first, channels, block, state)


@inner
def _add(like, raw, rows, found, count, columns):
    """Add rows that lie in memory as they are stored, or in lines."""
    if raw:
        add_rows(like, rows, found, count, columns)
    else:
        add_rows(accumulator(like), rows, found, count, columns)


@inner
def _move(a, like, address, at, new):
    """Move a running statistic."""
    running = part(stack(1.0, 1024), 0, len(new))
    get_line(accumulator(like), address, at, 1, running)
    for i in range(len(new)):
        running[i] = (1.0 - a.momentum) * running[i] + a.momentum * new[i]
    put_line(accumulator(like), address, at, running)


@inner
def _renormalise(a, like, group, first, mean, low, rstd):
    """Write r and d of renormalisation, of a group that has values."""
    acc, step, lines = accumulator(like), a.channels, stack(1.0, 2048)
    running_mean, running_rstd = part(lines, 0, len(mean)), part(lines, LINE, len(mean))
    get_line(acc, a.running_mean, group * step + first, 1, running_mean)
    get_line(acc, a.running_var, group * step + first, 1, running_rstd)
    for i in range(len(mean)):
        running_rstd[i] = rstd_of(like, running_rstd[i], a.eps)
        d = ((mean[i] - running_mean[i]) + low[i]) * running_rstd[i]
        running_rstd[i] = min(max(running_rstd[i] / rstd[i], 1.0 / a.r_max), a.r_max)
        running_mean[i] = min(max(d, -a.d_max), a.d_max)
    at = (group * a.statistic_rows + 3) * step + first
    put_line(acc, a.statistics, at, running_rstd)
    put_line(acc, a.statistics, at + step, running_mean)


@inner
def _conclude(a, like, group, first, channels, count, state):
    """Write what the sums of a slice say: moments, or statistics and running statistics."""
    acc, step, divisor, lines = accumulator(like), a.channels, max(count, 1), stack(1.0, 5120)
    shift, unit = quantity_of(a, state, SHIFT, first, channels), quantity_of(a, state, UNIT, first, channels)
    sums, rests = quantity_of(a, state, SUMS, first, channels), quantity_of(a, state, RESTS, first, channels)
    squares = quantity_of(a, state, SQUARES, first, channels)
    square_rests = quantity_of(a, state, SQUARE_RESTS, first, channels)
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
    put_line(acc, out, at, mean)
    for i in range(channels):
        low[i] = (shift[i] - mean[i]) + distance[i] if count > 0 else 0.0
        rstd[i] = m2[i] / divisor
        distance[i] = count
    put_line(acc, out, at + step, low)
    if collected:
        put_line(acc, out, first, distance)
        put_line(acc, out, at + 2 * step, m2)
        return
    put_line(acc, out, at + 2 * step, rstd)  # rounded as the variance is
    for i in range(channels):
        rstd[i] = rstd_of(like, rstd[i], a.eps) if count > 0 else 0.0
    put_line(acc, out, at + 2 * step, rstd)
    if a.statistic_rows == 5:
        if count > 0:
            _renormalise(a, like, group, first, mean, low, rstd)
        else:
            for i in range(channels):
                distance[i] = 1.0
            put_line(acc, out, at + 3 * step, distance)
            put_line(acc, out, at + 4 * step, low)
    if count > 0 and a.running_mean != 0:
        for i in range(channels):
            mean[i] += low[i]
        _move(a, like, a.running_mean, group * step + first, mean)
    if count > a.correction and a.running_var != 0:
        for i in range(channels):
            m2[i] /= count - a.correction
        _move(a, like, a.running_var, group * step + first, m2)


@inner
def _write(a, like, x, residual, y, group, first, channels, first_block, last_block):
    """Write the rows of some blocks of a slice of the output."""
    lines, columns, normalisation = stack(1.0, 3072), stack(1.0, 4096), stack(1.0, 7168)
    acc, clears, nothing = accumulator(like), to_be_cleared(a), part(lines, 2 * LINE, LINE)
    if clears:
        clear_sums(nothing)
    # In place a row is computed in a line: what may overlap is not vectorised.
    direct = size_of(like) > 2 and y.address != x.address and y.address != residual.address
    raw = in_order(a, x)
    normalise(a, like, group, first, channels, normalisation)
    whole, length = columns_of(a, channels)
    spread_normalisation(a, like, normalisation, channels, length, columns)
    for row in range(rows_before(a, first_block), rows_before(a, last_block)):
        for column in range(0, whole, length):
            count, out = own_columns(a, row, min(length, whole - column)), row_of(a, like, y, row, first, column)
            if skipped(a, group, row):
                store_zeros(like, out, count)
                continue
            z, added = out if direct else line_of(lines, 0), residual.address
            if added != 0:
                added = load_row(a, like, residual, row, first, column, count, line_of(lines, 1))
            if raw:
                before_activation(like, row_of(a, like, x, row, first, column), added, columns, z, count)
            else:
                values = load_row(a, like, x, row, first, column, count, line_of(lines, 0))
                before_activation(acc, values, added, columns, z, count)
            activate(a.activation, cast(a.alpha, acc), numbers(acc, z, 0, count))
            if clears:
                clear(a, acc, group, row, column, nothing, z, count)
            if not direct:
                store(like, out, z, count)


@kernel
def by_slices(like, arguments, counts, first_slice, last_slice):
    """Form the statistics of slices of channels and write their output, or what of it the stage asks for."""
    a, state = arguments[()], stack(1.0, 6144)
    for group in range(a.groups):
        x, residual, y = _tensors(a, group)
        for number in range(first_slice, last_slice):
            first, channels = channels_of(a, number)
            if a.stage != APPLY and a.stage != FROZEN:
                _choose_shift(a, like, x, group, first, channels, state)
                _sum(a, like, x, group, first, channels, 0, 1, state)
                if is_double(like):
                    recentre(a, first, channels, counts[group], state)
                    _sum(a, like, x, group, first, channels, 0, 1, state)
                _conclude(a, like, group, first, channels, counts[group], state)
            if a.stage != COLLECT:
                _write(a, like, x, residual, y, group, first, channels, 0, 1)


@kernel
def by_blocks(like, arguments, counts, state, step, first_block, last_block):
    """Make one step of the same for blocks of rows, of all slices; steps that have no blocks are the first one's."""
    a = arguments[()]
    x, residual, y = _tensors(a, 0)
    for number in range(a.slices):
        first, channels = channels_of(a, number)
        if step == CENTRE or step == CONCLUDE:
            merge(a, first, channels, state)
        if step == CHOOSE:
            _choose_shift(a, like, x, 0, first, channels, state)
        elif step == CENTRE:
            recentre(a, first, channels, counts[0], state)
        elif step == CONCLUDE:
            _conclude(a, like, 0, first, channels, counts[0], state)
        elif step == SUM:
            _sum(a, like, x, 0, first, channels, first_block, last_block, state)
        elif step == WRITE:
            _write(a, like, x, residual, y, 0, first, channels, first_block, last_block)


@inner
def _tensors(a, group):
    """Return x, the residual and y."""
    x = input_of(a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
    strides = a.residual_group, a.residual_outer, a.residual_channel, a.residual_inner
    return x, input_of(a.residual, group, strides), output_of(a, a.y, group)
