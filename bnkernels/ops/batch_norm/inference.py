"""Batch normalisation with running statistics, as a trained network needs it: forward and backward.

The kernels stand beside those of training, see ``training.py``.
"""

from __future__ import annotations

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm.call import run
from bnkernels.ops.batch_norm.problem import INFERENCE, INFERENCE_BACKWARD, Options
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array


def batch_norm_inference(
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    running_mean: AnyArray,
    running_var: AnyArray,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    grouped: bool = False,
    out: Array | None = None,
) -> Array:
    """Normalise with running statistics, scale, shift and activate.

    Parameters
    ----------
    x : array, float16, bfloat16, float32 or float64
        Mini-batch of any number of examples. Never written.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`; or None
        Scale and shift; None means 1 and 0.
    running_mean, running_var : array, shape (C,), float32, or float64 for float64 `x`
        Statistics to normalise with. Never written.
    eps, axis, residual, activation, alpha, mask, grouped : float, int, array, str, float, array, bool
        As in `batch_norm_forward`.
    out : array, shape and dtype of `x`, optional
        Array to write the output to; C order; may be `x` or `residual` itself.

    Returns
    -------
    array, shape and dtype of `x`, C order
        The output. Every example's is independent of the others.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
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
    >>> batch_norm_inference(np.array([[3.0]]), None, None, np.array([1.0]), np.array([3.75]), eps=0.25)
    array([[1.]])
    """
    given = x, residual, mask, gamma, beta, running_mean, running_var
    call = INFERENCE.calls.replay(None if out is None else (out,), given, eps, axis, activation, alpha, grouped)
    if call.replayed:
        return out
    options = Options(activation_named(activation, alpha), check.epsilon(eps, x))
    arrays = (out, *given)
    return run(INFERENCE, arrays, axis, options, call, grouped)[0]


def batch_norm_inference_backward(
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    running_mean: AnyArray,
    running_var: AnyArray,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    grouped: bool = False,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of `batch_norm_inference`, whose statistics do not depend on `x`.

    Parameters
    ----------
    dy : array, shape and dtype of `x`
        Gradient with respect to the output. Never written.
    x : array, float16, bfloat16, float32 or float64
        Input of the forward.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`; or None
        As in the forward.
    running_mean, running_var : array, shape (C,), float32, or float64 for float64 `x`
        As in the forward. Never written.
    eps, axis, residual, activation, alpha, mask, grouped : float, int, array, str, float, array, bool
        As in the forward.
    out : tuple of arrays, optional
        Arrays to write what is returned to; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and dtype of `x`
        Gradient with respect to `x`: ``dy * gamma * rstd``, through the activation.
    dgamma, dbeta, dresidual
        As in `batch_norm_backward`.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
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
    >>> mean, var = np.array([1.0]), np.array([3.75])
    >>> batch_norm_inference_backward(np.array([[3.0]]), np.array([[5.0]]), None, None, mean, var, eps=0.25)
    (array([[1.5]]), array([6.]), array([3.]))
    """
    given = dy, x, residual, mask, gamma, beta, running_mean, running_var
    call = INFERENCE_BACKWARD.calls.replay(out, given, eps, axis, activation, alpha, grouped)
    if call.replayed:
        return out
    options = Options(activation_named(activation, alpha), check.epsilon(eps, x))
    arrays = (*check.pack_gradients(out, residual), *given)
    return run(INFERENCE_BACKWARD, arrays, axis, options, call, grouped)
