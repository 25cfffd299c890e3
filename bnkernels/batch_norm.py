"""Batch normalisation with a residual sum and an activation behind it: forward, backward, inference.

CuPy arrays run ``cuda/batch_norm_forward.cu`` and ``cuda/batch_norm_backward.cu``, one launch each; NumPy arrays run
the twins of ``_batch_norm_numpy.py``, with statistics in float64. An op checks its values here and everything else in
``_batch_norm_plan.py``, which also runs it. ``_batch_norm_again.py`` says what makes a repeated call cheap.

Below, T is the data type of `x`: float16, bfloat16 (of ml_dtypes), float32 or float64. A is that of the accumulator, in
which all is computed and parameters and statistics are kept: float32 for 16-bit T, else T. C is the number of channels,
``x.shape[axis]``, and N that of the values of each. Inputs of the shape of `x` may have any strides.
"""

from __future__ import annotations

from typing import Any

from bnkernels import _batch_norm_plan as plans
from bnkernels import _check as check
from bnkernels.activations import activation_named


def batch_norm_forward(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    momentum: float = 0.1,
    unbiased: bool = True,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Normalise every channel over the mini-batch, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C), (N, C, L), (N, C, H, W), ..., type T
        The mini-batch: two values of each channel at least, or none. Never written.
    gamma, beta : array, shape (C,), type A, optional
        Scale and shift; without them 1 and 0.
    running_mean, running_var : array, shape (C,), type A, optional
        Running statistics, updated in place.
    momentum : float
        Weight of the new statistics in the running ones, between 0 and 1.
    unbiased : bool
        Whether `running_var` takes the variance over N - 1, as in PyTorch, or over N, as in Flax and Keras.
    eps : float
        Added to the variance, in the units of ``x**2``.
    axis : int
        The axis of the channels: 1, or -1 where they come last.
    residual : array, shape and type of `x`, optional
        Added before the activation. Never written.
    activation : str
        What follows: identity, relu, leaky_relu, sigmoid, tanh, gelu (exact), gelu_tanh, silu or elu.
    alpha : float, optional
        Of leaky_relu the slope below zero (default 0.01), of elu the factor (default 1).
    out : tuple of two arrays, optional
        Where to write `y` (which may be `x` or `residual` itself) and `statistics`; C order.

    Returns
    -------
    y : array, shape and type of `x`, C order
        The output.
    statistics : array, shape (3, C), type A
        Its rows are `mean`, `mean_low` and `rstd`, for the backward. ``mean + mean_low`` is the mean to about twice
        the precision of `mean` alone; ``rstd = 1 / sqrt(var + eps)`` with the biased variance.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, N is 1, or arrays overlap.

    See Also
    --------
    batch_norm_backward : The gradients.
    batch_norm_inference : The same with running statistics.

    Notes
    -----
    With N = 0 the running statistics stay as they are and `statistics` is 0. Nothing synchronises; with `out` nothing
    is allocated, unless an input's strides cannot be walked through as (outer, C, inner): then the input is copied
    first. Source: ``cuda/batch_norm_forward.cu``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, -2.0], [3.0, 2.0]])
    >>> y, (mean, mean_low, rstd) = batch_norm_forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean
    array([2., 0.])
    """
    given = running_mean, running_var, x, residual, gamma, beta
    call = plans.FORWARD_LAUNCHES.again(out, given, momentum, eps, axis, activation, alpha, unbiased)
    if call is True:
        return out
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    momentum, unbiased = check.number("momentum", momentum, 0, 1), check.boolean("unbiased", unbiased)
    eps = check.number("eps", eps, 0)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    arrays = (y, statistics, running_mean, running_var, x, residual, gamma, beta)
    plan = plans.plan_forward(axis, *check.signatures(arrays))
    if out is not None or running_mean is not None or running_var is not None:
        check.no_overlap(plan.runtime, plans.FORWARD_NAMES, arrays, written=4, in_place=("x", "residual"))
    y, statistics, _ = plans.run_forward(plan, arrays, momentum, eps, phi, unbiased, call)
    return y, statistics


def batch_norm_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    statistics: Any,
    *,
    axis: int = 1,
    residual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of `batch_norm_forward`.

    Parameters
    ----------
    dy : array, shape and type of `x`
        Gradient with respect to the output. Never written.
    x : array, type T
        The forward's input.
    gamma, beta : array, shape (C,), type A, or None
        As in the forward.
    statistics : array, shape (3, C), type A
        What the forward returned.
    axis, residual, activation, alpha : int, array, str, float
        As in the forward.
    out : tuple of arrays, optional
        Where to write what is returned; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and type of `x`
        Gradient with respect to `x`; its sum over each channel is 0.
    dgamma, dbeta : array, shape (C,), type A
        Gradients with respect to `gamma` and `beta`, also where those are None.
    dresidual : array, shape and type of `x`
        Gradient with respect to `residual`; only where that is given.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    See Also
    --------
    batch_norm_forward : The forward.
    batch_norm_inference_backward : The gradients for running statistics.

    Notes
    -----
    The activation is computed again from `x`, so nothing but `statistics` is kept between the passes. An empty batch
    gives zero parameter gradients. Source: ``cuda/batch_norm_backward.cu``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, statistics = batch_norm_forward(x)
    >>> dx, dgamma, dbeta = batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, None, None, statistics)
    >>> bool(abs(dx.sum()) < 1e-15), dbeta
    (True, array([1.]))
    """
    given = dy, x, residual, gamma, beta, statistics
    call = plans.BACKWARD_LAUNCHES.again(out, given, None, None, axis, activation, alpha)
    if call is True:
        return out
    outputs = check.pack_gradients(out, residual)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    arrays = (*outputs, *given, None, None)
    plan = plans.plan_backward(axis, *check.signatures(arrays))
    if out is not None:
        check.no_overlap(plan.runtime, plans.BACKWARD_NAMES, arrays, written=4, in_place=("dy", "x", "residual"))
    return plans.run_backward(plan, arrays, 0.0, phi, call=call)


