"""LSTM backward on the CPU: steps and products of a block of examples, or of a strip of units.

Formulas:  Of ``cuda/lstm_backward.cu``, and the products behind them.
Arrays:    Those of a whole backward, given by their addresses; 0 for none. dx_part, dh_part (N, 4H), dh (N, H): of the
           step being worked on. dweight_ih, dweight_hh, sums: of every block, float64 the last.
Tasks:     Without a norm and with layer norm blocks of HEIGHT examples, each with all its steps. With batch norm, step
           by step, strips of units, and then blocks, whose products take the gates of all units.
Traffic:   What the forward kept is read once, and with batch norm from the cache again. Gradients of gates stay there.
Numerics:  Of ``parts``. Products are of the data's type; sums of columns of all steps are of float64.
Order:     Blocks and strips are fixed by the shape: the same bits for any number of threads.
"""

from bnkernels.ops.lstm.cpu.gradient_sums import column_sums, keep, sums_of_block
from bnkernels.ops.lstm.cpu.parts import HEIGHT, STRIP, WIDE, copy, ends, has, row_sums
from bnkernels.runtime.cpu.language import cast, device, doubles, inner, kernel, numbers, part, size_of, stack
from bnkernels.runtime.cpu.mathematics import tanh
from bnkernels.runtime.cpu.products import product
from bnkernels.runtime.cpu.sums import fill_line


@device
def _carried(like, own, given, at, ending):
    """Return the gradient of a state, which of an ending example is `given`, or 0; written where it is carried."""
    line = numbers(like, own, at, len(ending[1]))
    if ending[0]:
        if given:
            copy(numbers(like, given, at, len(line)), line)
        else:
            fill_line(line, like)
    return line


@device
def _of_hidden(like, dy, at, dh):
    """Add the gradient of the output."""
    if dy:
        more = numbers(like, dy, at, len(dh))
        for j in range(len(dh)):
            dh[j] += more[j]


@device
def _through_output(o, dh, out):
    """Write the gradient of the output gate over the tanh in `out`, and that of the tanh's argument over `dh`."""
    one = cast(1.0, o[0])
    for j in range(len(dh)):
        t = out[j]
        d = dh[j] * o[j]
        out[j] = d * t * (one - o[j])
        dh[j] = d * (one - t * t)


@device
def _through_gates(gates, start, units, before, dc, out):
    """Write the gradients of three gates, and that of the cell before over `dc`."""
    width, one = len(dc), cast(1.0, dc[0])
    i, f, g = part(gates, start, width), part(gates, units + start, width), part(gates, 2 * units + start, width)
    of_i, of_f, of_g = part(out, start, width), part(out, units + start, width), part(out, 2 * units + start, width)
    for j in range(width):
        of_i[j] = dc[j] * g[j] * i[j] * (one - i[j])
    for j in range(width):
        of_g[j] = dc[j] * i[j] * (one - g[j] * g[j])
    for j in range(width):
        d = dc[j] * f[j]
        of_f[j] = d * before[j] * (one - f[j])
        dc[j] = d


@device
def _tanh(z, out):
    for j in range(len(out)):
        out[j] = tanh(z[j])


@device
def _tanh_of_affine(hat, scale, shift, out):
    for j in range(len(out)):
        out[j] = tanh(scale[j] * hat[j] + shift[j])


@inner
def _step_of_row(like, pointers, sizes, t, n, out):
    """Write the gradients of an example's gates; `dh` then holds those behind the norm of the cells."""
    dy, dh_n, dc_n, c0, gates, cells, c_hat, rstd, gc, bc, dh, dc, lengths = pointers
    steps, rows, _, units = sizes
    state, row = n * units, (t * rows + n) * units
    ending = ends(lengths, n, t, steps - 1), numbers(like, dh, state, units)
    a, of_o = numbers(like, gates, 4 * row, 4 * units), part(out, 3 * units, units)
    before = numbers(like, cells if t else c0, row - rows * units if t else state, units)
    if gc:
        hat, scale = numbers(like, c_hat, row, units), numbers(like, gc, 0, units)
        _tanh_of_affine(hat, scale, numbers(like, bc, 0, units), of_o)
    else:
        _tanh(numbers(like, cells, row, units), of_o)
    of_h, of_c = _carried(like, dh, dh_n, state, ending), _carried(like, dc, dc_n, state, ending)
    _of_hidden(like, dy, row, of_h)
    _through_output(part(a, 3 * units, units), of_h, of_o)
    if gc:
        sum_, product_ = row_sums(of_h, scale, hat)
        factor = numbers(like, rstd, (3 * t + 2) * rows + n, 1)[0]
        mean, slope = cast(sum_, like), cast(product_, like)
        for j in range(units):
            of_c[j] += factor * (scale[j] * of_h[j] - mean - hat[j] * slope)
    else:
        for j in range(units):
            of_c[j] += of_h[j]
    _through_gates(a, 0, units, before, of_c, out)


