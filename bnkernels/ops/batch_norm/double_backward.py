"""Double backward of batch normalisation: the gradients of what `batch_norm_backward` returns.

A penalty on gradients (WGAN-GP, R1), a step of meta-learning and a product with the Hessian differentiate the backward
once more. CuPy arrays run ``cuda/batch_norm_double_backward.cu``, whose head has the formulas; NumPy arrays its twin.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.batch_norm.call import SIZES, Plan, _checked, _planned, _sources
from bnkernels.ops.batch_norm.double_backward_reference import double_backward_host
from bnkernels.ops.batch_norm.launch import double_backward_launch
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap
from bnkernels.runtime.arguments import addresses, arguments_type, empty, pack

TENSORS = ("ddx", "dy", "x", "residual", "ddresidual")
OUTPUTS = ("ddy", "dx", "dgamma", "dbeta", "dresidual")
NAMES = (*OUTPUTS, *TENSORS, "ddgamma", "ddbeta", "gamma", "beta", "statistics")
ARGUMENTS = arguments_type(
    f"{' '.join(TENSORS)} ddgamma ddbeta gamma beta statistics {' '.join(OUTPUTS)}",
    f"{SIZES} {' '.join(f'{name}_{axis}' for name in TENSORS for axis in ('outer', 'channel', 'inner'))}",
    "alpha",
    "activation",
)


@lru_cache(maxsize=1024)
def _plan(axis: int, *signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays NAMES; plan the call."""
    args, layout = _checked(NAMES, 5, signatures, axis, (*OUTPUTS, "ddx", "ddresidual", "ddgamma", "ddbeta"))
    return _planned(args, layout, TENSORS, double_backward_launch)


def batch_norm_double_backward(
    ddx: Any,
    ddgamma: Any,
    ddbeta: Any,
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    statistics: Any,
    *,
    axis: int = 1,
    residual: Any = None,
    ddresidual: Any = None,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of `batch_norm_backward`.

    That is, of ``L = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual>``, the sum of the
    products of its outputs with what comes in here.

    Parameters
    ----------
    ddx : array, shape and type of `x`, or None
        Gradient with respect to the backward's `dx`; None means 0. Never written.
    ddgamma, ddbeta : array, shape (C,), type A, or None
        Gradients with respect to its `dgamma` and `dbeta`; None means 0.
    dy : array, shape and type of `x`
        The backward's input. Never written.
    x : array, type T
        The forward's input: float16, bfloat16, float32 or float64. A is float32 for 16 bits, else T.
    gamma, beta : array, shape (C,), type A, or None
        As in the forward.
    statistics : array, shape (3, C), type A
        What the forward returned.
    axis, residual, activation, alpha : int, array, str, float
        As in the forward.
    ddresidual : array, shape and type of `x`, optional
        Gradient with respect to the backward's `dresidual`, where there is a `residual`.
    out : tuple of arrays, optional
        Where to write what is returned; C order. `ddy` may be any input of the shape of `x` itself.

    Returns
    -------
    ddy : array, shape and type of `x`
        Gradient of L with respect to `dy`.
    dx : array, shape and type of `x`
        Gradient of L with respect to `x`, also through the mean and the variance; its sum over each channel is 0.
    dgamma, dbeta : array, shape (C,), type A
        Gradients of L with respect to `gamma` and `beta`, also where those are None. `dbeta` is 0 unless the activation
        is curved.
    dresidual : array, shape and type of `x`
        Gradient of L with respect to `residual`, only where that is given; 0 unless the activation is curved.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, arrays overlap, or there is a `ddresidual` without a `residual`.

    See Also
    --------
    batch_norm_backward : What is differentiated here.

    Notes
    -----
    With `ddx` alone and the gradient of a loss as `dy`, `dx` is the Hessian of ``<dy, y(x)>`` times `ddx`. The second
    derivative of relu and leaky_relu counts as 0 at their kink, that of elu at 0 is the one from below. An empty batch
    gives zero parameter gradients. Derivation: ``docs/double_backward.md``. Source:
    ``cuda/batch_norm_double_backward.cu``.

    Examples
    --------
    The gradient of ``(dx**2).sum() / 2``, a penalty on the gradient:

    >>> import numpy as np
    >>> import bnkernels as bn
    >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> y, statistics = bn.batch_norm_forward(x)
    >>> dx, _, _ = bn.batch_norm_backward(dy, x, None, None, statistics)
    >>> ddy, of_x, of_gamma, of_beta = batch_norm_double_backward(dx, None, None, dy, x, None, None, statistics)
    >>> bool(np.allclose((ddy * dy).sum(), (dx**2).sum())), bool(np.allclose(of_gamma, (dx**2).sum()))
    (True, True)
    """
    if ddresidual is not None and residual is None:
        raise ValueError("ddresidual belongs to a residual, and residual is None; pass residual, or no ddresidual")
    if residual is None:
        outputs = (*check.pack_outputs(out, OUTPUTS[:4]), None)
    else:
        outputs = check.pack_outputs(out, OUTPUTS)
    axis, phi = check.integer("axis", axis), activation_named(activation, alpha)
    arrays = (*outputs, ddx, dy, x, residual, ddresidual, ddgamma, ddbeta, gamma, beta, statistics)
    plan = _plan(axis, *check.signatures(arrays))
    if out is not None:
        overlap.check_outputs(plan.runtime, NAMES, arrays, written=5, in_place=TENSORS)
    return _run(plan, arrays, phi)


def _run(plan: Plan, arrays: tuple, phi: Activation) -> tuple[Any, ...]:
    """Run the double backward on the arrays NAMES; return the gradients, the residual's too where there is one."""
    outputs, (ddx, dy, x, residual, ddresidual), vectors = arrays[:5], arrays[5:10], arrays[10:]
    runtime, layout = plan.runtime, plan.layout
    if outputs[0] is None:
        dgamma, dbeta = (empty(runtime, (layout.channels,), x, plan.wide) for _ in range(2))
        dresidual = None if residual is None else empty(runtime, plan.shape, x)
        outputs = empty(runtime, plan.shape, x), empty(runtime, plan.shape, x), dgamma, dbeta, dresidual
    if plan.empty:
        outputs[2][...] = 0
        outputs[3][...] = 0
    elif runtime is None:
        double_backward_host(layout, (ddx, ddresidual, dy, x, residual), vectors, phi, outputs)
    else:
        check.one_device(runtime, NAMES, arrays)
        sources = _sources(plan, ddx=ddx, dy=dy, x=x, residual=residual, ddresidual=ddresidual)
        pointers = addresses(runtime, *sources, *vectors, *outputs)
        arguments = pack(ARGUMENTS[plan.wide], *pointers, *plan.sizes, phi.alpha, phi.code)
        runtime.launch("batch_norm_double_backward", plan.kernel, plan.launch, arguments, x)
    return outputs if residual is not None else outputs[:4]
