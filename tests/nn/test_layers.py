"""Layers by themselves: what they compute and remember, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import nn
from bnkernels.ops.activations import ACTIVATIONS
from tests.nn.common import assert_close, assert_gradients, normalised
from tests.ops.test_batch_norm_masked import dtype_named
from tools.backends import Backend

SHAPES = {1: [(6, 3), (5, 3, 4), (4, 3, 2, 5), (2, 3, 2, 3, 2)], -1: [(6, 3), (4, 2, 5, 3)], 2: [(3, 4, 3)]}


@pytest.mark.parametrize(("axis", "shape"), [(axis, shape) for axis, shapes in SHAPES.items() for shape in shapes])
def test_batch_norm_is_its_formulas_in_any_axis(
    backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...]
) -> None:
    x, dy = 3 + rng.standard_normal(shape), rng.standard_normal(shape)
    layer = nn.BatchNorm(3, axis=axis, activation="tanh", dtype="float64", xp=backend.xp)
    layer.weight[...], layer.bias[...] = backend.arrays(np.float64([1, -2, 3]), np.float64([0.5, 0, 1]))
    axes = tuple(other for other in range(x.ndim) if other != axis % x.ndim)
    along = tuple(3 if other == axis % x.ndim else 1 for other in range(x.ndim))
    gamma, beta = (backend.asnumpy(array).reshape(along) for array in (layer.gamma, layer.beta))
    z = gamma * normalised(x, axes, 1e-5) + beta
    assert_close(backend, layer(backend.asarray(x)), np.tanh(z))
    count = x.size // 3
    assert_close(backend, layer.running_mean, 0.1 * x.mean(axes))
    assert_close(backend, layer.running_var, 0.9 + 0.1 * x.var(axes) * count / (count - 1))
    assert layer.batches == 1

    layer.backward(backend.asarray(dy))
    assert_close(backend, layer.gradients["bias"], (dy * (1 - np.tanh(z) ** 2)).sum(axes))
    assert_gradients(backend, layer, x, dy)

    layer.eval()
    mean, var = (backend.asnumpy(array).reshape(along) for array in (layer.running_mean, layer.running_var))
    assert_close(backend, layer(backend.asarray(x)), np.tanh(gamma * (x - mean) / np.sqrt(var + 1e-5) + beta))
    assert_gradients(backend, layer, x, dy)  # those of frozen statistics


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_remembers_residual_and_mask(backend: Backend, rng: np.random.Generator, frozen: bool) -> None:
    """A backward that was not told of the residual gave three arrays instead of four, and a wrong dx."""
    x, residual, dy = rng.standard_normal((3, 5, 2, 4))
    mask = np.array([[1, 1], [1, 0], [0, 0], [1, 1], [1, 1]], bool)
    layer = nn.BatchNorm(4, axis=-1, activation="relu", dtype="float64", xp=backend.xp).train(not frozen)
    on = backend.arrays(x, residual, dy, mask)
    y = layer(on[0], residual=on[1], mask=on[3])
    dx, dresidual = layer.backward(on[2])
    options = {"axis": -1, "residual": on[1], "mask": on[3], "activation": "relu"}
    if frozen:
        running = layer.running_mean, layer.running_var
        want = bn.batch_norm_inference(on[0], layer.gamma, layer.beta, *running, **options)
        gradients = bn.batch_norm_inference_backward(on[2], on[0], layer.gamma, layer.beta, *running, **options)
    else:
        want, statistics = bn.batch_norm_forward(on[0], layer.gamma, layer.beta, **options)
        gradients = bn.batch_norm_backward(on[2], on[0], layer.gamma, layer.beta, statistics, **options)
    got = y, dx, layer.gradients["weight"], layer.gradients["bias"], dresidual
    for one, other in zip(got, (want, *gradients), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))


def test_groups_have_statistics_of_their_own(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 4, 6, 3))
    layer = nn.BatchNorm(3, groups=4, dtype="float64", xp=backend.xp)
    assert_close(backend, layer(backend.asarray(x)), normalised(x, (1,), 1e-5))
    assert layer.running_mean.shape == (4, 3)
    assert_close(backend, layer.running_mean, 0.1 * x.mean(1))
    assert_close(backend, layer.statistics.var, x.var(1), 1e-9)
    assert_close(backend, layer.statistics.mean, x.mean(1))
    assert_gradients(backend, layer, x, dy)
    with pytest.raises(ValueError, match=r"x must have 4 groups in its first axis, got the shape \(6, 3\)"):
        layer(backend.asarray(x[0]))


def test_groups_of_given_arrays(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 5, 3))
    mean, var = running = backend.arrays(np.zeros((2, 3)), np.ones((2, 3)))
    for first in ((None, None), backend.arrays(np.ones((1, 3)), np.zeros((1, 3)))):
        layer = nn.BatchNorm.from_arrays(*first, *running, groups=2, momentum=1.0, unbiased=False)
        assert_close(backend, layer(backend.asarray(x)), normalised(x, (1,), 1e-5))
        assert_close(backend, mean, x.mean(1))
        assert_close(backend, var, x.var(1))


@pytest.mark.parametrize("layer", ["Linear", "BatchNorm", "LayerNorm", "LinearBatchNorm", "ReLU"])
def test_an_empty_batch_is_one(backend: Backend, layer: str) -> None:
    sizes = {"Linear": (3, 2), "LinearBatchNorm": (3, 2), "ReLU": ()}.get(layer, (3,))
    one = getattr(nn, layer)(*sizes).to(backend.xp)
    x = backend.asarray(np.zeros((0, 3), "f4"))
    y = one(x)
    assert y.shape == (0, 2 if layer.startswith("Linear") else 3)
    assert one.backward(y).shape == (0, 3)
    assert not any(backend.asnumpy(array).any() for array in one.gradients.values())


def test_renorm_takes_its_limits_from_the_layer(backend: Backend, rng: np.random.Generator) -> None:
    x = 2 * rng.standard_normal((8, 2)) + 1
    layer = nn.BatchNorm(2, renorm=(1.5, 0.5), dtype="float64", xp=backend.xp)
    y = backend.asnumpy(layer(backend.asarray(x)))
    deviation = np.sqrt(x.var(0) + 1e-5)
    r, d = np.clip(deviation / np.sqrt(1 + 1e-5), 1 / 1.5, 1.5), np.clip(x.mean(0) / np.sqrt(1 + 1e-5), -0.5, 0.5)
    np.testing.assert_allclose(y, (x - x.mean(0)) / deviation * r + d, rtol=1e-12)
    assert layer.backward(backend.asarray(x)).shape == x.shape
    layer.renorm = (1.0, 0.0)  # as in the first steps of its paper's schedule
    assert_close(backend, layer(backend.asarray(x)), (x - x.mean(0)) / deviation)


def test_a_single_value_is_refused_or_left_out(backend: Backend) -> None:
    x = backend.asarray(np.array([[[3.0], [5.0]]]))
    layer = nn.BatchNorm(2, dtype="float64", xp=backend.xp)
    with pytest.raises(ValueError, match="one value per channel has no variance"):
        layer(x)
    layer = nn.BatchNorm(2, allow_single=True, dtype="float64", xp=backend.xp)
    layer.bias[...] = backend.asarray(np.float64([1, 2]))
    assert_close(backend, layer(x), np.array([[[1.0], [2.0]]]))
    assert_close(backend, layer.backward(x), np.zeros((1, 2, 1)))
    assert_close(backend, layer.running_var, np.ones(2))
    assert_close(backend, layer.running_mean, np.zeros(2))
    assert layer.batches == 0


@pytest.mark.parametrize("options", [{"affine": False}, {"affine": False, "track_running_stats": False}])
def test_a_norm_without_parameters(backend: Backend, rng: np.random.Generator, options: dict[str, Any]) -> None:
    x, dy = rng.standard_normal((2, 6, 3))
    layer = nn.BatchNorm(3, dtype="float64", xp=backend.xp, **options)
    assert_close(backend, layer(backend.asarray(x)), normalised(x, (0,), 1e-5))
    assert (layer.weight, dict(layer.gradients), layer.parameter_count) == (None, {}, 0)
    assert_gradients(backend, layer, x, dy)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (3, 1)])
def test_arrays_with_axes_of_length_1_are_taken_as_views(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    gamma, beta, mean, var = arrays = backend.arrays(*(np.full(shape, n) for n in (2.0, 1.0, 0.0, 1.0)))
    layer = nn.BatchNorm.from_arrays(*arrays, momentum=1.0, unbiased=False)
    x = rng.standard_normal((5, 3))
    assert_close(backend, layer(backend.asarray(x)), 2 * normalised(x, (0,), 1e-5) + 1)
    assert_close(backend, mean, x.mean(0).reshape(shape))
    assert_close(backend, var, x.var(0).reshape(shape))
    gamma[...] = backend.asarray(np.zeros(shape))
    assert_close(backend, layer(backend.asarray(x)), np.ones((5, 3)))
    assert beta.shape == shape


@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 3), (3, 2, 2, 2)])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_layer_norm_is_its_formulas_over_trailing_axes(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axes: int
) -> None:
    axes = min(axes, len(shape) - 1)
    x, dy = rng.standard_normal((2, *shape))
    layer = nn.LayerNorm(shape[-axes:], activation="silu", dtype="float64", xp=backend.xp)
    weight, bias = rng.standard_normal((2, *shape[-axes:]))
    layer.weight[...], layer.bias[...] = backend.arrays(weight, bias)
    z = weight * normalised(x, tuple(range(-axes, 0)), 1e-5) + bias
    assert_close(backend, layer(backend.asarray(x)), z / (1 + np.exp(-z)))
    assert_gradients(backend, layer, x, dy)
    assert layer.statistics.mean.size == x.size // np.prod(shape[-axes:])


def test_layer_norm_refuses_what_it_would_have_to_copy(backend: Backend, rng: np.random.Generator) -> None:
    layer = nn.LayerNorm((2, 3), dtype="float64", xp=backend.xp)
    x = backend.asarray(rng.standard_normal((4, 2, 3)))
    turned = backend.asarray(rng.standard_normal((4, 3, 2))).transpose(0, 2, 1)
    with pytest.raises(ValueError, match="x must be contiguous in C order"):
        layer(turned)
    layer(x)
    with pytest.raises(ValueError, match="dy must be contiguous in C order"):
        layer.backward(turned)


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3), (3,)])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_its_formulas(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], activation: str, bias: bool
) -> None:
    if len(shape) == 1 and activation != "identity":
        shape = (1, *shape)
    x, dy = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], 5))
    layer = nn.Linear(3, 5, bias=bias, activation=activation, seed=3, dtype="float64", xp=backend.xp)
    z = x @ backend.asnumpy(layer.weight)
    if bias:
        layer.bias[...] = backend.asarray(np.arange(5.0))
        z = z + np.arange(5.0)
    want = {"identity": z, "relu": np.maximum(z, 0)}
    y = layer(backend.asarray(x))
    if activation in want:
        assert_close(backend, y, want[activation])
    assert_gradients(backend, layer, x, dy)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_the_ops(backend: Backend, rng: np.random.Generator, name: str) -> None:
    x, dy = rng.standard_normal((2, 3, 4, 2))
    layer = nn.Activation(name)
    on = backend.asarray(x)
    y = backend.asnumpy(layer(on))
    mean, var = backend.arrays(np.zeros(2), np.ones(2))
    want = bn.batch_norm_inference(on, None, None, mean, var, eps=1e-300, axis=-1, activation=name)
    np.testing.assert_allclose(y, backend.asnumpy(want), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(backend.asnumpy(on), x)
    assert_gradients(backend, layer, x, dy)
    dy_on = backend.asarray(dy)
    layer.backward(dy_on)
    np.testing.assert_array_equal(backend.asnumpy(dy_on), dy)


def test_activations_take_arrays_of_any_shape_and_strides(backend: Backend, rng: np.random.Generator) -> None:
    for x in (np.array(2.0), rng.standard_normal(5), backend.like(rng.standard_normal((4, 6)).T[::2])):
        layer, on = nn.Tanh(), backend.asarray(x) if x.ndim < 2 else x
        assert_close(backend, layer(on), np.tanh(backend.asnumpy(x)))
        dx = layer.backward(on)
        assert dx.shape == x.shape
        assert_close(backend, dx, backend.asnumpy(x) * (1 - np.tanh(backend.asnumpy(x)) ** 2))


def test_flatten_makes_rows(backend: Backend, rng: np.random.Generator) -> None:
    layer, x = nn.Flatten(), rng.standard_normal((3, 2, 4, 5))
    for given in (backend.asarray(x), backend.like(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        y = layer(given)
        np.testing.assert_array_equal(backend.asnumpy(y), x.reshape(3, 40))
        np.testing.assert_array_equal(backend.asnumpy(layer.backward(y)), x)
    assert layer(backend.asarray(x[:0])).shape == (0, 40)
    assert layer.backward(backend.asarray(np.zeros((0, 40)))).shape == (0, 2, 4, 5)
    with pytest.raises(ValueError, match=r"dy must .*\(0, 40\)"):
        layer.backward(backend.asarray(x[:0]))
    with pytest.raises(ValueError, match="x must have a batch in its first axis"):
        layer(backend.asarray(np.zeros(())))


def test_activations_have_the_names_that_users_expect() -> None:
    layers = [nn.Identity(), nn.ReLU(), nn.LeakyReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.GELU("tanh")]
    layers += [nn.SiLU(), nn.ELU()]
    assert {layer.activation for layer in layers} == set(ACTIVATIONS)
    assert [repr(layer) for layer in layers[:3]] == ["Identity()", "ReLU()", "LeakyReLU(alpha=0.01)"]
    assert (repr(nn.GELU("tanh")), repr(nn.Activation("elu", 2.0))) == (
        "GELU(approximate='tanh')",
        "Activation('elu', alpha=2.0)",
    )


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("training", [True, False])
def test_linear_batch_norm_is_two_layers(backend: Backend, rng: np.random.Generator, norm: str, training: bool) -> None:
    x, dy = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    options: dict[str, Any] = {"dtype": "float64", "xp": backend.xp}
    both = nn.LinearBatchNorm(4, 3, norm=norm, activation="tanh", momentum=None, seed=5, **options)
    linear = nn.Linear(4, 3, bias=False, seed=5, **options)
    second = {"batch": nn.BatchNorm, "layer": nn.LayerNorm}[norm](3, activation="tanh", **options)
    if norm == "batch":
        second.momentum = None
    two = nn.Sequential(linear, second)
    for step in range(2):
        for model in (both, two):
            model.train(training or step == 0)
        got, want = (model(backend.asarray(x + step)) for model in (both, two))
        assert_close(backend, got, backend.asnumpy(want))
        dxs = [model.backward(backend.asarray(dy), accumulate=step == 1) for model in (both, two)]
        assert_close(backend, dxs[0], backend.asnumpy(dxs[1]))
        for one, other in zip(both.gradients.values(), two.gradients.values(), strict=True):
            assert_close(backend, one, backend.asnumpy(other))
    for one, other in zip(both.state_dict().values(), two.state_dict().values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_layer_norm_works_on_16_bit_parameters_that_there_are(
    backend: Backend, rng: np.random.Generator, dtype: str
) -> None:
    data = dtype_named(dtype)
    x, dy, *vectors = backend.arrays(
        *(rng.standard_normal((6, 5)).astype(data) for _ in range(2)), *(np.ones(5, data) for _ in range(2))
    )
    layer = nn.LayerNorm.from_arrays(*vectors)
    layer.train()(x)
    layer.backward(dy)
    assert layer.weight is vectors[0]
    assert layer.gradients["bias"].dtype == data
    want = backend.asnumpy(dy).astype(float).sum(0)
    np.testing.assert_allclose(backend.asnumpy(layer.gradients["bias"]).astype(float), want, rtol=2**-7, atol=1e-6)
    with pytest.raises(TypeError, match=f"x must be {dtype} for this LayerNorm, got float32"):
        layer(x.astype("float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_16_bit_layers_keep_float32_parameters(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    shared: dict[str, Any] = {"dtype": dtype, "xp": backend.xp}
    model = nn.Sequential(nn.Linear(4, 6, seed=0, **shared), nn.BatchNorm(6, **shared), nn.LayerNorm(6, **shared))
    x = rng.standard_normal((8, 4)).astype(np.dtype(dtype))
    y = model(backend.asarray(x))
    assert (y.dtype, model[0].weight.dtype) == (x.dtype, x.dtype)
    assert {model[0].bias.dtype, model[1].weight.dtype, model[2].weight.dtype} == {np.dtype("float32")}
    assert model.backward(y).dtype == x.dtype
    wide = np.float64(x) @ np.float64(backend.asnumpy(model[0].weight))
    want = normalised(normalised(wide, (0,), 1e-5), (1,), 1e-5)
    error = np.abs(np.float64(backend.asnumpy(y)) - want).max()
    assert error <= {"float16": 0.02, "bfloat16": 0.15, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_linear_batch_norm_multiplies_with_the_precision_asked_for(
    backend: Backend, rng: np.random.Generator, norm: str
) -> None:
    x, dy = backend.arrays(*(rng.standard_normal((9, length)).astype("float32") for length in (300, 8)))
    found = {}
    for precision in ("tf32x3", None):
        layer = nn.LinearBatchNorm(300, 8, norm=norm, precision=precision, seed=2, xp=backend.xp)
        own = layer.linear.weight, layer.norm.weight, layer.norm.bias
        options = {"norm": norm, "precision": precision}
        y, z, statistics = bn.linear_batch_norm_forward(x, *own, **options)
        dx, dweight, *_ = bn.linear_batch_norm_backward(dy, x, *own, z, statistics, **options)
        got = layer(x), layer.backward(dy), layer.gradients["linear.weight"]
        for array, want in zip(got, (y, dx, dweight), strict=True):
            np.testing.assert_array_equal(backend.asnumpy(array), backend.asnumpy(want))
        found[precision] = backend.asnumpy(y)
        assert ("precision='tf32x3'" in repr(layer)) == (precision is not None)
    if not backend.is_numpy:  # a library multiplies in float32
        assert (found["tf32x3"] != found[None]).any()
    with pytest.raises(ValueError, match="precision must be"):
        nn.LinearBatchNorm(3, 2, precision="tf32")
