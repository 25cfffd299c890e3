"""Norms in the place of PyTorch's: the same arguments, state and results, in every type, layout and mode."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from bnkernels import nn
from tools import real_torch

torch = real_torch.load()

from bnkernels.compat import torch as ours  # noqa: E402
from bnkernels.compat import torch_autograd  # noqa: E402
from tests.compat.common import assert_equal  # noqa: E402

TYPES = {  # types of the data and of the parameters
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16, float32": (torch.float16, torch.float32),
}
MODULES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "BatchNorm1d": (3, (6, 3), {}),
    "BatchNorm1d of sequences": (3, (4, 3, 5), {"momentum": None}),
    "BatchNorm2d": (3, (2, 3, 4, 5), {"momentum": 0.3}),
    "BatchNorm2d without parameters": (3, (2, 3, 4, 5), {"affine": False}),
    "BatchNorm2d without statistics": (3, (2, 3, 4, 5), {"track_running_stats": False}),
    "BatchNorm3d": (3, (2, 3, 2, 3, 2), {"eps": 1e-3}),
    "LayerNorm": (6, (4, 3, 6), {}),
    "LayerNorm of images": ((3, 4), (2, 5, 3, 4), {"bias": False}),
    "LayerNorm without parameters": ([3, 4], (2, 5, 3, 4), {"elementwise_affine": False}),
}


def pair(name: str, dtype: Any, **more: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """Return our module and PyTorch's with the same state, no two of whose numbers are equal, and a shape of inputs."""
    argument, shape, options = MODULES[name]
    kind = name.partition(" ")[0]
    theirs = getattr(torch.nn, kind)(argument, **options, dtype=dtype)
    mine = getattr(ours, kind)(argument, **options, dtype=dtype, **more)
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    assert not mine.load_state_dict(theirs.state_dict()).missing_keys
    return mine, theirs, shape


