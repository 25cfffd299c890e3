"""Batch normalisation under the names that CuPy had for cuDNN's, which CuPy 14 removed.

``cupy.cudnn.X(...)`` becomes ``bnkernels.compat.cudnn.X(...)``. `decay` is the weight of the old running statistics,
whose variance is unbiased; `mean` and `inv_std` go from the forward to the backward. There is no reserve space.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.batch_norm.inference import batch_norm_inference
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of

CUDNN_TENSOR_NCHW, CUDNN_TENSOR_NHWC = 0, 1
CUDNN_BATCHNORM_PER_ACTIVATION, CUDNN_BATCHNORM_SPATIAL, CUDNN_BATCHNORM_SPATIAL_PERSISTENT = 0, 1, 2


def batch_normalization_forward_training(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
    decay: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    d_layout: int = CUDNN_TENSOR_NCHW,
) -> Any:
    """Normalise over the mini-batch, and update the running statistics in place.

    Parameters
    ----------
    x : array
        Mini-batch.
    gamma, beta, running_mean, running_var : array
        Arrays of a number for every channel, or every activation; any shape and floating type.
    mean, inv_std : array or None
        Arrays for the statistics of the mini-batch; None for both returns them.
    eps : float
        Number added to the variance.
    decay : float
        Weight of the old running statistics.
    is_for_conv2d : bool
        Whether `x` has four axes. Else each column of `x` as a matrix has statistics of its own.
    cudnn_mode : int
        0 for statistics of every activation, 1 or 2 of every channel.
    debug : bool
        Not used.
    d_layout : int
        0 for NCHW, 1 for NHWC.

    Returns
    -------
    array, or tuple of three
        Output, and if `mean` is None the statistics.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    return batch_normalization_forward_training_ex(
        *(x, gamma, beta, running_mean, running_var, mean, inv_std),
        *(eps, decay, is_for_conv2d, cudnn_mode, debug, d_layout),
    )[1 if mean is not None else slice(1, None)]


def batch_normalization_forward_training_ex(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
    decay: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    d_layout: int = CUDNN_TENSOR_NCHW,
) -> Any:
    """Do the same, and return a reserve space before the rest.

    Parameters
    ----------
    x, gamma, beta, running_mean, running_var, mean, inv_std : array
        As in `batch_normalization_forward_training`.
    eps, decay, is_for_conv2d, cudnn_mode, debug, d_layout : float, float, bool, int, bool, int
        As in `batch_normalization_forward_training`.

    Returns
    -------
    tuple
        None, the output, and if `mean` is None the statistics.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    if (mean is None) != (inv_std is None):
        raise ValueError("mean and inv_std must be two arrays, or both None")
    rows, axis = _viewed(x, is_for_conv2d, cudnn_mode, d_layout)
    vectors = [_vector(array, x) for array in (gamma, beta, running_mean, running_var)]
    momentum = 1 - check.number("decay", decay, 0, 1)
    y, statistics = batch_norm_forward(rows, *vectors, momentum=momentum, eps=eps, axis=axis)
    for given, updated in zip((running_mean, running_var), vectors[2:], strict=True):
        if given.dtype != updated.dtype or not given.flags.c_contiguous:  # it was a copy
            given[...] = updated.reshape(given.shape)
    found = statistics[0], statistics[2]
    if mean is None:
        return None, y.reshape(x.shape), *(array.reshape(gamma.shape) for array in found)
    for out, array in zip((mean, inv_std), found, strict=True):
        out[...] = array.reshape(out.shape)
    return None, y.reshape(x.shape)


def batch_normalization_forward_inference(
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    var: Any,
    eps: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    d_layout: int = CUDNN_TENSOR_NCHW,
) -> Any:
    """Normalise with given statistics.

    Parameters
    ----------
    x, gamma, beta : array
        As in `batch_normalization_forward_training`.
    mean, var : array
        Running statistics.
    eps, is_for_conv2d, cudnn_mode, d_layout : float, bool, int, int
        As in `batch_normalization_forward_training`.

    Returns
    -------
    array
        Output.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    rows, axis = _viewed(x, is_for_conv2d, cudnn_mode, d_layout)
    vectors = [_vector(array, x) for array in (gamma, beta, mean, var)]
    return batch_norm_inference(rows, *vectors, eps=eps, axis=axis).reshape(x.shape)


def batch_normalization_backward(
    x: Any,
    gamma: Any,
    gy: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    d_layout: int = CUDNN_TENSOR_NCHW,
    *,
    reserve_space: None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of `batch_normalization_forward_training`.

    Parameters
    ----------
    x, gamma : array
        As in `batch_normalization_forward_training`.
    gy : array, shape and dtype of `x`
        Gradient with respect to the output.
    mean, inv_std : array
        Statistics of the forward.
    eps, is_for_conv2d, cudnn_mode, debug, d_layout : float, bool, int, bool, int
        As in `batch_normalization_forward_training`.
    reserve_space : None
        Result of `batch_normalization_forward_training_ex`, which is None.

    Returns
    -------
    gx : array, shape and dtype of `x`
        Gradient with respect to `x`.
    ggamma, gbeta : array, shape of `gamma`
        Gradients with respect to `gamma` and `beta`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    rows, axis = _viewed(x, is_for_conv2d, cudnn_mode, d_layout)
    weight = _vector(gamma, x)
    statistics = empty(runtime_of(type(x)), (3, len(weight)), weight)
    statistics[0], statistics[1], statistics[2] = mean.reshape(-1), 0, inv_std.reshape(-1)
    gx, ggamma, gbeta = batch_norm_backward(gy.reshape(rows.shape), rows, weight, None, statistics, axis=axis)
    of_parameters = ggamma, gbeta
    if gamma.dtype != weight.dtype:
        of_parameters = tuple(array.astype(x.dtype) for array in of_parameters)
    return gx.reshape(x.shape), *(array.reshape(gamma.shape) for array in of_parameters)


def _viewed(x: Any, is_for_conv2d: bool, cudnn_mode: int, d_layout: int) -> tuple[Any, int]:
    """Return the mini-batch with the axis of what has statistics."""
    if cudnn_mode not in (0, 1, 2) or d_layout not in (CUDNN_TENSOR_NCHW, CUDNN_TENSOR_NHWC):
        raise ValueError(f"cudnn_mode must be 0, 1 or 2, and d_layout 0 or 1, got {cudnn_mode} and {d_layout}")
    if is_for_conv2d and x.ndim != 4:
        raise ValueError(f"x must have four axes if is_for_conv2d, got the shape {x.shape}")
    if not is_for_conv2d or cudnn_mode == CUDNN_BATCHNORM_PER_ACTIVATION:
        return x.reshape(len(x), -1), 1
    return x, 1 if d_layout == CUDNN_TENSOR_NCHW else -1


def _vector(array: Any, x: Any) -> Any:
    """Return parameters as a vector of the accumulator's type, a view if they are of that."""
    return array.reshape(-1).astype(accumulator(x.dtype), copy=False)
