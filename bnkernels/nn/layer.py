"""Base of the layers: their mode, the checks of what comes in, and what a forward keeps for the backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from bnkernels.nn.owner import Owner
from bnkernels.ops.activations import Activation, activation_named
from bnkernels.runtime import checks as check
from bnkernels.runtime.dlpack import incoming
from bnkernels.runtime.registry import runtime_of

Self = TypeVar("Self", bound="Layer")
Saved = tuple[Any, ...]


class Layer(Owner, ABC):
    """Base of the layers.

    A call is a `forward`. It keeps what `backward` needs, but for an evaluation that is asked for by
    ``training=False``: this one leaves no trace, and a backward still belongs to the forward before it.

    Attributes
    ----------
    training : bool
        Mode of the layer, which `train` and `eval` set.
    """

    training = True
    takes_mask = False
    activation: str = "identity"
    alpha: float | None = None

    @abstractmethod
    def forward(self, x: Any, *, training: bool | None = None) -> Any:
        """Return the output.

        Parameters
        ----------
        x : array
            Input. Never written. An array of another library comes in through ``__dlpack__``.
        training : bool, optional
            Mode of this call; by default that of the layer. False keeps nothing for a backward.

        Returns
        -------
        array
            Output, a new array.

        Raises
        ------
        TypeError, ValueError
            If `x` does not fit the layer; nothing is changed then.
        """

    def __call__(self, x: Any, **options: Any) -> Any:
        """Return the output: a `forward`."""
        return self.forward(x, **options)

    @abstractmethod
    def backward(self, dy: Any, *, accumulate: bool = False) -> Any:
        """Write the gradients of the parameters; return that of the input.

        Parameters
        ----------
        dy : array, shape and dtype of the output
            Gradient with respect to the output of the last forward. Never written.
        accumulate : bool
            Whether to add to the gradients of the parameters instead of writing over them.

        Returns
        -------
        array
            Gradient with respect to the input, a new array.

        Raises
        ------
        RuntimeError
            If there was no forward.
        TypeError, ValueError
            If `dy` is not such an array; nothing is changed then.
        """

    def train(self: Self, mode: bool = True) -> Self:
        """Set the mode of the layer and of those inside.

        Parameters
        ----------
        mode : bool
            True for training, False for evaluation.

        Returns
        -------
        Layer
            This layer.
        """
        self.training = check.boolean("mode", mode)
        for child in self.children.values():
            child.train(mode)
        return self

    def eval(self: Self) -> Self:
        """Set the mode to evaluation: batch norms take their running statistics.

        Returns
        -------
        Layer
            This layer.
        """
        return self.train(False)


class Leaf(Layer):
    """Base of the layers that compute themselves: theirs are `_forward` and `_backward`, without checks."""

    _in_c_order = False  # whether inputs and their gradients must be

    def __init__(self) -> None:
        super().__init__()
        self._saved: Saved | None = None
        self._known: tuple | None = None  # form of an input that was checked

    @np.errstate(all="ignore")  # kernels have no warnings either
    def forward(self, x: Any, *, training: bool | None = None) -> Any:
        """Return the output; see `Layer.forward`."""
        mode, keep = self._mode(training)
        return self._forward(self._taken(x), mode, keep)

    @np.errstate(all="ignore")
    def backward(self, dy: Any, *, accumulate: bool = False) -> Any:
        """Write the gradients of the parameters; see `Layer.backward`."""
        if self._saved is None:
            raise RuntimeError(f"backward needs what a forward keeps: call this {type(self).__name__} before it")
        dy = self._taken_dy(dy)
        if not check.boolean("accumulate", accumulate):
            return self._backward(dy, False)
        before = [(array, array.copy()) for array in self.gradients.values()]
        dx = self._backward(dy, False)
        for array, old in before:
            array += old
        return dx

    @abstractmethod
    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        """Compute without checks."""

    @abstractmethod
    def _backward(self, dy: Any, in_place: bool) -> Any:
        """Compute without checks; `in_place` says that `dy`, which is C-ordered, may be written over."""

    def _check(self, x: Any) -> None:
        """Check the width and the type of an input."""

    def _output(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Return data type and shape of the last output."""
        x = self._saved[0]
        return x.dtype, x.shape

    def _mode(self, training: bool | None) -> tuple[bool, bool]:
        """Return the mode of a call, and whether it keeps what a backward needs."""
        if training is None:
            return self.training, True
        mode = check.boolean("training", training)
        return mode, mode

    def _taken(self, x: Any) -> Any:
        """Return an input as an array of ours, checked."""
        x = incoming("x", x)
        form = type(x), getattr(x, "dtype", None), getattr(x, "shape", None)
        if form != self._known:
            argument = check.arguments({"x": check.signature(x)})["x"]
            for name, array in (self.parameters | self.buffers).items():
                if runtime_of(type(array)) is not runtime_of(argument.kind):
                    raise TypeError(
                        f"x is {check.kind_of(x)}, but {name} of this {type(self).__name__} is {check.kind_of(array)}; "
                        "move x, or the layer with .to('cpu') or .to('cuda')"
                    )
            check.floating(argument)
            self._check(x)
            self._known = form
        return self._contiguous("x", x)

    def _taken_dy(self, dy: Any) -> Any:
        """Return the gradient of the output as an array of ours, checked."""
        dy, saved = incoming("dy", dy), self._saved[0]
        dtype, shape = self._output()
        if type(dy) is not type(saved) or dy.dtype != dtype or dy.shape != shape:
            both = check.arguments({"dy": check.signature(dy), "x": check.signature(saved)})
            check.like(both["dy"], shape, dtype)
        return self._contiguous("dy", dy)

    def _contiguous(self, name: str, array: Any) -> Any:
        """Return an array, checked to be in C order if it must be."""
        if self._in_c_order:
            check.contiguous(check.Argument(name, *check.signature(array)), array.shape, array.dtype)
        return array

    def _forget(self) -> None:
        super()._forget()
        self._saved = self._known = None
        self.__dict__.pop("_phi", None)

    @cached_property
    def _phi(self) -> Activation:
        """Functions of the activation; functions cannot be pickled, so they are found again."""
        return activation_named(self.activation, self.alpha)
