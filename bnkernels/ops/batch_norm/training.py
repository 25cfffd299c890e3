"""Batch normalisation with a residual sum and an activation behind it, in training: forward and backward.

CuPy arrays run one kernel, ``cuda/batch_norm_forward.cu`` or its backward, or where ``launch.py`` says so another of
their family; NumPy arrays are computed by ``cpu.py`` and ``reference.py``. C is the number of channels,
``x.shape[axis]``, and N that of the values of each. Inputs of the shape of `x` may have any strides.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm.call import run
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Options
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array


def batch_norm_forward(
    x: Array,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    running_mean: AnyArray | None = None,
    running_var: AnyArray | None = None,
    *,
    momentum: float | None = 0.1,
    batches_before: int = 0,
    unbiased: bool = True,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    grouped: bool = False,
    renorm: tuple[float, float] | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Normalise every channel over the mini-batch, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C), (N, C, L), (N, C, H, W), ..., float16, bfloat16, float32 or float64
        Mini-batch: two values of each channel at least, or none. Never written.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`, optional
        Scale and shift; without them 1 and 0.
    running_mean, running_var : array, shape (C,), float32, or float64 for float64 `x`, optional
        Running statistics, updated in place.
    momentum : float or None
        Weight of the new statistics in the running ones, between 0 and 1; None is 1 / (batches_before + 1), with which
        the running statistics are the means over all mini-batches.
    batches_before : int
        Number of the mini-batches that the running statistics are of already; only for ``momentum=None``.
    unbiased : bool
        Whether `running_var` takes the variance over N - 1, as in PyTorch, or over N, as in Flax and Keras.
    eps : float
        Number added to the variance, in the units of ``x**2``: at least the smallest normal number of the statistics'
        dtype, for a constant channel has the variance 0.
    axis : int
        Axis of the channels: 1, or -1 where they come last.
    residual : array, shape and dtype of `x`, optional
        Array added before the activation. Never written.
    activation : str
        Activation behind: identity, relu, leaky_relu, sigmoid, tanh, gelu (exact), gelu_tanh, silu or elu.
    alpha : float, optional
        Slope of leaky_relu below zero (default 0.01), or factor of elu (default 1).
    mask : array of bool, the shape of `x` without its channels, or of the first axes of that, optional
        Mask, True where a value counts, such as within the length of a padded sequence. Statistics are over these
        alone, and `y` is 0 elsewhere, whatever `x` holds there.
    grouped : bool
        Whether the first axis of `x` numbers independent mini-batches, such as the time steps of a recurrent network:
        each has statistics of its own, while all share gamma and beta. `axis` is then that of one of them, and `mask`,
        `running_mean`, `running_var` and `statistics` have that first axis too.
    renorm : tuple of two floats, optional
        ``(r_max, d_max)`` of batch renormalisation: as if with running statistics, up to a factor r_max of the scale
        and d_max running standard deviations of the mean; (1, 0) is batch norm. Takes both running statistics.
    out : tuple of two arrays, optional
        Arrays to write `y` (which may be `x` or `residual` itself) and `statistics` to; C order.

    Returns
    -------
    y : array, shape and dtype of `x`, C order
        The output.
    statistics : array, shape (3, C), or renormalised (5, C), float32, or float64 for float64 `x`
        Its rows are `mean`, `mean_low` and `rstd`, for the backward. ``mean + mean_low`` is the mean to about twice
        the precision of `mean` alone; ``rstd = 1 / sqrt(var + eps)`` with the biased variance. Then `r` and `d`.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, N is 1, or arrays overlap.

    See Also
    --------
    batch_norm_backward : The gradients.
    batch_norm_inference : The same with running statistics.

    Notes
    -----
    With N = 0, or where the mask leaves nothing, the running statistics stay as they are and `statistics` is 0; of a
    single value left `y` is ``phi(beta)``, and an unbiased `running_var` stays. Nothing synchronises; with `out`
    nothing is allocated, unless an input's strides cannot be walked through as (outer, C, inner): then the input is
    copied first. Source: ``cuda/batch_norm_forward.cu``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 1.
    .. [2] S. Ioffe, "Batch Renormalization", 2017, arXiv:1702.03275, algorithm 1.
    .. [3] T. Cooijmans et al., "Recurrent Batch Normalization", 2016, arXiv:1603.09025: statistics per time step.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, -2.0], [3.0, 2.0]])
    >>> y, (mean, mean_low, rstd) = batch_norm_forward(x)
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean
    array([2., 0.])
    """
    if momentum is None:
        momentum = check.cumulative(batches_before)
    running, given = (running_mean, running_var), (x, residual, mask, gamma, beta)
    call = FORWARD.calls.replay(out, given + running, momentum, unbiased, eps, axis, activation, alpha, grouped, renorm)
    if call.replayed:
        return out
    options = Options(
        phi=activation_named(activation, alpha),
        eps=check.epsilon(eps, x),
        momentum=check.number("momentum", momentum, 0, 1),
        unbiased=check.boolean("unbiased", unbiased),
        renorm=check.renorm_limits(renorm),
    )
    arrays = (*check.pack_outputs(out, FORWARD.outputs), *running, *given)
    return run(FORWARD, arrays, axis, options, call, grouped)


def batch_norm_backward(
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    *,
    axis: int = 1,
    residual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    grouped: bool = False,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of `batch_norm_forward`.

    Parameters
    ----------
    dy : array, shape and dtype of `x`
        Gradient with respect to the output. Never written.
    x : array, float16, bfloat16, float32 or float64
        Input of the forward.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`; or None
        As in the forward.
    statistics : array, shape (3, C) or (5, C), float32, or float64 for float64 `x`
        Statistics that the forward returned, renormalised or not.
    axis, residual, activation, alpha, mask, grouped : int, array, str, float, array, bool
        As in the forward.
    out : tuple of arrays, optional
        Arrays to write what is returned to; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and dtype of `x`
        Gradient with respect to `x`; its sum over each channel is 0. It is 0 where the mask is False.
    dgamma, dbeta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`
        Gradients with respect to `gamma` and `beta`, also where those are None; of groups the sum.
    dresidual : array, shape and dtype of `x`
        Gradient with respect to `residual`; only where that is given.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    See Also
    --------
    batch_norm_forward : The forward.
    batch_norm_inference_backward : The gradients for running statistics.

    Notes
    -----
    The activation is computed again from `x`, so nothing but `statistics` is kept between the passes. An empty batch
    gives zero parameter gradients. `r` and `d` of renormalisation count as constants, as in its paper. Source:
    ``cuda/batch_norm_backward.cu``.

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
    given = dy, x, residual, mask, gamma, beta, statistics
    call = BACKWARD.calls.replay(out, given, axis, activation, alpha, grouped)
    if call.replayed:
        return out
    options = Options(activation_named(activation, alpha))
    arrays = (*check.pack_gradients(out, residual), *given)
    return run(BACKWARD, arrays, axis, options, call, grouped)
