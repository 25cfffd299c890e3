"""PyTorch's own test inputs for batch norm and layer norm: every sample agrees with PyTorch, or is refused by name.

PyTorch computes them in float64: its sums of 16-bit gradients over hundreds of rows are off by thousands of units in
the last place. In float64 its gradients of modules are off too, by some tens: there they are those of the formulas in
extended precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from tools import oracle, real_torch

torch = real_torch.load()
pytest.importorskip("expecttest", reason="PyTorch's test inputs need the package expecttest")

from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

from bnkernels.compat import torch as ours  # noqa: E402
from tests.compat.common import assert_equal  # noqa: E402

FUNCTIONS = {
    "nn.functional.batch_norm": ours.batch_norm,
    "nn.functional.layer_norm": ours.layer_norm,
}
MODULES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm")
OPS = {op.full_name: op for op in op_db if op.name in FUNCTIONS}
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in MODULES}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Samples that PyTorch computes and we refuse, by the message, and how many of them there are for each type.
REFUSED = {
    "nn.functional.batch_norm": {"input must have the shape": 2, "momentum must be between 0 and 1": 1},
    "nn.functional.layer_norm": {"eps must be at least": 1},
}


@pytest.fixture(autouse=True)
def same_samples() -> None:
    """Draw the same samples in every run."""
    torch.manual_seed(0)


class Outcome(NamedTuple):
    """Results of a call: output, gradients, and what was written."""

    y: Any
    gradients: tuple[Any, ...]
    written: list[Any]


def copies(given: Any, dtype: Any) -> list[Any]:
    """Return the arguments with new leaves for tensors, in a type."""
    return [
        value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for value in given
    ]


def direction(y: Any) -> Any:
    """Return a gradient that comes in, of numbers that every type has."""
    return torch.linspace(0.25, 1.25, max(y.numel(), 1))[: y.numel()].reshape(y.shape).bfloat16().to(y.dtype)


def outcome(y: Any, given: Any) -> Outcome:
    """Return an output with its gradients in a fixed direction."""
    tensors = [value for value in given if torch.is_tensor(value)]
    gradients = torch.autograd.grad(y, [tensor for tensor in tensors if tensor.requires_grad], direction(y))
    return Outcome(y, gradients, [tensor for tensor in tensors if not tensor.requires_grad])


def exact_gradients(module: Any, x: Any, y: Any) -> tuple[Any, ...]:
    """Return the gradients of a norm of PyTorch's, of input, scale and shift, from the formulas."""
    layer = isinstance(module, torch.nn.LayerNorm)
    axes = tuple(range(x.dim() - len(module.normalized_shape), x.dim())) if layer else (0, *range(2, x.dim()))
    others = tuple(axis for axis in range(x.dim()) if axis not in axes) if layer else axes
    shape = tuple(1 if axis in others else x.shape[axis] for axis in range(x.dim()))
    wide = x.detach().numpy().astype(oracle.Extended)
    dy = direction(y).numpy().astype(oracle.Extended)
    frozen = not layer and not module.training and module.track_running_stats
    mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    if frozen:
        mean, var = (array.numpy().reshape(shape) for array in (module.running_mean, module.running_var))
    scale = 1 if module.weight is None else module.weight.detach().numpy().reshape(shape)
    rstd = 1 / np.sqrt(var + oracle.Extended(module.eps))
    xhat, g = (wide - mean) * rstd, scale * dy
    through = 0 if frozen else g.mean(axes, keepdims=True) + xhat * (g * xhat).mean(axes, keepdims=True)
    found = [rstd * (g - through)]
    if module.weight is not None:
        found += [(dy * xhat).sum(others).reshape(module.weight.shape)]
        found += [] if module.bias is None else [dy.sum(others).reshape(module.bias.shape)]
    return tuple(torch.from_numpy(array.astype("f8")) for array in found)


def assert_agree(found: Outcome, exact: Outcome, dtype: Any) -> None:
    """Compare all results with those in float64, which are rounded to the type that PyTorch gives them."""
    assert_equal(found.y, exact.y.to(dtype))
    for got, want in zip(found.gradients + tuple(found.written), exact.gradients + tuple(exact.written), strict=True):
        assert_equal(got, want.to(dtype) if want.is_floating_point() else want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_functions_agree_on_the_samples_of_pytorch(name: str, dtype: Any) -> None:
    op, refused, passed = OPS[name], dict.fromkeys(REFUSED[OPS[name].name], 0), 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        given, wide = (copies((sample.input, *sample.args), kind) for kind in (dtype, torch.float64))
        exact = outcome(op.op(*wide, **sample.kwargs), wide)
        try:
            y = FUNCTIONS[op.name](*given, **sample.kwargs)
        except ValueError as error:
            (reason,) = [reason for reason in refused if str(error).startswith(reason)]
            refused[reason] += 1
            continue
        assert_agree(outcome(y, given), exact, dtype)
        passed += 1
    assert refused == REFUSED[op.name]
    assert passed >= 5


def module_samples(name: str, dtype: Any, training: bool) -> Iterator[Any]:
    """Yield PyTorch's inputs for a module."""
    yield from INFOS[name].module_inputs_func(
        INFOS[name], device="cpu", dtype=dtype, requires_grad=True, training=training
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_agree_on_the_samples_of_pytorch(name: str, dtype: Any, training: bool) -> None:
    passed = 0
    for sample in module_samples(name, dtype, training):
        made, given = sample.constructor_input, sample.forward_input
        found = []
        for kind, own in ((getattr(ours, name), dtype), (INFOS[name].module_cls, torch.float64)):
            module, inputs = kind(*made.args, **made.kwargs, dtype=own).train(training), copies(given.args, own)
            y = module(*inputs, **given.kwargs)
            found.append(outcome(y, [*inputs, *module.parameters(), *module.buffers()]))
        if dtype == torch.float64 and y.numel():
            found[1] = found[1]._replace(gradients=exact_gradients(module, inputs[0], y))
        assert_agree(*found, dtype)
        passed += 1
    assert passed >= 7


@pytest.mark.parametrize("name", MODULES[:3])
def test_modules_refuse_what_pytorchs_refuse(name: str) -> None:
    info, refused = INFOS[name], 0
    for training in (True, False):
        given = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": training}
        for error in info.module_error_inputs_func(info, **given):
            made, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
            module = getattr(ours, name)(*made.args, **made.kwargs).train(training)
            with pytest.raises((TypeError, ValueError)):
                module(*forward.args, **forward.kwargs)
            refused += 1
    assert refused >= 2