def batch_norm_inference(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    out: Any = None,
) -> Any:
    """Normalise with running statistics, scale, shift and activate.

    Parameters
    ----------
    x : array, type T
        Any number of examples. Never written.
    gamma, beta : array, shape (C,), type A, or None
        Scale and shift; None means 1 and 0.
    running_mean, running_var : array, shape (C,), type A
        The statistics to normalise with. Never written.
    eps, axis, residual, activation, alpha : float, int, array, str, float
        As in `batch_norm_forward`.
    out : array, shape and type of `x`, optional
        Where to write the output; C order; may be `x` or `residual` itself.

    Returns
    -------
    array, shape and type of `x`, C order
        The output. Every example's is independent of the others.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    See Also
    --------
    batch_norm_forward : Training.

    Notes
    -----
    Source: ``cuda/batch_norm_forward.cu``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> batch_norm_inference(np.array([[3.0]]), None, None, np.array([1.0]), np.array([4.0]), eps=0.0)
    array([[1.]])
    """
    given = x, residual, gamma, beta, running_mean, running_var
    outputs = None if out is None else (out,)
    call = plans.INFERENCE_LAUNCHES.again(outputs, given, None, eps, axis, activation, alpha)
    if call is True:
        return out
    eps = check.number("eps", eps, 0)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    arrays = (out, *given)
    plan = plans.plan_inference(axis, *check.signatures(arrays))
    if out is not None:
        check.no_overlap(plan.runtime, plans.INFERENCE_NAMES, arrays, written=1, in_place=("x", "residual"))
    return plans.run_inference(plan, arrays, eps, phi, call)


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of `batch_norm_inference`, whose statistics do not depend on `x`.

    Parameters
    ----------
    dy : array, shape and type of `x`
        Gradient with respect to the output. Never written.
    x : array, type T
        The forward's input.
    gamma, beta : array, shape (C,), type A, or None
        As in the forward.
    running_mean, running_var : array, shape (C,), type A
        As in the forward. Never written.
    eps, axis, residual, activation, alpha : float, int, array, str, float
        As in the forward.
    out : tuple of arrays, optional
        Where to write what is returned; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and type of `x`
        Gradient with respect to `x`: ``dy * gamma * rstd``, through the activation.
    dgamma, dbeta, dresidual
        As in `batch_norm_backward`.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    See Also
    --------
    batch_norm_inference : The forward.

    Notes
    -----
    This is what fine-tuning with frozen statistics needs. Source: ``cuda/batch_norm_backward.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> one, four = np.array([1.0]), np.array([4.0])
    >>> batch_norm_inference_backward(np.array([[3.0]]), np.array([[5.0]]), None, None, one, four, eps=0.0)
    (array([[1.5]]), array([6.]), array([3.]))
    """
    given = dy, x, residual, gamma, beta
    call = plans.BACKWARD_LAUNCHES.again(out, (*given, running_mean, running_var), None, eps, axis, activation, alpha)
    if call is True:
        return out
    eps = check.number("eps", eps, 0)
    outputs = check.pack_gradients(out, residual)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    arrays = (*outputs, *given, None, running_mean, running_var)
    plan = plans.plan_backward(axis, *check.signatures(arrays))
    if out is not None:
        check.no_overlap(plan.runtime, plans.BACKWARD_NAMES, arrays, written=4, in_place=("dy", "x", "residual"))
    return plans.run_backward(plan, arrays, eps, phi, call=call)
