"""Passes of fused training over a block of rows that lies in the cache: norms, activations, losses, and backwards.

Numbers of a layer are rows of `pitch` numbers, a multiple of a vector; what is behind the layer's outputs is never
used. Every normalised layer is ``y = ((z - high) - low) * scale + shift`` by column: with batch norm high + low is the
mean, with layer norm z has become the normalised rows, and without a norm scale is 1 and shift the bias. A pass goes
through the columns, a vector at a time, and keeps its sums, in float64, in registers.
"""

import numpy as np

from bnkernels.ops.activations_cpu import activate, differentiate
from bnkernels.runtime.cpu.language import kernel, part
from bnkernels.runtime.cpu.vectors import (
    first,
    largest,
    load,
    load_sum,
    narrow,
    splat,
    splat_wide,
    store,
    total,
    where_at_most,
    widen,
)

HIGH, LOW, SCALE, SHIFT, OF_SUM, OF_PRODUCT = range(6)  # rows of a layer's vectors
PIECEWISE_LINEAR, SIGMOID, TANH = 0, 1, 2  # codes of activations whose slope follows from their output


@kernel
def statistics(z, at, pitch, rows, seen, sums, sums_at):
    """Merge a block into the means of the columns and the sums of squared distances from them, after `seen` rows."""
    lanes = 32 // z.itemsize
    of_block, of_all = 1.0 / rows, 1.0 / (seen + rows)
    for j in range(0, pitch, lanes):
        like = load(z, at + j)
        even = odd = splat_wide(0.0, like)
        for i in range(0, rows - 1, 2):
            even = even + widen(load(z, at + i * pitch + j))
            odd = odd + widen(load(z, at + (i + 1) * pitch + j))
        if rows % 2:
            even = even + widen(load(z, at + (rows - 1) * pitch + j))
        mean = (even + odd) * splat_wide(of_block, like)
        high = narrow(mean, like)
        low = narrow(mean - widen(high), like)
        even = odd = splat_wide(0.0, like)
        for i in range(0, rows - 1, 2):
            one = widen((load(z, at + i * pitch + j) - high) - low)
            two = widen((load(z, at + (i + 1) * pitch + j) - high) - low)
            even, odd = even + one * one, odd + two * two
        if rows % 2:
            one = widen((load(z, at + (rows - 1) * pitch + j) - high) - low)
            even = even + one * one
        square = even + odd
        if seen > 0:
            before = load_sum(sums, sums_at + j, like)
            apart = mean - before
            square = square + load_sum(sums, sums_at + pitch + j, like) + apart * apart * splat_wide(seen * rows * of_all, like)
            mean = before + apart * splat_wide(rows * of_all, like)
        store(sums, sums_at + j, mean)
        store(sums, sums_at + pitch + j, square)


@kernel
def normalise_rows(z, at, pitch, rows, columns, eps, rstds_at):
    """Normalise every row over its columns, in place; keep 1 / the standard deviations."""
    lanes, dtype = 32 // z.itemsize, z.dtype.type
    for i in range(rows):
        row = at + i * pitch
        like = load(z, row)
        found = splat_wide(0.0, like)
        for j in range(0, columns, lanes):
            found = found + first(widen(load(z, row + j)), columns - j, 0.0)
        mean = total(found) / columns
        upper = dtype(mean)
        high, low = splat(upper), splat(dtype(mean - upper))
        found = splat_wide(0.0, like)
        for j in range(0, columns, lanes):
            apart = first(widen((load(z, row + j) - high) - low), columns - j, 0.0)
            found = found + apart * apart
        rstd = dtype(1 / np.sqrt(total(found) / columns + eps))
        z[rstds_at + i] = rstd
        scale = splat(rstd)
        for j in range(0, columns, lanes):
            store(z, row + j, ((load(z, row + j) - high) - low) * scale)


@kernel
def normalised(z, at, pitch, rows, of_layer, y):
    """Write y = ((z - high) - low) * scale + shift."""
    lanes = 32 // z.itemsize
    for j in range(0, pitch, lanes):
        column = of_layer + j
        high, low = load(z, column + HIGH * pitch), load(z, column + LOW * pitch)
        scale, shift = load(z, column + SCALE * pitch), load(z, column + SHIFT * pitch)
        for i in range(rows):
            store(y, i * pitch + j, ((load(z, at + i * pitch + j) - high) - low) * scale + shift)


@kernel
def activations(z, at, pitch, rows, of_layer, code, alpha, h):
    """Write phi(y)."""
    if code != PIECEWISE_LINEAR:
        normalised(z, at, pitch, rows, of_layer, h)
        activate(code, alpha, part(h, 0, rows * pitch))
        return
    lanes = 32 // z.itemsize
    zero, slope = splat(z.dtype.type(0)), splat(alpha)
    for j in range(0, pitch, lanes):
        column = of_layer + j
        high, low = load(z, column + HIGH * pitch), load(z, column + LOW * pitch)
        scale, shift = load(z, column + SCALE * pitch), load(z, column + SHIFT * pitch)
        if alpha == z.dtype.type(0):
            for i in range(rows):
                y = ((load(z, at + i * pitch + j) - high) - low) * scale + shift
                store(h, i * pitch + j, where_at_most(y, zero, zero, y))
        else:
            for i in range(rows):
                y = ((load(z, at + i * pitch + j) - high) - low) * scale + shift
                store(h, i * pitch + j, where_at_most(y, zero, y * slope, y))


