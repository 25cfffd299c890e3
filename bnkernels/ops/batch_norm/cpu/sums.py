"""Sums over rows for the CPU kernels of batch norm, and their state between the steps of a call.

Sums are formed in float64, about a shift near the mean, eight rows at a time. Float64 data are summed with what
rounding loses, by Knuth's two-sum. Which numbers are added first is a function of the shapes alone, the same for every
column. The accumulators of a piece lie in one array: LLVM compares at most eight pairs of addresses before a loop that
it vectorises, and these are eight rows against one array.
"""

import numpy as np

from bnkernels.ops.batch_norm.cpu.rows import FLOAT64, TOGETHER, spread
from bnkernels.runtime.cpu.language import LINE, device, doubles, inner, part, singles

# Lines of a piece's accumulators.
AT_SHIFT, AT_SUMS, AT_SQUARES, AT_UNIT, AT_RESTS, AT_SQUARE_RESTS, AT_LOW = (number * LINE for number in range(7))
ALL, CHOOSE, SUM, CENTRE, CONCLUDE = range(5)  # steps of the sums: all, or one for every block before the next
# Rows of the state of a group, one number for a channel each; the last four once for every block.
SHIFT, UNIT, SUMS, SQUARES, RESTS, SQUARE_RESTS, OF_BLOCK = 0, 1, 2, 3, 4, 5, 4
TOTALS = 2  # rows behind them, see `total_of`
SMALL_UNIT = 2.0**-64  # units in which a float64 sum that overflows is formed anew


@device
def whole_sum(total, rest):
    """Return a sum with what rounding took from it; what is not finite has no such rest."""
    return total + rest if np.isfinite(total) else total


@inner
def add_row(row, count, columns):
    """Add the float32 row at an address, and its squares, about the shift."""
    x = singles(row, 0, count)
    shift, sums = part(columns, AT_SHIFT, count), part(columns, AT_SUMS, count)
    squares = part(columns, AT_SQUARES, count)
    for i in range(count):
        d = np.float64(x[i]) - shift[i]
        sums[i] += d
        squares[i] += d * d


@inner
def add_rows(rows, count, columns):
    """Add the eight float32 rows at these addresses, and their squares, about the shift."""
    x0, x1 = singles(rows[0], 0, count), singles(rows[1], 0, count)
    x2, x3 = singles(rows[2], 0, count), singles(rows[3], 0, count)
    x4, x5 = singles(rows[4], 0, count), singles(rows[5], 0, count)
    x6, x7 = singles(rows[6], 0, count), singles(rows[7], 0, count)
    shift, sums = part(columns, AT_SHIFT, count), part(columns, AT_SUMS, count)
    squares = part(columns, AT_SQUARES, count)
    for i in range(count):
        k = shift[i]
        d0, d1, d2, d3 = np.float64(x0[i]) - k, np.float64(x1[i]) - k, np.float64(x2[i]) - k, np.float64(x3[i]) - k
        d4, d5, d6, d7 = np.float64(x4[i]) - k, np.float64(x5[i]) - k, np.float64(x6[i]) - k, np.float64(x7[i]) - k
        sums[i] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
        squares[i] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))


@inner
def add_row_exactly(row, count, columns):
    """Add a float64 row in units, and its squares, about the shift, with what rounding loses."""
    x, shift, unit = doubles(row, 0, count), part(columns, AT_SHIFT, count), part(columns, AT_UNIT, count)
    sums, squares = part(columns, AT_SUMS, count), part(columns, AT_SQUARES, count)
    rests, square_rests = part(columns, AT_RESTS, count), part(columns, AT_SQUARE_RESTS, count)
    for i in range(count):
        a, b = x[i] * unit[i], shift[i] * unit[i]
        d = a - b
        back = d - a
        rest = (a - (d - back)) - (b + back)
        total = sums[i] + d
        back = total - sums[i]
        rests[i] += rest + ((sums[i] - (total - back)) + (d - back))
        sums[i] = total
        square = d * d
        total = squares[i] + square
        back = total - squares[i]
        square_rests[i] += (squares[i] - (total - back)) + (square - back)
        squares[i] = total


@inner
def add_product(gradient, row, count, columns):
    """Add a row of float32 gradients, and its products with the distances of `row` from the mean, the shift."""
    g, x = singles(gradient, 0, count), singles(row, 0, count)
    mean, sums = part(columns, AT_SHIFT, count), part(columns, AT_SUMS, count)
    products = part(columns, AT_SQUARES, count)
    for i in range(count):
        value = np.float64(g[i])
        sums[i] += value
        products[i] += value * (np.float64(x[i]) - mean[i])


@inner
def add_products(gradients, rows, count, columns):
    """Add four rows of float32 gradients, and their products with the distances from the mean."""
    g0, g1 = singles(gradients[0], 0, count), singles(gradients[1], 0, count)
    g2, g3 = singles(gradients[2], 0, count), singles(gradients[3], 0, count)
    x0, x1 = singles(rows[0], 0, count), singles(rows[1], 0, count)
    x2, x3 = singles(rows[2], 0, count), singles(rows[3], 0, count)
    mean, sums = part(columns, AT_SHIFT, count), part(columns, AT_SUMS, count)
    products = part(columns, AT_SQUARES, count)
    for i in range(count):
        m = mean[i]
        a, b, c, d = np.float64(g0[i]), np.float64(g1[i]), np.float64(g2[i]), np.float64(g3[i])
        sums[i] += (a + b) + (c + d)
        a, b = a * (np.float64(x0[i]) - m), b * (np.float64(x1[i]) - m)
        c, d = c * (np.float64(x2[i]) - m), d * (np.float64(x3[i]) - m)
        products[i] += (a + b) + (c + d)


