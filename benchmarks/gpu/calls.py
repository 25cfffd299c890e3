"""Calls of the ops that together run every kernel, for what watches kernels run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator

ROWS, CHANNELS = (10, 100, 300), 33  # every variant of the batch norms, and a slice of one channel
IMAGES = (5, 49)  # values of an image: neighbouring threads read neighbouring channels, and neighbouring values
SHARED = [(20_000, 8), (6, 2, 30_000)]  # slices that several blocks share, on any GPU
SIZE = 1000  # of the optimisers' parameters

Op = Callable[..., Sequence[Any]]


def calls(dtype: np.dtype) -> list[tuple[Op, list[np.ndarray]]]:
    """Return ops with their arrays: an op takes them, and returns all that it has written."""
    rng = np.random.default_rng(0)
    found: list[tuple[Op, list[np.ndarray]]] = []
    for rows in ROWS:
        x, dy = (rng.standard_normal((rows, CHANNELS)).astype(dtype) for _ in range(2))
        found.append((batch_norm, [x, dy, *vectors(rng, dtype)]))
        if dtype.itemsize > 2:
            for integer in (np.int32, np.int64):
                found.append((bn.softmax_cross_entropy, [x, rng.integers(0, CHANNELS, rows).astype(integer)]))
    for size in IMAGES:
        x, dy, residual = (rng.standard_normal((3, CHANNELS, size)).astype(dtype) for _ in range(3))
        found.append((batch_norm, [x, dy, *vectors(rng, dtype), residual]))
    x, dy, residual = (rng.standard_normal((3, 20, CHANNELS)).astype(dtype) for _ in range(3))
    mask = rng.random((3, 20)) < 0.7
    of_groups = [np.stack([array] * 3) for array in vectors(rng, dtype)[:2]]
    found.append((general_batch_norm, [x, dy, *vectors(rng, dtype), *of_groups, residual, mask]))
    for rows in ROWS if dtype.itemsize == 4 else ROWS[:1]:  # up to two tiles of rows; products are slow to emulate
        x, weight, dy = (rng.standard_normal(s).astype(dtype) for s in ((rows, 40), (40, CHANNELS), (rows, CHANNELS)))
        found.append((linear_batch_norm, [x, weight, dy, *vectors(rng, dtype)]))
    for shape in ((10, CHANNELS), (5, 4000)):  # a part of a unit at the end of every row, and several blocks
        x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        found.append((layer_norm, [x, dy, *vectors(rng, dtype, shape[1])[:2]]))
    for shape in SHARED if dtype.itemsize <= 4 else []:
        x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
        found.append((batch_norm, [x, dy, *vectors(rng, dtype, shape[1]), residual]))
    if dtype.itemsize == 2:
        return found
    x, labels = rng.standard_normal((5 * 20, 6)).astype(dtype), rng.integers(0, 3, 5 * 20).astype(np.int32)
    found.append((mini_batch, [x, labels, x[:3, :3].copy(), np.array([1, 0], np.uint32)]))
    model = bn.MLP((6, 9, 3), dtype=dtype.name, activation="tanh")
    found.append((partial(fused_training, model.fused), [model.parameters, model.running, x, labels]))
    normed = bn.MLP((6, 9, 3), norm="layer", dtype=dtype.name, activation="tanh")
    found.append((partial(fused_layer_norm_training, normed.fused), [normed.parameters, x, labels]))
    several = [np.stack([array] * 2) for array in (model.parameters, model.running)]
    found.append((partial(fused_training, model.fused), [*several, x, labels]))
    states = [rng.standard_normal(SIZE).astype(dtype) for _ in range(2)]
    moments = [np.zeros(SIZE, dtype) for _ in range(2)]
    return [*found, (sgd, states), (momentum, [*states, moments[0]]), (adam, [*states, *moments])]


def group_calls(dtype: np.dtype) -> list[tuple[Op, list[np.ndarray]]]:
    """Return networks that several blocks train, since one takes smaller mini-batches: a cluster, or a grid."""
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((2 * 260, 6)).astype(dtype), rng.integers(0, 3, 2 * 260).astype(np.int32)
    found = []
    for hidden in (9, 36) if dtype.itemsize > 2 else ():  # up to 32 neurons fit a cluster
        options = {"dtype": dtype.name, "activation": "tanh"}
        model, normed = (bn.MLP((6, hidden, 3), norm=norm, **options) for norm in ("batch", "layer"))
        found.append((partial(fused_training, model.fused, batch=260), [model.parameters, model.running, x, labels]))
        found.append((partial(fused_layer_norm_training, normed.fused, batch=260), [normed.parameters, x, labels]))
    return found


def vectors(rng: np.random.Generator, dtype: np.dtype, channels: int = CHANNELS) -> list[np.ndarray]:
    """Return parameters and running statistics, in the type of the kernels' sums."""
    return [rng.uniform(0.5, 1.5, channels).astype(accumulator(dtype)) for _ in range(4)]


