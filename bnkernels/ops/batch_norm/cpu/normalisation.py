"""Normalisation of the CPU kernels of batch norm: its factors for each channel, and the argument of the activation."""

import numpy as np

from bnkernels.ops.batch_norm.cpu.rows import get_line, line_of, spread
from bnkernels.ops.batch_norm.problem import Stage
from bnkernels.runtime.cpu.language import LINE, accumulator, as_number, cast, device, inner, numbers, part
from bnkernels.runtime.cpu.mathematics import keep_where

WHOLE, COLLECT, APPLY, FROZEN = (int(stage) for stage in Stage)
# Lines of a normalisation, a number for a channel each, see `normalise`.
MEAN, LOW, SCALE, SCALE_SHIFT, SLOPE, BEND, RSTD = range(7)


@device
def rstd_of(like, var, eps):
    """Return ``1 / sqrt(var + eps)`` in the accumulator's type, whose numbers these are."""
    acc = accumulator(like)
    return np.float64(cast(1.0, acc) / np.sqrt(cast(var, acc) + cast(eps, acc)))


@inner
def normalise(a, like, group, first, channels, normalisation):
    """Write the normalisation of each channel, from the statistics as they are kept, or the running ones.

    In lines: mean, mean_low, scale and shift of ``y = phi(((x - mean) - mean_low) scale + shift)``; and of the backward
    the factors of ``dgamma = slope sum g (x - mean) + bend sum g``, and rstd.
    """
    acc, step = accumulator(like), a.channels
    mean, low = part(normalisation, MEAN * LINE, channels), part(normalisation, LOW * LINE, channels)
    scale, shift = part(normalisation, SCALE * LINE, channels), part(normalisation, SCALE_SHIFT * LINE, channels)
    slope, bend = part(normalisation, SLOPE * LINE, channels), part(normalisation, BEND * LINE, channels)
    rstd = part(normalisation, RSTD * LINE, channels)
    for i in range(channels):
        low[i], bend[i], slope[i], scale[i], shift[i] = 0.0, 0.0, 1.0, 1.0, 0.0
    if a.stage == FROZEN:
        get_line(acc, a.running_mean, group * step + first, 1, mean)
        get_line(acc, a.running_var, group * step + first, 1, rstd)
        for i in range(channels):
            rstd[i] = rstd_of(like, rstd[i], a.eps)
    else:
        at = group * a.statistic_rows * step + first
        get_line(acc, a.statistics, at, 1, mean)
        get_line(acc, a.statistics, at + step, 1, low)
        get_line(acc, a.statistics, at + 2 * step, 1, rstd)
        if a.statistic_rows == 5:
            get_line(acc, a.statistics, at + 3 * step, 1, slope)
            get_line(acc, a.statistics, at + 4 * step, 1, bend)
    if a.gamma != 0:
        get_parameters(a, like, a.gamma, first, scale)
    if a.beta != 0:
        get_parameters(a, like, a.beta, first, shift)
    for i in range(channels):
        if rstd[i] == 0.0:
            mean[i], low[i] = 0.0, 0.0  # so is xhat, but x - mean may be out of range
        slope[i] *= rstd[i]
        shift[i] += scale[i] * bend[i]
        scale[i] *= slope[i]


@inner
def get_parameters(a, like, address, first, line):
    """Write parameters from memory to a line."""
    if a.params_in_storage_type:
        get_line(like, address, first, 1, line)
    else:
        get_line(accumulator(like), address, first, 1, line)


@inner
def spread_line(a, like, values, channels, count, columns, number):
    """Write the numbers of channels to a line, one for each column of a piece, in the accumulator's type."""
    spread(values, channels, a.inner, numbers(accumulator(like), line_of(columns, number), 0, count))


@inner
def spread_normalisation(a, like, normalisation, channels, count, columns):
    """Write mean, mean_low, scale and shift of each column of a piece, in the accumulator's type."""
    for number in range(4):
        spread_line(a, like, part(normalisation, number * LINE, channels), channels, count, columns, number)


@inner
def before_activation(like, row, added, columns, out, count):
    """Write the argument of the activation to the address of a line; `added` is 0 where there is no residual."""
    acc, x = accumulator(like), numbers(like, row, 0, count)
    z, residual = numbers(acc, out, 0, count), numbers(acc, added, 0, count)
    mean, low = numbers(acc, line_of(columns, MEAN), 0, count), numbers(acc, line_of(columns, LOW), 0, count)
    scale = numbers(acc, line_of(columns, SCALE), 0, count)
    shift = numbers(acc, line_of(columns, SCALE_SHIFT), 0, count)
    if added == 0:
        for i in range(count):
            z[i] = ((as_number(x[i]) - mean[i]) - low[i]) * scale[i] + shift[i]
    else:
        for i in range(count):
            z[i] = (((as_number(x[i]) - mean[i]) - low[i]) * scale[i] + shift[i]) + residual[i]


@inner
def rectify(like, gradient, row, added, columns, out, count):
    """Write the gradient before a ReLU to the address of a line: that behind it, or 0 where the ReLU was.

    In one loop, for this is the activation that most layers have.
    """
    dy, x, residual = numbers(like, gradient, 0, count), numbers(like, row, 0, count), numbers(like, added, 0, count)
    mean, low = numbers(like, line_of(columns, MEAN), 0, count), numbers(like, line_of(columns, LOW), 0, count)
    scale = numbers(like, line_of(columns, SCALE), 0, count)
    shift, g, zero = (
        numbers(like, line_of(columns, SCALE_SHIFT), 0, count),
        numbers(like, out, 0, count),
        cast(0.0, like),
    )
    if added == 0:
        for i in range(count):
            z = ((x[i] - mean[i]) - low[i]) * scale[i] + shift[i]
            g[i] = keep_where(not (z <= zero), dy[i])
    else:
        for i in range(count):
            z = (((x[i] - mean[i]) - low[i]) * scale[i] + shift[i]) + residual[i]
            g[i] = keep_where(not (z <= zero), dy[i])
