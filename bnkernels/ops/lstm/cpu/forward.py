"""LSTM forward on the CPU: products and steps of a block of examples, or of a strip of units.

Formulas:  Of ``cuda/lstm_forward.cu``, and the products before them.
Arrays:    Those of a whole forward, given by their addresses; 0 for none. The weights are transposed.
Tasks:     Without a norm and with layer norm blocks of HEIGHT examples, which go through all steps by themselves. With
           batch norm a step of strips of units, of which a strip has the gates and the cells of all examples.
Traffic:   The product of a step is read from the cache, with batch norm three times; weights that the cache does not
           hold are read once a step.
Numerics:  Of ``parts``. Products are of the data's type.
Order:     Blocks and strips are fixed by the shape: the same bits for any number of threads.
"""

from bnkernels.ops.lstm.cpu.parts import (
    HEIGHT,
    STRIP,
    WIDE,
    column_moments,
    copy,
    emit,
    ends,
    has,
    move_population,
    next_cell,
    open_gates,
    row_moments,
    standardise,
    take_population,
)
from bnkernels.runtime.cpu.language import device, doubles, inner, kernel, numbers, part, size_of, stack
from bnkernels.runtime.cpu.products import product
from bnkernels.runtime.cpu.sums import fill_line


@device
def _finish(like, y, h_n, c_n, c, t, n, start, width, sizes, ending):
    """Copy hidden state and cell of an example that ends with this step."""
    if ending:
        rows, units = sizes[1], sizes[3]
        at = n * units + start
        copy(numbers(like, y, t * rows * units + at, width), numbers(like, h_n, at, width))
        copy(c, numbers(like, c_n, at, width))


@device
def _open(gates, start, units, width):
    """Write the activations of the gates of some units over their sums."""
    if width == units:  # i and f are neighbours
        open_gates(part(gates, 0, 2 * units), False)
    else:
        open_gates(part(gates, start, width), False)
        open_gates(part(gates, units + start, width), False)
    open_gates(part(gates, 2 * units + start, width), True)
    open_gates(part(gates, 3 * units + start, width), False)


@device
def _sum_of_parts(x, h, scale_x, scale_h, shift, out):
    """Write the input of the gates."""
    for j in range(len(out)):
        out[j] = scale_x[j] * x[j] + scale_h[j] * h[j] + shift[j]


@device
def _sum_of_rows(x, h, moments_x, moments_h, scale_x, scale_h, shift, out):
    """Normalise input part and recurrent part of a row, and write the input of its gates."""
    shift_x, mean_x, rstd_x = moments_x
    shift_h, mean_h, rstd_h = moments_h
    for j in range(len(out)):
        hat_x, hat_h = ((x[j] - shift_x) - mean_x) * rstd_x, ((h[j] - shift_h) - mean_h) * rstd_h
        x[j], h[j] = hat_x, hat_h
        out[j] = scale_x[j] * hat_x + scale_h[j] * hat_h + shift[j]


@device
def _affine(hat, scale, shift, out):
    for j in range(len(out)):
        out[j] = scale[j] * hat[j] + shift[j]


@device
def _standardise_row(values, of_rows, place, eps):
    shift, mean, rstd = row_moments(values, eps)
    of_rows[place] = rstd
    for j in range(len(values)):
        values[j] = ((values[j] - shift) - mean) * rstd


