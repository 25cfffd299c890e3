"""Passes of fused training over a block of rows that lies in the cache: norms, activations, losses, and backwards.

Numbers of a layer are rows of `pitch` numbers, a multiple of a vector; what is behind the layer's outputs is never
used. Every layer is ``y = ((z - high) - low) * scale + shift`` by column: with batch norm high + low is the mean, with
layer norm z has become the normalised rows, and without a norm scale is 1 and shift the bias. A pass goes through the
columns, a vector at a time, and keeps its sums, in float64, in registers.
"""

import numpy as np

from bnkernels.ops.activations_cpu import activate, differentiate
from bnkernels.runtime.cpu.language import inner, part
from bnkernels.runtime.cpu.mathematics import exp, log
from bnkernels.runtime.cpu.registers import (
    add,
    add_product,
    add_wide,
    distance,
    first,
    largest,
    load,
    load_sum,
    multiply,
    multiply_add,
    narrow,
    rectified,
    splat,
    splat_wide,
    store,
    subtract,
    total,
    where_at_most,
    widen,
)

HIGH, LOW, SCALE, SHIFT, OF_SUM, OF_PRODUCT = range(6)  # rows of a layer's vectors
PIECEWISE_LINEAR, SIGMOID, TANH = 0, 1, 2  # codes of activations whose slope follows from their output


@inner
def statistics(z, at, pitch, rows, seen, sums, sums_at):
    """Merge a block into the means of the columns and the sums of squared distances from them, after `seen` rows."""
    lanes, pairs = 32 // z.itemsize, rows // 2 * 2 * pitch
    of_block, of_all = 1.0 / rows, 1.0 / (seen + rows)
    for j in range(0, pitch, lanes):
        like = load(z, at + j)
        none, shift = splat_wide(0.0, like), widen(like)  # about the first row: equal ones have exactly its mean
        even = odd = none
        for o in range(at + j, at + j + pairs, 2 * pitch):
            even = add(even, subtract(widen(load(z, o)), shift))
            odd = add(odd, subtract(widen(load(z, o + pitch)), shift))
        for o in range(at + j + pairs, at + j + rows * pitch, pitch):
            even = add(even, subtract(widen(load(z, o)), shift))
        mean = multiply_add(add(even, odd), splat_wide(of_block, like), shift)
        high = narrow(mean, like)
        low = narrow(subtract(mean, widen(high)), like)
        even = odd = none
        for o in range(at + j, at + j + pairs, 2 * pitch):
            one, two = distance(load(z, o), high, low), distance(load(z, o + pitch), high, low)
            even, odd = add_product(even, one, one), add_product(odd, two, two)
        for o in range(at + j + pairs, at + j + rows * pitch, pitch):
            one = distance(load(z, o), high, low)
            even = add_product(even, one, one)
        square = add(even, odd)
        if seen > 0:
            before, squares = load_sum(sums, sums_at + j, like), load_sum(sums, sums_at + pitch + j, like)
            apart = subtract(mean, before)
            part_of_mean = multiply(apart, splat_wide(rows * of_all, like))
            mean = add(before, part_of_mean)
            square = add(
                square, multiply_add(multiply(apart, part_of_mean), splat_wide(np.float64(seen), like), squares)
            )
        store(sums, sums_at + j, mean)
        store(sums, sums_at + pitch + j, square)


@inner
def normalise_rows(z, at, pitch, rows, columns, eps, rstds_at):
    """Normalise every row over its columns, in place; keep 1 / the standard deviations."""
    lanes, dtype = 32 // z.itemsize, z.dtype.type
    for i in range(rows):
        row = at + i * pitch
        found = none = splat_wide(0.0, load(z, row))
        for j in range(0, columns, lanes):
            found = add_wide(found, first(load(z, row + j), columns - j, dtype(0)))
        mean = total(found) / columns
        upper = dtype(mean)
        high, low = splat(upper), splat(dtype(mean - upper))
        found = none
        for j in range(0, columns, lanes):
            apart = first(distance(load(z, row + j), high, low), columns - j, dtype(0))
            found = add_product(found, apart, apart)
        rstd = dtype(1 / np.sqrt(total(found) / columns + eps))
        z[rstds_at + i] = rstd
        scale = splat(rstd)
        for j in range(0, columns, lanes):
            store(z, row + j, multiply(distance(load(z, row + j), high, low), scale))


@inner
def normalised(z, at, pitch, rows, of_layer, alpha, h):
    """Write y = ((z - high) - low) * scale + shift, with alpha as its slope below 0; row by row, as memory lies."""
    slope, lanes = splat(alpha), 32 // z.itemsize
    for o in range(0, rows * pitch, pitch):
        for j in range(0, pitch, lanes):
            column = of_layer + j
            apart = distance(load(z, at + o + j), load(z, column + HIGH * pitch), load(z, column + LOW * pitch))
            y = multiply_add(apart, load(z, column + SCALE * pitch), load(z, column + SHIFT * pitch))
            store(h, o + j, rectified(y, slope, y))


@inner
def activations(z, at, pitch, rows, of_layer, code, alpha, h):
    """Write phi(y)."""
    normalised(z, at, pitch, rows, of_layer, alpha if code == PIECEWISE_LINEAR else z.dtype.type(1), h)
    if code != PIECEWISE_LINEAR:
        activate(code, alpha, part(h, 0, rows * pitch))


@inner
def slopes_of_outputs(code, h, g):
    """Multiply g by the slope of sigmoid or tanh, given its output."""
    one = h.dtype.type(1)
    if code == SIGMOID:
        for i in range(len(g)):
            g[i] *= h[i] * (one - h[i])
    elif code == TANH:
        for i in range(len(g)):
            g[i] *= one - h[i] * h[i]


