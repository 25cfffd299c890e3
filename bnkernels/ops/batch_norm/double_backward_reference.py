"""The NumPy twin of ``cuda/batch_norm_double_backward.cu``: its formulas, in float64, with the same names.

The kernel takes apart the sums that depend on sums; here they are written as they stand.
"""

from __future__ import annotations

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.batch_norm.cpu import DOUBLE, _affine, _centred, _scale, _sums
from bnkernels.ops.batch_norm.matrices import _bring_back, _matrix, _target
from bnkernels.ops.batch_norm.problem import Layout


def _wide(array: np.ndarray | None, absent: float = 0.0) -> np.ndarray:
    """Return an input in float64, or what its absence means."""
    return np.array(absent) if array is None else array.astype(DOUBLE)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def double_backward_host(
    layout: Layout,
    tensors: tuple[np.ndarray | None, ...],
    vectors: tuple[np.ndarray | None, ...],
    phi: Activation,
    outputs: tuple[np.ndarray | None, ...],
) -> None:
    """Write `outputs`: ddy, dx, dgamma, dbeta, dresidual.

    `tensors` are ddx, ddresidual, dy, x and the residual; `vectors` ddgamma, ddbeta, gamma, beta and the statistics.
    """
    ddy, dx, dgamma, dbeta, dresidual = outputs
    targets = [_target(array, layout) for array in (ddy, dx, dresidual)]
    rows = tuple(_matrix(array, layout) for array in tensors)
    found = double_backward_numpy(*rows, *vectors, phi)
    for place, result in zip((targets[0], targets[1], dgamma, dbeta, targets[2]), found, strict=True):
        if place is not None:
            place[...] = result
    for target, array in zip(targets, (ddy, dx, dresidual), strict=True):
        _bring_back(target, array, layout)


def double_backward_numpy(
    ddx: np.ndarray | None,
    ddresidual: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray | None,
    ddgamma: np.ndarray | None,
    ddbeta: np.ndarray | None,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    statistics: np.ndarray,
    phi: Activation,
) -> tuple[np.ndarray, ...]:
    """Return ddy, dx, dgamma, dbeta and dresidual of matrices, in float64."""
    over_batch = _sums(len(x))
    mean, mean_low, rstd = statistics
    centred = _centred(x, mean, mean_low)
    # In the type of the data, as the forward rounds it: on the same side of a kink.
    z = _affine(centred, _scale(gamma, rstd), beta, residual, np.empty_like(x)).astype(DOUBLE)
    taken = phi.forward(np, z.copy()) if phi.from_output else z
    rstd, gamma, dy = _wide(rstd), _wide(gamma, 1.0), _wide(dy)
    scale, xhat = gamma * rstd, centred * rstd
    v = _wide(ddx)

    def project(a: np.ndarray) -> np.ndarray:
        """Return P a: what passes through the mean and the variance."""
        return a - over_batch.mean(a) - xhat * over_batch.mean(a * xhat)

    g = phi.backward(np, dy, taken)
    projected_g = project(g)
    w = np.broadcast_to(_wide(ddgamma) * xhat + _wide(ddbeta) + _wide(ddresidual), x.shape)
    h = _wide(ddgamma) * g
    e = np.zeros(x.shape[1])
    if ddx is not None:
        w = w + scale * project(v)
        h = h - scale * (v * over_batch.mean(g * xhat) + g * over_batch.mean(v * xhat))
        e = over_batch.sum(v * projected_g)
    q = np.zeros(x.shape) if phi.is_piecewise_linear else w * (dy * phi.second(np, z))
    h = h + gamma * q
    dx = rstd * (project(h) - xhat * (scale * e / len(x)))
    return phi.backward(np, w, taken), dx, over_batch.sum(q * xhat) + rstd * e, over_batch.sum(q), q
