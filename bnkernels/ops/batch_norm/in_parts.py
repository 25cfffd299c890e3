"""Batch norm in pieces, for a mini-batch that lies on several devices or comes in several parts.

Each part is summed where it is (`batch_norm_moments`), the small sums are exchanged, merged (`batch_norm_statistics`),
and applied where the data are (`batch_norm_normalise`); the backward goes the same way (`batch_norm_gradient_sums`,
`batch_norm_input_gradient`). How to exchange is the caller's choice: NCCL, MPI, or a loop. C is the number of channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm import reference
from bnkernels.ops.batch_norm.call import run
from bnkernels.ops.batch_norm.problem import GRADIENT_SUMS, INPUT_GRADIENT, MOMENTS, NORMALISE, Options
from bnkernels.runtime import checks as check
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import SUFFIX, addresses, arguments_type, empty, pack, suffix
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import ReplayCache

POINTERS = "moments merged statistics running_mean running_var"
ARGUMENTS = {"statistics": arguments_type(POINTERS, "parts channels", "momentum correction eps", "")}
THREADS = 128
IDENTITY, CPU = activation_named("identity"), "bnkernels.ops.batch_norm.cpu.merging"


def _statistics(args: dict[str, check.Argument | None]) -> tuple[int, rt.Launch]:
    """Check all arrays of the merge; return the number of channels, and the launch."""
    moments = args["moments"]
    if moments.dtype not in SUFFIX:
        raise TypeError(f"moments must be float32 or float64, as batch_norm_moments returns them, got {moments.dtype}")
    if len(moments.shape) != 3 or moments.shape[1] != 4:
        raise ValueError(f"moments must have the shape (K, 4, C), of K parts, got {moments.shape}; stack the parts")
    parts, _, channels = moments.shape
    if parts > np.iinfo(np.int32).max:
        raise ValueError(f"moments must be of fewer than 2**31 parts, got {parts}; merge them in several steps")
    shapes = {"moments": moments.shape, "statistics": (3, channels), "merged": (4, channels)}
    for name, argument in args.items():
        check.contiguous(argument, shapes.get(name, (channels,)), moments.dtype)
    return channels, rt.Launch((max(1, rt.ceil_div(channels, THREADS)), 1, 1), (min(max(channels, 1), THREADS), 1, 1))


CALLS, WRITTEN = ReplayCache(), "statistics merged running_mean running_var"
OPERANDS = Operands(WRITTEN, "moments", _statistics, optional=WRITTEN)


def batch_norm_moments(x: AnyArray, *, axis: int = 1, mask: AnyArray | None = None, out: AnyArray | None = None) -> Any:
    """Return count, mean and sum of squares of every channel.

    Parameters
    ----------
    x : array, float16, bfloat16, float32 or float64
        Part of a mini-batch, of any number of examples. Never written.
    axis : int
        Axis of the channels.
    mask : array of bool, optional
        As in `batch_norm_forward`.
    out : array, shape (4, C), float32, or float64 for float64 `x`, optional
        Array to write the result to; C order.

    Returns
    -------
    array, shape (4, C), float32, or float64 for float64 `x`
        Its rows are the count of values, their mean in two parts, and the sum of their squared distances from it, in
        the units of ``x**2``.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    See Also
    --------
    batch_norm_statistics : Merges several of these.

    Examples
    --------
    >>> import numpy as np
    >>> batch_norm_moments(np.array([[1.0], [3.0]]))[:, 0]
    array([2., 2., 0., 2.])
    """
    call, arrays = MOMENTS.calls.replay(None if out is None else (out,), (x, mask), axis), (out, x, mask)
    if call.replayed:
        return out
    return run(MOMENTS, arrays, axis, Options(IDENTITY), call)[0]


def batch_norm_statistics(
    moments: Array,
    running_mean: AnyArray | None = None,
    running_var: AnyArray | None = None,
    *,
    momentum: float | None = 0.1,
    batches_before: int = 0,
    unbiased: bool = True,
    eps: float = 1e-5,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Merge the moments of several parts into the statistics of the whole mini-batch.

    Parameters
    ----------
    moments : array, shape (K, 4, C), float32 or float64
        Moments of K parts, as `batch_norm_moments` returned them; a part may be empty. Never written.
    running_mean, running_var : array, shape (C,), optional
        Running statistics, updated in place.
    momentum, batches_before, unbiased, eps : float or None, int, bool, float
        As in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Arrays to write what is returned to; C order.

    Returns
    -------
    statistics : array, shape (3, C)
        Its rows are `mean`, `mean_low` and `rstd`, for the other ops.
    merged : array, shape (4, C)
        The moments of all parts together, for a merge in several steps.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Notes
    -----
    The parts are merged in their order: devices that merge the same array get the same bits.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample variance", 1983.

    Examples
    --------
    >>> import numpy as np
    >>> parts = [batch_norm_moments(np.array(part)) for part in ([[1.0], [3.0]], [[8.0]])]
    >>> statistics, merged = batch_norm_statistics(np.stack(parts))
    >>> merged[:, 0]
    array([ 3.,  4.,  0., 26.])
    """
    if momentum is None:
        momentum = check.cumulative(batches_before)
    running = running_mean, running_var
    call = CALLS.replay(out, (moments, *running), momentum, unbiased, eps)
    if call.replayed:
        return out
    options = check.number("momentum", momentum, 0, 1), check.boolean("unbiased", unbiased), check.epsilon(eps, moments)
    statistics, merged = check.pack_outputs(out, OPERANDS.names[:2])
    runtime, (channels, launch) = OPERANDS.check(statistics, merged, *running, moments)
    if statistics is None:
        statistics, merged = (empty(runtime, (rows, channels), moments) for rows in (3, 4))
    if channels == 0:
        return statistics, merged
    if runtime is None:
        merge = (kernels(CPU) or reference).merge
        call.compute(lambda arrays: merge(*arrays, *options), (statistics, merged, moments, *running))
        return statistics, merged
    pointers = addresses(runtime, moments, merged, statistics, running_mean, running_var)
    numbers = moments.shape[0], channels, options[0], float(options[1]), options[2]
    arguments = pack(ARGUMENTS["statistics"][moments.dtype], *pointers, *numbers)
    kernel = f"bnk_batch_norm_statistics_{suffix(moments.dtype)}"
    call.launch(runtime, "batch_norm_statistics", kernel, launch, arguments, moments)
    return statistics, merged


