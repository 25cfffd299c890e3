"""Layer norm, RMS norm and group norm forward on the CPU.

Formulas:  Of ``cuda/layer_norm_forward.cu``.
Arrays:    Those of the CUDA kernel, given by their addresses; 0 for none. gamma and beta are those of all columns of an
           example, whose rows are its groups.
Tasks:     Rows.
Traffic:   A row is read from memory once as long as it fits into the cache, and written once; gamma and beta stay in
           the cache.
Numerics:  The mean is summed in float64, and so are the squares about it, float32 by fours. What the mean of float64
           data lost by rounding is found beside them. Where the variance is beyond the type, the numbers are scaled
           first: their sum may be beyond it too. Rows that are not centred have the mean 0.
Order:     A row knows of no other.
"""

import numpy as np

from bnkernels.ops.activations_cpu import activate
from bnkernels.runtime.cpu.language import (
    LINE,
    accumulator,
    cast,
    device,
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
from bnkernels.runtime.cpu.sums import add, fill_line, total
from bnkernels.runtime.cpu.vectors import WIDTH, first, fold, get, get_first, prefetch, put, splat

PADDED = LINE + WIDTH  # a line of short rows, of which the last ends with a whole vector
FOUR = 4 * WIDTH  # numbers that are added in the accumulator's type
MOST_TOGETHER, FEWEST_TOGETHER = 64, 8  # short rows that are normalised together: at most, or else one by one
SMALL_SINGLE, SMALL_DOUBLE = 2.0**-66, 2.0**-600  # scales at which neither sums nor squares overflow


@device
def vector(params, array, first, line):
    """Return numbers of gamma or beta from the first on, 16-bit ones in `line`; where there is none, `line`."""
    return load(params, array, first, line) if array else line


@device
def _moments(like, x, offset, columns, centre, scale, line, d):
    """Return mean, remainder and variance of a row times `scale`; leave its last line less the mean in `d`."""
    factor = cast(scale, line[0])
    sums, rests, squares = (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)
    for start in range(0, columns, LINE):
        values = load(like, x, offset + start, part(line, 0, min(LINE, columns - start)))
        if scale != 1:
            scaled = part(d, 0, len(values))
            for j in range(len(values)):
                scaled[j] = values[j] * factor
            values = scaled
        sums = add(sums, total(values))
    exact = (sums[0] + sums[1]) / columns if centre else 0.0
    mean = cast(exact, factor)
    for start in range(0, columns, LINE):
        values, centred = part(line, 0, min(LINE, columns - start)), part(d, 0, min(LINE, columns - start))
        if size_of(like) > 2 or columns > LINE:
            values = load(like, x, offset + start, values)
        if scale != 1:
            for j in range(len(values)):
                centred[j] = values[j] * factor
            values = centred
        rest, square = _centre(values, mean, centred)
        rests, squares = add(rests, rest), add(squares, square)
    return _of_sums(columns, exact, mean, rests[0] + rests[1] if centre else 0.0, squares[0] + squares[1])


@device
def _centre(values, mean, centred):
    """Write the numbers less the mean; return their sum, which only float64 has a use for, and that of their squares.

    Four float32 squares are added before float64 takes them. Behind the last number, up to a whole vector is written.
    """
    zero, count = cast(0, mean), len(values)
    sums, squares, whole = splat(0.0), splat(0.0), count // FOUR * FOUR
    for i in range(0, whole, FOUR):
        sum_, square = splat(zero), splat(zero)
        prefetch(values, i + count)  # the next row
        prefetch(values, i + count + FOUR // 2)
        for k in range(i, i + FOUR, WIDTH):
            d = get(values, k) - mean
            put(centred, k, d)
            sum_, square = sum_ + d, square + d * d
        sums, squares = sums + sum_, squares + square
    for i in range(whole, count, WIDTH):
        d = first(get_first(values, i, count - i) - mean, count - i, zero)
        put(centred, i, d)
        sums, squares = sums + d, squares + d * d
    return fold(sums), fold(squares)


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
def _keep(of_rows, n, centre, mean, low, rstd):
    """Write the statistics of a row, without the mean if that was not subtracted."""
    if not centre:
        of_rows[n] = rstd
        return
    rows = len(of_rows) // 3
    of_rows[n], of_rows[rows + n], of_rows[2 * rows + n] = mean, low, rstd


@device
def _normalise(centred, low, rstd, weights, shifts, z):
    for j in range(len(z)):
        z[j] = (centred[j] - low) * rstd * weights[j] + shifts[j]


@inner
def _row(like, params, x, gamma, beta, y, of_rows, n, columns, groups, centre, eps, alpha, code, line, d, ones, zeros):
    """Normalise a row."""
    scale = 1.0
    while True:
        mean, rest, variance = _moments(like, x, n * columns, columns, centre, scale, line, d)
        if scale != 1 or np.isfinite(cast(variance, eps)):
            break
        scale = SMALL_DOUBLE if is_double(eps) else SMALL_SINGLE
    high, low, rstd = _statistics(mean, rest, variance, cast(1 / scale, eps), eps)
    _keep(of_rows, n, centre, high, low, rstd)
    held = scale == 1 and columns <= LINE  # in `d`
    if held:
        low = cast(rest, eps)
    if rstd == 0:  # the distance from the mean may be beyond the type
        high, low, held = rstd, rstd, False
    for start in range(0, columns, LINE):
        count, offset = min(LINE, columns - start), n * columns + start
        centred = part(d, 0, count)
        if not held:
            values = load(like, x, offset, part(line, 0, count))
            for j in range(count):
                centred[j] = values[j] - high
        z = place(like, y, offset, part(line, 0, count))
        own = n % groups * columns + start
        weights, shifts = vector(params, gamma, own, part(ones, 0, count)), part(zeros, 0, count)
        _normalise(centred, low, rstd, weights, vector(params, beta, own, shifts), z)
        if code != 0 or alpha != 1:
            activate(code, alpha, z)
        store(like, y, offset, z)


@device
def _short_rows(
    like, params, x, gamma, beta, y, of_rows, n, count, columns, groups, centre, eps, alpha, code, line, d, ones, zeros
):  # fmt: skip
    """Normalise rows that together are a line: step by step all of them, for a row is a chain of operations."""
    means, rests, variances = stack(0.0, MOST_TOGETHER), stack(0.0, MOST_TOGETHER), stack(0.0, MOST_TOGETHER)
    rstds = stack(eps, MOST_TOGETHER)
    values = load(like, x, n * columns, part(line, 0, count * columns))
    for i in range(count):
        means[i] = total(part(values, i * columns, columns)) if centre else 0.0
    for i in range(count):
        means[i] /= columns
    for i in range(count):
        row, centred, mean = part(values, i * columns, columns), part(d, i * columns, columns), cast(means[i], eps)
        rests[i], variances[i] = _centre(row, mean, centred)
    largest = 0.0
    for i in range(count):
        rest = rests[i] if centre else 0.0
        mean, rest, variance = _of_sums(columns, means[i], cast(means[i], eps), rest, variances[i])
        high, low, rstd = _statistics(mean, rest, variance, cast(1.0, eps), eps)
        _keep(of_rows, n + i, centre, high, low, rstd)
        rests[i], rstds[i] = rest, rstd
        largest += variance
    if not np.isfinite(cast(largest, eps)):  # one of them, or nearly
        for i in range(count):
            given = like, params, x, gamma, beta, y, of_rows, n + i, columns, groups, centre
            _row(*given, eps, alpha, code, line, d, ones, zeros)
        return
    z = place(like, y, n * columns, part(line, 0, count * columns))
    weights, shifts = vector(params, gamma, 0, part(ones, 0, columns)), part(zeros, 0, columns)
    shifts = vector(params, beta, 0, shifts)
    for i in range(count):
        if groups > 1:
            own = (n + i) % groups * columns
            weights, shifts = vector(params, gamma, own, part(ones, 0, columns)), part(zeros, 0, columns)
            shifts = vector(params, beta, own, shifts)
        centred, rstd, out = part(d, i * columns, columns), rstds[i], part(z, i * columns, columns)
        _normalise(centred, cast(rests[i], eps), rstd, weights, shifts, out)
    if code != 0 or alpha != 1:
        activate(code, alpha, z)
    store(like, y, n * columns, z)


@kernel
def forward_rows(
    like, params, x, gamma, beta, y, statistics, rows, columns, groups, centre, eps, alpha, code, first, last
):
    """Write `y` and the statistics of rows."""
    acc = accumulator(like)
    line, d, ones, zeros = stack(acc, LINE), stack(acc, PADDED), stack(acc, LINE), stack(acc, LINE)
    fill_line(part(ones, 0, min(LINE, columns)), cast(1, acc))
    fill_line(part(zeros, 0, min(LINE, columns)), acc)
    of_rows = numbers(acc, statistics, 0, 3 * rows if centre else rows)
    eps, alpha = cast(eps, acc), cast(alpha, acc)
    together = min(MOST_TOGETHER, LINE // columns)
    if together >= FEWEST_TOGETHER:
        for n in range(first, last, together):
            count = min(together, last - n)
            given = like, params, x, gamma, beta, y, of_rows, n, count, columns, groups, centre
            _short_rows(*given, eps, alpha, code, line, d, ones, zeros)
    else:
        for n in range(first, last):
            given = like, params, x, gamma, beta, y, of_rows, n, columns, groups, centre
            _row(*given, eps, alpha, code, line, d, ones, zeros)