@device
def _through_rows(g, scale_x, scale_h, hat_x, hat_h, rstd_x, rstd_h, of_h):
    """Write the gradients of recurrent part and, over `g`, input part of a row, which were normalised."""
    sum_x, product_x = row_sums(g, scale_x, hat_x)
    sum_h, product_h = row_sums(g, scale_h, hat_h)
    mean_x, slope_x = cast(sum_x, rstd_x), cast(product_x, rstd_x)
    mean_h, slope_h = cast(sum_h, rstd_h), cast(product_h, rstd_h)
    for j in range(len(g)):
        one = g[j]
        of_h[j] = rstd_h * (scale_h[j] * one - mean_h - hat_h[j] * slope_h)
        g[j] = rstd_x * (scale_x[j] * one - mean_x - hat_x[j] * slope_x)


@inner
def _products_of_block(like, pointers, sizes, t, start, count):
    """Write the gradients of hidden state and input of some examples."""
    weight_ih, weight_hh, dh, dx, dx_part, dh_part = pointers[3], pointers[4], pointers[19], *pointers[21:24]
    _, rows, inputs, units = sizes
    columns = 4 * units
    product(count, units, columns, numbers(like, dh_part, 0, 1), start * columns, columns, 1,
            numbers(like, weight_hh, 0, 1), 0, units, 1, numbers(like, dh, 0, 1), start * units, units, 0)  # fmt: skip
    if dx:
        product(count, inputs, columns, numbers(like, dx_part, 0, 1), start * columns, columns, 1,
                numbers(like, weight_ih, 0, 1), 0, inputs, 1, numbers(like, dx, 0, 1), (t * rows + start) * inputs,
                inputs, 0)  # fmt: skip


@inner
def _weights(like, pointers, sizes, t, start, count, at, width, more):
    """Add the gradients of the weights of some gates, from some examples."""
    x, h0, y, dx_part, dh_part, dweight_ih, dweight_hh = pointers
    _, rows, inputs, units = sizes
    columns = 4 * units
    place = start * columns + at
    product(width, units, count, numbers(like, dh_part, 0, 1), place, 1, columns, numbers(like, y if t else h0, 0, 1),
            ((t - 1) * rows if t else 0) * units + start * units, units, 1, numbers(like, dweight_hh, 0, 1), at * units,
            units, more)  # fmt: skip
    product(width, inputs, count, numbers(like, dx_part, 0, 1), place, 1, columns, numbers(like, x, 0, 1),
            (t * rows + start) * inputs, inputs, 1, numbers(like, dweight_ih, 0, 1), at * inputs, inputs,
            more)  # fmt: skip


