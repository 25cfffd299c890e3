"""A linear layer with batch norm, layer norm or a bias, and an activation behind it: each way one launch.

CuPy arrays run ``cuda/linear_batch_norm_*.cu``, up to 512 examples and 1024 inputs and outputs; beyond that, and on
NumPy arrays, a library multiplies and the ops of the norm follow. Without a norm NumPy arrays run ``cpu.py``, or
``reference.py`` where Numba is missing; their 16-bit data are multiplied in float32 copies. Below, N is the number of
examples, K that of the inputs and M that of the outputs; T is the data type of `x`, and A that of the accumulator:
float32 for 16-bit T, else T.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.linear_batch_norm import reference
from bnkernels.ops.linear_batch_norm.launch import choose
from bnkernels.ops.linear_batch_norm.problem import BACKWARD, FORWARD, GRADIENTS, check_norm, check_precision
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, addresses, empty, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.replay import ReplayCache
from bnkernels.runtime.seam import Runtime
from bnkernels.runtime.workspace import barrier_counters

FORWARD_CALLS, BACKWARD_CALLS = ReplayCache(), ReplayCache()
CPU = "bnkernels.ops.linear_batch_norm.cpu"
NEGLIGIBLE = 1e-30  # an eps that a variance of 1 does not notice


def linear_batch_norm_forward(
    x: Array,
    weight: AnyArray,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    running_mean: AnyArray | None = None,
    running_var: AnyArray | None = None,
    *,
    norm: str | None = "batch",
    momentum: float | None = 0.1,
    batches_before: int = 0,
    unbiased: bool = True,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    precision: str | None = None,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, Array, Any]:
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
        Norm between product and shift: batch norm, layer norm over the M outputs of each example, or none.
    momentum, batches_before, unbiased, eps : float or None, int, bool, float
        Options of `batch_norm_forward`.
    activation : str
        Activation behind the norm, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    precision : {"tf32x3", None}
        Arithmetic of the product: that of the data type, or of float32 data three products of TF32 numbers (3xTF32),
        on tensor cores.
    out : tuple of arrays, optional
        Arrays for ``(y, z, statistics)``, or without a norm ``(y, z)``; C order.

    Returns
    -------
    y : array, shape (N, M), type T
        The output.
    z : array, shape (N, M), type T
        The product, for the backward.
    statistics : array, shape (3, M), or (3, N) with layer norm, type A, or None
        Rows `mean`, `mean_low` and `rstd` of `z`, as in `batch_norm_forward` and `layer_norm_forward`; None
        without a norm.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, N is 1 with batch norm, or the device is older than `precision` needs; nothing is
        written then.

    See Also
    --------
    linear_batch_norm_backward : The gradients.
    fold_batch_norm : For inference: batch norm as part of the weights.

    Notes
    -----
    The results are those of a product followed by `batch_norm_forward` or `layer_norm_forward`, but for the order of
    sums. `z` is rounded to T before its statistics are taken. Source: ``cuda/linear_batch_norm_forward.cu``.

    ``precision="tf32x3"`` needs compute capability 8.0. Its error is about that of float32: see
    ``docs/fused_layers.md``. Where a library multiplies, as on NumPy arrays, it does so in float32.

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
    if momentum is None:
        momentum = check.cumulative(batches_before)
    given = x, weight, gamma, beta, running_mean, running_var
    call = FORWARD_CALLS.replay(out, given, norm, momentum, unbiased, eps, activation, alpha, precision)
    if call.replayed:
        return (*out, None)[:3]
    phi = activation_named(activation, alpha)
    momentum, unbiased = check.number("momentum", momentum, 0, 1), check.boolean("unbiased", unbiased)
    eps = check.epsilon(eps, x)
    check_norm(norm)
    check_precision(precision)
    y, z, statistics = (*check.pack_outputs(out, ("y", "z", "statistics")[: 3 if norm else 2]), None)[:3]
    arrays = (y, z, statistics, running_mean, running_var, x, weight, gamma, beta)
    runtime, problem = FORWARD.check(*arrays, options=(norm, precision))
    y, z = (empty(runtime, (problem.rows, problem.outputs), x) if array is None else array for array in (y, z))
    if norm and statistics is None:
        statistics = empty(runtime, problem.statistics_shape(norm), x, problem.acc_dtype)
    plan = None if runtime is None else choose("forward", problem, runtime.limits(x), True, norm, precision)
    if plan is None:
        numbers = {"eps": eps, "activation": activation, "alpha": alpha}
        if norm == "batch":
            numbers |= {"momentum": momentum, "unbiased": unbiased}
        work = partial(_forward_by_library, runtime, norm, phi, numbers)
        call.compute(work, (y, z, statistics, *given) if norm else (y, z, *given), replayable=runtime is None)
        return y, z, statistics
    pointers = addresses(runtime, x, weight, gamma, beta, z, y, statistics, running_mean, running_var)
    numbers = *problem[:3], plan.width, plan.stages, momentum, float(unbiased), eps, phi.alpha, phi.code
    call.launch(runtime, *plan[:3], pack(plan.arguments, *pointers, *numbers), x)
    return y, z, statistics


def linear_batch_norm_backward(
    dy: Array,
    x: Array,
    weight: AnyArray,
    gamma: AnyArray | None,
    beta: AnyArray | None,
    z: Array,
    statistics: AnyArray,
    *,
    norm: str | None = "batch",
    activation: str = "identity",
    alpha: float | None = None,
    input_gradient: bool = True,
    precision: str | None = None,
    workspace: AnyArray | None = None,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, Array, Any, Any]:
    """Return the gradients of `linear_batch_norm_forward`.

    Parameters
    ----------
    dy : array, shape (N, M), type T
        Gradient with respect to the output; C order. Never written.
    x, weight, gamma, beta : array, array, array or None, array or None
        Arguments of the forward.
    z, statistics : array, array or None
        Results of the forward.
    norm : {"batch", "layer", None}
        Norm of the forward. It may be left out if `statistics` is None: there was none.
    activation, alpha : str, float
        Arguments of the forward.
    input_gradient : bool
        True if `dx` is wanted; the first layer of a network does not need it.
    precision : {"tf32x3", None}
        Arithmetic of the two products, as in the forward, whose own may have been another.
    workspace : array, shape (N, M), type T, optional
        Memory for the gradient of `z`; by default it is allocated.
    out : tuple of arrays, optional
        Arrays for the gradients; C order. None where None is returned.

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
    TypeError, ValueError
        If an argument is wrong, or the device is older than `precision` needs; nothing is written then.

    Notes
    -----
    Where more than one block works on `dx`, a grid barrier precedes it: a cooperative launch. The gradient of `z` is
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
    written = out[1:] + out[:1] if type(out) is tuple else None  # dx may be None
    given = dy, x, weight, gamma, beta, z, statistics, workspace
    call = BACKWARD_CALLS.replay(written, given, norm, activation, alpha, input_gradient, precision)
    if call.replayed:
        return out
    phi = activation_named(activation, alpha)
    check_norm(norm)
    check_precision(precision)
    norm = None if statistics is None and norm == "batch" else norm
    wanted = (check.boolean("input_gradient", input_gradient), True, norm is not None, True)
    outputs = check.pack_wanted(out, GRADIENTS, wanted)
    arrays = (*outputs, workspace, dy, x, weight, gamma, beta, z, statistics)
    runtime, problem = BACKWARD.check(*arrays, options=(norm, precision))
    shapes = (x.shape, weight.shape, weight.shape[1:], weight.shape[1:])
    types = (x.dtype, x.dtype, problem.acc_dtype, problem.acc_dtype)
    dx, *others = outputs = tuple(
        empty(runtime, shape, x, dtype) if want and array is None else array
        for array, want, shape, dtype in zip(outputs, wanted, shapes, types, strict=True)
    )
    chosen = input_gradient, norm, precision
    plan = None if runtime is None else choose("backward", problem, runtime.limits(x), *chosen)
    if plan is None:
        work = partial(_backward_by_library, runtime, norm, phi, {"activation": activation, "alpha": alpha})
        call.compute(work, (*others, dx, *given), replayable=runtime is None)
        return outputs
    dz = empty(runtime, z.shape, z) if workspace is None else workspace
    counter = barrier_counters(runtime.workspace(x)) if plan.launch.cooperative else 0
    pointers = addresses(runtime, dy, x, weight, gamma, beta, z, statistics, *outputs, dz)
    numbers = *problem[:3], plan.width, plan.stages, phi.alpha, phi.code
    arguments = pack(plan.arguments, *pointers, counter, *numbers)
    call.launch(runtime, *plan[:3], arguments, x, replayable=workspace is not None)
    return outputs


