"""Linear layer, norm and activation as one layer, on a GPU one launch each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnkernels.nn.batch_norm import DEFAULT_MOMENTUM, BatchNorm
from bnkernels.nn.layer import Layer, Leaf
from bnkernels.nn.layer_norm import LayerNorm
from bnkernels.nn.linear import Linear
from bnkernels.nn.options import check_type
from bnkernels.ops.linear_batch_norm.op import linear_batch_norm_backward, linear_batch_norm_forward
from bnkernels.ops.linear_batch_norm.problem import check_precision
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of


class LinearBatchNorm(Leaf):
    """Linear layer without a bias, batch norm or layer norm, and activation, for (N, inputs).

    Parameters
    ----------
    inputs, outputs : int
        Numbers of features of an example, and of neurons.
    norm : {"batch", "layer"}
        Norm.
    eps : float
        Number added to the variance.
    momentum, decay, unbiased, track_running_stats : float or None, float, bool, bool
        Options of `BatchNorm`.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    precision : {"tf32x3", None}
        Arithmetic of the products of float32 data, as in `linear_batch_norm_forward`.
    input_gradient : bool
        Whether `backward` returns the gradient of the input.
    dtype : data type
        Type of the data and the weights; the rest of 16-bit data is float32.
    seed : int, numpy.random.Generator, optional
        Seed of the initial weights, as in `Linear`.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    linear : Linear
        Layer that owns the weights, ``linear.weight``.
    norm : BatchNorm or LayerNorm
        Layer that owns scale, shift and running statistics.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> layer = LinearBatchNorm(4, 3, activation="relu", seed=0)
    >>> y = layer(np.eye(4, dtype="float32"))
    >>> layer.backward(np.ones_like(y)).shape, list(layer.state_dict())[:3]
    ((4, 4), ['linear.weight', 'norm.weight', 'norm.bias'])
    """

    takes_mask = True

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: str = "batch",
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        decay: float | None = None,
        unbiased: bool = True,
        track_running_stats: bool = True,
        activation: str = "identity",
        alpha: float | None = None,
        precision: str | None = None,
        input_gradient: bool = True,
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
        xp: Any = np,
    ) -> None:
        super().__init__()
        check.one_of("norm", norm, ("batch", "layer"))
        shared: dict[str, Any] = {"dtype": dtype, "xp": xp}
        self.linear = Linear(inputs, outputs, bias=False, input_gradient=input_gradient, seed=seed, **shared)
        shared |= {"eps": eps, "activation": activation, "alpha": alpha}
        self.norm: BatchNorm | LayerNorm
        if norm == "layer":
            self.norm = LayerNorm(outputs, **shared)
        else:
            options = {"momentum": momentum, "decay": decay, "unbiased": unbiased}
            self.norm = BatchNorm(outputs, track_running_stats=track_running_stats, **options, **shared)
        self.activation, self.alpha = activation, alpha
        check_precision(precision)
        self.precision = precision

    @property
    def children(self) -> Mapping[str, Layer]:
        """The linear layer and the norm."""
        return {"linear": self.linear, "norm": self.norm}

    @property
    def parts_shown(self) -> Mapping[str, Layer]:
        """Nothing: both are shown as one."""
        return {}

    def forward(self, x: Any, *, training: bool | None = None, mask: None = None) -> Any:
        """Return the output.

        Parameters
        ----------
        x : array, shape (N, inputs)
            Input; C order. Never written. An array of another library comes in through ``__dlpack__``.
        training : bool, optional
            Mode of this call; by default that of the layer. False keeps nothing for a backward.
        mask : None
            Nothing: the op knows no mask, and would take what it hides into the statistics.

        Returns
        -------
        array, shape (N, outputs)
            Output, a new array.

        Raises
        ------
        TypeError, ValueError
            If `x` does not fit the layer, or there is a mask and batch norm; nothing is changed then.
        """
        if mask is not None and self._kind == "batch":
            raise ValueError("LinearBatchNorm takes no mask; use a Linear and a BatchNorm in its place")
        return super().forward(x, training=training)

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        norm = self.norm
        if isinstance(norm, BatchNorm) and norm._buffers and not training:
            y = norm._forward(self.linear._forward(x, False, keep), False, keep)
            if keep:
                self._saved = x, None, None
            return y
        given = x, self.linear.weight, norm.weight, norm.bias
        options = {"eps": norm.eps, "activation": self.activation, "alpha": self.alpha}
        options |= {"norm": self._kind, "precision": self.precision}
        if isinstance(norm, BatchNorm):
            given += norm.running_mean, norm.running_var
            options |= {"momentum": norm.momentum, "batches_before": norm.batches, "unbiased": norm.unbiased}
        # With out= a repeated call is replayed: memory that was freed comes back at the same addresses.
        runtime, shape = runtime_of(type(x)), (len(x), len(norm.weight))
        length = shape[0] if self._kind == "layer" else shape[1]
        out = *(empty(runtime, shape, x) for _ in range(2)), empty(runtime, (3, length), x, accumulator(x.dtype))
        y, z, statistics = linear_batch_norm_forward(*given, **options, out=out)
        if training and isinstance(norm, BatchNorm):
            norm.batches += 1
        if keep:
            self._saved = x, z, statistics
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, z, statistics = self._saved
        linear, norm = self.linear, self.norm
        if z is None:
            return linear._backward(norm._backward(dy, in_place), True)
        of_norm = norm._gradients["weight"], norm._gradients["bias"]
        runtime, wanted = runtime_of(type(x)), linear.input_gradient
        dx = linear_batch_norm_backward(
            *(dy, x, linear.weight, norm.weight, norm.bias, z, statistics),
            norm=self._kind,
            activation=self.activation,
            alpha=self.alpha,
            precision=self.precision,
            input_gradient=wanted,
            workspace=empty(runtime, z.shape, z),
            out=(empty(runtime, x.shape, x) if wanted else None, linear._gradients["weight"], *of_norm),
        )[0]
        return dx

    @property
    def _kind(self) -> str:
        return "layer" if isinstance(self.norm, LayerNorm) else "batch"

    def _check(self, x: Any) -> None:
        weight = self.linear.weight
        check_type(self, x, str(weight.dtype))
        if x.shape != (*x.shape[:1], len(weight)):
            raise ValueError(f"x must have the shape (N, {len(weight)}), got the shape {x.shape}")

    def _output(self) -> tuple[np.dtype, tuple[int, ...]]:
        x = self._saved[0]
        return x.dtype, (len(x), self.linear.weight.shape[1])

    def _options(self) -> list[str]:
        inputs, outputs = self.linear.weight.shape
        seen = [option for option in self.norm._options()[1:] if not option.startswith("dtype")]
        kind = ["norm='layer'"] if self._kind == "layer" else []
        kind += [] if self.precision is None else [f"precision={self.precision!r}"]
        first = [] if self.linear.input_gradient else ["input_gradient=False"]
        return [str(inputs), str(outputs), *kind, *seen, *first, f"dtype='{self.linear.weight.dtype}'"]
