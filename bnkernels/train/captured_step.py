"""A training step as a CUDA graph: captured once, then repeated with one call and no work on the host.

CuPy does not let a library's matrix product be captured, so every hidden layer is a `linear_batch_norm`, and the last
one, with the loss, a `linear_softmax_cross_entropy`. All buffers are there before the capture; what varies from step to
step (the mini-batch, Adam's corrections) is read from device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from bnkernels.nn.mlp import MLP
from bnkernels.nn.perceptron import LayerArrays
from bnkernels.ops.gemm import MOST_NEURONS, MOST_ROWS
from bnkernels.ops.linear_batch_norm.launch import choose
from bnkernels.ops.linear_batch_norm.op import linear_batch_norm_backward, linear_batch_norm_forward
from bnkernels.ops.linear_batch_norm.problem import Problem
from bnkernels.ops.linear_softmax_cross_entropy.launch import choose as choose_loss
from bnkernels.ops.linear_softmax_cross_entropy.op import linear_softmax_cross_entropy
from bnkernels.ops.mini_batch.op import mini_batch
from bnkernels.ops.parameter_update.schedule import scheduled_update, update_schedule
from bnkernels.runtime.registry import runtime_of


def why_not_captured(model: MLP, batch: int) -> str | None:
    """Return why the steps of a model, on mini-batches of `batch` examples, cannot be captured, or None."""
    runtime = runtime_of(type(model.parameters))
    if runtime is None:
        return "it needs a GPU"
    if model.norm == "batch" and model.fused.momentum is None:
        return "its running statistics are plain averages, whose weights change from step to step"
    limits, dtype = runtime.limits(model.parameters), np.dtype(model.dtype)
    kind = model.norm if model.norm != "none" else None
    for i, (inputs, outputs) in enumerate(pairwise(model.sizes)):
        if i < len(model.sizes) - 2:
            problem = Problem(batch, inputs, outputs, dtype)
            plans = [choose(way, problem, limits, norm=kind) for way in ("forward", "backward")]
        else:
            plans = [choose_loss(batch, inputs, outputs, dtype, np.dtype(np.int32), limits)]
        if None in plans:
            return (
                f"a layer of {inputs} inputs and {outputs} outputs on {batch} examples needs a library's product, "
                f"which CuPy does not capture; at most {MOST_ROWS} examples and {MOST_NEURONS} inputs or outputs do not"
            )
    return None


class CapturedStep:
    """Training step of a network, captured as a CUDA graph.

    Parameters
    ----------
    model : MLP
        The network.
    optimizer : {"sgd", "momentum", "adam"}
        Name of the optimiser, which has its usual constants.
    state : tuple of arrays
        State of the optimiser.
    batch : int
        Number of examples of a mini-batch.

    Attributes
    ----------
    losses : array, shape (batch,)
        Losses of the examples of the last step, before its update, in nats.

    Raises
    ------
    ValueError
        If the step cannot be captured.
    """

    def __init__(self, model: MLP, optimizer: str, state: tuple[Any, ...], batch: int) -> None:
        reason = why_not_captured(model, batch)
        if reason:
            raise ValueError(f"the step cannot be captured: {reason}")
        self.model, self.optimizer, self.batch = model, optimizer, batch
        self._runtime = runtime_of(type(model.parameters))
        self._replay: Callable[[], None] | None = None
        self._shape: tuple[int, ...] | None = None
        self.losses = self._empty(batch)
        self._counter = model.xp.zeros(2, "uint32")
        self._mini_batch = self._empty(batch, model.sizes[0]), model.xp.zeros(batch, "int32"), self._empty(3)
        h, labels, scalars = self._mini_batch
        backward: list[tuple[tuple, dict[str, Any]]] = []  # arrays and options of the backward of every hidden layer
        self._calls: list[Callable[[], Any]] = []
        *hidden, last = model.layer_arrays
        for arrays in hidden:
            h = self._add_layer(arrays, h, backward)
        dy = self._add_loss(last, h, labels, first=not hidden)
        for given, options in reversed(backward):
            self._calls.append(partial(linear_batch_norm_backward, dy, *given, **options))
            dy = options["out"][0]
        update = scheduled_update, optimizer, model.parameters, model.gradients, state, scalars
        self._calls.append(partial(*update))

    def _empty(self, *shape: int) -> Any:
        return self.model.xp.empty(shape, self.model.dtype)

    def _add_layer(self, arrays: LayerArrays, x: Any, backward: list) -> Any:
        """Add a hidden layer's forward to the calls, its backward's arguments to `backward`; return its output."""
        given, gradients, options, first = arrays.parameters, arrays.gradients, self.model.fused, not backward
        shape = len(x), given["weight"].shape[1]
        y, z, workspace = (self._empty(*shape) for _ in range(3))
        kind = self.model.norm if "gamma" in given else None
        statistics = self._empty(3, shape[0] if kind == "layer" else shape[1]) if kind else None
        vectors = given.get("gamma"), given.get("beta", given.get("bias"))
        phi = {"activation": self.model.activation}
        norm: dict[str, Any] = {"norm": kind, "eps": options.eps, "out": (y, z, statistics) if kind else (y, z)}
        if kind == "batch":
            norm |= {"momentum": options.momentum, "unbiased": options.unbiased}
        running = arrays.running.values()
        self._calls.append(partial(linear_batch_norm_forward, x, given["weight"], *vectors, *running, **phi, **norm))
        out = (
            None if first else self._empty(*x.shape),
            gradients["weight"],
            gradients.get("gamma"),
            gradients.get("beta", gradients.get("bias")),
        )
        behind = x, given["weight"], *vectors, z, statistics
        more = {"norm": kind, "input_gradient": not first, "workspace": workspace, "out": out, **phi}
        backward.append((behind, more))
        return y

    def _add_loss(self, arrays: LayerArrays, x: Any, labels: Any, *, first: bool) -> Any:
        """Add the last layer with the loss and all of its gradients to the calls; return the gradient of `x`."""
        given, gradients = arrays.parameters, arrays.gradients
        dx, workspace = None if first else self._empty(*x.shape), self._empty(len(x), given["weight"].shape[1])
        out = self.losses, dx, gradients["weight"], gradients["bias"]
        options = {"input_gradient": not first, "workspace": workspace, "out": out}
        layer = partial(linear_softmax_cross_entropy, x, given["weight"], given["bias"], labels, **options)
        self._calls.append(layer)
        return dx

    def run(self, x: Any, labels: Any, *, lr: float, before: int, start: int = 0) -> Iterator[None]:
        """Make a step for every `next` of the iterator, to the last whole mini-batch.

        Parameters
        ----------
        x : array, shape (rows, inputs), type of the model
            Examples, in the order of the mini-batches.
        labels : array, shape (rows,), int32
            Classes of the examples.
        lr : float
            Learning rate, per step.
        before : int
            Number of steps that the optimiser has made before the first mini-batch of `x`.
        start : int
            Number of the mini-batch to begin with.

        Yields
        ------
        None
            After every step.
        """
        steps = len(x) // self.batch
        self._take(x, labels, update_schedule(self.optimizer, lr, steps, before=before), start)
        for _ in range(start, steps):
            if self._replay is None:
                self._step()  # compiles what is not compiled yet, which a capture could not
                self._replay = self._runtime.capture(self._step, self.model.parameters)
            else:
                self._replay()
            yield

    def _take(self, x: Any, labels: Any, schedule: np.ndarray, start: int) -> None:
        """Copy the data to where a captured step looks for them."""
        xp = self.model.xp
        if self._shape != x.shape:
            self._shape, self._replay = x.shape, None
            self._data = self._empty(*x.shape), xp.zeros(len(x), "int32"), self._empty(*schedule.shape)
        scalars = xp.asarray(schedule.astype(self.model.dtype))
        for kept, new in zip(self._data, (x, labels, scalars), strict=True):
            kept[...] = new
        self._counter[...] = xp.asarray(np.array([start, 0], np.uint32))

    def _step(self) -> None:
        mini_batch(*self._data, self._counter, out=self._mini_batch)
        for call in self._calls:
            call()
