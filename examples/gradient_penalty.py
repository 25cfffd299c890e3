"""A penalty on the gradient of the input, which takes gradients of batch norm's backward.

The loss is that of a classifier plus a multiple of the squared norm of its gradient with respect to the images (double
backpropagation, Drucker and LeCun 1992), so that small changes of an image change less. The gradients of the gradient
are written out below, and compared with a difference quotient first. The penalty of a critic, as in WGAN-GP, is made in
the same way, but its authors advise against batch norm there: the gradient of an example depends on the others.
It prints the error of the gradient, then accuracies and gradients without and with the penalty.
"""

import argparse

import numpy as np
import numpy as xp  # on a GPU: import cupy as xp
from sklearn.datasets import load_digits

import bnkernels as bn


def loss_and_gradients(p, running, x, labels, weight):
    """Return the loss, the mean squared norm of its gradient by image, and the gradients of loss + weight * norm."""
    z = x @ p["w1"]
    h, statistics = bn.batch_norm_forward(z, p["gamma"], p["beta"], *running, activation="gelu")
    losses, dlogits = bn.softmax_cross_entropy(h @ p["w2"], labels)  # gradient of the mean loss
    norm, dh = (z, p["gamma"], p["beta"], statistics), dlogits @ p["w2"].T
    dz, *vectors = bn.batch_norm_backward(dh, *norm, activation="gelu")
    dx = dz @ p["w1"].T

    # Back through these lines: ddx, ddh and ddlogits are gradients with respect to dx, dh and dlogits.
    ddx = 2 * weight * len(x) * dx
    ddh, *through = bn.batch_norm_double_backward(ddx @ p["w1"], None, None, dh, *norm, activation="gelu")
    ddlogits, shares = ddh @ p["w2"], dlogits * len(x) + xp.eye(10, dtype=x.dtype)[labels]
    dlogits2 = shares * (ddlogits - (shares * ddlogits).sum(1, keepdims=True)) / len(x)
    back = bn.batch_norm_backward(dlogits2 @ p["w2"].T, *norm, activation="gelu")

    more_z, more_gamma, more_beta = (one + other for one, other in zip(through, back, strict=True))
    gradients = {
        "w1": x.T @ (dz + more_z) + ddx.T @ dz,
        "gamma": vectors[0] + more_gamma,
        "beta": vectors[1] + more_beta,
    }
    gradients["w2"] = h.T @ (dlogits + dlogits2) + ddh.T @ dlogits
    return float(losses.mean()), len(x) * float((dx**2).sum()), gradients


def start(dtype):
    """Return the first parameters and running statistics."""
    shapes, rng = {"w1": (64, 64), "gamma": (64,), "beta": (64,), "w2": (64, 10)}, np.random.default_rng(0)
    p = {name: xp.asarray((rng.standard_normal(shape) / 8).astype(dtype)) for name, shape in shapes.items()}
    p["gamma"] += 1
    return p, (xp.zeros(64, dtype), xp.ones(64, dtype))


def error_of_gradients(x, labels):
    """Return the relative error of the gradients along a random direction, by a difference quotient."""
    (p, running), rng, values = start("float64"), np.random.default_rng(1), []
    directions = {name: xp.asarray(rng.standard_normal(array.shape)) for name, array in p.items()}
    for sign in (1, -1):
        moved = {name: p[name] + sign * 1e-5 * directions[name] for name in p}
        loss, norm, _ = loss_and_gradients(moved, running, x, labels, 1.0)
        values.append(loss + norm)
    gradients = loss_and_gradients(p, running, x, labels, 1.0)[2]
    slope = sum(float((gradients[name] * directions[name]).sum()) for name in p)
    return abs((values[0] - values[1]) / 2e-5 / slope - 1)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
images, labels = load_digits(return_X_y=True)
images, labels = xp.asarray(images / 16), xp.asarray(labels)
print(f"error of the gradients {error_of_gradients(images[:64], labels[:64]):.1e}")

images, noise = images.astype("float32"), np.random.default_rng(2).standard_normal((397, 64)).astype("float32")
for weight in (0.0, 0.3):
    (p, running), rng = start("float32"), np.random.default_rng(0)
    for _ in range(options.steps):
        rows = xp.asarray(rng.integers(0, 1400, 64))
        _, norm, gradients = loss_and_gradients(p, running, images[rows], labels[rows], weight)
        for name in p:
            p[name] -= 0.1 * gradients[name]
    accuracies = []
    for x in (images[1400:], images[1400:] + 0.3 * xp.asarray(noise)):
        h = bn.batch_norm_inference(x @ p["w1"], p["gamma"], p["beta"], *running, activation="gelu")
        accuracies.append(float(((h @ p["w2"]).argmax(1) == labels[1400:]).mean()))
    print(
        f"weight {weight}: squared norm {norm:.3f}, accuracy {accuracies[0]:.3f}, of noisy images {accuracies[1]:.3f}"
    )
