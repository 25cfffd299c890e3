"""CPU kernels of the backward of batch norm: the sums of slices of channels, and the gradients of their inputs.

Long because both form a row's gradient before the activation, in the same way.
"""

import numpy as np

from bnkernels.ops.activations_cpu import differentiate
from bnkernels.ops.batch_norm.cpu.normalisation import (
    APPLY,
    BEND,
    COLLECT,
    FROZEN,
    LOW,
    MEAN,
    RSTD,
    SCALE,
    SLOPE,
    WHOLE,
    before_activation,
    normalise,
    rectify,
    spread_line,
    spread_normalisation,
)
from bnkernels.ops.batch_norm.cpu.rows import (
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
    put,
    row_of,
    skipped,
    store,
    store_zeros,
    to_be_cleared,
)
from bnkernels.ops.batch_norm.cpu.sums import (
    CENTRE,
    CHOOSE,
    CONCLUDE,
    PRODUCTS_TOGETHER,
    RESTS,
    SHIFT,
    SQUARE_RESTS,
    SQUARES,
    SUM,
    SUMS,
    UNIT,
    WRITE,
    add_product_exactly,
    add_products,
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
    as_number,
    cast,
    device,
    inner,
    is_double,
    kernel,
    numbers,
    part,
    size_of,
    stack,
)

FACTOR, GRADIENT_SHIFT = 4, 5  # lines of columns behind those of the normalisation


@device
def _raw_rows(a, dy, x):
    """Return whether the rows of dy and x can be used as they lie in memory."""
    curved = a.activation != 0 or a.alpha != 1.0
    return not curved and not to_be_cleared(a) and in_order(a, dy) and in_order(a, x)


@inner
def _gradient(a, like, dy, x, residual, group, row, first, column, count, columns, lines):
    """Return the addresses of lines of g, the gradient before the activation, and of x.

    Where the mask is False, g is 0 and x is the mean, whatever they hold.
    """
    acc, own = accumulator(like), line_of(lines, 0)
    values = load_row(a, like, x, row, first, column, count, line_of(lines, 1))
    g = load_row(a, like, dy, row, first, column, count, own)
    curved, relu = a.activation != 0 or a.alpha != 1.0, a.activation == 0 and a.alpha == 0.0
    clears, added = to_be_cleared(a), residual.address
    if curved and added != 0:
        added = load_row(a, like, residual, row, first, column, count, line_of(lines, 3))
    if relu:
        rectify(acc, g, values, added, columns, own, count)
    elif (curved or clears) and g != own:
        copy_line(acc, g, own, count)
    if curved or clears:
        g = own
    if curved and not relu:
        z = line_of(lines, 2)
        before_activation(acc, values, added, columns, z, count)
        differentiate(a.activation, cast(a.alpha, acc), numbers(acc, z, 0, count), numbers(acc, g, 0, count))
    if clears:
        nothing = part(lines, 3 * LINE, count)
        clear_sums(nothing)
        copy_line(acc, values, line_of(lines, 1), count)
        values = line_of(lines, 1)
        clear(a, acc, group, row, column, nothing, g, count)
        clear(a, acc, group, row, column, numbers(acc, line_of(columns, MEAN), 0, count), values, count)
    return g, values


