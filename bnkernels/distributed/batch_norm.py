"""Synchronised batch norm: forward and backward over the mini-batch of all ranks, each with one all-gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import Communicator, checked
from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm import in_parts
from bnkernels.ops.batch_norm.call import checked as checked_call
from bnkernels.ops.batch_norm.problem import INPUT_GRADIENT, NORMALISE, Options
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.registry import runtime_of


def sync_batch_norm_forward(
    communicator: Communicator,
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
    name: str = "",
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Normalise every channel over the mini-batch of all ranks, scale, shift and activate.

    Parameters
    ----------
    communicator : Communicator
        Ranks; all of them must call this, in the same order as other collectives. Those of a group, by `split`, have a
        mini-batch of their own.
    x : array, shape (N, C), (N, C, L), (N, C, H, W), ..., float16, bfloat16, float32 or float64
        Part of the mini-batch; N may differ between the ranks, and be 0. Never written.
    gamma, beta, running_mean, running_var : array, shape (C,), optional
        As in `batch_norm_forward`. Running statistics that are the same on all ranks stay so, to the bit.
    momentum, batches_before, unbiased, eps : float or None, int, bool, float
        As in `batch_norm_forward`, the same on all ranks.
    axis, residual, activation, alpha, mask : int, array, str, float, array
        As in `batch_norm_forward`.
    name : str
        Name of the layer: ranks that differ in it raise an error at its first call, and wait for nobody.
    out : tuple of two arrays, optional
        Arrays to write `y` (which may be `x` or `residual` itself) and `statistics` to; C order.

    Returns
    -------
    y : array, shape and dtype of `x`, C order
        Output of this part.
    statistics : array, shape (3, C), float32, or float64 for float64 `x`
        Statistics of the whole mini-batch, as of `batch_norm_forward`; the same bits on all ranks.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; at the first call with such channels and options before anything is exchanged but this
        error, which ends the call on the other ranks too.
    RankError
        If ranks differ in number of channels, data type, options, or name, or one is missing.

    See Also
    --------
    sync_batch_norm_backward : The gradients.

    Notes
    -----
    One all-gather of 4 C numbers from each rank: count, mean in two parts, sum of squared distances. The parts are
    merged in the order of the ranks, so that the result has the same bits in every run. The first call exchanges a
    message of 256 bytes before. A single value of a channel, on all ranks together, has no variance: its output is the
    activated shift. Nothing but memory for the result can be prepared while the exchange is under way: all else needs
    the mean.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample variance", 1983.

    Examples
    --------
    >>> import numpy as np
    >>> from bnkernels.distributed import run_threads
    >>> parts = np.array([[1.0], [3.0]]), np.array([[8.0]])
    >>> outputs = run_threads(2, lambda ranks: sync_batch_norm_forward(ranks, parts[ranks.rank]))
    >>> bool(abs(sum(y.sum() for y, _ in outputs)) < 1e-14), outputs[0][1][0]
    (True, array([4.]))
    """
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    ranks, channels = checked(communicator), _channels(x, axis)
    normalise = {"axis": axis, "residual": residual, "activation": activation, "alpha": alpha, "mask": mask}
    merge = {"momentum": momentum, "batches_before": batches_before, "unbiased": unbiased, "eps": eps}
    runtime = runtime_of(type(x), "x")
    acc_dtype = accumulator(x.dtype)
    gathered, merged = (empty(runtime, shape, x, acc_dtype) for shape in ((1, 4, channels), (4, channels)))
    statistics = empty(runtime, (3, channels), x, acc_dtype) if statistics is None else statistics

    def checks() -> None:
        arrays = y, x, residual, mask, gamma, beta, statistics
        checked_call(NORMALISE, arrays, axis, Options(activation_named(activation, alpha)))
        in_parts.OPERANDS.check(statistics, merged, running_mean, running_var, gathered)
        check.cumulative(batches_before) if momentum is None else check.number("momentum", momentum, 0, 1)
        check.boolean("unbiased", unbiased), check.epsilon(eps, gathered)

    tracked = running_mean is not None, running_var is not None
    key = "forward", name, channels, x.dtype, momentum, unbiased, eps, tracked
    ranks.agree_once(
        key,
        lambda: (
            _described("forward", name, channels, x)
            + f", eps {eps:g}, momentum {momentum}, {'un' if unbiased else ''}biased, running statistics {tracked}"
        ),
        checks,
    )
    moments = in_parts.batch_norm_moments(x, axis=axis, mask=mask, out=empty(runtime, (4, channels), x, acc_dtype))
    ended = ranks.start(moments)
    y = empty(runtime, x.shape, x) if y is None else y
    in_parts.batch_norm_statistics(ended(), running_mean, running_var, **merge, out=(statistics, merged))
    return in_parts.batch_norm_normalise(x, gamma, beta, statistics, **normalise, out=y), statistics


