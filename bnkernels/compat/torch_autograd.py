"""Autograd functions of the norms: the ops and their derivatives on the memory of tensors, of which nothing is copied.

A tensor is seen as a NumPy array, or on a GPU as a CuPy array on PyTorch's current stream. Where a gradient is to be
differentiated again, that of batch norm over a mini-batch has an op for it, and the others are computed by PyTorch's
operators, from the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm.double_backward import batch_norm_double_backward
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.linear_batch_norm.op import linear_batch_norm_backward, linear_batch_norm_forward
from bnkernels.runtime import registry

CURVED = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


def sums_type(x: Tensor) -> torch.dtype:
    """Return the type of sums over the data, and of statistics and vectors.

    Parameters
    ----------
    x : torch.Tensor
        Data.

    Returns
    -------
    torch.dtype
        Type: float32 for 16 bits, else that of the data.
    """
    return torch.float32 if x.itemsize == 2 else x.dtype


def _gradients(
    x: Tensor, length: int, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return new tensors for the gradients of data, scale and shift, and residual."""
    vectors = (x.new_empty(length, dtype=dtype or sums_type(x)) for _ in range(2))
    return x.new_empty(x.shape), *vectors, *([] if residual is None else [x.new_empty(x.shape)])


def _array(value: Any) -> Any:
    """Return the NumPy or CuPy array on the memory of a tensor; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach() if value.requires_grad else value
    if tensor.dtype == torch.bfloat16:  # NumPy knows it from ml_dtypes alone
        from ml_dtypes import bfloat16

        return _array(tensor.view(torch.int16)).view(bfloat16)
    if tensor.is_cuda:
        return registry.choose_device("cuda").xp.from_dlpack(tensor)
    return tensor.numpy()


@contextmanager
def _current_stream(device: torch.device) -> Iterator[None]:
    """Let CuPy work on the current stream that PyTorch has on a device."""
    registry.choose_device("cuda")  # says what is missing
    from bnkernels.runtime import cuda

    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device), cuda.on_stream(device.index, stream):
        yield


def _call(op: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> None:
    """Call an op on the memory of tensors; `out` are some too."""
    out = options.pop("out")
    data = next(tensor for tensor in tensors if tensor is not None)
    with _current_stream(data.device) if data.is_cuda else nullcontext():
        outputs = tuple(map(_array, out)) if isinstance(out, tuple) else _array(out)
        op(*map(_array, tensors), **{name: _array(value) for name, value in options.items()}, out=outputs)


def _update(
    op: Callable[..., Any], given: Sequence[Tensor | None], running: Sequence[Tensor | None], **options: Any
) -> None:
    """Call an op that updates running statistics; it takes those of 16 bits in float32."""
    taken = [None if vector is None else vector.to(sums_type(given[0])) for vector in running]
    _call(op, *given, *taken, **options)
    for vector, updated in zip(running, taken, strict=True):
        if updated is not vector:
            vector.copy_(updated)


def _needed(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return a gradient for every input of a function, None for those that need none."""
    gradients = (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))
    return tuple(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _through(ctx: Any, formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor) -> tuple:
    """Return gradients that can be differentiated again: those of a formula, by PyTorch's own operators."""
    with torch.enable_grad():
        # Views of their own: one tensor that comes in twice has two gradients.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        found = iter(torch.autograd.grad(formula(*inputs), wanted, dy, create_graph=True))
    return _needed(ctx, [next(found) if need else None for need in ctx.needs_input_grad[: len(inputs)]])


def _normalised(x: Tensor, axis: int, eps: float) -> Tensor:
    """Return the distances to the mean over the deviation, along an axis."""
    centred = x - x.mean(axis, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axis, keepdim=True) + eps)


def _epilogue(z: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, alpha: float | None) -> Tensor:
    """Scale, shift and activate; the features come last."""
    z = z if weight is None else z * weight
    z = z if bias is None else z + bias
    number = activation_named(activation, alpha).alpha
    if activation == "elu":
        return functional.elu(z, number)
    # Identity, relu and leaky_relu differ in the slope below 0.
    return CURVED[activation](z) if activation in CURVED else functional.leaky_relu(z, number)


