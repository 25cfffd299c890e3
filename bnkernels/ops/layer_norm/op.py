"""Layer normalisation of every example over its features: forward and backward, one launch each.

CuPy arrays run ``cuda/layer_norm_*.cu``, NumPy arrays ``cpu``, or ``reference.py`` where Numba is missing. Below, C
is the length of the last axis, over which is normalised; T is the data type of `x`, A that of the accumulator: float32
for 16-bit T, else T; and P that of scale, shift and their gradients: A or T.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.layer_norm import reference
from bnkernels.ops.layer_norm.launch import choose_backward, choose_forward, partial_sums
from bnkernels.ops.layer_norm.problem import (
    BACKWARD,
    FORWARD,
    FULL,
    IN_ACCUMULATOR_TYPE,
    IN_STORAGE_TYPE,
    VECTOR,
    Problem,
)
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import addresses, empty, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.replay import ReplayCache
from bnkernels.runtime.seam import Launch, LaunchPlan, Runtime, ceil_div
from bnkernels.runtime.workspace import PARTIALS, barrier_counters

FORWARD_CALLS, BACKWARD_CALLS = ReplayCache(), ReplayCache()
CPU = "bnkernels.ops.layer_norm.cpu"


def layer_norm_forward(
    x: Array,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    *,
    axes: int = 1,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Normalise every example over its features, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (..., C), type T
        The examples; C order.
    gamma, beta : array, shape (C,), type P, optional
        Scale and shift of every feature; without them 1 and 0.
    axes : int
        Number of last axes over which is normalised; of several, these are in the place of C.
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
    Training and inference are the same. Variances are biased, over C. Rows of more than 16,384 columns, or 8192 of
    float64, are shared by several blocks: a cooperative launch. Source: ``cuda/layer_norm_forward.cu``, for long rows
    ``cuda/layer_norm_forward_cooperative.cu``.

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
    call = FORWARD_CALLS.replay(out, (x, gamma, beta), axes, eps, activation, alpha)
    if call.replayed:
        return out
    phi, eps = activation_named(activation, alpha), check.epsilon(eps, x)
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    axes = check.integer("axes", axes, 1)
    runtime, problem = FORWARD.check(y, statistics, x, gamma, beta, options=(axes,))
    if y is None:
        y, statistics = empty(runtime, x.shape, x), empty(runtime, (3, *x.shape[:-axes]), x, problem.acc_dtype)
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
    names = "x gamma beta y statistics".split()
    members = dict(zip(names, addresses(runtime, x, gamma, beta, y, statistics), strict=True)) | {"eps": eps}
    call.launch(runtime, *plan[:2], *_prepared(runtime, plan, problem, phi, members, x), x)
    return y, statistics


def layer_norm_backward(
    dy: Array,
    x: Array,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    statistics: AnyArray,
    *,
    axes: int = 1,
    activation: str = "identity",
    alpha: float | None = None,
    workspace: AnyArray | None = None,
    out: tuple[Array, AnyArray, AnyArray] | None = None,
) -> tuple[Array, Any, Any]:
    """Return the gradients of `layer_norm_forward`.

    Parameters
    ----------
    dy : array, shape (..., C), type T
        Gradient with respect to the output; C order.
    x, gamma, beta : array, array or None, array or None
        Arguments of the forward.
    statistics : array, shape (3, ...), type A
        Result of the forward.
    axes, activation, alpha : int, str, float
        Arguments of the forward.
    workspace : array, shape (W,), type A, optional
        Memory for partial sums: W of at least 512 C. By default it is allocated if needed.
    out : tuple of three arrays, optional
        Arrays for ``(dx, dgamma, dbeta)``; C order. `dx` may be `dy` itself.

    Returns
    -------
    dx : array, shape (..., C), type T
        Gradient with respect to `x`.
    dgamma, dbeta : array, shape (C,), type P
        Gradients with respect to scale and shift, of type A if there is neither.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    One launch, deterministic. Large problems are split over several blocks with a grid barrier: a cooperative
    launch. Source: ``cuda/layer_norm_backward.cu``, for long rows ``cuda/layer_norm_backward_cooperative.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 3.0, 2.0], [4.0, 5.0, 9.0]])
    >>> y, statistics = layer_norm_forward(x)
    >>> dx, dgamma, dbeta = layer_norm_backward(np.ones((2, 3)), x, None, None, statistics)
    >>> bool(abs(dx).max() < 1e-15), dbeta  # a shift of a whole row does not change its output
    (True, array([2., 2., 2.]))
    """
    call = BACKWARD_CALLS.replay(out, (dy, x, gamma, beta, statistics, workspace), axes, activation, alpha)
    if call.replayed:
        return out
    phi = activation_named(activation, alpha)
    dx, dgamma, dbeta = check.pack_outputs(out, ("dx", "dgamma", "dbeta"))
    axes = check.integer("axes", axes, 1)
    runtime, problem = BACKWARD.check(dx, dgamma, dbeta, workspace, dy, x, gamma, beta, statistics, options=(axes,))
    if dx is None:
        dx = empty(runtime, x.shape, x)
        dgamma, dbeta = (empty(runtime, x.shape[-axes:], x, problem.params_dtype) for _ in range(2))
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
    plan = choose_backward(problem, runtime.limits(x), not phi.is_piecewise_linear)
    own = workspace is None and (partials := partial_sums(plan))
    if own:
        workspace = empty(runtime, (partials * problem.columns,), x, problem.acc_dtype)
    names = "dy x gamma beta statistics dx dgamma dbeta partial".split()
    arrays = dy, x, gamma, beta, statistics, dx, dgamma, dbeta, workspace
    members = dict(zip(names, addresses(runtime, *arrays), strict=True))
    call.launch(runtime, *plan[:2], *_prepared(runtime, plan, problem, phi, members, x), x, replayable=not own)
    return dx, dgamma, dbeta


def _prepared(
    runtime: Runtime, plan: LaunchPlan, problem: Problem, phi: Activation, members: dict[str, Any], x: Any
) -> tuple[Launch, np.ndarray]:
    """Return the launch of a kernel that is compiled for this call, and its argument of `members` and what follows."""
    codes = _codes(plan, problem, phi, members)
    workspace = runtime.workspace(x) if plan.launch.cooperative else 0
    members = members | codes | {"rows": problem.rows, "columns": problem.columns, "alpha": phi.alpha}
    members |= {"half_share": 0.5 / problem.columns, "part": ceil_div(problem.vectors, plan.splits) * problem.count}
    members |= {"barrier_counter": barrier_counters(workspace), "exchange": workspace + PARTIALS}
    slope = {"alpha": int(phi.alpha)} if phi.is_piecewise_linear and phi.alpha in (0, 1) else {}
    launch = dataclasses.replace(plan.launch, constants=tuple((codes | slope).items()))
    return launch, pack(plan.arguments, *(members[name] for name in plan.arguments.names))


def _codes(plan: LaunchPlan, problem: Problem, phi: Activation, members: dict[str, Any]) -> dict[str, int]:
    """Return the last members of the argument, for whose values a kernel is compiled."""
    names, width = plan.arguments.names, plan.launch.block[0]
    by_vectors = [members[name] for name in ("dy", "x", "gamma", "beta", "y", "dx") if name in members]
    shape = problem.columns % problem.count == 0 and all(address % VECTOR == 0 for address in by_vectors)
    if shape and "width" in names and plan.held * width == problem.vectors:
        shape = FULL
    kind = IN_STORAGE_TYPE if problem.params_in_storage_type else IN_ACCUMULATOR_TYPE
    given = {"scaled": members["gamma"] and kind, "shifted": members["beta"] and kind}
    codes = {"activation": phi.code, "shape": int(shape), **given, "width": width, "held": plan.held}
    codes |= {"stages": plan.stages, "threads": plan.launch.threads, "at_once": plan.at_once}
    return {name: code for name, code in codes.items() if name in names}
