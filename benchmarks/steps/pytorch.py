"""The training step in PyTorch: eager, compiled, and captured whole in a CUDA graph. On the CPU with one thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.steps.step import Maker, State, Step, linears, norm_of


class TorchStep(Step):
    """PyTorch, eager, with the defaults of its optimisers. Needs PyTorch.

    Parameters
    ----------
    state : dict of str to numpy.ndarray
        Initial weights of the network, see `initial_state`.
    optimizer : {'sgd', 'momentum', 'adam'}
        Name of the optimiser.
    lr : float
        Learning rate.
    device : str
        ``cpu`` or ``cuda``.
    activation : {'relu', 'sigmoid'}
        Activation of the hidden layers.
    **options
        Options of the optimiser, such as ``fused``.
    """

    def __init__(
        self,
        state: State,
        optimizer: str,
        lr: float,
        *,
        device: str = "cpu",
        activation: str = "relu",
        **options: Any,
    ) -> None:
        import torch

        torch.set_num_threads(1)
        if device == "cuda":  # products in float32, like everybody's
            torch.backends.cuda.matmul.allow_tf32 = False
        self.torch, self.device = torch, torch.device(device)
        self.model = network(state, activation).to(self.device)
        self.initial = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        make = {
            "sgd": torch.optim.SGD,
            "momentum": partial(torch.optim.SGD, momentum=0.9),
            "adam": torch.optim.Adam,
        }
        self.optimizer = make[optimizer](self.model.parameters(), lr=lr, **options)
        self.loss = mean_loss

    def reset(self) -> None:
        """Write the initial values into the tensors there are, which a graph may have captured."""
        with self.torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self.initial[name])
            for moments in self.optimizer.state.values():
                for tensor in filter(self.torch.is_tensor, moments.values()):
                    tensor.zero_()

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return them as tensors, the labels as the 64-bit integers that PyTorch wants."""
        return tuple(self.torch.from_numpy(array).to(self.device) for array in (x, labels.astype(np.int64)))

    def step(self, x: Any, labels: Any) -> Any:
        """Train on the mini-batch."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model, x, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def to_host(self, losses: Any) -> np.ndarray:
        """Return losses as a NumPy array."""
        return losses.cpu().numpy()

    def synchronise(self) -> None:
        """Wait for the GPU, where there is one."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


class CompiledStep(TorchStep):
    """Forward and loss compiled by torch.compile in its default mode, the backward with them; a fused optimiser."""

    def __init__(self, state: State, optimizer: str, lr: float, **where: Any) -> None:
        super().__init__(state, optimizer, lr, fused=True, **where)
        self.loss = compiled_loss()


class GraphStep(TorchStep):
    """Forward, loss, backward and fused optimiser captured once in one CUDA graph, from static inputs.

    Parameters
    ----------
    state, optimizer, lr
        See `TorchStep`.
    device : str
        ``cuda``.
    capture : callable
        Takes the work and returns what repeats it.
    **options
        Further options of `TorchStep`.
    """

    WARM_UPS = 3  # before a capture, as PyTorch's documentation wants them

    def __init__(
        self,
        state: State,
        optimizer: str,
        lr: float,
        *,
        device: str = "cuda",
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        **options: Any,
    ) -> None:
        options |= {"capturable": True} if optimizer == "adam" and device == "cuda" else {}
        super().__init__(state, optimizer, lr, device=device, fused=True, **options)
        self.capture = capture or captured
        self.inputs: tuple[Any, Any] | None = None

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return them as tensors; the first of their size are also captured from."""
        prepared = super().prepare(x, labels)
        if self.inputs is None or self.inputs[0].shape != prepared[0].shape:
            self.inputs = tuple(tensor.clone() for tensor in prepared)
            self.replay = self.capture(self._work)
            self.reset()  # the warm-up has trained it
        return prepared

    def _work(self) -> None:
        """Make the step that is captured."""
        self.optimizer.zero_grad(set_to_none=True)  # the gradients come to lie in the graph's own memory
        self.output = self.loss(self.model, *self.inputs)
        self.output.backward()
        self.optimizer.step()

    def step(self, x: Any, labels: Any) -> Any:
        """Copy the mini-batch to where the graph reads it; replay."""
        for held, given in zip(self.inputs, (x, labels), strict=True):
            held.copy_(given)
        self.replay()
        return self.output.detach()


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the work, after warming up on a side stream."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GraphStep.WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other libraries have threads of their own
        work()
    return graph.replay


def network(state: State, activation: str = "relu") -> Any:
    """Return the network with these weights, as modules of PyTorch."""
    import torch
    from torch import nn

    norms = {
        "batch": partial(nn.BatchNorm1d, eps=EPSILON, momentum=MOMENTUM),
        "layer": partial(nn.LayerNorm, eps=EPSILON),
    }
    norm, last = norm_of(state), linears(state) - 1
    layers: list[Any] = []
    for i in range(last + 1):
        names = {"weight": "weight"} | ({"bias": "bias"} if f"{i}.bias" in state else {})
        inputs, outputs = state[f"{i}.weight"].shape
        layers.append(load(nn.Linear(inputs, outputs, bias="bias" in names), state, i, names))
        if i < last:
            if norm != "none":
                names = {"weight": "gamma", "bias": "beta"}
                names |= {name: name for name in ("running_mean", "running_var") if norm == "batch"}
                layers.append(load(norms[norm](outputs), state, i, names))
            layers.append({"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[activation]())
    return nn.Sequential(*layers).to(torch.float32)


def load(module: Any, state: State, layer: int, names: dict[str, str]) -> Any:
    """Return the module with its tensors taken from a layer of the state; ours has matrices the other way round."""
    import torch

    with torch.no_grad():
        for theirs, name in names.items():
            getattr(module, theirs).copy_(torch.from_numpy(state[f"{layer}.{name}"].T.copy()))
    return module


def mean_loss(model: Any, x: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of the network."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(x), labels)


@cache
def compiled_loss() -> Callable[..., Any]:
    """Return `mean_loss` compiled, anew for every kind of network and every size.

    A graph that breaks, or more sizes than the limit, are errors: neither may become eager in silence.
    """
    import torch

    torch._dynamo.config.recompile_limit = 128  # the default of 8 is less than the sizes of the overhead figure
    return torch.compile(mean_loss, fullgraph=True, dynamic=False)


def absent(place: str) -> str | None:
    """Return why PyTorch cannot run at a place, or None."""
    try:
        import torch
    except ImportError:
        return "not installed"
    return None if place == "cpu" or torch.cuda.is_available() else "it finds no GPU"


def _makers(place: str) -> tuple[Maker, ...]:
    missing, here = partial(absent, place), {"device": place}
    compiled = Maker(
        "PyTorch, compiled", place, partial(CompiledStep, **here), missing, slow_start=True, default=place == "cuda"
    )
    return (
        Maker("PyTorch", place, partial(TorchStep, **here), missing),
        Maker("PyTorch, fused optimiser", place, partial(TorchStep, fused=True, **here), missing),
        compiled,
    )


MAKERS = (
    *_makers("cpu"),
    *_makers("cuda"),
    Maker("PyTorch, CUDA graph", "cuda", GraphStep, partial(absent, "cuda")),
)
