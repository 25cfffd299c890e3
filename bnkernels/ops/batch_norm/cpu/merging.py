"""CPU kernel that merges the moments of several parts, as ``cuda/batch_norm_statistics.cu`` does, in float64."""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.cpu.language import cast, kernel, part, stack
from bnkernels.runtime.cpu.mathematics import keep_where

STRIP = 256  # channels that are merged at a time
LINES = 4 * STRIP
NONE = {dtype: np.empty(0, dtype) for dtype in (np.dtype(np.float32), np.dtype(np.float64))}


@kernel
def _merge(moments, statistics, merged, running_mean, running_var, momentum, correction, eps):
    """Write statistics and merged moments, and move the running statistics, if there are any."""
    parts, _, channels = moments.shape
    one, lines = cast(1.0, moments[0, 0, 0]), stack(0.0, LINES)
    for start in range(0, channels, STRIP):
        size = min(STRIP, channels - start)
        count, mean = part(lines, 0, size), part(lines, STRIP, size)
        low, m2 = part(lines, 2 * STRIP, size), part(lines, 3 * STRIP, size)
        for j in range(size):
            count[j], mean[j], low[j], m2[j] = 0.0, 0.0, 0.0, 0.0
        for k in range(parts):
            at = 4 * k * channels + start
            of_count, of_mean = part(moments, at, size), part(moments, at + channels, size)
            of_low = part(moments, at + 2 * channels, size)
            for j in range(size):
                number, centre = np.float64(of_count[j]), np.float64(of_mean[j])
                given = number > 0  # an empty part counts by its count alone
                first = mean[j] + keep_where(given & (count[j] == 0), centre)  # equal means stay exact
                distance = (centre - first) + np.float64(of_low[j])
                count[j] += keep_where(given, number)
                low[j] += keep_where(given, number * distance)
                mean[j] = first
        for j in range(size):
            shift = low[j] / max(count[j], 1.0)
            rounded = np.float64(cast(mean[j] + shift, one))
            low[j] = (mean[j] - rounded) + shift
            mean[j] = rounded
        for k in range(parts):
            at = 4 * k * channels + start
            of_count, of_mean = part(moments, at, size), part(moments, at + channels, size)
            of_low, of_m2 = part(moments, at + 2 * channels, size), part(moments, at + 3 * channels, size)
            for j in range(size):
                number = np.float64(of_count[j])
                distance = ((np.float64(of_mean[j]) - mean[j]) + np.float64(of_low[j])) - low[j]
                m2[j] += keep_where(number > 0, np.float64(of_m2[j]) + number * (distance * distance))
        for row in range(4):
            line, out = part(lines, row * STRIP, size), part(merged, row * channels + start, size)
            for j in range(size):
                out[j] = line[j]
        for row in range(2):
            line, out = part(lines, (row + 1) * STRIP, size), part(statistics, row * channels + start, size)
            for j in range(size):
                out[j] = line[j]
        rstd = part(statistics, 2 * channels + start, size)
        for j in range(size):
            rstd[j] = keep_where(count[j] > 0, one / np.sqrt(cast(m2[j] / count[j], one) + cast(eps, one)))
        for j in range(size):
            c = start + j
            if count[j] > 0.0 and len(running_mean) > 0:
                running_mean[c] = (1.0 - momentum) * np.float64(running_mean[c]) + momentum * (mean[j] + low[j])
            if count[j] > correction and len(running_var) > 0:
                running_var[c] = (1.0 - momentum) * np.float64(running_var[c]) + momentum * (
                    m2[j] / (count[j] - correction)
                )


def merge(
    statistics: np.ndarray,
    merged: np.ndarray,
    moments: np.ndarray,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    unbiased: bool,
    eps: float,
) -> None:
    """Write the statistics and the moments of all parts together, and update the running statistics."""
    nothing = NONE[moments.dtype]
    running = (nothing if array is None else array for array in (running_mean, running_var))
    _merge(moments, statistics, merged, *running, momentum, float(unbiased), eps)
