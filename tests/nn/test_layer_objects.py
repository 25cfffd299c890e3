"""Layers as objects: copied, pickled, moved, converted, shown, trained by optimisers, on other libraries' arrays."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import nn
from bnkernels.runtime.registry import DeviceError, why_no_cuda
from tests.nn.common import network, trained
from tests.train.test_captured_step import cupy
from tools.backends import Backend, make

__all__ = ["cupy"]  # the fixture


@pytest.mark.parametrize("kind", ["layers", "mlp"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(backend: Backend, kind: str, way: str) -> None:
    """TypeError: cannot pickle 'module' object."""
    if way == "pickle" and backend.name == "emulator":
        pytest.skip("the emulator's arrays stay in their process")
    model = network(backend) if kind == "layers" else bn.MLP((4, 5, 2), dtype="float64", xp=backend.xp)
    trained(backend, model)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    before = other.state_dict()
    np.testing.assert_array_equal(trained(backend, model), trained(backend, other))
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array, err_msg=name)
    assert any((before[name] != array).any() for name, array in other.state_dict().items())
    assert type(other) is type(model)


def test_a_copy_keeps_nothing_of_a_forward() -> None:
    layer = nn.BatchNorm(2)
    y = layer(np.ones((3, 2), "float32"))
    with pytest.raises(RuntimeError, match="call this BatchNorm before it"):
        copy.deepcopy(layer).backward(y)
    layer.backward(y)


def test_layers_move_between_devices_and_data_types(backend: Backend) -> None:
    model = network(make("numpy"))
    x = np.random.default_rng(0).standard_normal((7, 4))
    want = model(x, training=False)
    assert model.to(backend.xp) is model
    assert {type(array) for array in model.parameters.values()} == {type(backend.asarray(x))}
    np.testing.assert_allclose(backend.asnumpy(model(backend.asarray(x), training=False)), want, rtol=1e-10, atol=1e-12)
    assert model.astype(np.float32).parameters["0.linear.weight"].dtype == np.float32
    single = backend.asnumpy(model(backend.asarray(x.astype("f4")), training=False))
    np.testing.assert_allclose(single, want, rtol=1e-3, atol=1e-4)
    y = model.to("cpu")(x.astype("f4"))
    assert type(y) is np.ndarray
    model.backward(y)


def test_half_layers_keep_float32_for_norms_and_biases() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm(2), nn.LayerNorm(2)).astype(np.float16)
    dtypes = {name: str(array.dtype) for name, array in (model.parameters | model.gradients).items()}
    assert dtypes == {name: "float16" if name == "0.weight" else "float32" for name in dtypes}


def test_an_mlp_moves_and_converts_too(backend: Backend) -> None:
    model = bn.MLP((4, 5, 2), dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((7, 4))
    want = model(x)
    model.to(backend.xp)
    np.testing.assert_allclose(backend.asnumpy(model.eval().train()(backend.asarray(x))), want, rtol=1e-10, atol=1e-12)
    assert (model.batches, model.to("cpu").astype("f4").parameters.dtype) == (2, np.float32)


@pytest.mark.emulator
def test_layers_on_cupys_arrays(cupy: ModuleType, tmp_path: Path) -> None:
    """Through CuPy's own calls: nothing of an array is read but where it is asked for."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((6, 3)).astype("f4"), rng.standard_normal((6, 2)).astype("f4")
    model = nn.Sequential(nn.Linear(3, 4, seed=1), nn.BatchNorm(4, activation="relu"), nn.Linear(4, 2, seed=2))
    want, want_dx, state = model(x), model.backward(dy), model.state_dict()
    on_device = nn.Sequential(nn.Linear(3, 4, seed=1), nn.BatchNorm(4, activation="relu"), nn.Linear(4, 2, seed=2))
    on_device.to(cupy)
    reads = cupy.driver.reads
    y, dx = on_device(cupy.asarray(x)), on_device.backward(cupy.asarray(dy))
    assert (type(y), cupy.driver.reads) == (cupy.ndarray, reads)
    np.testing.assert_allclose(cupy.asnumpy(y), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cupy.asnumpy(dx), want_dx, rtol=1e-5, atol=1e-6)
    for name, array in on_device.state_dict().items():
        np.testing.assert_allclose(array, state[name], rtol=1e-5, atol=1e-7)
    on_device.load_state_dict({name: cupy.asarray(np.asarray(array)) for name, array in state.items()})
    nn.save(tmp_path / "model.npz", {name: cupy.asarray(np.asarray(array)) for name, array in state.items()})
    for name, array in nn.load(tmp_path / "model.npz").items():
        np.testing.assert_array_equal(array, state[name])
    with pytest.raises(TypeError, match=r"x is a numpy.ndarray, but weight of this Linear is a cupy.*move x, or"):
        on_device(x)
    assert type(on_device.to("cpu")(x)) is np.ndarray


