"""CPU kernel that merges the moments of several parts, as ``cuda/batch_norm_statistics.cu`` does, in float64."""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.cpu.language import cast, kernel

NONE = {dtype: np.empty(0, dtype) for dtype in (np.dtype(np.float32), np.dtype(np.float64))}


@kernel
def _merge(moments, statistics, merged, running_mean, running_var, momentum, correction, eps):
    """Write statistics and merged moments, and move the running statistics, if there are any."""
    parts, _, channels = moments.shape
    one = cast(1.0, moments[0, 0, 0])
    for c in range(channels):
        count, first, shift, m2 = 0.0, 0.0, 0.0, 0.0
        for k in range(parts):
            if moments[k, 0, c] > 0:  # an empty part counts by its count alone
                if count == 0.0:  # means are taken from the first one: equal ones stay exact
                    first = np.float64(moments[k, 1, c])
                count += moments[k, 0, c]
                distance = (np.float64(moments[k, 1, c]) - first) + np.float64(moments[k, 2, c])
                shift += moments[k, 0, c] * distance
        shift /= max(count, 1.0)
        mean = cast(first + shift, one)
        low = (first - np.float64(mean)) + shift
        for k in range(parts):
            if moments[k, 0, c] > 0:
                distance = ((np.float64(moments[k, 1, c]) - np.float64(mean)) + np.float64(moments[k, 2, c])) - low
                m2 += np.float64(moments[k, 3, c]) + moments[k, 0, c] * (distance * distance)
        merged[0, c], merged[1, c], merged[2, c], merged[3, c] = count, mean, low, m2
        statistics[0, c], statistics[1, c], statistics[2, c] = mean, low, 0
        if count > 0.0:
            statistics[2, c] = one / np.sqrt(cast(m2 / count, one) + cast(eps, one))
            if len(running_mean) > 0:
                running_mean[c] = (1.0 - momentum) * np.float64(running_mean[c]) + momentum * (np.float64(mean) + low)
        if count > correction and len(running_var) > 0:
            running_var[c] = (1.0 - momentum) * np.float64(running_var[c]) + momentum * (m2 / (count - correction))


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
