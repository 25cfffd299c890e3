"""Layer normalisation over any trailing axes, with an activation behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnkernels.nn.owner import described
from bnkernels.nn.row_norm import RowNorm
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of


class LayerNorm(RowNorm):
    """Layer normalisation of every example over its last axes, with an activation behind it.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of the last axes of the input, over which is normalised.
    eps : float
        Number added to the variance, in the units of ``x**2``.
    affine : bool
        Whether there are scale and shift, `weight` and `bias`.
    bias : bool
        Whether there is a shift beside the scale.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    dtype : data type
        Type of the data; parameters for 16-bit data are float32.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    weight, bias : array, shape `normalized_shape`, or None
        Scale and shift; `gamma` and `beta` are the same arrays.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> norm = LayerNorm((2, 2), eps=0.25, dtype="float64")
    >>> norm(np.array([[[1.0, 3.0], [1.0, 3.0]]])).round(3)
    array([[[-0.894,  0.894],
            [-0.894,  0.894]]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        activation: str = "identity",
        alpha: float | None = None,
        dtype: Any = "float32",
        xp: Any = np,
    ) -> None:
        super().__init__()
        names = ("weight", "bias") if check.boolean("bias", bias) else ("weight",)
        options = {"eps": eps, "activation": activation, "alpha": alpha, "dtype": dtype, "xp": xp}
        self._take_rows(names if check.boolean("affine", affine) else (), normalized_shape, options)

    @classmethod
    def from_arrays(
        cls, weight: Any, bias: Any = None, *, gradients: Mapping[str, Any] | None = None, **options: Any
    ) -> LayerNorm:
        """Return a layer of arrays that there are: it works on them, and not on copies.

        Parameters
        ----------
        weight, bias : array
            Scale and shift, of the shape over which is normalised; C order. Those of 16 bits are for data of their
            type. `bias` may be None.
        gradients : dict of str to array, optional
            Arrays for the gradients of `weight` and `bias`; by default they are made.
        **options
            Other options of the constructor: eps, activation, alpha.

        Returns
        -------
        LayerNorm
            Layer.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit.
        """
        weight, argument = described("weight", weight)
        layer = cls(argument.shape, affine=False, dtype=argument.dtype, **options)
        layer._take_arrays({"weight": weight, "bias": bias}, argument.shape, gradients)
        return layer

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        own, options = self._parameters, self._call_options()
        vectors = own.get("weight"), own.get("bias")
        y, statistics = layer_norm_forward(x, *vectors, eps=self.eps, **options, out=self._new_outputs(x))
        if keep:
            self._saved = x, statistics
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, statistics = self._saved
        own, gradients = self._parameters, self._gradients
        if len(gradients) == 2:
            vectors = gradients["weight"], gradients["bias"]
        else:
            vectors = self._vector_gradients(x, self.normalized_shape)
        out = dy if in_place else empty(runtime_of(type(x)), x.shape, x), *vectors
        given = dy, x, own.get("weight"), own.get("bias"), statistics
        return layer_norm_backward(*given, **self._call_options(), out=out)[0]

    def _without(self) -> list[str]:
        return ["bias=False"] if self.bias is None else []
