"""Batch norm with running statistics as what it is: a scale and a shift, which the layer before it can take over.

Plain array expressions in float64 on NumPy or CuPy arrays: this is done once, before a network is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import Array


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def batch_norm_scale_shift(
    gamma: Array | None, beta: Array | None, running_mean: Array, running_var: Array, *, eps: float = 1e-5
) -> tuple[Array, Array]:
    """Return the scale and the shift that inference with these statistics comes down to.

    Parameters
    ----------
    gamma, beta : array, shape (C,), or None
        Scale and shift of the batch norm; None is 1 and 0.
    running_mean, running_var : array, shape (C,), floating point
        Running statistics, C channels.
    eps : float
        Added to the variance, in its units.

    Returns
    -------
    scale : array, shape (C,), dtype of `running_mean`
        ``batch_norm_inference(x, ...)`` is ``scale * x + shift``, but for rounding.
    shift : array, shape (C,), dtype of `running_mean`
        See `scale`.

    Raises
    ------
    TypeError
        If an argument is not an array of floating point, or arrays of NumPy and CuPy are mixed.
    ValueError
        If shapes differ, or `eps` is not positive.

    See Also
    --------
    fold_batch_norm : Let the layer before do both.

    Notes
    -----
    ``scale = gamma / sqrt(running_var + eps)`` and ``shift = beta - scale * running_mean``, in float64, rounded once.
    A mean that is large beside the deviation costs digits that `batch_norm_inference`, which subtracts first, keeps.

    Examples
    --------
    >>> import numpy as np
    >>> batch_norm_scale_shift(None, None, np.array([3.0]), np.array([3.75]), eps=0.25)
    (array([0.5]), array([-1.5]))
    """
    scale, shift = _scale_shift(gamma, beta, running_mean, running_var, eps)
    return scale.astype(running_mean.dtype), shift.astype(running_mean.dtype)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def fold_batch_norm(
    weight: Array,
    bias: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    eps: float = 1e-5,
    axis: int = 0,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Return weight and bias of the one layer that does a linear map or convolution and the batch norm behind it.

    Parameters
    ----------
    weight : array, floating point
        Weight of the layer; its axis `axis` has the output channels: C, or C / `groups`. Never written.
    bias : array, shape (C,), or None
        Bias of the layer.
    gamma, beta : array, shape (C,), or None
        Scale and shift of the batch norm; None is 1 and 0.
    running_mean, running_var : array, shape (C,), floating point
        Running statistics.
    eps : float
        Added to the variance, in its units.
    axis : int
        0 for (out, in) and for convolutions (out, in, height, width), 1 for the (in, out) of `MLP` and for transposed
        convolutions (in, out, height, width).
    groups : int
        Number of groups of a grouped transposed convolution, whose weight is (in, out / groups, height, width). Other
        grouped convolutions have all of their outputs in axis 0, and need no number.

    Returns
    -------
    weight : array, shape and dtype of `weight`
        ``scale * weight``, along `axis`.
    bias : array, shape (C,), dtype of `weight`
        ``scale * bias + shift``, or the shift.

    Raises
    ------
    TypeError
        If an argument is not an array of floating point, or arrays of NumPy and CuPy are mixed.
    ValueError
        If shapes do not fit, `axis` is not one of `weight`, `groups` do not divide its inputs or come with another
        `axis` than 1, or `eps` is not positive.

    See Also
    --------
    batch_norm_scale_shift : The scale and the shift themselves.

    Notes
    -----
    In float64, rounded once. The folded layer is right for inference only: in training the statistics change.

    Examples
    --------
    >>> import numpy as np
    >>> weight, bias = np.array([[1.0, 2.0]]), np.array([1.0])
    >>> fold_batch_norm(weight, bias, None, None, np.array([3.0]), np.array([3.75]), eps=0.25)
    (array([[0.5, 1. ]]), array([-1.]))
    """
    arrays = {"weight": weight, "bias": bias, "gamma": gamma, "beta": beta}
    _check_arrays(**arrays, running_mean=running_mean, running_var=running_var)
    axis, ndim = check.integer("axis", axis), len(weight.shape)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"axis must be one of the {ndim} axes of weight, of the shape {weight.shape}; got {check.shown(axis)}"
        )
    groups = check.integer("groups", groups, 1)
    if groups > 1 and (axis % ndim != 1 or weight.shape[0] % groups):
        raise ValueError(
            f"groups is {groups}, which must divide the inputs of a weight (in, out / groups, ...) with axis=1; got "
            f"axis={axis} and a weight of the shape {weight.shape}. Other grouped convolutions need no groups"
        )
    channels = groups * weight.shape[axis]
    if running_mean.shape != (channels,):
        raise ValueError(
            f"weight has {channels} channels along axis {axis}, but running_mean has the shape {running_mean.shape}; "
            "name the axis of the channels that come out: 0 for (out, in), 1 for (in, out)"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have the shape ({channels},), got {bias.shape}")
    scale, shift = _scale_shift(gamma, beta, running_mean, running_var, eps)
    broadcast = [weight.shape[i] if i == axis % ndim else 1 for i in range(ndim)]
    inputs = [groups, weight.shape[0] // groups, *weight.shape[1:]] if groups > 1 else weight.shape
    scales = scale.reshape([groups, *broadcast] if groups > 1 else broadcast)
    folded = (weight.astype("float64").reshape(inputs) * scales).reshape(weight.shape)
    moved = shift if bias is None else scale * bias.astype("float64") + shift
    return folded.astype(weight.dtype), moved.astype(weight.dtype)


def _check_arrays(**arrays: Any) -> None:
    """Check for arrays of floating point: integers would cut off what comes out."""
    given = check.arguments({n: check.signature(array) for n, array in arrays.items()}, ("bias", "gamma", "beta"))
    for argument in given.values():
        if argument is not None:
            check.floating(argument)


def _scale_shift(gamma: Any, beta: Any, running_mean: Any, running_var: Any, eps: float) -> tuple[Any, Any]:
    """Check the vectors; return scale and shift in float64."""
    eps = check.epsilon(eps)
    vectors = {"running_mean": running_mean, "running_var": running_var, "gamma": gamma, "beta": beta}
    _check_arrays(**vectors)
    for name, array in vectors.items():
        if array is not None and (array.ndim != 1 or array.shape != running_mean.shape):
            raise ValueError(
                f"{name} must be a vector of as many channels as running_mean has, got the shape {array.shape} beside "
                f"{running_mean.shape}"
            )
    scale = (running_var.astype("float64") + eps) ** -0.5
    if gamma is not None:
        scale = scale * gamma.astype("float64")
    shift = -scale * running_mean.astype("float64")
    return scale, shift if beta is None else shift + beta.astype("float64")
