"""Sums of the CPU kernels: of a line, of more numbers than a float64 has digits for, and of blocks of rows."""

from __future__ import annotations

from bnkernels.runtime.cpu.language import LINE, accumulator, device, doubles, kernel, part, place, stack, store
from bnkernels.runtime.cpu.vectors import WIDTH, fold, get, get_first, splat

MOST_SUMS = 2**18  # sums of the columns of all blocks, in float64: 2 MiB


@device
def total(line):
    """Return the float64 sum of a line, whose numbers are added in 32 lanes and these by halves."""
    a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    whole = len(line) // (4 * WIDTH) * (4 * WIDTH)
    for i in range(0, whole, 4 * WIDTH):
        a, b = a + get(line, i), b + get(line, i + WIDTH)
        c, d = c + get(line, i + 2 * WIDTH), d + get(line, i + 3 * WIDTH)
    a = (a + c) + (b + d)
    for i in range(whole, len(line), WIDTH):
        a = a + get_first(line, i, len(line) - i)
    return fold(a)


@device
def add(pair, number):
    """Return a pair `(high, low)` with a number added to it, whose rounding error goes to `low`."""
    high, low = pair
    both = high + number
    added = both - high
    return both, low + ((high - (both - added)) + (number - added))


@device
def fill_line(line, number):
    """Write one number everywhere."""
    for j in range(len(line)):
        line[j] = number


@device
def flush(line, sums):
    """Add a line to float64 sums and clear it."""
    for j in range(len(sums)):
        sums[j] += line[j]
        line[j] = 0


@device
def round_to(sums, line):
    """Write float64 sums into a line."""
    for j in range(len(sums)):
        line[j] = sums[j]


@device
def store_sums(like, out, first, sums, line):
    """Write float64 sums into an array of the type `like` from `first` on; `line` is scratch."""
    rounded = place(like, out, first, part(line, 0, len(sums)))
    round_to(sums, rounded)
    store(like, out, first, rounded)


@kernel
def merge(like, sums, offset, step, blocks, columns, out):
    """Add the sums of all blocks in order: `columns` of them every `step` numbers, from an offset on.

    `out` is an array of the type `like`.
    """
    high, low, line = stack(0.0, LINE), stack(0.0, LINE), stack(accumulator(like), LINE)
    for start in range(0, columns, LINE):
        count = min(LINE, columns - start)
        fill_line(part(high, 0, count), 0.0), fill_line(part(low, 0, count), 0.0)
        for block in range(blocks):
            more = doubles(sums, offset + block * step + start, count)
            for j in range(count):
                high[j], low[j] = add((high[j], low[j]), more[j])
        for j in range(count):
            high[j] += low[j]
        store_sums(like, out, start, part(high, 0, count), line)
