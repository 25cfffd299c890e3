"""Batch normalisation of an (N, C) mini-batch with an activation behind it: forward, backward, inference.

CuPy arrays run ``cuda/batch_norm_forward.cu`` and ``cuda/batch_norm_backward.cu``, one launch each
(``_batch_norm_launch.py`` chooses the grid); NumPy arrays run the twins in ``_batch_norm_numpy.py``, with statistics in
float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bnkernels import _check as check
from bnkernels import _runtime as rt
from bnkernels._batch_norm_launch import backward_launch, forward_launch, inference_backward_launch, inference_launch
from bnkernels._batch_norm_numpy import backward_numpy, forward_numpy, inference_numpy
from bnkernels.activations import activation_named

FORWARD = rt.arguments_type(
    "x gamma beta y statistics running_mean running_var",
    "rows channels row_stride channel_stride",
    "momentum eps",
    "activation",
)
INFERENCE = rt.arguments_type(
    "x gamma beta y running_mean running_var", "rows channels row_stride channel_stride", "eps", "activation"
)
BACKWARD = rt.arguments_type(
    "dy x gamma beta mean mean_low rstd dx dgamma dbeta",
    "rows channels dy_row_stride dy_channel_stride x_row_stride x_channel_stride",
    "eps",
    "activation",
)


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
    plan = _forward_plan(*map(check.signature, arrays))
    runtime = plan.runtime
    if runtime is not None:
        check.one_device(runtime, _FORWARD_NAMES, arrays)
    if out is None:
        y, statistics = rt.empty(runtime, plan.shape, x), rt.empty(runtime, (3, plan.shape[1]), x)
    else:
        check.no_overlap(runtime, _FORWARD_NAMES, arrays, written=4, in_place=("x",))

    if plan.empty:
        statistics[...] = 0
    elif runtime is None:
        forward_numpy(x, gamma, beta, running_mean, running_var, momentum, eps, phi, y, statistics)
    else:
        pointers = rt.addresses(runtime, x, gamma, beta, y, statistics, running_mean, running_var)
        arguments = rt.pack(FORWARD[x.dtype], *pointers, *plan.sizes, momentum, eps, phi.code)
        runtime.launch("batch_norm_forward", plan.kernel, plan.launch, arguments, x)
    return y, statistics


def batch_norm_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    statistics: Any,
    *,
    activation: str = "identity",
    y: Any = None,
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
    y : array, shape (N, C), dtype of `x`, optional
        The forward's output, where it is at hand: NumPy then need not compute the activation again. The CUDA kernels
        never read it, since to compute it costs them less than to read it.
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
    outputs = _gradients(out)
    arrays = (*outputs, dy, x, gamma, beta, statistics, None, None, y)
    plan = _backward_plan(*map(check.signature, arrays))
    return _backward(plan, arrays, tuple(statistics), 0.0, activation)


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
    plan = _inference_plan(*map(check.signature, arrays))
    runtime = plan.runtime
    if runtime is not None:
        check.one_device(runtime, _INFERENCE_NAMES, arrays)
    if out is None:
        out = rt.empty(runtime, plan.shape, x)
    else:
        check.no_overlap(runtime, _INFERENCE_NAMES, arrays, written=1, in_place=("x",))

    if plan.empty:
        return out
    if runtime is None:
        inference_numpy(x, gamma, beta, running_mean, running_var, eps, phi, out)
    else:
        pointers = rt.addresses(runtime, x, gamma, beta, out, running_mean, running_var)
        arguments = rt.pack(INFERENCE[x.dtype], *pointers, *plan.sizes, eps, phi.code)
        runtime.launch("batch_norm_forward", plan.kernel, plan.launch, arguments, x)
    return out


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
    outputs = _gradients(out)
    arrays = (*outputs, dy, x, gamma, beta, None, running_mean, running_var, None)
    plan = _backward_plan(*map(check.signature, arrays))
    return _backward(plan, arrays, (running_mean, None, running_var), eps, activation)


def _gradients(out: Any) -> tuple:
    return check.pack_outputs(out, ("dx", "dgamma", "dbeta"))


def _backward(plan: Plan, arrays: tuple, statistics: tuple, eps: float, activation: str) -> tuple[Any, Any, Any]:
    """Run either backward; `statistics` is (mean, mean_low, rstd) or (running mean, None, running variance)."""
    phi = activation_named(activation)
    dx, dgamma, dbeta, dy, x, gamma, beta, _, _, _, y = arrays
    runtime = plan.runtime
    if runtime is not None:
        check.one_device(runtime, _BACKWARD_NAMES, arrays)
    if dx is None:
        channels = plan.shape[1:]
        dx = rt.empty(runtime, plan.shape, x)
        dgamma, dbeta = rt.empty(runtime, channels, x), rt.empty(runtime, channels, x)
    else:
        check.no_overlap(runtime, _BACKWARD_NAMES, arrays, written=3, in_place=("dy", "x"))

    if plan.empty:
        dgamma[...] = 0
        dbeta[...] = 0
    elif runtime is None:
        backward_numpy(dy, x, gamma, beta, *statistics, eps, phi, y, dx, dgamma, dbeta)
    else:
        pointers = rt.addresses(runtime, dy, x, gamma, beta, *statistics, dx, dgamma, dbeta)
        arguments = rt.pack(BACKWARD[x.dtype], *pointers, *plan.sizes, eps, phi.code)
        runtime.launch("batch_norm_backward", plan.kernel, plan.launch, arguments, x)
    return dx, dgamma, dbeta


class Plan(NamedTuple):
    """What a call's signatures decide: who runs it, and for a device which kernel, how, and with which sizes."""

    runtime: rt.Runtime | None
    shape: tuple[int, int]
    kernel: str | None = None
    launch: rt.Launch | None = None
    sizes: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in self.shape