def test_a_device_that_is_none() -> None:
    layer = nn.BatchNorm(2)
    with pytest.raises(ValueError, match="device must be one of cpu, cuda; got 'gpu'"):
        layer.to("gpu")
    with pytest.raises(TypeError, match="device must be 'cpu', 'cuda', or an array module, got 3"):
        layer.to(3)
    if why_no_cuda():
        with pytest.raises(DeviceError, match="device cuda is not usable"):
            layer.to("cuda")


@pytest.mark.parametrize("dtype", [np.float64, np.dtype("f8"), "float64", float, "d"])
def test_a_data_type_is_what_numpy_takes_for_one(dtype: Any) -> None:
    for layer in (nn.BatchNorm(3, dtype=dtype), nn.LayerNorm(3, dtype=dtype), nn.Linear(3, 2, dtype=dtype)):
        assert {array.dtype for array in layer.parameters.values()} == {np.dtype("float64")}
    for bad in (int, "complex64", None, "spam"):
        with pytest.raises(ValueError, match="dtype must be float16, bfloat16, float32 or float64, got"):
            nn.Linear(3, 2, dtype=bad)


def test_decay_is_the_other_side_of_momentum() -> None:
    assert (nn.BatchNorm(2, decay=0.9).momentum, nn.BatchNorm(2).decay) == (1 - 0.9, 0.9)
    for momentum in (0.1, None):
        with pytest.raises(TypeError, match="momentum and decay are the same number seen from two sides; pass one"):
            nn.BatchNorm(2, momentum=momentum, decay=0.9)
    with pytest.raises(ValueError, match="decay must be between 0 and 1"):
        nn.BatchNorm(2, decay=1.5)
    assert "decay=0.9" in repr(nn.BatchNorm(2, decay=0.9))
    assert "momentum=0.1" in repr(nn.BatchNorm(2))
    layer = nn.BatchNorm(2, decay=0.9)
    layer.momentum = 0.5
    assert "momentum=0.5" in repr(layer)


def test_a_repr_makes_such_a_layer() -> None:
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False, input_gradient=False, dtype="float64"),
        nn.BatchNorm(5, axis=-1, decay=0.99, unbiased=False, activation="elu", alpha=0.5, dtype="float64"),
        nn.Residual(nn.Linear(5, 5), nn.LayerNorm((5,), eps=1e-3), nn.GELU()),
        nn.LinearBatchNorm(5, 3, norm="layer", activation="relu"),
    )
    text = repr(model)
    again = eval(text, vars(nn))
    assert repr(again) == text
    assert "weight (4, 5): 20 parameters" in text
    assert f"Sequential(  # {model.parameter_count:,} parameters" in text
    html = model._repr_html_()
    assert html.count("<tr>") == 8
    assert "<td>2.0</td>" in html
    assert f"<th>{model.parameter_count:,}</th>" in html
    assert "linear.weight (5, 3)" in html
    mlp = bn.MLP((4, 5, 2))
    assert "42 parameters" in repr(mlp)
    assert "<th>42</th>" in mlp._repr_html_()


def test_parameters_are_named_and_the_layers_own() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm(3)))
    assert list(model.parameters) == list(model.gradients) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert list(model.buffers) == ["1.0.running_mean", "1.0.running_var"]
    assert model.parameters["1.0.weight"] is model[1][0].weight is model[1][0].gamma
    with pytest.raises(TypeError):
        model.parameters["0.weight"] = None
    assert (len(model), [type(layer).__name__ for layer in model]) == (2, ["Linear", "Sequential"])


