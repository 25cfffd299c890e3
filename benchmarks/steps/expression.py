"""The training step in the expressions that a user of NumPy or CuPy would write; in float64 everybody's reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.steps.step import ArrayStep, Maker, State, linears, norm_of
from bnkernels.runtime.registry import why_no_cuda


class ExpressionStep(ArrayStep):
    """Plain array expressions for the forward, the backward and the optimiser.

    Parameters
    ----------
    state : dict of str to numpy.ndarray
        Initial weights of the network, see `initial_state`.
    optimizer : {'sgd', 'momentum', 'adam'}
        Name of the optimiser.
    lr : float
        Learning rate.
    xp : module
        ``numpy`` or ``cupy``: what computes.
    dtype : str
        In which precision.
    activation : {'relu', 'sigmoid'}
        Activation of the hidden layers.
    """

    def __init__(
        self,
        state: State,
        optimizer: str,
        lr: float,
        *,
        xp: Any = np,
        dtype: str = "float32",
        activation: str = "relu",
    ) -> None:
        self.state = {name: array.astype(dtype) for name, array in state.items() if array.dtype.kind == "f"}
        self.norm, self.last = norm_of(state), linears(state) - 1
        self.optimizer, self.lr, self.xp, self.dtype, self.activation = optimizer, lr, xp, dtype, activation
        self.reset()

    def reset(self) -> None:
        """Take copies of the initial weights."""
        arrays = {name: self.xp.array(array) for name, array in self.state.items()}
        self.running = {name: arrays.pop(name) for name in list(arrays) if "running" in name}
        self.parameters = arrays
        self.first = {name: self.xp.zeros_like(array) for name, array in arrays.items()}
        self.second = {name: self.xp.zeros_like(array) for name, array in arrays.items()}
        self.steps = 0

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return them as arrays of `xp`, the inputs in the precision of the network."""
        return self.xp.asarray(x.astype(self.dtype)), self.xp.asarray(labels)

    def step(self, x: Any, labels: Any) -> Any:
        """Train on the mini-batch."""
        p, xp, last = self.parameters, self.xp, self.last
        examples = xp.arange(len(x))
        h, activations, saved = x, [], []
        for i in range(last):
            z = h @ p[f"{i}.weight"]
            a, for_backward = self._norm(i, z) if self.norm != "none" else (z + p[f"{i}.bias"], ())
            before, h = h, xp.maximum(a, 0) if self.activation == "relu" else 1 / (1 + xp.exp(-a))
            activations.append((before, h))
            saved.append(for_backward)
        logits = h @ p[f"{last}.weight"] + p[f"{last}.bias"]
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = xp.exp(shifted)
        totals = exponentials.sum(axis=1, keepdims=True)
        losses = xp.log(totals[:, 0]) - shifted[examples, labels]

        dz = exponentials / totals
        dz[examples, labels] -= 1
        dz /= len(x)
        gradients = {f"{last}.weight": h.T @ dz, f"{last}.bias": dz.sum(axis=0)}
        for i in reversed(range(last)):
            h, y = activations[i]
            dz = (dz @ p[f"{i + 1}.weight"].T) * ((y > 0) if self.activation == "relu" else y * (1 - y))
            if self.norm == "none":
                gradients[f"{i}.bias"] = dz.sum(axis=0)
            else:
                dz = self._norm_backward(i, dz, *saved[i], gradients)
            gradients[f"{i}.weight"] = h.T @ dz
        self._update(gradients)
        return losses

    def _norm(self, i: int, z: Any) -> tuple[Any, tuple[Any, Any]]:
        """Return the normalised values, scaled and shifted, and what the backward needs."""
        if self.norm == "batch":
            rows, running = len(z), self.running
            mean, var = z.mean(axis=0), z.var(axis=0)
            mean_name, var_name = f"{i}.running_mean", f"{i}.running_var"
            running[mean_name] = (1 - MOMENTUM) * running[mean_name] + MOMENTUM * mean
            running[var_name] = (1 - MOMENTUM) * running[var_name] + MOMENTUM * var * rows / (rows - 1)
        else:
            mean, var = z.mean(axis=1, keepdims=True), z.var(axis=1, keepdims=True)
        rstd = 1 / self.xp.sqrt(var + EPSILON)
        xhat = (z - mean) * rstd
        return self.parameters[f"{i}.gamma"] * xhat + self.parameters[f"{i}.beta"], (xhat, rstd)

    def _norm_backward(self, i: int, da: Any, xhat: Any, rstd: Any, gradients: dict[str, Any]) -> Any:
        """Return the gradient of what was normalised; put those of gamma and beta to the others."""
        gradients[f"{i}.gamma"], gradients[f"{i}.beta"] = (da * xhat).sum(axis=0), da.sum(axis=0)
        gamma = self.parameters[f"{i}.gamma"]
        if self.norm == "batch":
            of_mean = (gradients[f"{i}.beta"] + xhat * gradients[f"{i}.gamma"]) / len(da)
            return gamma * rstd * (da - of_mean)
        dxhat = gamma * da
        of_mean = dxhat.mean(axis=1, keepdims=True) + xhat * (dxhat * xhat).mean(axis=1, keepdims=True)
        return rstd * (dxhat - of_mean)

    def _update(self, gradients: dict[str, Any]) -> None:
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
                unbiased = self.xp.sqrt(s / (1 - 0.999**self.steps))
                p -= self.lr * (m / (1 - 0.9**self.steps)) / (unbiased + 1e-8)


MAKERS = (
    Maker("NumPy expression", "cpu", ExpressionStep),
    Maker("CuPy expression", "cuda", ExpressionStep.on_cupy, why_no_cuda),
)
