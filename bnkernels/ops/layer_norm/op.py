"""Layer normalisation of every example over its features: forward and backward, one launch each.

CuPy arrays run ``cuda/layer_norm_*.cu``, NumPy arrays ``cpu``, or ``reference.py`` where Numba is missing. Below, C
is the length of the last axis, over which is normalised; T is the data type of `x`, and A that of the accumulator:
float32 for 16-bit T, else T.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.layer_norm import reference
from bnkernels.ops.layer_norm.launch import choose_backward, choose_forward
from bnkernels.ops.layer_norm.problem import BACKWARD, FORWARD, VECTOR, Problem
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import addresses, empty, pack
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.replay import ReplayCache
from bnkernels.runtime.seam import LaunchPlan
from bnkernels.runtime.workspace import barrier_counters

FORWARD_CALLS, BACKWARD_CALLS = ReplayCache(), ReplayCache()
CPU = "bnkernels.ops.layer_norm.cpu"


def layer_norm_forward(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Normalise every example over its features, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (..., C), type T
        The examples; C order. To normalise over several axes, reshape them into one.
    gamma, beta : array, shape (C,), type A, optional
        Scale and shift of every feature; without them 1 and 0.
    eps : float
        Number added to the variance, in the units of ``x**2``: at least the smallest normal number of type A, because
        a constant row has the variance 0.
    activation : str
        Activation behind the norm, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation, as in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Arrays for ``(y, statistics)``; C order. `y` may be `x` itself if no backward follows.

    Returns
    -------
    y : array, shape (..., C), type T
        ``phi(gamma * (x - mean) * rstd + beta)``.
    statistics : array, shape (3, ...), type A
        Rows ``mean``, ``mean_low`` (what `mean` loses by rounding) and ``rstd``, which is ``1 / sqrt(var + eps)``, of
        every example; for the backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    Training and inference are the same. Variances are biased, over C. Source: ``cuda/layer_norm_forward.cu``.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> y, statistics = layer_norm_forward(np.array([[1.0, 3.0], [5.0, 5.0]]), eps=0.25)
    >>> y.round(3)
    array([[-0.894,  0.894],
           [ 0.   ,  0.   ]])
    """
    call = FORWARD_CALLS.replay(out, (x, gamma, beta), eps, activation, alpha)
    if call.replayed:
        return out
    phi, eps = activation_named(activation, alpha), check.epsilon(eps, x)
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    runtime, problem = FORWARD.check(y, statistics, x, gamma, beta)
    if y is None:
        y, statistics = empty(runtime, x.shape, x), empty(runtime, (3, *x.shape[:-1]), x, problem.acc_dtype)
    if problem.rows == 0:
        return y, statistics
    if runtime is None:
        given = problem, x, gamma, beta, eps, phi, y, statistics
        if cpu := kernels(CPU):
            call.compute(cpu.forward(*given), x)
        else:
            reference.forward(*given)
        return y, statistics
    plan = choose_forward(problem, runtime.limits(x))
    pointers = addresses(runtime, x, gamma, beta, y, statistics)
    numbers = problem.rows, problem.columns, eps, phi.alpha, *_codes(problem, plan, phi, pointers[:4])
    call.launch(runtime, *plan[:3], pack(plan.arguments, *pointers, *numbers), x)
    return y, statistics


def layer_norm_backward(
    dy: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    statistics: Any,
    *,
    activation: str = "identity",
    alpha: float | None = None,
    workspace: Any = None,
    out: tuple[Any, Any, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of `layer_norm_forward`.

    Parameters
    ----------
    dy : array, shape (..., C), type T
        Gradient with respect to the output; C order.
    x, gamma, beta : array, array or None, array or None
        Arguments of the forward.
    statistics : array, shape (3, ...), type A
        Result of the forward.
    activation, alpha : str, float
        Arguments of the forward.
    workspace : array, shape (W,), type A, optional
        Memory for partial sums: W of at least 512 C. By default it is allocated if needed.
    out : tuple of three arrays, optional
        Arrays for ``(dx, dgamma, dbeta)``; C order. `dx` may be `dy` itself.

    Returns
    -------
    dx : array, shape (..., C), type T
        Gradient with respect to `x`.
    dgamma, dbeta : array, shape (C,), type A
        Gradients with respect to scale and shift.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    One launch, deterministic. Large problems are split over several blocks with a grid barrier: a cooperative
    launch. Source: ``cuda/layer_norm_backward.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 3.0, 2.0], [4.0, 5.0, 9.0]])
    >>> y, statistics = layer_norm_forward(x)
    >>> dx, dgamma, dbeta = layer_norm_backward(np.ones((2, 3)), x, None, None, statistics)
    >>> bool(abs(dx).max() < 1e-15), dbeta  # a shift of a whole row does not change its output
    (True, array([2., 2., 2.]))
    """
    call = BACKWARD_CALLS.replay(out, (dy, x, gamma, beta, statistics, workspace), activation, alpha)
    if call.replayed:
        return out
    phi = activation_named(activation, alpha)
    dx, dgamma, dbeta = check.pack_outputs(out, ("dx", "dgamma", "dbeta"))
    runtime, problem = BACKWARD.check(dx, dgamma, dbeta, workspace, dy, x, gamma, beta, statistics)
    if dx is None:
        dx = empty(runtime, x.shape, x)
        dgamma, dbeta = (empty(runtime, x.shape[-1:], x, problem.acc_dtype) for _ in range(2))
    if problem.rows == 0:
        dgamma[...], dbeta[...] = 0, 0
        return dx, dgamma, dbeta
    if runtime is None:
        given = problem, dy, x, gamma, beta, statistics, phi, dx, dgamma, dbeta
        if cpu := kernels(CPU):
            call.compute(cpu.backward(*given), x)
        else:
            reference.backward(*given)
        return dx, dgamma, dbeta
    plan, counter = choose_backward(problem, runtime.limits(x)), 0
    if plan.launch.cooperative:
        counter = barrier_counters(runtime.workspace(x))
        if workspace is None:
            workspace = empty(runtime, (2 * plan.launch.blocks * problem.columns,), x, problem.acc_dtype)
    pointers = addresses(runtime, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, workspace)
    codes = _codes(problem, plan, phi, (*pointers[:4], pointers[5]))
    numbers = problem.rows, problem.columns, plan.chunk, phi.alpha, *codes
    call.launch(runtime, *plan[:3], pack(plan.arguments, *pointers, counter, *numbers), x)
    return dx, dgamma, dbeta


def _codes(problem: Problem, plan: LaunchPlan, phi: Activation, rows: tuple[int, ...]) -> tuple[int, bool, int]:
    """Return the last members of the argument; `rows` are the addresses of what is read and written by vectors."""
    aligned16 = problem.columns % problem.count == 0 and all(address % VECTOR == 0 for address in rows)
    return phi.code, aligned16, plan.held
