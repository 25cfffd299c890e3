"""The training step of the question, 64-20-10 or the like, by us and by others: all from the same initial weights.

A step class takes the state of an `MLP` with one hidden layer. `prepare` turns a mini-batch into what `step` wants,
which makes one training step and returns the mean loss, or the losses of the examples, of the forward in it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from bnkernels import MLP, softmax_cross_entropy
from bnkernels.optimizers import make_optimizer

State = dict[str, np.ndarray]


class Step(Protocol):
    """One network with its optimiser."""

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return the mini-batch as `step` takes it."""

    def step(self, x: Any, labels: Any) -> Any:
        """Train on the mini-batch; return the loss before."""


class OurStep:
    """bnkernels on NumPy arrays, as its trainer uses it."""

    def __init__(self, state: State, optimizer: str, lr: float) -> None:
        inputs, hidden = state["0.weight"].shape
        classes = len(state["1.bias"])
        self.model = MLP((inputs, hidden, classes), norm="batch" if "0.gamma" in state else "none")
        self.model.load_state(state)
        self.optimizer = make_optimizer(optimizer, self.model, lr)
        self.classes, self.out = classes, None

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return them as they are."""
        if self.out is None:
            self.out = np.empty(len(x), x.dtype), np.empty((len(x), self.classes), x.dtype)
        return x, labels

    def step(self, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Train on the mini-batch."""
        logits = self.model.forward(x, training=True)
        losses, dlogits = softmax_cross_entropy(logits, labels, out=self.out)
        self.model.backward(dlogits)
        self.optimizer.step()
        return losses


class NumPyStep:
    """The expressions that a user of NumPy would write; in float64 the reference for everybody else."""

    def __init__(self, state: State, optimizer: str, lr: float, dtype: str = "float32") -> None:
        floats = {name: array.astype(dtype) for name, array in state.items() if array.dtype.kind == "f"}
        self.running = {name: floats.pop(name) for name in list(floats) if "running" in name}
        self.parameters = floats
        self.norm = "0.gamma" in floats
        self.optimizer, self.lr, self.steps = optimizer, lr, 0
        self.first = {name: np.zeros_like(array) for name, array in floats.items()}
        self.second = {name: np.zeros_like(array) for name, array in floats.items()}

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return them, the inputs in the precision of the network."""
        return x.astype(self.parameters["0.weight"].dtype), labels

    def step(self, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Train on the mini-batch."""
        p, examples = self.parameters, np.arange(len(x))
        z = x @ p["0.weight"]
        a = self._batch_norm(z) if self.norm else z + p["0.bias"]
        h = np.maximum(a, 0)
        logits = h @ p["1.weight"] + p["1.bias"]
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        totals = exponentials.sum(axis=1, keepdims=True)
        losses = np.log(totals[:, 0]) - shifted[examples, labels]

        dlogits = exponentials / totals
        dlogits[examples, labels] -= 1
        dlogits /= len(x)
        da = (dlogits @ p["1.weight"].T) * (a > 0)
        gradients = {"1.weight": h.T @ dlogits, "1.bias": dlogits.sum(axis=0)}
        if self.norm:
            gradients["0.gamma"], gradients["0.beta"] = (da * self.xhat).sum(axis=0), da.sum(axis=0)
            of_mean = (gradients["0.beta"] + self.xhat * gradients["0.gamma"]) / len(x)
            da = p["0.gamma"] * self.rstd * (da - of_mean)
        else:
            gradients["0.bias"] = da.sum(axis=0)
        gradients["0.weight"] = x.T @ da
        self._update(gradients)
        return losses

    def _batch_norm(self, z: np.ndarray, momentum: float = 0.1, eps: float = 1e-5) -> np.ndarray:
        rows, running = len(z), self.running
        mean, var = z.mean(axis=0), z.var(axis=0)
        running["0.running_mean"] = (1 - momentum) * running["0.running_mean"] + momentum * mean
        running["0.running_var"] = (1 - momentum) * running["0.running_var"] + momentum * var * rows / (rows - 1)
        self.rstd = 1 / np.sqrt(var + eps)
        self.xhat = (z - mean) * self.rstd
        return self.parameters["0.gamma"] * self.xhat + self.parameters["0.beta"]

    def _update(self, gradients: State) -> None:
        self.steps += 1
        for name, g in gradients.items():
            p, m, s = self.parameters[name], self.first[name], self.second[name]
            if self.optimizer == "sgd":
                p -= self.lr * g
            elif self.optimizer == "momentum":
                m[...] = 0.9 * m + g
                p -= self.lr * m
            else:
                m[...] = 0.9 * m + 0.1 * g
                s[...] = 0.999 * s + 0.001 * g * g
                unbiased = np.sqrt(s / (1 - 0.999**self.steps))
                p -= self.lr * (m / (1 - 0.9**self.steps)) / (unbiased + 1e-8)


class TorchStep:
    """PyTorch on the CPU, eager, with the optimisers' defaults. Needs PyTorch."""

    def __init__(self, state: State, optimizer: str, lr: float, *, fused: bool | None = None) -> None:
        import torch
        from torch import nn

        torch.set_num_threads(1)
        inputs, hidden = state["0.weight"].shape
        norm = "0.gamma" in state
        last = nn.Linear(hidden, len(state["1.bias"]))
        first = nn.Linear(inputs, hidden, bias=not norm)
        self.model = nn.Sequential(first, *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU(), last)
        with torch.no_grad():
            first.weight.copy_(torch.from_numpy(state["0.weight"].T.copy()))
            last.weight.copy_(torch.from_numpy(state["1.weight"].T.copy()))
            last.bias.copy_(torch.from_numpy(state["1.bias"]))
            if not norm:
                first.bias.copy_(torch.from_numpy(state["0.bias"]))
        make = {
            "sgd": lambda p: torch.optim.SGD(p, lr=lr, fused=fused),
            "momentum": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, fused=fused),
            "adam": lambda p: torch.optim.Adam(p, lr=lr, fused=fused),
        }
        self.optimizer = make[optimizer](self.model.parameters())
        self.torch, self.loss = torch, nn.functional.cross_entropy

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return them as tensors, the labels as the 64-bit integers that PyTorch wants."""
        return self.torch.from_numpy(x), self.torch.from_numpy(labels.astype(np.int64))

    def step(self, x: Any, labels: Any) -> Any:
        """Train on the mini-batch."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