@inner
def _sum(a, like, dy, x, residual, group, first, channels, first_block, last_block, state):
    """Form the sums of g and of g (x - mean) of the channels of a slice, over the rows of each of some blocks."""
    lines, columns, sums = stack(1.0, 16384), stack(1.0, 4096), stack(1.0, 7168)
    normalisation, waiting, waiting_x = stack(1.0, 7168), stack(np.uint64(0), 4), stack(np.uint64(0), 4)
    normalise(a, like, group, first, channels, normalisation)
    mean, low = part(normalisation, MEAN * LINE, channels), part(normalisation, LOW * LINE, channels)
    shift, unit = part(normalisation, RSTD * LINE, channels), quantity_of(a, state, UNIT, first, channels)
    for i in range(channels):
        shift[i] = mean[i] if is_double(like) else mean[i] + low[i]
    whole, length = columns_of(a, channels)
    spread_normalisation(a, like, normalisation, channels, length, columns)
    raw = _raw_rows(a, dy, x)
    for block in range(first_block, last_block):
        found = 0
        begin_sums(a, like, channels, shift, unit, low, sums, length)
        for row in range(rows_before(a, block), rows_before(a, block + 1)):
            if skipped(a, group, row):
                continue
            for column in range(0, whole, length):
                count, own = own_columns(a, row, min(length, whole - column)), part(lines, found * 4 * LINE, 4 * LINE)
                if raw:
                    g, values = row_of(a, like, dy, row, first, column), row_of(a, like, x, row, first, column)
                else:
                    g, values = _gradient(a, like, dy, x, residual, group, row, first, column, count, columns, own)
                waiting[found], waiting_x[found] = g, values
                if is_double(like):
                    add_product_exactly(g, values, count, sums)
                elif count < length:
                    _add(like, raw, part(waiting, found, 1), part(waiting_x, found, 1), 1, count, sums)
                else:
                    found += 1
                    if found == PRODUCTS_TOGETHER:
                        _add(like, raw, waiting, waiting_x, found, length, sums)
                        found = 0
        _add(like, raw, waiting, waiting_x, found, length, sums)
        end_sums(a, sums, length, first, channels, block, state)


@inner
def _add(like, raw, gradients, rows, found, count, sums):
    """Add rows that lie in memory as they are stored, or in lines."""
    if raw:
        add_products(like, gradients, rows, found, count, sums)
    else:
        add_products(accumulator(like), gradients, rows, found, count, sums)


@inner
def _add_to_parameters(a, like, group, first, channels, count, state, totals):
    """Add the sums of a group to dgamma and dbeta of a slice; or write them, with the count."""
    acc, step, normalisation = accumulator(like), a.channels, stack(1.0, 7168)
    slope, bend = part(normalisation, SLOPE * LINE, channels), part(normalisation, BEND * LINE, channels)
    rstd, dgamma, dbeta = (
        part(normalisation, RSTD * LINE, channels),
        part(totals, 0, channels),
        part(totals, LINE, channels),
    )
    normalise(a, like, group, first, channels, normalisation)
    unit = quantity_of(a, state, UNIT, first, channels)
    sums, rests = quantity_of(a, state, SUMS, first, channels), quantity_of(a, state, RESTS, first, channels)
    squares = quantity_of(a, state, SQUARES, first, channels)
    square_rests = quantity_of(a, state, SQUARE_RESTS, first, channels)
    for i in range(channels):
        sums[i], squares[i] = whole_sum(sums[i], rests[i]), whole_sum(squares[i], square_rests[i])
        dbeta[i] += sums[i] / unit[i]
        if slope[i] == 0.0:
            squares[i] = 0.0  # so is xhat, though sums of x - mean may be out of range
        dgamma[i] += squares[i] / unit[i] * slope[i] + (bend[i] * (sums[i] / unit[i]) if bend[i] != 0.0 else 0.0)
        if a.stage == COLLECT:
            put(acc, a.sums, first + i, sums[i] / unit[i])
            put(acc, a.sums, first + i + step, squares[i] / unit[i] * rstd[i])
            put(acc, a.sums, first + i + 2 * step, np.float64(count))


@inner
def _write_parameters(a, like, first, channels, totals):
    """Write dgamma and dbeta of a slice."""
    for i in range(channels):
        if a.params_in_storage_type:
            put(like, a.dgamma, first + i, totals[i])
            put(like, a.dbeta, first + i, totals[LINE + i])
        else:
            put(accumulator(like), a.dgamma, first + i, totals[i])
            put(accumulator(like), a.dbeta, first + i, totals[LINE + i])


