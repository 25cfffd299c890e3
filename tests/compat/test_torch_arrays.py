"""Tensors as arrays: memory that is shared, PyTorch's stream on a device, and tensors that are refused."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.runtime.test_cuda_runtime import cupy
from tools import real_torch

torch = real_torch.load()

from bnkernels.compat import torch as ours  # noqa: E402
from bnkernels.compat import torch_autograd  # noqa: E402

__all__ = ["cupy"]  # the fixture


@pytest.mark.parametrize("dtype", ours.FLOATING, ids=str)
def test_an_array_lies_on_the_memory_of_its_tensor(dtype: Any) -> None:
    tensor = torch.arange(24.0).to(dtype).reshape(4, 6)[::2, 1:].t().requires_grad_()
    array = torch_autograd._array(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert array.ctypes.data == tensor.data_ptr()
    assert array.strides == tuple(stride * tensor.itemsize for stride in tensor.stride())
    np.testing.assert_array_equal(array.astype("float64"), tensor.detach().double().numpy())
    array[0, 0] = 99
    assert tensor[0, 0] == 99


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Let all tensors say that they lie on the second device, on which PyTorch has a stream, and note their exports."""
    state = types.SimpleNamespace(cuda_stream=0x7000, current=0, exported=[])

    @contextmanager
    def entered(which: Any) -> Iterator[None]:
        before, state.current = state.current, which.index
        yield
        state.current = before

    def exported(tensor: Any, *, stream: int, max_version: Any = None) -> Any:
        assert state.current == 1, "PyTorch exports from its current device"
        state.exported.append(stream)
        return torch.utils.dlpack.to_dlpack(tensor)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda which: state)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "__dlpack__", exported)
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda tensor: (2, 1))
    return state


def results(dtype: Any) -> list[Any]:
    """Return what the ops make of some tensors: outputs, statistics, first and second gradients."""
    x, dy = torch.randn(2, 6, 4, generator=torch.manual_seed(0)).to(dtype)
    tensors = [x.requires_grad_(), *(torch.full((4,), number).requires_grad_() for number in (2.0, 1.0))]
    running = torch.zeros(4), torch.ones(4)
    y = ours.batch_norm(x, *running, *tensors[1:], training=True, activation="silu")
    first = torch.autograd.grad(y, tensors, dy, create_graph=True)
    found = [y, *running, *first, *torch.autograd.grad(first[0].float().square().sum(), tensors[:2])]
    module = ours.LinearBatchNorm(4, 4, dtype=dtype)
    with torch.no_grad():
        module.linear.weight.copy_(torch.eye(4) + 0.25)
    for function in (
        lambda: ours.batch_norm(x, *running, *tensors[1:]),
        lambda: ours.layer_norm(x, (4,), *tensors[1:]),
        lambda: module(x),
    ):
        out = function()
        found += [out, *torch.autograd.grad(out, tensors[:1], dy)]
    return [tensor.detach() for tensor in found]


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("handle", [0, 0x7000])
def test_ops_run_on_pytorchs_stream_of_the_tensors_device(
    cupy: types.ModuleType, request: pytest.FixtureRequest, handle: int, dtype: Any
) -> None:
    wanted = results(dtype)
    device = request.getfixturevalue("device")
    device.cuda_stream = handle
    found = results(dtype)
    unit = torch.finfo(dtype).eps
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=16 * unit, atol=16 * unit, check_device=False)
    kernels = [record.entry_point.removeprefix("bnk_") for record in cupy.driver.launches]
    wanted = [
        *("batch_norm_forward", "batch_norm_backward", "batch_norm_double_backward"),
        *("batch_norm_inference", "batch_norm_inference_backward", "layer_norm_forward", "layer_norm_backward"),
        *("linear_batch_norm_forward", "linear_batch_norm_backward"),
    ]
    assert len(kernels) == len(wanted)
    assert all(kernel.startswith(name) for kernel, name in zip(kernels, wanted, strict=True))
    assert {(record.device, record.stream) for record in cupy.driver.launches} == {(1, handle)}
    assert set(device.exported) == {handle or 1}, "told of another stream, PyTorch would wait for it"
    assert (device.current, cupy.driver.device, cupy.cuda.get_current_stream(1).ptr) == (0, 0, 0)
    assert cupy.driver.reads == 0


@pytest.mark.emulator
def test_without_a_gpu_a_tensor_on_a_device_is_refused(cupy: types.ModuleType, device: types.SimpleNamespace) -> None:
    cupy.driver.available = False
    with pytest.raises(ValueError, match="device cuda is not usable: CuPy is installed, but no NVIDIA driver"):
        ours.batch_norm(torch.ones(3, 2), None, None, training=True)
    assert not device.exported


@pytest.mark.emulator
def test_under_autocast_on_a_device_layer_norm_alone_computes_in_float32(
    cupy: types.ModuleType, device: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    x = torch.randn(6, 4).bfloat16()
    assert ours.LayerNorm(4)(x).dtype == torch.float32
    assert ours.LayerNorm(4, dtype=torch.bfloat16)(x).dtype == torch.float32
    assert ours.BatchNorm1d(4)(x).dtype == torch.bfloat16
    assert ours.LinearBatchNorm(4, 4)(x.float()).dtype == torch.get_autocast_dtype("cuda")
    assert len(cupy.driver.launches) == 4
