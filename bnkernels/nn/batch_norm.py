"""Batch normalisation as a layer: parameters, running statistics, and all that its backward must be told again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnkernels.nn.channel_norm import ChannelNorm
from bnkernels.nn.options import activation_options
from bnkernels.nn.owner import array_module, data_type, vector, zeros_beside
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.dlpack import incoming
from bnkernels.runtime.registry import runtime_of

DEFAULT_MOMENTUM = float("0.1")  # an object of its own: `is` tells it from a 0.1 that was passed


class BatchNorm(ChannelNorm):
    """Batch normalisation of (N, C), (N, C, L), (N, C, H, W), ..., with a residual sum and an activation behind it.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    eps : float
        Number added to the variance, in the units of ``x**2``.
    momentum : float or None
        Weight of the **new** mini-batch in the running statistics, as in PyTorch; None averages all mini-batches.
    decay : float, optional
        Weight of the **old** running statistics instead, as in Keras, Flax and ONNX: ``momentum = 1 - decay``.
    unbiased : bool
        Whether the running variance takes that over N - 1, as in PyTorch, or over N, as in Keras, Flax and ONNX.
    axis : int
        Axis of the channels: 1, or -1 where they come last.
    affine : bool
        Whether there are scale and shift, `weight` and `bias`.
    track_running_stats : bool
        Whether there are running statistics; without them every call normalises with those of its mini-batch.
    activation : str
        Activation behind, as in `batch_norm_forward`.
    alpha : float, optional
        Parameter of the activation.
    groups : int, optional
        Number of independent mini-batches in the first axis of `x`, such as time steps, each with statistics of its
        own; `axis` is then that of one of them.
    renorm : tuple of two floats, optional
        ``(r_max, d_max)`` of batch renormalisation.
    allow_single : bool
        Whether a mini-batch of one value of each channel is normalised, to the shift, and leaves the running
        statistics; by default it is a ValueError.
    dtype : data type
        Type of the data; parameters and statistics of 16-bit data are float32.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    weight, bias : array, shape (C,), or None
        Scale and shift; `gamma` and `beta` are the same arrays.
    running_mean, running_var : array, shape (C,), or None
        Running statistics, which start at 0 and 1.
    batches : int
        Number of mini-batches that these have seen.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> bn = BatchNorm(2, activation="relu")
    >>> bn
    BatchNorm(2, momentum=0.1, activation='relu', dtype='float32')  # weight (2,), bias (2,), running_mean (2,), \
