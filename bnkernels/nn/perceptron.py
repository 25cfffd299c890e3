"""Arrays of a multi-layer perceptron: flat, with names, drawn at random, saved, described to other engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.flat import flat_views
from bnkernels.nn.linear import RECTIFIERS
from bnkernels.nn.owner import array_module
from bnkernels.nn.state import host
from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.runtime import checks as check

NORMS = ("batch", "layer", "none")


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


class Perceptron:
    """Base of the MLP: its flat arrays, of which its layers hold views."""

    def __init__(self, sizes: Any, norm: Any, activation: Any, dtype: Any, seed: Any, xp: Any, **options: Any) -> None:
        self.sizes = _sizes(sizes)
        check.one_of("norm", norm, NORMS)
        activation_named(activation)
        self.norm, self.activation, self.dtype, self.xp = norm, activation, _data_type(dtype), array_module(xp)
        self.tracked = check.boolean("track_running_stats", options["track_running_stats"])
        shapes = self._shapes()
        self._starts, self.parameters, self._parameters = flat_views(shapes, self.dtype, xp)
        _, self.gradients, self._gradients = flat_views(shapes, self.dtype, xp)
        self._initialise(np.random.default_rng(seed))
        momentum, eps = options["momentum"], check.epsilon(options["eps"], self.parameters)
        momentum = momentum if momentum is None else check.number("momentum", momentum, 0, 1)
        unbiased = check.boolean("unbiased", options["unbiased"])
        self._options = {"momentum": momentum, "unbiased": unbiased, "eps": eps}
        norms = [i for i in range(len(self.sizes) - 2) if norm == "batch" and self.tracked]
        shapes = {f"{i}.running_{what}": (self.sizes[i + 1],) for i in norms for what in ("mean", "var")}
        self._running_starts, self.running, self._running = flat_views(shapes, self.dtype, xp)
        self._norms: dict[str, BatchNorm] = {}  # layers with running statistics

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every parameter, in order; names start with the number of their layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        last = len(self.sizes) - 2
        for i, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            shapes[f"{i}.weight"] = (inputs, outputs)
            names = ("gamma", "beta") if self.norm != "none" and i < last else ("bias",)
            shapes.update({f"{i}.{name}": (outputs,) for name in names})
        return shapes

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

    def flatten(self) -> tuple[Any, Any]:
        """Return the flat arrays; see `Layer.flatten`."""
        return self.parameters, self.gradients

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
        arrays = {name: host(array) for name, array in (self._parameters | self._running).items()}
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
