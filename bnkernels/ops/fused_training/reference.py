"""NumPy reference of fused training: the same steps, op by op."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.parameter_update.op import adam_update, momentum_update, sgd_update
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy


@np.errstate(all="ignore")  # kernels have no warnings either
def train(
    network: NetworkSpec,
    parameters: np.ndarray,
    state: tuple[np.ndarray, ...],
    running: np.ndarray | None,
    x: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray | None,
    batch: int,
    optimizer: str,
    lr: float,
    before: tuple[int, int],
    losses: np.ndarray,
) -> None:
    """Make all steps; write the losses. `before` counts the steps and the mini-batches before these."""
    gradients = np.zeros_like(parameters)
    for step in range(len(losses)):
        rows = slice(step * batch, (step + 1) * batch) if indices is None else indices[step]
        momentum = 1 / (before[1] + step + 1) if network.momentum is None else network.momentum
        losses[step] = _gradients(network, parameters, running, x[rows], labels[rows], momentum, gradients)
        if optimizer == "adam":
            adam_update(parameters, gradients, *state, step=before[0] + step + 1, lr=lr)
        elif optimizer == "momentum":
            momentum_update(parameters, gradients, *state, lr=lr)
        else:
            sgd_update(parameters, gradients, lr=lr)


class _Views:
    """The parts of a flat array that belong to a layer."""

    def __init__(self, layer: LayerSpec, flat: np.ndarray) -> None:
        size = layer.inputs * layer.outputs
        self.weight = flat[layer.weight : layer.weight + size].reshape(layer.inputs, layer.outputs)
        self.gamma = flat[layer.gamma : layer.gamma + layer.outputs] if layer.gamma >= 0 else None
        self.shift = flat[layer.shift : layer.shift + layer.outputs]


def _gradients(
    network: NetworkSpec,
    parameters: np.ndarray,
    running: np.ndarray | None,
    x: np.ndarray,
    labels: np.ndarray,
    momentum: float,
    gradients: np.ndarray,
) -> float:
    """Write the gradients of the mean loss of a mini-batch, and update running statistics; return the loss."""
    phi, saved, h = activation_named(network.activation), [], x
    last = len(network.layers) - 1
    for number, layer in enumerate(network.layers):
        own = _Views(layer, parameters)
        z, statistics = h @ own.weight, None
        before = h
        if layer.gamma >= 0 and network.norm == "layer":
            options = {"eps": network.eps, "activation": network.activation}
            h, statistics = layer_norm_forward(z, own.gamma, own.shift, **options)
        elif layer.gamma >= 0:
            tracked = [None if running is None else running[at : at + layer.outputs] for at in layer[5:]]
            options = {"momentum": momentum, "unbiased": network.unbiased, "eps": network.eps}
            h, statistics = batch_norm_forward(
                z, own.gamma, own.shift, *tracked, **options, activation=network.activation
            )
        else:
            z += own.shift
            h = z if number == last else phi.forward(np, z.copy())
        saved.append((before, z, statistics, h))
    loss, dz = softmax_cross_entropy(h, labels)
    for number in range(last, -1, -1):
        layer, (before, z, statistics, h) = network.layers[number], saved[number]
        own, grads = _Views(layer, parameters), _Views(layer, gradients)
        if number < last:
            dz = _activation_backward(network, phi, dz, own, z, statistics, h, grads)
        else:
            grads.shift[...] = dz.sum(0)
        grads.weight[...] = before.T @ dz
        dz = dz @ own.weight.T
    return float(loss.mean(dtype=np.float64))


def _activation_backward(
    network: NetworkSpec, phi: Activation, dh: np.ndarray, own: _Views, z: Any, statistics: Any, h: Any, grads: _Views
) -> np.ndarray:
    """Return the gradient before a hidden layer's activation and norm; write those of its vectors."""
    if statistics is None:
        dz = phi.backward(np, dh, h if phi.from_output else z)
        grads.shift[...] = dz.sum(0)
        return dz
    backward = layer_norm_backward if network.norm == "layer" else batch_norm_backward
    given = dh, z, own.gamma, own.shift, statistics
    dz, grads.gamma[...], grads.shift[...] = backward(*given, activation=network.activation)
    return dz
