"""PyTorch as a rival, eager and compiled: it computes the case, or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import ModuleType

import numpy as np
import pytest

from benchmarks.harness.case import DTYPES, EPILOGUES, Arrays, Case, NotSupportedError, Provider, native_dtype
from benchmarks.harness.clocks import HostClock
from benchmarks.harness.measure import error_of
from benchmarks.harness.places import Host, cast
from benchmarks.ops import bench_batch_norm
from benchmarks.peers import apex, cudnn_frontend, pytorch, torch_compile

SHAPES = {"NC": (16, 5), "NCL": (4, 3, 10), "NCHW": (4, 3, 5, 6), "NHWC": (4, 3, 5, 6)}
DIRECTIONS = ("forward", "backward")
CASES = [
    Case("batch_norm", direction, shape, dtype, layout, epilogue)
    for (layout, shape), dtype, epilogue, direction in product(SHAPES.items(), DTYPES, EPILOGUES, DIRECTIONS)
]
CASES += [Case("batch_norm", direction, (4, 3, 10, 1), "float16", "NHWC", "add_relu") for direction in DIRECTIONS]


class Foreign:
    """An array that is not NumPy's, as CuPy's are not: it has a data type and views, and exports what DLPack knows."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, array.dtype

    def view(self, dtype: type) -> Foreign:
        """Return the same memory as another data type."""
        return Foreign(self.array.view(dtype))

    def __dlpack__(self, **options: object) -> object:
        """Export, except bfloat16."""
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple:
        """Return the CPU."""
        return self.array.__dlpack_device__()


@pytest.fixture
def torch() -> ModuleType:
    """Return PyTorch, or skip."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return pytorch.load()


def inputs(case: Case) -> Arrays:
    """Return the arrays of a case."""
    if case.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    return cast(case, bench_batch_norm.inputs(case, Host().random))


def exact(case: Case, arrays: Arrays) -> tuple:
    """Return the outputs in float64, by formulas of this test's own."""
    double = {name: array.astype(np.float64) for name, array in arrays.items()}
    axes = tuple(axis for axis in range(len(case.shape)) if axis != case.channel_axis % len(case.shape))
    broad = {name: np.expand_dims(vector, axes) for name, vector in double.items() if vector.ndim == 1}
    x, count = double["x"], case.size // case.shape[1]
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + 1e-5)
    xhat = (x - mean) * rstd
    z = broad["gamma"] * xhat + broad["beta"] + double.get("residual", 0)
    if case.direction == "forward":
        new_mean = 0.9 * double["running_mean"] + 0.1 * mean.ravel()
        new_var = 0.9 * double["running_var"] + 0.1 * var.ravel() * count / (count - 1)
        return np.maximum(z, 0) if case.epilogue else z, new_mean, new_var
    g = double["dy"] * (z > 0) if case.epilogue else double["dy"]
    dgamma, dbeta = (g * xhat).sum(axes, keepdims=True), g.sum(axes, keepdims=True)
    dx = broad["gamma"] * rstd * (g - (dbeta + xhat * dgamma) / count)
    return dx, dgamma.ravel(), dbeta.ravel(), *((g,) if case.epilogue == "add_relu" else ())


def check(case: Case, prepare: Callable) -> None:
    """Compare the first call with float64, and the second with the first in all but the running statistics."""
    arrays, to_float64 = inputs(case), HostClock().to_float64
    call = prepare(case, {name: array.copy() for name, array in arrays.items()})
    found = [to_float64(output).copy() for output in call()]
    error_of(case, found, exact(case, arrays))
    repeated = [to_float64(output) for output in call()]
    same = slice(0, 1) if case.direction == "forward" else slice(None)
    for first, second in zip(found[same], repeated[same], strict=True):
        np.testing.assert_array_equal(first, second)


def by_name(providers: tuple[Provider, ...], name: str) -> Provider:
    """Return the provider of a name."""
    return next(provider for provider in providers if provider.name == name)


# ---- eager ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [np.asarray, Foreign], ids=["NumPy", "foreign"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_shares_the_memory_of_its_array(dtype: str, wrap: Callable, torch: ModuleType) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    array = np.arange(6).reshape(2, 3).astype(native_dtype(dtype))
    tensor = pytorch.tensor_of(wrap(array))
    assert tensor.dtype is getattr(torch, dtype)
    tensor += 1
    assert array.astype(int).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_labels_become_tensors_too(torch: ModuleType) -> None:
    assert pytorch.tensor_of(np.arange(3, dtype=np.int32)).dtype is torch.int32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_mode_computes_the_case(case: Case, torch: ModuleType) -> None:
    check(case, by_name(pytorch.PROVIDERS, "PyTorch eager").prepare)


