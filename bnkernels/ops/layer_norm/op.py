"""Layer normalisation of every example over its features: forward and backward ops, one launch each.

CuPy arrays run ``cuda/layer_norm_forward.cu`` and ``_backward.cu``, NumPy arrays their twins. Below, C is the length of
the last axis, over which is normalised; T is the data type of `x`, and A that of the accumulator: float32 for 16-bit T,
else T.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.layer_norm.launch import MOST_PARTIALS, VECTOR, Choice, Rows, choose_backward, choose_forward
from bnkernels.ops.layer_norm.reference import backward_numpy, forward_numpy
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap, registry
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import accumulator, addresses, arguments_type, empty, pack, suffix
from bnkernels.runtime.workspace import counters

ARGUMENTS = {
    "forward": arguments_type("x gamma beta y statistics", "rows columns", "eps alpha", "activation aligned16 held"),
    "backward": arguments_type(
        "dy x gamma beta statistics dx dgamma dbeta partial barrier_counter",
        "rows columns chunk",
        "alpha",
        "activation aligned16 held",
    ),
}
FORWARD_NAMES = ("y", "statistics", "x", "gamma", "beta")
BACKWARD_NAMES = ("dx", "dgamma", "dbeta", "workspace", "dy", "x", "gamma", "beta", "statistics")


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
        Added to the variance, in the units of ``x**2``: at least the smallest normal number of type A, for a constant
        row has the variance 0.
    activation : str
        What follows: one of `bnkernels.ops.activations.ACTIVATIONS`.
    alpha : float, optional
        Of the activation, as in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Where to write ``(y, statistics)``; C order. `y` may be `x` itself, for who needs no backward.

    Returns
    -------
    y : array, shape (..., C), type T
        ``phi(gamma * (x - mean) * rstd + beta)``.
    statistics : array, shape (3, ...), type A
        ``mean``, ``mean_low`` (what `mean` loses by rounding) and ``rstd``, which is ``1 / sqrt(var + eps)``, of every
        example; for the backward.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Notes
    -----
    The same in training and in inference. Variances are biased, over C. Source: ``cuda/layer_norm_forward.cu``.

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
    phi, eps = activation_named(activation, alpha), check.epsilon(eps, x)
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    arrays = (y, statistics, x, gamma, beta)
    runtime, matrix = _checked_forward(*check.signatures(arrays))
    overlap.check_outputs(runtime, FORWARD_NAMES, arrays, written=2, in_place=("x",))
    if y is None:
        y = empty(runtime, x.shape, x)
        statistics = empty(runtime, (3, *x.shape[:-1]), x, accumulator(x.dtype))
    if runtime is not None:
        check.one_device(runtime, FORWARD_NAMES, arrays)
    if matrix.rows == 0:
        return y, statistics
    if runtime is None:
        forward_numpy(_matrix(x), gamma, beta, eps, phi, _matrix(y), statistics.reshape(3, -1))
        return y, statistics
    chosen = choose_forward(matrix, runtime.limits(x))
    pointers = addresses(runtime, x, gamma, beta, y, statistics)
    _launch(runtime, "forward", matrix, chosen, pointers, pointers[:4], (eps,), phi, x)
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
        As in the forward.
    statistics : array, shape (3, ...), type A
        What the forward returned.
    activation, alpha : str, float
        As in the forward.
    workspace : array, shape (W,), type A, optional
        Where blocks may leave partial sums: W of at least 512 C. By default it is allocated where it is needed.
    out : tuple of three arrays, optional
        Where to write ``(dx, dgamma, dbeta)``; C order. `dx` may be `dy` itself.

    Returns
    -------
    dx : array, shape (..., C), type T
        Gradient with respect to `x`.
    dgamma, dbeta : array, shape (C,), type A
        Gradients with respect to scale and shift.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Notes
    -----
    One launch. Sums over the examples go through several blocks, which wait for one another (a cooperative launch)
    where there is more to do than for one. Deterministic. Source: ``cuda/layer_norm_backward.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 3.0, 2.0], [4.0, 5.0, 9.0]])
    >>> y, statistics = layer_norm_forward(x)
    >>> dx, dgamma, dbeta = layer_norm_backward(np.ones((2, 3)), x, None, None, statistics)
    >>> bool(abs(dx).max() < 1e-15), dbeta  # a shift of a whole row does not change its output
    (True, array([2., 2., 2.]))
    """
    phi = activation_named(activation, alpha)
    dx, dgamma, dbeta = check.pack_outputs(out, ("dx", "dgamma", "dbeta"))
    arrays = (dx, dgamma, dbeta, workspace, dy, x, gamma, beta, statistics)
    runtime, matrix = _checked_backward(*check.signatures(arrays))
    overlap.check_outputs(runtime, BACKWARD_NAMES, arrays, written=4, in_place=("dy",))
    kind = accumulator(x.dtype)
    if dx is None:
        dx = empty(runtime, x.shape, x)
        dgamma, dbeta = (empty(runtime, x.shape[-1:], x, kind) for _ in range(2))
    if runtime is not None:
        check.one_device(runtime, BACKWARD_NAMES, arrays)
    if matrix.rows == 0:
        dgamma[...], dbeta[...] = 0, 0
        return dx, dgamma, dbeta
    if runtime is None:
        flat = statistics.reshape(3, -1)
        backward_numpy(_matrix(dy), _matrix(x), gamma, beta, flat, phi, _matrix(dx), dgamma, dbeta)
        return dx, dgamma, dbeta
    chosen = choose_backward(matrix, runtime.limits(x))
    blocks, arrivals = chosen.launch.grid[0], 0
    if blocks > 1:
        arrivals = counters(runtime.workspace(x))
        if workspace is None:
            workspace = empty(runtime, (2 * blocks * matrix.columns,), x, kind)
    pointers = addresses(runtime, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, workspace)
    moved = (*pointers[:4], pointers[5])
    _launch(runtime, "backward", matrix, chosen, (*pointers, arrivals), moved, (), phi, x)
    return dx, dgamma, dbeta


