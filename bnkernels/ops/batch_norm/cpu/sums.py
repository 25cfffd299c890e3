"""Sums over rows for the CPU kernels of batch norm, and their state between the steps of a call.

Sums are formed in float64, about a shift near the mean, eight rows at a time. Float64 data are summed with what
rounding loses, by Knuth's two-sum. Which numbers are added first is a function of the shapes alone, the same for every
column. The accumulators of a piece lie in one array: LLVM compares at most eight pairs of addresses before a loop that
it vectorises, and these are eight rows against one array.
"""

import numpy as np

from bnkernels.ops.batch_norm.cpu.rows import TOGETHER, spread
from bnkernels.runtime.cpu.language import LINE, as_number, device, doubles, inner, is_double, numbers, part

# Lines of a piece's accumulators.
AT_SHIFT, AT_SUMS, AT_SQUARES, AT_UNIT, AT_RESTS, AT_SQUARE_RESTS, AT_LOW = (number * LINE for number in range(7))
CHOOSE, SUM, CENTRE, CONCLUDE, WRITE = range(5)  # steps of a call in blocks of rows: each for all before the next
# Rows of a state, one number for a channel each; the last four once for every block.
SHIFT, UNIT, SUMS, SQUARES, RESTS, SQUARE_RESTS, OF_BLOCK = 0, 1, 2, 3, 4, 5, 4
STATE = SUMS + OF_BLOCK  # rows of the state of one block
PRODUCTS_TOGETHER = TOGETHER // 2  # each of two rows
SMALL_UNIT = 2.0**-64  # units in which a float64 sum that overflows is formed anew


@device
def whole_sum(total, rest):
    """Return a sum with what rounding took from it; what is not finite has no such rest."""
    return total + rest if np.isfinite(total) else total


@inner
def add_rows(like, rows, found, count, columns):
    """Add the rows at `found` addresses, eight at most, and their squares, about the shift."""
    shift, sums = part(columns, AT_SHIFT, count), part(columns, AT_SUMS, count)
    squares = part(columns, AT_SQUARES, count)
    if found < TOGETHER:
        for number in range(found):
            x = numbers(like, rows[number], 0, count)
            for i in range(count):
                d = np.float64(as_number(x[i])) - shift[i]
                sums[i] += d
                squares[i] += d * d
        return
    x0, x1 = numbers(like, rows[0], 0, count), numbers(like, rows[1], 0, count)
    x2, x3 = numbers(like, rows[2], 0, count), numbers(like, rows[3], 0, count)
    x4, x5 = numbers(like, rows[4], 0, count), numbers(like, rows[5], 0, count)
    x6, x7 = numbers(like, rows[6], 0, count), numbers(like, rows[7], 0, count)
    for i in range(count):
        k = shift[i]
        d0, d1 = np.float64(as_number(x0[i])) - k, np.float64(as_number(x1[i])) - k
        d2, d3 = np.float64(as_number(x2[i])) - k, np.float64(as_number(x3[i])) - k
        d4, d5 = np.float64(as_number(x4[i])) - k, np.float64(as_number(x5[i])) - k
        d6, d7 = np.float64(as_number(x6[i])) - k, np.float64(as_number(x7[i])) - k
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
def add_products(like, gradients, rows, found, count, columns):
    """Add the gradients at `found` addresses, four at most, and their products with the distances from the mean."""
    mean, sums = part(columns, AT_SHIFT, count), part(columns, AT_SUMS, count)
    products = part(columns, AT_SQUARES, count)
    if found < PRODUCTS_TOGETHER:
        for number in range(found):
            g, x = numbers(like, gradients[number], 0, count), numbers(like, rows[number], 0, count)
            for i in range(count):
                value = np.float64(as_number(g[i]))
                sums[i] += value
                products[i] += value * (np.float64(as_number(x[i])) - mean[i])
        return
    g0, g1 = numbers(like, gradients[0], 0, count), numbers(like, gradients[1], 0, count)
    g2, g3 = numbers(like, gradients[2], 0, count), numbers(like, gradients[3], 0, count)
    x0, x1 = numbers(like, rows[0], 0, count), numbers(like, rows[1], 0, count)
    x2, x3 = numbers(like, rows[2], 0, count), numbers(like, rows[3], 0, count)
    for i in range(count):
        m = mean[i]
        a, b = np.float64(as_number(g0[i])), np.float64(as_number(g1[i]))
        c, d = np.float64(as_number(g2[i])), np.float64(as_number(g3[i]))
        sums[i] += (a + b) + (c + d)
        a, b = a * (np.float64(as_number(x0[i])) - m), b * (np.float64(as_number(x1[i])) - m)
        c, d = c * (np.float64(as_number(x2[i])) - m), d * (np.float64(as_number(x3[i])) - m)
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


@device
def clear_sums(sums):
    """Write zeros."""
    for i in range(len(sums)):
        sums[i] = 0.0


@inner
def begin_sums(a, like, channels, shift, unit, low, columns, count):
    """Begin the sums of all columns of a piece."""
    spread(shift, channels, a.inner, part(columns, AT_SHIFT, count))
    if is_double(like):
        spread(unit, channels, a.inner, part(columns, AT_UNIT, count))
        spread(low, channels, a.inner, part(columns, AT_LOW, count))
    for line in (AT_SUMS, AT_SQUARES, AT_RESTS, AT_SQUARE_RESTS):
        clear_sums(part(columns, line, count))


@inner
def end_sums(a, columns, count, first, channels, block, state):
    """Write the sums of the channels, from those of the columns."""
    for line, line_of_rests, row in ((AT_SUMS, AT_RESTS, SUMS), (AT_SQUARES, AT_SQUARE_RESTS, SQUARES)):
        row += block * OF_BLOCK
        sums = quantity_of(a, state, row, first, channels)
        rests = quantity_of(a, state, row + RESTS - SUMS, first, channels)
        clear_sums(sums), clear_sums(rests)
        of_columns, of_rests = part(columns, line, LINE), part(columns, line_of_rests, LINE)
        fold(of_columns, of_rests, channels, a.inner, count, sums, rests)


@device
def quantity_of(a, state, row, first, channels):
    """Return a row of the state for the channels of a slice: in blocks of rows the state has those of all slices."""
    return part(state, row * a.state_channels + (first if a.blocks > 1 else 0), channels)


@device
def rows_before(a, block):
    """Return the first row of a block: whole groups of rows that are summed together."""
    return min(a.rows, block * a.block_rows)


@inner
def merge(a, first, channels, state):
    """Add the sums of all blocks, in order, to those of the first one."""
    for block in range(1, a.blocks):
        for quantity in (SUMS, SQUARES):
            rest, of_block = quantity + RESTS - SUMS, block * OF_BLOCK
            sums, rests = quantity_of(a, state, quantity, first, channels), quantity_of(a, state, rest, first, channels)
            more = quantity_of(a, state, quantity + of_block, first, channels)
            add_sums(more, quantity_of(a, state, rest + of_block, first, channels), sums, rests)


@inner
def recentre(a, first, channels, count, state):
    """Move the shift to the mean that was found; where the sum overflowed, form it in smaller units."""
    shift, unit = quantity_of(a, state, SHIFT, first, channels), quantity_of(a, state, UNIT, first, channels)
    sums, rests = quantity_of(a, state, SUMS, first, channels), quantity_of(a, state, RESTS, first, channels)
    for i in range(channels):
        mean = shift[i] + whole_sum(sums[i], rests[i]) / max(count, 1)
        if np.isfinite(mean):
            shift[i] = mean
        else:
            unit[i] = SMALL_UNIT
