"""States in PyTorch's names and layout: loaded from its modules and back, in files, and of other frameworks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import nn
from tests.nn.common import network, trained
from tests.regress.refusal import refused
from tools.backends import Backend, make

SUFFIXES = ["npz", "safetensors"]


def modules(torch: ModuleType, kind: str, dtype: Any) -> tuple[Any, tuple[int, ...]]:
    """Return a module of PyTorch's whose running statistics are not those of the start, and the shape of its input."""
    of = torch.nn
    torch.manual_seed(0)
    made, shape = {
        "mlp": (
            [of.Linear(6, 5), of.BatchNorm1d(5), of.ReLU(), of.Linear(5, 5, bias=False), of.LayerNorm(5), of.GELU()],
            (7, 6),
        ),
        "activations": (
            [of.Linear(6, 4), of.LeakyReLU(0.2), of.Sigmoid(), of.Tanh(), of.GELU("tanh"), of.SiLU(), of.ELU(0.5)],
            (7, 6),
        ),
        "images": (
            [of.BatchNorm2d(3, momentum=None), of.Identity(), of.LayerNorm((3, 4, 2), eps=1e-3), of.BatchNorm2d(3)],
            (5, 3, 4, 2),
        ),
        "sequences": (
            [of.BatchNorm1d(3, affine=False), of.LayerNorm(4, elementwise_affine=False), of.LayerNorm(4, bias=False)],
            (5, 3, 4),
        ),
        "norms": (
            [
                of.RMSNorm(4),
                of.GroupNorm(2, 6),
                of.InstanceNorm1d(6),
                of.InstanceNorm1d(6, affine=True),
                of.RMSNorm((6, 4)),
            ],
            (5, 6, 4),
        ),
        "norms of images": ([of.GroupNorm(3, 6, affine=False), of.InstanceNorm2d(6, eps=1e-3)], (5, 6, 4, 3)),
        "volumes": ([of.BatchNorm3d(2, track_running_stats=False), of.Sequential(of.Tanh())], (3, 2, 2, 3, 2)),
    }[kind]
    model = of.Sequential(*made).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for _ in range(3):
            model(torch.randn(*shape, dtype=dtype) + 1)
    return model, shape


KINDS = ["mlp", "activations", "images", "sequences", "norms", "norms of images", "volumes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_pytorch_sequential_loads_exactly_and_back(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, kind: str, training: bool
) -> None:
    theirs, shape = modules(torch, kind, torch.float64)
    theirs.train(training)
    ours = nn.from_torch(theirs, xp=backend.xp)
    assert ours.training is training
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    for name, array in theirs.state_dict().items():
        assert (state[name].shape, state[name].dtype) == (tuple(array.shape), array.numpy().dtype), name
        np.testing.assert_array_equal(state[name], array.numpy(), err_msg=name)

    x = rng.standard_normal(shape)
    leaf = torch.from_numpy(x).requires_grad_()
    want = theirs(leaf)
    dy = rng.standard_normal(tuple(want.shape))
    want.backward(torch.from_numpy(dy))
    got = ours(backend.asarray(x))
    np.testing.assert_allclose(backend.asnumpy(got), want.detach().numpy(), rtol=1e-9, atol=1e-10)
    dx = ours.backward(backend.asarray(dy))
    np.testing.assert_allclose(backend.asnumpy(dx), leaf.grad.numpy(), rtol=1e-9, atol=1e-10)
    for name, parameter in theirs.named_parameters():
        gradient = backend.asnumpy(ours.gradients[name])
        if isinstance(theirs[int(name.split(".")[0])], torch.nn.Linear) and gradient.ndim == 2:
            gradient = gradient.T
        np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=1e-8, atol=1e-9, err_msg=name)

    other, _ = modules(torch, kind, torch.float64)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    for name, array in theirs.state_dict().items():
        np.testing.assert_allclose(other.state_dict()[name].numpy(), array.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_16_bit_modules_keep_their_numbers(torch: ModuleType, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(getattr(torch, dtype))
    ours = nn.from_torch(theirs)
    assert str(ours[0].weight.dtype) == dtype
    for name, array in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name].astype("f8"), array.double().numpy(), err_msg=name)