def on_cpu() -> ModuleType:
    """Return the module that adds biases, activates and converts NumPy arrays."""
    return kernels(CPU) or reference


def _forward_by_library(
    runtime: Runtime | None, norm: str | None, phi: Activation, options: dict[str, Any], arrays: tuple
) -> None:
    """Multiply by a library, and call the op of the norm."""
    y, z, *statistics, x, weight, gamma, beta, running_mean, running_var = arrays
    multiply(runtime, x, weight, z)
    if norm == "batch":
        batch_norm_forward(z, gamma, beta, running_mean, running_var, **options, out=(y, *statistics))
    elif norm == "layer":
        layer_norm_forward(z, gamma, beta, **options, out=(y, *statistics))
    elif runtime is None:
        on_cpu().forward(z, beta, phi, y)
    else:
        running = _no_statistics(runtime, z)
        batch_norm_inference(z, None, beta, *running, **options | {"eps": NEGLIGIBLE}, out=y)


def _backward_by_library(
    runtime: Runtime | None, norm: str | None, phi: Activation, options: dict[str, Any], arrays: tuple
) -> None:
    """Call the op of the norm, and multiply by a library."""
    dweight, dgamma, dbeta, dx, dy, x, weight, gamma, beta, z, statistics, workspace = arrays
    dz = empty(runtime, z.shape, z) if workspace is None else workspace
    if norm == "batch":
        batch_norm_backward(dy, z, gamma, beta, statistics, **options, out=(dz, dgamma, dbeta))
    elif norm == "layer":
        layer_norm_backward(dy, z, gamma, beta, statistics, **options, out=(dz, dgamma, dbeta))
    elif runtime is None:
        on_cpu().backward(dy, z, beta, phi, dz, dbeta)
    else:
        unused, running = empty(runtime, dbeta.shape, dbeta), _no_statistics(runtime, z)
        options = options | {"eps": NEGLIGIBLE, "out": (dz, unused, dbeta)}
        batch_norm_inference_backward(dy, z, None, beta, *running, **options)
    multiply(runtime, x.T, dz, dweight)
    if dx is not None:
        multiply(runtime, dz, weight.T, dx)


@np.errstate(all="ignore")  # kernels have no warnings either
def multiply(runtime: Runtime | None, a: Any, b: Any, out: Any) -> None:
    """Write the product, summed in the accumulator's type."""
    xp = np if runtime is None else runtime.xp
    if a.dtype.itemsize > 2 or (runtime is not None and a.dtype == np.float16):  # cuBLAS sums float16 in float32
        xp.matmul(a, b, out=out)
    elif runtime is None:
        cpu = on_cpu()
        cpu.round_into(np.matmul(cpu.single(a), cpu.single(b)), out)
    else:
        out[...] = xp.matmul(a.astype(np.float32), b.astype(np.float32)).astype(out.dtype)


def _no_statistics(runtime: Runtime, z: Any) -> tuple[Any, Any]:
    """Return a mean of 0 and a variance of 1."""
    mean, var = (empty(runtime, z.shape[1:], z, accumulator(z.dtype)) for _ in range(2))
    mean[...], var[...] = 0, 1
    return mean, var