running_var (2,): 4 parameters
    >>> y = bn(np.array([[1, -2], [3, 2]], "float32"))
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.gradients["bias"], bn.running_mean
    (array([1., 1.], dtype=float32), array([0.2, 0. ], dtype=float32))
    >>> BatchNorm(2, decay=0.9).momentum == 1 - 0.9
    True
    """

    # The ops of a training step; a class of layers that has statistics of another mini-batch has its own.
    _normalise, _differentiate = staticmethod(batch_norm_forward), staticmethod(batch_norm_backward)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        decay: float | None = None,
        unbiased: bool = True,
        axis: int = 1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "identity",
        alpha: float | None = None,
        groups: int | None = None,
        renorm: tuple[float, float] | None = None,
        allow_single: bool = False,
        dtype: Any = "float32",
        xp: Any = np,
    ) -> None:
        super().__init__()
        self.num_features = check.integer("num_features", num_features, 1)
        kept, xp = accumulator(data_type(dtype)), array_module(xp)
        self.groups = None if groups is None else check.integer("groups", groups, 1)
        self.axis, self._decay = check.integer("axis", axis), None
        if decay is not None:
            if momentum is not DEFAULT_MOMENTUM:
                raise TypeError("momentum and decay are the same number seen from two sides; pass one of them")
            self._decay = check.number("decay", decay, 0, 1)
            momentum = 1 - self._decay
        self.momentum = momentum if momentum is None else check.number("momentum", momentum, 0, 1)
        self.unbiased, self.renorm = check.boolean("unbiased", unbiased), check.renorm_limits(renorm)
        self.allow_single = check.boolean("allow_single", allow_single)
        self.batches = 0
        options = {"eps": eps, "activation": activation, "alpha": alpha, "dtype": dtype, "xp": xp}
        self._take(("weight", "bias") if check.boolean("affine", affine) else (), num_features, options)
        if check.boolean("track_running_stats", track_running_stats):
            shape = self._statistics_shape
            self._buffers = {"running_mean": xp.zeros(shape, kept), "running_var": xp.ones(shape, kept)}
        elif self.renorm is not None:
            raise ValueError("renorm takes running statistics; leave track_running_stats=True")

    @classmethod
    def from_arrays(
        cls,
        weight: Any = None,
        bias: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
        *,
        gradients: Mapping[str, Any] | None = None,
        renorm: tuple[float, float] | None = None,
        **options: Any,
    ) -> BatchNorm:
        """Return a layer that works on these arrays, and not on copies.

        Parameters
        ----------
        weight, bias, running_mean, running_var : array, shape (C,), optional
            Arrays, which may have axes of length 1 more, such as (1, C) or (1, C, 1, 1): views of them are taken.
            Running statistics of groups have the shape (groups, C).
        gradients : dict of str to array, optional
            Arrays for the gradients of `weight` and `bias`; by default they are made.
        renorm : tuple of two floats, optional
            As in the constructor.
        **options
            Other options of the constructor, but for affine, track_running_stats, dtype and xp.

        Returns
        -------
        BatchNorm
            Layer.

        Raises
        ------
        TypeError, ValueError
            If there is no array, one does not fit, or one of two running statistics is missing.
        """
        if (running_mean is None) != (running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(f"{missing} is None and its companion is not; pass both, or neither to track nothing")
        running = {"running_mean": running_mean, "running_var": running_var}
        given = {"weight": weight, "bias": bias} | running
        given = {name: incoming(name, array) for name, array in given.items() if array is not None}
        if not given:
            raise ValueError("weight, bias and running statistics are None; pass arrays, or make a BatchNorm(C)")
        name, first = next(iter(given.items()))
        argument = check.arguments({name: check.signature(first)})[name]
        groups = (options.get("groups") or 1) if name in running else 1
        kept = accumulator(argument.dtype)
        options |= {"affine": False, "track_running_stats": False, "dtype": kept}
        layer = cls(math.prod(argument.shape) // groups, **options)
        for name, array in given.items():
            kind, shape = layer._parameters, (layer.num_features,)
            if name in running:
                kind, shape = layer._buffers, layer._statistics_shape
            dtype = kept if name in running or array.dtype != argument.dtype else argument.dtype
            kind[name] = vector(name, array, shape, dtype, first)
        layer.renorm = check.renorm_limits(renorm)
        if renorm is not None and not layer._buffers:
            raise ValueError("renorm takes running statistics; pass running_mean and running_var")
        layer._take_gradients(gradients)
        return layer

    @property
    def _statistics_shape(self) -> tuple[int, ...]:
        return (self.num_features,) if self.groups is None else (self.groups, self.num_features)

    @property
    def running_mean(self) -> Any:
        """Running mean, shape (C,) or (groups, C), or None."""
        return self._buffers.get("running_mean")

    @property
    def running_var(self) -> Any:
        """Running variance, shape (C,) or (groups, C), or None."""
        return self._buffers.get("running_var")

    @property
    def decay(self) -> float | None:
        """Weight of the old running statistics, ``1 - momentum``; None averages all mini-batches."""
        return None if self.momentum is None else 1 - self.momentum

    def _forward(self, x: Any, training: bool, keep: bool, residual: Any = None, mask: Any = None) -> Any:
        own, running = self._parameters, self._buffers
        frozen = running and not training
        if mask is None and self.allow_single and not frozen and x.size == self.num_features * (self.groups or 1):
            return self._forward_single(x, keep, residual)
        vectors = own.get("weight"), own.get("bias"), running.get("running_mean"), running.get("running_var")
        if frozen:
            y = batch_norm_inference(x, *vectors, eps=self.eps, **self._call_options(residual, mask))
            if keep:
                self._saved = x, None, residual, mask
            return y
        y, statistics = self._normalise(  # a dict of options would cost more than some launches
            x,
            *vectors,
            momentum=self.momentum,
            batches_before=self.batches,
            unbiased=self.unbiased,
            eps=self.eps,
            axis=self.axis,
            residual=residual,
            activation=self.activation,
            alpha=self.alpha,
            mask=mask,
            grouped=self.groups is not None,
            renorm=self.renorm,
            out=self._new_outputs(x),
        )
        if keep:
            self._saved = x, statistics, residual, mask
        if training:
            self.batches += 1
        return y

    def _forward_single(self, x: Any, keep: bool, residual: Any) -> Any:
        """Normalise a mini-batch of one to the shift: a mask tells the op that it is meant."""
        axis = self.axis % (x.ndim - (self.groups is not None)) + (self.groups is not None)
        mask = zeros_beside(x, (*x.shape[:axis], *x.shape[axis + 1 :]), np.dtype(bool))
        mask[...] = True
        given = x, self._parameters.get("weight"), self._parameters.get("bias")
        y, statistics = batch_norm_forward(*given, eps=self.eps, **self._call_options(residual, mask))
        if keep:
            self._saved = x, statistics, residual, mask
        return y

    def _call_options(self, residual: Any, mask: Any) -> dict[str, Any]:
        return super()._call_options(residual, mask) | {"grouped": self.groups is not None}

    def _statistics_of(self, x: Any) -> tuple[int, ...]:
        shape = 3 if self.renorm is None else 5, self.num_features
        return shape if self.groups is None else (self.groups, *shape)

    def _backward(self, dy: Any, in_place: bool) -> Any:
        x, statistics, residual, mask = self._saved
        own, gradients = self._parameters, self._gradients
        weight, bias = own.get("weight"), own.get("bias")
        dx = dy if in_place else empty(runtime_of(type(x)), x.shape, x)
        if weight is None or bias is None:
            out = dx, *self._vector_gradients(x, (self.num_features,))
        else:
            out = dx, gradients["weight"], gradients["bias"]
        if residual is not None:
            out += (empty(runtime_of(type(x)), x.shape, x),)
        if statistics is None:
            options = self._call_options(residual, mask) | {"eps": self.eps, "out": out}
            running = self._buffers["running_mean"], self._buffers["running_var"]
            batch_norm_inference_backward(dy, x, weight, bias, *running, **options)
            return dx if residual is None else (dx, out[3])
        self._differentiate(
            *(dy, x, weight, bias, statistics),
            axis=self.axis,
            residual=residual,
            activation=self.activation,
            alpha=self.alpha,
            mask=mask,
            grouped=self.groups is not None,
            out=out,
        )
        return dx if residual is None else (dx, out[3])

    def _check(self, x: Any) -> None:
        super()._check(x)
        shape = x.shape if self.groups is None else x.shape[1:]
        if self.groups is not None and (not x.shape or x.shape[0] != self.groups):
            raise ValueError(f"x must have {self.groups} groups in its first axis, got the shape {x.shape}")
        if not -len(shape) <= self.axis < len(shape) or shape[self.axis] != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels in axis {self.axis}, got the shape {x.shape}")

    def _options(self) -> list[str]:
        told_decay = self._decay is not None and self.momentum == 1 - self._decay
        weight = f"decay={self._decay!r}" if told_decay else f"momentum={self.momentum!r}"
        options = [str(self.num_features), *([] if self.eps == 1e-5 else [f"eps={self.eps!r}"])]
        options += [weight if self._buffers else "track_running_stats=False"]
        usual = {"unbiased": True, "axis": 1, "groups": None, "renorm": None, "allow_single": False}
        options += [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        options += [] if self._parameters else ["affine=False"]
        arrays = (*self._buffers.values(), *self._parameters.values())
        return options + activation_options(self) + [f"dtype='{array.dtype}'" for array in arrays[:1]]
