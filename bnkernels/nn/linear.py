"""Linear layer with a bias and an activation behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from bnkernels.nn.elementwise import activate, activate_backward
from bnkernels.nn.layer import Leaf
from bnkernels.nn.options import activation_options, check_type
from bnkernels.nn.owner import array_module, data_type, vector
from bnkernels.ops.activations import activation_named
from bnkernels.ops.linear_batch_norm.op import multiply, on_cpu
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.dlpack import incoming
from bnkernels.runtime.registry import runtime_of

RECTIFIERS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "elu")  # they lose about half of the variance
IDENTITY = activation_named("identity")


class Linear(Leaf):
    """Linear layer: ``y = phi(x @ weight + bias)``.

    Parameters
    ----------
    inputs, outputs : int
        Length of the last axis of the input, and of the output.
    bias : bool
        Whether there is a bias.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    input_gradient : bool
        Whether `backward` returns the gradient of the input, which the first layer of a network does not need.
    dtype : data type
        Type of the data and the weights; the bias of 16-bit data is float32.
    seed : int, numpy.random.Generator, optional
        Seed of the initial weights, normal with the variance 1/inputs, or 2/inputs before a rectifier; the bias is 0.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    weight : array, shape (inputs, outputs)
        Weights; PyTorch's layout, (outputs, inputs), is that of `state_dict`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> layer = Linear(3, 2, seed=0)
    >>> layer
    Linear(3, 2, dtype='float32')  # weight (3, 2), bias (2,): 8 parameters
    >>> y = layer(np.ones((4, 3), "float32"))
    >>> layer.backward(np.ones_like(y)).shape, layer.gradients["bias"]
    ((4, 3), array([4., 4.], dtype=float32))
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        activation: str = "identity",
        alpha: float | None = None,
        input_gradient: bool = True,
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
        xp: Any = np,
    ) -> None:
        inputs, outputs = check.integer("inputs", inputs, 1), check.integer("outputs", outputs, 1)
        dtype, xp = data_type(dtype), array_module(xp)
        gain = 2 if activation in RECTIFIERS else 1
        drawn = np.random.default_rng(seed).standard_normal((inputs, outputs)) * math.sqrt(gain / inputs)
        weight = xp.asarray(drawn.astype(dtype))
        of_bias = xp.zeros(outputs, accumulator(dtype)) if check.boolean("bias", bias) else None
        self._take(weight, of_bias, None, activation, alpha, input_gradient)

    # A list for the rest of a backward, where a layer below does it: while ranks exchange what it waits for.
    later: list[Callable[[], None]] | None = None

    @classmethod
    def from_arrays(
        cls,
        weight: Any,
        bias: Any = None,
        *,
        gradients: Mapping[str, Any] | None = None,
        activation: str = "identity",
        alpha: float | None = None,
        input_gradient: bool = True,
    ) -> Linear:
        """Return a layer of arrays that there are: it works on them, and not on copies.

        Parameters
        ----------
        weight : array, shape (inputs, outputs)
            Weights; C order.
        bias : array, shape (outputs,), optional
            Bias, of the accumulator's type. It may have axes of length 1 more.
        gradients : dict of str to array, optional
            Arrays for the gradients of `weight` and `bias`; by default they are made.
        activation, alpha, input_gradient : str, float, bool
            As in the constructor.

        Returns
        -------
        Linear
            Layer.
        """
        layer = cls.__new__(cls)
        layer._take(weight, bias, gradients, activation, alpha, input_gradient)
        return layer

    def _take(
        self,
        weight: Any,
        bias: Any,
        gradients: dict[str, Any] | None,
        activation: str,
        alpha: Any,
        input_gradient: bool,
    ) -> None:
        """Check everything and keep it."""
        super().__init__()
        weight = incoming("weight", weight)
        argument = check.arguments({"weight": check.signature(weight)})["weight"]
        if len(argument.shape) != 2:
            raise ValueError(f"weight must have the shape (inputs, outputs), got {argument.shape}")
        self._parameters = {"weight": vector("weight", weight, argument.shape)}
        if bias is not None:
            self._parameters["bias"] = vector("bias", bias, argument.shape[1:], accumulator(argument.dtype), weight)
        self._take_gradients(gradients)
        self.activation, self.alpha = activation, alpha
        activation_named(activation, alpha)
        self.input_gradient = check.boolean("input_gradient", input_gradient)

    @property
    def weight(self) -> Any:
        """Weights, shape (inputs, outputs)."""
        return self._parameters["weight"]

    @property
    def bias(self) -> Any:
        """Bias, shape (outputs,), or None."""
        return self._parameters.get("bias")

    def _check(self, x: Any) -> None:
        weight = self._parameters["weight"]
        check_type(self, x, str(weight.dtype))
        if not x.shape or x.shape[-1] != len(weight):
            raise ValueError(f"x must have {len(weight)} features in its last axis, got the shape {x.shape}")

    def _output(self) -> tuple[np.dtype, tuple[int, ...]]:
        x = self._saved[0]
        return x.dtype, (*x.shape[:-1], self._parameters["weight"].shape[1])

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        own, saved = self._parameters, None
        bias = own.get("bias")
        y = self._matmul(x, own["weight"])
        if self.activation != "identity":
            y, saved = activate(y, bias, self._phi)
        elif bias is not None:
            y += bias
        if keep:
            self._saved = x, saved
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, saved = self._saved
        matmul, dbias = self._matmul, self._gradients.get("bias")
        if self.activation != "identity":
            dy = activate_backward(dy, saved, self._parameters.get("bias"), self._phi, dbias, in_place)
            dbias = None
        dz = dy
        if dy.ndim != 2:
            x, dz = _rows(x), _rows(dy)
        if self.later is None:
            self._parameter_gradients(x, dz, dbias)
        else:
            self.later.append(partial(self._parameter_gradients, x, dz, dbias))
        return matmul(dy, self._parameters["weight"].T) if self.input_gradient else None

    def _parameter_gradients(self, x: Any, dz: Any, dbias: Any) -> None:
        """Write the gradients of the weights, and of a bias behind which there is no activation."""
        self._matmul(x.T, dz, out=self._gradients["weight"])
        if dbias is not None:
            if runtime_of(type(dz)) is None:
                dz = dz if dz.flags.c_contiguous else dz.copy()
                on_cpu().backward(dz, dz, None, IDENTITY, None, dbias)
            else:
                dz.sum(axis=0, out=dbias)

    @cached_property
    def _matmul(self) -> Callable[..., Any]:
        """The product of the array module, summed in the accumulator's type."""
        weight = self._parameters["weight"]
        runtime = runtime_of(type(weight))
        return _matmul_16 if weight.dtype.itemsize == 2 else (np if runtime is None else runtime.xp).matmul

    def _forget(self) -> None:
        super()._forget()
        self.__dict__.pop("_matmul", None)

    def _dtype_of(self, name: str, data: np.dtype) -> np.dtype:
        return data if name == "weight" else accumulator(data)

    def _exported(self, name: str, array: np.ndarray) -> np.ndarray:
        return array.T if name == "weight" else array

    def _options(self) -> list[str]:
        inputs, outputs = self.weight.shape
        options = [str(inputs), str(outputs)]
        if self.bias is None:
            options.append("bias=False")
        options += activation_options(self)
        if not self.input_gradient:
            options.append("input_gradient=False")
        return [*options, f"dtype='{self.weight.dtype}'"]


def _matmul_16(a: Any, b: Any, out: Any = None) -> Any:
    """Return the product of 16-bit data."""
    rows, runtime = a if a.ndim == 2 else _rows(a), runtime_of(type(a))
    out = empty(runtime, (len(rows), b.shape[1]), a) if out is None else out
    multiply(runtime, rows, b, out)
    return out.reshape(*a.shape[:-1], b.shape[1])


def _rows(array: Any) -> Any:
    """Return an array as a matrix, a row for each index of all axes but the last."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
