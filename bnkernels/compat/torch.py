"""Norms of `torch.nn` and `torch.nn.functional` on the ops, with PyTorch's names, arguments, state and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnkernels.compat import torch_autograd as autograd
from bnkernels.nn.options import activation_options
from bnkernels.ops.activations import activation_named
from bnkernels.runtime import checks as check

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.compiler.disable
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
    alpha: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise as `torch.nn.functional.batch_norm`, with a residual sum and an activation behind.

    Parameters
    ----------
    input : torch.Tensor, shape (N, C, ...), float16, bfloat16, float32 or float64
        Input, in any strides; in channels-last format it gives such an output.
    running_mean, running_var, weight, bias : torch.Tensor, shape (C,), or None
        Running statistics, scale and shift, of the input's type or, for 16 bits, float32.
    training, momentum, eps : bool, float, float
        As in PyTorch, but `momentum` is from 0 to 1 and `eps` above 0.
    activation, alpha, residual : str, float, torch.Tensor
        As in `bnkernels.batch_norm_forward`.

    Returns
    -------
    torch.Tensor
        Output, of the shape and type of `input`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is changed then.
    """
    _check_data(input)
    if input.dim() < 2 or (residual is not None and residual.shape != input.shape):
        got = f"{tuple(input.shape)} and {check.shown(residual)}"
        raise ValueError(f"input must have the shape (N, C, ...), and residual the same, got {got}")
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        raise ValueError(
            "running_mean and running_var must be two tensors, or in training both None, got "
            f"{check.shown(running_mean)} and {check.shown(running_var)}"
        )
    running = {"running_mean": running_mean, "running_var": running_var}
    weight, bias = _for_sums(input, input.shape[1:2], weight=weight, bias=bias, **running)
    # PyTorch's channels-last format has them second in the shape and last in memory.
    last = input.dim() > 3 and not input.is_contiguous() and input.stride(1) == 1
    if last:
        input, residual = (None if tensor is None else tensor.movedim(1, -1) for tensor in (input, residual))
    given = input, weight, bias, residual
    options = {"axis": -1 if last else 1, "activation": activation, "alpha": alpha}
    if training:
        y = autograd.batch_norm(*given, *running.values(), {"momentum": momentum, "eps": eps}, options)
    else:
        kept = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
        # A copy for the backward, before which a training step may change them.
        copies = [tensor.to(autograd.sums_type(input), copy=kept) for tensor in running.values()]
        y = autograd.frozen_batch_norm(*given, *copies, options | {"eps": eps})
    return y.movedim(-1, 1) if last else y


@torch.compiler.disable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
    alpha: float | None = None,
) -> Tensor:
    """Normalise as `torch.nn.functional.layer_norm`, with an activation behind.

    Parameters
    ----------
    input : torch.Tensor, shape (...) and `normalized_shape` behind, float16, bfloat16, float32 or float64
        Input; what is not contiguous is copied.
    normalized_shape : sequence of int
        Shape of the last axes, over which is normalised.
    weight, bias : torch.Tensor, shape `normalized_shape`, optional
        Scale and shift, of the input's type or, for 16 bits, float32.
    eps : float
        Number added to the variance, above 0.
    activation, alpha : str, float
        As in `bnkernels.batch_norm_forward`.

    Returns
    -------
    torch.Tensor
        Output, of the shape and type of `input`; under autocast on a GPU float32, as PyTorch's.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.
    """
    _check_data(input)
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"input must have the last axes {shape}, at least one, got the shape {tuple(input.shape)}")
    if input.itemsize == 2 and input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        input, weight, bias = (None if tensor is None else tensor.float() for tensor in (input, weight, bias))
    vectors = _for_sums(input, shape, weight=weight, bias=bias)
    if all(vector is None or vector.dtype == input.dtype for vector in (weight, bias)):
        vectors = weight, bias
    vectors = [None if vector is None else vector.reshape(-1).contiguous() for vector in vectors]
    rows = input.reshape(math.prod(input.shape[: input.dim() - len(shape)]), math.prod(shape)).contiguous()
    return autograd.layer_norm(rows, *vectors, eps, {"activation": activation, "alpha": alpha}).view(input.shape)


