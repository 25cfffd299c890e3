"""Double backward of batch normalisation: the gradients of what `batch_norm_backward` returns.

A penalty on gradients (WGAN-GP, R1), a step of meta-learning and a product with the Hessian differentiate the backward
once more. CuPy arrays run ``cuda/batch_norm_double_backward.cu``, whose head has the formulas; NumPy arrays are
computed by ``reference.py``.
"""

from __future__ import annotations

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm.call import run
from bnkernels.ops.batch_norm.problem import DOUBLE_BACKWARD, Options
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array


def batch_norm_double_backward(
    ddx: Array | None,
    ddgamma: AnyArray | None,
    ddbeta: AnyArray | None,
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    *,
    axis: int = 1,
    residual: Array | None = None,
    ddresidual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    frozen: bool = False,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of `batch_norm_backward`, or of `batch_norm_inference_backward`.

    That is, of ``L = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual>``, the sum of the
    products of its outputs with what comes in here.

    Parameters
    ----------
    ddx : array, shape and dtype of `x`, or None
        Gradient with respect to the backward's `dx`; None means 0. Never written.
    ddgamma, ddbeta : array, shape (C,), float32, or float64 for float64 `x`; or None
        Gradients with respect to its `dgamma` and `dbeta`; None means 0.
    dy : array, shape and dtype of `x`
        Input of the backward. Never written.
    x : array, float16, bfloat16, float32 or float64
        Input of the forward.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`; or None
        As in the forward.
    statistics : array, shape (3, C), float32, or float64 for float64 `x`
        Statistics that the forward returned; with `frozen` the rows running mean, 0 and
        ``1 / sqrt(running_var + eps)``.
    axis, residual : int, array
        As in the forward.
    ddresidual : array, shape and dtype of `x`, optional
        Gradient with respect to the backward's `dresidual`, where there is a `residual`.
    activation, alpha : str, float
        As in the forward.
    frozen : bool
        Whether the statistics are constants, as in `batch_norm_inference`, and not those of `x`.
    out : tuple of arrays, optional
        Arrays to write what is returned to; C order. `ddy` may be any input of the shape of `x` itself.

    Returns
    -------
    ddy : array, shape and dtype of `x`
        Gradient of L with respect to `dy`.
    dx : array, shape and dtype of `x`
        Gradient of L with respect to `x`, also through the mean and the variance, so that its sum over each
        channel is 0; not through those that are `frozen`.
    dgamma, dbeta : array, shape (C,), float32, or float64 for float64 `x`
        Gradients of L with respect to `gamma` and `beta`, also where those are None. `dbeta` is 0 unless the activation
        is curved.
    dresidual : array, shape and dtype of `x`
        Gradient of L with respect to `residual`, only where that is given; 0 unless the activation is curved.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, arrays overlap, or there is a `ddresidual` without a `residual`.

    See Also
    --------
    batch_norm_backward, batch_norm_inference_backward : What is differentiated here.

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
    given = dy, x, residual, ddresidual, ddgamma, ddbeta, gamma, beta, statistics
    call = DOUBLE_BACKWARD.calls.replay(out, (*given, ddx), axis, activation, alpha, frozen)
    if call.replayed:
        return out
    if ddresidual is not None and residual is None:
        raise ValueError("ddresidual belongs to a residual, and residual is None; pass residual, or no ddresidual")
    options = Options(activation_named(activation, alpha), frozen=check.boolean("frozen", frozen))
    outputs = check.pack_outputs(out, DOUBLE_BACKWARD.outputs[: 4 if residual is None else 5])
    arrays = (*outputs, None, ddx, *given) if residual is None else (*outputs, ddx, *given)
    return run(DOUBLE_BACKWARD, arrays, axis, options, call)
