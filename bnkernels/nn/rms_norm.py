"""RMS normalisation over any trailing axes, with an activation behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnkernels.nn.owner import described
from bnkernels.nn.row_norm import RowNorm
from bnkernels.ops.rms_norm.op import rms_norm_backward, rms_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of


class RMSNorm(RowNorm):
    """RMS normalisation of every example over its last axes, with an activation behind it.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of the last axes of the input, over which is normalised.
    eps : float
        Number added to the mean square, in the units of ``x**2``. PyTorch's None is the distance of 1 from the next
        number: 2.22e-16 in float64, else that of float32, 1.19e-7.
    affine : bool
        Whether there is a scale, `weight`.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    dtype : data type
        Type of the data; the scale for 16-bit data is float32.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    weight : array, shape `normalized_shape`, or None
        Scale; `gamma` is the same array.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> norm = RMSNorm(2, eps=0.25, dtype="float64")
    >>> norm(np.array([[3.0, 4.0]])).round(3)
    array([[0.84, 1.12]])
    """

    statistic_rows = 1

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str = "identity",
        alpha: float | None = None,
        dtype: Any = "float32",
        xp: Any = np,
    ) -> None:
        super().__init__()
        options = {"eps": eps, "activation": activation, "alpha": alpha, "dtype": dtype, "xp": xp}
        self._take_rows(("weight",) if check.boolean("affine", affine) else (), normalized_shape, options)

    @classmethod
    def from_arrays(cls, weight: Any, *, gradients: Mapping[str, Any] | None = None, **options: Any) -> RMSNorm:
        """Return a layer of an array that there is: it works on it, and not on a copy.

        Parameters
        ----------
        weight : array
            Scale, of the shape over which is normalised; C order. One of 16 bits is for data of its type.
        gradients : dict of str to array, optional
            Array for the gradient of `weight`; by default it is made.
        **options
            Other options of the constructor: eps, activation, alpha.

        Returns
        -------
        RMSNorm
            Layer.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit.
        """
        weight, argument = described("weight", weight)
        layer = cls(argument.shape, affine=False, dtype=argument.dtype, **options)
        layer._take_arrays({"weight": weight}, argument.shape, gradients)
        return layer

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        options = self._call_options() | {"eps": self.eps, "out": self._new_outputs(x)}
        y, statistics = rms_norm_forward(x, self._parameters.get("weight"), **options)
        if keep:
            self._saved = x, statistics
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, statistics = self._saved
        gradient = self._gradients.get("weight")
        if gradient is None:
            gradient = empty(runtime_of(type(x)), self.normalized_shape, x, accumulator(x.dtype))
        out = dy if in_place else empty(runtime_of(type(x)), x.shape, x), gradient
        return rms_norm_backward(dy, x, self._parameters.get("weight"), statistics, **self._call_options(), out=out)[0]