@torch.compiler.disable
def _linear_norm(
    input: Tensor, weight: Tensor, norm: Any, kind: str, mean: Any = None, var: Any = None, momentum: float = 0.0
) -> Tensor:
    """Multiply by the weights of a linear layer, and do what the layer `norm` does in training."""
    _check_data(input)
    device = input.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (input.dtype, weight.dtype):
        input, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (input, weight))
    if input.dim() != 2 or input.shape[1] != weight.shape[1] or input.dtype != weight.dtype:
        wanted = f"must have the shape (N, {weight.shape[1]}) and the type {weight.dtype}"
        raise ValueError(f"input {wanted}, got {check.shown(input)}")
    vectors = {"weight": norm.weight, "bias": norm.bias, "running_mean": mean, "running_var": var}
    given = input.contiguous(), weight.t().contiguous(), *_for_sums(input, weight.shape[:1], **vectors), mean, var
    options = {"norm": kind, "activation": norm.activation, "alpha": norm.alpha}
    return autograd.linear_batch_norm(*given, {"momentum": momentum, "eps": norm.eps}, options)


def _check_data(input: Any) -> None:
    """Check for a tensor of floating-point numbers in memory that the ops can use."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {check.shown(input)}")
    if input.device.type not in ("cpu", "cuda"):
        raise TypeError(f"input must lie in the memory of a CPU or of a CUDA device, got one on {input.device}")
    if input.dtype not in FLOATING:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}; pass input.float()")


def _for_sums(input: Tensor, shape: Sequence[int], **vectors: Tensor | None) -> list[Tensor | None]:
    """Check vectors; return the first two, weight and bias, in the type that the ops sum in."""
    sums = autograd.sums_type(input)
    for name, vector in vectors.items():
        if vector is not None and vector.dtype not in (input.dtype, sums):
            raise TypeError(f"{name} must be {sums} for an input of {input.dtype}, got {vector.dtype}")
        if vector is not None and tuple(vector.shape) != tuple(shape):
            wanted = f"the shape {tuple(shape)} for an input of the shape {tuple(input.shape)}"
            raise ValueError(f"{name} must have {wanted}, got {tuple(vector.shape)}")
    return [None if vector is None else vector.to(sums) for vector in (vectors["weight"], vectors["bias"])]


class _Activated:
    """Norm of PyTorch's with an activation behind it."""

    activation = "identity"
    alpha: float | None = None

    def __init__(self, *args: Any, activation: str = "identity", alpha: float | None = None, **options: Any) -> None:
        activation_named(activation, alpha)
        super().__init__(*args, **options)
        self.activation, self.alpha = activation, alpha

    def extra_repr(self) -> str:
        """Return PyTorch's text with the activation."""
        return ", ".join([super().extra_repr(), *activation_options(self)])


class _BatchNorm(_Activated):
    """Batch norm of PyTorch's with a residual sum and an activation behind it."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the output; `residual`, of the shape of the input, is added before the activation."""
        self._check_input_dim(input)
        running = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            running = None, None
        options = {"activation": self.activation, "alpha": self.alpha, "residual": residual}
        training = self.training or running[0] is None
        y = batch_norm(input, *running, self.weight, self.bias, training, _momentum(self), self.eps, **options)
        _count(self)
        return y


def _momentum(norm: Any) -> float:
    """Return the weight of a mini-batch in the running statistics; without momentum these are averages of all."""
    if norm.momentum is not None:
        return norm.momentum
    return 1 / (float(norm.num_batches_tracked) + 1) if norm.training and norm.num_batches_tracked is not None else 0.0


