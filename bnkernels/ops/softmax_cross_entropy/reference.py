"""Reference of softmax cross-entropy: the formulas in NumPy, with sums and logarithms in float64."""

from __future__ import annotations

import numpy as np


@np.errstate(all="ignore")  # kernels have no warnings either
def softmax_cross_entropy(
    loss: np.ndarray,
    dlogits: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Write the losses and the gradient of their mean.

    Raises
    ------
    ValueError
        If a label is out of range; nothing is written then.
    """
    rows, classes = logits.shape
    counted = np.ones(rows, bool) if ignore_index is None else labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise ValueError(label_out_of_range(labels[wrong][0], classes))
    at_label = np.arange(rows), np.where(counted, labels, 0)
    of_mean, share = max(1, np.count_nonzero(counted)), label_smoothing / classes
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, dtype=np.float64)
    of_target = (1 - label_smoothing) * shifted[at_label]
    if label_smoothing:
        of_target += share * shifted.sum(axis=1, dtype=np.float64)
    loss[:] = np.where(counted, np.log(totals) - of_target, 0)
    scales = 1 / (totals * of_mean)
    of_labels = exponentials[at_label] * scales - (1 - label_smoothing + share) / of_mean
    np.multiply(exponentials, scales[:, np.newaxis].astype(logits.dtype), out=dlogits)
    dlogits -= share / of_mean
    dlogits[at_label] = of_labels
    dlogits[~counted] = 0


def label_out_of_range(label: int, classes: int) -> str:
    """Return the message of a wrong label."""
    return f"labels must be from 0 to {classes - 1}, the classes of logits; got {label}"
