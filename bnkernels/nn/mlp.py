"""The network of the question: fully connected layers, each followed by a norm (or none) and an activation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import Communicator, checked
from bnkernels.nn import display
from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.containers import Sequential
from bnkernels.nn.layer import Layer, Leaf
from bnkernels.nn.layer_norm import LayerNorm
from bnkernels.nn.linear import Linear
from bnkernels.nn.owner import device_module
from bnkernels.nn.perceptron import Perceptron
from bnkernels.nn.state import host
from bnkernels.nn.sync_batch_norm import SyncBatchNorm
from bnkernels.runtime import checks as check


class Stages(Sequential):
    """The layers of an MLP, with the numbers that they have in a PyTorch `Sequential` with a module an activation."""

    @property
    def children(self) -> Mapping[str, Layer]:
        """The layers, by number."""
        steps = (1 if layer.activation == "identity" else 2 for layer in self.layers)
        return dict(zip(map(str, accumulate(steps, initial=0)), self.layers, strict=False))


class MLP(Perceptron):
    """A multi-layer perceptron.

    With ``norm="batch"`` a hidden layer is linear without bias (beta replaces it), batch norm, activation; with
    ``norm="layer"`` the same with layer norm; with ``norm="none"`` linear with bias, activation. The output layer is
    linear with bias. The same seed gives the same weight matrices with any norm.

    Parameters
    ----------
    sizes : sequence of int
        Number of inputs, of neurons of every hidden layer, and of classes: ``(64, 20, 10)``.
    norm : {'batch', 'layer', 'none'}
        Norm before the activations of the hidden layers.
    activation : str
        Activation of the hidden layers: one of `bnkernels.ops.activations.ACTIVATIONS`, with its usual `alpha`.
    dtype : {'float32', 'float64'}, or a NumPy equivalent
        Data type of parameters and activations.
    seed : int
        Seed of the initial weights.
    xp : module
        Array module that computes: `numpy`, or `cupy` for a GPU.
    momentum, unbiased, eps : float, bool, float
        Options of the batch norms; see `batch_norm_forward`. A momentum of None averages all mini-batches. Layer norms
        take eps.
    track_running_stats : bool
        Whether the batch norms have running statistics; without them they always normalise with those of the
        mini-batch.
    communicator : Communicator, optional
        Ranks over whose mini-batches together the batch norms normalise; see `SyncBatchNorm`.

    Attributes
    ----------
    parameters, gradients : array, shape (P,)
        All parameters, and their gradients after a `backward`, of which the layers hold views.
    running : array, shape (R,)
        All running statistics, of which the layers hold views too.

    Raises
    ------
    TypeError
        If `sizes` are no integers, `xp` is no array module, or a number is none.
    ValueError
        If a size is not positive, a name is unknown, or a number is out of range.

    Examples
    --------
    >>> model = MLP((64, 20, 10))
    >>> logits = model.forward(np.zeros((64, 64), "float32"), training=True)
    >>> logits.shape
    (64, 10)
    """

    training = True

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        norm: str = "batch",
        activation: str = "relu",
        dtype: Any = "float32",
        seed: int = 0,
        xp: Any = np,
        momentum: float | None = 0.1,
        unbiased: bool = True,
        eps: float = 1e-5,
        track_running_stats: bool = True,
        communicator: Communicator | None = None,
    ) -> None:
        options = {"momentum": momentum, "unbiased": unbiased, "eps": eps, "track_running_stats": track_running_stats}
        self.communicator = None if communicator is None else checked(communicator)
        if communicator is not None and norm != "batch":
            raise ValueError(f"communicator is for the statistics of batch norms; norm {norm!r} has none: drop it")
        super().__init__(sizes, norm, activation, dtype, seed, xp, **options)
        self._input: tuple | None = None  # form of the last input, which was checked
        self._logits: tuple | None = None  # form of the logits of the last forward in training
        self._build()

    def _build(self) -> None:
        self.layers: list[Leaf] = []
        for i, (mine, grads, running) in enumerate(self.layer_arrays):
            hidden = i < len(self.sizes) - 2
            behind = {"activation": self.activation} if hidden and "bias" in mine else {}
            linear = Linear.from_arrays(
                mine["weight"], mine.get("bias"), gradients=grads, input_gradient=i > 0, **behind
            )
            if self.layers and isinstance(self.layers[-1], SyncBatchNorm):
                linear.later = self.layers[-1].rest  # gradients of weights, while the ranks exchange sums
            self.layers.append(linear)
            if "gamma" not in mine:
                continue
            vectors = mine["gamma"], mine["beta"]
            grads = {"weight": grads["gamma"], "bias": grads["beta"]}
            options = {"gradients": grads, "activation": self.activation}
            if self.norm == "layer":
                self.layers.append(LayerNorm.from_arrays(*vectors, eps=self._options["eps"], **options))
                continue
            kind = BatchNorm
            if self.communicator is not None:
                kind, options = SyncBatchNorm, options | {"communicator": self.communicator, "name": str(i)}
            norm = kind.from_arrays(*vectors, **running, **options, **self._options)
            if self.tracked:
                norm.running_var[...] = 1
                self._norms[f"{i}.batches"] = norm
            self.layers.append(norm)

    def __call__(self, x: Any, **options: Any) -> Any:
        """Return the logits: a `forward`."""
        return self.forward(x, **options)

    @np.errstate(all="ignore")  # kernels have no warnings either
    def forward(self, x: Any, *, training: bool | None = None) -> Any:
        """Return the logits, shape (N, classes).

        Parameters
        ----------
        x : array, shape (N, inputs)
            Mini-batch, of the network's data type and array module.
        training : bool, optional
            Mode of this call; by default that of the network, see `train` and `eval`. True normalises with the
            mini-batch's statistics, updates the running ones and keeps what `backward` needs; False normalises with
            the running statistics, where they are tracked, and changes nothing.

        Returns
        -------
        array, shape (N, classes)
            Unnormalised log-probabilities.

        Raises
        ------
        TypeError, ValueError
            If `x` is not such an array; nothing is changed then.
        """
        form = _form(x)
        if form != self._input:
            self._check("x", x, None, self.sizes[0])
            self._input = form
        training = self.training if training is None else training
        for layer in self.layers:
            x = layer._forward(x, training, training)
        if training:
            self._logits = type(x), x.dtype, x.shape
        return x

    @np.errstate(all="ignore")
    def backward(self, dlogits: Any) -> None:
        """Write all gradients for the last mini-batch given to `forward` in training.

        Parameters
        ----------
        dlogits : array, shape (N, classes)
            Gradient of the loss with respect to the logits.

        Raises
        ------
        TypeError, ValueError
            If `dlogits` is not such an array.
        RuntimeError
            If there was no `forward` in training.
        """
        if self._logits is None:
            raise RuntimeError("backward needs what a forward keeps: call forward(x, training=True) before it")
        if _form(dlogits) != self._logits:
            self._check("dlogits", dlogits, *self._logits[2])
        for layer in reversed(self.layers):
            dlogits = layer._backward(dlogits, True)  # nobody else has the gradients between the layers

    def _check(self, name: str, array: Any, rows: int | None, columns: int) -> None:
        """Check for a matrix beside the parameters, of their type."""
        mine = self.parameters
        argument = check.arguments({name: check.signature(array), "parameters": check.signature(mine)})[name]
        check.like(argument, argument.shape, mine.dtype)
        if argument.shape != (argument.shape[0] if rows is None and argument.shape else rows, columns):
            wanted = "N" if rows is None else rows
            raise ValueError(f"{name} must have the shape ({wanted}, {columns}), got {argument.shape}")

    def train(self, mode: bool = True) -> MLP:
        """Set the mode of the network; see `Layer.train`."""
        self.training = check.boolean("mode", mode)
        return self

    def eval(self) -> MLP:
        """Set the mode to evaluation: batch norms take their running statistics.

        Returns
        -------
        MLP
            This network.
        """
        return self.train(False)

    @property
    def stages(self) -> Stages:
        """The layers, numbered as in a PyTorch `Sequential` that has a module for every activation."""
        return Stages(*self.layers)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of all arrays on the host, in PyTorch's names and layout.

        Returns
        -------
        dict of str to numpy.ndarray
            Arrays as those of `Sequential(Linear, BatchNorm1d, ReLU, ..., Linear)`, whose linear layers in front of a
            norm have no bias.
        """
        return self.stages.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take the numbers of all arrays from a state in PyTorch's names and layout.

        Parameters
        ----------
        state_dict : mapping of str to array
            State as `state_dict` returns it, or that of such a PyTorch module.
        strict : bool
            Whether all names must be there and no other.

        Raises
        ------
        TypeError, ValueError
            If the state does not fit; nothing is changed then.
        """
        self.stages.load_state_dict(state_dict, strict=strict)

    def to(self, device: Any) -> MLP:
        """Move all arrays to a device.

        Parameters
        ----------
        device : {"cpu", "cuda"} or module
            Device, or array module. An optimiser is made after that: its arrays stay where they are.

        Returns
        -------
        MLP
            This network.
        """
        self.__setstate__(self.__getstate__() | {"xp": device_module(device)})
        return self

    def astype(self, dtype: Any) -> MLP:
        """Convert the network to another data type.

        Parameters
        ----------
        dtype : data type
            One of float32 and float64.

        Returns
        -------
        MLP
            This network.
        """
        state = self.__getstate__()
        self.__setstate__(state | {"options": state["options"] | {"dtype": dtype}})
        return self

    def __getstate__(self) -> dict[str, Any]:
        names = "sizes", "norm", "activation", "dtype"
        options = {name: getattr(self, name) for name in names} | self._options
        options |= {"track_running_stats": self.tracked, "communicator": self.communicator}
        views = {kind: getattr(self, kind) for kind in ("_parameters", "_gradients", "_running")}
        arrays = {kind: {name: host(array) for name, array in of.items()} for kind, of in views.items()}
        xp = self.xp.__name__ if isinstance(self.xp, ModuleType) else self.xp
        return {"options": options, "xp": xp, "arrays": arrays, "batches": self.batches, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        xp = importlib.import_module(state["xp"]) if isinstance(state["xp"], str) else state["xp"]
        MLP.__init__(self, **state["options"], xp=xp)
        for kind, arrays in state["arrays"].items():
            for name, array in arrays.items():
                getattr(self, kind)[name][...] = xp.asarray(array.astype(self.dtype, copy=False))
        self.batches, self.training = state["batches"], state["training"]

    def __deepcopy__(self, memo: dict[int, Any]) -> MLP:
        copy = type(self).__new__(type(self))
        copy.__setstate__(self.__getstate__())
        return copy

    def __repr__(self) -> str:
        about = f"norm={self.norm!r}, activation={self.activation!r}, dtype={self.dtype!r}"
        return f"MLP({self.sizes}, {about})  # {self.stages.parameter_count:,} parameters"

    def _repr_html_(self) -> str:
        return display.html(self.stages)


def _form(array: Any) -> tuple:
    """Return the type, data type and shape of an array."""
    try:
        return type(array), array.dtype, array.shape
    except AttributeError:
        return type(array), None, None
