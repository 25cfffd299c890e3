"""Normalisation of the CPU kernels of batch norm: its factors for each channel, and the argument of the activation."""

import numpy as np

from bnkernels.ops.batch_norm.cpu.rows import FLOAT64, accumulator_of, get, line_of, spread
from bnkernels.ops.batch_norm.problem import Stage
from bnkernels.runtime.cpu.language import LINE, device, kernel, numbers, part, stack

WHOLE, COLLECT, APPLY, FROZEN = (int(stage) for stage in Stage)
# Lines of a normalisation, a number for a channel each, see `normalise`.
MEAN, LOW, SCALE, SCALE_SHIFT, SLOPE, BEND, RSTD = range(7)


@device
def rstd_of(acc, var, eps):
    """Return ``1 / sqrt(var + eps)`` in the accumulator's type, whose numbers these are."""
    if acc == FLOAT64:
        return 1.0 / np.sqrt(var + eps)
    return np.float64(np.float32(1) / np.sqrt(np.float32(var) + np.float32(eps)))


@kernel
def normalise(arguments, group, first, channels, normalisation):
    """Write the normalisation of each channel, from the statistics as they are kept, or the running ones.

    In lines: mean, mean_low, scale and shift of ``y = phi(((x - mean) - mean_low) scale + shift)``; and of the backward
    the factors of ``dgamma = slope sum g (x - mean) + bend sum g``, and rstd.
    """
    a = arguments[()]
    acc, step = accumulator_of(a), a.channels
    of_parameters = a.storage if a.params_in_storage_type else acc
    for i in range(channels):
        channel = first + i
        r, bend, low = 1.0, 0.0, 0.0
        if a.stage == FROZEN:
            mean = get(a.running_mean, acc, group * step + channel)
            rstd = rstd_of(acc, get(a.running_var, acc, group * step + channel), a.eps)
        else:
            at = group * a.statistic_rows * step + channel
            mean, low = get(a.statistics, acc, at), get(a.statistics, acc, at + step)
            rstd = get(a.statistics, acc, at + 2 * step)
            if a.statistic_rows == 5:
                r, bend = get(a.statistics, acc, at + 3 * step), get(a.statistics, acc, at + 4 * step)
        gamma = get(a.gamma, of_parameters, channel) if a.gamma != 0 else 1.0
        beta = get(a.beta, of_parameters, channel) if a.beta != 0 else 0.0
        normalisation[MEAN * LINE + i], normalisation[LOW * LINE + i] = mean, low
        normalisation[SCALE * LINE + i], normalisation[SCALE_SHIFT * LINE + i] = gamma * rstd * r, gamma * bend + beta
        normalisation[SLOPE * LINE + i], normalisation[BEND * LINE + i] = rstd * r, bend
        normalisation[RSTD * LINE + i] = rstd


@kernel
def spread_normalisation(a, like, normalisation, channels, count, columns):
    """Write mean, mean_low, scale and shift of each column of a piece, in the accumulator's type."""
    line = stack(1.0, 1024)
    for number in range(4):
        values, out = part(line, 0, count), numbers(like, line_of(columns, number), 0, count)
        spread(part(normalisation, number * LINE, channels), channels, a.inner, values)
        for i in range(count):
            out[i] = values[i]


@kernel
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