@kernel
def activations_backward(z, at, pitch, rows, of_layer, code, alpha, h, y, g, g_at, sums, add):
    """Multiply g by phi'(y); write or add the sums of g and of g times the distance of z from high + low."""
    if code > TANH:
        normalised(z, at, pitch, rows, of_layer, y)
        differentiate(code, alpha, part(y, 0, rows * pitch), part(g, g_at, rows * pitch))
    lanes = 32 // z.itemsize
    zero, one, slope = splat(z.dtype.type(0)), splat(z.dtype.type(1)), splat(alpha)
    for j in range(0, pitch, lanes):
        column = of_layer + j
        high, low = load(z, column + HIGH * pitch), load(z, column + LOW * pitch)
        scale, shift = load(z, column + SCALE * pitch), load(z, column + SHIFT * pitch)
        found = products = splat_wide(0.0, high)
        if add:
            found, products = load_sum(sums, j, high), load_sum(sums, pitch + j, high)
        for i in range(rows):
            apart = (load(z, at + i * pitch + j) - high) - low
            dy = load(g, g_at + i * pitch + j)
            if code == PIECEWISE_LINEAR:
                below = zero if alpha == z.dtype.type(0) else dy * slope
                dy = where_at_most(apart * scale + shift, zero, below, dy)
            elif code == SIGMOID:
                activated = load(h, i * pitch + j)
                dy = dy * (activated * (one - activated))
            elif code == TANH:
                activated = load(h, i * pitch + j)
                dy = dy * (one - activated * activated)
            store(g, g_at + i * pitch + j, dy)
            wide = widen(dy)
            found = found + wide
            products = products + wide * widen(apart)
        store(sums, j, found)
        store(sums, pitch + j, products)


@kernel
def batch_norm_backward(z, at, pitch, rows, of_layer, g, g_at):
    """Write dz over g, given the means of both sums."""
    lanes = 32 // z.itemsize
    for j in range(0, pitch, lanes):
        column = of_layer + j
        high, low = load(z, column + HIGH * pitch), load(z, column + LOW * pitch)
        scale = load(z, column + SCALE * pitch)
        of_sum, of_product = load(z, column + OF_SUM * pitch), load(z, column + OF_PRODUCT * pitch)
        for i in range(rows):
            apart = (load(z, at + i * pitch + j) - high) - low
            store(g, g_at + i * pitch + j, ((load(g, g_at + i * pitch + j) - of_sum) - apart * of_product) * scale)


@kernel
def layer_norm_backward(z, at, pitch, rows, columns, of_layer, rstds_at, g, g_at):
    """Write dz over g, where z holds the normalised rows."""
    lanes, dtype = 32 // z.itemsize, z.dtype.type
    gamma = of_layer + SCALE * pitch
    for i in range(rows):
        row, g_row = at + i * pitch, g_at + i * pitch
        like = load(z, row)
        found = products = splat_wide(0.0, like)
        for j in range(0, columns, lanes):
            wide = first(widen(load(g, g_row + j) * load(z, gamma + j)), columns - j, 0.0)
            found = found + wide
            products = products + wide * first(widen(load(z, row + j)), columns - j, 0.0)
        of_sum, of_product = splat(dtype(total(found) / columns)), splat(dtype(total(products) / columns))
        rstd = splat(z[rstds_at + i])
        for j in range(0, columns, lanes):
            dxhat = load(g, g_row + j) * load(z, gamma + j)
            store(g, g_row + j, ((dxhat - of_sum) - load(z, row + j) * of_product) * rstd)


@kernel
def column_sums(g, at, pitch, rows, sums):
    """Write the sums of the columns."""
    lanes = 32 // g.itemsize
    for j in range(0, pitch, lanes):
        like = load(g, at + j)
        found = splat_wide(0.0, like)
        for i in range(rows):
            found = found + widen(load(g, at + i * pitch + j))
        store(sums, j, found)


@kernel
def exponentials(z):
    """Write exp(z) over z."""
    for i in range(len(z)):
        z[i] = np.exp(z[i])


@kernel
def cross_entropy(z, at, pitch, columns, of_layer, labels, batch, totals):
    """Write the gradients of the mean loss over the logits without their bias; return the sum of the losses."""
    lanes, dtype, rows = 32 // z.itemsize, z.dtype.type, len(labels)
    bias, lowest, loss = of_layer + SHIFT * pitch, dtype(-np.inf), 0.0
    for i in range(rows):
        row = at + i * pitch
        best = splat(lowest)
        for j in range(0, columns, lanes):
            logits = load(z, row + j) + load(z, bias + j)
            store(z, row + j, logits)
            logits = first(logits, columns - j, lowest)
            best = where_at_most(best, logits, logits, best)
        highest = splat(largest(best))
        for j in range(0, columns, lanes):
            store(z, row + j, load(z, row + j) - highest)
        loss -= z[row + labels[i]]
    exponentials(part(z, at, rows * pitch))
    share = dtype(1 / batch)
    for i in range(rows):
        row = at + i * pitch
        found = splat_wide(0.0, load(z, row))
        for j in range(0, columns, lanes):
            found = found + first(widen(load(z, row + j)), columns - j, 0.0)
        totals[i] = total(found)
        scale = splat(dtype(1 / (totals[i] * batch)))
        for j in range(0, columns, lanes):
            store(z, row + j, load(z, row + j) * scale)
        z[row + labels[i]] -= share
    for i in range(rows):
        loss += np.log(totals[i])
    return loss


@kernel
def turned(matrix, at, rows, columns, pitch, out):
    """Write the columns of a matrix as rows."""
    for j in range(columns):
        for i in range(rows):
            out[j * pitch + i] = matrix[at + i * columns + j]
