"""Reference of softmax cross-entropy: the formulas in NumPy, with sums and logarithms in float64."""

from __future__ import annotations

import numpy as np


@np.errstate(all="ignore")  # kernels have no warnings either
def softmax_cross_entropy(loss: np.ndarray, dlogits: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> None:
    """Write the losses and the gradient of their mean.

    Raises
    ------
    ValueError
        If a label is out of range; nothing is written then.
    """
    rows, classes = logits.shape
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(label_out_of_range(labels[wrong][0], classes))
    at_label = np.arange(rows), labels
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, dtype=np.float64)
    loss[:] = np.log(totals) - shifted[at_label]
    scales = 1 / (totals * rows)
    of_labels = exponentials[at_label] * scales - 1 / rows
    np.multiply(exponentials, scales[:, np.newaxis].astype(logits.dtype), out=dlogits)
    dlogits[at_label] = of_labels


def label_out_of_range(label: int, classes: int) -> str:
    """Return the message of a wrong label."""
    return f"labels must be from 0 to {classes - 1}, the classes of logits; got {label}"
