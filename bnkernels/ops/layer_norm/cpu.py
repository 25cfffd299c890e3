"""Layer norm on the CPU, forward and backward, compiled by Numba.

Formulas:  Of ``cuda/layer_norm_forward.cu`` and ``cuda/layer_norm_backward.cu``.
Arrays:    Those of the CUDA kernels, each given by its `id`; 0 for none.
Tasks:     Forward: rows. Backward: blocks of `height` rows; of rows too long to be held, the rows and then lines of
           columns.
Traffic:   A row is read from memory once as long as it fits into the cache, and written once; gamma and beta stay in
           the cache. Backward of more than HELD columns: dy and x are read twice. Sums of columns: 16 bytes a column
           for every block, 2 MiB at most.
Numerics:  Sums in float64. Of float64 data the squares are taken about the mean of a first pass, and what that lost by
           rounding is found beside them. Where a sum or the variance is beyond the type, numbers are scaled first.
           Sums of columns are of the accumulator's type over 8 rows, and then of float64.
Order:     A row knows of no other. Sums of columns are of blocks that the shape fixes, merged in order: the same bits
           for any number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.activations_cpu import activate, differentiate
from bnkernels.ops.layer_norm.problem import Problem
from bnkernels.runtime.cpu.language import (
    LINE,
    SAME,
    STORAGE,
    address,
    cast,
    device,
    doubles,
    is_double,
    kernel,
    load,
    numbers,
    part,
    place,
    stack,
    store,
)
from bnkernels.runtime.cpu.sums import MOST_SUMS, add, fill_line, flush, merge, round_to, total
from bnkernels.runtime.cpu.threads import share
from bnkernels.runtime.cpu.vectors import WIDTH, fill, fold, get, put, widen
from bnkernels.runtime.seam import ceil_div

HELD = 8192  # columns of a row whose intermediate values are held
GROUP = 8  # rows whose columns are summed in the accumulator's type
HEIGHT = 64  # rows of a block, unless there would be too many blocks
FOUR = 4 * WIDTH  # numbers that are added in the accumulator's type
MOST_TOGETHER, FEWEST_TOGETHER = 64, 8  # short rows that are normalised together: at most, or else one by one
SMALL_SINGLE, SMALL_DOUBLE, LARGE_DOUBLE = (
    2.0**-66,
    2.0**-600,
    2.0**600,
)  # scales at which neither sums nor squares overflow


def forward(
    problem: Problem,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> None:
    """Write `y` and `statistics`."""
    like, storage, _, _ = _plan(problem)
    given = like, storage, id(x), _id(gamma), _id(beta), id(y), id(statistics), problem.rows, problem.columns
    share(_forward, problem.rows, x.size, *given, eps, phi.alpha, phi.code)


def backward(
    problem: Problem,
    dy: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    statistics: np.ndarray,
    phi: Activation,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
) -> None:
    """Write the gradients; `dx` may be `dy`."""
    (rows, columns, _), (like, storage, height, blocks) = problem, _plan(problem)
    given = like, storage, id(dy), id(x), _id(gamma), _id(beta), id(statistics)
    outputs, numbers = (id(dx), id(dgamma), id(dbeta)), (rows, columns, phi.alpha, phi.code)
    if columns > HELD:
        sums = np.empty(3 * rows)
        share(_backward_rows, rows, x.size, *given, id(sums), *numbers)
        share(_backward_columns, ceil_div(columns, LINE), x.size, *given, *outputs, id(sums), *numbers)
        return
    sums = np.empty(2 * blocks * columns)
    share(_backward, blocks, x.size, *given, *outputs, id(sums), *numbers, height)
    if blocks > 1:
        merge(like, id(sums), 0, 2 * columns, blocks, columns, id(dbeta))
        merge(like, id(sums), columns, 2 * columns, blocks, columns, id(dgamma))


def _id(array: np.ndarray | None) -> int:
    return 0 if array is None else id(array)


@lru_cache(maxsize=1024)
def _plan(problem: Problem) -> tuple[Any, int, int, int]:
    """Return a zero of the accumulator's type, the storage of the data, and height and number of the blocks of rows."""
    height = GROUP * ceil_div(max(HEIGHT, ceil_div(problem.rows, max(1, MOST_SUMS // (2 * problem.columns)))), GROUP)
    return problem.acc_dtype.type(0), STORAGE[problem.dtype.name], height, ceil_div(problem.rows, height)


@device
def _vector(like, array, first, line):
    """Return numbers of gamma or beta from the first on; where there is none, `line`."""
    return numbers(like, address(array), first, len(line)) if array else line


@device
def _moments(x, storage, offset, columns, scale, line, d):
    """Return mean, remainder and variance of a row times `scale`; leave its last line less the mean in `d`."""
    factor = cast(scale, line[0])
    sums, rests, squares = (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)
    for start in range(0, columns, LINE):
        values = load(x, storage, offset + start, 1, part(line, 0, min(LINE, columns - start)))
        if scale != 1:
            scaled = part(d, 0, len(values))
            for j in range(len(values)):
                scaled[j] = values[j] * factor
            values = scaled
        sums = add(sums, total(values))
    exact = (sums[0] + sums[1]) / columns
    mean = cast(exact, factor)
    for start in range(0, columns, LINE):
        values, centred = part(line, 0, min(LINE, columns - start)), part(d, 0, min(LINE, columns - start))
        if storage == SAME or columns > LINE:
            values = load(x, storage, offset + start, 1, values)
        if scale != 1:
            for j in range(len(values)):
                centred[j] = values[j] * factor
            values = centred
        rest, square = _centre(values, mean, centred)
        rests, squares = add(rests, rest), add(squares, square)
    return _of_sums(columns, exact, mean, rests[0] + rests[1], squares[0] + squares[1])


@device
def _centre(values, mean, centred):
    """Write the numbers less the mean; return their sum, which only float64 has a use for, and that of their squares.

    Four float32 squares are added before float64 takes them.
    """
    zero, zeros = cast(0, mean), fill(0.0)
    sums, squares, means = zeros, zeros, fill(mean)
    whole, eights = len(values) // FOUR * FOUR, len(values) // WIDTH * WIDTH
    for i in range(0, whole, FOUR):
        sum_, square = fill(zero), fill(zero)
        for k in range(i, i + FOUR, WIDTH):
            d = get(values, k) - means
            put(centred, k, d)
            sum_, square = sum_ + d, square + d * d
        sums, squares = sums + widen(sum_), squares + widen(square)
    for i in range(whole, eights, WIDTH):
        d = get(values, i) - means
        put(centred, i, d)
        sums, squares = sums + widen(d), squares + widen(d * d)
    rest, rest_square = 0.0, 0.0
    for i in range(eights, len(values)):
        last = values[i] - mean
        centred[i] = last
        rest, rest_square = rest + last, rest_square + np.float64(last * last)
    return fold(sums) + rest, fold(squares) + rest_square


@device
def _of_sums(columns, exact, mean, rest, squares):
    """Return mean, what is left of it, and variance, from sums of the numbers less the mean and of their squares."""
    rest = rest / columns if is_double(mean) else exact - mean
    variance = squares / columns - rest * rest
    return np.float64(mean), rest, 0.0 if variance < 0 else variance


@device
def _statistics(mean, rest, variance, back, eps):
    """Return mean, mean_low and rstd of moments of numbers that were multiplied by 1 / `back`."""
    exact = mean + rest
    high = cast(exact, eps)
    low = cast((exact - high) + (rest - (exact - mean)), eps)
    variance = np.float64(cast(variance * np.float64(back) * np.float64(back), eps))
    return high * back, low * back, cast(1 / np.sqrt(variance + np.float64(eps)), eps)


@device
def _normalise(centred, low, rstd, weights, shifts, z):
    for j in range(len(z)):
        z[j] = (centred[j] - low) * rstd * weights[j] + shifts[j]


@kernel
def _row(storage, x, gamma, beta, y, of_rows, n, columns, eps, alpha, code, line, d, ones, zeros):
    """Normalise a row."""
    scale, rows = 1.0, len(of_rows) // 3
    while True:
        mean, rest, variance = _moments(x, storage, n * columns, columns, scale, line, d)
        if scale != 1 or np.isfinite(cast(variance, eps)):
            break
        scale = SMALL_DOUBLE if is_double(eps) else SMALL_SINGLE
    high, low, rstd = _statistics(mean, rest, variance, cast(1 / scale, eps), eps)
    of_rows[n], of_rows[rows + n], of_rows[2 * rows + n] = high, low, rstd
    held = scale == 1 and columns <= LINE  # in `d`
    if held:
        low = cast(rest, eps)
    if rstd == 0:  # the distance from the mean may be beyond the type
        high, low, held = rstd, rstd, False
    for start in range(0, columns, LINE):
        count, offset = min(LINE, columns - start), n * columns + start
        centred = part(d, 0, count)
        if not held:
            values = load(x, storage, offset, 1, part(line, 0, count))
            for j in range(count):
                centred[j] = values[j] - high
        z = place(y, storage, offset, part(line, 0, count))
        weights, shifts = _vector(eps, gamma, start, part(ones, 0, count)), part(zeros, 0, count)
        _normalise(centred, low, rstd, weights, _vector(eps, beta, start, shifts), z)
        if code != 0 or alpha != 1:
            activate(code, alpha, z)
        store(y, storage, offset, z)


@device
def _short_rows(storage, x, gamma, beta, y, of_rows, n, count, columns, eps, alpha, code, line, d, ones, zeros):
    """Normalise rows that together are a line: step by step all of them, for a row is a chain of operations."""
    means, rests, variances = stack(0.0, MOST_TOGETHER), stack(0.0, MOST_TOGETHER), stack(0.0, MOST_TOGETHER)
    rows = len(of_rows) // 3
    values = load(x, storage, n * columns, 1, part(line, 0, count * columns))
    for i in range(count):
        means[i] = total(part(values, i * columns, columns))
    for i in range(count):
        means[i] /= columns
    for i in range(count):
        row, centred, mean = part(values, i * columns, columns), part(d, i * columns, columns), cast(means[i], eps)
        rests[i], variances[i] = _centre(row, mean, centred)
    largest = 0.0
    for i in range(count):
        mean, rest, variance = _of_sums(columns, means[i], cast(means[i], eps), rests[i], variances[i])
        high, low, rstd = _statistics(mean, rest, variance, cast(1.0, eps), eps)
        of_rows[n + i], of_rows[rows + n + i], of_rows[2 * rows + n + i] = high, low, rstd
        rests[i] = rest
        largest += variance
    if not np.isfinite(cast(largest, eps)):  # one of them, or nearly
        for i in range(count):
            _row(storage, x, gamma, beta, y, of_rows, n + i, columns, eps, alpha, code, line, d, ones, zeros)
        return
    z = place(y, storage, n * columns, part(line, 0, count * columns))
    weights, shifts = _vector(eps, gamma, 0, part(ones, 0, columns)), part(zeros, 0, columns)
    shifts = _vector(eps, beta, 0, shifts)
    for i in range(count):
        centred, rstd, out = part(d, i * columns, columns), of_rows[2 * rows + n + i], part(z, i * columns, columns)
        _normalise(centred, cast(rests[i], eps), rstd, weights, shifts, out)
    if code != 0 or alpha != 1:
        activate(code, alpha, z)
    store(y, storage, n * columns, z)


@kernel
def _forward(like, storage, x, gamma, beta, y, statistics, rows, columns, eps, alpha, code, first, last):
    line, d, ones, zeros = stack(like, LINE), stack(like, LINE), stack(like, LINE), stack(like, LINE)
    (
        fill_line(part(ones, 0, min(LINE, columns)), cast(1, like)),
        fill_line(part(zeros, 0, min(LINE, columns)), cast(0, like)),
    )
    x, y, of_rows = address(x), address(y), numbers(like, address(statistics), 0, 3 * rows)
    eps, alpha = cast(eps, like), cast(alpha, like)
    together = min(MOST_TOGETHER, LINE // columns)
    if together >= FEWEST_TOGETHER:
        for n in range(first, last, together):
            count = min(together, last - n)
            _short_rows(storage, x, gamma, beta, y, of_rows, n, count, columns, eps, alpha, code, line, d, ones, zeros)
    else:
        for n in range(first, last):
            _row(storage, x, gamma, beta, y, of_rows, n, columns, eps, alpha, code, line, d, ones, zeros)


@device
def _gradients(storage, dy, x, offset, of_row, weights, shifts, alpha, code, xhat, g, line):
    """Write the normalised numbers of a part of a row; return the gradients in front of the activation."""
    mean, low, rstd = of_row
    values = load(x, storage, offset, 1, line)
    if rstd == 0:  # the distance from the mean may be beyond the type
        mean, low = rstd, rstd
    for j in range(len(xhat)):
        xhat[j] = ((values[j] - mean) - low) * rstd
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
    zero = cast(0, xhat[0])
    sums, products = fill(0.0), fill(0.0)
    whole, eights = len(xhat) // FOUR * FOUR, len(xhat) // WIDTH * WIDTH
    for i in range(0, whole, FOUR):
        sum_, product = fill(zero), fill(zero)
        for k in range(i, i + FOUR, WIDTH):
            g, x = get(gradient, k), get(xhat, k)
            put(of_beta, k, get(of_beta, k) + g)
            put(of_gamma, k, get(of_gamma, k) + g * x)
            h = g * get(weights, k)
            sum_, product = sum_ + h, product + h * x
        sums, products = sums + widen(sum_), products + widen(product)
    for i in range(whole, eights, WIDTH):
        g, x = get(gradient, i), get(xhat, i)
        put(of_beta, i, get(of_beta, i) + g)
        put(of_gamma, i, get(of_gamma, i) + g * x)
        h = g * get(weights, i)
        sums, products = sums + widen(h), products + widen(h * x)
    rest, rest_product = 0.0, 0.0
    for i in range(eights, len(xhat)):
        of_beta[i] += gradient[i]
        of_gamma[i] += gradient[i] * xhat[i]
        scaled = gradient[i] * weights[i]
        rest, rest_product = rest + scaled, rest_product + np.float64(scaled * xhat[i])
    return fold(sums) + rest, fold(products) + rest_product


@kernel
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
    rstds, means, slopes = fill(rstd), fill(mean), fill(slope)
    for i in range(0, eights, WIDTH):
        put(out, i, rstds * ((get(gradient, i) * get(weights, i) - means) - get(xhat, i) * slopes))
    for i in range(eights, len(out)):
        out[i] = rstd * ((gradient[i] * weights[i] - mean) - xhat[i] * slope)
    return out


@kernel
def _backward(
    like, storage, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, sums, rows, columns, alpha, code, height, first,
    last
):  # fmt: skip
    xhat, g, line = stack(like, HELD), stack(like, HELD), stack(like, HELD)
    ones, zeros = stack(like, HELD), stack(like, HELD)
    of_beta, of_gamma = stack(like, HELD), stack(like, HELD)
    xhat, g, line = part(xhat, 0, columns), part(g, 0, columns), part(line, 0, columns)
    ones, zeros = part(ones, 0, columns), part(zeros, 0, columns)
    of_beta, of_gamma = part(of_beta, 0, columns), part(of_gamma, 0, columns)
    fill_line(ones, cast(1, like)), fill_line(zeros, like), fill_line(of_beta, like), fill_line(of_gamma, like)
    weights, shifts = _vector(like, gamma, 0, ones), _vector(like, beta, 0, zeros)
    dy, x, dx, sums, alpha = address(dy), address(x), address(dx), address(sums), cast(alpha, like)
    of_rows = numbers(like, address(statistics), 0, 3 * rows)
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
        round_to(doubles(sums, 0, columns), numbers(like, address(dbeta), 0, columns))
        round_to(doubles(sums, columns, columns), numbers(like, address(dgamma), 0, columns))


@kernel
def _backward_rows(
    like, storage, dy, x, gamma, beta, statistics, sums, rows, columns, alpha, code, first, last
):  # fmt: skip
    """Write the two means of long rows, and whether their gradients are scaled."""
    xhat, g, line = stack(like, LINE), stack(like, LINE), stack(like, LINE)
    ones, zeros, of_beta, of_gamma = stack(like, LINE), stack(like, LINE), stack(like, LINE), stack(like, LINE)
    fill_line(ones, cast(1, like)), fill_line(zeros, like)
    dy, x, sums, alpha = address(dy), address(x), doubles(address(sums), 0, 3 * rows), cast(alpha, like)
    of_rows = numbers(like, address(statistics), 0, 3 * rows)
    for n in range(first, last):
        of_row, scaled = (of_rows[n], of_rows[rows + n], of_rows[2 * rows + n]), False
        while True:
            pair, products = (0.0, 0.0), (0.0, 0.0)
            for start in range(0, columns, LINE):
                count = min(LINE, columns - start)
                weights, shifts = _vector(like, gamma, start, part(ones, 0, count)), part(zeros, 0, count)
                lines = part(xhat, 0, count), part(g, 0, count), part(line, 0, count)
                given = dy, x, n * columns + start, of_row, weights, _vector(like, beta, start, shifts)
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
        sums[n], sums[rows + n], sums[2 * rows + n] = sum_h / columns, product / columns, scaled


@kernel
def _backward_columns(
    like, storage, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, sums, rows, columns, alpha, code, first, last
):  # fmt: skip
    """Write `dx` of long rows, whose means are known, and the sums of columns, line by line of columns."""
    xhat, g, line = stack(like, LINE), stack(like, LINE), stack(like, LINE)
    ones, zeros = stack(like, LINE), stack(like, LINE)
    of_beta, of_gamma, beta_sums, gamma_sums = stack(like, LINE), stack(like, LINE), stack(0.0, LINE), stack(0.0, LINE)
    fill_line(ones, cast(1, like)), fill_line(zeros, like), fill_line(of_beta, like), fill_line(of_gamma, like)
    dy, x, dx, alpha = address(dy), address(x), address(dx), cast(alpha, like)
    means, of_rows = doubles(address(sums), 0, 3 * rows), numbers(like, address(statistics), 0, 3 * rows)
    for start in range(first * LINE, min(last * LINE, columns), LINE):
        count = min(LINE, columns - start)
        fill_line(beta_sums, 0.0), fill_line(gamma_sums, 0.0)
        weights, shifts = _vector(like, gamma, start, part(ones, 0, count)), part(zeros, 0, count)
        shifts = _vector(like, beta, start, shifts)
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
        round_to(part(beta_sums, 0, count), numbers(like, address(dbeta), start, count))
        round_to(part(gamma_sums, 0, count), numbers(like, address(dgamma), start, count))
