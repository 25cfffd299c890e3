"""Sums of the gradients of an LSTM's gates and cells over the examples of a step, on the CPU.

Numerics: Four rows are added to a line of the data's type, and the line after GROUP rows to float64 sums, which are
          those of all steps.
"""

from bnkernels.ops.lstm.cpu.parts import GROUP, WIDE, has
from bnkernels.runtime.cpu.language import device, doubles, inner, numbers, part, stack
from bnkernels.runtime.cpu.sums import fill_line, flush

LINES = 3 * WIDE


@device
def _add_products(like, g, x_hat, h_hat, at, hat_at, of_g, of_x, of_h):
    """Add a row of gradients, and these times the normalised numbers, if there are any, to lines."""
    width = len(of_g)
    values = numbers(like, g, at, width)
    for j in range(width):
        of_g[j] += values[j]
    if x_hat:
        x = numbers(like, x_hat, hat_at, width)
        for j in range(width):
            of_x[j] += values[j] * x[j]
    if h_hat:
        h = numbers(like, h_hat, hat_at, width)
        for j in range(width):
            of_h[j] += values[j] * h[j]


@device
def _add_four_products(like, g, x_hat, h_hat, at, hat_at, pitch, of_g, of_x, of_h):
    """Add the same of four rows."""
    width = len(of_g)
    a, b = numbers(like, g, at, width), numbers(like, g, at + pitch, width)
    c, d = numbers(like, g, at + 2 * pitch, width), numbers(like, g, at + 3 * pitch, width)
    for j in range(width):
        of_g[j] += (a[j] + b[j]) + (c[j] + d[j])
    for hat, line in ((x_hat, of_x), (h_hat, of_h)):
        if hat:
            p, q = numbers(like, hat, hat_at, width), numbers(like, hat, hat_at + pitch, width)
            r, s = numbers(like, hat, hat_at + 2 * pitch, width), numbers(like, hat, hat_at + 3 * pitch, width)
            for j in range(width):
                line[j] += (a[j] * p[j] + b[j] * q[j]) + (c[j] * r[j] + d[j] * s[j])


@inner
def column_sums(like, g, x_hat, h_hat, at, hat_at, pitch, start, rows, lengths, t, lines, of_g, of_x, of_h):
    """Write the float64 sums of columns of gradients, and of these times normalised numbers, if there are any.

    `at` and `hat_at` are where the first row lies, which is example `start`.
    """
    width = len(of_g)
    one, two, three = part(lines, 0, width), part(lines, WIDE, width), part(lines, 2 * WIDE, width)
    fill_line(part(lines, 0, 3 * WIDE), like)
    fill_line(of_g, 0.0), fill_line(of_x, 0.0), fill_line(of_h, 0.0)
    n = pending = 0
    while n < rows:
        row = n * pitch
        if lengths == 0 and n + 4 <= rows:
            _add_four_products(like, g, x_hat, h_hat, at + row, hat_at + row, pitch, one, two, three)
            n, pending = n + 4, pending + 4
        else:
            if has(lengths, start + n, t):
                _add_products(like, g, x_hat, h_hat, at + row, hat_at + row, one, two, three)
                pending += 1
            n += 1
        if pending >= GROUP or n == rows:
            flush(one, of_g), flush(two, of_x), flush(three, of_h)
            pending = 0


@device
def keep(sums, at, line):
    """Add to the sums of all steps."""
    total = doubles(sums, at, len(line))
    for j in range(len(line)):
        total[j] += line[j]


@inner
def sums_of_block(like, dz, c_hat, x_hat, h_hat, dx_part, step, start, rows, units, lengths, t, sums):
    """Add the sums of the columns of a block: of the gates, and with layer norm of all products."""
    columns = 4 * units
    lines, of_g, of_x, of_h = stack(like, LINES), stack(0.0, WIDE), stack(0.0, WIDE), stack(0.0, WIDE)
    for at in range(0, columns, WIDE):
        width = min(WIDE, columns - at)
        g, x, h = part(of_g, 0, width), part(of_x, 0, width), part(of_h, 0, width)
        own, kept = start * columns + at, (step + start) * columns + at
        column_sums(like, dx_part, x_hat, h_hat, own, kept, columns, start, rows, lengths, t, lines, g, x, h)
        keep(sums, at, g)
        if x_hat:
            keep(sums, columns + at, x)
            keep(sums, 2 * columns + at, h)
    for at in range(0, units if x_hat else 0, WIDE):
        width = min(WIDE, units - at)
        g, x, h = part(of_g, 0, width), part(of_x, 0, width), part(of_h, 0, width)
        own, kept = start * units + at, (step + start) * units + at
        column_sums(like, dz, c_hat, 0, own, kept, units, start, rows, lengths, t, lines, g, x, h)
        keep(sums, 3 * columns + at, x)
        keep(sums, 3 * columns + units + at, g)
