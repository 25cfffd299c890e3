"""Layer norm, RMS norm and group norm backward on the CPU.

Formulas:  Of ``cuda/layer_norm_backward.cu``.
Arrays:    Those of the CUDA kernel, given by their addresses; 0 for none. sums: of the columns of every block, or of
           long rows the two means and whether the gradients were scaled; float64.
Tasks:     Blocks of `height` rows of a group of channels. Of rows too long to be held: rows, and then lines of columns.
Traffic:   dy and x are read once and dx is written once; of rows too long to be held, dy and x are read twice.
Numerics:  Sums of a row are of float64, float32 by fours; sums of columns of the accumulator's type over 8 rows, and
           then of float64. Where a float64 sum of a row overflows, the gradients are scaled first.
Order:     Sums of columns are of blocks, which are merged in order.
"""

import numpy as np

from bnkernels.ops.activations_cpu import differentiate
from bnkernels.ops.layer_norm.cpu.forward import FOUR, SMALL_DOUBLE, vector
from bnkernels.runtime.cpu.language import (
    LINE,
    accumulator,
    cast,
    device,
    doubles,
    inner,
    is_double,
    kernel,
    load,
    numbers,
    part,
    place,
    size_of,
    stack,
    store,
)
from bnkernels.runtime.cpu.sums import add, fill_line, flush, store_sums, total
from bnkernels.runtime.cpu.vectors import WIDTH, first, fold, get, get_first, prefetch, put, splat

HELD = 8192  # columns of a row whose intermediate values are held
GROUP = 8  # rows whose columns are summed in the accumulator's type
LARGE_DOUBLE = 1 / SMALL_DOUBLE


@device
def _of_row(of_rows, n, centre):
    """Return mean, mean_low and rstd of a row; the mean is 0 where the distance from it may be beyond the type."""
    if not centre:
        zero = cast(0, of_rows[n])
        return zero, zero, of_rows[n]
    rows = len(of_rows) // 3
    mean, low, rstd = of_rows[n], of_rows[rows + n], of_rows[2 * rows + n]
    return (rstd, rstd, rstd) if rstd == 0 else (mean, low, rstd)


@device
def _gradients(like, dy, x, offset, of_row, weights, shifts, alpha, code, z, g, line):
    """Return a part of a row, which may be in `line`, and the gradients in front of the activation, or in `g`."""
    mean, low, rstd = of_row
    values, gradient = load(like, x, offset, line), load(like, dy, offset, g)
    if code == 0 and alpha == 1:
        return values, gradient
    if size_of(like) > 2:
        for j in range(len(g)):
            g[j] = gradient[j]
    for j in range(len(z)):
        z[j] = ((values[j] - mean) - low) * rstd * weights[j] + shifts[j]
    differentiate(code, alpha, z, g)
    return values, g


