"""CPU kernel of the double backward of batch norm.

Formulas   those of ``cuda/batch_norm_double_backward.cu``, in its names, with c = x - mean instead of xhat = rstd c:
           w = s ddx + ddresidual + w0 + w1 c,  q = w dy phi''(z),  h = gamma q + hg g + hv ddx,
           ddy = w phi'(z),  dresidual = q,  dx = rstd (h - d0 - d1 c),
           where w0, w1 and hv, hg follow from the sums of ddx and g, and d0, d1 from those of q too; if the statistics
           are frozen, they have nothing of these sums
Arrays     those of the CUDA kernel
Tasks      slices of channels
Traffic    every input is read once where the rows of a slice fit into the cache; else twice, three times if the
           activation is curved; every output is written once
Numerics   z, phi' and phi'' in the accumulator's type, all else in float64
Bits       as in ``__init__.py``
"""

import numpy as np

from bnkernels.ops.activations_cpu import differentiate, second
from bnkernels.ops.batch_norm.cpu.normalisation import (
    LOW,
    MEAN,
    RSTD,
    SCALE,
    before_activation,
    normalise,
    spread_normalisation,
)
from bnkernels.ops.batch_norm.cpu.rows import (
    channels_of,
    columns_of,
    copy_line,
    get,
    input_of,
    line_of,
    load_row,
    output_of,
    own_columns,
    put,
    row_of,
    spread,
    store,
)
from bnkernels.ops.batch_norm.cpu.sums import fold, whole_sum
from bnkernels.runtime.cpu.language import LINE, accumulator, cast, device, inner, kernel, numbers, part, stack

# Lines of a row, in float64.
V, G, C, K, SLOPE_OF_ROW, ADDED = range(6)  # ddx, g, x - mean, dy phi'', phi', ddresidual
# Lines of a slice's constants.
OF_V, W0, W1, GAMMA, HG, HV, D0, D1, OF_DX = range(9)
TOTALS = 7  # sums of g, g c, ddx, ddx c, ddx g; and of q, q c


@inner
def _widen(like, source, out):
    """Write a line in float64; 0 if it is at address 0."""
    if source == 0:
        for i in range(len(out)):
            out[i] = 0.0
        return
    line = numbers(like, source, 0, len(out))
    for i in range(len(out)):
        out[i] = line[i]


@inner
def _prepare(a, like, tensors, row, first, column, own, columns, means, lines, scratch):
    """Write what the formulas need of a row."""
    ddx, dy, x, residual, ddresidual = tensors
    values = load_row(a, like, x, row, first, column, own, line_of(scratch, 0))
    added, given = residual.address, ddx.address
    if added != 0:
        added = load_row(a, like, residual, row, first, column, own, line_of(scratch, 1))
    acc, z, curved = accumulator(like), line_of(scratch, 2), a.activation != 0 or a.alpha != 1.0
    slope, bend = numbers(acc, line_of(scratch, 3), 0, own), numbers(acc, line_of(scratch, 4), 0, own)
    alpha = cast(a.alpha, acc)
    for i in range(own):
        slope[i], bend[i] = 1, 0
    if curved:
        before_activation(acc, values, added, columns, z, own)
        differentiate(a.activation, alpha, numbers(acc, z, 0, own), slope)
    _widen(acc, values, part(lines, C * LINE, own))
    _widen(acc, line_of(scratch, 3), part(lines, SLOPE_OF_ROW * LINE, own))
    g = load_row(a, like, dy, row, first, column, own, line_of(scratch, 0))
    if curved:
        copy_line(acc, g, line_of(scratch, 1), own)
        g = line_of(scratch, 1)
        if a.activation != 0:  # else bend is 0, whatever dy is
            second(a.activation, alpha, numbers(acc, z, 0, own), bend)
            for i in range(own):
                bend[i] *= numbers(acc, g, 0, own)[i]
        differentiate(a.activation, alpha, numbers(acc, z, 0, own), numbers(acc, g, 0, own))
    _widen(acc, g, part(lines, G * LINE, own))
    _widen(acc, line_of(scratch, 4), part(lines, K * LINE, own))
    if given != 0:
        given = load_row(a, like, ddx, row, first, column, own, line_of(scratch, 0))
    _widen(acc, given, part(lines, V * LINE, own))
    given = ddresidual.address
    if given != 0:
        given = load_row(a, like, ddresidual, row, first, column, own, line_of(scratch, 0))
    _widen(acc, given, part(lines, ADDED * LINE, own))
    c, mean, low = part(lines, C * LINE, own), part(means, 0, own), part(means, LINE, own)
    for i in range(own):
        c[i] = (c[i] - mean[i]) - low[i]


