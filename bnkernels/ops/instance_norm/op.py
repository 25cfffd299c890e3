"""Instance normalisation: every channel of every example over its positions; forward and backward, one launch each.

It is batch norm whose mini-batches are the examples: `batch_norm_forward` with ``grouped=True``, by the kernels
``cuda/batch_norm_*.cu``. C is the number of channels, ``x.shape[axis]``. Inputs of the shape of `x` may have any
strides.
"""

from __future__ import annotations

from typing import Any

from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import AnyArray, Array


def instance_norm_forward(
    x: Array,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    residual: Array | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    mask: AnyArray | None = None,
    out: tuple[Array, AnyArray] | None = None,
) -> tuple[Array, Any]:
    """Normalise every channel of every example over its positions, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, C, L), (N, C, H, W), ..., float16, bfloat16, float32 or float64
        Examples, of two positions at least. Never written.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`, optional
        Scale and shift; without them 1 and 0.
    axis : int
        Axis of the channels: 1, or -1 where they come last; not 0, the axis of the examples.
    eps : float
        Number added to the variance, in the units of ``x**2``, as in `batch_norm_forward`.
    residual : array, shape and dtype of `x`, optional
        Array added before the activation. Never written.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation, as in `batch_norm_forward`.
    mask : array of bool, the shape of `x` without its channels, or of the first axes of that, optional
        Mask, True where a value counts, as in `batch_norm_forward`.
    out : tuple of two arrays, optional
        Arrays to write `y` (which may be `x` or `residual` itself) and `statistics` to; C order.

    Returns
    -------
    y : array, shape and dtype of `x`, C order
        The output.
    statistics : array, shape (N, 3, C), float32, or float64 for float64 `x`
        Rows `mean`, `mean_low` and `rstd` of every example, as in `batch_norm_forward`; for the backward.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, there is one position, or arrays overlap.

    See Also
    --------
    batch_norm_forward : The same with the examples of a mini-batch together.

    Notes
    -----
    Training and inference are the same: there are no running statistics. Variances are biased. Source:
    ``cuda/batch_norm_forward.cu``, for large tensors ``cuda/batch_norm_forward_cooperative.cu``.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
       Stylization", 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[1.0, 3.0], [5.0, 5.0]]])  # an example of two channels
    >>> y, statistics = instance_norm_forward(x, eps=0.25)
    >>> y.round(3)
    array([[[-0.894,  0.894],
            [ 0.   ,  0.   ]]])
    >>> statistics[0, 0]
    array([2., 5.])
    """
    shape = getattr(x, "shape", ())
    of_example = _axis(shape, axis)
    if mask is None and len(shape) > 2 and shape[0] and x.size == shape[0] * shape[axis]:
        raise ValueError(f"x has the shape {shape}: one position has no variance; pass two positions at least")
    options = {"axis": of_example, "residual": residual, "activation": activation, "alpha": alpha, "mask": mask}
    return batch_norm_forward(x, gamma, beta, eps=eps, **options, grouped=True, out=out)


def instance_norm_backward(
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
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of `instance_norm_forward`.

    Parameters
    ----------
    dy : array, shape and dtype of `x`
        Gradient with respect to the output. Never written.
    x : array, float16, bfloat16, float32 or float64
        Input of the forward.
    gamma, beta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`; or None
        As in the forward.
    statistics : array, shape (N, 3, C), float32, or float64 for float64 `x`
        Statistics that the forward returned.
    axis, residual, activation, alpha, mask : int, array, str, float, array
        As in the forward.
    out : tuple of arrays, optional
        Arrays to write what is returned to; C order. `dx` may be `dy`, `x` or `residual` itself.

    Returns
    -------
    dx : array, shape and dtype of `x`
        Gradient with respect to `x`; its sum over each channel of an example is 0.
    dgamma, dbeta : array, shape (C,), float32, or float64 for float64 `x`, or dtype of `x`
        Gradients with respect to `gamma` and `beta`, also where those are None: sums over the examples.
    dresidual : array, shape and dtype of `x`
        Gradient with respect to `residual`; only where that is given.

    Raises
    ------
    TypeError
        If a container or data type is wrong, or NumPy and CuPy arrays are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Notes
    -----
    One launch, deterministic. Source: ``cuda/batch_norm_backward.cu``, for large tensors
    ``cuda/batch_norm_backward_cooperative.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[1.0, 3.0, 2.0], [4.0, 5.0, 9.0]]])
    >>> y, statistics = instance_norm_forward(x)
    >>> dx, dgamma, dbeta = instance_norm_backward(np.ones((1, 2, 3)), x, None, None, statistics)
    >>> bool(abs(dx).max() < 1e-15), dbeta  # a shift of a whole channel does not change its output
    (True, array([3., 3.]))
    """
    of_example = _axis(getattr(x, "shape", ()), axis)
    options = {"axis": of_example, "residual": residual, "activation": activation, "alpha": alpha, "mask": mask}
    return batch_norm_backward(dy, x, gamma, beta, statistics, **options, grouped=True, out=out)


def _axis(shape: tuple[int, ...], axis: int) -> int:
    """Return the axis of the channels within an example. What is no array has no shape: the op below says so."""
    axis, last = check.integer("axis", axis), len(shape) - 1
    if not shape:
        return axis
    if last < 2:
        raise ValueError(f"x must have the shape (N, C, ...) or (N, ..., C), with positions, got {shape}")
    if not -last <= axis <= last or axis == 0:
        raise ValueError(
            f"axis must be from 1 to {last}, or from {-last} to -1, for x of the shape {shape}, got {axis}"
        )
    return axis - 1 if axis > 0 else axis
