"""Instance normalisation as a layer: every channel of every example over its positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnkernels.nn.channel_norm import ChannelNorm
from bnkernels.nn.owner import described
from bnkernels.ops.instance_norm.op import instance_norm_backward, instance_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of


class InstanceNorm(ChannelNorm):
    """Instance normalisation of (N, C, L), (N, C, H, W), ..., with a residual sum and an activation behind it.

    There are no running statistics: training and evaluation are the same.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    eps : float
        Number added to the variance, in the units of ``x**2``.
    affine : bool
        Whether there are scale and shift, `weight` and `bias`; as in PyTorch not by default.
    axis : int
        Axis of the channels: 1, or -1 where they come last.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    dtype : data type
        Type of the data; parameters of 16-bit data are float32.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    weight, bias : array, shape (C,), or None
        Scale and shift; `gamma` and `beta` are the same arrays.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> norm = InstanceNorm(2, eps=0.25)
    >>> norm(np.array([[[1.0, 3.0], [5.0, 5.0]]])).round(3)
    array([[[-0.894,  0.894],
            [ 0.   ,  0.   ]]])
    """

    _grouped = True  # examples are groups of batch norm

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = False,
        axis: int = 1,
        activation: str = "identity",
        alpha: float | None = None,
        dtype: Any = "float32",
        xp: Any = np,
    ) -> None:
        super().__init__()
        self.num_features = check.integer("num_features", num_features, 1)
        self.axis = check.integer("axis", axis)
        if self.axis == 0:
            raise ValueError("axis must be that of the channels, such as 1 or -1, got 0, that of the examples")
        options = {"eps": eps, "activation": activation, "alpha": alpha, "dtype": dtype, "xp": xp}
        self._take(("weight", "bias") if check.boolean("affine", affine) else (), num_features, options)

    @classmethod
    def from_arrays(
        cls, weight: Any, bias: Any, *, gradients: Mapping[str, Any] | None = None, **options: Any
    ) -> InstanceNorm:
        """Return a layer that works on these arrays, and not on copies.

        Parameters
        ----------
        weight, bias : array, shape (C,)
            Scale and shift, which may have axes of length 1 more: views of them are taken.
        gradients : dict of str to array, optional
            Arrays for the gradients of `weight` and `bias`; by default they are made.
        **options
            Other options of the constructor: eps, axis, activation, alpha.

        Returns
        -------
        InstanceNorm
            Layer.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit.
        """
        weight, argument = described("weight", weight)
        layer = cls(weight.size, dtype=argument.dtype, **options)
        layer._take_arrays({"weight": weight, "bias": bias}, (layer.num_features,), gradients)
        return layer

    def _forward(self, x: Any, training: bool, keep: bool, residual: Any = None, mask: Any = None) -> Any:
        given = x, self._parameters.get("weight"), self._parameters.get("bias")
        options = self._call_options(residual, mask) | {"eps": self.eps, "out": self._new_outputs(x)}
        y, statistics = instance_norm_forward(*given, **options)
        if keep:
            self._saved = x, statistics, residual, mask
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, statistics, residual, mask = self._saved
        runtime, own = runtime_of(type(x)), self._parameters
        out = dy if in_place else empty(runtime, x.shape, x), *self._vector_gradients(x, (self.num_features,))
        if residual is not None:
            out += (empty(runtime, x.shape, x),)
        given = dy, x, own.get("weight"), own.get("bias"), statistics
        instance_norm_backward(*given, **self._call_options(residual, mask), out=out)
        return out[0] if residual is None else (out[0], out[3])

    def _statistics_of(self, x: Any) -> tuple[int, ...]:
        return x.shape[0], 3, self.num_features

    def _check(self, x: Any) -> None:
        super()._check(x)
        last = len(x.shape) - 1
        if last < 2 or not -last <= self.axis <= last or x.shape[self.axis] != self.num_features:
            wanted = f"{self.num_features} channels in axis {self.axis} and at least one axis of positions"
            raise ValueError(f"x must have {wanted}, got the shape {x.shape}")

    def _options(self) -> list[str]:
        options = [str(self.num_features), *([] if self.eps == 1e-5 else [f"eps={self.eps!r}"])]
        options += ([] if self.axis == 1 else [f"axis={self.axis}"]) + (["affine=True"] if self._parameters else [])
        return options + self._last_options()
