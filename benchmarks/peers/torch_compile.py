"""PyTorch compiled by torch.compile: normalisation and epilogue become one graph, which Inductor fuses.

As in eager mode nothing requires a gradient. The backward is compiled from the operators of autograd, which Inductor
takes apart and fuses just as it does those that it finds behind a compiled forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

from benchmarks.harness.case import Arrays, Call, Case, Provider
from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.peers.pytorch import NEEDED, activate, in_memory_order, load, normalise_and_save, tensors_of
from benchmarks.peers.pytorch import absent as absent_pytorch

VARIANTS: dict[str, dict[str, Any]] = {
    "torch.compile": {},
    "torch.compile, max-autotune": {"mode": "max-autotune-no-cudagraphs"},  # the graphs are captured by the clock
    "torch.compile, cooperative reductions": {"options": {"triton.cooperative_reductions": True}},
}


def absent() -> str | None:
    """Return why torch.compile has no GPU to compile for, or None."""
    return absent_pytorch("cuda") or (None if find_spec("triton") else "torch.compile needs Triton")


@lru_cache(maxsize=2 * len(VARIANTS))
def compiled(case: Case, variant: str) -> Callable[..., Any]:
    """Return the case as a compiled function, which compiles in its first call.

    Dynamo keeps what it compiled with the code object, and falls back to eager mode when a code object has collected
    too much. Every case therefore gets a code object of its own, and a graph that breaks is an error.
    """
    function = (forward_function if case.direction == "forward" else backward_function)(case.epilogue)
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    return load().compile(own, fullgraph=True, dynamic=False, **VARIANTS[variant])


def forward_function(epilogue: str) -> FunctionType:
    """Return a forward, written as for eager mode but out of place."""
    torch = load()
    batch_norm = torch.nn.functional.batch_norm

    def forward(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any) -> Any:
        y = batch_norm(x, running_mean, running_var, gamma, beta, True, MOMENTUM, EPSILON)
        if residual is not None:
            y = y + residual
        return y.relu() if epilogue else y

    return forward


def backward_function(epilogue: str) -> FunctionType:
    """Return a backward, by the operators that autograd would record."""
    aten = load().ops.aten
    relu_backward = aten.threshold_backward.default
    batch_norm_backward = aten.native_batch_norm_backward.default

    def backward(x: Any, gamma: Any, dy: Any, y: Any, mean: Any, rstd: Any) -> tuple:
        g = relu_backward(dy, y, 0) if epilogue else dy
        gradients = batch_norm_backward(g, x, gamma, None, None, mean, rstd, True, EPSILON, [True, True, True])
        return (*gradients, g) if epilogue == "add_relu" else tuple(gradients)

    return backward


def prepare(case: Case, arrays: Arrays, variant: str = "torch.compile") -> Call:
    """Prepare a case with the options of a variant; its first call compiles."""
    tensors = tensors_of(case, arrays)
    function = compiled(case, variant)
    if case.direction == "forward":
        return _forward(case, tensors, function)
    return _backward(case, tensors, function)


def _forward(case: Case, tensors: dict[str, Any], function: Callable[..., Any]) -> Call:
    """Prepare a forward."""
    inputs = [tensors[name] for name in NEEDED["forward"]]
    running_mean, running_var = inputs[-2:]
    inputs.append(tensors.get("residual"))

    def call() -> tuple:
        return in_memory_order(case, function(*inputs)), running_mean, running_var

    return call


def _backward(case: Case, tensors: dict[str, Any], function: Callable[..., Any]) -> Call:
    """Prepare a backward: the forward is computed here."""
    x, gamma, beta, dy = (tensors[name] for name in NEEDED["backward"])
    y, mean, rstd = normalise_and_save(x, gamma, beta)
    y = activate(y, tensors.get("residual"), case.epilogue) if case.epilogue else None

    def call() -> tuple:
        dx, dgamma, dbeta, *dresidual = function(x, gamma, dy, y, mean, rstd)
        return in_memory_order(case, dx), dgamma, dbeta, *(in_memory_order(case, g) for g in dresidual)

    return call


PROVIDERS = tuple(
    Provider(name, "cuda", partial(prepare, variant=name), absent, engine="torch", slow_start=True) for name in VARIANTS
)