@inner
def _gradient_of_input(a, like, g, row, columns, out, count):
    """Write a row of dx to the address of a line: ``scale ((g + shift) + factor ((x - mean) - mean_low))``."""
    acc, gradient, x = accumulator(like), numbers(like, g, 0, count), numbers(like, row, 0, count)
    dx, scale = numbers(acc, out, 0, count), numbers(acc, line_of(columns, SCALE), 0, count)
    mean, low = numbers(acc, line_of(columns, MEAN), 0, count), numbers(acc, line_of(columns, LOW), 0, count)
    factor = numbers(acc, line_of(columns, FACTOR), 0, count)
    shift = numbers(acc, line_of(columns, GRADIENT_SHIFT), 0, count)
    if a.stage == FROZEN:  # dx does not depend on x
        for i in range(count):
            dx[i] = scale[i] * as_number(gradient[i])
    else:
        for i in range(count):
            centred = (as_number(x[i]) - mean[i]) - low[i]
            dx[i] = scale[i] * ((as_number(gradient[i]) + shift[i]) + factor[i] * centred)


@inner
def _choose_factors(a, like, first, count, normalisation, state, factor, shift):
    """Write factor and shift of ``dx = scale ((g + shift) + factor (x - mean))``."""
    channels, acc, step = len(factor), accumulator(like), a.channels
    lines = stack(1.0, 3072)
    sums, products = part(lines, 0, channels), part(lines, LINE, channels)
    divisor = part(lines, 2 * LINE, channels)
    for i in range(channels):
        sums[i], products[i], divisor[i] = 0.0, 0.0, max(count, 1)
    if a.stage == APPLY:
        get_line(acc, a.sums, first, 1, sums)
        get_line(acc, a.sums, first + step, 1, products)
        get_line(acc, a.sums, first + 2 * step, 1, divisor)
        for i in range(channels):
            divisor[i] = max(divisor[i], 1.0)
    elif a.stage == WHOLE:
        unit = quantity_of(a, state, UNIT, first, channels)
        of_g = quantity_of(a, state, SUMS, first, channels)
        of_products = quantity_of(a, state, SQUARES, first, channels)
        for i in range(channels):
            rstd = normalisation[RSTD * LINE + i]
            divisor[i] *= unit[i]
            sums[i], products[i] = of_g[i], of_products[i] * rstd if rstd != 0.0 else 0.0  # its xhat is 0
    for i in range(channels):
        rstd, n = normalisation[RSTD * LINE + i], divisor[i]
        factor[i], shift[i] = -(products[i] / n * rstd), -(sums[i] / n)


@inner
def _write(a, like, dy, x, residual, group, first, channels, count_of_group, first_block, last_block, state):
    """Write the rows of some blocks of a slice of dx and dresidual."""
    lines, columns, normalisation, factors = stack(1.0, 6144), stack(1.0, 6144), stack(1.0, 7168), stack(1.0, 2048)
    acc, clears, nothing = accumulator(like), to_be_cleared(a), part(lines, 5 * LINE, LINE)
    if clears:
        clear_sums(nothing)
    normalise(a, like, group, first, channels, normalisation)
    factor, shift = part(factors, 0, channels), part(factors, LINE, channels)
    _choose_factors(a, like, first, count_of_group, normalisation, state, factor, shift)
    dx, dresidual = output_of(a, a.dx, group), output_of(a, a.dresidual, group)
    direct = size_of(like) > 2 and dx.address != x.address and dx.address != dy.address
    direct, raw = direct and dx.address != residual.address, _raw_rows(a, dy, x)
    whole, length = columns_of(a, channels)
    spread_normalisation(a, like, normalisation, channels, length, columns)
    spread_line(a, like, factor, channels, length, columns, FACTOR)
    spread_line(a, like, shift, channels, length, columns, GRADIENT_SHIFT)
    for row in range(rows_before(a, first_block), rows_before(a, last_block)):
        for column in range(0, whole, length):
            count, out = own_columns(a, row, min(length, whole - column)), row_of(a, like, dx, row, first, column)
            out_residual = row_of(a, like, dresidual, row, first, column)
            if skipped(a, group, row):
                store_zeros(like, out, count)
                if dresidual.address != 0:
                    store_zeros(like, out_residual, count)
                continue
            line = out if direct else line_of(lines, 4)
            if raw:
                g, values = row_of(a, like, dy, row, first, column), row_of(a, like, x, row, first, column)
                if dresidual.address != 0:
                    copy_line(like, g, out_residual, count)
                _gradient_of_input(a, like, g, values, columns, line, count)
            else:
                g, values = _gradient(a, like, dy, x, residual, group, row, first, column, count, columns, lines)
                if dresidual.address != 0:
                    store(like, out_residual, g, count)
                _gradient_of_input(a, acc, g, values, columns, line, count)
            if clears:
                clear(a, acc, group, row, column, nothing, line, count)
            if not direct:
                store(like, out, line, count)