@device
def _add_first(lines, own, sums):
    """Add a row to the sums of g, g c, ddx, ddx c and ddx g."""
    v, g, c = part(lines, V * LINE, own), part(lines, G * LINE, own), part(lines, C * LINE, own)
    of_g, of_gc, of_v = part(sums, 0, own), part(sums, LINE, own), part(sums, 2 * LINE, own)
    of_vc, of_vg = part(sums, 3 * LINE, own), part(sums, 4 * LINE, own)
    for i in range(own):
        of_g[i] += g[i]
        of_gc[i] += g[i] * c[i]
        of_v[i] += v[i]
        of_vc[i] += v[i] * c[i]
        of_vg[i] += v[i] * g[i]


@device
def _weigh(lines, own, constants, w, q):
    """Write w and q of a row."""
    v, added = part(lines, V * LINE, own), part(lines, ADDED * LINE, own)
    c, k = part(lines, C * LINE, own), part(lines, K * LINE, own)
    of_v, w0, w1 = part(constants, OF_V * LINE, own), part(constants, W0 * LINE, own), part(constants, W1 * LINE, own)
    for i in range(own):
        w[i] = of_v[i] * v[i] + added[i] + w0[i] + w1[i] * c[i]
        q[i] = w[i] * k[i]


@device
def _add_second(lines, q, own, sums):
    """Add a row to the sums of q and q c."""
    c, of_q, of_qc = part(lines, C * LINE, own), part(sums, 5 * LINE, own), part(sums, 6 * LINE, own)
    for i in range(own):
        of_q[i] += q[i]
        of_qc[i] += q[i] * c[i]


@device
def _write_row(a, like, lines, w, q, own, constants, outputs, row, first, column, line):
    """Write a row of ddy, dx and dresidual."""
    ddy, dx, dresidual = outputs
    v, g, c = part(lines, V * LINE, own), part(lines, G * LINE, own), part(lines, C * LINE, own)
    slope, out = part(lines, SLOPE_OF_ROW * LINE, own), numbers(accumulator(like), line, 0, own)
    gamma, hg, hv = part(constants, GAMMA * LINE, own), part(constants, HG * LINE, own), part(constants, HV * LINE, own)
    d0, d1, rstd = part(constants, D0 * LINE, own), part(constants, D1 * LINE, own), part(constants, OF_DX * LINE, own)
    for i in range(own):
        out[i] = rstd[i] * ((gamma[i] * q[i] + hg[i] * g[i] + hv[i] * v[i]) - d0[i] - d1[i] * c[i])
    store(like, row_of(a, like, dx, row, first, column), line, own)
    for i in range(own):
        out[i] = w[i] * slope[i]
    store(like, row_of(a, like, ddy, row, first, column), line, own)
    if dresidual.address != 0:
        for i in range(own):
            out[i] = q[i]
        store(like, row_of(a, like, dresidual, row, first, column), line, own)


@inner
def _choose_w(a, like, first, channels, normalisation, totals, constants):
    """Write the constants that follow from the first sums."""
    acc, count = accumulator(like), np.float64(a.outer * a.inner)
    for i in range(channels):
        rstd, s = normalisation[RSTD * LINE + i], normalisation[SCALE * LINE + i]
        ddgamma = get(acc, a.ddgamma, first + i) if a.ddgamma != 0 else 0.0
        ddbeta = get(acc, a.ddbeta, first + i) if a.ddbeta != 0 else 0.0
        mean_v, mean_v_xhat, mean_g_xhat = 0.0, 0.0, 0.0
        if a.frozen == 0:
            mean_v, mean_v_xhat = totals[2 * LINE + i] / count, rstd * totals[3 * LINE + i] / count
            mean_g_xhat = rstd * totals[LINE + i] / count
        constants[OF_V * LINE + i] = s
        constants[W0 * LINE + i] = ddbeta - s * mean_v
        constants[W1 * LINE + i] = rstd * (ddgamma - s * mean_v_xhat)
        constants[GAMMA * LINE + i] = get(acc, a.gamma, first + i) if a.gamma != 0 else 1.0
        constants[HG * LINE + i] = ddgamma - s * mean_v_xhat
        constants[HV * LINE + i] = -s * mean_g_xhat


