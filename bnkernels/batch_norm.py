"""Batch normalisation of an (N, C) mini-batch with an activation behind it: forward, backward, inference.

CuPy arrays run ``cuda/batch_norm_forward.cu`` and ``cuda/batch_norm_backward.cu``, one launch each
(``_batch_norm_launch.py`` chooses the grid); NumPy arrays run the twins in ``_batch_norm_numpy.py``, with statistics in
float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels import _check as check
from bnkernels import _runtime as rt
from bnkernels._batch_norm_launch import backward_launch, forward_launch, inference_backward_launch, inference_launch
from bnkernels._batch_norm_numpy import backward_numpy, forward_numpy, inference_backward_numpy, inference_numpy
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
    y, statistics = (None, None) if out is None else _unpack("out", out, 2)
    given = {"x": x, "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    runtime = check.same_device(given | {"y": y, "statistics": statistics})
    rows, channels = check.matrix("x", x)
    check.vectors({name: given[name] for name in ("gamma", "beta", "running_mean", "running_var")}, channels, x.dtype)
    if rows == 1:
        raise ValueError(
            f"x has the shape {x.shape}: one value per channel has no variance; train on at least two examples, or "
            "use batch_norm_inference"
        )
    momentum = check.number("momentum", momentum, 0, 1)
    eps = check.number("eps", eps, 0)
    phi = activation_named(activation)
    if out is None:
        y, statistics = _empty(runtime, (rows, channels), x), _empty(runtime, (3, channels), x)
    else:
        check.contiguous("y", y, (rows, channels), x.dtype)
        check.contiguous("statistics", statistics, (3, channels), x.dtype)
    if running_mean is not None and running_mean is running_var:
        raise ValueError("running_mean and running_var are the same array; pass two")
    if out is not None:
        written = {"y": y, "statistics": statistics, "running_mean": running_mean, "running_var": running_var}
        check.overlaps(runtime, written, {"x": x, "gamma": gamma, "beta": beta}, in_place=("x",))

    if rows == 0 or channels == 0:
        statistics[...] = 0
    elif runtime is None:
        forward_numpy(x, gamma, beta, running_mean, running_var, momentum, eps, phi, y, statistics)
    else:
        variant, launch = forward_launch(rows, channels, x.dtype)
        arguments = rt.pack(
            FORWARD[x.dtype],
            *_addresses(runtime, x, gamma, beta, y, statistics, running_mean, running_var),
            *(rows, channels, *_element_strides(x), momentum, eps, phi.code),
        )
        name = f"bnk_batch_norm_forward_{variant}_{rt.SUFFIX[x.dtype]}"
        runtime.launch("batch_norm_forward", name, launch, arguments, x)
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
    check.same_device({"x": x, "statistics": statistics})
    check.matrix("x", x)
    check.contiguous("statistics", statistics, (3, x.shape[1]), x.dtype)
    mean, mean_low, rstd = statistics
    return _backward(dy, x, gamma, beta, (mean, mean_low, rstd), None, activation, out)


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
    given = {"x": x, "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    runtime = check.same_device(given | {"out": out})
    rows, channels = check.matrix("x", x)
    _require(running_mean=running_mean, running_var=running_var)
    check.vectors({name: given[name] for name in ("gamma", "beta", "running_mean", "running_var")}, channels, x.dtype)
    eps = check.number("eps", eps, 0)
    phi = activation_named(activation)
    if out is None:
        out = _empty(runtime, (rows, channels), x)
    else:
        check.contiguous("out", out, (rows, channels), x.dtype)
        check.overlaps(runtime, {"out": out}, given, in_place=("x",))

    if rows == 0 or channels == 0:
        return out
    if runtime is None:
        inference_numpy(x, gamma, beta, running_mean, running_var, eps, phi, out)
    else:
        arguments = rt.pack(
            INFERENCE[x.dtype],
            *_addresses(runtime, x, gamma, beta, out, running_mean, running_var),
            *(rows, channels, *_element_strides(x), eps, phi.code),
        )
        name = f"bnk_batch_norm_inference_{rt.SUFFIX[x.dtype]}"
        runtime.launch("batch_norm_forward", name, inference_launch(rows, channels), arguments, x)
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
    _require(running_mean=running_mean, running_var=running_var)
    eps = check.number("eps", eps, 0)
    return _backward(dy, x, gamma, beta, (running_mean, None, running_var), eps, activation, out)


def _backward(
    dy: Any, x: Any, gamma: Any, beta: Any, statistics: tuple, eps: float | None, activation: str, out: tuple | None
) -> tuple[Any, Any, Any]:
    """Both backwards: `statistics` is (mean, mean_low, rstd), or (running mean, None, running variance) with `eps`."""
    mean, mean_low, rstd = statistics
    dx, dgamma, dbeta = (None, None, None) if out is None else _unpack("out", out, 3)
    frozen = mean_low is None
    names = ("running_mean", "mean_low", "running_var") if frozen else ("mean", "mean_low", "rstd")
    vectors = {"gamma": gamma, "beta": beta} | dict(zip(names, statistics, strict=True))
    given = {"x": x, "dy": dy} | vectors
    _require(dy=dy)
    runtime = check.same_device(given | {"dx": dx, "dgamma": dgamma, "dbeta": dbeta})
    rows, channels = check.matrix("x", x)
    check.like("dy", dy, (rows, channels), x.dtype)
    check.vectors(vectors, channels, x.dtype)
    phi = activation_named(activation)
    if out is None:
        dx = _empty(runtime, (rows, channels), x)
        dgamma, dbeta = _empty(runtime, (channels,), x), _empty(runtime, (channels,), x)
    else:
        check.contiguous("dx", dx, (rows, channels), x.dtype)
        check.vectors({"dgamma": dgamma, "dbeta": dbeta}, channels, x.dtype)
        check.overlaps(runtime, {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}, given, in_place=("dy", "x"))

    if rows == 0 or channels == 0:
        dgamma[...] = 0
        dbeta[...] = 0
    elif runtime is not None:
        plan = inference_backward_launch if frozen else backward_launch
        variant, launch = plan(rows, channels, x.dtype)
        arguments = rt.pack(
            BACKWARD[x.dtype],
            *_addresses(runtime, dy, x, gamma, beta, mean, mean_low, rstd, dx, dgamma, dbeta),
            *(rows, channels, *_element_strides(dy), *_element_strides(x), eps or 0.0, phi.code),
        )
        runtime.launch("batch_norm_backward", f"bnk_batch_norm_{variant}_{rt.SUFFIX[x.dtype]}", launch, arguments, x)
    elif frozen:
        inference_backward_numpy(dy, x, gamma, beta, mean, rstd, eps, phi, dx, dgamma, dbeta)
    else:
        backward_numpy(dy, x, gamma, beta, mean, mean_low, rstd, phi, dx, dgamma, dbeta)
    return dx, dgamma, dbeta


def _unpack(name: str, arrays: Any, count: int) -> tuple:
    if not isinstance(arrays, tuple) or len(arrays) != count or any(array is None for array in arrays):
        raise TypeError(f"{name} must be a tuple of {count} arrays, got {type(arrays).__name__}; see the docstring")
    return arrays


def _require(**arrays: Any) -> None:
    for name, array in arrays.items():
        if array is None:
            raise TypeError(f"{name} must be an array, got None")


def _empty(runtime: rt.Runtime | None, shape: tuple[int, ...], like: Any) -> Any:
    return np.empty(shape, like.dtype) if runtime is None else runtime.empty(shape, like.dtype, like)


def _addresses(runtime: rt.Runtime, *arrays: Any) -> tuple[int, ...]:
    return tuple(0 if array is None else runtime.pointer(array) for array in arrays)


def _element_strides(array: Any) -> tuple[int, int]:
    return array.strides[0] // array.itemsize, array.strides[1] // array.itemsize
