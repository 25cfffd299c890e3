"""A linear layer with batch norm, layer norm or a bias, and an activation behind it: each way one launch.

CuPy arrays run ``cuda/linear_batch_norm_forward.cu`` and ``_backward.cu``, up to 512 examples and 1024 inputs and
outputs; beyond that, and on NumPy arrays, a library multiplies and the ops of the norm follow.
``launch.py`` chooses. Below, N is the number of examples, K that of the inputs and M that of the
outputs; T is the data type of `x`, and A that of the accumulator: float32 for 16-bit T, else T.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.batch_norm import call as plans
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.linear_batch_norm.check import (
    BACKWARD_NAMES,
    FORWARD_NAMES,
    check_norm,
    checked_backward,
    checked_forward,
    pack_gradients,
    statistics_shape,
)
from bnkernels.ops.linear_batch_norm.launch import Sizes, choose
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import accumulator, addresses, arguments_type, empty, pack, suffix
from bnkernels.runtime.workspace import counters

NOTHING = 1e-30  # an eps that a variance of 1 does not notice
SIZES = "rows inputs outputs width"
ARGUMENTS = {
    "forward": arguments_type(
        "x weight gamma beta z y statistics running_mean running_var",
        SIZES,
        "momentum correction eps alpha",
        "activation",
    ),
    "backward": arguments_type(
        "dy x weight gamma beta z statistics dx dweight dgamma dbeta dz barrier_counter", SIZES, "alpha", "activation"
    ),
}


def linear_batch_norm_forward(
    x: Any,
    weight: Any,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    norm: str | None = "batch",
    momentum: float = 0.1,
    unbiased: bool = True,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, Any, Any]:
    """Multiply by the weights, normalise every neuron over the mini-batch or every example, scale, shift and activate.

    Parameters
    ----------
    x : array, shape (N, K), type T
        The mini-batch; C order. Never written.
    weight : array, shape (K, M), type T
        The weights; C order.
    gamma, beta : array, shape (M,), type A, optional
        Scale and shift; without them 1 and 0. Without a norm, `beta` is the bias and there is no `gamma`.
    running_mean, running_var : array, shape (M,), type A, optional
        Running statistics, updated in place; only with batch norm.
    norm : {"batch", "layer", None}
        What stands between product and shift: batch norm, layer norm over the M outputs of each example, or nothing.
    momentum, unbiased, eps : float, bool, float
        As in `batch_norm_forward`.
    activation : str
        What follows, as in `batch_norm_forward`.
    alpha : float, optional
        Of the activation.
    out : tuple of arrays, optional
        Where to write ``(y, z, statistics)``, or without a norm ``(y, z)``; C order.

    Returns
    -------
    y : array, shape (N, M), type T
        The output.
    z : array, shape (N, M), type T
        The product, for the backward.
    statistics : array, shape (3, M), or (3, N) with layer norm, type A, or None
        Its rows are `mean`, `mean_low` and `rstd` of `z`, as in `batch_norm_forward` and `layer_norm_forward`; None
        without a norm.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, N is 1 with batch norm, or arrays overlap.

    See Also
    --------
    linear_batch_norm_backward : The gradients.
    fold_batch_norm : For inference: batch norm as part of the weights.

    Notes
    -----
    The results are those of a product followed by `batch_norm_forward` or `layer_norm_forward`, but for the order of
    sums. `z` is rounded to T before its statistics are taken. Source: ``cuda/linear_batch_norm_forward.cu``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.2: the bias of a layer in
       front of a batch norm has no effect.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[3.0], [1.0]])
    >>> y, z, statistics = linear_batch_norm_forward(x, weight)
    >>> z.T, y.T.round(3)
    (array([[3., 1.]]), array([[ 1., -1.]]))
    """
    phi = activation_named(activation, alpha)
    momentum, unbiased = check.number("momentum", momentum, 0, 1), check.boolean("unbiased", unbiased)
    eps = check.epsilon(eps, x)
    check_norm(norm)
    y, z, statistics = (*check.pack_outputs(out, ("y", "z", "statistics")[: 3 if norm else 2]), None)[:3]
    arrays = (y, z, statistics, running_mean, running_var, x, weight, gamma, beta)
    runtime, sizes, plan = checked_forward(norm, *check.signatures(arrays))
    overlap.check_outputs(runtime, FORWARD_NAMES, arrays, written=5)
    y, z = (empty(runtime, (sizes.rows, sizes.outputs), x) if array is None else array for array in (y, z))
    if norm and statistics is None:
        statistics = empty(runtime, statistics_shape(norm, sizes), x, accumulator(x.dtype))
    chosen = None
    if runtime is not None:
        check.one_device(runtime, FORWARD_NAMES, arrays)
        chosen = choose("forward", sizes, runtime.limits(x), norm=norm)
    if chosen is None:
        _multiply(runtime, x, weight, z)
        options = {"activation": activation, "alpha": alpha}
        if norm == "batch":
            behind = (y, statistics, running_mean, running_var, z, None, gamma, beta)
            plans.run_forward(plan, behind, momentum, eps, phi, unbiased)
        elif norm == "layer":
            layer_norm_forward(z, gamma, beta, eps=eps, out=(y, statistics), **options)
        else:
            batch_norm_inference(z, None, beta, *_no_statistics(runtime, x, sizes), eps=NOTHING, out=y, **options)
        return y, z, statistics
    pointers = addresses(runtime, x, weight, gamma, beta, z, y, statistics, running_mean, running_var)
    _launch(runtime, "forward", norm, sizes, chosen, pointers, (momentum, float(unbiased), eps), phi, x)
    return y, z, statistics


def linear_batch_norm_backward(
    dy: Any,
    x: Any,
    weight: Any,
    gamma: Any,
    beta: Any,
    z: Any,
    statistics: Any,
    *,
    norm: str | None = "batch",
    activation: str = "identity",
    alpha: float | None = None,
    input_gradient: bool = True,
    workspace: Any = None,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Return the gradients of `linear_batch_norm_forward`.

    Parameters
    ----------
    dy : array, shape (N, M), type T
        Gradient with respect to the output; C order. Never written.
    x, weight, gamma, beta : array, array, array or None, array or None
        As in the forward.
    z, statistics : array, array or None
        What the forward returned.
    norm : {"batch", "layer", None}
        As in the forward. Without statistics it may be left out: there is none.
    activation, alpha : str, float
        As in the forward.
    input_gradient : bool
        Whether `dx` is wanted; the first layer of a network does not need it.
    workspace : array, shape (N, M), type T, optional
        Where the gradient of `z` may be kept; by default it is allocated.
    out : tuple of arrays, optional
        Where to write what is returned; C order. None where None is returned.

    Returns
    -------
    dx : array, shape (N, K), type T, or None
        Gradient with respect to `x`, where it is wanted.
    dweight : array, shape (K, M), type T
        Gradient with respect to `weight`.
    dgamma : array, shape (M,), type A, or None
        Gradient with respect to `gamma`; None without a norm.
    dbeta : array, shape (M,), type A
        Gradient with respect to `beta`.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Notes
    -----
    Where more than one block works on `dx` they wait for one another: a cooperative launch. The gradient of `z` is
    rounded to T before it is multiplied. Source: ``cuda/linear_batch_norm_backward.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([[3.0], [1.0]])
    >>> y, z, statistics = linear_batch_norm_forward(x, weight)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dgamma, dbeta = linear_batch_norm_backward(dy, x, weight, None, None, z, statistics)
    >>> dx.shape, dweight.shape, dbeta
    ((3, 2), (2, 1), array([1.]))
    """
    phi = activation_named(activation, alpha)
    check_norm(norm)
    norm = None if statistics is None and norm == "batch" else norm
    wanted = (check.boolean("input_gradient", input_gradient), True, norm is not None, True)
    outputs = pack_gradients(out, wanted)
    arrays = (*outputs, workspace, dy, x, weight, gamma, beta, z, statistics)
    runtime, sizes, plan = checked_backward(norm, *check.signatures(arrays))
    overlap.check_outputs(runtime, BACKWARD_NAMES, arrays, written=5)
    shapes = (x.shape, weight.shape, weight.shape[1:], weight.shape[1:])
    types = (x.dtype, x.dtype, *[accumulator(x.dtype)] * 2)
    dx, dweight, dgamma, dbeta = outputs = tuple(
        empty(runtime, shape, x, dtype) if want and array is None else array
        for array, want, shape, dtype in zip(outputs, wanted, shapes, types, strict=True)
    )
    dz = empty(runtime, z.shape, z) if workspace is None else workspace
    chosen = None
    if runtime is not None:
        check.one_device(runtime, BACKWARD_NAMES, arrays)
        chosen = choose("backward", sizes, runtime.limits(x), input_gradient, norm)
    if chosen is None:
        options = {"activation": activation, "alpha": alpha}
        if norm == "batch":
            behind = (dz, dgamma, dbeta, None, dy, z, None, gamma, beta, statistics, None, None)
            plans.run_backward(plan, behind, 0.0, phi)
        elif norm == "layer":
            layer_norm_backward(dy, z, gamma, beta, statistics, out=(dz, dgamma, dbeta), **options)
        else:
            unused, running = empty(runtime, dbeta.shape, dbeta), _no_statistics(runtime, x, sizes)
            batch_norm_inference_backward(dy, z, None, beta, *running, eps=NOTHING, out=(dz, unused, dbeta), **options)
        _multiply(runtime, x.T, dz, dweight)
        if input_gradient:
            _multiply(runtime, dz, weight.T, dx)
        return outputs
    arrivals = counters(runtime.workspace(x)) if chosen[0].cooperative else 0
    pointers = addresses(runtime, dy, x, weight, gamma, beta, z, statistics, *outputs, dz)
    _launch(runtime, "backward", norm, sizes, chosen, (*pointers, arrivals), (), phi, x)
    return outputs