def _launch(
    runtime: rt.Runtime,
    direction: str,
    matrix: Rows,
    chosen: Choice,
    pointers: tuple[int, ...],
    moved: tuple[int, ...],
    scalars: tuple[float, ...],
    phi: Activation,
    like: Any,
) -> None:
    """Launch the kernel of a direction; `moved` are the addresses of what goes by units."""
    wide = matrix.columns % matrix.count == 0 and all(address % VECTOR == 0 for address in moved)
    chunk = (chosen.chunk,) if direction == "backward" else ()
    codes = phi.alpha, phi.code, wide, chosen.held
    layout = ARGUMENTS[direction][accumulator(matrix.dtype)]
    record = pack(layout, *pointers, matrix.rows, matrix.columns, *chunk, *scalars, *codes)
    stem = f"layer_norm_{direction}"
    runtime.launch(stem, f"bnk_{stem}_{suffix(matrix.dtype)}", chosen.launch, record, like)


def _matrix(array: np.ndarray) -> np.ndarray:
    """Return a view (rows, C) of a C-ordered array."""
    return array.reshape(-1, array.shape[-1])


@lru_cache(maxsize=1024)
def _checked_forward(*signatures: check.Signature | None) -> tuple[rt.Runtime | None, Rows]:
    """Check the arrays of `FORWARD_NAMES`; return who runs them, and the sizes."""
    optional = ("y", "statistics", "gamma", "beta")
    args = check.arguments(dict(zip(FORWARD_NAMES, signatures, strict=True)), optional, written=2)
    matrix = _checked_rows(args)
    check.contiguous(args["y"], args["x"].shape, matrix.dtype)
    return registry.runtime_of(args["x"].kind), matrix


@lru_cache(maxsize=1024)
def _checked_backward(*signatures: check.Signature | None) -> tuple[rt.Runtime | None, Rows]:
    """Check the arrays of `BACKWARD_NAMES`; return who runs them, and the sizes."""
    optional = ("dx", "dgamma", "dbeta", "workspace", "gamma", "beta")
    args = check.arguments(dict(zip(BACKWARD_NAMES, signatures, strict=True)), optional, written=4)
    matrix, workspace = _checked_rows(args), args["workspace"]
    for name in ("dx", "dy"):
        check.contiguous(args[name], args["x"].shape, matrix.dtype)
    for name in ("dgamma", "dbeta"):
        check.contiguous(args[name], (matrix.columns,), accumulator(matrix.dtype))
    if workspace is not None:
        if len(workspace.shape) != 1 or workspace.shape[0] < MOST_PARTIALS * matrix.columns:
            wanted = MOST_PARTIALS * matrix.columns
            raise ValueError(f"workspace must have one axis of at least {wanted} numbers, got {workspace.shape}")
        check.contiguous(workspace, workspace.shape, accumulator(matrix.dtype))
    return registry.runtime_of(args["x"].kind), matrix


def _checked_rows(args: dict[str, check.Argument | None]) -> Rows:
    """Check x, gamma, beta and statistics; return the sizes."""
    x = args["x"]
    check.floating(x)
    if not x.shape or x.shape[-1] == 0:
        raise ValueError(f"x must have the shape (..., C), C at least 1, got {x.shape}: there is nothing to normalise")
    check.contiguous(x, x.shape, x.dtype)
    for name in ("gamma", "beta"):
        check.contiguous(args[name], x.shape[-1:], accumulator(x.dtype))
    check.contiguous(args["statistics"], (3, *x.shape[:-1]), accumulator(x.dtype))
    return Rows(math.prod(x.shape[:-1]), x.shape[-1], x.dtype)
