"""Sequences of unequal length, padded to one array, with a mask that batch norm obeys.

Every position sees itself and the one before; a linear layer, a masked batch norm, the mean over the positions that
count, and a linear layer tell which of three processes made a sequence. The padding is filled with NaN to show that
nothing of it is used. It prints the accuracy on other sequences.
"""

import argparse

import numpy as np
import numpy as xp  # on a GPU: import cupy as xp

from bnkernels import nn, softmax_cross_entropy

LONGEST, FACTORS = 40, np.array([-0.7, 0.0, 0.7])  # x[t] = factor x[t - 1] + noise


def sequences(count, seed):
    """Return pairs of positions (N, T, 2) with NaN in the padding, the mask (N, T), and the classes (N,)."""
    rng = np.random.default_rng(seed)
    classes, lengths = rng.integers(0, 3, count), rng.integers(10, LONGEST + 1, count)
    x = rng.standard_normal((count, LONGEST + 1)).astype("float32")
    for t in range(1, LONGEST + 1):
        x[:, t] += FACTORS[classes] * x[:, t - 1]
    mask = np.arange(LONGEST) < lengths[:, None]
    pairs = np.stack([x[:, 1:], x[:, :-1]], axis=-1)
    return xp.asarray(np.where(mask[..., None], pairs, np.float32(np.nan))), xp.asarray(mask), xp.asarray(classes)


class MeanOfPositions(nn.Layer):
    """Mean over the positions that a mask counts."""

    takes_mask = True

    def forward(self, x, *, training=None, mask):
        """Return (N, C) of (N, T, C)."""
        self.weights = (mask / mask.sum(1, keepdims=True)).astype(x.dtype)[..., None]
        return (x * self.weights).sum(1)

    def backward(self, dy, *, accumulate=False):
        """Return the gradient of the input."""
        return dy[:, None] * self.weights


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
x, mask, classes = sequences(1000, seed=1)
model = nn.Sequential(
    nn.BatchNorm(2, axis=-1, affine=False, xp=xp),  # it reads no NaN, and makes 0 of it for the linear layer
    nn.Linear(2, 32, bias=False, seed=1, xp=xp),
    nn.BatchNorm(32, axis=-1, activation="relu", xp=xp),
    MeanOfPositions(),
    nn.Linear(32, 3, seed=2, xp=xp),
)
optimiser = nn.Adam(model, lr=0.01)
rng = np.random.default_rng(0)
for _ in range(options.steps):
    rows = xp.asarray(rng.integers(0, len(x), 64))
    losses, dlogits = softmax_cross_entropy(model(x[rows], mask=mask[rows]), classes[rows])
    model.backward(dlogits)
    optimiser.step()
x, mask, classes = sequences(1000, seed=2)
accuracy = float((model.eval()(x, mask=mask).argmax(1) == classes).mean())
padding = float(1 - mask.mean())
print(
    f"loss {float(losses.mean()):.3f}, accuracy {accuracy:.3f} on {len(x)} other sequences, {padding:.0%} of it padding"
)
