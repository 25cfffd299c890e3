"""Batch normalisation of an (N, C) mini-batch with an activation behind it: forward, backward, inference.

CuPy arrays run ``cuda/batch_norm_forward.cu`` and ``cuda/batch_norm_backward.cu``, one launch each; NumPy arrays run
the twins of ``_batch_norm_numpy.py``, with statistics in float64. An op checks its values here and everything else in
``_batch_norm_plan.py``, which also runs it.
"""

from __future__ import annotations

from typing import Any

from bnkernels import _check as check
from bnkernels._batch_norm_plan import (
    BACKWARD_NAMES,
    FORWARD_NAMES,
    INFERENCE_NAMES,
    plan_backward,
    plan_forward,
    plan_inference,
    run_backward,
    run_forward,
    run_inference,
)
from bnkernels.activations import activation_named


def batch_norm_forward(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Normalise every channel over the mini-batch, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C), float32 or float64
        The mini-batch: N >= 2 examples (or none), C channels (neurons). Any strides. Never written.
    gamma, beta : array, shape (C,), dtype of `x`, optional
        Scale and shift; without them 1 and 0.
    running_mean, running_var : array, shape (C,), dtype of `x`, optional
        Running statistics, updated in place. `running_var` takes the unbiased variance.
    momentum : float
        Weight of the new statistics in the running ones, between 0 and 1.
    eps : float
        Added to the variance, in the units of ``x**2``.
    activation : {'identity', 'relu', 'sigmoid', 'tanh'}
        What follows the normalisation.
    out : tuple of two arrays, optional
        Where to write `y` (which may be `x` itself) and `statistics`; C order.

    Returns
    -------
    y : array, shape (N, C), dtype of `x`
        The output.
    statistics : array, shape (3, C), dtype of `x`
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
    is allocated. Source: ``cuda/batch_norm_forward.cu``.

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
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    momentum = check.number("momentum", momentum, 0, 1)
    eps = check.number("eps", eps, 0)
    phi = activation_named(activation)
    arrays = (y, statistics, running_mean, running_var, x, gamma, beta)
    plan = plan_forward(*map(check.signature, arrays))
    if out is not None or running_mean is not None or running_var is not None:
        check.no_overlap(plan.runtime, FORWARD_NAMES, arrays, written=4, in_place=("x",))
    y, statistics, _ = run_forward(plan, arrays, momentum, eps, phi)
    return y, statistics


def batch_norm_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    statistics: Any,
    *,
    activation: str = "identity",
    out: tuple[Any, Any, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of `batch_norm_forward`.

    Parameters
    ----------
    dy : array, shape (N, C), dtype of `x`
        Gradient with respect to the output. Any strides. Never written.
    x : array, shape (N, C), float32 or float64
        The forward's input.
    gamma, beta : array, shape (C,), dtype of `x`, or None
        As in the forward.
    statistics : array, shape (3, C), dtype of `x`
        What the forward returned.
    activation : {'identity', 'relu', 'sigmoid', 'tanh'}
        As in the forward.
    out : tuple of three arrays, optional
        Where to write `dx` (which may be `dy` or `x` itself), `dgamma` and `dbeta`; C order.

    Returns
    -------
    dx : array, shape (N, C), dtype of `x`
        Gradient with respect to `x`; its sum over the batch is 0.
    dgamma, dbeta : array, shape (C,), dtype of `x`
        Gradients with respect to `gamma` and `beta`, also where those are None.

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
    outputs = check.pack_outputs(out, ("dx", "dgamma", "dbeta"))
    phi = activation_named(activation)
    arrays = (*outputs, dy, x, gamma, beta, statistics, None, None)
    plan = plan_backward(*map(check.signature, arrays))
    if out is not None:
        check.no_overlap(plan.runtime, BACKWARD_NAMES, arrays, written=3, in_place=("dy", "x"))
    return run_backward(plan, arrays, 0.0, phi)


def batch_norm_inference(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
    out: Any = None,
) -> Any:
    """Normalise with running statistics, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C), float32 or float64
        N >= 0 examples. Any strides. Never written.
    gamma, beta : array, shape (C,), dtype of `x`, or None
        Scale and shift; None means 1 and 0.
    running_mean, running_var : array, shape (C,), dtype of `x`
        The statistics to normalise with. Never written.
    eps : float
        Added to the variance, in the units of ``x**2``.
    activation : {'identity', 'relu', 'sigmoid', 'tanh'}
        What follows the normalisation.
    out : array, shape (N, C), optional
        Where to write the output; C order; may be `x` itself.

    Returns
    -------
    array, shape (N, C), dtype of `x`
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
    eps = check.number("eps", eps, 0)
    phi = activation_named(activation)
    arrays = (out, x, gamma, beta, running_mean, running_var)
    plan = plan_inference(*map(check.signature, arrays))
    if out is not None:
        check.no_overlap(plan.runtime, INFERENCE_NAMES, arrays, written=1, in_place=("x",))
    return run_inference(plan, arrays, eps, phi)


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
    out: tuple[Any, Any, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of `batch_norm_inference`, whose statistics do not depend on `x`.

    Parameters
    ----------
    dy : array, shape (N, C), dtype of `x`
        Gradient with respect to the output. Any strides. Never written.
    x : array, shape (N, C), float32 or float64
        The forward's input.
    gamma, beta : array, shape (C,), dtype of `x`, or None
        As in the forward.
    running_mean, running_var : array, shape (C,), dtype of `x`
        As in the forward. Never written.
    eps : float
        As in the forward.
    activation : {'identity', 'relu', 'sigmoid', 'tanh'}
        As in the forward.
    out : tuple of three arrays, optional
        Where to write `dx` (which may be `dy` or `x` itself), `dgamma` and `dbeta`; C order.

    Returns
    -------
    dx : array, shape (N, C), dtype of `x`
        Gradient with respect to `x`: ``dy * gamma * rstd``, through the activation.
    dgamma, dbeta : array, shape (C,), dtype of `x`
        Gradients with respect to `gamma` and `beta`, also where those are None.

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
    eps = check.number("eps", eps, 0)
    outputs = check.pack_outputs(out, ("dx", "dgamma", "dbeta"))
    phi = activation_named(activation)
    arrays = (*outputs, dy, x, gamma, beta, None, running_mean, running_var)
    plan = plan_backward(*map(check.signature, arrays))
    if out is not None:
        check.no_overlap(plan.runtime, BACKWARD_NAMES, arrays, written=3, in_place=("dy", "x"))
    return run_backward(plan, arrays, eps, phi)