@inner
def _conclude(a, like, first, channels, normalisation, totals, constants):
    """Write dgamma and dbeta, and the constants that follow from all sums."""
    acc, count = accumulator(like), np.float64(a.outer * a.inner)
    for i in range(channels):
        rstd, s, gamma = normalisation[RSTD * LINE + i], constants[OF_V * LINE + i], constants[GAMMA * LINE + i]
        hg, hv = constants[HG * LINE + i], constants[HV * LINE + i]
        g, gc, v, vc, vg = totals[i], totals[LINE + i], totals[2 * LINE + i], totals[3 * LINE + i], totals[4 * LINE + i]
        q, qc = totals[5 * LINE + i], totals[6 * LINE + i]
        e = vg if a.frozen != 0 else (vg - v * g / count) - rstd * vc * (rstd * gc) / count
        put(acc, a.dbeta, first + i, q)
        put(acc, a.dgamma, first + i, rstd * qc + rstd * e)
        constants[D0 * LINE + i] = (gamma * q + hg * g + hv * v) / count
        mean_h_xhat = rstd * (gamma * qc + hg * gc + hv * vc) / count
        constants[D1 * LINE + i] = rstd * (mean_h_xhat + s * e / count)
        if a.frozen != 0:
            constants[D0 * LINE + i], constants[D1 * LINE + i] = 0.0, 0.0
        constants[OF_DX * LINE + i] = rstd


@inner
def _pass(a, like, tensors, outputs, first, channels, normalisation, step, totals, rests, of_slice):
    """Read all rows of a slice: for the first sums, for those of q, or to write the outputs."""
    lines, scratch, columns, sums = stack(1.0, 6144), stack(1.0, 5120), stack(1.0, 4096), stack(1.0, 7168)
    means, constants, of_row, nothing = stack(1.0, 2048), stack(1.0, 9216), stack(1.0, 2048), stack(1.0, 1024)
    whole, length = columns_of(a, channels)
    for column in range(0, whole, length):
        count = min(length, whole - column)
        spread_normalisation(a, like, normalisation, channels, count, columns)
        spread(part(normalisation, MEAN * LINE, channels), channels, a.inner, part(means, 0, count))
        spread(part(normalisation, LOW * LINE, channels), channels, a.inner, part(means, LINE, count))
        for number in range(9):
            spread(part(of_slice, number * LINE, channels), channels, a.inner, part(constants, number * LINE, count))
        for i in range(len(sums)):
            sums[i] = 0.0
        for row in range(a.rows):
            own = own_columns(a, row, count)
            w, q = part(of_row, 0, own), part(of_row, LINE, own)
            _prepare(a, like, tensors, row, first, column, own, columns, means, lines, scratch)
            if step == 0:
                _add_first(lines, own, sums)
                continue
            _weigh(lines, own, constants, w, q)
            if step == 1:
                _add_second(lines, q, own, sums)
            else:
                _write_row(a, like, lines, w, q, own, constants, outputs, row, first, column, line_of(scratch, 0))
        for number in range(TOTALS):
            for i in range(LINE):
                nothing[i] = 0.0
            of_sum, of_rest = part(totals, number * LINE, channels), part(rests, number * LINE, channels)
            fold(part(sums, number * LINE, LINE), nothing, channels, a.inner, count, of_sum, of_rest)


@kernel
def by_slices(like, arguments, first_slice, last_slice):
    """Compute slices of channels."""
    a = arguments[()]
    normalisation, totals, rests, constants = stack(1.0, 7168), stack(1.0, 7168), stack(1.0, 7168), stack(1.0, 9216)
    tensors = (
        input_of(a.ddx, 0, (0, a.ddx_outer, a.ddx_channel, a.ddx_inner)),
        input_of(a.dy, 0, (0, a.dy_outer, a.dy_channel, a.dy_inner)),
        input_of(a.x, 0, (0, a.x_outer, a.x_channel, a.x_inner)),
        input_of(a.residual, 0, (0, a.residual_outer, a.residual_channel, a.residual_inner)),
        input_of(a.ddresidual, 0, (0, a.ddresidual_outer, a.ddresidual_channel, a.ddresidual_inner)),
    )
    outputs = output_of(a, a.ddy, 0), output_of(a, a.dx, 0), output_of(a, a.dresidual, 0)
    for number in range(first_slice, last_slice):
        first, channels = channels_of(a, number)
        normalise(a, like, 0, first, channels, normalisation)
        for i in range(len(constants)):
            constants[i] = 0.0
        for i in range(len(totals)):
            totals[i], rests[i] = 0.0, 0.0
        for step in range(3):
            if step == 1 and a.activation == 0:  # q is 0
                continue
            if step == 2:
                for i in range(len(totals)):
                    totals[i] = whole_sum(totals[i], rests[i])
                _conclude(a, like, first, channels, normalisation, totals, constants)
            _pass(a, like, tensors, outputs, first, channels, normalisation, step, totals, rests, constants)
            if step == 0:
                for i in range(len(totals)):
                    totals[i], rests[i] = whole_sum(totals[i], rests[i]), 0.0
                _choose_w(a, like, first, channels, normalisation, totals, constants)