def test_flat_arrays_are_those_of_the_layers(backend: Backend, rng: np.random.Generator) -> None:
    model = network(backend)
    x, dy = backend.arrays(rng.standard_normal((7, 4)), rng.standard_normal((7, 2)))
    model(x)
    model.backward(dy)
    before = {name: backend.asnumpy(array).copy() for name, array in model.gradients.items()}
    state = model.state_dict()
    parameters, gradients = model.flatten()
    assert model.flatten()[0] is parameters
    for name, array in model.gradients.items():
        np.testing.assert_array_equal(backend.asnumpy(array), before[name])
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    gradients[...] = 0
    model(x)
    model.backward(dy)
    total = sum(np.abs(array).sum() for array in before.values())
    np.testing.assert_allclose(np.abs(backend.asnumpy(gradients)).sum(), total, rtol=1e-12)
    copied = copy.deepcopy(model)
    parameters[...] = 0
    assert not any(backend.asnumpy(array).any() for array in model.parameters.values())
    assert backend.asnumpy(copied.parameters["0.linear.weight"]).any()
    with pytest.raises(ValueError, match="parameters must have one data type to lie in one array, got float16, float3"):
        nn.Linear(2, 2, dtype="float16").flatten()


def test_flat_arrays_know_of_layers_that_were_added() -> None:
    inner = nn.Sequential(nn.Linear(3, 3))
    model = nn.Sequential(inner)
    size = model.flatten()[0].size
    inner.append(nn.BatchNorm(20))
    assert model.flatten()[0].size > size
    assert model.parameters["0.1.weight"].base is model.flatten()[0]


@pytest.mark.parametrize("optimizer", [nn.SGD, nn.Momentum, nn.RMSProp, nn.Adam])
def test_layers_learn(backend: Backend, optimizer: type) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 8)).astype("float32")
    labels = backend.asarray((x[:, 0] > 0).astype("int64") + (x[:, 1] > 0.5))
    x = backend.asarray(x)
    hidden = nn.Linear(8, 20, bias=False, seed=1, xp=backend.xp), nn.BatchNorm(20, xp=backend.xp), nn.ReLU()
    model = nn.Sequential(*hidden, nn.Linear(20, 3, seed=2, xp=backend.xp))
    optimiser, losses = optimizer(model, lr=0.5 if optimizer is nn.SGD else 0.05), []
    for _ in range(25):
        loss, dlogits = bn.softmax_cross_entropy(model(x), labels)
        model.backward(dlogits)
        optimiser.step()
        losses.append(float(backend.asnumpy(loss).mean()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 2)), bn.MLP((4, 2))])
def test_an_optimiser_notices_that_the_arrays_are_others(model: Any) -> None:
    """It went on with the old ones, and the model learnt nothing."""
    optimiser = nn.SGD(model, lr=0.1)
    optimiser.step()
    model.astype("float64")
    with pytest.raises(RuntimeError, match="the model has other arrays by now; make the optimiser after"):
        optimiser.step()
    assert optimiser.steps == 1
    nn.SGD(model, lr=0.1).step()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("most", [2.5, 5.0, 1e4])
def test_gradients_are_clipped_by_the_norm_of_all(backend: Backend, dtype: str, most: float) -> None:
    layers = nn.Linear(2, 1, bias=False, dtype=dtype, xp=backend.xp), nn.Linear(1, 1, dtype=dtype, xp=backend.xp)
    model = nn.Sequential(*layers)
    given = {"0.weight": [[3.0], [0.0]], "1.weight": [[0.0]], "1.bias": [4.0]}
    for name, values in given.items():
        model.gradients[name][...] = backend.asarray(np.array(values, dtype))
    norm = nn.clip_gradients(model, most)
    assert isinstance(norm, np.generic if backend.is_numpy else type(model.flatten()[0]))
    assert (norm.shape, norm.dtype, float(norm)) == ((), "float64", 5)
    for name, values in given.items():
        wanted = np.array(values) * min(1, most / 5)
        np.testing.assert_allclose(backend.asnumpy(model.gradients[name]), wanted, rtol=2 * np.finfo(dtype).eps)


