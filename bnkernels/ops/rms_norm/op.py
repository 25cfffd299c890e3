"""RMS normalisation of every example over its features: forward and backward, one launch each.

The kernels are those of layer norm, ``cuda/layer_norm_*.cu``, and so are launches, CPU kernels and reference: rows that
are not centred. Below, C is the length of the last axis, over which is normalised; T is the data type of `x`, A that of
the accumulator: float32 for 16-bit T, else T; and P that of the scale and its gradient: A or T.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import activation_named
from bnkernels.ops.layer_norm.call import backward, forward
from bnkernels.ops.layer_norm.problem import RMS_BACKWARD, RMS_FORWARD
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.replay import ReplayCache

FORWARD_CALLS, BACKWARD_CALLS = ReplayCache(), ReplayCache()


def rms_norm_forward(
    x: Array,
    gamma: AnyArray | None = None,
    *,
    axes: int = 1,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Divide every example by the root of the mean square of its features, scale and activate.

    Parameters
    ----------
    x : array, shape (..., C), type T
        The examples; C order.
    gamma : array, shape (C,), type P, optional
        Scale of every feature; without it 1.
    axes : int
        Number of last axes over which is normalised; of several, these are in the place of C.
    eps : float
        Number added to the mean square, in the units of ``x**2``: at least the smallest normal number of type A,
        because a row of zeros has the mean square 0.
    activation : str
        Activation behind the norm, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation, as in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Arrays for ``(y, statistics)``; C order. `y` may be `x` itself if no backward follows.

    Returns
    -------
    y : array, shape (..., C), type T
        ``phi(gamma * x * rrms)``.
    statistics : array, shape (1, ...), type A
        One row, ``rrms``, which is ``1 / sqrt(mean(x**2) + eps)``, of every example; for the backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    See Also
    --------
    layer_norm_forward : The same with the mean subtracted, and a shift.

    Notes
    -----
    Training and inference are the same. PyTorch's ``eps=None`` is the distance of 1 from the next number: of float64
    2.22e-16, else of float32, 1.19e-7. Rows of more than 16,384 columns, or 8192 of float64, are shared by several
    blocks: a cooperative launch. A mean square out of range counts as infinite: the row becomes 0. Source:
    ``cuda/layer_norm_forward.cu``, for long rows ``cuda/layer_norm_forward_cooperative.cu``.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> y, rrms = rms_norm_forward(np.array([[3.0, 4.0], [0.0, 0.0]]), eps=0.25)
    >>> y.round(3)
    array([[0.84, 1.12],
           [0.  , 0.  ]])
    """
    call = FORWARD_CALLS.replay(out, (x, gamma), axes, eps, activation, alpha)
    if call.replayed:
        return out
    options = ("axes", axes), activation_named(activation, alpha), check.epsilon(eps, x)
    return forward(RMS_FORWARD, call, out, *options, x, gamma, None)


def rms_norm_backward(
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    statistics: AnyArray,
    *,
    axes: int = 1,
    activation: str = "identity",
    alpha: float | None = None,
    workspace: AnyArray | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Return the gradients of `rms_norm_forward`.

    Parameters
    ----------
    dy : array, shape (..., C), type T
        Gradient with respect to the output; C order.
    x, gamma : array, array or None
        Arguments of the forward.
    statistics : array, shape (1, ...), type A
        Result of the forward.
    axes, activation, alpha : int, str, float
        Arguments of the forward.
    workspace : array, shape (W,), type A, optional
        Memory for partial sums: W of at least 512 C. By default it is allocated if needed.
    out : tuple of two arrays, optional
        Arrays for ``(dx, dgamma)``; C order. `dx` may be `dy` itself.

    Returns
    -------
    dx : array, shape (..., C), type T
        Gradient with respect to `x`.
    dgamma : array, shape (C,), type P
        Gradient with respect to the scale, of type A if there is none.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    One launch, deterministic. Large problems are split over several blocks with a grid barrier: a cooperative
    launch. Source: ``cuda/layer_norm_backward.cu``, for long rows ``cuda/layer_norm_backward_cooperative.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[3.0, 4.0], [5.0, 12.0]])
    >>> y, statistics = rms_norm_forward(x)
    >>> dx, dgamma = rms_norm_backward(x, x, None, statistics)
    >>> bool(abs(dx).max() < 1e-4)  # a longer row is the same direction
    True
    """
    call = BACKWARD_CALLS.replay(out, (dy, x, gamma, statistics, workspace), axes, activation, alpha)
    if call.replayed:
        return out
    options = ("axes", axes), activation_named(activation, alpha)
    return backward(RMS_BACKWARD, call, out, *options, dy, x, gamma, None, statistics, workspace)
