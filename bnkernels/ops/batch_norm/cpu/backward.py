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
    spread_line,
    spread_normalisation,
)
from bnkernels.ops.batch_norm.cpu.rows import (
    DOUBLE,
    FLOAT64,
    SINGLE,
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
    put,
    store,
    valid,
)
from bnkernels.ops.batch_norm.cpu.sums import (
    ALL,
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
    add_product,
    add_product_exactly,
    add_products,
    begin_sums,
    end_sums,
    merge,
    quantity_of,
    recentre,
    rows_before,
    state_from,
    total_of,
    whole_sum,
)
from bnkernels.runtime.cpu.language import LINE, device, inner, kernel, numbers, part, stack

FACTOR, GRADIENT_SHIFT = 4, 5  # lines of columns behind those of the normalisation


@inner
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
            before_activation(DOUBLE, values, added, columns, z, own)
            differentiate(a.activation, a.alpha, numbers(DOUBLE, z, 0, own), numbers(DOUBLE, g, 0, own))
        else:
            before_activation(SINGLE, values, added, columns, z, own)
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


@inner
def _sum_gradients(arguments, dy, x, residual, group, first, channels, block, state):
    """Write the sums of g and of g (x - mean) of the channels of a slice, over the rows of a block."""
    a = arguments[()]
    lines, columns, sums_of = stack(1.0, 16384), stack(1.0, 4096), stack(1.0, 7168)
    normalisation, waiting, waiting_x = stack(1.0, 7168), stack(np.uint64(0), 4), stack(np.uint64(0), 4)
    sums = quantity_of(a, state, group, SUMS + block * OF_BLOCK, first, channels)
    squares = quantity_of(a, state, group, SQUARES + block * OF_BLOCK, first, channels)
    rests = quantity_of(a, state, group, RESTS + block * OF_BLOCK, first, channels)
    square_rests = quantity_of(a, state, group, SQUARE_RESTS + block * OF_BLOCK, first, channels)
    unit = quantity_of(a, state, group, UNIT, first, channels)
    exact = x.storage == FLOAT64
    normalise(arguments, group, first, channels, normalisation)
    mean, low = part(normalisation, MEAN * LINE, channels), part(normalisation, LOW * LINE, channels)
    shift = part(normalisation, RSTD * LINE, channels)
    for i in range(channels):
        sums[i], squares[i], rests[i], square_rests[i] = 0.0, 0.0, 0.0, 0.0
        shift[i] = mean[i] if exact else mean[i] + low[i]
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    begin_sums(a, channels, shift, unit, low, sums_of, length)
    if exact:
        spread_normalisation(a, DOUBLE, normalisation, channels, length, columns)
    else:
        spread_normalisation(a, SINGLE, normalisation, channels, length, columns)
    found = 0
    for row in range(rows_before(a, block), rows_before(a, block + 1)):
        if a.mask != 0 and a.inner == 1 and not valid(a, group, row, 0):
            continue
        for column in range(0, whole, length):
            count, own_lines = own_columns(a, row, min(length, whole - column)), part(lines, found * 4 * LINE, 4 * LINE)
            g, values = _gradient(a, dy, x, residual, group, row, first, column, count, columns, own_lines)
            if exact:
                add_product_exactly(g, values, count, sums_of)
            elif count < length:
                add_product(g, values, count, sums_of)
            else:
                waiting[found], waiting_x[found] = g, values
                found += 1
                if found == 4:
                    add_products(waiting, waiting_x, length, sums_of)
                    found = 0
    for number in range(found):
        add_product(waiting[number], waiting_x[number], length, sums_of)
    end_sums(a, sums_of, length, sums, squares, rests, square_rests)