@device
def _add_up(values, gradient, of_row, weights, xhat, of_beta, of_gamma):
    """Write the normalised numbers of a part of a row, and add it to the sums of columns.

    Return the sums of the scaled gradients and of them with `xhat`, of which float64 takes float32 numbers by fours.
    """
    (mean, low, rstd), zero, count = of_row, cast(0, xhat[0]), len(xhat)
    sums, products, whole = splat(0.0), splat(0.0), count // FOUR * FOUR
    for i in range(0, whole, FOUR):
        sum_, product = splat(zero), splat(zero)
        for k in range(i, i + FOUR, FOUR // 2):  # the next row
            prefetch(values, k + count)
            prefetch(gradient, k + count)
        for k in range(i, i + FOUR, WIDTH):
            g, normalised = get(gradient, k), (get(values, k) - mean - low) * rstd
            put(xhat, k, normalised)
            put(of_beta, k, get(of_beta, k) + g)
            put(of_gamma, k, get(of_gamma, k) + g * normalised)
            h = g * get(weights, k)
            sum_, product = sum_ + h, product + h * normalised
        sums, products = sums + sum_, products + product
    for i in range(whole, count, WIDTH):
        rest = count - i
        g, normalised = get_first(gradient, i, rest), (get_first(values, i, rest) - mean - low) * rstd
        normalised = first(normalised, rest, zero)
        put(xhat, i, normalised)
        put(of_beta, i, get(of_beta, i) + g)
        put(of_gamma, i, get(of_gamma, i) + g * normalised)
        h = g * get_first(weights, i, rest)
        sums, products = sums + h, products + h * normalised
    return fold(sums), fold(products)


@inner
def _add_scaled(gradient, weights, xhat, g, line):
    """Write float64 gradients, scaled so that their sums do not overflow; return these as `_add_up` does."""
    for j in range(len(g)):
        g[j] = gradient[j] * SMALL_DOUBLE
        line[j] = g[j] * weights[j]
    sum_h = total(line)
    for j in range(len(g)):
        line[j] *= xhat[j]
    return sum_h, total(line)


@device
def _write(like, dx, offset, gradient, weights, xhat, rstd, mean, slope, line):
    """Write `dx` of a part of a row; it may lie where the gradients lie."""
    out, mean, slope = place(like, dx, offset, line), cast(mean, rstd), cast(slope, rstd)
    eights = len(out) // WIDTH * WIDTH
    for i in range(0, eights, WIDTH):
        put(out, i, rstd * ((get(gradient, i) * get(weights, i) - mean) - get(xhat, i) * slope))
    for i in range(eights, len(out)):
        out[i] = rstd * ((gradient[i] * weights[i] - mean) - xhat[i] * slope)
    return out


@kernel
def backward_blocks(
    like, params, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, sums, rows, columns, groups, centre, alpha, code,
    height, first, last
):  # fmt: skip
    """Write `dx` and the sums of columns of blocks of rows, or of the only block the gradients."""
    acc = accumulator(like)
    xhat, g, line = stack(acc, HELD), stack(acc, HELD), stack(acc, HELD)
    ones, zeros = stack(acc, HELD), stack(acc, HELD)
    of_beta, of_gamma = stack(acc, HELD), stack(acc, HELD)
    xhat, g, line = part(xhat, 0, columns), part(g, 0, columns), part(line, 0, columns)
    ones, zeros = part(ones, 0, columns), part(zeros, 0, columns)
    of_beta, of_gamma = part(of_beta, 0, columns), part(of_gamma, 0, columns)
    fill_line(ones, cast(1, acc)), fill_line(zeros, acc), fill_line(of_beta, acc), fill_line(of_gamma, acc)
    alpha = cast(alpha, acc)
    of_rows = numbers(acc, statistics, 0, 3 * rows if centre else rows)
    for task in range(first, last):
        block, group = task // groups, task % groups
        weights, shifts = vector(params, gamma, group * columns, ones), vector(params, beta, group * columns, zeros)
        beta_sums = doubles(sums, (2 * block * groups + group) * columns, columns)
        gamma_sums = doubles(sums, ((2 * block + 1) * groups + group) * columns, columns)
        fill_line(beta_sums, 0.0), fill_line(gamma_sums, 0.0)
        end = min(rows // groups, (block + 1) * height)
        for start in range(block * height, end, GROUP):
            for i in range(start, min(start + GROUP, end)):
                n = i * groups + group
                of_row, offset = _of_row(of_rows, n, centre), n * columns
                given = weights, shifts, alpha, code, xhat, g, line
                values, gradient = _gradients(like, dy, x, offset, of_row, *given)
                sum_h, product = _add_up(values, gradient, of_row, weights, xhat, of_beta, of_gamma)
                scaled = is_double(like) and not np.isfinite(sum_h + product)
                if scaled:
                    sum_h, product = _add_scaled(gradient, weights, xhat, g, line)
                    gradient = g
                means = sum_h / columns if centre else 0.0, product / columns
                out = _write(like, dx, offset, gradient, weights, xhat, of_row[2], *means, line)
                if scaled:
                    for j in range(columns):
                        out[j] *= LARGE_DOUBLE
                store(like, dx, offset, out)
            flush(of_beta, beta_sums)
            flush(of_gamma, gamma_sums)
        if height >= rows // groups:
            if centre:
                store_sums(params, dbeta, group * columns, beta_sums, line)
            store_sums(params, dgamma, group * columns, gamma_sums, line)


@kernel
def backward_rows(
    like, params, dy, x, gamma, beta, statistics, sums, rows, columns, groups, centre, alpha, code, first, last
):  # fmt: skip
    """Write the two means of long rows, and whether their gradients are scaled."""
    acc = accumulator(like)
    xhat, g, line = stack(acc, LINE), stack(acc, LINE), stack(acc, LINE)
    ones, zeros, of_beta, of_gamma = stack(acc, LINE), stack(acc, LINE), stack(acc, LINE), stack(acc, LINE)
    fill_line(ones, cast(1, acc)), fill_line(zeros, acc)
    means, alpha = doubles(sums, 0, 3 * rows), cast(alpha, acc)
    of_rows = numbers(acc, statistics, 0, 3 * rows if centre else rows)
    for n in range(first, last):
        of_row, scaled = _of_row(of_rows, n, centre), False
        while True:
            pair, products = (0.0, 0.0), (0.0, 0.0)
            for start in range(0, columns, LINE):
                count = min(LINE, columns - start)
                own = n % groups * columns + start
                weights, shifts = vector(params, gamma, own, part(ones, 0, count)), part(zeros, 0, count)
                lines = part(xhat, 0, count), part(g, 0, count), part(line, 0, count)
                given = dy, x, n * columns + start, of_row, weights, vector(params, beta, own, shifts)
                values, gradient = _gradients(like, *given, alpha, code, *lines)
                sum_h, product = _add_up(values, gradient, of_row, weights, lines[0], of_beta, of_gamma)
                if scaled:
                    sum_h, product = _add_scaled(gradient, weights, *lines)
                pair, products = add(pair, sum_h), add(products, product)
            sum_h, product = pair[0] + pair[1], products[0] + products[1]
            if scaled or not is_double(like) or np.isfinite(sum_h + product):
                break
            scaled = True
        means[n], means[rows + n] = sum_h / columns if centre else 0.0, product / columns
        means[2 * rows + n] = scaled


@kernel
def backward_columns(
    like, params, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, sums, rows, columns, groups, centre, alpha, code,
    first, last
):  # fmt: skip
    """Write `dx` of long rows, whose means are known, and the sums of columns, line by line of columns."""
    acc = accumulator(like)
    xhat, g, line = stack(acc, LINE), stack(acc, LINE), stack(acc, LINE)
    ones, zeros = stack(acc, LINE), stack(acc, LINE)
    of_beta, of_gamma, beta_sums, gamma_sums = stack(acc, LINE), stack(acc, LINE), stack(0.0, LINE), stack(0.0, LINE)
    fill_line(ones, cast(1, acc)), fill_line(zeros, acc), fill_line(of_beta, acc), fill_line(of_gamma, acc)
    alpha = cast(alpha, acc)
    means, of_rows = doubles(sums, 0, 3 * rows), numbers(acc, statistics, 0, 3 * rows if centre else rows)
    lines_of_row = (columns + LINE - 1) // LINE
    for task in range(first, last):
        group, start = task // lines_of_row, task % lines_of_row * LINE
        own = group * columns + start
        count = min(LINE, columns - start)
        fill_line(beta_sums, 0.0), fill_line(gamma_sums, 0.0)
        weights, shifts = vector(params, gamma, own, part(ones, 0, count)), part(zeros, 0, count)
        shifts = vector(params, beta, own, shifts)
        lines = part(xhat, 0, count), part(g, 0, count), part(line, 0, count)
        for i in range(rows // groups):
            n = i * groups + group
            of_row, offset = _of_row(of_rows, n, centre), n * columns + start
            values, gradient = _gradients(like, dy, x, offset, of_row, weights, shifts, alpha, code, *lines)
            _add_up(values, gradient, of_row, weights, lines[0], of_beta, of_gamma)
            scaled = is_double(like) and means[2 * rows + n] != 0
            if scaled:
                _add_scaled(gradient, weights, *lines)
                gradient = lines[1]
            given = gradient, weights, lines[0], of_row[2], means[n], means[rows + n]
            out = _write(like, dx, offset, *given, lines[2])
            if scaled:
                for j in range(count):
                    out[j] *= LARGE_DOUBLE
            store(like, dx, offset, out)
            if i % GROUP == GROUP - 1 or i == rows // groups - 1:
                flush(of_beta, part(beta_sums, 0, count))
                flush(of_gamma, part(gamma_sums, 0, count))
        if centre:
            store_sums(params, dbeta, own, part(beta_sums, 0, count), line)
        store_sums(params, dgamma, own, part(gamma_sums, 0, count), line)