def batch_norm(x: Any, dy: Any, gamma: Any, beta: Any, mean: Any, var: Any, residual: Any = None) -> Sequence[Any]:
    """Train one step, forward and backward, then the same with running statistics."""
    tanh, sigmoid = ({"activation": name, "residual": residual} for name in ("tanh", "sigmoid"))
    y, statistics = bn.batch_norm_forward(x, gamma, beta, mean, var, **tanh)
    gradients = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **tanh)
    frozen = bn.batch_norm_inference(x, gamma, beta, mean, var, **sigmoid)
    frozen_gradients = bn.batch_norm_inference_backward(dy, x, gamma, beta, mean, var, **sigmoid)
    # What comes in are arrays that are there: a second gradient has a product with each of them.
    double = bn.batch_norm_double_backward(x, gamma, beta, dy, x, gamma, beta, statistics, **tanh)
    return [y, statistics[0], statistics[2], mean, var, *gradients, *double, frozen, *frozen_gradients]


def general_batch_norm(
    x: Any, dy: Any, gamma: Any, beta: Any, mean: Any, var: Any, means: Any, variances: Any, residual: Any, mask: Any
) -> Sequence[Any]:
    """Train one step with masked groups, renormalised, then a step in the pieces of a synchronised one."""
    options = {"activation": "tanh", "residual": residual, "mask": mask, "grouped": True}
    y, statistics = bn.batch_norm_forward(x, gamma, beta, means, variances, renorm=(2.0, 1.0), **options)
    gradients = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)
    options = {"activation": "tanh", "axis": -1, "mask": mask}
    merged, moments = bn.batch_norm_statistics(bn.batch_norm_moments(x, axis=-1, mask=mask)[None], mean, var)
    part = bn.batch_norm_normalise(x, gamma, beta, merged, **options)
    sums = bn.batch_norm_gradient_sums(dy, x, gamma, beta, merged, **options)
    (dx,) = bn.batch_norm_input_gradient(dy, x, gamma, beta, merged, sums, **options)
    return [y, means, variances, *gradients, part, moments[0], mean, var, sums, dx]


def layer_norm(x: Any, dy: Any, gamma: Any, beta: Any) -> Sequence[Any]:
    """Go forward and backward."""
    y, statistics = bn.layer_norm_forward(x, gamma, beta, activation="tanh")
    gradients = bn.layer_norm_backward(dy, x, gamma, beta, statistics, activation="tanh")
    return [y, statistics[0], statistics[2], *gradients]


def linear_batch_norm(x: Any, weight: Any, dy: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Sequence[Any]:
    """Train one step, forward and backward, then one of layer norm."""
    y, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta, mean, var, activation="tanh")
    gradients = bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics, activation="tanh")
    of_layer = {"norm": "layer", "activation": "tanh"}
    normalised, _, of_rows = bn.linear_batch_norm_forward(x, weight, gamma, beta, **of_layer)
    more = bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, of_rows, **of_layer)
    statistics_of_both = statistics[0], statistics[2], of_rows[0], of_rows[2]
    return [y, z, *statistics_of_both, mean, var, *gradients, normalised, *more]


def mini_batch(x: Any, labels: Any, schedule: Any, counter: Any) -> Sequence[Any]:
    """Take the second mini-batch of 20."""
    out = x[:20].copy(), labels[:20].copy(), schedule[0].copy()
    bn.mini_batch(x, labels, schedule, counter, out=out)
    return [*out, counter]


def fused_training(network: Any, parameters: Any, running: Any, x: Any, labels: Any, batch: int = 20) -> Sequence[Any]:
    """Train some steps in one launch."""
    losses = bn.fused_training(network, parameters, (), running, x, labels, batch=batch, lr=0.1)
    return parameters, running, losses


def fused_layer_norm_training(network: Any, parameters: Any, x: Any, labels: Any, batch: int = 20) -> Sequence[Any]:
    """Train some steps of a network with layer norm, which has no running statistics."""
    losses = bn.fused_training(network, parameters, (), None, x, labels, batch=batch, lr=0.1)
    return parameters, losses


def sgd(parameters: Any, gradients: Any) -> Sequence[Any]:
    """Take a step of SGD."""
    bn.sgd_update(parameters, gradients, lr=0.1)
    return (parameters,)


def momentum(parameters: Any, gradients: Any, velocity: Any) -> Sequence[Any]:
    """Take a step with momentum."""
    bn.momentum_update(parameters, gradients, velocity, lr=0.1)
    return parameters, velocity


def adam(parameters: Any, gradients: Any, first: Any, second: Any) -> Sequence[Any]:
    """Take a step of Adam."""
    bn.adam_update(parameters, gradients, first, second, step=1, lr=0.1)
    return parameters, first, second