def _count(norm: Any) -> None:
    """Count a mini-batch of training."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L) in the place of `torch.nn.BatchNorm1d`.

    Parameters
    ----------
    *args
        Arguments of `torch.nn.BatchNorm1d`: num_features, eps, momentum, affine, track_running_stats, device, dtype.
    activation, alpha : str, float
        Activation behind, as in `bnkernels.batch_norm_forward`, and its parameter.
    **options
        Arguments by name.

    Examples
    --------
    >>> bn = BatchNorm1d(2, activation="relu")
    >>> bn(torch.tensor([[1.0, 4.0], [3.0, 2.0]])).detach().round(decimals=3)
    tensor([[0., 1.],
            [1., 0.]])
    >>> list(bn.state_dict())
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch norm of (N, C, H, W) in the place of `torch.nn.BatchNorm2d`.

    Parameters
    ----------
    *args
        Arguments of `torch.nn.BatchNorm2d`.
    activation, alpha : str, float
        As in `BatchNorm1d`.
    **options
        Arguments by name.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch norm of (N, C, D, H, W) in the place of `torch.nn.BatchNorm3d`.

    Parameters
    ----------
    *args
        Arguments of `torch.nn.BatchNorm3d`.
    activation, alpha : str, float
        As in `BatchNorm1d`.
    **options
        Arguments by name.
    """


class LayerNorm(_Activated, torch.nn.LayerNorm):
    """Layer norm in the place of `torch.nn.LayerNorm`.

    Parameters
    ----------
    *args
        Arguments of `torch.nn.LayerNorm`: normalized_shape, eps, elementwise_affine, bias, device, dtype.
    activation, alpha : str, float
        As in `BatchNorm1d`.
    **options
        Arguments by name.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output."""
        options = {"activation": self.activation, "alpha": self.alpha}
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **options)


class LinearBatchNorm(torch.nn.Module):
    """Linear layer without a bias, batch norm or layer norm, and activation, for (N, inputs): one launch each way.

    Parameters
    ----------
    inputs, outputs : int
        Numbers of features of an example, and of neurons.
    norm : {"batch", "layer"}
        Norm.
    device, dtype : torch.device, torch.dtype
        Place and type of the parameters.
    **options
        Options of `BatchNorm1d` or `LayerNorm`.

    Attributes
    ----------
    linear, norm : torch.nn.Linear, BatchNorm1d or LayerNorm
        Layers that own the parameters; the transposed weights are contiguous in memory, as the op takes them.
    """

    def __init__(
        self, inputs: int, outputs: int, *, norm: str = "batch", device: Any = None, dtype: Any = None, **options: Any
    ) -> None:
        super().__init__()
        check.one_of("norm", norm, ("batch", "layer"))
        shared = {"device": device, "dtype": dtype}
        self.linear = torch.nn.Linear(inputs, outputs, bias=False, **shared)
        self.linear.weight = torch.nn.Parameter(self.linear.weight.detach().t().contiguous().t())
        self.norm = (BatchNorm1d if norm == "batch" else LayerNorm)(outputs, **shared, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, shape (N, outputs)."""
        norm, weight = self.norm, self.linear.weight
        if isinstance(norm, LayerNorm):
            return _linear_norm(input, weight, norm, "layer")
        if not norm.training and norm.running_mean is not None:
            return norm(self.linear(input))
        running = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
        y = _linear_norm(input, weight, norm, "batch", *running, momentum=_momentum(norm))
        _count(norm)
        return y


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Turn PyTorch's batch and layer norms of a model into ours, in place; they keep parameters, state and hooks.

    Parameters
    ----------
    model : torch.nn.Module
        Model, or a norm. Subclasses of the norms, such as `torch.nn.SyncBatchNorm`, stay what they are.

    Returns
    -------
    torch.nn.Module
        The same model.
    """
    ours = {getattr(torch.nn, kind.__name__): kind for kind in (BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm)}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))
    return model
