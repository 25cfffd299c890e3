"""Layers made of layers: one behind the other, and around a sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.instance_norm import InstanceNorm
from bnkernels.nn.layer import Layer
from bnkernels.nn.owner import Owner
from bnkernels.runtime import checks as check
from bnkernels.runtime.dlpack import incoming


class Sequential(Layer):
    """Layers one behind the other.

    Parameters
    ----------
    *layers : Layer
        Layers, each of which takes the output of the one before it.

    Raises
    ------
    TypeError
        If something is no layer, or a layer comes twice: it keeps what belongs to one forward.

    Examples
    --------
    >>> import numpy as np
    >>> from bnkernels.nn import Linear
    >>> model = Sequential(Linear(4, 3, bias=False, seed=0), BatchNorm(3, activation="relu"), Linear(3, 2, seed=1))
    >>> y = model(np.ones((5, 4), "float32"))
    >>> model.backward(np.ones_like(y)).shape, list(model.parameters)
    ((5, 4), ['0.weight', '1.weight', '1.bias', '2.weight', '2.bias'])
    """

    takes_mask = True

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        for layer in layers:
            self.append(layer)

    def append(self, layer: Layer) -> Sequential:
        """Add a layer at the end.

        Parameters
        ----------
        layer : Layer
            Layer.

        Returns
        -------
        Sequential
            This container.
        """
        if not isinstance(layer, Layer):
            raise TypeError(f"a layer must be a Layer of bnkernels.nn, got {check.shown(layer)}")
        if any(one is other for one in _inside(self) for other in _inside(layer)):
            raise TypeError("a layer keeps what belongs to one forward, and is there already; pass a copy.deepcopy")
        self.layers.append(layer)
        self._forget()
        return self

    @property
    def children(self) -> Mapping[str, Layer]:
        """The layers, by number."""
        return {str(number): layer for number, layer in enumerate(self.layers)}

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, number: int) -> Layer:
        return self.layers[number]

    def forward(self, x: Any, *, training: bool | None = None, mask: Any = None) -> Any:
        """Return the output of the last layer.

        Parameters
        ----------
        x : array
            Input of the first layer. Never written.
        training : bool, optional
            Mode of this call; by default each layer has its own. False keeps nothing for a backward.
        mask : array of bool, optional
            Mask for the batch norms, as in `batch_norm_forward`.

        Returns
        -------
        array
            Output.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit a layer.
        """
        for layer in self.layers:
            x = called(layer, x, training, mask)
        return x

    def backward(self, dy: Any, *, accumulate: bool = False) -> Any:
        """Write the gradients of all parameters; return that of the input; see `Layer.backward`."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy, accumulate=accumulate)
        return dy


class Residual(Sequential):
    """Layers one behind the other, and the input added to their output.

    A `BatchNorm` or `InstanceNorm` at the end takes the input as its residual: the sum comes before its activation, in
    the same launch. Behind any other layer it is a plain sum.

    Parameters
    ----------
    *layers : Layer
        Layers, which keep the shape of the input.

    Raises
    ------
    TypeError
        If something is no layer, or a layer comes twice.

    Examples
    --------
    >>> import numpy as np
    >>> from bnkernels.nn import Linear
    >>> block = Residual(Linear(3, 3, bias=False, seed=0), BatchNorm(3, activation="relu"))
    >>> y = block(np.ones((4, 3), "float32"))
    >>> y, block.backward(y).shape
    (array([[1., 1., 1.],
           [1., 1., 1.],
           [1., 1., 1.],
           [1., 1., 1.]], dtype=float32), (4, 3))
    """

    @property
    def _fused(self) -> bool:
        return bool(self.layers) and isinstance(self.layers[-1], BatchNorm | InstanceNorm)

    @np.errstate(all="ignore")  # kernels have no warnings either
    def forward(self, x: Any, *, training: bool | None = None, mask: Any = None) -> Any:
        """Return the output of the last layer, of the shape of `x`, with the input added; see `Sequential.forward`."""
        y, fused = x, self._fused
        for layer in self.layers[:-1] if fused else self.layers:
            y = called(layer, y, training, mask)
        if fused:
            return self.layers[-1].forward(y, training=training, residual=x, mask=mask)
        x = incoming("x", x)
        if y.shape != x.shape:
            raise ValueError(f"the layers must keep the shape of x, {x.shape}, to be added to it; they made {y.shape}")
        return y + x

    @np.errstate(all="ignore")
    def backward(self, dy: Any, *, accumulate: bool = False) -> Any:
        """Write the gradients of all parameters; return that of the input; see `Layer.backward`."""
        of_sum = dx = incoming("dy", dy)
        for layer in reversed(self.layers):
            dx = layer.backward(dx, accumulate=accumulate)
            if type(dx) is tuple:
                dx, of_sum = dx
        return of_sum if dx is None else dx + of_sum


def called(layer: Layer, x: Any, training: bool | None, mask: Any) -> Any:
    """Return the output of a layer, to which a mask is passed if it takes one."""
    if mask is None or not layer.takes_mask:
        return layer.forward(x, training=training)
    return layer.forward(x, training=training, mask=mask)


def _inside(owner: Owner) -> Iterator[Owner]:
    """Yield an owner and all inside it."""
    yield owner
    for child in owner.children.values():
        yield from _inside(child)