def test_other_modules_are_refused(torch: ModuleType) -> None:
    class Linear(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return -x

    for module in (torch.nn.Conv2d(1, 1, 1), torch.nn.Sequential(torch.nn.Dropout()), Linear(2, 2), "Linear", None):
        with pytest.raises(TypeError, match=r"module must be one of torch.nn's Sequential, Linear, .*, got a .*"):
            nn.from_torch(module)


def test_images_are_flattened_as_in_pytorch(torch: ModuleType, rng: np.random.Generator) -> None:
    theirs, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).double(), rng.standard_normal((5, 3, 4))
    want = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(nn.from_torch(theirs)(x), want, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match=r"must be a Flatten\(\) of all axes but the first, got Flatten\(start_dim=0"):
        nn.from_torch(torch.nn.Flatten(0))


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_a_state_of_pytorch_is_that_of_an_mlp(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, norm: str, activation: str
) -> None:
    """The weights of PyTorch are transposed, and its activations count as modules."""
    layers: list[Any] = []
    for inputs, outputs in ((6, 5), (5, 4)):
        layers.append(torch.nn.Linear(inputs, outputs, bias=norm == "none"))
        if norm != "none":
            layers.append({"batch": torch.nn.BatchNorm1d, "layer": torch.nn.LayerNorm}[norm](outputs))
        layers += [torch.nn.ReLU()] if activation == "relu" else []
    theirs = torch.nn.Sequential(*layers, torch.nn.Linear(4, 3)).double()
    model = bn.MLP((6, 5, 4, 3), norm=norm, activation=activation, dtype="float64", xp=backend.xp)
    for _ in range(2):
        theirs(torch.randn(8, 6).double())
    model.load_state_dict(theirs.state_dict())
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert model.batches == (2 if norm == "batch" else 0)
    x = rng.standard_normal((5, 6))
    want = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(backend.asnumpy(model.eval()(backend.asarray(x))), want, rtol=1e-10, atol=1e-12)
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_state_goes_through_a_file(backend: Backend, tmp_path: Path, suffix: str) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    model, other = network(backend), network(backend)
    trained(backend, model)
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"replaced")
    nn.save(path, model)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    other.load_state_dict(nn.load(str(path)))
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array, err_msg=name)
    assert other[0].norm.batches == 3
    np.testing.assert_array_equal(trained(backend, other), trained(backend, model))
    mlp = bn.MLP((4, 5, 2), xp=backend.xp)
    nn.save(path, mlp)
    assert nn.load(path).keys() == mlp.state_dict().keys()


def test_safetensors_are_those_of_pytorch(torch: ModuleType, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, _ = modules(torch, "mlp", torch.float32)
    safetensors.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours = nn.from_torch(modules(torch, "mlp", torch.float32)[0])
    ours.load_state_dict(nn.load(tmp_path / "theirs.safetensors"))
    nn.save(tmp_path / "ours.safetensors", ours)
    for name, array in safetensors.load_file(tmp_path / "ours.safetensors").items():
        assert torch.equal(array, theirs.state_dict()[name]), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_16_bits_in_files(tmp_path: Path, suffix: str) -> None:
    """NumPy names no bfloat16: it would come back as two bytes of nothing."""
    pytest.importorskip("ml_dtypes")
    layer = nn.Linear(3, 2, dtype="bfloat16", seed=1)
    if suffix == "npz":
        with pytest.raises(TypeError, match=r"weight is bfloat16, which an \.npz does not name; save it as \.safetens"):
            nn.save(tmp_path / "layer.npz", layer)
        assert not list(tmp_path.iterdir())
        return
    pytest.importorskip("safetensors")
    nn.save(tmp_path / "layer.safetensors", layer)
    np.testing.assert_array_equal(nn.load(tmp_path / "layer.safetensors")["weight"], layer.state_dict()["weight"])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.npz, got 'model.pt'"):
        nn.save(tmp_path / "model.pt", {})
    with pytest.raises(TypeError, match="state must be a dict of arrays by name, or a layer, got 3"):
        nn.save(tmp_path / "model.npz", 3)
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ValueError, match=r"array.npz is no \.npz of several arrays"):
        nn.load(tmp_path / "array.npz")
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "nothing.npz")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"install bnkernels\[safetensors\], or save as \.npz"):
        nn.save(tmp_path / "model.safetensors", {})


def test_a_state_that_does_not_fit_changes_nothing(backend: Backend) -> None:
    model = network(backend)
    good, arrays = model.state_dict(), [*model.parameters.values(), *model.buffers.values()]
    short = {name: array for name, array in good.items() if name != "3.weight"}
    for state, error, message in (
        (
            short,
            ValueError,
            r"of another layer: missing \['3.weight'\], unknown \[\]; strict=False takes what",
        ),
        (good | {"9.bias": 1}, ValueError, r"missing \[\], unknown \['9.bias'\]"),
        (good | {"5.weight": good["5.weight"].T}, ValueError, r"the state's 5.weight must have the shape \(2, 5\)"),
        (good | {"5.bias": np.array(["a", "b"])}, TypeError, "the state's 5.bias must hold real numbers"),
        (good | {"0.norm.num_batches_tracked": -1}, ValueError, "num_batches_tracked must be"),
        (good | {"0.norm.num_batches_tracked": 1.5}, TypeError, "num_batches_tracked must be an integer"),
        ([1], TypeError, "the state must be a dict of arrays by name"),
    ):
        with refused(backend, error, message, *arrays):
            model.load_state_dict(state)
    with refused(backend, TypeError, "strict must be True or False", *arrays):
        model.load_state_dict(good, strict=1)
    single = nn.BatchNorm(1, dtype="float32")
    with refused(make("numpy"), ValueError, "holds numbers beyond the range of float32", single.weight):
        single.load_state_dict({"weight": np.array([1e300])}, strict=False)
    model.load_state_dict(short | {"nobody": 1}, strict=False)


