"""Parts of the CPU kernels of the LSTM: which examples a step has, sums of columns and of rows, and the gates.

Numerics: Numbers are shifted by the first of their column or row, then by the mean of what is left: equal numbers give
          exactly 0. Sums of columns are of the data's type over GROUP rows, and then of float64; sums of rows are of
          float64, float32 by fours.
"""

import numpy as np

from bnkernels.runtime.cpu.language import cast, device, inner, int32s, numbers, part
from bnkernels.runtime.cpu.mathematics import sigmoid, tanh
from bnkernels.runtime.cpu.sums import fill_line
from bnkernels.runtime.cpu.vectors import WIDTH, first, fold, get, get_first, put, splat

HEIGHT = 64  # examples that go through all steps together
STRIP = 128  # units whose columns are worked on together
WIDE = 4 * STRIP  # their gates
NONE = np.uint64(0)  # address of what is not given
GROUP = 8  # rows whose columns are summed in the data's type
FOUR = 4 * WIDTH


@device
def has(lengths, n, t):
    """Return whether an example has a step."""
    return lengths == 0 or int32s(lengths, n, 1)[0] > t


@device
def ends(lengths, n, t, end):
    """Return whether an example ends with a step; without lengths all do with step `end`."""
    return t == end if lengths == 0 else int32s(lengths, n, 1)[0] == t + 1


@device
def copy(source, target):
    """Copy a line."""
    for j in range(len(target)):
        target[j] = source[j]


@device
def _sum_of_group(like, rows, at, pitch, start, count, lengths, t, shift, mean, width, squared):
    """Return the sums of a vector of columns over some rows, from row `start` on."""
    some = splat(cast(0, like))
    for i in range(count):
        if has(lengths, start + i, t):
            d = (get_first(rows, at + (start + i) * pitch, width) - shift) - mean
            some = some + (d * d if squared else d)
    return some


@inner
def _sum_distances(like, a, offset, pitch, rows, lengths, t, shift, mean, squared, sums):
    """Write the float64 sums, over the rows that have a step, of distances from shift and mean, or of their squares."""
    width, all_rows = len(shift), numbers(like, a, offset, 1)
    fill_line(sums, 0.0)
    for above in range(0, rows, GROUP):
        for j in range(0, width, WIDTH):
            of_shift, of_mean = get(shift, j), get(mean, j)
            given = all_rows, j, pitch, above
            if lengths == 0 and above + GROUP <= rows:  # with constants, which the compiler unrolls
                some = _sum_of_group(like, *given, GROUP, NONE, t, of_shift, of_mean, width - j, squared)
            else:
                count = min(GROUP, rows - above)
                some = _sum_of_group(like, *given, count, lengths, t, of_shift, of_mean, width - j, squared)
            put(sums, j, get(sums, j) + some)


@device
def column_moments(like, a, offset, pitch, rows, lengths, t, count, shift, mean, rstd, sums, eps):
    """Write shift and mean of columns, whose sum is their mean, 1 / standard deviation, and the variance in `sums`.

    The memory of these four is that of whole vectors.
    """
    first = 0
    while not has(lengths, first, t):
        first += 1
    copy(numbers(like, a, offset + first * pitch, len(shift)), shift)
    fill_line(mean, like)
    _sum_distances(like, a, offset, pitch, rows, lengths, t, shift, mean, False, sums)
    for j in range(len(shift)):
        mean[j] = sums[j] / count
    _sum_distances(like, a, offset, pitch, rows, lengths, t, shift, mean, True, sums)
    for j in range(len(shift)):
        sums[j] /= count
        rstd[j] = 1.0 / np.sqrt(sums[j] + eps)


@device
def take_population(like, mean, var, shift, rest, rstd, eps):
    """Write shift, 0, and 1 / standard deviation of population statistics at two addresses."""
    means, variances = numbers(like, mean, 0, len(shift)), numbers(like, var, 0, len(shift))
    for j in range(len(shift)):
        shift[j] = means[j]
        rest[j] = 0
        rstd[j] = 1.0 / np.sqrt(np.float64(variances[j]) + eps)


@device
def move_population(like, mean, var, shift, rest, sums, count, momentum):
    """Move population statistics at two addresses towards those of the mini-batch, whose variance is in `sums`."""
    means, variances = numbers(like, mean, 0, len(shift)), numbers(like, var, 0, len(shift))
    for j in range(len(shift)):
        new = np.float64(shift[j]) + np.float64(rest[j])
        means[j] = (1 - momentum) * np.float64(means[j]) + momentum * new
        unbiased = sums[j] * (count / (count - 1.0))
        variances[j] = (1 - momentum) * np.float64(variances[j]) + momentum * unbiased


@device
def standardise(values, shift, mean, rstd, out):
    """Write the normalised numbers of a row of columns."""
    for j in range(len(out)):
        out[j] = ((values[j] - shift[j]) - mean[j]) * rstd[j]


@device
def row_moments(values, eps):
    """Return shift, mean of what is left, and 1 / standard deviation of a row."""
    shift, count = values[0], len(values)
    sums, whole = splat(0.0), count // FOUR * FOUR
    for i in range(0, whole, FOUR):
        some = splat(cast(0, shift))
        for k in range(i, i + FOUR, WIDTH):
            some = some + (get(values, k) - shift)
        sums = sums + some
    for i in range(whole, count, WIDTH):
        sums = sums + first(get_first(values, i, count - i) - shift, count - i, cast(0, shift))
    mean = cast(fold(sums) / count, shift)
    squares = splat(0.0)
    for i in range(0, whole, FOUR):
        some = splat(cast(0, shift))
        for k in range(i, i + FOUR, WIDTH):
            d = (get(values, k) - shift) - mean
            some = some + d * d
        squares = squares + some
    for i in range(whole, count, WIDTH):
        d = first((get_first(values, i, count - i) - shift) - mean, count - i, cast(0, shift))
        squares = squares + d * d
    return shift, mean, cast(1.0 / np.sqrt(fold(squares) / count + eps), shift)


@device
def row_sums(g, scale, hat):
    """Return the means over a row of scaled gradients, and of these times the normalised numbers."""
    sums, products, count = splat(0.0), splat(0.0), len(g)
    whole = count // FOUR * FOUR
    for i in range(0, whole, FOUR):
        some, product = splat(cast(0, g[0])), splat(cast(0, g[0]))
        for k in range(i, i + FOUR, WIDTH):
            scaled = get(g, k) * get(scale, k)
            some, product = some + scaled, product + scaled * get(hat, k)
        sums, products = sums + some, products + product
    for i in range(whole, count, WIDTH):
        scaled = get_first(g, i, count - i) * get_first(scale, i, count - i)
        sums, products = sums + scaled, products + scaled * get_first(hat, i, count - i)
    return fold(sums) / count, fold(products) / count


@device
def open_gates(a, candidate):
    """Write sigmoid over a line, or tanh where it is the cell candidate."""
    if candidate:
        for j in range(len(a)):
            a[j] = tanh(a[j])
    else:
        for j in range(len(a)):
            a[j] = sigmoid(a[j])[0]


@device
def next_cell(gates, start, units, before, c):
    """Write the next cell of units `start` and on, from a row of open gates of all units."""
    width = len(c)
    i, f, g = part(gates, start, width), part(gates, units + start, width), part(gates, 2 * units + start, width)
    for j in range(width):
        c[j] = f[j] * before[j] + i[j] * g[j]


@device
def emit(o, z, h):
    """Write the hidden state."""
    for j in range(len(h)):
        h[j] = o[j] * tanh(z[j])
