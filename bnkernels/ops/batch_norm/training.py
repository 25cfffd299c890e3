"""Batch normalisation with a residual sum and an activation behind it, in training: forward and backward.

CuPy arrays run ``cuda/batch_norm_forward.cu`` and ``cuda/batch_norm_backward.cu``, or where the tensor is large their
``_cooperative`` variants, one launch each; NumPy arrays run the twins of ``cpu.py``, which sum in float64. An
op checks its values here and everything else in ``call.py``, which also runs it; ``runtime/replay.py``
says what makes a repeated call cheap. With a mask, with groups, renormalised, or with parameters of 16 bits a call goes
to ``masked_grouped.py`` and the ``_masked_grouped`` kernels.

Below, T is the data type of `x`: float16, bfloat16 (of ml_dtypes), float32 or float64. A is that of the accumulator, in
which all is computed and statistics are kept: float32 for 16-bit T, else T. P is that of the parameters and their
gradients: A, or where all of them are given so T. C is the number of channels, ``x.shape[axis]``, and N that of the
values of each. Inputs of the shape of `x` may have any strides.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm import call as plans
from bnkernels.ops.batch_norm.masked_grouped import GRADIENTS, Options, Stage, is_narrow, run
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap
from bnkernels.runtime.replay import NEW


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
    mask: Any = None,
    grouped: bool = False,
    renorm: tuple[float, float] | None = None,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Normalise every channel over the mini-batch, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C), (N, C, L), (N, C, H, W), ..., type T
        The mini-batch: two values of each channel at least, or none. Never written.
    gamma, beta : array, shape (C,), type P, optional
        Scale and shift; without them 1 and 0.
    running_mean, running_var : array, shape (C,), type A, optional
        Running statistics, updated in place.
    momentum : float
        Weight of the new statistics in the running ones, between 0 and 1.
    unbiased : bool
        Whether `running_var` takes the variance over N - 1, as in PyTorch, or over N, as in Flax and Keras.
    eps : float
        Added to the variance, in the units of ``x**2``: at least the smallest normal number of type A, for a constant
        channel has the variance 0.
    axis : int
        The axis of the channels: 1, or -1 where they come last.
    residual : array, shape and type of `x`, optional
        Added before the activation. Never written.
    activation : str
        What follows: identity, relu, leaky_relu, sigmoid, tanh, gelu (exact), gelu_tanh, silu or elu.
    alpha : float, optional
        Of leaky_relu the slope below zero (default 0.01), of elu the factor (default 1).
    mask : array of bool, the shape of `x` without its channels, or of the first axes of that, optional
        True where a value counts, such as within the length of a padded sequence. Statistics are over these alone, and
        `y` is 0 elsewhere, whatever `x` holds there.
    grouped : bool
        Whether the first axis of `x` numbers independent mini-batches, such as the time steps of a recurrent network:
        each has statistics of its own, while all share gamma and beta. `axis` is then that of one of them, and `mask`,
        `running_mean`, `running_var` and `statistics` have that first axis too.
    renorm : tuple of two floats, optional
        ``(r_max, d_max)`` of batch renormalisation: as if with running statistics, up to a factor r_max of the scale
        and d_max running standard deviations of the mean; (1, 0) is batch norm. Takes both running statistics.
    out : tuple of two arrays, optional
        Where to write `y` (which may be `x` or `residual` itself) and `statistics`; C order.

    Returns
    -------
    y : array, shape and type of `x`, C order
        The output.
    statistics : array, shape (3, C), or renormalised (5, C), type A
        Its rows are `mean`, `mean_low` and `rstd`, for the backward. ``mean + mean_low`` is the mean to about twice
        the precision of `mean` alone; ``rstd = 1 / sqrt(var + eps)`` with the biased variance. Then `r` and `d`.

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
    call = NEW
    if mask is None and grouped is False and renorm is None:
        given = running_mean, running_var, x, residual, gamma, beta
        call = plans.FORWARD_CALLS.replay(out, given, momentum, eps, axis, activation, alpha, unbiased)
        if call.replayed:
            return out
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    momentum, unbiased = check.number("momentum", momentum, 0, 1), check.boolean("unbiased", unbiased)
    eps = check.epsilon(eps, x)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    if mask is not None or grouped is not False or renorm is not None or is_narrow(x, gamma, beta):
        options = Options(phi, eps, momentum, unbiased, check.renorm_limits(renorm))
        named = {"y": y, "statistics": statistics, "running_mean": running_mean, "running_var": running_var}
        named |= {"x": x, "residual": residual, "mask": mask, "gamma": gamma, "beta": beta}
        return run(Stage.WHOLE, named, ("y", "statistics"), options, axis, check.boolean("grouped", grouped))
    arrays = (y, statistics, running_mean, running_var, x, residual, gamma, beta)
    plan = plans.plan_forward(axis, *check.signatures(arrays))
    if out is not None or running_mean is not None or running_var is not None:
        overlap.check_outputs(plan.runtime, plans.FORWARD_NAMES, arrays, written=4, in_place=("x", "residual"))
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
    mask: Any = None,
    grouped: bool = False,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of `batch_norm_forward`.

    Parameters
    ----------
    dy : array, shape and type of `x`
        Gradient with respect to the output. Never written.
    x : array, type T
        The forward's input.
    gamma, beta : array, shape (C,), type P, or None
        As in the forward.
    statistics : array, shape (3, C) or (5, C), type A
        What the forward returned, renormalised or not.
    axis, residual, activation, alpha, mask, grouped : int, array, str, float, array, bool
        As in the forward.
    out : tuple of arrays, optional
        Where to write what is returned; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and type of `x`
        Gradient with respect to `x`; its sum over each channel is 0. It is 0 where the mask is False.
    dgamma, dbeta : array, shape (C,), type P
        Gradients with respect to `gamma` and `beta`, also where those are None; of groups the sum.
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
    given, call = (dy, x, residual, gamma, beta, statistics), NEW
    if mask is None and grouped is False:
        call = plans.BACKWARD_CALLS.replay(out, given, None, None, axis, activation, alpha)
        if call.replayed:
            return out
    outputs = check.pack_gradients(out, residual)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    renormalised = getattr(statistics, "shape", ())[-2:-1] == (5,)
    if mask is not None or grouped is not False or renormalised or is_narrow(x, gamma, beta):
        named = dict(zip(GRADIENTS, outputs, strict=True)) | {"dy": dy, "x": x, "residual": residual, "mask": mask}
        named |= {"gamma": gamma, "beta": beta, "statistics": statistics}
        returned = GRADIENTS if residual is not None else GRADIENTS[:3]
        return run(Stage.WHOLE, named, returned, Options(phi), axis, check.boolean("grouped", grouped))
    arrays = (*outputs, *given, None, None)
    plan = plans.plan_backward(axis, *check.signatures(arrays))
    if out is not None:
        overlap.check_outputs(plan.runtime, plans.BACKWARD_NAMES, arrays, written=4, in_place=("dy", "x", "residual"))
    return plans.run_backward(plan, arrays, 0.0, phi, call=call)