def _launch(
    runtime: rt.Runtime,
    direction: str,
    norm: str | None,
    sizes: Sizes,
    chosen: tuple[rt.Launch, int],
    pointers: tuple[int, ...],
    scalars: tuple[float, ...],
    phi: Activation,
    like: Any,
) -> None:
    layout = ARGUMENTS[direction][accumulator(sizes.dtype)]
    record = pack(layout, *pointers, *sizes[:3], chosen[1], *scalars, phi.alpha, phi.code)
    name = f"bnk_linear_{norm or 'batch'}_norm_{direction}_{suffix(sizes.dtype)}"
    runtime.launch(f"linear_batch_norm_{direction}", name, chosen[0], record, like)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def _multiply(runtime: rt.Runtime | None, a: Any, b: Any, out: Any) -> None:
    """Write the product, summed in the accumulator's type."""
    xp = np if runtime is None else runtime.xp
    if a.dtype.itemsize > 2 or (xp is not np and a.dtype == np.float16):  # cuBLAS sums float16 in float32
        xp.matmul(a, b, out=out)
        return
    out[...] = xp.matmul(a.astype(np.float32), b.astype(np.float32)).astype(out.dtype)


def _no_statistics(runtime: rt.Runtime | None, x: Any, sizes: Sizes) -> tuple[Any, Any]:
    """Return a mean of 0 and a variance of 1."""
    mean, var = (empty(runtime, (sizes.outputs,), x, accumulator(x.dtype)) for _ in range(2))
    mean[...], var[...] = 0, 1
    return mean, var
