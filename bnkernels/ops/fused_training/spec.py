"""Specification of the networks that `fused_training` trains: layers in flat arrays, and their checks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.runtime import checks as check

MOST = 2**31 - 1  # size or offset: the kernels take 32-bit integers


class LayerSpec(NamedTuple):
    """A layer: its sizes, and the offsets of its parameters and running statistics in the flat arrays; -1: none.

    Attributes
    ----------
    inputs, outputs : int
        Sizes of the layer.
    weight : int
        Offset of the weights (inputs, outputs) in the parameters.
    gamma : int
        Offset of gamma; -1 for a layer without a norm.
    shift : int
        Offset of beta, or without a norm of the bias.
    mean, variance : int
        Offsets of the running statistics, if they are tracked.
    """

    inputs: int
    outputs: int
    weight: int
    gamma: int
    shift: int
    mean: int = -1
    variance: int = -1


class NetworkSpec(NamedTuple):
    """A network: its layers, the last of which gives the logits, and the numbers that go with them.

    Attributes
    ----------
    layers : tuple of LayerSpec
        Layers from the inputs to the logits.
    activation : str
        Activation of the hidden layers, with its usual alpha.
    momentum : float or None
        Weight of the new statistics in the running ones; None gives the plain average of all mini-batches.
    unbiased : bool
        True if running variances are over N - 1.
    eps : float
        Number added to the variances of the norms.
    norm : {"batch", "layer"}
        Norm of the layers that have a gamma.
    """

    layers: tuple[LayerSpec, ...]
    activation: str = "relu"
    momentum: float | None = 0.1
    unbiased: bool = True
    eps: float = 1e-5
    norm: str = "batch"

    @property
    def scratch_rows(self) -> int:
        """With layer norm the outputs of the widest hidden layer, whose gradients need room; else 0."""
        hidden = [layer.outputs for layer in self.layers if layer.gamma >= 0]
        return max(hidden, default=0) if self.norm == "layer" else 0


def check_network(network: Any, parameters: Any) -> None:
    """Check a network but for the offsets of its layers; `parameters` have the type that it computes in."""
    if not isinstance(network, NetworkSpec):
        raise TypeError(f"network must be a NetworkSpec, such as MLP.fused, got {check.shown(network)}")
    layers = network.layers
    if not isinstance(layers, tuple) or not layers or not all(isinstance(layer, LayerSpec) for layer in layers):
        raise TypeError(f"layers of the network must be a tuple of at least one LayerSpec, got {check.shown(layers)}")
    for number, layer in enumerate(layers):
        for name, value in zip(LayerSpec._fields, layer, strict=True):
            low = 1 if name in ("inputs", "outputs") else 0 if name in ("weight", "shift") else -1
            check.integer(f"{name} of layer {number}", value, low, MOST)
    for number, (one, two) in enumerate(pairwise(layers)):
        if one.outputs != two.inputs:
            raise ValueError(
                f"each layer must have as many inputs as the one before has outputs, got {two.inputs} of layer "
                f"{number + 1} and {one.outputs} of layer {number}"
            )
    if layers[-1].gamma >= 0:
        raise ValueError(
            f"the last layer gives the logits and has no norm: its gamma must be -1, got {layers[-1].gamma}; shift is "
            "its bias"
        )
    activation_named(network.activation)
    check.one_of("norm", network.norm, ("batch", "layer"))
    if network.momentum is not None:
        check.number("momentum", network.momentum, 0, 1)
    check.boolean("unbiased", network.unbiased)
    check.epsilon(network.eps, parameters)


def check_offsets(network: NetworkSpec, parameters: int, running: int | None) -> None:
    """Check that all parts of the layers lie within the parameters and running statistics of a model, and apart."""
    parts, tracked = [], []
    for number, layer in enumerate(network.layers):
        parts.append((layer.weight, layer.inputs * layer.outputs, f"weight of layer {number}"))
        parts.append((layer.shift, layer.outputs, f"shift of layer {number}"))
        if layer.gamma >= 0:
            parts.append((layer.gamma, layer.outputs, f"gamma of layer {number}"))
            tracked.append((layer.mean, layer.outputs, f"mean of layer {number}"))
            tracked.append((layer.variance, layer.outputs, f"variance of layer {number}"))
    if any(start % 4 or start + size > parameters for start, size, _ in parts):
        raise ValueError(f"layers must begin at multiples of 4 within the {parameters} parameters")
    _check_apart(parts)
    if running is None:
        return
    if any(start < 0 or start + size > running for start, size, _ in tracked):
        raise ValueError(f"means and variances of the layers must lie within the {running} running statistics")
    _check_apart(tracked)


def _check_apart(parts: list[tuple[int, int, str]]) -> None:
    """Check that no part of an array, given by start, size and name, overlaps another."""
    for (start, size, name), (behind, _, other) in pairwise(sorted(parts)):
        if start + size > behind:
            raise ValueError(
                f"{name} takes {start} to {start + size - 1} and overlaps {other}, which begins at {behind}; give each "
                "a place of its own"
            )


def check_rows(
    network: NetworkSpec, labels: np.ndarray, indices: np.ndarray | None, steps: int, batch: int, drawn: bool
) -> None:
    """Check that the rows exist, and that their labels are classes: of NumPy arrays, before the first step."""
    if indices is not None and indices.size and not 0 <= indices.min() <= indices.max() < len(labels):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"indices must be from 0 to {len(labels) - 1}, the rows of x; got {wrong}")
    classes = network.layers[-1].outputs
    used = labels if drawn else labels[: steps * batch] if indices is None else labels[indices]
    wrong = used[(used < 0) | (used >= classes)]
    if wrong.size:
        raise ValueError(f"labels must be from 0 to {classes - 1}, the outputs of the last layer; got {wrong[0]}")
