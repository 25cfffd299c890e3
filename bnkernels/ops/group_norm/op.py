"""Group normalisation: groups of channels of every example over their positions; forward and backward, one launch each.

The kernels are those of layer norm, ``cuda/layer_norm_*.cu``, and so are launches, CPU kernels and reference: each
group of an example is a row, whose columns have the parameters of their channels. Below, C is the number of channels,
G that of groups, of C / G channels each; T is the data type of `x`, A that of the accumulator: float32 for 16-bit T,
else T; and P that of scale, shift and their gradients: A or T.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import activation_named
from bnkernels.ops.layer_norm.call import backward, forward
from bnkernels.ops.layer_norm.problem import (
    GROUP_BACKWARD,
    GROUP_FORWARD,
    LAST_GROUP_BACKWARD,
    LAST_GROUP_FORWARD,
)
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.replay import ReplayCache

FORWARD_CALLS, BACKWARD_CALLS = ReplayCache(), ReplayCache()


def group_norm_forward(
    x: Array,
    groups: int,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Normalise every group of channels of every example over its positions, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C), (N, C, L), (N, C, H, W), ..., or (N, L, C), (N, H, W, C), ..., type T
        Examples; C order.
    groups : int
        Number of groups, G, which divides C. With one group it is layer norm with a scale and a shift for each channel,
        with C groups instance norm.
    gamma, beta : array, shape (C,), type P, optional
        Scale and shift of every channel; without them 1 and 0.
    axis : int
        Axis of the channels: 1, or -1 where they come last; on a GPU without a copy, on a CPU 1 MiB at a time.
    eps : float
        Number added to the variance, in the units of ``x**2``: at least the smallest normal number of type A, because
        a constant group has the variance 0.
    activation : str
        Activation behind the norm, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation, as in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Arrays for ``(y, statistics)``; C order. `y` may be `x` itself if no backward follows.

    Returns
    -------
    y : array, shape of `x`, type T
        ``phi(gamma * (x - mean) * rstd + beta)``.
    statistics : array, shape (3, N, G), type A
        Rows ``mean``, ``mean_low`` (what `mean` loses by rounding) and ``rstd``, which is ``1 / sqrt(var + eps)``, of
        every group of every example; for the backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    See Also
    --------
    layer_norm_forward : The same over trailing axes, with parameters for every feature.
    instance_norm_forward : The same for groups of one channel, with any strides, a mask and a residual sum.

    Notes
    -----
    Training and inference are the same. Variances are biased. Groups of more than 16,384 numbers, or 8192 of float64,
    are shared by several blocks: a cooperative launch. Source: ``cuda/layer_norm_forward.cu``, for long rows
    ``cuda/layer_norm_forward_cooperative.cu``.

    References
    ----------
    .. [1] Y. Wu and K. He, "Group Normalization", 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 3.0, 5.0, 5.0]])  # an example of four channels
    >>> y, statistics = group_norm_forward(x, 2, eps=0.25)
    >>> y.round(3)
    array([[-0.894,  0.894,  0.   ,  0.   ]])
    >>> statistics[0]
    array([[2., 5.]])
    """
    call = FORWARD_CALLS.replay(out, (x, gamma, beta), groups, axis, eps, activation, alpha)
    if call.replayed:
        return out
    options = ("groups", groups), activation_named(activation, alpha), check.epsilon(eps, x)
    return forward(LAST_GROUP_FORWARD if _last(x, axis) else GROUP_FORWARD, call, out, *options, x, gamma, beta)


def group_norm_backward(
    dy: Array,
    x: Array,
    groups: int,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    *,
    axis: int = 1,
    activation: str = "identity",
    alpha: float | None = None,
    workspace: AnyArray | None = None,
    out: tuple[Array, AnyArray, AnyArray] | None = None,
) -> tuple[Array, Any, Any]:
    """Return the gradients of `group_norm_forward`.

    Parameters
    ----------
    dy : array, shape of `x`, type T
        Gradient with respect to the output; C order.
    x, groups, gamma, beta : array, int, array or None, array or None
        Arguments of the forward.
    statistics : array, shape (3, N, G), type A
        Result of the forward.
    axis, activation, alpha : int, str, float
        Arguments of the forward.
    workspace : array, shape (W,), type A, optional
        Memory for partial sums: W of at least 512 times the numbers of a group, and of 4 times those of an example. By
        default it is allocated if needed.
    out : tuple of three arrays, optional
        Arrays for ``(dx, dgamma, dbeta)``; C order. `dx` may be `dy` itself.

    Returns
    -------
    dx : array, shape of `x`, type T
        Gradient with respect to `x`.
    dgamma, dbeta : array, shape (C,), type P
        Gradients with respect to scale and shift, of type A if there is neither.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    One launch, deterministic. Where several blocks have the rows of a group, or share a row, there is a grid barrier: a
    cooperative launch. Source: ``cuda/layer_norm_backward.cu``, for long rows
    ``cuda/layer_norm_backward_cooperative.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 3.0, 2.0, 4.0], [5.0, 9.0, 2.0, 3.0]])
    >>> y, statistics = group_norm_forward(x, 2)
    >>> dx, dgamma, dbeta = group_norm_backward(np.ones((2, 4)), x, 2, None, None, statistics)
    >>> bool(abs(dx).max() < 1e-15), dbeta  # a shift of a whole group does not change its output
    (True, array([2., 2., 2., 2.]))
    """
    given = dy, x, gamma, beta, statistics, workspace
    call = BACKWARD_CALLS.replay(out, given, groups, axis, activation, alpha)
    if call.replayed:
        return out
    options = ("groups", groups), activation_named(activation, alpha)
    return backward(LAST_GROUP_BACKWARD if _last(x, axis) else GROUP_BACKWARD, call, out, *options, *given)


def _last(x: Any, axis: int) -> bool:
    """Tell whether the channels come last. What is no array has no shape: the op says so."""
    axis, last = check.integer("axis", axis), len(getattr(x, "shape", (0, 0))) - 1
    if axis not in (1, -1, last):
        raise ValueError(f"axis must be 1 or -1: channels come behind the examples or last, got {axis}")
    return axis != 1