@inner
def _gates_of_row(like, a, x, h, gx, gh, bias, of_rows, n, eps):
    """Write the inputs of an example's gates, which without a norm are those of the input part before."""
    columns = len(a)
    shift = numbers(like, bias, 0, columns)
    if gx == 0:
        for j in range(columns):
            a[j] += h[j] + shift[j]
        return
    of_x, of_h = row_moments(x, eps), row_moments(h, eps)
    of_rows[n], of_rows[len(of_rows) // 3 + n] = of_x[2], of_h[2]
    _sum_of_rows(x, h, of_x, of_h, numbers(like, gx, 0, columns), numbers(like, gh, 0, columns), shift, a)


@kernel
def forward_blocks(like, pointers, eps, momentum, sizes, first, last):
    """Compute all steps of some blocks of examples, without a norm or with layer norm."""
    x, h0, c0, weight_ih, weight_hh, bias, gx, gh, gc, bc = pointers[:10]
    gates, x_part, h_part, cells, c_hat, rstd, y, h_n, c_n, lengths = pointers[10:20]
    steps, rows, inputs, units, many, many_x = sizes
    columns, many_h = 4 * units, many if gx else 0
    one, of_ih, of_hh = numbers(like, x, 0, 1), numbers(like, weight_ih, 0, 1), numbers(like, weight_hh, 0, 1)
    for block in range(first, last):
        start, end = block * HEIGHT, min(rows, (block + 1) * HEIGHT)
        for t in range(steps):
            step, before = many * t * rows, many * (t - 1) * rows if t else 0
            products_x, products_h = (many_x * t * rows + start) * columns, (many_h * t * rows + start) * columns
            hidden = numbers(like, y if t else h0, (t - 1) * rows * units if t else 0, 1)
            in_x, in_h = numbers(like, x_part, 0, 1), numbers(like, h_part, 0, 1)
            product(end - start, columns, inputs, one, (t * rows + start) * inputs, inputs, 1,
                    of_ih, 0, columns, 1, in_x, products_x, columns, 0)  # fmt: skip
            product(end - start, columns, units, hidden, start * units, units, 1,
                    of_hh, 0, columns, 1, in_h, products_h, columns, 0)  # fmt: skip
            of_rows = numbers(like, rstd, 3 * step, 3 * rows)
            for n in range(start, end):
                h = numbers(like, y, (t * rows + n) * units, units)
                if not has(lengths, n, t):
                    fill_line(h, like)
                    continue
                a = numbers(like, gates, ((many if gx else many_x) * t * rows + n) * columns, columns)
                of_x = numbers(like, x_part, products_x + (n - start) * columns, columns)
                of_h = numbers(like, h_part, products_h + (n - start) * columns, columns)
                _gates_of_row(like, a, of_x, of_h, gx, gh, bias, of_rows, n, eps)
                _open(a, 0, units, units)
                c = numbers(like, cells, (step + n) * units, units)
                next_cell(a, 0, units, numbers(like, cells if t else c0, (before + n) * units, units), c)
                if gx:
                    hat = numbers(like, c_hat, (step + n) * units, units)
                    copy(c, hat)
                    _standardise_row(hat, of_rows, 2 * rows + n, eps)
                    _affine(hat, numbers(like, gc, 0, units), numbers(like, bc, 0, units), h)
                    emit(part(a, 3 * units, units), h, h)
                else:
                    emit(part(a, 3 * units, units), c, h)
                _finish(like, y, h_n, c_n, c, t, n, 0, units, sizes, ends(lengths, n, t, steps - 1))


@inner
def _statistics(like, a, at, pitch, lengths, t, mean, var, out, options, shift, rest, rstd, sums):
    """Find shift, mean and 1 / standard deviation of columns; keep the last and the population statistics."""
    rows, eps, momentum, count, live, moving = options
    if live:
        column_moments(like, a, at, pitch, rows, lengths, t, count, shift, rest, rstd, sums, eps)
        if moving:
            move_population(like, mean, var, shift, rest, sums, count, momentum)
    else:
        take_population(like, mean, var, shift, rest, rstd, eps)
    copy(rstd, numbers(like, out, 0, len(rstd)))


@inner
def _hidden_of_strip(like, pointers, sizes, t, start, shift, rest, scale):
    """Write normalised cells and hidden states of some units."""
    gc, bc, gates = pointers[8], pointers[9], pointers[10]
    cells, c_hat, y, h_n, c_n, lengths = pointers[13], pointers[14], *pointers[16:20]
    steps, rows, _, units, many, _ = sizes
    step, width = many * t * rows, len(shift)
    for n in range(rows):
        h, at = numbers(like, y, (t * rows + n) * units + start, width), (step + n) * units + start
        if not has(lengths, n, t):
            fill_line(h, like)
            continue
        c, hat = numbers(like, cells, at, width), numbers(like, c_hat, at, width)
        standardise(c, shift, rest, scale, hat)
        _affine(hat, numbers(like, gc, start, width), numbers(like, bc, start, width), h)
        emit(numbers(like, gates, (step + n) * 4 * units + 3 * units + start, width), h, h)
        _finish(like, y, h_n, c_n, c, t, n, start, width, sizes, ends(lengths, n, t, steps - 1))


@inner
def _strip_of_step(like, pointers, running, eps, momentum, sizes, t, count, live, tracked, start):
    """Compute a step of a strip of units with batch norm; population statistics are those of `tracked` steps."""
    x, h0, c0, weight_ih, weight_hh, bias, gx, gh = pointers[:8]
    gates, x_part, h_part, cells, _, rstd, y, _, _, lengths = pointers[10:20]
    _, rows, inputs, units, many, many_x = sizes
    columns, size, row = 4 * units, size_of(like), max(0, min(t, tracked - 1))
    of_gates, of_cells = row * columns * size, row * units * size  # places in the population statistics
    options = rows, eps, momentum, count, live, live and t < tracked and count > 1
    step, before = many * t * rows, many * (t - 1) * rows if t else 0
    in_x, in_h, kept = many_x * t * rows * columns, step * columns, many * t * (2 * columns + units)
    shift_x, rest_x, scale_x = stack(like, WIDE), stack(like, WIDE), stack(like, WIDE)
    shift_h, rest_h, scale_h = stack(like, WIDE), stack(like, WIDE), stack(like, WIDE)
    gammas_x, gammas_h, biases = stack(like, WIDE), stack(like, WIDE), stack(like, WIDE)
    sums = stack(0.0, WIDE)
    width = min(STRIP, units - start)
    pieces = 1 if width == units else 4  # parts of the gates of a strip, within which they are neighbours
    length = 4 * width // pieces
    sums_ = part(sums, 0, length)
    for piece in range(pieces):
        at, k = piece * units + start, piece * length
        b, out = at * size + of_gates, rstd + (kept + at) * size
        product(rows, length, inputs, numbers(like, x, 0, 1), t * rows * inputs, inputs, 1,
                numbers(like, weight_ih, 0, 1), at, columns, 1, numbers(like, x_part, 0, 1), in_x + at, columns,
                0)  # fmt: skip
        product(rows, length, units, numbers(like, y if t else h0, 0, 1), (t - 1) * rows * units if t else 0,
                units, 1, numbers(like, weight_hh, 0, 1), at, columns, 1, numbers(like, h_part, 0, 1), in_h + at,
                columns, 0)  # fmt: skip
        shift, rest, scale = part(shift_x, k, length), part(rest_x, k, length), part(scale_x, k, length)
        _statistics(like, x_part, in_x + at, columns, lengths, t, running[0] + b, running[1] + b, out, options,
                    shift, rest, scale, sums_)  # fmt: skip
        shift, rest, scale = part(shift_h, k, length), part(rest_h, k, length), part(scale_h, k, length)
        _statistics(like, h_part, in_h + at, columns, lengths, t, running[2] + b, running[3] + b,
                    out + columns * size, options, shift, rest, scale, sums_)  # fmt: skip
        copy(numbers(like, gx, at, length), part(gammas_x, k, length))
        copy(numbers(like, gh, at, length), part(gammas_h, k, length))
        copy(numbers(like, bias, at, length), part(biases, k, length))
    for n in range(rows):
        if not has(lengths, n, t):
            continue
        a = numbers(like, gates, (step + n) * columns, columns)
        for piece in range(pieces):
            at, k = piece * units + start, piece * length
            of_x = numbers(like, x_part, in_x + n * columns + at, length)
            of_h = numbers(like, h_part, in_h + n * columns + at, length)
            standardise(of_x, part(shift_x, k, length), part(rest_x, k, length), part(scale_x, k, length), of_x)
            standardise(of_h, part(shift_h, k, length), part(rest_h, k, length), part(scale_h, k, length), of_h)
            _sum_of_parts(of_x, of_h, part(gammas_x, k, length), part(gammas_h, k, length), part(biases, k, length),
                          part(a, at, length))  # fmt: skip
        _open(a, start, units, width)
        c = numbers(like, cells, (step + n) * units + start, width)
        next_cell(a, start, units, numbers(like, cells if t else c0, (before + n) * units + start, width), c)
    sums_ = part(sums, 0, width)
    shift, rest, scale = part(shift_x, 0, width), part(rest_x, 0, width), part(scale_x, 0, width)
    b, out = start * size + of_cells, rstd + (kept + 2 * columns + start) * size
    _statistics(like, cells, step * units + start, units, lengths, t, running[4] + b, running[5] + b, out, options,
                shift, rest, scale, sums_)  # fmt: skip
    _hidden_of_strip(like, pointers, sizes, t, start, shift, rest, scale)


@kernel
def forward_strips(like, pointers, running, eps, momentum, sizes, steps, counts, live, tracked, first, last):
    """Compute the steps from `steps[0]` to `steps[1]` of some strips of units; several steps only of all strips."""
    of_counts = doubles(counts, 0, sizes[0])
    for t in range(steps[0], steps[1]):
        for start in range(first * STRIP, min(last * STRIP, sizes[3]), STRIP):
            _strip_of_step(like, pointers, running, eps, momentum, sizes, t, of_counts[t], live, tracked, start)