def trained(module: Any, x: Any, dy: Any) -> tuple[Any, ...]:
    """Return output and gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", MODULES)
def test_results_are_those_of_pytorch(name: str, types: str) -> None:
    of_data, of_parameters = TYPES[types]
    mine, theirs, shape = pair(name, of_parameters)
    for mode in (True, True, False):
        x, dy = torch.randn(2, *shape).to(of_data)
        for found, wanted in zip(trained(mine.train(mode), x, dy), trained(theirs.train(mode), x, dy), strict=True):
            # PyTorch rounds partial sums of layer norm's gradients to the type of the data.
            assert_equal(found, wanted, of_data if name.startswith("LayerNorm") else None)
        for key, wanted in theirs.state_dict().items():
            assert_equal(mine.state_dict()[key], wanted)
    assert ours.convert(torch.nn.Sequential(theirs))[0].state_dict().keys() == mine.state_dict().keys()


@pytest.mark.parametrize("name", MODULES)
def test_states_load_both_ways_bit_for_bit(name: str) -> None:
    mine, theirs, _ = pair(name, torch.float32)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    for key, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key])
    assert repr(mine) == repr(theirs)


def test_a_state_of_layers_loads_into_a_linear_batch_norm() -> None:
    layer, module = nn.LinearBatchNorm(4, 3, seed=0), ours.LinearBatchNorm(4, 3)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in layer.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((5, 4), np.float32)
    np.testing.assert_array_equal(module(torch.from_numpy(x)).detach().numpy(), layer(x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm"])
def test_copies_compute_the_same(name: str, way: str) -> None:
    mine, _, shape = pair(name, torch.float32, activation="elu", alpha=0.5)
    again = copy.deepcopy(mine) if way == "deepcopy" else pickle.loads(pickle.dumps(mine))
    x = torch.randn(shape)
    assert torch.equal(again(x), mine(x))
    assert repr(again) == repr(mine)
    assert repr(mine).endswith("activation='elu', alpha=0.5)")
    with torch.no_grad():
        again.weight.zero_()
    assert mine.weight.abs().min() > 0


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("types", TYPES)
def test_a_linear_batch_norm_is_its_parts(norm: str, types: str) -> None:
    of_data, of_parameters = TYPES[types]
    torch.manual_seed(5)
    parts = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False, dtype=of_data))
    parts.append(
        torch.nn.BatchNorm1d(3, dtype=of_parameters) if norm == "batch" else torch.nn.LayerNorm(3, dtype=of_parameters)
    )
    torch.manual_seed(5)
    mine = ours.LinearBatchNorm(4, 3, norm=norm, dtype=of_parameters)
    mine.linear.to(of_data)
    assert torch.equal(mine.linear.weight, parts[0].weight)
    for mode in (True, False):
        x, dy = torch.randn(6, 4).to(of_data), torch.randn(6, 3).to(of_data)
        found, wanted = trained(mine.train(mode), x, dy), trained(parts.train(mode), x, dy)
        for got, want in zip(found, wanted, strict=True):
            assert_equal(got, want, of_data if norm == "layer" else None)
    assert mine.norm.state_dict().keys() == parts[1].state_dict().keys()
    for got, want in zip(mine.norm.state_dict().values(), parts[1].state_dict().values(), strict=True):
        assert_equal(got, want)


def test_weights_of_a_linear_batch_norm_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    given = spied(monkeypatch, "linear_batch_norm_forward")
    module = ours.LinearBatchNorm(4, 3)
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double().float()):
        again(torch.randn(5, 4)).sum().backward()
        assert given[-1][1].ctypes.data == again.linear.weight.data_ptr()
        assert again.linear.weight.grad.stride() == again.linear.weight.stride() == (1, 3)


def spied(monkeypatch: pytest.MonkeyPatch, op: str) -> list[tuple]:
    """Note the arguments of the calls of an op."""
    calls: list[tuple] = []
    real = getattr(torch_autograd, op)

    def noting(*arrays: Any, **options: Any) -> Any:
        calls.append((*arrays, options))
        return real(*arrays, **options)

    monkeypatch.setattr(torch_autograd, op, noting)
    return calls


@pytest.mark.parametrize("layout", ["contiguous", "one pixel", "channels_last", "sliced", "cropped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_not_copied_and_outputs_have_their_format(
    monkeypatch: pytest.MonkeyPatch, layout: str, dtype: Any
) -> None:
    x = torch.randn(4, 3, 6, 5).to(dtype)
    last = layout not in ("contiguous", "one pixel")
    if last:
        x = x.to(memory_format=torch.channels_last)
    x = {"sliced": x[::2], "cropped": x[:, :, :, 1:], "one pixel": x[:, :, :1, :1].contiguous()}.get(layout, x)
    forward, backward = spied(monkeypatch, "batch_norm_forward"), spied(monkeypatch, "batch_norm_backward")
    x.requires_grad_()
    mine, theirs = ours.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    y, wanted = mine(x), theirs(x.detach())
    assert_equal(y, wanted)
    assert y.stride() == wanted.stride()
    dy = torch.randn(y.shape).to(dtype).to(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.stride() == y.stride()
    for array, tensor in ((forward[0][0], x), (backward[0][1], x), (backward[0][0], dy)):
        assert array.ctypes.data == tensor.data_ptr()
        view = tensor.movedim(1, -1) if last else tensor
        assert array.strides == tuple(stride * tensor.itemsize for stride in view.stride())
    assert forward[0][-1]["axis"] == (-1 if last else 1)
    assert forward[0][-1]["out"][0].ctypes.data == y.data_ptr()


def test_sequences_with_channels_last_give_what_pytorch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = spied(monkeypatch, "batch_norm_forward")
    x = torch.randn(4, 5, 3).transpose(1, 2)
    y = ours.BatchNorm1d(3)(x)
    assert forward[0][0].ctypes.data == x.data_ptr()
    assert y.stride() == torch.nn.BatchNorm1d(3)(x).stride()


@pytest.mark.parametrize("kind", ["BatchNorm1d", "LinearBatchNorm"])
def test_statistics_that_are_tracked_no_longer_stay_and_are_used(kind: str) -> None:
    norms = [ours.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    if kind == "LinearBatchNorm":
        linear = ours.LinearBatchNorm(3, 3)
        linear.linear.weight.data.copy_(torch.eye(3))
        norms[0] = linear.norm
    for norm in norms:
        norm.track_running_stats = False
        norm.running_var.fill_(4)
    mine = norms[0] if kind == "BatchNorm1d" else linear
    for mode in (True, False):
        x = torch.randn(5, 3)
        assert_equal(mine.train(mode)(x), norms[1].train(mode)(x))
    for got, want in zip(norms[0].state_dict().values(), norms[1].state_dict().values(), strict=True):
        assert torch.equal(got, want)


def test_running_statistics_are_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = spied(monkeypatch, "batch_norm_forward")
    module = ours.BatchNorm1d(3)
    module(torch.randn(5, 3))
    assert [array.ctypes.data for array in forward[0][3:5]] == [
        module.running_mean.data_ptr(),
        module.running_var.data_ptr(),
    ]


ACTIVATIONS = {
    "relu": (None, torch.relu),
    "leaky_relu": (0.2, lambda z: torch.nn.functional.leaky_relu(z, 0.2)),
    "sigmoid": (None, torch.sigmoid),
    "tanh": (None, torch.tanh),
    "gelu": (None, torch.nn.functional.gelu),
    "gelu_tanh": (None, lambda z: torch.nn.functional.gelu(z, approximate="tanh")),
    "silu": (None, torch.nn.functional.silu),
    "elu": (0.7, lambda z: torch.nn.functional.elu(z, 0.7)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_residual_and_activation_are_those_behind_pytorchs_norm(activation: str, training: bool) -> None:
    alpha, phi = ACTIVATIONS[activation]
    mine, theirs, shape = pair("BatchNorm2d", torch.float64, activation=activation, alpha=alpha)
    x, residual, dy = torch.randn(3, *shape, dtype=torch.float64)
    x.requires_grad_()
    residual.requires_grad_()
    wanted = phi(theirs.train(training)(x) + residual)
    found = mine.train(training)(x, residual)
    assert_equal(found, wanted)
    gradients = (
        torch.autograd.grad(y, [x, residual, *m.parameters()], dy) for y, m in ((found, mine), (wanted, theirs))
    )
    for got, want in zip(*gradients, strict=True):
        assert_equal(got, want)
    norm = ours.LayerNorm(5, activation=activation, alpha=alpha, dtype=torch.float64)
    assert_equal(norm(x), phi(torch.nn.functional.layer_norm(x, (5,))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_data", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm"])
def test_autocast_gives_the_types_and_numbers_of_pytorch(name: str, of_data: Any, dtype: Any) -> None:
    mine, theirs, shape = pair(name, torch.float64 if of_data == torch.float64 else torch.float32)
    x, dy = torch.randn(2, *shape).to(of_data)
    with torch.autocast("cpu", dtype):
        found, wanted = trained(mine, x, dy), trained(theirs, x, dy)
    for got, want in zip(found, wanted, strict=True):
        assert_equal(got, want, of_data if name == "LayerNorm" else None)


def test_autocast_rounds_a_linear_batch_norm_as_a_linear_layer() -> None:
    torch.manual_seed(5)
    parts = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.BatchNorm1d(3))
    mine = ours.LinearBatchNorm(4, 3)
    mine.linear.load_state_dict(parts[0].state_dict())
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            x, dy = torch.randn(6, 4), torch.randn(6, 3).bfloat16()
            found, wanted = trained(mine.train(mode), x, dy), trained(parts.train(mode), x, dy)
        assert found[0].dtype == torch.bfloat16
        assert_equal(found[0], wanted[0])
        for got, want in zip(found[1:], wanted[1:], strict=True):
            assert_equal(got.bfloat16(), want.bfloat16())


def test_on_a_gpu_autocast_has_a_rule_for_layer_norm_alone() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [registered(f"aten::{name}", "AutocastCUDA") for name in ("layer_norm", "batch_norm")] == [True, False]
    assert [registered(f"aten::{name}", "AutocastCPU") for name in ("layer_norm", "batch_norm")] == [False, False]


def network() -> Any:
    """Return a model of a usual kind, for (N, 2, 6, 6)."""
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(16, 4)
    norms = torch.nn.BatchNorm2d(3), torch.nn.LayerNorm(4)
    return torch.nn.Sequential(conv, norms[0], torch.nn.ReLU(), torch.nn.Flatten(2), linear, norms[1])


def test_convert_changes_norms_and_nothing_else() -> None:
    theirs = network()
    theirs[5].register_forward_hook(lambda module, given, y: None)
    mine = ours.convert(copy.deepcopy(theirs))
    x = torch.randn(5, 2, 6, 6)
    kept, state = list(mine.parameters()), mine.state_dict()
    assert ours.convert(mine) is mine
    assert [type(layer) for layer in mine] == [
        *(torch.nn.Conv2d, ours.BatchNorm2d, torch.nn.ReLU, torch.nn.Flatten, torch.nn.Linear, ours.LayerNorm)
    ]
    assert all(one is other for one, other in zip(kept, mine.parameters(), strict=True))
    assert mine[5]._forward_hooks.keys() == theirs[5]._forward_hooks.keys()
    assert_equal(mine(x), theirs(x))
    assert state.keys() == theirs.state_dict().keys()
    sync = torch.nn.SyncBatchNorm(3)
    assert type(ours.convert(sync)) is torch.nn.SyncBatchNorm
    assert type(ours.convert(torch.nn.BatchNorm1d(3))) is ours.BatchNorm1d


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which the compiler hides itself
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_model_computes_the_same(momentum: float | None) -> None:
    model = ours.convert(network()).append(torch.nn.Flatten())
    model.append(ours.LinearBatchNorm(12, 4, activation="gelu", momentum=momentum))
    model[1].momentum = momentum
    again, graphs = copy.deepcopy(model), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(again, backend=backend)
    for mode in (True, True, False):
        x, dy = torch.randn(5, 2, 6, 6), torch.randn(5, 4)
        found, wanted = trained(compiled.train(mode), x, dy), trained(model.train(mode), x, dy)
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(got, want)
    for got, want in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(got, want)
    assert again[1].num_batches_tracked == 2
    assert len(graphs) >= 3  # before, between and behind the norms
