"""A deep network of residual blocks with batch norm, and the same layers without the sums, on scikit-learn's digits.

A block is `nn.Residual(linear, norm, linear, norm)`. The norm at its end adds the block's input in front of its
activation, in the same launch, and returns the gradients of both. It prints the accuracy of both networks.
"""

import argparse

import numpy as np
import numpy as xp  # on a GPU: import cupy as xp
from sklearn.datasets import load_digits

from bnkernels import nn, softmax_cross_entropy


def network(kind, blocks, width):
    """Return a network of blocks, which are `nn.Residual` or `nn.Sequential`."""
    layers = [nn.Linear(64, width, bias=False, seed=0), nn.BatchNorm(width, activation="relu")]
    for number in range(blocks):
        inside = nn.Linear(width, width, bias=False, seed=2 * number + 1), nn.BatchNorm(width, activation="relu")
        behind = nn.Linear(width, width, bias=False, seed=2 * number + 2), nn.BatchNorm(width, activation="relu")
        layers.append(kind(*inside, *behind))
    return nn.Sequential(*layers, nn.Linear(width, 10, seed=100)).to(xp)


def accuracy_of(model, steps):
    """Train a network and return its accuracy on the images of other writers."""
    images, labels = load_digits(return_X_y=True)
    images, labels = xp.asarray((images / 16).astype("float32")), xp.asarray(labels)
    optimiser, rng = nn.Momentum(model, lr=0.02), np.random.default_rng(0)
    for _ in range(steps):
        rows = xp.asarray(rng.integers(0, 1400, 64))
        _, dlogits = softmax_cross_entropy(model(images[rows]), labels[rows])
        model.backward(dlogits)
        optimiser.step()
    return float((model.eval()(images[1400:]).argmax(1) == labels[1400:]).mean())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--blocks", type=int, default=15)
options = parser.parse_args()
for kind in (nn.Residual, nn.Sequential):
    accuracy = accuracy_of(network(kind, options.blocks, 32), options.steps)
    print(f"{kind.__name__}: {2 * options.blocks + 2} layers, accuracy {accuracy:.3f}")
