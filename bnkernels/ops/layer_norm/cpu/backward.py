"""Layer norm backward on the CPU.

Formulas:  Of ``cuda/layer_norm_backward.cu``.
Arrays:    Those of the CUDA kernel, given by their addresses; 0 for none. sums: of the columns of every block, or of
           long rows the two means and whether the gradients were scaled; float64.
Tasks:     Blocks of `height` rows. Of rows too long to be held: rows, and then lines of columns.
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
    SAME,
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
    stack,
    store,
)
from bnkernels.runtime.cpu.sums import add, fill_line, flush, round_to, total
from bnkernels.runtime.cpu.vectors import WIDTH, first, fold, get, get_first, prefetch, put, splat

HELD = 8192  # columns of a row whose intermediate values are held
GROUP = 8  # rows whose columns are summed in the accumulator's type
LARGE_DOUBLE = 1 / SMALL_DOUBLE


@device
def _gradients(storage, dy, x, offset, of_row, weights, shifts, alpha, code, xhat, g, line):
    """Write the normalised numbers of a part of a row; return the gradients in front of the activation."""
    mean, low, rstd = of_row
    values = load(x, storage, offset, 1, line)
    if rstd == 0:  # the distance from the mean may be beyond the type
        mean, low = rstd, rstd
    for i in range(0, len(xhat), WIDTH):
        prefetch(values, i + len(xhat))  # the next row
        put(xhat, i, (get_first(values, i, len(xhat) - i) - mean - low) * rstd)
    gradient = load(dy, storage, offset, 1, g)
    if code == 0 and alpha == 1:
        return gradient
    if storage == SAME:
        for j in range(len(g)):
            g[j] = gradient[j]
    for j in range(len(line)):
        line[j] = xhat[j] * weights[j] + shifts[j]
    differentiate(code, alpha, line, g)
    return g


@device
def _add_up(gradient, weights, xhat, of_beta, of_gamma):
    """Add a part of a row to the sums of columns; return the sums of the scaled gradients and of them with `xhat`.

    Four float32 numbers are added before float64 takes them.
    """
    zero, count = cast(0, xhat[0]), len(xhat)
    sums, products, whole = splat(0.0), splat(0.0), count // FOUR * FOUR
    for i in range(0, whole, FOUR):
        sum_, product = splat(zero), splat(zero)
        prefetch(gradient, i + count)  # the next row
        prefetch(gradient, i + count + FOUR // 2)
        for k in range(i, i + FOUR, WIDTH):
            g, x = get(gradient, k), get(xhat, k)
            put(of_beta, k, get(of_beta, k) + g)
            put(of_gamma, k, get(of_gamma, k) + g * x)
            h = g * get(weights, k)
            sum_, product = sum_ + h, product + h * x
        sums, products = sums + sum_, products + product
    for i in range(whole, count, WIDTH):
        g, x = get_first(gradient, i, count - i), first(get(xhat, i), count - i, zero)
        put(of_beta, i, get(of_beta, i) + g)
        put(of_gamma, i, get(of_gamma, i) + g * x)
        h = g * get_first(weights, i, count - i)
        sums, products = sums + h, products + h * x
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
def _write(dx, storage, offset, gradient, weights, xhat, rstd, mean, slope, line):
    """Write `dx` of a part of a row; it may lie where the gradients lie."""
    out, mean, slope = place(dx, storage, offset, line), cast(mean, rstd), cast(slope, rstd)
    eights = len(out) // WIDTH * WIDTH
    for i in range(0, eights, WIDTH):
        put(out, i, rstd * ((get(gradient, i) * get(weights, i) - mean) - get(xhat, i) * slope))
    for i in range(eights, len(out)):
        out[i] = rstd * ((gradient[i] * weights[i] - mean) - xhat[i] * slope)
    return out


@kernel
def backward_blocks(
    like, storage, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, sums, rows, columns, alpha, code, height, first,
    last
):  # fmt: skip
    """Write `dx` and the sums of columns of blocks of rows, or of the only block the gradients."""
    xhat, g, line = stack(like, HELD), stack(like, HELD), stack(like, HELD)
    ones, zeros = stack(like, HELD), stack(like, HELD)
    of_beta, of_gamma = stack(like, HELD), stack(like, HELD)
    xhat, g, line = part(xhat, 0, columns), part(g, 0, columns), part(line, 0, columns)
    ones, zeros = part(ones, 0, columns), part(zeros, 0, columns)
    of_beta, of_gamma = part(of_beta, 0, columns), part(of_gamma, 0, columns)
    fill_line(ones, cast(1, like)), fill_line(zeros, like), fill_line(of_beta, like), fill_line(of_gamma, like)
    weights, shifts = vector(like, gamma, 0, ones), vector(like, beta, 0, zeros)
    alpha = cast(alpha, like)
    of_rows = numbers(like, statistics, 0, 3 * rows)
    for block in range(first, last):
        beta_sums = doubles(sums, 2 * block * columns, columns)
        gamma_sums = doubles(sums, (2 * block + 1) * columns, columns)
        fill_line(beta_sums, 0.0), fill_line(gamma_sums, 0.0)
        end = min(rows, (block + 1) * height)
        for start in range(block * height, end, GROUP):
            for n in range(start, min(start + GROUP, end)):
                of_row, offset = (of_rows[n], of_rows[rows + n], of_rows[2 * rows + n]), n * columns
                gradient = _gradients(storage, dy, x, offset, of_row, weights, shifts, alpha, code, xhat, g, line)
                sum_h, product = _add_up(gradient, weights, xhat, of_beta, of_gamma)
                scaled = is_double(like) and not np.isfinite(sum_h + product)
                if scaled:
                    sum_h, product = _add_scaled(gradient, weights, xhat, g, line)
                    gradient = g
                means = sum_h / columns, product / columns
                out = _write(dx, storage, offset, gradient, weights, xhat, of_row[2], *means, line)
                if scaled:
                    for j in range(columns):
                        out[j] *= LARGE_DOUBLE
                store(dx, storage, offset, out)
            flush(of_beta, beta_sums)
            flush(of_gamma, gamma_sums)
    if height >= rows:
        round_to(doubles(sums, 0, columns), numbers(like, dbeta, 0, columns))
        round_to(doubles(sums, columns, columns), numbers(like, dgamma, 0, columns))


@kernel
def backward_rows(
    like, storage, dy, x, gamma, beta, statistics, sums, rows, columns, alpha, code, first, last
):  # fmt: skip
    """Write the two means of long rows, and whether their gradients are scaled."""
    xhat, g, line = stack(like, LINE), stack(like, LINE), stack(like, LINE)
    ones, zeros, of_beta, of_gamma = stack(like, LINE), stack(like, LINE), stack(like, LINE), stack(like, LINE)
    fill_line(ones, cast(1, like)), fill_line(zeros, like)
    means, alpha = doubles(sums, 0, 3 * rows), cast(alpha, like)
    of_rows = numbers(like, statistics, 0, 3 * rows)
    for n in range(first, last):
        of_row, scaled = (of_rows[n], of_rows[rows + n], of_rows[2 * rows + n]), False
        while True:
            pair, products = (0.0, 0.0), (0.0, 0.0)
            for start in range(0, columns, LINE):
                count = min(LINE, columns - start)
                weights, shifts = vector(like, gamma, start, part(ones, 0, count)), part(zeros, 0, count)
                lines = part(xhat, 0, count), part(g, 0, count), part(line, 0, count)
                given = dy, x, n * columns + start, of_row, weights, vector(like, beta, start, shifts)
                gradient = _gradients(storage, *given, alpha, code, *lines)
                if scaled:
                    sum_h, product = _add_scaled(gradient, weights, *lines)
                else:
                    sum_h, product = _add_up(gradient, weights, lines[0], of_beta, of_gamma)
                pair, products = add(pair, sum_h), add(products, product)
            sum_h, product = pair[0] + pair[1], products[0] + products[1]
            if scaled or not is_double(like) or np.isfinite(sum_h + product):
                break
            scaled = True
        means[n], means[rows + n], means[2 * rows + n] = sum_h / columns, product / columns, scaled


@kernel
def backward_columns(
    like, storage, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, sums, rows, columns, alpha, code, first, last
):  # fmt: skip
    """Write `dx` of long rows, whose means are known, and the sums of columns, line by line of columns."""
    xhat, g, line = stack(like, LINE), stack(like, LINE), stack(like, LINE)
    ones, zeros = stack(like, LINE), stack(like, LINE)
    of_beta, of_gamma, beta_sums, gamma_sums = stack(like, LINE), stack(like, LINE), stack(0.0, LINE), stack(0.0, LINE)
    fill_line(ones, cast(1, like)), fill_line(zeros, like), fill_line(of_beta, like), fill_line(of_gamma, like)
    alpha = cast(alpha, like)
    means, of_rows = doubles(sums, 0, 3 * rows), numbers(like, statistics, 0, 3 * rows)
    for start in range(first * LINE, min(last * LINE, columns), LINE):
        count = min(LINE, columns - start)
        fill_line(beta_sums, 0.0), fill_line(gamma_sums, 0.0)
        weights, shifts = vector(like, gamma, start, part(ones, 0, count)), part(zeros, 0, count)
        shifts = vector(like, beta, start, shifts)
        lines = part(xhat, 0, count), part(g, 0, count), part(line, 0, count)
        for n in range(rows):
            of_row, offset = (of_rows[n], of_rows[rows + n], of_rows[2 * rows + n]), n * columns + start
            gradient = _gradients(storage, dy, x, offset, of_row, weights, shifts, alpha, code, *lines)
            _add_up(gradient, weights, lines[0], part(of_beta, 0, count), part(of_gamma, 0, count))
            scaled = is_double(like) and means[2 * rows + n] != 0
            if scaled:
                _add_scaled(gradient, weights, *lines)
                gradient = lines[1]
            given = gradient, weights, lines[0], of_row[2], means[n], means[rows + n]
            out = _write(dx, storage, offset, *given, lines[2])
            if scaled:
                for j in range(count):
                    out[j] *= LARGE_DOUBLE
            store(dx, storage, offset, out)
            if n % GROUP == GROUP - 1 or n == rows - 1:
                flush(of_beta, part(beta_sums, 0, count))
                flush(of_gamma, part(gamma_sums, 0, count))
        round_to(part(beta_sums, 0, count), numbers(like, dbeta, start, count))
        round_to(part(gamma_sums, 0, count), numbers(like, dgamma, start, count))
