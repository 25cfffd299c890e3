"""RMS norm, group norm and instance norm as layers: their formulas and gradients, arrays, errors and reprs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import nn
from tests.nn.common import assert_close, assert_gradients, normalised
from tests.ops.test_batch_norm_masked import dtype_named
from tools.backends import Backend

LAYERS = {
    "RMSNorm": (lambda **options: nn.RMSNorm(4, **options), (5, 6, 4)),
    "GroupNorm": (lambda **options: nn.GroupNorm(3, 6, **options), (5, 6, 4)),
    "InstanceNorm": (lambda **options: nn.InstanceNorm(6, affine=True, **options), (5, 6, 4)),
}


def perturbed(backend: Backend, rng: np.random.Generator, layer: Any) -> Any:
    """Return a layer whose parameters are not those of the start."""
    for array in layer.parameters.values():
        array[...] = backend.asarray(rng.standard_normal(array.shape))
    return layer


@pytest.mark.parametrize("axes", [1, 2])
def test_rms_norm_is_its_formulas(backend: Backend, rng: np.random.Generator, axes: int) -> None:
    x, dy = rng.standard_normal((2, 5, 3, 4))
    layer = nn.RMSNorm((3, 4)[-axes:], activation="silu", dtype="float64", xp=backend.xp)
    perturbed(backend, rng, layer)
    over = tuple(range(-axes, 0))
    z = backend.asnumpy(layer.weight) * x / np.sqrt(np.square(x).mean(over, keepdims=True) + 1e-5)
    assert_close(backend, layer(backend.asarray(x)), z / (1 + np.exp(-z)))
    assert layer.bias is None
    assert layer.statistics.mean is None
    assert_close(backend, layer.statistics.var, np.square(x).mean(over), 1e-9)
    assert_gradients(backend, layer, x, dy)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(("groups", "shape"), [(2, (5, 4, 6)), (3, (4, 6)), (1, (2, 3, 2, 5)), (4, (2, 4, 3, 2))])
def test_group_norm_is_its_formulas(
    backend: Backend, rng: np.random.Generator, groups: int, shape: tuple[int, ...], axis: int
) -> None:
    x, dy = rng.standard_normal((2, *shape))
    layer = nn.GroupNorm(groups, shape[1], axis=axis, activation="tanh", dtype="float64", xp=backend.xp)
    perturbed(backend, rng, layer)
    xhat = normalised(x.reshape(shape[0], groups, -1), (2,), 1e-5).reshape(shape)
    weight, bias = (backend.asnumpy(array).reshape(-1, *[1] * (x.ndim - 2)) for array in (layer.weight, layer.bias))
    x, dy, y = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, dy, np.tanh(weight * xhat + bias)))
    assert_close(backend, layer(backend.asarray(x)), y)
    assert_gradients(backend, layer, x, dy)
    assert layer.statistics.mean.shape == (shape[0], groups)


@pytest.mark.parametrize(("axis", "shape"), [(1, (5, 4, 6)), (-1, (3, 5, 4)), (3, (2, 3, 2, 4)), (1, (2, 4, 3, 2))])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_its_formulas(
    backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...], affine: bool
) -> None:
    x, dy = rng.standard_normal((2, *shape))
    layer = nn.InstanceNorm(4, axis=axis, affine=affine, activation="tanh", dtype="float64", xp=backend.xp)
    perturbed(backend, rng, layer)
    axes = tuple(other for other in range(1, x.ndim) if other != axis % x.ndim)
    z = normalised(x, axes, 1e-5)
    if affine:
        along = [4 if other == axis % x.ndim else 1 for other in range(x.ndim)]
        z = backend.asnumpy(layer.weight).reshape(along) * z + backend.asnumpy(layer.bias).reshape(along)
    assert_close(backend, layer(backend.asarray(x)), np.tanh(z))
    assert_close(backend, layer.statistics.mean, x.mean(axes))
    assert_gradients(backend, layer, x, dy)
    assert_close(backend, layer.eval()(backend.asarray(x)), np.tanh(z))


def test_instance_norm_remembers_residual_and_mask(backend: Backend, rng: np.random.Generator) -> None:
    x, residual, dy = rng.standard_normal((3, 5, 4, 6))
    mask = np.arange(6) < np.array([6, 5, 4, 3, 2])[:, None]
    layer = nn.InstanceNorm(4, affine=True, activation="relu", dtype="float64", xp=backend.xp)
    on_x, on_residual, on_dy, on_mask = backend.arrays(x, residual, dy, mask)
    y = layer(on_x, residual=on_residual, mask=on_mask)
    dx, dresidual = layer.backward(on_dy)
    options = {"residual": on_residual, "mask": on_mask, "activation": "relu"}
    want, statistics = bn.instance_norm_forward(on_x, layer.weight, layer.bias, **options)
    grads = bn.instance_norm_backward(on_dy, on_x, layer.weight, layer.bias, statistics, **options)
    got = y, dx, layer.gradients["weight"], layer.gradients["bias"], dresidual
    for one, other in zip(got, (want, *grads), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))


def test_a_residual_block_may_end_with_an_instance_norm(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 3, 4, 6))
    norm = nn.InstanceNorm(4, activation="relu", dtype="float64", xp=backend.xp)
    block = nn.Residual(nn.Identity(), norm)
    assert_close(backend, block(backend.asarray(x)), np.maximum(normalised(x, (2,), 1e-5) + x, 0))
    assert_gradients(backend, block, x, dy)


@pytest.mark.parametrize("name", LAYERS)
def test_without_parameters_the_gradient_of_the_input_is_the_same(
    backend: Backend, rng: np.random.Generator, name: str
) -> None:
    make, shape = LAYERS[name]
    x, dy = backend.arrays(*rng.standard_normal((2, *shape)))
    plain = {"RMSNorm": nn.RMSNorm(4, affine=False), "GroupNorm": nn.GroupNorm(3, 6, affine=False)}
    plain["InstanceNorm"] = nn.InstanceNorm(6)
    layer, other = make(dtype="float64", xp=backend.xp), plain[name]
    assert not other.parameters
    np.testing.assert_array_equal(backend.asnumpy(layer(x)), backend.asnumpy(other(x)))
    np.testing.assert_array_equal(backend.asnumpy(layer.backward(dy)), backend.asnumpy(other.backward(dy)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_work_on_16_bit_parameters_that_there_are(
    backend: Backend, rng: np.random.Generator, dtype: str
) -> None:
    data = dtype_named(dtype)
    x, dy, four, *six = backend.arrays(
        *(rng.standard_normal((5, 6, 4)).astype(data) for _ in range(2)),
        *(np.ones(size, data) for size in (4, 6, 6)),
    )
    for layer in (
        nn.RMSNorm.from_arrays(four),
        nn.GroupNorm.from_arrays(2, *six),
        nn.InstanceNorm.from_arrays(*six),
    ):
        layer(x)
        layer.backward(dy)
        assert layer.weight.dtype == data
        assert {array.dtype for array in layer.gradients.values()} == {np.dtype(data)}
        with pytest.raises(TypeError, match=f"x must be {dtype} for this {type(layer).__name__}, got float32"):
            layer(x.astype("float32"))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_accumulate_and_a_repr_makes_such_a_layer(
    backend: Backend, rng: np.random.Generator, name: str
) -> None:
    make, shape = LAYERS[name]
    layer = make(eps=1e-3, activation="relu", dtype="float64", xp=backend.xp)
    x, dy = backend.arrays(*rng.standard_normal((2, *shape)))
    layer(x)
    layer.backward(dy)
    once = {name: backend.asnumpy(array).copy() for name, array in layer.gradients.items()}
    layer.backward(dy, accumulate=True)
    for name, array in layer.gradients.items():
        np.testing.assert_array_equal(backend.asnumpy(array), 2 * once[name])
    assert repr(eval(repr(layer), vars(nn))) == repr(layer)
    half = make().astype("float16")
    assert {array.dtype for array in half.parameters.values()} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: nn.RMSNorm(()), ValueError, "normalized_shape must have at least one axis"),
        (lambda: nn.RMSNorm(4)(np.zeros((3, 5), "float32")), ValueError, r"x must have \(4,\) as its last axes"),
        (lambda: nn.GroupNorm(4, 6), ValueError, "num_groups must divide num_channels, got 4 and 6"),
        (lambda: nn.GroupNorm(0, 6), ValueError, "num_groups must be at least 1"),
        (lambda: nn.GroupNorm(2, 6, axis=2), ValueError, "axis must be 1 or -1"),
        (
            lambda: nn.GroupNorm(2, 6, axis=-1)(np.zeros((3, 6, 4), "float32")),
            ValueError,
            "x must have 6 channels in axis -1",
        ),
        (lambda: nn.GroupNorm(2, 6)(np.zeros((3, 5), "float32")), ValueError, "x must have 6 channels in axis 1"),
        (
            lambda: nn.GroupNorm(2, 6)(np.zeros((3, 4, 6), "float32").transpose(0, 2, 1)),
            ValueError,
            "x must be contiguous in C order",
        ),
        (lambda: nn.InstanceNorm(0), ValueError, "num_features must be at least 1"),
        (lambda: nn.InstanceNorm(3, axis=0), ValueError, "axis must be that of the channels"),
        (lambda: nn.InstanceNorm(3)(np.zeros((4, 3), "float32")), ValueError, "3 channels in axis 1 and at least one"),
        (lambda: nn.InstanceNorm(3)(np.zeros((4, 2, 5), "float32")), ValueError, "x must have 3 channels in axis 1"),
        (lambda: nn.InstanceNorm(3)(np.zeros((4, 3, 1), "float32")), ValueError, "one position has no variance"),
        (lambda: nn.GroupNorm(2, 6).backward(np.zeros((3, 6))), RuntimeError, "call this GroupNorm before it"),
    ],
)
def test_what_is_wrong_is_said(call: Callable[[], Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_running_statistics_of_pytorch_are_refused(torch: ModuleType) -> None:
    with pytest.raises(TypeError, match="module must not track running statistics to become an InstanceNorm"):
        nn.from_torch(torch.nn.InstanceNorm2d(3, track_running_stats=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_without_eps_rms_norm_has_that_of_pytorch(torch: ModuleType, dtype: str) -> None:
    """Which the result for small numbers shows."""
    theirs = torch.nn.RMSNorm(4, dtype=getattr(torch, dtype))
    x = torch.full((2, 4), 1e-4 if dtype != "float64" else 1e-8, dtype=getattr(torch, dtype))
    ours = nn.from_torch(theirs)
    assert ours.eps == np.finfo("float64" if dtype == "float64" else "float32").eps
    got = ours(x.double().numpy().astype(dtype_named(dtype)))
    np.testing.assert_allclose(got.astype(float), theirs(x).detach().double().numpy(), rtol=2**-7)
