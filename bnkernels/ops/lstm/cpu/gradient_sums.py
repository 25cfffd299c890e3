"""Sums of the gradients of an LSTM's gates and cells over the examples of a step, on the CPU.

Numerics: GROUP rows are added in the data's type, and what they give to float64 sums, which are those of all steps.
"""

from bnkernels.ops.lstm.cpu.parts import GROUP, NONE, WIDE, has
from bnkernels.runtime.cpu.language import cast, device, doubles, inner, numbers, part, stack
from bnkernels.runtime.cpu.sums import fill_line
from bnkernels.runtime.cpu.vectors import WIDTH, get, get_first, put, splat


@device
def _sums_of_group(like, all_g, all_x, all_h, x_hat, h_hat, at, pitch, start, count, above, lengths, t, width):
    """Return the sums of a vector of columns over some rows, from row `above` on."""
    some_g, some_x, some_h = splat(cast(0, like)), splat(cast(0, like)), splat(cast(0, like))
    for i in range(count):
        if has(lengths, start + above + i, t):
            place = at + (above + i) * pitch
            values = get_first(all_g, place, width)
            some_g = some_g + values
            if x_hat:
                some_x = some_x + values * get_first(all_x, place, width)
            if h_hat:
                some_h = some_h + values * get_first(all_h, place, width)
    return some_g, some_x, some_h


@inner
def column_sums(like, g, x_hat, h_hat, at, hat_at, pitch, start, rows, lengths, t, of_g, of_x, of_h):
    """Write the float64 sums of columns of gradients, and of these times normalised numbers, if there are any.

    `at` and `hat_at` are where the first row lies, which is example `start`. The memory of the sums is that of whole
    vectors.
    """
    width = len(of_g)
    all_g, all_x, all_h = numbers(like, g, at, 1), numbers(like, x_hat, hat_at, 1), numbers(like, h_hat, hat_at, 1)
    fill_line(of_g, 0.0), fill_line(of_x, 0.0), fill_line(of_h, 0.0)
    for above in range(0, rows, GROUP):
        for j in range(0, width, WIDTH):
            given = all_g, all_x, all_h, x_hat, h_hat, j, pitch, start
            if lengths == 0 and above + GROUP <= rows:  # with constants, which the compiler unrolls
                some_g, some_x, some_h = _sums_of_group(like, *given, GROUP, above, NONE, t, width - j)
            else:
                count = min(GROUP, rows - above)
                some_g, some_x, some_h = _sums_of_group(like, *given, count, above, lengths, t, width - j)
            put(of_g, j, get(of_g, j) + some_g)
            put(of_x, j, get(of_x, j) + some_x)
            put(of_h, j, get(of_h, j) + some_h)


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
    of_g, of_x, of_h = stack(0.0, WIDE), stack(0.0, WIDE), stack(0.0, WIDE)
    for at in range(0, columns, WIDE):
        width = min(WIDE, columns - at)
        g, x, h = part(of_g, 0, width), part(of_x, 0, width), part(of_h, 0, width)
        own, kept = start * columns + at, (step + start) * columns + at
        column_sums(like, dx_part, x_hat, h_hat, own, kept, columns, start, rows, lengths, t, g, x, h)
        keep(sums, at, g)
        if x_hat:
            keep(sums, columns + at, x)
            keep(sums, 2 * columns + at, h)
    for at in range(0, units if x_hat else 0, WIDE):
        width = min(WIDE, units - at)
        g, x, h = part(of_g, 0, width), part(of_x, 0, width), part(of_h, 0, width)
        own, kept = start * units + at, (step + start) * units + at
        column_sums(like, dz, c_hat, 0, own, kept, units, start, rows, lengths, t, g, x, h)
        keep(sums, 3 * columns + at, x)
        keep(sums, 3 * columns + units + at, g)