def sync_batch_norm_backward(
    communicator: Communicator,
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
    name: str = "",
    meanwhile: Callable[[], Any] | None = None,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of `sync_batch_norm_forward`, of this part of the mini-batch.

    Parameters
    ----------
    communicator : Communicator
        Ranks of the forward.
    dy : array, shape and dtype of `x`
        Gradient with respect to the output of this part. Never written.
    x, gamma, beta, statistics : array, array or None, array or None, array
        As in the forward, and what it returned.
    axis, residual, activation, alpha, mask, name : int, array, str, float, array, str
        As in the forward.
    meanwhile : callable, optional
        Work that does not need the result, done while the all-gather is under way: such as the gradient of weights of
        the layer above. With NCCL it is enqueued behind the exchange.
    out : tuple of arrays, optional
        Arrays to write what is returned to; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and dtype of `x`
        Gradient with respect to this part of the input, also through the statistics that all parts share.
    dgamma, dbeta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`
        This part of the gradients with respect to `gamma` and `beta`: their sum over the ranks is that of the whole
        mini-batch, as it is of all other parameters.
    dresidual : array, shape and dtype of `x`
        Gradient with respect to `residual`; only where that is given.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, as in the forward.
    RankError
        If ranks differ in number of channels, data type or name, or one is missing.

    See Also
    --------
    sync_batch_norm_forward : The forward.

    Notes
    -----
    One all-gather of 3 C numbers from each rank: two sums and the count, added in the order of the ranks in float64.
    `dgamma`, `dbeta` and `meanwhile` do not wait for it.

    Examples
    --------
    >>> import numpy as np
    >>> from bnkernels.distributed import run_threads
    >>> parts = np.array([[1.0], [3.0]]), np.array([[8.0]])
    >>> def work(ranks):
    ...     x = parts[ranks.rank]
    ...     _, statistics = sync_batch_norm_forward(ranks, x)
    ...     return sync_batch_norm_backward(ranks, x * x, x, None, None, statistics)
    >>> bool(abs(sum(dx.sum() for dx, _, _ in run_threads(2, work))) < 1e-13)
    True
    """
    ranks, channels = checked(communicator), _channels(x, axis)
    runtime = runtime_of(type(x), "x")
    acc_dtype = accumulator(x.dtype)
    dx, dgamma, dbeta, dresidual = check.pack_gradients(out, residual)
    dx = empty(runtime, x.shape, x) if dx is None else dx
    outputs = dx, (empty(runtime, x.shape, x) if residual is not None and dresidual is None else dresidual)
    given = dy, x, gamma, beta, statistics
    options = {"axis": axis, "residual": residual, "activation": activation, "alpha": alpha, "mask": mask}

    def checks() -> None:
        total = empty(runtime, (3, channels), x, acc_dtype)
        arrays = *outputs, dy, x, residual, mask, gamma, beta, statistics, total
        checked_call(INPUT_GRADIENT, arrays, axis, Options(activation_named(activation, alpha)))
        for argument, array in (("dgamma", dgamma), ("dbeta", dbeta)):
            if array is not None:
                both = check.arguments({argument: check.signature(array), "x": check.signature(x)}, written=1)
                check.contiguous(both[argument], (channels,), _parameter_type(x, gamma, beta))

    key = "backward", name, channels, x.dtype
    ranks.agree_once(key, lambda: _described("backward", name, channels, x), checks)
    sums = in_parts.batch_norm_gradient_sums(*given, **options, out=empty(runtime, (3, channels), x, acc_dtype))
    ended = ranks.start(sums)
    found = []
    for array, row in ((dgamma, 1), (dbeta, 0)):  # these wait for nobody
        array = empty(runtime, (channels,), x, _parameter_type(x, gamma, beta)) if array is None else array
        array[...] = sums[row]
        found.append(array)
    if meanwhile is not None:
        meanwhile()
    total = _total(runtime, ended(), sums)
    outputs = in_parts.batch_norm_input_gradient(
        *given, total, **options, out=outputs if residual is not None else outputs[:1]
    )
    return (outputs[0], *found, *outputs[1:])


def _channels(x: Any, axis: Any) -> int:
    """Return the number of channels, as far as there are some: the op checks the rest."""
    shape = getattr(x, "shape", ())
    return shape[axis] if type(axis) is int and -len(shape) <= axis < len(shape) else 0


def _described(what: str, name: str, channels: int, x: Any) -> str:
    """Return what the ranks must agree on, in words."""
    return f"the {what} of layer '{name}', {channels} channels, {x.dtype}"


def _parameter_type(x: Any, *parameters: Any) -> np.dtype:
    """Return the data type of the gradients of gamma and beta."""
    given = [array.dtype for array in parameters if array is not None]
    return x.dtype if x.dtype.itemsize == 2 and x.dtype in given else accumulator(x.dtype)


def _total(runtime: Any, gathered: Any, sums: Any) -> Any:
    """Return the sum over the ranks, in their order and in float64, over the sums of this rank."""
    if len(gathered) > 1:
        sums[...] = gathered.sum(axis=0, dtype=np.float64)
    return sums
