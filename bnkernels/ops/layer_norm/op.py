"""Layer normalisation of every example over its features: forward and backward, one launch each.

CuPy arrays run ``cuda/layer_norm_*.cu``, NumPy arrays ``cpu``, or ``reference.py`` where Numba is missing. Below, C
is the length of the last axis, over which is normalised; T is the data type of `x`, A that of the accumulator: float32
for 16-bit T, else T; and P that of scale, shift and their gradients: A or T.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import activation_named
from bnkernels.ops.layer_norm.call import backward, forward
from bnkernels.ops.layer_norm.problem import BACKWARD, FORWARD
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.replay import ReplayCache

FORWARD_CALLS, BACKWARD_CALLS = ReplayCache(), ReplayCache()


def layer_norm_forward(
    x: Array,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    *,
    axes: int = 1,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Normalise every example over its features, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (..., C), type T
        The examples; C order.
    gamma, beta : array, shape (C,), type P, optional
        Scale and shift of every feature; without them 1 and 0.
    axes : int
        Number of last axes over which is normalised; of several, these are in the place of C.
    eps : float
        Number added to the variance, in the units of ``x**2``: at least the smallest normal number of type A, because
        a constant row has the variance 0.
    activation : str
        Activation behind the norm, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation, as in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Arrays for ``(y, statistics)``; C order. `y` may be `x` itself if no backward follows.

    Returns
    -------
    y : array, shape (..., C), type T
        ``phi(gamma * (x - mean) * rstd + beta)``.
    statistics : array, shape (3, ...), type A
        Rows ``mean``, ``mean_low`` (what `mean` loses by rounding) and ``rstd``, which is ``1 / sqrt(var + eps)``, of
        every example; for the backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    Training and inference are the same. Variances are biased, over C. Rows of more than 16,384 columns, or 8192 of
    float64, are shared by several blocks: a cooperative launch. Source: ``cuda/layer_norm_forward.cu``, for long rows
    ``cuda/layer_norm_forward_cooperative.cu``.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> y, statistics = layer_norm_forward(np.array([[1.0, 3.0], [5.0, 5.0]]), eps=0.25)
    >>> y.round(3)
    array([[-0.894,  0.894],
           [ 0.   ,  0.   ]])
    """
    call = FORWARD_CALLS.replay(out, (x, gamma, beta), axes, eps, activation, alpha)
    if call.replayed:
        return out
    options = ("axes", axes), activation_named(activation, alpha), check.epsilon(eps, x)
    return forward(FORWARD, call, out, *options, x, gamma, beta)


def layer_norm_backward(
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    *,
    axes: int = 1,
    activation: str = "identity",
    alpha: float | None = None,
    workspace: AnyArray | None = None,
    out: tuple[Array, AnyArray, AnyArray] | None = None,
) -> tuple[Array, Any, Any]:
    """Return the gradients of `layer_norm_forward`.

    Parameters
    ----------
    dy : array, shape (..., C), type T
        Gradient with respect to the output; C order.
    x, gamma, beta : array, array or None, array or None
        Arguments of the forward.
    statistics : array, shape (3, ...), type A
        Result of the forward.
    axes, activation, alpha : int, str, float
        Arguments of the forward.
    workspace : array, shape (W,), type A, optional
        Memory for partial sums: W of at least 512 C. By default it is allocated if needed.
    out : tuple of three arrays, optional
        Arrays for ``(dx, dgamma, dbeta)``; C order. `dx` may be `dy` itself.

    Returns
    -------
    dx : array, shape (..., C), type T
        Gradient with respect to `x`.
    dgamma, dbeta : array, shape (C,), type P
        Gradients with respect to scale and shift, of type A if there is neither.

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
    >>> x = np.array([[1.0, 3.0, 2.0], [4.0, 5.0, 9.0]])
    >>> y, statistics = layer_norm_forward(x)
    >>> dx, dgamma, dbeta = layer_norm_backward(np.ones((2, 3)), x, None, None, statistics)
    >>> bool(abs(dx).max() < 1e-15), dbeta  # a shift of a whole row does not change its output
    (True, array([2., 2., 2.]))
    """
    call = BACKWARD_CALLS.replay(out, (dy, x, gamma, beta, statistics, workspace), axes, activation, alpha)
    if call.replayed:
        return out
    options = ("axes", axes), activation_named(activation, alpha)
    return backward(BACKWARD, call, out, *options, dy, x, gamma, beta, statistics, workspace)
