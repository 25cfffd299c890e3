"""Softmax cross-entropy: the loss of every example and the gradient of their mean, in one launch."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.softmax_cross_entropy import reference
from bnkernels.runtime import checks as check
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import SUFFIX, addresses, arguments_type, empty, pack
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import ReplayCache

ARGUMENTS = arguments_type("logits labels loss dlogits", "rows classes", "", "")
CPU = "bnkernels.ops.softmax_cross_entropy.cpu"
LABELS = {np.dtype(np.int32): "i32", np.dtype(np.int64): "i64"}
WARPS = 8  # examples of a block: enough warps to hide the latency of exp, few enough to spread 64 examples


def _shape(args: dict[str, check.Argument | None]) -> tuple[int, int]:
    """Check all arrays; return the shape of the logits."""
    logits, labels = args["logits"], args["labels"]
    check.float32_or_float64(logits)
    if len(logits.shape) != 2:
        raise ValueError(f"logits must have the shape (N, K), got {logits.shape}; reshape it to two dimensions")
    rows, classes = logits.shape
    check.contiguous(logits, (rows, classes), logits.dtype)
    if labels.dtype not in LABELS:
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}; convert them with labels.astype('int64')")
    check.contiguous(labels, (rows,), labels.dtype)
    if rows and not classes:
        raise ValueError(f"logits has the shape {logits.shape}: there is no class to be right")
    check.contiguous(args["loss"], (rows,), logits.dtype)
    check.contiguous(args["dlogits"], (rows, classes), logits.dtype)
    return rows, classes


CALLS = ReplayCache()
OPERANDS = Operands("dlogits loss", "logits labels", _shape, optional="dlogits loss", in_place="logits")


def softmax_cross_entropy(logits: Any, labels: Any, *, out: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """Return the loss of every example and the gradient of the mean loss.

    Parameters
    ----------
    logits : array, shape (N, K), float32 or float64
        Unnormalised log-probabilities of K classes; C order. Never written.
    labels : array, shape (N,), int32 or int64
        Classes of the examples, from 0 to K - 1; contiguous.
    out : tuple of two arrays, optional
        Arrays for `loss` and `dlogits` (which may be `logits` itself); C order.

    Returns
    -------
    loss : array, shape (N,), dtype of `logits`
        ``-log(softmax(logits))`` of the right class, in nats.
    dlogits : array, shape (N, K), dtype of `logits`
        Gradient of ``loss.mean()``.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or, for NumPy arrays, a label is out of range; nothing is written then.

    Notes
    -----
    On a GPU a label out of range gives NaN in its row: to look at labels before the launch would wait for the device.
    Source: ``cuda/softmax_cross_entropy.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> loss, dlogits = softmax_cross_entropy(np.zeros((1, 2)), np.array([1]))
    >>> loss, dlogits
    (array([0.69314718]), array([[ 0.5, -0.5]]))
    """
    call = CALLS.replay(out, (logits, labels))
    if call.replayed:
        return out
    loss, dlogits = check.pack_outputs(out, ("loss", "dlogits"))
    runtime, shape = OPERANDS.check(dlogits, loss, logits, labels)
    if out is None:
        loss, dlogits = empty(runtime, shape[:1], logits), empty(runtime, shape, logits)
    if shape[0] == 0:
        return loss, dlogits
    if runtime is None:
        compute = (kernels(CPU) or reference).softmax_cross_entropy
        call.compute(lambda arrays: compute(*arrays), (loss, dlogits, logits, labels))
        return loss, dlogits
    arguments = pack(ARGUMENTS[logits.dtype], *addresses(runtime, logits, labels, loss, dlogits), *shape)
    kernel = f"bnk_softmax_cross_entropy_{LABELS[labels.dtype]}_{SUFFIX[logits.dtype]}"
    launch = softmax_cross_entropy_launch(shape[0])
    call.launch(runtime, "softmax_cross_entropy", kernel, launch, arguments, logits)
    return loss, dlogits


def softmax_cross_entropy_launch(rows: int) -> rt.Launch:
    """Return the launch for at least one row: one warp per example.

    Examples
    --------
    >>> softmax_cross_entropy_launch(64)
    Launch(grid=(8, 1, 1), block=(32, 8, 1), shared_bytes=0, cooperative=False)
    """
    return rt.Launch((rt.ceil_div(rows, WARPS), 1, 1), (32, WARPS, 1))
