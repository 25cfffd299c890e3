"""cuDNN's front end, Apex and TileOPs as rivals, on stand-ins: the code around them is ours, and is tested here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.harness.case import EPILOGUES, Case, NotSupportedError
from benchmarks.peers import apex, cudnn_frontend, tileops
from tests.benchmarks.test_peers_torch import CASES, DIRECTIONS, check, inputs, torch

__all__ = ["torch"]  # a fixture

# ---- cuDNN's front end ----------------------------------------------------------------------------------------------


class Symbol:
    """A tensor of a graph, as far as our code touches it."""

    def __init__(self, **declared: Any) -> None:
        self.declared, self.output = declared, False

    def set_output(self, output: bool) -> Symbol:
        """Mark as an output."""
        self.output = output
        return self

    def __getattr__(self, name: str) -> Callable[[Any], Symbol]:
        """Return the setter of a property."""
        if not name.startswith("set_"):
            raise AttributeError(name)
        return lambda value: self.declared.update({name.removeprefix("set_"): value}) or self


class Graph:
    """A stand-in for `cudnn.pygraph` that computes with PyTorch on the CPU."""

    supported = True

    def __init__(self, handle: Any, compute_data_type: str, **types: str) -> None:
        self.steps: list[tuple[list[Symbol], Callable, dict]] = []
        self.wide = {"FLOAT": "float32", "DOUBLE": "float64"}[compute_data_type]

    def tensor(self, dim: list, stride: list, data_type: str, name: str, is_pass_by_value: bool = False) -> Symbol:
        """Declare an input."""
        return Symbol(dim=dim, stride=stride, data_type=data_type, name=name)

    def validate(self) -> None:
        """Accept."""

    build_operation_graph = build_plans = validate

    def create_execution_plans(self, modes: list) -> None:
        """Accept."""

    def check_support(self) -> None:
        """Refuse if told to."""
        if not self.supported:
            raise UnsupportedError("no engine")

    def get_workspace_size(self) -> int:
        """Return some bytes."""
        return 16

    def __getattr__(self, name: str) -> Callable:
        """Return the builder of an operation."""
        operation = OPERATIONS[name]

        def build(name: str, **inputs: Symbol) -> Any:
            outputs = [Symbol() for _ in range(operation.outputs)]
            self.steps.append((outputs, operation, inputs))
            return outputs if len(outputs) > 1 else outputs[0]

        return build

    def execute(self, pack: dict[Symbol, Any], workspace: Any, handle: Any) -> None:
        """Compute all steps; write the outputs into their buffers, which must be as declared."""
        import torch

        for symbol, buffer in pack.items():
            for name, found in (("dim", buffer.shape), ("stride", buffer.stride())):
                assert list(found) == symbol.declared.get(name, list(found))
        values = {symbol: buffer.to(getattr(torch, self.wide)) for symbol, buffer in pack.items()}
        for outputs, operation, ports in self.steps:
            results = operation(**{port: values[symbol] for port, symbol in ports.items()})
            values |= dict(zip(outputs, results, strict=True))
        for outputs, _, _ in self.steps:
            for symbol in outputs:
                assert symbol.output == (symbol in pack)
                if symbol.output:
                    pack[symbol].copy_(values[symbol].reshape(pack[symbol].shape))


class UnsupportedError(Exception):
    """A stand-in for `cudnn.cudnnGraphNotSupportedError`."""


def operation(outputs: int) -> Callable[[Callable], Callable]:
    """Say how many outputs an operation has."""

    def note(function: Callable) -> Callable:
        function.outputs = outputs
        return function

    return note


AXES = (0, 2, 3)


@operation(5)
def batchnorm(input, scale, bias, in_running_mean, in_running_var, epsilon, momentum):
    """Return y, mean, 1/deviation and the new running statistics."""
    count = input.numel() // input.shape[1]
    mean = input.mean(AXES, keepdim=True)
    var = ((input - mean) ** 2).mean(AXES, keepdim=True)
    rstd = (var + epsilon).rsqrt()
    running = ((1 - momentum) * in_running_mean + momentum * mean, in_running_var * (1 - momentum))
    return (
        (input - mean) * rstd * scale + bias,
        mean,
        rstd,
        running[0],
        running[1] + momentum * var * count / (count - 1),
    )


@operation(3)
def batchnorm_backward(grad, input, scale, mean, inv_variance):
    """Return the gradients."""
    xhat = (input - mean) * inv_variance
    dgamma, dbeta = (grad * xhat).sum(AXES, keepdim=True), grad.sum(AXES, keepdim=True)
    count = input.numel() // input.shape[1]
    return scale * inv_variance * (grad - (dbeta + xhat * dgamma) / count), dgamma, dbeta


OPERATIONS = {
    "batchnorm": batchnorm,
    "batchnorm_backward": batchnorm_backward,
    "batchnorm_inference": operation(1)(
        lambda input, mean, inv_variance, scale, bias: [(input - mean) * inv_variance * scale + bias]
    ),
    "add": operation(1)(lambda a, b: [a + b]),
    "scale": operation(1)(lambda input, scale: [input * scale]),
    "relu": operation(1)(lambda input: [input.relu()]),
    "relu_backward": operation(1)(lambda loss, input: [loss * (input > 0)]),
}


@pytest.fixture
def front_end(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Graph]]:
    """Put the stand-in in the place of `cudnn`."""
    types = {name: name for name in (*cudnn_frontend.DATA_TYPES.values(), "BOOLEAN")}
    module = SimpleNamespace(
        data_type=SimpleNamespace(**types),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
        cudnnGraphNotSupportedError=UnsupportedError,
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        pygraph=Graph,
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cached = (cudnn_frontend.library, cudnn_frontend.handle, cudnn_frontend.plan_of)
    for function in cached:
        function.cache_clear()
    yield Graph
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_graph_for_cudnn_computes_the_case(case: Case, front_end: type[Graph]) -> None:
    check(case, cudnn_frontend.prepare)


def test_what_cudnn_refuses_is_not_supported(front_end: type[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "supported", False)
    case = Case("batch_norm", "forward", (16, 5))
    with pytest.raises(NotSupportedError, match="cuDNN: no engine"):
        cudnn_frontend.prepare(case, inputs(case))


def test_the_front_end_is_absent_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_frontend, "find_spec", lambda name: None)
    assert cudnn_frontend.absent() == "nvidia-cudnn-frontend is not installed"


# ---- Apex -----------------------------------------------------------------------------------------------------------


def stand_in_for_apex() -> type:
    """Return a module of Apex's form: channels last, its autograd function returns a gradient per argument."""
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, z, weight, bias, running_mean, running_var, module):
            image = {"input": x.float().permute(0, 3, 1, 2), "epsilon": module.eps, "momentum": module.momentum}
            rows = {"scale": weight, "bias": bias, "in_running_mean": running_mean, "in_running_var": running_var}
            rows = {name: row.view(1, -1, 1, 1) for name, row in rows.items()}
            y, mean, rstd, *new = batchnorm(**image, **rows)
            running_mean.copy_(new[0].ravel())
            running_var.copy_(new[1].ravel())
            y = y.permute(0, 2, 3, 1) + (0 if z is None else z)
            ctx.save_for_backward(x, weight, mean, rstd, y)
            ctx.module, ctx.residual = module, z is not None
            return (y.relu() if module.fuse_relu else y).half()

        @staticmethod
        def backward(ctx, dy):
            x, weight, mean, rstd, y = ctx.saved_tensors
            g = dy * (y > 0) if ctx.module.fuse_relu else dy
            images = (image.float().permute(0, 3, 1, 2) for image in (g, x))
            dx, dweight, dbias = batchnorm_backward(*images, weight.view(1, -1, 1, 1), mean, rstd)
            dz = (g,) if ctx.residual else ()
            return dx.permute(0, 2, 3, 1).half(), *dz, dweight.ravel(), dbias.ravel(), None, None, None

    class BatchNorm2dNHWC(torch.nn.modules.batchnorm._BatchNorm):
        def __init__(self, num_features: int, fuse_relu: bool) -> None:
            super().__init__(num_features)
            self.fuse_relu = fuse_relu

        def forward(self, x: Any, z: Any = None) -> Any:
            return Function.apply(x, z, self.weight, self.bias, self.running_mean, self.running_var, self)

    return BatchNorm2dNHWC


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_apex_gets_the_case(direction: str, epilogue: str, torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "module_class", stand_in_for_apex)
    check(Case("batch_norm", direction, (4, 8, 5, 6), "float16", "NHWC", epilogue), apex.prepare)