class _BatchNorm(torch.autograd.Function):
    """Batch norm over the mini-batch; the derivative of its backward is an op too."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, numbers, options):
        y = x.new_empty(x.shape)
        statistics = x.new_empty((3, x.shape[options["axis"]]), dtype=sums_type(x))
        given, running = (x, weight, bias), (running_mean, running_var)
        _update(batch_norm_forward, given, running, residual=residual, **numbers, **options, out=(y, statistics))
        ctx.options = options
        ctx.save_for_backward(x, weight, bias, residual, statistics)
        return y

    @staticmethod
    def backward(ctx, dy):
        gradients = _BatchNormBackward.apply if torch.is_grad_enabled() else _batch_norm_gradients
        return _needed(ctx, gradients(dy, *ctx.saved_tensors, ctx.options))


def _batch_norm_gradients(dy, x, weight, bias, residual, statistics, options):
    """Return the gradients of batch norm over the mini-batch."""
    out = _gradients(x, statistics.shape[1], residual)
    _call(batch_norm_backward, dy, x, weight, bias, statistics, residual=residual, **options, out=out)
    return out


class _BatchNormBackward(torch.autograd.Function):
    """Gradients of batch norm over the mini-batch, to be differentiated."""

    @staticmethod
    def forward(ctx, *given):
        *tensors, ctx.options = given
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return _batch_norm_gradients(*given)

    @staticmethod
    def backward(ctx, ddx, ddgamma, ddbeta, ddresidual=None):
        given = ddx, ddgamma, ddbeta, ddresidual, *ctx.saved_tensors, ctx.options
        return _needed(ctx, _BatchNormDoubleBackward.apply(*given))


class _BatchNormDoubleBackward(torch.autograd.Function):
    """Gradients of these gradients; `once_differentiable` would let a third derivative miss a part without a word."""

    @staticmethod
    def forward(ctx, ddx, ddgamma, ddbeta, ddresidual, dy, x, weight, bias, residual, statistics, options):
        vectors = (None if vector is None else vector.contiguous() for vector in (ddgamma, ddbeta))
        given = ddx, *vectors, dy, x, weight, bias, statistics
        out = x.new_empty(x.shape), *_gradients(x, statistics.shape[1], residual)
        _call(batch_norm_double_backward, *given, residual=residual, ddresidual=ddresidual, **options, out=out)
        return out

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("batch norm in training has a first and a second derivative, and no third; use torch.nn's")


class _FrozenBatchNorm(torch.autograd.Function):
    """Batch norm with running statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, mean, var, options):
        y = x.new_empty(x.shape)
        _call(batch_norm_inference, x, weight, bias, mean, var, residual=residual, **options, out=y)
        ctx.options = options
        ctx.save_for_backward(x, weight, bias, residual, mean, var)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = partial(_frozen, mean=mean, var=var, **ctx.options)
            return _through(ctx, formula, (x, weight, bias, residual), dy)
        out = _gradients(x, len(mean), residual)
        given = dy, x, weight, bias, mean, var
        _call(batch_norm_inference_backward, *given, residual=residual, **ctx.options, out=out)
        return _needed(ctx, out)


def _frozen(x, weight, bias, residual, *, mean, var, axis, eps, **activation):
    """Return what the op does, by PyTorch's operators."""
    z = (x.movedim(axis, -1) - mean) * torch.rsqrt(var + eps)
    z = z if weight is None else z * weight
    shift = bias if residual is None else residual.movedim(axis, -1) + (0 if bias is None else bias)
    return _epilogue(z, None, shift, **activation).movedim(-1, axis).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """Layer norm of the rows of a matrix."""

    @staticmethod
    def forward(ctx, rows, weight, bias, eps, options):
        out = rows.new_empty(rows.shape), rows.new_empty((3, len(rows)), dtype=sums_type(rows))
        _call(layer_norm_forward, rows, weight, bias, eps=eps, **options, out=out)
        ctx.eps, ctx.options = eps, options
        ctx.save_for_backward(rows, weight, bias, out[1])
        return out[0]

    @staticmethod
    def backward(ctx, dy):
        rows, weight, bias, statistics = ctx.saved_tensors

        def formula(rows, weight, bias):
            z = _normalised(rows.to(statistics.dtype), -1, ctx.eps)
            return _epilogue(z, weight, bias, **ctx.options).to(rows.dtype)

        if torch.is_grad_enabled():
            return _through(ctx, formula, (rows, weight, bias), dy)
        given = [vector.dtype for vector in (weight, bias) if vector is not None]
        out = _gradients(rows, rows.shape[1], dtype=given[0] if given else None)
        _call(layer_norm_backward, dy.contiguous(), rows, weight, bias, statistics, **ctx.options, out=out)
        return _needed(ctx, out)


class _LinearBatchNorm(torch.autograd.Function):
    """Product of an input and the transposed weights, with batch norm or layer norm behind."""

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, running_mean, running_var, numbers, options):
        y, z = (x.new_empty((len(x), weight.shape[1])) for _ in range(2))
        statistics = x.new_empty((3, len(x) if options["norm"] == "layer" else weight.shape[1]), dtype=sums_type(x))
        given, running = (x, weight, gamma, beta), (running_mean, running_var)
        _update(linear_batch_norm_forward, given, running, **numbers, **options, out=(y, z, statistics))
        ctx.eps, ctx.options = numbers["eps"], options
        ctx.save_for_backward(x, weight, gamma, beta, z, statistics)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, gamma, beta, z, statistics = ctx.saved_tensors
        norm, activation = ctx.options["norm"], {name: ctx.options[name] for name in ("activation", "alpha")}

        def formula(x, weight, gamma, beta):
            z = _normalised((x @ weight).to(statistics.dtype), -1 if norm == "layer" else 0, ctx.eps)
            return _epilogue(z, gamma, beta, **activation).to(x.dtype)

        if torch.is_grad_enabled():
            return _through(ctx, formula, (x, weight, gamma, beta), dy)
        wanted = ctx.needs_input_grad[0]
        out = x.new_empty(x.shape) if wanted else None, *_gradients(weight, weight.shape[1])
        given = dy.contiguous(), x, weight, gamma, beta, z, statistics
        _call(linear_batch_norm_backward, *given, **ctx.options, input_gradient=wanted, out=out)
        return _needed(ctx, out)


# Inputs are those of `forward` without `ctx`; data is contiguous where the op asks for it, and vectors have the type of
# sums.
batch_norm = _BatchNorm.apply
frozen_batch_norm = _FrozenBatchNorm.apply
layer_norm = _LayerNorm.apply
linear_batch_norm = _LinearBatchNorm.apply
