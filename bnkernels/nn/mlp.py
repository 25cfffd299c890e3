"""The network of the question: fully connected layers, each followed by a norm (or none) and an activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bnkernels.nn.layers import ActivationLayer, BatchNorm, LayerNorm, Linear
from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.runtime import checks as check

NORMS = ("batch", "layer", "none")
RECTIFIERS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "elu")  # they lose about half of the variance
ALIGNMENT = 64  # bytes at whose multiples every parameter starts, enough for the vector loads of any library


class LayerArrays(NamedTuple):
    """Arrays of a linear layer and of the norm behind it, by name.

    Attributes
    ----------
    parameters, gradients : dict of str to array
        `weight`; `gamma` and `beta`, or `bias`.
    running : dict of str to array
        `running_mean` and `running_var`, where they are tracked.
    """

    parameters: dict[str, Any]
    gradients: dict[str, Any]
    running: dict[str, Any]


class MLP:
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

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        norm: str = "batch",
        activation: str = "relu",
        dtype: str = "float32",
        seed: int = 0,
        xp: Any = np,
        momentum: float | None = 0.1,
        unbiased: bool = True,
        eps: float = 1e-5,
        track_running_stats: bool = True,
    ) -> None:
        self.sizes = _sizes(sizes)
        check.one_of("norm", norm, NORMS)
        activation_named(activation)
        if not hasattr(xp, "matmul"):
            raise TypeError(f"xp must be an array module, numpy or cupy, got {check.shown(xp)}; import it and pass it")
        self.norm, self.activation, self.dtype, self.xp = norm, activation, _data_type(dtype), xp
        shapes = self._shapes()
        self._starts, self.parameters, self._parameters = self._flat(shapes)
        _, self.gradients, self._gradients = self._flat(shapes)
        self._initialise(np.random.default_rng(seed))
        momentum = momentum if momentum is None else check.number("momentum", momentum, 0, 1)
        eps = check.epsilon(eps, self.parameters)
        self._options = {"momentum": momentum, "unbiased": check.boolean("unbiased", unbiased), "eps": eps}
        self._input: tuple | None = None  # form of the last input, which was checked
        self._logits: tuple | None = None  # form of the logits of the last forward in training
        self._build(check.boolean("track_running_stats", track_running_stats))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every parameter, in order; names start with the number of their layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        last = len(self.sizes) - 2
        for i, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            shapes[f"{i}.weight"] = (inputs, outputs)
            names = ("gamma", "beta") if self.norm != "none" and i < last else ("bias",)
            shapes.update({f"{i}.{name}": (outputs,) for name in names})
        return shapes

    def _flat(self, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], Any, dict[str, Any]]:
        """Return the start of each of these arrays in a flat array of zeros, the flat array, and the views in it."""
        step = ALIGNMENT // np.dtype(self.dtype).itemsize
        starts, size = {}, 0
        for name, shape in shapes.items():
            starts[name] = size
            size += -(-math.prod(shape) // step) * step  # padding is zero, and its gradient too
        flat = self.xp.zeros(size, self.dtype)
        views = {
            name: flat[starts[name] : starts[name] + math.prod(shape)].reshape(shape) for name, shape in shapes.items()
        }
        return starts, flat, views

    def _initialise(self, rng: np.random.Generator) -> None:
        """Draw the weights (He et al. 2015 before a rectifier, else LeCun et al. 1998); gamma is 1, the rest 0."""
        last = len(self.sizes) - 2
        for name, view in self._parameters.items():
            layer, kind = name.split(".")
            if kind == "weight":
                gain = 2 if self.activation in RECTIFIERS and int(layer) < last else 1
                drawn = rng.standard_normal(view.shape) * math.sqrt(gain / view.shape[0])
                view[...] = self.xp.asarray(drawn.astype(self.dtype))
            elif kind == "gamma":
                view[...] = 1

    def _build(self, tracked: bool) -> None:
        self.layers: list[Any] = []
        norms = [i for i in range(len(self.sizes) - 2) if self.norm == "batch" and tracked]
        shapes = {f"{i}.running_{what}": (self.sizes[i + 1],) for i in norms for what in ("mean", "var")}
        self._running_starts, self.running, self._running = self._flat(shapes)
        self._norms: dict[str, BatchNorm] = {}
        for i, (mine, grads, _) in enumerate(self.layer_arrays):
            activated = i < len(self.sizes) - 2 and "bias" in mine and self.activation != "identity"
            linear = [name for name in mine if name == "weight" or (name == "bias" and not activated)]
            self.layers.append(
                Linear({n: mine[n] for n in linear}, {n: grads[n] for n in linear}, self.xp, first=i == 0)
            )
            affine = [{n: arrays[n] for n in ("gamma", "beta") if n in arrays} for arrays in (mine, grads)]
            if self.norm == "layer" and "gamma" in mine:
                self.layers.append(LayerNorm(*affine, eps=self._options["eps"], activation=self.activation))
            elif "gamma" in mine:
                running = [self._running[f"{i}.running_{what}"] for what in ("mean", "var") if tracked]
                norm = BatchNorm(*affine, *running, activation=self.activation, **self._options)
                if tracked:
                    running[1][...] = 1
                    self._norms[f"{i}.batches"] = norm
                self.layers.append(norm)
            elif activated:
                biases = [{"bias": arrays["bias"]} for arrays in (mine, grads)]
                self.layers.append(ActivationLayer(*biases, self.activation, self.xp))

    @np.errstate(all="ignore")  # kernels have no warnings either
    def forward(self, x: Any, *, training: bool) -> Any:
        """Return the logits, shape (N, classes).

        Parameters
        ----------
        x : array, shape (N, inputs)
            Mini-batch, of the network's data type and array module.
        training : bool
            True normalises with the mini-batch's statistics, updates the running ones and keeps what `backward` needs;
            False normalises with the running statistics, where they are tracked, and changes nothing.

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
        for layer in self.layers:
            x = layer.forward(x, training=training)
        if training:
            self._logits = _form(x)
        return x

    @np.errstate(all="ignore")  # kernels have no warnings either
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
            dlogits = layer.backward(dlogits)

    def _check(self, name: str, array: Any, rows: int | None, columns: int) -> None:
        """Check for a matrix beside the parameters, of their type."""
        mine = self.parameters
        argument = check.arguments({name: check.signature(array), "parameters": check.signature(mine)})[name]
        check.like(argument, argument.shape, mine.dtype)
        if argument.shape != (argument.shape[0] if rows is None and argument.shape else rows, columns):
            wanted = "N" if rows is None else rows
            raise ValueError(f"{name} must have the shape ({wanted}, {columns}), got {argument.shape}")

    @property
    def fused(self) -> NetworkSpec:
        """The network as `fused_training` takes it: the place of every layer in `parameters` and `running`."""
        layers = []
        for i, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            of = {kind: self._starts.get(f"{i}.{kind}", -1) for kind in ("weight", "gamma", "beta", "bias")}
            running = (self._running_starts.get(f"{i}.running_{what}", -1) for what in ("mean", "var"))
            layers.append(LayerSpec(inputs, outputs, of["weight"], of["gamma"], max(of["beta"], of["bias"]), *running))
        norm = "layer" if self.norm == "layer" else "batch"
        return NetworkSpec(tuple(layers), self.activation, **self._options, norm=norm)

    @property
    def layer_arrays(self) -> list[LayerArrays]:
        """The arrays of each linear layer and its norm, for other engines."""
        return [
            LayerArrays(*(self._of(i, views) for views in (self._parameters, self._gradients, self._running)))
            for i in range(len(self.sizes) - 1)
        ]

    @staticmethod
    def _of(layer: int, views: dict[str, Any]) -> dict[str, Any]:
        return {name.split(".")[1]: view for name, view in views.items() if name.startswith(f"{layer}.")}

    @property
    def batches(self) -> int:
        """The number of mini-batches that the running statistics have seen."""
        return next((norm.batches for norm in self._norms.values()), 0)

    @batches.setter
    def batches(self, number: int) -> None:
        for norm in self._norms.values():
            norm.batches = number

    def state(self) -> dict[str, np.ndarray]:
        """Return copies, on the host, of all parameters and running statistics, by name.

        Returns
        -------
        dict of str to numpy.ndarray
            `0.weight`, `0.gamma`, `0.running_mean`, ...; and `0.batches`, the number of mini-batches seen. Without
            running statistics, the parameters alone.
        """
        to_host = getattr(self.xp, "asnumpy", np.array)
        arrays = {name: np.array(to_host(array)) for name, array in (self._parameters | self._running).items()}
        return arrays | {name: np.array(norm.batches) for name, norm in self._norms.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take parameters and running statistics from what `state` returned.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            All names of this network and no other.

        Raises
        ------
        TypeError
            If something is not an array of real numbers; nothing is changed then.
        ValueError
            If a name is missing or unknown, a shape differs, or a number does not fit; nothing is changed then.
        """
        mine = self._parameters | self._running
        expected = {*mine, *self._norms}
        if expected != set(state):
            missing, extra = (
                check.shown(sorted(map(str, names))) for names in (expected - set(state), set(state) - expected)
            )
            raise ValueError(f"the state is of another network: missing {missing}, unknown {extra}")
        dtype = self.parameters.dtype
        arrays = {n: check.saved(f"the state's {n}", state[n], view.shape, dtype) for n, view in mine.items()}
        batches = {name: check.count(f"the state's {name}", state[name]) for name in self._norms}
        arrays = {name: self.xp.asarray(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            mine[name][...] = array
        for name, norm in self._norms.items():
            norm.batches = batches[name]


def _form(array: Any) -> tuple:
    """Return the type, data type and shape of an array."""
    return type(array), getattr(array, "dtype", None), getattr(array, "shape", None)


def _sizes(given: Any) -> tuple[int, ...]:
    """Check the sizes of a network; return them as a tuple."""
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, str):
        raise TypeError(f"sizes must be a sequence such as (64, 20, 10), got {check.shown(given)}")
    sizes = tuple(check.integer("a size", size) for size in given)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(
            f"sizes must be at least the numbers of inputs and classes, all positive; got {check.shown(given)}"
        )
    return sizes


def _data_type(given: Any) -> str:
    """Return the name of a data type that a network may have."""
    try:
        name = "" if given is None else np.dtype(given).name
    except TypeError:
        name = ""
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {check.shown(given)}")
    return name