@device
def _inputs(a, group):
    """Return dy, x and the residual."""
    strides = a.residual_group, a.residual_outer, a.residual_channel, a.residual_inner
    dy = input_of(a.dy, group, (a.dy_group, a.dy_outer, a.dy_channel, a.dy_inner))
    x = input_of(a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
    return dy, x, input_of(a.residual, group, strides)


@inner
def _begin(a, first, channels, state):
    """Begin the sums of a slice in units of 1: the gradients have no shift."""
    clear_sums(quantity_of(a, state, SHIFT, first, channels))
    unit = quantity_of(a, state, UNIT, first, channels)
    for i in range(channels):
        unit[i] = 1.0


@kernel
def by_slices(like, arguments, counts, first_slice, last_slice):
    """Form the sums of slices of channels and write their gradients, or what of it the stage asks for."""
    a, state, totals = arguments[()], stack(1.0, 6144), stack(1.0, 2048)
    for number in range(first_slice, last_slice):
        first, channels = channels_of(a, number)
        clear_sums(totals)
        for group in range(a.groups):
            dy, x, residual = _inputs(a, group)
            if a.stage != APPLY:
                _begin(a, first, channels, state)
                _sum(a, like, dy, x, residual, group, first, channels, 0, 1, state)
                if is_double(like):
                    recentre(a, first, channels, counts[group], state)
                    _sum(a, like, dy, x, residual, group, first, channels, 0, 1, state)
                _add_to_parameters(a, like, group, first, channels, counts[group], state, totals)
            if a.stage != COLLECT:
                _write(a, like, dy, x, residual, group, first, channels, counts[group], 0, 1, state)
        if a.stage == WHOLE or a.stage == FROZEN:
            _write_parameters(a, like, first, channels, totals)


@kernel
def by_blocks(like, arguments, counts, state, step, first_block, last_block):
    """Make one step of the same for blocks of rows, of all slices; steps that have no blocks are the first one's."""
    a, totals = arguments[()], stack(1.0, 2048)
    dy, x, residual = _inputs(a, 0)
    for number in range(a.slices):
        first, channels = channels_of(a, number)
        if step == CENTRE or step == CONCLUDE:
            merge(a, first, channels, state)
        if step == CHOOSE:
            _begin(a, first, channels, state)
        elif step == CENTRE:
            recentre(a, first, channels, counts[0], state)
        elif step == CONCLUDE:
            clear_sums(totals)
            _add_to_parameters(a, like, 0, first, channels, counts[0], state, totals)
            if a.stage != COLLECT:
                _write_parameters(a, like, first, channels, totals)
        elif step == SUM:
            _sum(a, like, dy, x, residual, 0, first, channels, first_block, last_block, state)
        elif step == WRITE:
            _write(a, like, dy, x, residual, 0, first, channels, counts[0], first_block, last_block, state)