@kernel
def backward_blocks(like, pointers, sizes, first, last):
    """Compute all steps of some blocks of examples, without a norm or with layer norm."""
    x, h0, c0, _, _, y, gx, gh, gc, bc, gates, x_hat, h_hat, c_hat, cells, rstd = pointers[:16]
    dy, dh_n, dc_n, dh, dc, _, dx_part, dh_part, dweight_ih, dweight_hh, sums, lengths = pointers[16:28]
    steps, rows, inputs, units = sizes
    columns, size = 4 * units, size_of(like)
    length = 3 * columns + 2 * units if gx else columns
    of_row = dy, dh_n, dc_n, c0, gates, cells, c_hat, rstd, gc, bc, dh, dc, lengths
    for block in range(first, last):
        start, end = block * HEIGHT, min(rows, (block + 1) * HEIGHT)
        of_weights = (
            x,
            h0,
            y,
            dx_part,
            dh_part,
            dweight_ih + block * columns * inputs * size,
            (dweight_hh + block * columns * units * size),
        )
        for t in range(steps - 1, -1, -1):
            for n in range(start, end):
                out = numbers(like, dx_part, n * columns, columns)
                if has(lengths, n, t):
                    _step_of_row(like, of_row, sizes, t, n, out)
                else:
                    fill_line(out, like)
            step, own = t * rows, sums + block * length * 8
            sums_of_block(like, dh, c_hat, x_hat, h_hat, dx_part, step, start, end - start, units, lengths, t, own)
            for n in range(start, end if gx else start):
                g, h = numbers(like, dx_part, n * columns, columns), numbers(like, dh_part, n * columns, columns)
                if has(lengths, n, t):
                    scales, at = numbers(like, rstd, 3 * step, 3 * rows), (step + n) * columns
                    _through_rows(g, numbers(like, gx, 0, columns), numbers(like, gh, 0, columns),
                                  numbers(like, x_hat, at, columns), numbers(like, h_hat, at, columns),
                                  scales[n], scales[rows + n], h)  # fmt: skip
                else:
                    fill_line(h, like)
            _weights(like, of_weights, sizes, t, start, end - start, 0, columns, int(t < steps - 1))
            _products_of_block(like, pointers, sizes, t, start, end - start)


@device
def _scales(gamma, rstd, of_g, of_products, count, live, scale, mean, slope):
    """Write what a column's gradient is multiplied by, and the means that are taken off it."""
    for j in range(len(scale)):
        scale[j] = gamma[j] * rstd[j]
        mean[j] = of_g[j] / count if live else 0.0
        slope[j] = of_products[j] / count if live else 0.0


@inner
def _outputs_of_strip(like, pointers, sizes, t, start, width):
    """Write the gradients of output gates, and over `dh` those behind the norm of the cells, of some units."""
    gc, bc, gates, c_hat = pointers[8], pointers[9], pointers[10], pointers[13]
    dy, dh_n, dh, dx_part, lengths = pointers[16], pointers[17], pointers[19], pointers[22], pointers[27]
    steps, rows, _, units = sizes
    for n in range(rows):
        if has(lengths, n, t):
            at, gate = (t * rows + n) * units + start, 3 * units + start
            of_o = numbers(like, dx_part, n * 4 * units + gate, width)
            scale, shift = numbers(like, gc, start, width), numbers(like, bc, start, width)
            _tanh_of_affine(numbers(like, c_hat, at, width), scale, shift, of_o)
            hidden = _carried(like, dh, dh_n, n * units + start, (ends(lengths, n, t, steps - 1), of_o))
            _of_hidden(like, dy, at, hidden)
            _through_output(numbers(like, gates, (t * rows + n) * 4 * units + gate, width), hidden, of_o)


