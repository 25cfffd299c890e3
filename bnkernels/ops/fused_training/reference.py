"""NumPy reference of fused training: the same steps, op by op."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation, activation_named
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.mini_batch.op import random_rows
from bnkernels.ops.parameter_update.op import adam_update, momentum_update, sgd_update
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy


def train(
    network: NetworkSpec,
    batch: int,
    optimizer: str,
    arrays: tuple[Any, ...],
    losses: np.ndarray,
    rates: np.ndarray,
    seeds: np.ndarray | None,
    schedule: np.ndarray,
    steps_before: int,
) -> None:
    """Make all steps of one model after the other; write the losses.

    Parameters
    ----------
    network, batch, optimizer
        Arguments of `fused_training`.
    arrays : tuple
        Parameters, both arrays of state, running statistics, x, labels and indices, or None.
    losses : array, shape (steps,) or (M, steps)
        Losses, written.
    rates, seeds : array, shape (M,)
        Learning rate of every model, and its seed if it draws.
    schedule : array, shape (steps, 3)
        Momentum of the running statistics and Adam's corrections, of every step.
    steps_before : int
        Number of steps already made.
    """
    (*updated, x, labels, indices), one_model = arrays, losses.ndim == 1
    for model, rate in enumerate(rates.tolist()):
        parameters, first, second, running, own_losses = (
            array if array is None or one_model else array[model] for array in (*updated, losses)
        )
        rows = indices[model] if indices is not None and indices.ndim == 3 else indices
        if seeds is not None:
            drawn = random_rows(int(seeds[model]), own_losses.size * batch, len(x), start=steps_before * batch)
            rows = drawn.reshape(-1, batch)
        rows = np.arange(own_losses.size * batch).reshape(-1, batch) if rows is None else rows
        state = tuple(moment for moment in (first, second) if moment is not None)
        given = network, parameters, state, running, x, labels, rows, optimizer, rate, schedule, steps_before
        _train(*given, own_losses)


@np.errstate(all="ignore")  # kernels have no warnings either
def _train(
    network: NetworkSpec,
    parameters: np.ndarray,
    state: tuple[np.ndarray, ...],
    running: np.ndarray | None,
    x: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    optimizer: str,
    lr: float,
    schedule: np.ndarray,
    steps_before: int,
    losses: np.ndarray,
) -> None:
    gradients = np.zeros_like(parameters)
    for step, rows in enumerate(indices):
        momentum = float(schedule[step, 0])
        losses[step] = _gradients(network, parameters, running, x[rows], labels[rows], momentum, gradients)
        if optimizer == "adam":
            adam_update(parameters, gradients, *state, step=steps_before + step + 1, lr=lr)
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