@inner
def add_product_exactly(gradient, row, count, columns):
    """Add a row of float64 gradients in units, and its products, with what rounding loses."""
    g, x = doubles(gradient, 0, count), doubles(row, 0, count)
    mean, low, unit = part(columns, AT_SHIFT, count), part(columns, AT_LOW, count), part(columns, AT_UNIT, count)
    sums, products = part(columns, AT_SUMS, count), part(columns, AT_SQUARES, count)
    rests, product_rests = part(columns, AT_RESTS, count), part(columns, AT_SQUARE_RESTS, count)
    for i in range(count):
        value = g[i] * unit[i]
        total = sums[i] + value
        back = total - sums[i]
        rests[i] += (sums[i] - (total - back)) + (value - back)
        sums[i] = total
        product = value * ((x[i] - mean[i]) - low[i])
        total = products[i] + product
        back = total - products[i]
        product_rests[i] += (products[i] - (total - back)) + (product - back)
        products[i] = total


@inner
def add_sums(more, more_rests, sums, rests):
    """Add sums, each with what rounding took from it."""
    for i in range(len(sums)):
        a, b = sums[i], more[i]
        total = a + b
        back = total - a
        sums[i] = total
        rests[i] += more_rests[i] + ((a - (total - back)) + (b - back))


@inner
def fold(sums, rests, channels, inner, columns, out, out_rests):
    """Add the sums of all columns of a channel to that channel's."""
    count = columns
    while channels > 1 and count > channels * inner:  # joined rows, of which there is a power of two
        count //= 2
        add_sums(part(sums, count, count), part(rests, count, count), part(sums, 0, count), part(rests, 0, count))
    length = channels if inner == 1 and channels > 1 else 1  # sums that end up next to one another
    for channel in range(0, channels, length):
        start, count = channel * inner, columns if channels == 1 else inner
        while count > 1:
            half = count // 2
            far = start + count - half
            add_sums(part(sums, far, half), part(rests, far, half), part(sums, start, half), part(rests, start, half))
            count -= half
        of_sums, of_rests = part(sums, start, length), part(rests, start, length)
        add_sums(of_sums, of_rests, part(out, channel, length), part(out_rests, channel, length))


@inner
def begin_sums(a, channels, shift, unit, low, columns, count):
    """Begin the sums of a piece."""
    spread(shift, channels, a.inner, part(columns, AT_SHIFT, count))
    if a.storage == FLOAT64:
        spread(unit, channels, a.inner, part(columns, AT_UNIT, count))
        spread(low, channels, a.inner, part(columns, AT_LOW, count))
    for line in (AT_SUMS, AT_SQUARES, AT_RESTS, AT_SQUARE_RESTS):
        sums = part(columns, line, count)
        for i in range(count):
            sums[i] = 0.0


@inner
def end_sums(a, columns, count, sums, squares, rests, square_rests):
    """Add the sums of a piece to those of its channels."""
    channels = len(sums)
    fold(part(columns, AT_SUMS, LINE), part(columns, AT_RESTS, LINE), channels, a.inner, count, sums, rests)
    of_squares, of_rests = part(columns, AT_SQUARES, LINE), part(columns, AT_SQUARE_RESTS, LINE)
    fold(of_squares, of_rests, channels, a.inner, count, squares, square_rests)


@device
def state_from(a, state, first_task):
    """Return the state such that channels are counted from the first: it holds those of these tasks alone."""
    return part(state, 0 if a.blocks > 1 else -first_task * a.slice_channels, len(state))


@device
def quantity_of(a, state, group, row, first, channels):
    """Return a row of the state for the channels of a slice."""
    row += (group - a.first_group) * (SUMS + OF_BLOCK * a.blocks)
    return part(state, row * a.state_channels + first, channels)


@device
def total_of(a, state, number, first, channels):
    """Return a row of the state behind those of all groups: a sum over groups."""
    row = a.state_groups * (SUMS + OF_BLOCK * a.blocks) + number
    return part(state, row * a.state_channels + first, channels)


@device
def rows_before(a, block):
    """Return the first row of a block: whole groups of rows that are summed together."""
    step = (a.rows + a.blocks * TOGETHER - 1) // (a.blocks * TOGETHER) * TOGETHER
    return min(a.rows, block * step)


@inner
def merge(arguments, group, first, channels, state):
    """Add the sums of all blocks, in order, to those of the first one."""
    a = arguments[()]
    for block in range(1, a.blocks):
        for quantity in (SUMS, SQUARES):
            rest, of_block = quantity + RESTS - SUMS, block * OF_BLOCK
            sums = quantity_of(a, state, group, quantity, first, channels)
            rests = quantity_of(a, state, group, rest, first, channels)
            more = quantity_of(a, state, group, quantity + of_block, first, channels)
            add_sums(more, quantity_of(a, state, group, rest + of_block, first, channels), sums, rests)


@inner
def recentre(arguments, group, first, channels, count, state):
    """Move the shift to the mean that was found; where the sum overflowed, form it in smaller units."""
    a = arguments[()]
    shift = quantity_of(a, state, group, SHIFT, first, channels)
    unit = quantity_of(a, state, group, UNIT, first, channels)
    sums = quantity_of(a, state, group, SUMS, first, channels)
    rests = quantity_of(a, state, group, RESTS, first, channels)
    for i in range(channels):
        mean = shift[i] + whole_sum(sums[i], rests[i]) / max(count, 1)
        if np.isfinite(mean):
            shift[i] = mean
        else:
            unit[i] = SMALL_UNIT