@inner
def _conclude(arguments, first, channels, counts, state):
    """Write dgamma and dbeta of a slice, over all groups; or the sums, with the count."""
    a = arguments[()]
    acc, step = accumulator_of(a), a.channels
    of_parameters = a.storage if a.params_in_storage_type else acc
    normalisation = stack(1.0, 7168)
    slope, bend = part(normalisation, SLOPE * LINE, channels), part(normalisation, BEND * LINE, channels)
    rstd = part(normalisation, RSTD * LINE, channels)
    dgamma, dbeta = total_of(a, state, 0, first, channels), total_of(a, state, 1, first, channels)
    if a.first_group == 0:
        for i in range(channels):
            dgamma[i], dbeta[i] = 0.0, 0.0
    for group in range(a.first_group, a.last_group):
        normalise(arguments, group, first, channels, normalisation)
        unit = quantity_of(a, state, group, UNIT, first, channels)
        sums = quantity_of(a, state, group, SUMS, first, channels)
        squares = quantity_of(a, state, group, SQUARES, first, channels)
        rests = quantity_of(a, state, group, RESTS, first, channels)
        square_rests = quantity_of(a, state, group, SQUARE_RESTS, first, channels)
        for i in range(channels):
            sums[i], squares[i] = whole_sum(sums[i], rests[i]), whole_sum(squares[i], square_rests[i])
            dbeta[i] += sums[i] / unit[i]
            dgamma[i] += squares[i] / unit[i] * slope[i] + (bend[i] * (sums[i] / unit[i]) if bend[i] != 0.0 else 0.0)
            if a.stage == COLLECT:
                put(a.sums, acc, first + i, sums[i] / unit[i])
                put(a.sums, acc, first + i + step, squares[i] / unit[i] * rstd[i])
                put(a.sums, acc, first + i + 2 * step, np.float64(counts[group]))
    if a.stage != COLLECT and a.last_group == a.groups:
        for i in range(channels):
            put(a.dgamma, of_parameters, first + i, dgamma[i])
            put(a.dbeta, of_parameters, first + i, dbeta[i])


@inner
def _gradient_of_input(a, like, g, row, columns, out, count):
    """Write a row of dx to an address: ``scale ((g + shift) + factor ((x - mean) - mean_low))``."""
    gradient, x, dx = numbers(like, g, 0, count), numbers(like, row, 0, count), numbers(like, out, 0, count)
    mean, low = numbers(like, line_of(columns, MEAN), 0, count), numbers(like, line_of(columns, LOW), 0, count)
    scale = numbers(like, line_of(columns, SCALE), 0, count)
    factor = numbers(like, line_of(columns, FACTOR), 0, count)
    shift = numbers(like, line_of(columns, GRADIENT_SHIFT), 0, count)
    if a.stage == FROZEN:  # dx does not depend on x
        for i in range(count):
            dx[i] = scale[i] * gradient[i]
    else:
        for i in range(count):
            dx[i] = scale[i] * ((gradient[i] + shift[i]) + factor[i] * ((x[i] - mean[i]) - low[i]))


@inner
def _choose_factors(a, group, first, count, normalisation, state, factor, shift):
    """Write factor and shift of ``dx = scale ((g + shift) + factor (x - mean))``."""
    channels, acc, step = len(factor), accumulator_of(a), a.channels
    lines = stack(1.0, 3072)
    sums, products = part(lines, 0, channels), part(lines, LINE, channels)
    divisor = part(lines, 2 * LINE, channels)
    for i in range(channels):
        sums[i], products[i], divisor[i] = 0.0, 0.0, max(count, 1)
    if a.stage == APPLY:
        get_line(a.sums, acc, first, 1, sums)
        get_line(a.sums, acc, first + step, 1, products)
        get_line(a.sums, acc, first + 2 * step, 1, divisor)
        for i in range(channels):
            divisor[i] = max(divisor[i], 1.0)
    elif a.stage == WHOLE:
        unit = quantity_of(a, state, group, UNIT, first, channels)
        of_g = quantity_of(a, state, group, SUMS, first, channels)
        of_products = quantity_of(a, state, group, SQUARES, first, channels)
        for i in range(channels):
            divisor[i] *= unit[i]
            sums[i], products[i] = of_g[i], of_products[i] * normalisation[RSTD * LINE + i]
    for i in range(channels):
        rstd, n = normalisation[RSTD * LINE + i], divisor[i]
        factor[i], shift[i] = -(products[i] / n * rstd), -(sums[i] / n)


