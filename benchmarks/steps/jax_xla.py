"""The training step in JAX, on its default device: each step jitted whole, or many in one `lax.scan`."""

from __future__ import annotations

import math
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.peers.jax_xla import load
from benchmarks.steps.step import Batches, Maker, State, Step

Carry = tuple[Any, ...]  # parameters, running statistics, first and second moments, number of steps


class JaxStep(Step):
    """The whole step jitted, its state donated. Needs JAX.

    Parameters
    ----------
    state : dict of str to numpy.ndarray
        Initial weights of the network, see `initial_state`.
    optimizer : {'sgd', 'momentum', 'adam'}
        Name of the optimiser.
    lr : float
        Learning rate.
    activation : {'relu', 'sigmoid'}
        Activation of the hidden layers.
    """

    def __init__(self, state: State, optimizer: str, lr: float, activation: str = "relu") -> None:
        self.jax = load()
        self.state = {name: array for name, array in state.items() if array.dtype.kind == "f"}
        self.train, self.scan = jitted(optimizer, lr, activation)
        self.reset()

    def reset(self) -> None:
        """Take copies of the initial weights: the last ones were donated."""
        jnp = self.jax.numpy
        arrays = {name: jnp.array(array, copy=True) for name, array in self.state.items()}
        running = {name: arrays.pop(name) for name in list(arrays) if "running" in name}
        first, second = ({name: jnp.zeros_like(array) for name, array in arrays.items()} for _ in range(2))
        self.carry = (arrays, running, first, second, jnp.zeros((), np.int32))

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return them on JAX's device."""
        return self.jax.numpy.array(x), self.jax.numpy.array(labels.astype(np.int32))

    def step(self, x: Any, labels: Any) -> Any:
        """Train on the mini-batch."""
        self.carry, loss = self.train(self.carry, (x, labels))
        return loss

    def synchronise(self) -> None:
        """Wait for the last step."""
        self.jax.block_until_ready(self.carry)


class ScanStep(JaxStep):
    """All steps of a run in one call of `lax.scan`."""

    def prepare_all(self, batches: Batches) -> Any:
        """Return the mini-batches as one stack."""
        x, labels = (np.stack(arrays) for arrays in zip(*batches, strict=True))
        return self.prepare(x, labels)

    def run(self, prepared: Any) -> None:
        """Train on the stack."""
        self.carry, _ = self.scan(self.carry, prepared)

    def losses(self, prepared: Any) -> np.ndarray:
        """Train on the stack; return the mean loss of each mini-batch."""
        self.carry, losses = self.scan(self.carry, prepared)
        return np.asarray(losses, np.float64)


def mean_loss(
    parameters: dict[str, Any], running: dict[str, Any], x: Any, labels: Any, activation: str
) -> tuple[Any, dict[str, Any]]:
    """Return the mean cross-entropy of the network, and the new running statistics."""
    import jax
    from jax import numpy as jnp

    product = partial(jnp.matmul, precision="highest")
    last = sum(name.endswith(".weight") for name in parameters) - 1
    updated = {}
    for i in range(last):
        x = product(x, parameters[f"{i}.weight"])
        if f"{i}.bias" in parameters:
            x = x + parameters[f"{i}.bias"]
        else:
            axis = 0 if running else 1
            mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
            if running:
                unbiased = var[0] * len(x) / (len(x) - 1)
                for name, new in ((f"{i}.running_mean", mean[0]), (f"{i}.running_var", unbiased)):
                    updated[name] = (1 - MOMENTUM) * running[name] + MOMENTUM * new
            x = (x - mean) * jax.lax.rsqrt(var + EPSILON) * parameters[f"{i}.gamma"] + parameters[f"{i}.beta"]
        x = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[activation](x)
    logits = product(x, parameters[f"{last}.weight"]) + parameters[f"{last}.bias"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -chosen.mean(), updated


@cache
def jitted(optimizer: str, lr: float, activation: str) -> tuple[Any, Any]:
    """Return one training step and a scan over many, jitted; JAX itself tells the networks apart."""
    import jax
    from jax import numpy as jnp

    def update(p: Any, g: Any, m: Any, s: Any, steps: Any) -> tuple[Any, Any, Any]:
        if optimizer == "sgd":
            return p - lr * g, m, s
        if optimizer == "momentum":
            m = 0.9 * m + g
            return p - lr * m, m, s
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        # 1 - b**t, which would cancel in float32
        first, second = (-jnp.expm1(steps * math.log(b)) for b in (0.9, 0.999))
        return p - lr * (m / first) / (jnp.sqrt(s / second) + 1e-8), m, s

    def train(carry: Carry, batch: tuple[Any, Any]) -> tuple[Carry, Any]:
        parameters, running, first, second, steps = carry
        of_network = jax.value_and_grad(partial(mean_loss, activation=activation), has_aux=True)
        (loss, running), gradients = of_network(parameters, running, *batch)
        new = {
            name: update(parameters[name], gradients[name], first[name], second[name], steps + 1) for name in parameters
        }
        parameters, first, second = ({name: arrays[i] for name, arrays in new.items()} for i in range(3))
        return (parameters, running, first, second, steps + 1), loss

    return (
        jax.jit(train, donate_argnums=0),
        jax.jit(lambda carry, batches: jax.lax.scan(train, carry, batches), donate_argnums=0),
    )


def absent(place: str) -> str | None:
    """Return why JAX cannot run at a place, or None."""
    if find_spec("jax") is None:
        return "JAX is not installed"
    try:
        backend = load().default_backend()
    except RuntimeError as error:
        return f"no device answers: {' '.join(str(error).split())}"
    return None if backend == {"cpu": "cpu", "cuda": "gpu"}[place] else f"its default device is of the kind {backend}"


MAKERS = tuple(
    Maker(name, place, make, partial(absent, place), slow_start=True)
    for place in ("cpu", "cuda")
    for name, make in (("JAX jit", JaxStep), ("JAX scan", ScanStep))
)