# The arrays of each op, those that it writes first.
_FORWARD_NAMES = ("y", "statistics", "running_mean", "running_var", "x", "gamma", "beta")
_INFERENCE_NAMES = ("out", "x", "gamma", "beta", "running_mean", "running_var")
_BACKWARD_NAMES = (
    "dx",
    "dgamma",
    "dbeta",
    "dy",
    "x",
    "gamma",
    "beta",
    "statistics",
    "running_mean",
    "running_var",
    "y",
)


@lru_cache(maxsize=1024)
def _forward_plan(*signatures: check.Signature | None) -> Plan:
    optional = ("gamma", "beta", "running_mean", "running_var", "y", "statistics")
    args = check.arguments(dict(zip(_FORWARD_NAMES, signatures, strict=True)), optional)
    x = args["x"]
    rows, channels = check.matrix(x)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        check.contiguous(args[name], (channels,), x.dtype)
    check.contiguous(args["y"], (rows, channels), x.dtype)
    check.contiguous(args["statistics"], (3, channels), x.dtype)
    if rows == 1:
        raise ValueError(
            f"x has the shape {x.shape}: one value per channel has no variance; train on at least two examples, or "
            "use batch_norm_inference"
        )
    runtime = rt.runtime_of(x.kind)
    if runtime is None or 0 in x.shape:
        return Plan(runtime, x.shape)
    variant, launch = forward_launch(rows, channels, x.dtype)
    kernel = f"bnk_batch_norm_forward_{variant}_{rt.SUFFIX[x.dtype]}"
    return Plan(runtime, x.shape, kernel, launch, (rows, channels, *x.element_strides))


@lru_cache(maxsize=1024)
def _inference_plan(*signatures: check.Signature | None) -> Plan:
    args = check.arguments(dict(zip(_INFERENCE_NAMES, signatures, strict=True)), ("gamma", "beta", "out"))
    x = args["x"]
    rows, channels = check.matrix(x)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        check.contiguous(args[name], (channels,), x.dtype)
    check.contiguous(args["out"], (rows, channels), x.dtype)
    runtime = rt.runtime_of(x.kind)
    if runtime is None or 0 in x.shape:
        return Plan(runtime, x.shape)
    kernel = f"bnk_batch_norm_inference_{rt.SUFFIX[x.dtype]}"
    return Plan(runtime, x.shape, kernel, inference_launch(rows, channels), (rows, channels, *x.element_strides))


@lru_cache(maxsize=1024)
def _backward_plan(*signatures: check.Signature | None) -> Plan:
    """Either `statistics` or both running ones must be given."""
    given = dict(zip(_BACKWARD_NAMES, signatures, strict=True))
    frozen = given["running_mean"] is not None or given["running_var"] is not None
    optional = ("statistics",) if frozen else ("running_mean", "running_var")
    args = check.arguments(given, ("gamma", "beta", "y", "dx", "dgamma", "dbeta", *optional))
    x, dy = args["x"], args["dy"]
    rows, channels = check.matrix(x)
    check.like(dy, (rows, channels), x.dtype)
    check.like(args["y"], (rows, channels), x.dtype)
    check.contiguous(args["statistics"], (3, channels), x.dtype)
    for name in ("gamma", "beta", "running_mean", "running_var", "dgamma", "dbeta"):
        check.contiguous(args[name], (channels,), x.dtype)
    check.contiguous(args["dx"], (rows, channels), x.dtype)
    runtime = rt.runtime_of(x.kind)
    if runtime is None or 0 in x.shape:
        return Plan(runtime, x.shape)
    variant, launch = (inference_backward_launch if frozen else backward_launch)(rows, channels, x.dtype)
    kernel = f"bnk_batch_norm_{variant}_{rt.SUFFIX[x.dtype]}"
    return Plan(runtime, x.shape, kernel, launch, (rows, channels, *dy.element_strides, *x.element_strides))