def test_states_of_other_shapes_and_kinds_are_taken(backend: Backend) -> None:
    layer = nn.BatchNorm(3, xp=backend.xp)
    vectors = np.arange(12, dtype="float64").reshape(4, 1, 3)
    state: dict[str, Any] = dict(zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))
    state["running_var"] = backend.asarray(state["running_var"])
    layer.load_state_dict(state)
    np.testing.assert_array_equal(np.stack([layer.state_dict()[name] for name in state]), vectors[:, 0])
    assert layer.batches == 0  # older states have no number of mini-batches


# ---- other frameworks: their definitions in a few lines of NumPy -----------------------------------------------------


def keras_step(x: np.ndarray, moving: tuple, momentum: float = 0.99, epsilon: float = 1e-3) -> tuple:
    """Keras 3: channels last, moving averages that keep `momentum` of the old, of the population's variance."""
    mean, variance = x.mean((0, 1)), x.var((0, 1))
    y = (x - mean) / np.sqrt(variance + epsilon)
    return y, [old * momentum + new * (1 - momentum) for old, new in zip(moving, (mean, variance), strict=True)]


def flax_step(x: np.ndarray, stats: tuple) -> tuple:
    """Flax linen: the same with 1e-5; the variance as the mean of squares less the square of the mean."""
    mean = x.mean((0, 1))
    variance = (x * x).mean((0, 1)) - mean * mean
    y = (x - mean) * (1 / np.sqrt(variance + 1e-5))
    return y, [0.99 * old + (1 - 0.99) * new for old, new in zip(stats, (mean, variance), strict=True)]


def onnx_step(x: np.ndarray, running: tuple) -> tuple:
    """ONNX BatchNormalization, version 15, training_mode=1: channels second."""
    mean, variance = x.mean((0, 2)), x.var((0, 2))
    y = (x - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
    return y, [old * 0.9 + new * (1 - 0.9) for old, new in zip(running, (mean, variance), strict=True)]


def chainer_step(x: np.ndarray, average: tuple) -> tuple:
    """Chainer: decay 0.9, eps 2e-5, the running variance unbiased."""
    mean, variance = x.mean((0, 2)), x.var((0, 2))
    count = x.size // x.shape[1]
    y = (x - mean[:, None]) / np.sqrt(variance[:, None] + 2e-5)
    new = mean, variance * count / (count - 1)
    return y, [0.9 * a + (1 - 0.9) * b for a, b in zip(average, new, strict=True)]


STEPS = {"keras": keras_step, "flax": flax_step, "onnx": onnx_step, "chainer": chainer_step}


@pytest.mark.parametrize("framework", STEPS)
def test_a_layer_like_another_frameworks(backend: Backend, rng: np.random.Generator, framework: str) -> None:
    names = nn.CONVENTIONS[framework].names
    scale, shift, mean, var = rng.uniform(0.5, 2, (4, 3))
    arrays = dict(zip(names, (scale, shift, mean, var), strict=True))
    layer = nn.batch_norm_like(framework, 3, arrays=arrays, dtype="float64", xp=backend.xp)
    last = layer.axis == -1
    running = [mean, var]
    for step in range(2):
        x = rng.standard_normal((6, 5, 3) if last else (6, 3, 5)) + step
        y, running = STEPS[framework](x, running)
        along = (3,) if last else (3, 1)
        want = scale.reshape(along) * y + shift.reshape(along)
        np.testing.assert_allclose(backend.asnumpy(layer(backend.asarray(x))), want, rtol=1e-10, atol=1e-11)
    for ours, theirs in zip((layer.running_mean, layer.running_var), running, strict=True):
        np.testing.assert_allclose(backend.asnumpy(ours), theirs, rtol=1e-12)


def test_a_layer_like_pytorchs(torch: ModuleType, rng: np.random.Generator) -> None:
    theirs = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    layer = nn.batch_norm_like("pytorch", 3, dtype="float64")
    x = rng.standard_normal((6, 3, 5))
    np.testing.assert_allclose(layer(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.running_var, theirs.running_var.numpy(), rtol=1e-12)


def test_numbers_are_the_frameworks_own() -> None:
    layer = nn.batch_norm_like("keras", 4, momentum=0.9, eps=1e-4, axis=1)
    assert (layer.decay, layer.eps, layer.axis, layer.unbiased) == (0.9, 1e-4, 1, False)
    assert nn.batch_norm_like("pytorch", 4, momentum=0.9).momentum == 0.9
    with pytest.raises(ValueError, match="framework must be one of pytorch, keras, flax, onnx, chainer; got 'jax'"):
        nn.batch_norm_like("jax", 4)
    with pytest.raises(ValueError, match=r"arrays of keras are named gamma, .*, moving_variance; got \['weight'\]"):
        nn.batch_norm_like("keras", 4, arrays={"weight": np.ones(4)})