@inner
def _write_gradients(arguments, dy, x, residual, dx, dresidual, group, first, channels, count_of_group, block, state):
    """Write the rows of a block of a slice of dx and dresidual."""
    a = arguments[()]
    lines, columns = stack(1.0, 6144), stack(1.0, 6144)
    normalisation, factors = stack(1.0, 7168), stack(1.0, 2048)
    double, masked, nothing = x.storage == FLOAT64, a.mask != 0, part(lines, 5 * LINE, LINE)
    for i in range(LINE):
        nothing[i] = 0.0
    normalise(arguments, group, first, channels, normalisation)
    factor, shift = part(factors, 0, channels), part(factors, LINE, channels)
    _choose_factors(a, group, first, count_of_group, normalisation, state, factor, shift)
    direct = dx.storage <= FLOAT64 and dx.address != x.address and dx.address != dy.address
    direct = direct and dx.address != residual.address
    whole = a.wide * channels * a.inner
    length = piece_length(whole)
    if double:
        spread_normalisation(a, DOUBLE, normalisation, channels, length, columns)
        spread_line(a, DOUBLE, factor, channels, length, columns, FACTOR)
        spread_line(a, DOUBLE, shift, channels, length, columns, GRADIENT_SHIFT)
    else:
        spread_normalisation(a, SINGLE, normalisation, channels, length, columns)
        spread_line(a, SINGLE, factor, channels, length, columns, FACTOR)
        spread_line(a, SINGLE, shift, channels, length, columns, GRADIENT_SHIFT)
    pieces = (whole + length - 1) // length
    for row in range(rows_before(a, block + 1) - 1, rows_before(a, block) - 1, -1):  # the last are still in the cache
        for piece in range(pieces - 1, -1, -1):
            column = piece * length
            count, place = own_columns(a, row, min(length, whole - column)), place_of(a, dx, row, first, column)
            if masked and a.inner == 1 and not valid(a, group, row, 0):
                store(dx.address, dx.storage, place, line_of(lines, 5), count)
                if dresidual.address != 0:
                    store(dresidual.address, dresidual.storage, place, line_of(lines, 5), count)
                continue
            g, values = _gradient(a, dy, x, residual, group, row, first, column, count, columns, lines)
            if dresidual.address != 0:
                store(dresidual.address, dresidual.storage, place, g, count)
            out = dx.address + np.uint64(place * (8 if double else 4)) if direct else line_of(lines, 4)
            if double:
                _gradient_of_input(a, DOUBLE, g, values, columns, out, count)
            else:
                _gradient_of_input(a, SINGLE, g, values, columns, out, count)
            if masked and a.inner > 1:
                if double:
                    clear(a, DOUBLE, group, row, column, nothing, out, count)
                else:
                    clear(a, SINGLE, group, row, column, nothing, out, count)
            if not direct:
                store(dx.address, dx.storage, place, out, count)


@device
def _inputs(a, group):
    """Return dy, x and the residual."""
    strides = a.residual_group, a.residual_outer, a.residual_channel, a.residual_inner
    dy = input_of(a, a.dy, group, (a.dy_group, a.dy_outer, a.dy_channel, a.dy_inner))
    x = input_of(a, a.x, group, (a.x_group, a.x_outer, a.x_channel, a.x_inner))
    return dy, x, input_of(a, a.residual, group, strides)


@kernel
def gradient_sums(arguments, counts, state, step, first_task, last_task):
    """Form the sums of slices; or with several blocks of rows make one step, whose tasks are these."""
    a = arguments[()]
    several, state = a.blocks > 1, state_from(a, state, first_task)
    for number in range(0 if several else first_task, a.slices if several else last_task):
        first = number * a.slice_channels
        channels = min(a.slice_channels, a.channels - first)
        for group in range(a.first_group, a.last_group):
            dy, x, residual = _inputs(a, group)
            unit = quantity_of(a, state, group, UNIT, first, channels)
            shift = quantity_of(a, state, group, SHIFT, first, channels)
            if step in (ALL, CHOOSE):
                for i in range(channels):
                    shift[i], unit[i] = 0.0, 1.0
            if step in (ALL, SUM):
                blocks = range(first_task, last_task) if several else range(1)
                for again in range(2 if step == ALL and a.storage == FLOAT64 else 1):
                    if again:
                        recentre(arguments, group, first, channels, counts[group], state)
                    for block in blocks:
                        _sum_gradients(arguments, dy, x, residual, group, first, channels, block, state)
            if step in (CENTRE, CONCLUDE):
                merge(arguments, group, first, channels, state)
            if step == CENTRE:
                recentre(arguments, group, first, channels, counts[group], state)
        if step in (ALL, CONCLUDE):
            _conclude(arguments, first, channels, counts, state)


@kernel
def input_gradients(arguments, counts, state, first_task, last_task):
    """Write dx and dresidual of slices, or with several blocks of blocks of rows."""
    a = arguments[()]
    several, state = a.blocks > 1, state_from(a, state, first_task)
    for group in range(a.first_group, a.last_group):
        dy, x, residual = _inputs(a, group)
        dx, dresidual = output_of(a, a.dx, group), output_of(a, a.dresidual, group)
        for number in range(0 if several else first_task, a.slices if several else last_task):
            first = number * a.slice_channels
            channels = min(a.slice_channels, a.channels - first)
            for block in range(first_task if several else 0, last_task if several else 1):
                _write_gradients(
                    arguments, dy, x, residual, dx, dresidual, group, first, channels, counts[group], block, state
                )
