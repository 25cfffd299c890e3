"""CuPy's own means without a GPU: what it fuses run by NumPy, its elementwise kernels read by Python and by NVRTC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import measure
from benchmarks.harness.case import Call, Case, NotSupportedError, Provider
from benchmarks.harness.places import Host, cast, copies, to_float64
from benchmarks.ops.bench_batch_norm import inputs
from benchmarks.peers import cupy_kernels, expression

DIRECTIONS, EPILOGUES = ("forward", "backward"), ("", "relu", "add_relu")
LAYOUTS = [((64, 20), "NC"), ((4, 3, 5), "NCL"), ((2, 3, 4, 5), "NCHW"), ((2, 3, 4, 5), "NHWC")]


class Kernel:
    """``cupy.ElementwiseKernel`` and ``cupy.ReductionKernel``: their text is Python but for types and semicolons."""

    def __init__(self, ins: str, outs: str, operation: str, *rest: str) -> None:
        self.ins, self.outs = (re.findall(r"\w+ (\w+)", names) for names in (ins, outs))
        self.parameters, self.text, self.sums = f"{ins}, {outs}", operation, len(rest) > 1
        lines = (line.strip().removeprefix("const U ") for line in operation.split(";"))
        self.code = compile("\n".join(lines), "a kernel", "eval" if self.sums else "exec")

    def __call__(self, *given: Any, axis: tuple[int, ...] | None = None) -> Any:
        """Compute; outputs that are not given are new, of the first argument's data type."""
        names = dict(zip([*self.ins, *self.outs], given, strict=False))
        names |= {"T": lambda value: np.asarray(value, given[0].dtype), "U": lambda value: np.asarray(value, "float32")}
        if self.sums:
            return eval(self.code, names).sum(axis=axis, dtype=np.float32)
        exec(self.code, names)
        return names[self.outs[0]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put NumPy and the kernels above in CuPy's place."""
    functions = {name: getattr(np, name) for name in ("sqrt", "maximum")}
    module = SimpleNamespace(ElementwiseKernel=Kernel, ReductionKernel=Kernel, **functions)
    monkeypatch.setattr(cupy_kernels, "_cupy", lambda: module)
    for function in (cupy_kernels._kernels, cupy_kernels._products):
        function.cache_clear()
    yield
    for function in (cupy_kernels._kernels, cupy_kernels._products):
        function.cache_clear()


def check(case: Case, prepare: Any, tolerance: float = 1e-5) -> None:
    """Compare two calls in a row with the reference: the second must not depend on what the first left."""
    arrays = cast(case, inputs(case, Host().random))
    reference = to_float64(arrays)
    call: Call = prepare(case, *copies(arrays, 1))
    for _ in range(2):
        exact = expression.reference(case, reference, np)  # updates the running statistics, as the call does
        found = [output.astype(np.float64) for output in call()]
        assert measure.error_of(case, found, exact) < tolerance


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_the_fused_expressions_are_right(shape: tuple[int, ...], layout: str, epilogue: str, direction: str) -> None:
    case = Case("batch_norm", direction, shape, "float32", layout, epilogue)
    check(case, partial(cupy_kernels.prepare_fused, make=partial(cupy_kernels.unfused, xp=np)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
@pytest.mark.usefixtures("stand_in")
def test_the_elementwise_kernels_are_right(
    shape: tuple[int, ...], layout: str, epilogue: str, direction: str, dtype: str, tolerance: float
) -> None:
    case = Case("batch_norm", direction, shape, dtype, layout, epilogue)
    check(case, cupy_kernels.prepare_kernels, tolerance)


@pytest.mark.usefixtures("stand_in")
def test_the_elementwise_kernels_compile(nvrtc: ModuleType) -> None:
    for t, u in (("float", "float"), ("double", "double"), ("float", "double")):
        text = f"typedef {t} T; typedef {u} U; typedef double float64;\n"
        for i, kernel in enumerate((*cupy_kernels._kernels(), cupy_kernels._products())):
            parameters = re.sub(r"(\w+) (\w+)", r"\1& \2", kernel.parameters)
            operation = f"{kernel.outs[0]} = {kernel.text};" if kernel.sums else f"{kernel.text};"
            text += f"__device__ void operation_{i}({parameters}) {{ {operation} }}\n"
        assert nvrtc.resources(text + 'extern "C" __global__ void ignored() {}', 90)


def test_one_fused_function_serves_all_sizes_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def fuse(kernel_name: str) -> Any:
        return lambda function: compiled.append(kernel_name) or function

    functions = {name: getattr(np, name) for name in ("sqrt", "maximum", "sum")}
    monkeypatch.setattr(cupy_kernels, "_cupy", lambda: SimpleNamespace(fuse=fuse, **functions))
    cupy_kernels.fused.cache_clear()
    for shape in ((64, 20), (7, 3), (1000, 1)):
        check(Case("batch_norm", "forward", shape, epilogue="relu"), cupy_kernels.tried)
    check(Case("batch_norm", "forward", (2, 3, 4, 5), "float32", "NHWC"), cupy_kernels.tried)
    assert compiled == 2 * ["benchmark_fused_forward"]
    cupy_kernels.fused.cache_clear()


def test_fusion_is_not_asked_for_16_bit_sums() -> None:
    case = Case("batch_norm", "forward", (4, 3), "float16")
    for prepare in (cupy_kernels.prepare_fused, cupy_kernels.tried):
        with pytest.raises(NotSupportedError, match="16 bits"):
            prepare(case, cast(case, inputs(case, Host().random)))


@pytest.mark.parametrize("refusal", [TypeError("no such method"), RuntimeError("no grid synchronisation")])
def test_what_cupy_cannot_fuse_is_not_supported(refusal: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case, arrays: dict) -> None:
        raise refusal

    monkeypatch.setattr(cupy_kernels, "prepare_fused", refuse)
    with pytest.raises(NotSupportedError, match=f"{type(refusal).__name__}: {refusal}"):
        cupy_kernels.tried(Case("batch_norm", "forward", (4, 3)), {})


@pytest.mark.cuda
@pytest.mark.parametrize("provider", cupy_kernels.PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_on_a_gpu(provider: Provider, shape: tuple[int, ...], layout: str, epilogue: str, direction: str) -> None:
    import cupy

    def prepare(case: Case, arrays: dict) -> Call:
        call = provider.prepare(case, {name: cupy.asarray(array) for name, array in arrays.items()})
        return lambda: tuple(map(cupy.asnumpy, call()))

    check(Case("batch_norm", direction, shape, "float32", layout, epilogue), prepare, 1e-4)
