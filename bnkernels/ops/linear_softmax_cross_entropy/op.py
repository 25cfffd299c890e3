"""The last layer of a classifier with its loss: product, bias, softmax cross-entropy and all gradients in one launch.

CuPy arrays run ``cuda/linear_softmax_cross_entropy.cu``, up to 512 examples and 1024 inputs and classes; beyond that,
and on NumPy arrays, a library multiplies around `softmax_cross_entropy`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.linear_batch_norm.op import on_cpu
from bnkernels.ops.linear_softmax_cross_entropy.launch import choose
from bnkernels.ops.softmax_cross_entropy.op import check_labels, softmax_cross_entropy
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import addresses, empty, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import ReplayCache
from bnkernels.runtime.seam import Runtime
from bnkernels.runtime.workspace import barrier_counters

CALLS = ReplayCache()
OUTPUTS = ("loss", "dx", "dweight", "dbias")
IDENTITY = activation_named("identity")


def _sizes(args: dict[str, check.Argument | None]) -> tuple[int, int, int]:
    """Check all arrays; return the numbers of examples, inputs and classes."""
    x, weight, labels = args["x"], args["weight"], args["labels"]
    check.float32_or_float64(x)
    if len(x.shape) != 2:
        raise ValueError(f"x must have the shape (N, K), got {x.shape}; reshape it to two dimensions")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have the shape (K, M), got {weight.shape}")
    (rows, inputs), outputs = x.shape, weight.shape[1]
    check.contiguous(x, x.shape, x.dtype)
    check.contiguous(weight, (inputs, outputs), x.dtype)
    check_labels(labels, rows)
    if rows and not outputs:
        raise ValueError(f"weight has the shape {weight.shape}: there is no class to be right")
    shapes = {"bias": (outputs,), "loss": (rows,), "dx": (rows, inputs), "dweight": (inputs, outputs)}
    for name, shape in (shapes | {"dbias": (outputs,), "workspace": (rows, outputs)}).items():
        check.contiguous(args[name], shape, x.dtype)
    return rows, inputs, outputs


OPERANDS = Operands(
    *("loss dx dweight dbias workspace", "x weight bias labels", _sizes),
    optional="loss dx dweight dbias workspace bias",
)


def linear_softmax_cross_entropy(
    x: Array,
    weight: Array,
    bias: Array | None,
    labels: AnyArray,
    *,
    input_gradient: bool = True,
    workspace: Array | None = None,
    out: tuple[Array, ...] | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Return the loss of every example and the gradients of the mean loss, for ``logits = x @ weight + bias``.

    Parameters
    ----------
    x : array, shape (N, K), float32 or float64
        Inputs, the output of the layer before; C order. Never written.
    weight : array, shape (K, M), dtype of `x`
        The weights; C order.
    bias : array, shape (M,), dtype of `x`, or None
        The biases; None: zeros.
    labels : array, shape (N,), int32 or int64
        Classes of the examples, from 0 to M - 1; contiguous.
    input_gradient : bool
        True if `dx` is wanted; a network of one layer does not need it.
    workspace : array, shape (N, M), dtype of `x`, optional
        Memory for the gradient of the logits, which it has afterwards; by default it is allocated.
    out : tuple of arrays, optional
        Arrays for the results; C order. None where None is returned.

    Returns
    -------
    loss : array, shape (N,), dtype of `x`
        ``-log(softmax(logits))`` of the right class, in nats.
    dx : array, shape (N, K), dtype of `x`, or None
        Gradient of ``loss.mean()`` with respect to `x`, where it is wanted.
    dweight : array, shape (K, M), dtype of `x`
        Gradient with respect to `weight`.
    dbias : array, shape (M,), dtype of `x`
        Gradient with respect to `bias`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or, for NumPy arrays, a label is out of range; no result is written then.

    See Also
    --------
    softmax_cross_entropy : The loss alone.

    Notes
    -----
    The results are those of a product, `softmax_cross_entropy` and two more products, but for the order of sums. On a
    GPU a label out of range gives NaN in its example's loss and `dx`, and so in `dweight` and `dbias`. Where more than
    one block works, a grid barrier precedes `dweight`: a cooperative launch. Source:
    ``cuda/linear_softmax_cross_entropy.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight, bias = np.array([[1.0]]), np.zeros((1, 2)), np.zeros(2)
    >>> loss, dx, dweight, dbias = linear_softmax_cross_entropy(x, weight, bias, np.array([1]))
    >>> loss, dweight
    (array([0.69314718]), array([[ 0.5, -0.5]]))
    """
    given = x, weight, bias, labels, workspace
    call = CALLS.replay(out, given, input_gradient)
    if call.replayed:
        return out
    wanted = True, check.boolean("input_gradient", input_gradient), True, True
    packed = check.pack_wanted(out, OUTPUTS, wanted)
    runtime, sizes = OPERANDS.check(*packed, workspace, x, weight, bias, labels)
    shapes = x.shape[:1], x.shape, weight.shape, weight.shape[1:]
    results = tuple(
        empty(runtime, shape, x) if want and array is None else array
        for array, want, shape in zip(packed, wanted, shapes, strict=True)
    )
    plan = None if runtime is None else choose(*sizes, x.dtype, labels.dtype, runtime.limits(x))
    if plan is None:
        call.compute(partial(_by_library, runtime), (*results, *given), replayable=runtime is None)
        return results
    dlogits = empty(runtime, (sizes[0], sizes[2]), x) if workspace is None else workspace
    counter = barrier_counters(runtime.workspace(x)) if plan.launch.cooperative else 0
    pointers = addresses(runtime, x, weight, bias, labels, *results, dlogits)
    arguments = pack(plan.arguments, *pointers, counter, *sizes, plan.width, plan.stages)
    call.launch(runtime, *plan[:3], arguments, x, replayable=workspace is not None)
    return results


@np.errstate(all="ignore")  # kernels have no warnings either
def _by_library(runtime: Runtime | None, arrays: tuple) -> None:
    """Multiply by a library, and call the op of the loss."""
    loss, dx, dweight, dbias, x, weight, bias, labels, workspace = arrays
    xp = np if runtime is None else runtime.xp
    logits = empty(runtime, (len(x), weight.shape[1]), x) if workspace is None else workspace
    xp.matmul(x, weight, out=logits)
    if bias is not None:
        logits += bias
    _, dlogits = softmax_cross_entropy(logits, labels, out=(loss, logits))
    xp.matmul(x.T, dlogits, out=dweight)
    if dx is not None:
        xp.matmul(dlogits, weight.T, out=dx)
    if runtime is None:
        on_cpu().backward(dlogits, dlogits, None, IDENTITY, None, dbias)
    else:
        dlogits.sum(axis=0, out=dbias)