def batch_norm_normalise(
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
    out: Array | None = None,
) -> Array:
    """Normalise with given statistics, scale, shift and activate.

    Parameters
    ----------
    x : array, float16, bfloat16, float32 or float64
        Part of a mini-batch, of any number of examples. Never written.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`; or None
        Scale and shift; None means 1 and 0.
    statistics : array, shape (3, C) or (5, C), float32, or float64 for float64 `x`
        Statistics from `batch_norm_statistics` or `batch_norm_forward`.
    axis, residual, activation, alpha, mask : int, array, str, float, array
        As in `batch_norm_forward`.
    out : array, shape and dtype of `x`, optional
        Array to write the output to; C order; may be `x` or `residual` itself.

    Returns
    -------
    array, shape and dtype of `x`, C order
        The output.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [3.0], [8.0]])
    >>> statistics, _ = batch_norm_statistics(batch_norm_moments(x)[None])
    >>> bool(abs(batch_norm_normalise(x, None, None, statistics).sum()) < 1e-15)
    True
    """
    given = x, residual, mask, gamma, beta, statistics
    call = NORMALISE.calls.replay(None if out is None else (out,), given, axis, activation, alpha)
    if call.replayed:
        return out
    options, arrays = Options(activation_named(activation, alpha)), (out, *given)
    return run(NORMALISE, arrays, axis, options, call)[0]


def batch_norm_gradient_sums(
    dy: AnyArray,
    x: AnyArray,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    *,
    axis: int = 1,
    residual: AnyArray | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    out: AnyArray | None = None,
) -> Any:
    """Return the sums that the gradient of every input depends on, over this part of the mini-batch.

    Parameters
    ----------
    dy : array, shape and dtype of `x`
        Gradient with respect to the output of this part. Never written.
    x, gamma, beta, statistics : array, array or None, array or None, array
        As in `batch_norm_normalise`; the statistics are those of the whole mini-batch.
    axis, residual, activation, alpha, mask : int, array, str, float, array
        As in `batch_norm_forward`.
    out : array, shape (3, C), float32, or float64 for float64 `x`, optional
        Array to write the result to; C order.

    Returns
    -------
    array, shape (3, C), float32, or float64 for float64 `x`
        Its rows are the sum of ``g``, the gradient before the activation, which is this part of `dbeta`; the sum of
        ``g xhat``, without renormalisation this part of `dgamma`; and the count. All three add up over parts.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    See Also
    --------
    batch_norm_input_gradient : Takes the total of these.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    >>> statistics, _ = batch_norm_statistics(batch_norm_moments(x)[None])
    >>> batch_norm_gradient_sums(dy, x, None, None, statistics)[:, 0].round(3)
    array([3., 1., 2.])
    """
    given = dy, x, residual, mask, gamma, beta, statistics
    call = GRADIENT_SUMS.calls.replay(None if out is None else (out,), given, axis, activation, alpha)
    if call.replayed:
        return out
    options, arrays = Options(activation_named(activation, alpha)), (out, *given)
    return run(GRADIENT_SUMS, arrays, axis, options, call)[0]


def batch_norm_input_gradient(
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    sums: AnyArray,
    *,
    axis: int = 1,
    residual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Return the gradient of the input of a part, from the sums over the whole mini-batch.

    Parameters
    ----------
    dy, x, gamma, beta, statistics : array, array, array or None, array or None, array
        As in `batch_norm_gradient_sums`.
    sums : array, shape (3, C), float32, or float64 for float64 `x`
        Total of what `batch_norm_gradient_sums` returned for all parts.
    axis, residual, activation, alpha, mask : int, array, str, float, array
        As in `batch_norm_forward`.
    out : tuple of arrays, optional
        Arrays to write what is returned to; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and dtype of `x`
        Gradient with respect to `x`, also through the statistics.
    dresidual : array, shape and dtype of `x`
        Gradient with respect to `residual`; only where that is given.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0], [8.0]]), np.array([[1.0], [2.0], [0.0]])
    >>> statistics, _ = batch_norm_statistics(batch_norm_moments(x)[None])
    >>> sums = batch_norm_gradient_sums(dy, x, None, None, statistics)
    >>> (dx,) = batch_norm_input_gradient(dy, x, None, None, statistics, sums)
    >>> bool(abs(dx.sum()) < 1e-15)
    True
    """
    given = dy, x, residual, mask, gamma, beta, statistics, sums
    call = INPUT_GRADIENT.calls.replay(out, given, axis, activation, alpha)
    if call.replayed:
        return out
    options = Options(activation_named(activation, alpha))
    outputs = check.pack_outputs(out, INPUT_GRADIENT.outputs[: 1 if residual is None else 2])
    arrays = (*outputs, None, *given) if residual is None else (*outputs, *given)
    return run(INPUT_GRADIENT, arrays, axis, options, call)