@inner
def _strip_of_step(like, pointers, sizes, t, count, live, start):
    """Compute a step of a strip of units with batch norm."""
    x, h0, c0, _, _, y, gx, gh, gc, _, gates, x_hat, h_hat, c_hat, cells, rstd = pointers[:16]
    _, _, dc_n, dh, dc, _, dx_part, dh_part, dweight_ih, dweight_hh, sums, lengths = pointers[16:28]
    steps, rows, _, units = sizes
    columns, step = 4 * units, t * rows
    of_weights = x, h0, y, dx_part, dh_part, dweight_ih, dweight_hh
    of_rstd = t * (2 * columns + units)
    sums_g, sums_x, sums_h = stack(0.0, WIDE), stack(0.0, WIDE), stack(0.0, WIDE)
    scales, means, slopes = stack(like, WIDE), stack(like, WIDE), stack(like, WIDE)
    scales_h, means_h, slopes_h = stack(like, WIDE), stack(like, WIDE), stack(like, WIDE)
    width = min(STRIP, units - start)
    of_g, of_x, of_h = part(sums_g, 0, width), part(sums_x, 0, width), part(sums_h, 0, width)
    scale, mean, slope = part(scales, 0, width), part(means, 0, width), part(slopes, 0, width)
    _outputs_of_strip(like, pointers, sizes, t, start, width)
    at = step * units + start
    column_sums(like, dh, c_hat, 0, start, at, units, 0, rows, lengths, t, of_g, of_x, of_h)
    keep(sums, 3 * columns + start, of_x)
    keep(sums, 3 * columns + units + start, of_g)
    _scales(numbers(like, gc, start, width), numbers(like, rstd, of_rstd + 2 * columns + start, width), of_g, of_x,
            count, live, scale, mean, slope)  # fmt: skip
    for n in range(rows):
        if has(lengths, n, t):
            at, state = (step + n) * units + start, n * units + start
            of_c = _carried(like, dc, dc_n, state, (ends(lengths, n, t, steps - 1), scale))
            hidden, hat = numbers(like, dh, state, width), numbers(like, c_hat, at, width)
            for j in range(width):
                of_c[j] += scale[j] * (hidden[j] - mean[j] - hat[j] * slope[j])
            a, out = (
                numbers(like, gates, (step + n) * columns, columns),
                numbers(like, dx_part, n * columns, columns),
            )
            before = numbers(like, cells if t else c0, at - rows * units if t else state, width)
            _through_gates(a, start, units, before, of_c, out)
    pieces = 1 if width == units else 4  # parts of the gates of a strip, within which they are neighbours
    length = 4 * width // pieces
    of_g, of_x, of_h = part(sums_g, 0, length), part(sums_x, 0, length), part(sums_h, 0, length)
    scale, mean, slope = part(scales, 0, length), part(means, 0, length), part(slopes, 0, length)
    scale_h, mean_h, slope_h = part(scales_h, 0, length), part(means_h, 0, length), part(slopes_h, 0, length)
    for piece in range(pieces):
        at = piece * units + start
        place = step * columns + at
        column_sums(like, dx_part, x_hat, h_hat, at, place, columns, 0, rows, lengths, t, of_g, of_x, of_h)
        keep(sums, at, of_g), keep(sums, columns + at, of_x), keep(sums, 2 * columns + at, of_h)
        _scales(numbers(like, gx, at, length), numbers(like, rstd, of_rstd + at, length), of_g, of_x, count, live,
                scale, mean, slope)  # fmt: skip
        _scales(numbers(like, gh, at, length), numbers(like, rstd, of_rstd + columns + at, length), of_g, of_h,
                count, live, scale_h, mean_h, slope_h)  # fmt: skip
        for n in range(rows):
            row = n * columns + at
            to_x, to_h = numbers(like, dx_part, row, length), numbers(like, dh_part, row, length)
            if has(lengths, n, t):
                row += step * columns
                x_row, h_row = numbers(like, x_hat, row, length), numbers(like, h_hat, row, length)
                for j in range(length):
                    g = to_x[j]
                    to_h[j] = scale_h[j] * (g - mean_h[j] - h_row[j] * slope_h[j])
                    to_x[j] = scale[j] * (g - mean[j] - x_row[j] * slope[j])
            else:
                fill_line(to_x, like), fill_line(to_h, like)
        _weights(like, of_weights, sizes, t, 0, rows, at, length, int(t < steps - 1))


@kernel
def backward_products(like, pointers, sizes, t, first, last):
    """Write the gradients of hidden state and input of a step of some blocks of examples."""
    for block in range(first, last):
        start = block * HEIGHT
        _products_of_block(like, pointers, sizes, t, start, min(HEIGHT, sizes[1] - start))


@kernel
def backward_strips(like, pointers, sizes, t, count, live, first, last):
    """Compute a step of some strips of units with batch norm; its products are those of `backward_products`."""
    for start in range(first * STRIP, min(last * STRIP, sizes[3]), STRIP):
        _strip_of_step(like, pointers, sizes, t, count, live, start)


@kernel
def backward_sequence(like, pointers, sizes, counts, live):
    """Compute all steps with batch norm, by one thread."""
    of_counts = doubles(counts, 0, sizes[0])
    for t in range(sizes[0] - 1, -1, -1):
        for start in range(0, sizes[3], STRIP):
            _strip_of_step(like, pointers, sizes, t, of_counts[t], live, start)
        for start in range(0, sizes[1], HEIGHT):
            _products_of_block(like, pointers, sizes, t, start, min(HEIGHT, sizes[1] - start))
