"""Gradients of the norms in PyTorch's place, first and second: central differences, and what is asked for alone."""

from __future__ import annotations

from typing import Any

import pytest

from bnkernels.ops.activations import ACTIVATIONS
from tools import real_torch

torch = real_torch.load()

from bnkernels.compat import torch as ours  # noqa: E402
from bnkernels.compat import torch_autograd  # noqa: E402

SHAPES = {"matrix": (5, 3), "images": (2, 3, 2, 2)}
NORMS = ("batch", "frozen", "residual", "frozen residual", "layer", "linear batch", "linear layer")


def function(norm: str, activation: str, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """Return a norm as a function of tensors, and these: input, scale, shift, and what else it takes."""
    torch.manual_seed(7)
    options = {"activation": activation, "alpha": 0.7 if activation in ("elu", "leaky_relu") else None}
    features = 3 if norm == "linear batch" else shape[-1] if "layer" in norm else shape[1]
    running = torch.randn(3), torch.rand(3) + 0.5
    tensors = [torch.randn(shape), torch.rand(features) + 0.5, torch.randn(features)]
    tensors += [torch.randn(shape)] if "residual" in norm else []
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    running = [tensor.double() for tensor in running]
    if norm == "layer":
        return lambda x, weight, bias: ours.layer_norm(x, (features,), weight, bias, **options), tensors
    if "linear" in norm:
        module = ours.LinearBatchNorm(shape[1], 3, norm=norm.split()[1], dtype=torch.float64, **options)
        tensors = [tensors[0], *(tensor.detach().requires_grad_() for tensor in module.parameters())]
        names = [name for name, _ in module.named_parameters()]

        def call(x: Any, *parameters: Any) -> Any:
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

        return call, tensors
    training = "frozen" not in norm
    running = (None, None) if training else running

    def normalise(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        return ours.batch_norm(x, *running, weight, bias, training, residual=residual, **options)

    return normalise, tensors


def check(call: Any, *tensors: Any) -> None:
    """Compare gradients and those of gradients with central differences.

    The gradients that can be differentiated again are compared with the others: differences of wrong ones would agree.
    """
    assert torch.autograd.gradcheck(call, tensors)
    y = call(*tensors)
    dy = torch.linspace(0.25, 1.25, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = [torch.autograd.grad(call(*tensors), tensors, dy, create_graph=again) for again in (False, True)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_and_their_gradients_match_central_differences(norm: str, activation: str) -> None:
    call, tensors = function(norm, activation, SHAPES["matrix"])
    check(call, *tensors)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", NORMS[:5])
def test_second_gradients_of_images_in_either_format(norm: str, layout: Any) -> None:
    call, tensors = function(norm, "silu", SHAPES["images"])
    tensors[0] = tensors[0].detach().to(memory_format=layout).requires_grad_()
    check(call, *tensors)


@pytest.mark.parametrize("norm", ["residual", "frozen residual"])
def test_an_input_that_is_its_own_residual_has_both_gradients(norm: str) -> None:
    call, (x, weight, bias, _) = function(norm, "tanh", SHAPES["matrix"])
    check(lambda x: call(x, weight, bias, x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "LayerNorm"])
@pytest.mark.parametrize("training", [True, False])
def test_a_penalty_on_gradients_is_pytorchs(kind: str, training: bool, dtype: Any) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(1)).to(dtype)
    found = []
    for module in (getattr(ours, kind), getattr(torch.nn, kind)):
        norm = module(3 if kind == "BatchNorm2d" else 5, dtype=torch.float32 if module is torch.nn else None)
        norm.train(training)
        given = x.clone().requires_grad_()
        gradients = torch.autograd.grad(norm(given).sin().sum(), [given, *norm.parameters()], create_graph=True)
        # A plain sum reaches the op as one number with strides of 0.
        penalty = gradients[0].float().square().sum() + gradients[1].sum() + gradients[2].sum()
        found.append(torch.autograd.grad(penalty, [given, *norm.parameters()]))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 64 * torch.finfo(dtype).eps * max(1, want.abs().max())


def test_what_is_not_differentiated_comes_to_the_op_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    op = torch_autograd.batch_norm_double_backward
    monkeypatch.setattr(
        torch_autograd, "batch_norm_double_backward", lambda *arrays, **out: given.extend(arrays) or op(*arrays, **out)
    )
    call, tensors = function("batch", "tanh", SHAPES["matrix"])
    first = torch.autograd.grad(call(*tensors).sum(), tensors, create_graph=True)
    torch.autograd.grad(first[1].sum(), tensors[0])
    assert [array is None for array in given[:3]] == [True, False, True]


def test_a_third_derivative_of_batch_norm_is_an_error() -> None:
    call, (x, *rest) = function("batch", "identity", SHAPES["matrix"])
    (first,) = torch.autograd.grad(call(x, *rest).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a first and a second derivative, and no third"):
        torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_nobody_needs_are_none(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple] = []
    needed = torch_autograd._needed
    monkeypatch.setattr(torch_autograd, "_needed", lambda *given: found.append(needed(*given)) or found[-1])
    call, tensors = function(norm, "tanh", SHAPES["matrix"])
    for number, tensor in enumerate(tensors):
        given = [one.detach().requires_grad_(one is tensor) for one in tensors]
        call(*given).sum().backward()
        for other, one in enumerate(given):
            assert (one.grad is None) is (other != number)
        assert sum(gradient is not None for gradient in found[-1]) == 1
    plain = [tensor.detach() for tensor in tensors]
    assert not call(*plain).requires_grad
    with torch.no_grad():
        assert not call(*tensors).requires_grad


def test_a_linear_batch_norm_computes_no_gradient_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    op = torch_autograd.linear_batch_norm_backward

    def noting(*arrays: Any, input_gradient: bool, **options: Any) -> Any:
        wanted.append(input_gradient)
        return op(*arrays, input_gradient=input_gradient, **options)

    monkeypatch.setattr(torch_autograd, "linear_batch_norm_backward", noting)
    module = ours.LinearBatchNorm(4, 3)
    for needs in (False, True):
        module(torch.randn(5, 4, requires_grad=needs)).sum().backward()
    assert wanted == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_training_step_before_the_backward_of_an_evaluation_changes_no_gradient(
    create_graph: bool, dtype: Any
) -> None:
    norm = ours.BatchNorm1d(3, dtype=dtype)
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    (right,) = torch.autograd.grad(norm.eval()(x).sum(), x)
    y = norm.eval()(x)
    norm.train()(10 * x.detach())
    (found,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    torch.testing.assert_close(found, right)
    assert norm.running_var.min() > 1.5