@pytest.mark.parametrize("case", [case for case in CASES if not case.epilogue], ids=str)
def test_the_overloads_with_outputs_compute_the_case(case: Case, torch: ModuleType) -> None:
    check(case, by_name(pytorch.PROVIDERS, "PyTorch eager, out=").prepare)


def test_a_backend_that_pytorch_did_not_choose_computes_the_same(torch: ModuleType) -> None:
    case = Case("batch_norm", "forward", SHAPES["NHWC"], layout="NHWC", epilogue="add_relu")
    check(case, lambda case, arrays: pytorch._forward(case, pytorch.tensors_of(case, arrays), default=False))


def test_cudnn_is_refused_where_pytorch_does_not_choose_it(torch: ModuleType) -> None:
    case = Case("batch_norm", "forward", (16, 5))
    cudnn = by_name(pytorch.PROVIDERS, "PyTorch eager, cuDNN")
    with pytest.raises(NotSupportedError, match="PyTorch chooses its native kernels for this case, not cuDNN"):
        cudnn.prepare(case, inputs(case))
    assert cudnn.describe(case, inputs(case)) == "cudnn; PyTorch's choice is native"
    assert pytorch.PROVIDERS[0].describe(case, inputs(case)) == "native, PyTorch's choice"


def test_cudnn_gets_its_arguments_in_its_order(torch: ModuleType) -> None:
    schema = str(torch.ops.aten.cudnn_batch_norm_backward.default._schema)
    names = [argument.split()[-1] for argument in schema[schema.index("(") + 1 : schema.index(")")].split(", ")]
    assert names == "input grad_output weight running_mean running_var save_mean save_var epsilon reserveSpace".split()


@pytest.mark.parametrize("module", [pytorch, torch_compile, cudnn_frontend, apex])
def test_without_pytorch_all_are_absent(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "find_spec", lambda name: None)
    monkeypatch.setattr(cudnn_frontend, "find_spec", lambda name: object())
    assert {provider.absent() for provider in module.PROVIDERS} == {"PyTorch is not installed"}


def test_a_pytorch_without_cuda_is_absent_from_the_gpu(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert pytorch.absent("cuda") == torch_compile.absent() == apex.absent() == "this PyTorch has no CUDA"
    assert pytorch.absent("cpu") is None


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiling(torch: ModuleType) -> Iterator[None]:
    """Forget what was compiled, before and after."""
    torch_compile.compiled.cache_clear()
    yield
    torch_compile.compiled.cache_clear()


def test_the_functions_that_are_compiled_compute_the_case(
    torch: ModuleType, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for case in CASES:
        if case.dtype != "bfloat16":  # it needs ml_dtypes, and `compiled` does not know about data types
            check(case, torch_compile.prepare)


def test_many_cases_are_compiled_without_falling_back(
    torch: ModuleType, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo gives up on a code object that it compiled too often, eight times by default."""
    import torch._dynamo as dynamo

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    count = 2 * dynamo.config.recompile_limit
    dynamo.utils.counters.clear()
    for rows in range(3, 3 + count):
        check(Case("batch_norm", "forward", (rows, 2)), torch_compile.prepare)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == count


def test_a_case_is_compiled_once_per_variant(
    torch: ModuleType, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: options.append(given) or function)
    case = Case("batch_norm", "forward", (16, 5))
    for provider in torch_compile.PROVIDERS * 2:
        provider.prepare(case, inputs(case))
    fixed = {"fullgraph": True, "dynamic": False}
    cooperative = {"options": {"triton.cooperative_reductions": True}}
    assert options == [fixed, fixed | {"mode": "max-autotune-no-cudagraphs"}, fixed | cooperative]


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.filterwarnings("default")  # Inductor's own
def test_compiled_code_computes_the_case(direction: str, torch: ModuleType, compiling: None) -> None:
    for epilogue in ("", "add_relu"):
        check(Case("batch_norm", direction, SHAPES["NHWC"], "float32", "NHWC", epilogue), torch_compile.prepare)


def test_inductor_knows_the_options(torch: ModuleType) -> None:
    import torch._inductor as inductor

    assert "triton.cooperative_reductions" in inductor.list_options()
    assert inductor.list_mode_options("max-autotune-no-cudagraphs")["max_autotune"]
