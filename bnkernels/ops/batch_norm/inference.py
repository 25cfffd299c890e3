"""Batch normalisation with running statistics, as a trained network needs it: forward and backward.

CuPy arrays run the kernels ``bnk_batch_norm_inference`` and ``bnk_batch_norm_inference_backward``, one launch each, or
with a mask, with groups, or with parameters of 16 bits the general ones; NumPy arrays run the twins. T, A, P, C and N
are those of ``batch_norm.py``, which is the training pass.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm import call as plans
from bnkernels.ops.batch_norm.masked_grouped import GRADIENTS, Options, Stage, is_narrow, run
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap
from bnkernels.runtime.replay import NEW


def batch_norm_inference(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: Any = None,
    grouped: bool = False,
    out: Any = None,
) -> Any:
    """Normalise with running statistics, scale, shift and activate.

    Parameters
    ----------
    x : array, type T
        Any number of examples. Never written.
    gamma, beta : array, shape (C,), type P, or None
        Scale and shift; None means 1 and 0.
    running_mean, running_var : array, shape (C,), type A
        The statistics to normalise with. Never written.
    eps, axis, residual, activation, alpha, mask, grouped : float, int, array, str, float, array, bool
        As in `batch_norm_forward`.
    out : array, shape and type of `x`, optional
        Where to write the output; C order; may be `x` or `residual` itself.

    Returns
    -------
    array, shape and type of `x`, C order
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
    >>> batch_norm_inference(np.array([[3.0]]), None, None, np.array([1.0]), np.array([3.75]), eps=0.25)
    array([[1.]])
    """
    given = x, residual, gamma, beta, running_mean, running_var
    outputs = None if out is None else (out,)
    call = NEW
    if mask is None and grouped is False:
        call = plans.INFERENCE_CALLS.replay(outputs, given, None, eps, axis, activation, alpha)
        if call.replayed:
            return out
    eps = check.epsilon(eps, x)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    if mask is not None or grouped is not False or is_narrow(x, gamma, beta):
        named = {"out": out, "x": x, "residual": residual, "mask": mask, "gamma": gamma, "beta": beta}
        named |= {"running_mean": running_mean, "running_var": running_var}
        return run(Stage.FROZEN, named, ("out",), Options(phi, eps), axis, check.boolean("grouped", grouped))[0]
    arrays = (out, *given)
    plan = plans.plan_inference(axis, *check.signatures(arrays))
    if out is not None:
        overlap.check_outputs(plan.runtime, plans.INFERENCE_NAMES, arrays, written=1, in_place=("x", "residual"))
    return plans.run_inference(plan, arrays, eps, phi, call)


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: Any = None,
    grouped: bool = False,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of `batch_norm_inference`, whose statistics do not depend on `x`.

    Parameters
    ----------
    dy : array, shape and type of `x`
        Gradient with respect to the output. Never written.
    x : array, type T
        The forward's input.
    gamma, beta : array, shape (C,), type P, or None
        As in the forward.
    running_mean, running_var : array, shape (C,), type A
        As in the forward. Never written.
    eps, axis, residual, activation, alpha, mask, grouped : float, int, array, str, float, array, bool
        As in the forward.
    out : tuple of arrays, optional
        Where to write what is returned; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and type of `x`
        Gradient with respect to `x`: ``dy * gamma * rstd``, through the activation.
    dgamma, dbeta, dresidual
        As in `batch_norm_backward`.

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
    >>> mean, var = np.array([1.0]), np.array([3.75])
    >>> batch_norm_inference_backward(np.array([[3.0]]), np.array([[5.0]]), None, None, mean, var, eps=0.25)
    (array([[1.5]]), array([6.]), array([3.]))
    """
    given, running = (dy, x, residual, gamma, beta), (running_mean, running_var)
    call = NEW
    if mask is None and grouped is False:
        call = plans.INFERENCE_BACKWARD_CALLS.replay(out, given + running, None, eps, axis, activation, alpha)
        if call.replayed:
            return out
    eps = check.epsilon(eps, x)
    outputs = check.pack_gradients(out, residual)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    if mask is not None or grouped is not False or is_narrow(x, gamma, beta):
        named = dict(zip(GRADIENTS, outputs, strict=True)) | {"dy": dy, "x": x, "residual": residual, "mask": mask}
        named |= {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
        returned = GRADIENTS if residual is not None else GRADIENTS[:3]
        return run(Stage.FROZEN, named, returned, Options(phi, eps), axis, check.boolean("grouped", grouped))
    arrays = (*outputs, *given, None, *running)
    plan = plans.plan_inference_backward(axis, *check.signatures(arrays))
    if out is not None:
        overlap.check_outputs(plan.runtime, plans.BACKWARD_NAMES, arrays, written=4, in_place=("dy", "x", "residual"))
    return plans.run_backward(plan, arrays, eps, phi, call=call)
