"""Softmax cross-entropy: the loss of every example and the gradient of their mean, in one launch."""

from __future__ import annotations

import dataclasses

import numpy as np

from bnkernels.ops.softmax_cross_entropy import reference
from bnkernels.runtime import checks as check
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import SUFFIX, addresses, arguments_type, empty, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import ReplayCache

ARGUMENTS = arguments_type("logits labels loss dlogits", "rows classes ignored", "smoothing", "ignoring")
CPU = "bnkernels.ops.softmax_cross_entropy.cpu"
LABELS = {np.dtype(np.int32): "i32", np.dtype(np.int64): "i64"}
FEW = 128  # classes that stay in the registers of a warp, as in cuda/softmax_cross_entropy.cu
WARPS = 8  # examples of a block: enough warps to hide the latency of exp, few enough to spread 64 examples
PLAIN = ("smoothing", 0), ("ignoring", 0)  # constants of a loss without options
COUNTING = 512  # blocks that each read all labels, at most: they are on the chip together
MOST_LABEL = 2**63 - 1


def _shape(args: dict[str, check.Argument | None]) -> tuple[int, int]:
    """Check all arrays; return the shape of the logits."""
    logits, labels = args["logits"], args["labels"]
    check.float32_or_float64(logits)
    if len(logits.shape) != 2:
        raise ValueError(f"logits must have the shape (N, K), got {logits.shape}; reshape it to two dimensions")
    rows, classes = logits.shape
    check.contiguous(logits, (rows, classes), logits.dtype)
    check_labels(labels, rows)
    if rows and not classes:
        raise ValueError(f"logits has the shape {logits.shape}: there is no class to be right")
    check.contiguous(args["loss"], (rows,), logits.dtype)
    check.contiguous(args["dlogits"], (rows, classes), logits.dtype)
    return rows, classes


def check_labels(labels: check.Argument, rows: int) -> None:
    """Check for the classes of so many examples."""
    if labels.dtype not in LABELS:
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}; convert them with labels.astype('int64')")
    check.contiguous(labels, (rows,), labels.dtype)


CALLS = ReplayCache()
OPERANDS = Operands("dlogits loss", "logits labels", _shape, optional="dlogits loss", in_place="logits")


def softmax_cross_entropy(
    logits: Array,
    labels: AnyArray,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Return the loss of every example and the gradient of the mean loss.

    Parameters
    ----------
    logits : array, shape (N, K), float32 or float64
        Unnormalised log-probabilities of K classes; C order. Never written.
    labels : array, shape (N,), int32 or int64
        Classes of the examples, from 0 to K - 1, or `ignore_index`; contiguous.
    ignore_index : int, optional
        Label of examples that do not count: their loss and gradient are 0, whatever their logits are, and the mean is
        that of the others. PyTorch's default is -100; here every label is a class unless this is given.
    label_smoothing : float
        Part of the target, from 0 to 1, that all K classes share, instead of the right one alone.
    out : tuple of two arrays, optional
        Arrays for `loss` and `dlogits` (which may be `logits` itself); C order.

    Returns
    -------
    loss : array, shape (N,), dtype of `logits`
        ``-log(softmax(logits))`` of the right class, in nats; with `label_smoothing` the sum of that over all classes,
        weighted with the target.
    dlogits : array, shape (N, K), dtype of `logits`
        Gradient of ``loss.mean()``, with `ignore_index` of ``loss.sum() / (labels != ignore_index).sum()``.

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
    call = CALLS.replay(out, (logits, labels), ignore_index, label_smoothing)
    if call.replayed:
        return out
    ignoring = ignore_index is not None
    if ignoring:
        ignore_index = check.integer("ignore_index", ignore_index, -MOST_LABEL, MOST_LABEL)
    smoothing = check.number("label_smoothing", label_smoothing, 0, 1)
    loss, dlogits = check.pack_outputs(out, ("loss", "dlogits"))
    runtime, shape = OPERANDS.check(dlogits, loss, logits, labels)
    if out is None:
        loss, dlogits = empty(runtime, shape[:1], logits), empty(runtime, shape, logits)
    if shape[0] == 0:
        return loss, dlogits
    if runtime is None:
        compute = (kernels(CPU) or reference).softmax_cross_entropy
        call.compute(lambda arrays: compute(*arrays, ignore_index, smoothing), (loss, dlogits, logits, labels))
        return loss, dlogits
    options = ignore_index if ignoring else 0, smoothing, ignoring
    arguments = pack(ARGUMENTS[logits.dtype], *addresses(runtime, logits, labels, loss, dlogits), *shape, *options)
    variant = "few" if shape[1] <= FEW else "many"
    kernel = f"bnk_softmax_cross_entropy_{variant}_{LABELS[labels.dtype]}_{SUFFIX[logits.dtype]}"
    launch = softmax_cross_entropy_launch(shape[0], ignoring)
    if not ignoring and not smoothing:
        launch = dataclasses.replace(launch, constants=PLAIN)
    call.launch(runtime, "softmax_cross_entropy", kernel, launch, arguments, logits)
    return loss, dlogits


def softmax_cross_entropy_launch(rows: int, counting: bool = False) -> rt.Launch:
    """Return the launch for at least one row: one warp per example, or for several where every warp has to count.

    Examples
    --------
    >>> softmax_cross_entropy_launch(64)
    Launch(grid=(8, 1, 1), block=(32, 8, 1), shared_bytes=0, cooperative=False)
    """
    blocks = rt.ceil_div(rows, WARPS)
    return rt.Launch((min(blocks, COUNTING) if counting else blocks, 1, 1), (32, WARPS, 1))
