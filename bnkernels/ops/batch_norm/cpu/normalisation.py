"""Normalisation of the CPU kernels of batch norm: its factors for each channel, and the argument of the activation."""

import numpy as np

from bnkernels.ops.batch_norm.cpu.rows import FLOAT64, accumulator_of, get_line, line_of, spread
from bnkernels.ops.batch_norm.problem import Stage
from bnkernels.runtime.cpu.language import LINE, device, inner, numbers, part, stack

WHOLE, COLLECT, APPLY, FROZEN = (int(stage) for stage in Stage)
# Lines of a normalisation, a number for a channel each, see `normalise`.
MEAN, LOW, SCALE, SCALE_SHIFT, SLOPE, BEND, RSTD = range(7)


@device
def rstd_of(acc, var, eps):
    """Return ``1 / sqrt(var + eps)`` in the accumulator's type, whose numbers these are."""
    if acc == FLOAT64:
        return 1.0 / np.sqrt(var + eps)
    return np.float64(np.float32(1) / np.sqrt(np.float32(var) + np.float32(eps)))


@inner
def normalise(arguments, group, first, channels, normalisation):
    """Write the normalisation of each channel, from the statistics as they are kept, or the running ones.

    In lines: mean, mean_low, scale and shift of ``y = phi(((x - mean) - mean_low) scale + shift)``; and of the backward
    the factors of ``dgamma = slope sum g (x - mean) + bend sum g``, and rstd.
    """
    a = arguments[()]
    acc, step = accumulator_of(a), a.channels
    mean, low = part(normalisation, MEAN * LINE, channels), part(normalisation, LOW * LINE, channels)
    scale, shift = part(normalisation, SCALE * LINE, channels), part(normalisation, SCALE_SHIFT * LINE, channels)
    slope, bend = part(normalisation, SLOPE * LINE, channels), part(normalisation, BEND * LINE, channels)
    rstd = part(normalisation, RSTD * LINE, channels)
    for i in range(channels):
        low[i], bend[i], slope[i], scale[i], shift[i] = 0.0, 0.0, 1.0, 1.0, 0.0
    if a.stage == FROZEN:
        get_line(a.running_mean, acc, group * step + first, 1, mean)
        get_line(a.running_var, acc, group * step + first, 1, rstd)
        for i in range(channels):
            rstd[i] = rstd_of(acc, rstd[i], a.eps)
    else:
        at = group * a.statistic_rows * step + first
        get_line(a.statistics, acc, at, 1, mean)
        get_line(a.statistics, acc, at + step, 1, low)
        get_line(a.statistics, acc, at + 2 * step, 1, rstd)
        if a.statistic_rows == 5:
            get_line(a.statistics, acc, at + 3 * step, 1, slope)
            get_line(a.statistics, acc, at + 4 * step, 1, bend)
    of_parameters = a.storage if a.params_in_storage_type else acc
    if a.gamma != 0:
        get_line(a.gamma, of_parameters, first, 1, scale)
    if a.beta != 0:
        get_line(a.beta, of_parameters, first, 1, shift)
    for i in range(channels):
        slope[i] *= rstd[i]
        shift[i] += scale[i] * bend[i]
        scale[i] *= slope[i]


@inner
def spread_line(a, like, values, channels, count, columns, number):
    """Write the numbers of channels to a line, one for each column of a piece, in the accumulator's type."""
    line, out = part(stack(1.0, 1024), 0, count), numbers(like, line_of(columns, number), 0, count)
    spread(values, channels, a.inner, line)
    for i in range(count):
        out[i] = line[i]


@inner
def spread_normalisation(a, like, normalisation, channels, count, columns):
    """Write mean, mean_low, scale and shift of each column of a piece, in the accumulator's type."""
    for number in range(4):
        spread_line(a, like, part(normalisation, number * LINE, channels), channels, count, columns, number)


@inner
def before_activation(like, row, added, columns, out, count):
    """Write the argument of the activation to an address; `added` is 0 where there is no residual."""
    x, z, residual = numbers(like, row, 0, count), numbers(like, out, 0, count), numbers(like, added, 0, count)
    mean, low = numbers(like, line_of(columns, MEAN), 0, count), numbers(like, line_of(columns, LOW), 0, count)
    scale = numbers(like, line_of(columns, SCALE), 0, count)
    shift = numbers(like, line_of(columns, SCALE_SHIFT), 0, count)
    if added == 0:
        for i in range(count):
            z[i] = ((x[i] - mean[i]) - low[i]) * scale[i] + shift[i]
    else:
        for i in range(count):
            z[i] = (((x[i] - mean[i]) - low[i]) * scale[i] + shift[i]) + residual[i]
