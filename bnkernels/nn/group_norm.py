"""Group normalisation as a layer: groups of channels of every example over their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnkernels.nn.norm import Norm
from bnkernels.nn.owner import described
from bnkernels.ops.group_norm.op import group_norm_backward, group_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of


class GroupNorm(Norm):
    """Group normalisation of (N, C), (N, C, L), (N, C, H, W), ..., or channels last, with an activation behind it.

    Parameters
    ----------
    num_groups : int
        Number of groups, which divides that of the channels.
    num_channels : int
        Number of channels, C.
    axis : int
        Axis of the channels: 1, or -1 where they come last.
    eps : float
        Number added to the variance, in the units of ``x**2``.
    affine : bool
        Whether there are scale and shift, `weight` and `bias`.
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
    >>> norm = GroupNorm(2, 4, eps=0.25, dtype="float64")
    >>> norm(np.array([[1.0, 3.0, 5.0, 5.0]])).round(3)
    array([[-0.894,  0.894,  0.   ,  0.   ]])
    """

    _in_c_order = True

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str = "identity",
        alpha: float | None = None,
        dtype: Any = "float32",
        xp: Any = np,
    ) -> None:
        super().__init__()
        self.num_groups = check.integer("num_groups", num_groups, 1)
        self.num_channels = check.integer("num_channels", num_channels, 1)
        if num_channels % num_groups:
            raise ValueError(f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        self.axis = check.integer("axis", axis)
        if self.axis not in (1, -1):
            raise ValueError(f"axis must be 1 or -1: channels come behind the examples or last, got {axis}")
        options = {"eps": eps, "activation": activation, "alpha": alpha, "dtype": dtype, "xp": xp}
        self._take(("weight", "bias") if check.boolean("affine", affine) else (), num_channels, options)

    @classmethod
    def from_arrays(
        cls, num_groups: int, weight: Any, bias: Any, *, gradients: Mapping[str, Any] | None = None, **options: Any
    ) -> GroupNorm:
        """Return a layer that works on these arrays, and not on copies.

        Parameters
        ----------
        num_groups : int
            Number of groups.
        weight, bias : array, shape (C,)
            Scale and shift, which may have axes of length 1 more: views of them are taken.
        gradients : dict of str to array, optional
            Arrays for the gradients of `weight` and `bias`; by default they are made.
        **options
            Other options of the constructor: axis, eps, activation, alpha.

        Returns
        -------
        GroupNorm
            Layer.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit.
        """
        weight, argument = described("weight", weight)
        layer = cls(num_groups, weight.size, affine=False, dtype=argument.dtype, **options)
        layer._take_arrays({"weight": weight, "bias": bias}, (layer.num_channels,), gradients)
        return layer

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        given = x, self.num_groups, self._parameters.get("weight"), self._parameters.get("bias")
        options = {"axis": self.axis, "eps": self.eps, "activation": self.activation, "alpha": self.alpha}
        y, statistics = group_norm_forward(*given, **options, out=self._new_outputs(x))
        if keep:
            self._saved = x, statistics
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, statistics = self._saved
        vectors = self._vector_gradients(x, (self.num_channels,))
        out = dy if in_place else empty(runtime_of(type(x)), x.shape, x), *vectors
        given = dy, x, self.num_groups, self._parameters.get("weight"), self._parameters.get("bias"), statistics
        options = {"axis": self.axis, "activation": self.activation, "alpha": self.alpha}
        return group_norm_backward(*given, **options, out=out)[0]

    def _statistics_of(self, x: Any) -> tuple[int, ...]:
        return 3, x.shape[0], self.num_groups

    def _check(self, x: Any) -> None:
        super()._check(x)
        if len(x.shape) < 2 or x.shape[self.axis] != self.num_channels:
            raise ValueError(f"x must have {self.num_channels} channels in axis {self.axis}, got the shape {x.shape}")

    def _options(self) -> list[str]:
        options = [f"{self.num_groups}, {self.num_channels}", *([] if self.axis == 1 else ["axis=-1"])]
        options += [] if self.eps == 1e-5 else [f"eps={self.eps!r}"]
        options += [] if self._parameters else ["affine=False"]
        return options + self._last_options()
