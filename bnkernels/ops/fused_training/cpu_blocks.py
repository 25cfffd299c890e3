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
from bnkernels.runtime.cpu.vectors import (
    WIDTH,
    first,
    fold,
    get,
    largest,
    narrow,
    put,
    rectified,
    splat,
    where_at_most,
    widen,
)

HIGH, LOW, SCALE, SHIFT, OF_SUM, OF_PRODUCT = range(6)  # rows of a layer's vectors
PIECEWISE_LINEAR, SIGMOID, TANH = 0, 1, 2  # codes of activations whose slope follows from their output


@inner
def statistics(z, at, pitch, rows, seen, sums, sums_at):
    """Merge a block into the means of the columns and the sums of squared distances from them, after `seen` rows."""
    pairs, of_block, of_all = rows // 2 * 2 * pitch, 1.0 / rows, 1.0 / (seen + rows)
    for j in range(at, at + pitch, WIDTH):
        shift = widen(get(z, j))  # about the first row: equal ones have exactly its mean
        even, odd = splat(0.0), splat(0.0)
        for o in range(j, j + pairs, 2 * pitch):
            even, odd = even + (get(z, o) - shift), odd + (get(z, o + pitch) - shift)
        for o in range(j + pairs, j + rows * pitch, pitch):
            even = even + (get(z, o) - shift)
        mean = (even + odd) * of_block + shift
        high = narrow(mean, get(z, j))
        low = narrow(mean - high, high)
        even, odd = splat(0.0), splat(0.0)
        for o in range(j, j + pairs, 2 * pitch):
            one, two = widen(get(z, o) - high - low), widen(get(z, o + pitch) - high - low)
            even, odd = even + one * one, odd + two * two
        for o in range(j + pairs, j + rows * pitch, pitch):
            one = widen(get(z, o) - high - low)
            even = even + one * one
        square, to = even + odd, sums_at + j - at
        if seen > 0:
            before, squares = get(sums, to), get(sums, to + pitch)
            apart = mean - before
            part_of_mean = apart * (rows * of_all)
            mean = before + part_of_mean
            square = square + (apart * part_of_mean * np.float64(seen) + squares)
        put(sums, to, mean)
        put(sums, to + pitch, square)


@inner
def normalise_rows(z, at, pitch, rows, columns, eps, rstds_at):
    """Normalise every row over its columns, in place; keep 1 / the standard deviations."""
    dtype = z.dtype.type
    zero = dtype(0)
    for i in range(rows):
        row, found = at + i * pitch, splat(0.0)
        for j in range(0, columns, WIDTH):
            found = found + first(get(z, row + j), columns - j, zero)
        mean = fold(found) / columns
        high = dtype(mean)
        low, found = dtype(mean - high), splat(0.0)
        for j in range(0, columns, WIDTH):
            apart = widen(first(get(z, row + j) - high - low, columns - j, zero))
            found = found + apart * apart
        rstd = dtype(1 / np.sqrt(fold(found) / columns + eps))
        z[rstds_at + i] = rstd
        for j in range(row, row + columns, WIDTH):
            put(z, j, (get(z, j) - high - low) * rstd)


@inner
def normalised(z, at, pitch, rows, of_layer, alpha, h):
    """Write y = ((z - high) - low) * scale + shift, with alpha as its slope below 0; row by row, as memory lies."""
    slope = splat(alpha)
    for o in range(0, rows * pitch, pitch):
        for j in range(0, pitch, WIDTH):
            column = of_layer + j
            apart = get(z, at + o + j) - get(z, column + HIGH * pitch) - get(z, column + LOW * pitch)
            y = apart * get(z, column + SCALE * pitch) + get(z, column + SHIFT * pitch)
            put(h, o + j, rectified(y, slope, y))


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
    for j in range(0, pitch, WIDTH):
        column = of_layer + j
        high, low = get(z, column + HIGH * pitch), get(z, column + LOW * pitch)
        scale, shift = get(z, column + SCALE * pitch), get(z, column + SHIFT * pitch)
        found, products = splat(0.0), splat(0.0)
        if more:
            found, products = get(sums, j), get(sums, pitch + j)
        for o in range(j, rows * pitch + j, pitch):
            apart = get(z, at + o) - high - low
            dy = rectified(apart * scale + shift, slope, get(dh, o))
            put(dh, o, dy)
            found, products = found + dy, products + widen(dy) * apart
        put(sums, j, found)
        put(sums, pitch + j, products)


@inner
def batch_norm_backward(z, at, pitch, rows, of_layer, g, g_at):
    """Write dz over g, given the means of both sums; row by row, as memory lies."""
    for o in range(0, rows * pitch, pitch):
        for j in range(0, pitch, WIDTH):
            column, to = of_layer + j, g_at + o + j
            apart = get(z, at + o + j) - get(z, column + HIGH * pitch) - get(z, column + LOW * pitch)
            dz = get(g, to) - get(z, column + OF_SUM * pitch) - apart * get(z, column + OF_PRODUCT * pitch)
            put(g, to, dz * get(z, column + SCALE * pitch))


@inner
def layer_norm_backward(z, at, pitch, rows, columns, of_layer, rstds_at, g, g_at):
    """Write dz over g, where z holds the normalised rows."""
    dtype, gamma = z.dtype.type, of_layer + SCALE * pitch
    zero = dtype(0)
    for i in range(rows):
        row, g_row = at + i * pitch, g_at + i * pitch
        found, products = splat(0.0), splat(0.0)
        for j in range(0, columns, WIDTH):
            dxhat = first(get(g, g_row + j) * get(z, gamma + j), columns - j, zero)
            xhat = first(get(z, row + j), columns - j, zero)
            found, products = found + dxhat, products + widen(dxhat) * xhat
        of_sum, of_product, rstd = dtype(fold(found) / columns), dtype(fold(products) / columns), z[rstds_at + i]
        for j in range(0, columns, WIDTH):
            dxhat = get(g, g_row + j) * get(z, gamma + j)
            put(g, g_row + j, (dxhat - of_sum - get(z, row + j) * of_product) * rstd)


@inner
def column_sums(g, at, pitch, rows, sums):
    """Write the sums of the columns."""
    for j in range(0, pitch, WIDTH):
        found = splat(0.0)
        for o in range(at + j, at + j + rows * pitch, pitch):
            found = found + get(g, o)
        put(sums, j, found)


@inner
def cross_entropy(z, at, pitch, columns, of_layer, labels, batch, totals):
    """Write the gradients of the mean loss over the logits without their bias; return the sum of the losses."""
    dtype, rows, bias, loss = z.dtype.type, len(labels), of_layer + SHIFT * pitch, 0.0
    lowest, zero = dtype(-np.inf), dtype(0)
    for i in range(rows):
        row, best = at + i * pitch, splat(lowest)
        for j in range(0, columns, WIDTH):
            logits = get(z, row + j) + get(z, bias + j)
            put(z, row + j, logits)
            logits = first(logits, columns - j, lowest)
            best = where_at_most(best, logits, logits, best)
        highest = largest(best)
        for j in range(row, row + columns, WIDTH):
            put(z, j, get(z, j) - highest)
        loss -= z[row + labels[i]]
    _map_exp(part(z, at, rows * pitch))
    for i in range(rows):
        row, found = at + i * pitch, splat(0.0)
        for j in range(0, columns, WIDTH):
            found = found + first(get(z, row + j), columns - j, zero)
        sum_ = fold(found)
        totals[i] = dtype(sum_)
        scale = dtype(1 / (sum_ * batch))
        for j in range(row, row + columns, WIDTH):
            put(z, j, get(z, j) * scale)
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