def test_no_gradients_and_gradients_that_are_not_finite_are_clipped_without_a_warning() -> None:
    layer = nn.Linear(2, 1)
    assert nn.clip_gradients(layer, 1) == 0
    layer.gradients["weight"][...] = [[1e30], [0]]  # its square is beyond float32
    assert float(nn.clip_gradients(layer, 1)) == pytest.approx(1e30)
    assert layer.gradients["weight"][0, 0] == pytest.approx(1)
    layer.gradients["weight"][...] = [[np.inf], [1]]
    assert nn.clip_gradients(layer, 1) == np.inf
    assert np.isnan(layer.gradients["weight"][0, 0])
    for wrong, error in ((0, ValueError), (-1, ValueError), (np.inf, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="most must be"):
            nn.clip_gradients(layer, wrong)


def test_arrays_of_other_libraries_come_in_by_dlpack(torch: ModuleType) -> None:
    """Anything with ``__dlpack__`` is taken without a copy."""
    x = torch.randn(5, 3)
    for layer in (nn.BatchNorm(3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Sequential(nn.ReLU()), nn.Residual(nn.Tanh())):
        y = layer(x)
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(y, layer(x.numpy()))
        assert type(layer.backward(torch.from_numpy(y))) is np.ndarray
    layer = nn.ReLU()
    layer(x)
    assert np.shares_memory(layer._saved[0], x.numpy())
    layer = nn.BatchNorm(3)
    layer(x, residual=torch.ones(5, 3), mask=torch.tensor([True] * 5))
    assert len(layer.backward(x)) == 2


def test_no_layer_warns_of_values(backend: Backend) -> None:
    """NumPy's sums and products do; kernels do not."""
    model = nn.Sequential(nn.Residual(nn.Linear(2, 2, dtype="float64", xp=backend.xp)), nn.Activation("elu"))
    x = backend.asarray(np.array([[np.inf, -np.inf], [1e308, 1e308], [np.nan, -1e308]]))
    y = model(x)
    model.backward(y, accumulate=True)
    assert np.isnan(backend.asnumpy(y)).any()


def test_parameters_of_other_libraries_are_worked_on(torch: ModuleType) -> None:
    weight, bias, mean, var = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)
    layer = nn.BatchNorm.from_arrays(weight, bias, mean, var, momentum=1.0)
    x = torch.arange(12, dtype=torch.float32).reshape(4, 3) ** 2
    layer(x)
    np.testing.assert_allclose(mean.numpy(), x.mean(0).numpy())
    matrix = torch.eye(3)
    linear = nn.Linear.from_arrays(matrix, bias.reshape(1, 3))
    matrix *= 2
    np.testing.assert_array_equal(linear(x), 2 * x.numpy())
    scale = torch.ones(3)
    norm = nn.LayerNorm.from_arrays(scale, gradients={"weight": torch.zeros(3)})
    assert np.shares_memory(norm.weight, scale.numpy())


def test_statistics_by_name(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 4)) * 3 + 1
    _, statistics = bn.batch_norm_forward(backend.asarray(x), eps=0.5)
    named = nn.Statistics(statistics, eps=0.5)
    np.testing.assert_allclose(backend.asnumpy(named.mean), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(backend.asnumpy(named.var), x.var(0), rtol=1e-12)
    np.testing.assert_allclose(backend.asnumpy(named.rstd), 1 / np.sqrt(x.var(0) + 0.5), rtol=1e-12)
    assert np.shares_memory(named.mean, statistics)
    assert named.array is statistics
    mean, var, rstd = named
    assert (mean.shape, var.shape, rstd.shape, named.mean_low.shape) == ((4,),) * 4
    with pytest.raises(
        ValueError, match=r"array must have 3 or 5 rows, the mean first, or 1 of rstd, got the shape \(4, 2\)"
    ):
        nn.Statistics(np.zeros((4, 2)))
    with pytest.raises(RuntimeError, match="call this BatchNorm in training"):
        _ = nn.BatchNorm(2).statistics


def test_the_smallest_eps_is_that_of_the_arrays() -> None:
    """Arrays of float64 allow a smaller one than the default data type of a layer."""
    smallest, ones = float(np.finfo("float64").tiny), np.ones(3)
    for layer in (nn.BatchNorm.from_arrays(ones, eps=smallest), nn.LayerNorm.from_arrays(ones, eps=smallest)):
        assert layer.eps == smallest
        with pytest.raises(ValueError, match=r"eps must be at least 1\.175e-38"):
            type(layer).from_arrays(ones.astype("float32"), eps=smallest)
