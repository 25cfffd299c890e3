"""What CuPy is asked to fuse, run as it is written on NumPy arrays, against the reference."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.bench_batch_norm import inputs
from benchmarks.case import Case, NotSupportedError
from benchmarks.peers import cupy_kernels, expression
from benchmarks.places import Host, cast, copies, to_float64


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("epilogue", ["", "relu", "add_relu"])
@pytest.mark.parametrize(
    ("shape", "layout"), [((64, 20), "NC"), ((4, 3, 5), "NCL"), ((2, 3, 4, 5), "NCHW"), ((2, 3, 4, 5), "NHWC")]
)
def test_the_fused_expressions_are_right(shape: tuple[int, ...], layout: str, epilogue: str, direction: str) -> None:
    case = Case("batch_norm", direction, shape, "float32", layout, epilogue)
    arrays = cast(case, inputs(case, Host().random))
    exact = expression.reference(case, to_float64(arrays), np)
    (own,) = copies(arrays, 1)
    call = cupy_kernels.prepare_fused(case, own, make=partial(cupy_kernels.unfused, xp=np))
    assert measure.error_of(case, [np.asarray(output, np.float64) for output in call()], exact) < 1e-5


def test_fusion_is_not_asked_for_16_bit_sums() -> None:
    with pytest.raises(NotSupportedError, match="16 bits"):
        cupy_kernels.prepare_fused(Case("batch_norm", "forward", (4, 3), "float16"), {})


@pytest.mark.parametrize("refusal", [TypeError("no such method"), RuntimeError("no grid synchronisation")])
def test_what_cupy_cannot_fuse_is_not_supported(refusal: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case, arrays: dict) -> None:
        raise refusal

    monkeypatch.setattr(cupy_kernels, "prepare_fused", refuse)
    with pytest.raises(NotSupportedError, match=f"{type(refusal).__name__}: {refusal}"):
        cupy_kernels.tried(Case("batch_norm", "forward", (4, 3)), {})


@pytest.mark.cuda
@pytest.mark.parametrize("provider", cupy_kernels.PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("epilogue", ["", "relu", "add_relu"])
@pytest.mark.parametrize(("shape", "layout"), [((64, 20), "NC"), ((2, 3, 4, 5), "NCHW"), ((2, 3, 4, 5), "NHWC")])
def test_on_a_gpu(
    provider: cupy_kernels.Provider, shape: tuple[int, ...], layout: str, epilogue: str, direction: str
) -> None:
    import cupy

    case = Case("batch_norm", direction, shape, "float32", layout, epilogue)
    arrays = cast(case, inputs(case, Host().random))
    exact = expression.reference(case, to_float64(arrays), np)
    call = provider.prepare(case, {name: cupy.asarray(array) for name, array in arrays.items()})
    found = [cupy.asnumpy(output).astype(np.float64) for output in call()]
    assert measure.error_of(case, found, exact) < 1e-4