@pytest.mark.parametrize(
    "case",
    [
        Case("batch_norm", "forward", (4, 8, 5, 6), "float16", "NCHW"),
        Case("batch_norm", "forward", (4, 8, 5, 6), "float32", "NHWC"),
        Case("batch_norm", "forward", (4, 6, 5, 6), "float16", "NHWC"),
    ],
    ids=str,
)
def test_apex_refuses_what_it_is_not_for(case: Case) -> None:
    with pytest.raises(NotSupportedError, match="Apex's group batch norm is for"):
        apex.prepare(case, inputs(case))


# ---- TileOPs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tile_ops(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins with the signatures of TileOPs' operators in the place of its package."""

    class BatchNormFwdOp:
        def __init__(self, training: bool, momentum: float, eps: float) -> None:
            self.options = (training, momentum, eps)

        def __call__(self, x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any) -> Any:
            return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, *self.options)

    class BatchNormBwdOp:
        def __call__(self, grad_out: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> Any:
            masks, eps = [True] * 3, 0.0
            return torch.ops.aten.native_batch_norm_backward(
                grad_out, x, weight, None, None, mean, rstd, True, eps, masks
            )

    ops = SimpleNamespace(BatchNormFwdOp=BatchNormFwdOp, BatchNormBwdOp=BatchNormBwdOp)
    monkeypatch.setitem(sys.modules, "tileops", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "tileops.ops", ops)


@pytest.mark.parametrize("case", [case for case in CASES if not case.epilogue and case.layout != "NHWC"], ids=str)
def test_tileops_computes_the_case(case: Case, tile_ops: None) -> None:
    check(case, tileops.prepare)


@pytest.mark.parametrize(
    "case",
    [
        Case("batch_norm", "forward", (16, 5), epilogue="relu"),
        Case("batch_norm", "backward", (2, 5, 3, 3), "float16", "NHWC"),
    ],
    ids=str,
)
def test_tileops_refuses_what_it_has_no_operator_for(case: Case, tile_ops: None) -> None:
    with pytest.raises(NotSupportedError, match="TileOPs normalises with channels second"):
        tileops.prepare(case, {})
