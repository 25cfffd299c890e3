"""Softmax cross-entropy: the loss of every example and the gradient of their mean, in one launch."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels import _check as check
from bnkernels import _runtime as rt

ARGUMENTS = rt.arguments_type("logits labels loss dlogits", "rows classes", "", "")
LABELS = {check.INT32: "i32", check.INT64: "i64"}
WARPS = 8  # examples of a block: enough warps to hide the latency of exp, few enough to spread 64 examples


def softmax_cross_entropy(logits: Any, labels: Any, *, out: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """Return the loss of every example and the gradient of the mean loss.

    Parameters
    ----------
    logits : array, shape (N, K), float32 or float64
        Unnormalised log-probabilities of K classes; C order. Never written.
    labels : array, shape (N,), int32 or int64
        The right classes, from 0 to K - 1; contiguous.
    out : tuple of two arrays, optional
        Where to write `loss` and `dlogits` (which may be `logits` itself); C order.

    Returns
    -------
    loss : array, shape (N,), dtype of `logits`
        ``-log(softmax(logits))`` of the right class, in nats.
    dlogits : array, shape (N, K), dtype of `logits`
        Gradient of ``loss.mean()``.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape or layout is wrong, arrays overlap, or, for NumPy arrays, a label is out of range.

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
    if out is not None and (not isinstance(out, tuple) or len(out) != 2 or any(array is None for array in out)):
        raise TypeError(f"out must be a tuple of 2 arrays (loss, dlogits), got {out!r}")
    loss, dlogits = (None, None) if out is None else out
    runtime = check.same_device({"logits": logits, "labels": labels, "loss": loss, "dlogits": dlogits})
    rows, classes = check.matrix("logits", logits)
    check.contiguous("logits", logits, (rows, classes), logits.dtype)
    if labels.dtype not in LABELS:
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}; convert them with labels.astype('int64')")
    check.contiguous("labels", labels, (rows,), labels.dtype)
    if rows and not classes:
        raise ValueError(f"logits has the shape {logits.shape}: there is no class to be right")
    if out is None:
        empty = np.empty if runtime is None else lambda shape, dtype: runtime.empty(shape, dtype, logits)
        loss, dlogits = empty((rows,), logits.dtype), empty((rows, classes), logits.dtype)
    else:
        check.contiguous("loss", loss, (rows,), logits.dtype)
        check.contiguous("dlogits", dlogits, (rows, classes), logits.dtype)
        outputs = {"dlogits": dlogits, "loss": loss}
        check.overlaps(runtime, outputs, {"logits": logits, "labels": labels}, in_place=("logits",))

    if rows == 0:
        return loss, dlogits
    if runtime is None:
        _numpy(logits, labels, loss, dlogits)
    else:
        pointers = (runtime.pointer(array) for array in (logits, labels, loss, dlogits))
        arguments = rt.pack(ARGUMENTS[logits.dtype], *pointers, rows, classes)
        name = f"bnk_softmax_cross_entropy_{LABELS[labels.dtype]}_{rt.SUFFIX[logits.dtype]}"
        runtime.launch("softmax_cross_entropy", name, softmax_cross_entropy_launch(rows), arguments, logits)
    return loss, dlogits


def softmax_cross_entropy_launch(rows: int) -> rt.Launch:
    """Return the launch for at least one row: one warp per example.

    Examples
    --------
    >>> softmax_cross_entropy_launch(64)
    Launch(grid=(8, 1, 1), block=(32, 8, 1), shared_bytes=0)
    """
    return rt.Launch((rt.ceil_div(rows, WARPS), 1, 1), (32, WARPS, 1))


def _numpy(logits: np.ndarray, labels: np.ndarray, loss: np.ndarray, dlogits: np.ndarray) -> None:
    rows, classes = logits.shape
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"labels must be from 0 to {classes - 1}, the classes of logits; got {wrong}")
    of_label = np.arange(0, rows * classes, classes) + labels  # flat indices
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=dlogits)
    flat = dlogits.reshape(-1)
    at_label = flat[of_label]
    np.exp(dlogits, out=dlogits)
    total = np.add.reduce(dlogits, axis=1, keepdims=True)
    np.subtract(np.log(total[:, 0]), at_label, out=loss)
    total *= rows
    dlogits /= total
    flat[of_label] -= 1 / rows
