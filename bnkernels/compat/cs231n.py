"""The norms of Stanford's CS231n under the names of its assignment, ``cs231n/layers.py``.

Functions of arrays with a cache between them. `bn_param` is a dict: mode, "train" or "test"; eps, 1e-5; momentum, 0.9,
the weight of the **old** running statistics; running_mean and running_var, over N, which start at 0 and are replaced.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.batch_norm.inference import batch_norm_inference
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of

Cache = tuple[Any, ...]


def batchnorm_forward(x: Any, gamma: Any, beta: Any, bn_param: dict[str, Any]) -> tuple[Any, Cache]:
    """Normalise every column.

    Parameters
    ----------
    x : array, shape (N, D)
        Mini-batch.
    gamma, beta : array, shape (D,)
        Scale and shift.
    bn_param : dict
        Mode, options and running statistics, which training replaces.

    Returns
    -------
    out : array, shape (N, D)
        Output.
    cache : tuple
        Arrays for the backward.

    Raises
    ------
    KeyError, TypeError, ValueError
        If there is no mode or another one, or an array is wrong.
    """
    mode, eps, axis = bn_param["mode"], bn_param.get("eps", 1e-5), 1
    check.one_of("mode", mode, ("train", "test"))
    running = [_started(bn_param.get(name), x) for name in ("running_mean", "running_var")]
    if mode == "train":
        momentum = 1 - check.number("momentum", bn_param.get("momentum", 0.9), 0, 1)
        options = {"momentum": momentum, "unbiased": False, "eps": eps, "axis": axis}
        out, statistics = batch_norm_forward(x, gamma, beta, *running, **options)
        cache: Cache = x, gamma, beta, statistics
    else:
        out, cache = batch_norm_inference(x, gamma, beta, *running, eps=eps, axis=axis), ()
    bn_param["running_mean"], bn_param["running_var"] = running
    return out, cache


def batchnorm_backward(dout: Any, cache: Cache) -> tuple[Any, Any, Any]:
    """Return the gradients of `batchnorm_forward` in training.

    Parameters
    ----------
    dout : array, shape of the output
        Gradient with respect to the output.
    cache : tuple
        Result of the forward.

    Returns
    -------
    dx : array
        Gradient with respect to `x`.
    dgamma, dbeta : array
        Gradients with respect to `gamma` and `beta`.

    Raises
    ------
    ValueError
        If the forward was in test mode.
    """
    if not cache:
        raise ValueError("cache is that of a forward in test mode, which keeps nothing; call it with mode='train'")
    return batch_norm_backward(dout, *cache)


batchnorm_backward_alt = batchnorm_backward
spatial_batchnorm_forward = batchnorm_forward  # the channels of (N, C, H, W) are in the same axis
spatial_batchnorm_backward = batchnorm_backward


def layernorm_forward(x: Any, gamma: Any, beta: Any, ln_param: dict[str, Any]) -> tuple[Any, Cache]:
    """Normalise every row.

    Parameters
    ----------
    x : array, shape (N, D)
        Mini-batch; C order.
    gamma, beta : array, shape (D,)
        Scale and shift.
    ln_param : dict
        Option eps, 1e-5.

    Returns
    -------
    out : array, shape (N, D)
        Output.
    cache : tuple
        Arrays for the backward.
    """
    out, statistics = layer_norm_forward(x, gamma, beta, eps=ln_param.get("eps", 1e-5))
    return out, (x, gamma, beta, statistics)


def layernorm_backward(dout: Any, cache: Cache) -> tuple[Any, Any, Any]:
    """Return the gradients of `layernorm_forward`.

    Parameters
    ----------
    dout : array, shape (N, D)
        Gradient with respect to the output.
    cache : tuple
        Result of the forward.

    Returns
    -------
    dx : array
        Gradient with respect to `x`.
    dgamma, dbeta : array
        Gradients with respect to `gamma` and `beta`.
    """
    return layer_norm_backward(dout, *cache)


def _started(array: Any, x: Any) -> Any:
    """Return a copy of running statistics, or zeros."""
    if array is not None:
        return array.copy()
    zeros = empty(runtime_of(type(x), "x"), x.shape[1:2], x, accumulator(x.dtype))
    zeros[...] = 0
    return zeros