@inner
def activations_backward(z, at, pitch, rows, of_layer, code, alpha, h, y, g, g_at, sums, more):
    """Multiply g by phi'(y); write, or add if there is more, the sums of g and of g (z - high - low)."""
    dh, one = part(g, g_at, rows * pitch), z.dtype.type(1)
    if code > TANH:
        normalised(z, at, pitch, rows, of_layer, one, y)
        differentiate(code, alpha, part(y, 0, rows * pitch), dh)
    else:
        slopes_of_outputs(code, part(h, 0, rows * pitch), dh)
    slope = splat(alpha if code == PIECEWISE_LINEAR else one)
    for j in range(0, pitch, 32 // z.itemsize):
        column = of_layer + j
        high, low = load(z, column + HIGH * pitch), load(z, column + LOW * pitch)
        scale, shift = load(z, column + SCALE * pitch), load(z, column + SHIFT * pitch)
        found = products = splat_wide(0.0, high)
        if more:
            found, products = load_sum(sums, j, high), load_sum(sums, pitch + j, high)
        for o in range(j, rows * pitch + j, pitch):
            apart = distance(load(z, at + o), high, low)
            dy = rectified(multiply_add(apart, scale, shift), slope, load(dh, o))
            store(dh, o, dy)
            found, products = add_wide(found, dy), add_product(products, dy, apart)
        store(sums, j, found)
        store(sums, pitch + j, products)


@inner
def batch_norm_backward(z, at, pitch, rows, of_layer, g, g_at):
    """Write dz over g, given the means of both sums; row by row, as memory lies."""
    lanes = 32 // z.itemsize
    for o in range(0, rows * pitch, pitch):
        for j in range(0, pitch, lanes):
            column, to = of_layer + j, g_at + o + j
            apart = distance(load(z, at + o + j), load(z, column + HIGH * pitch), load(z, column + LOW * pitch))
            apart = multiply(apart, load(z, column + OF_PRODUCT * pitch))
            dz = distance(load(g, to), load(z, column + OF_SUM * pitch), apart)
            store(g, to, multiply(dz, load(z, column + SCALE * pitch)))


@inner
def layer_norm_backward(z, at, pitch, rows, columns, of_layer, rstds_at, g, g_at):
    """Write dz over g, where z holds the normalised rows."""
    lanes, dtype = 32 // z.itemsize, z.dtype.type
    gamma = of_layer + SCALE * pitch
    for i in range(rows):
        row, g_row = at + i * pitch, g_at + i * pitch
        found = products = splat_wide(0.0, load(z, row))
        for j in range(0, columns, lanes):
            dxhat = first(multiply(load(g, g_row + j), load(z, gamma + j)), columns - j, dtype(0))
            xhat = first(load(z, row + j), columns - j, dtype(0))
            found, products = add_wide(found, dxhat), add_product(products, dxhat, xhat)
        of_sum, of_product = splat(dtype(total(found) / columns)), splat(dtype(total(products) / columns))
        rstd = splat(z[rstds_at + i])
        for j in range(0, columns, lanes):
            dxhat, xhat = multiply(load(g, g_row + j), load(z, gamma + j)), load(z, row + j)
            store(g, g_row + j, multiply(distance(dxhat, of_sum, multiply(xhat, of_product)), rstd))


@inner
def column_sums(g, at, pitch, rows, sums):
    """Write the sums of the columns."""
    for j in range(0, pitch, 32 // g.itemsize):
        found = splat_wide(0.0, load(g, at + j))
        for o in range(at + j, at + j + rows * pitch, pitch):
            found = add_wide(found, load(g, o))
        store(sums, j, found)


@inner
def cross_entropy(z, at, pitch, columns, of_layer, labels, batch, totals):
    """Write the gradients of the mean loss over the logits without their bias; return the sum of the losses."""
    lanes, dtype, rows = 32 // z.itemsize, z.dtype.type, len(labels)
    bias, lowest, loss = of_layer + SHIFT * pitch, dtype(-np.inf), 0.0
    for i in range(rows):
        row = at + i * pitch
        best = splat(lowest)
        for j in range(0, columns, lanes):
            logits = add(load(z, row + j), load(z, bias + j))
            store(z, row + j, logits)
            logits = first(logits, columns - j, lowest)
            best = where_at_most(best, logits, logits, best)
        highest = splat(largest(best))
        for j in range(0, columns, lanes):
            store(z, row + j, subtract(load(z, row + j), highest))
        loss -= z[row + labels[i]]
    _map_exp(part(z, at, rows * pitch))
    for i in range(rows):
        row = at + i * pitch
        found = splat_wide(0.0, load(z, row))
        for j in range(0, columns, lanes):
            found = add_wide(found, first(load(z, row + j), columns - j, dtype(0)))
        sum_ = total(found)
        totals[i] = dtype(sum_)
        scale = splat(dtype(1 / (sum_ * batch)))
        for j in range(0, columns, lanes):
            store(z, row + j, multiply(load(z, row + j), scale))
        z[row + labels[i]] -= dtype(1 / batch)
    _map_log(part(totals, 0, rows))
    for i in range(rows):
        loss += totals[i]
    return loss


@inner
def _map_exp(z):
    for i in range(len(z)):
        z[i] = exp(z[i])


@inner
def _map_log(z):
    for i in range(len(z)):
        z[i] = log(z[i])


@inner
def turned(matrix, at, rows, columns, pitch, out):
    """Write the columns of a matrix as rows."""
    for j in range(columns):
        for i in range(rows):
            out[j * pitch + i] = matrix[at + i * columns + j]
