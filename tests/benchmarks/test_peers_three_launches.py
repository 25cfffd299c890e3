"""Three phases as three launches: the provider as it is, on the stand-in for CuPy, which emulates the kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from benchmarks.harness import measure
from benchmarks.harness.case import Case, NotSupportedError
from benchmarks.harness.places import Host, cast, to_float64
from benchmarks.ops.bench_batch_norm import inputs
from benchmarks.peers import expression, three_launches
from tools.compile import ptx
from tools.emulator import EmulatorRuntime
from tools.fake_cupy import streams

# One block of examples and its edges; several blocks; more blocks than workers that finalise; a single channel.
SHAPES = [(2, 3), (64, 20), (65, 33), (200, 70), (64 * 33 + 1, 2), (130, 1)]


@pytest.fixture
def cupy(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Put the stand-in in CuPy's place."""
    stand_in = streams.make(emulated)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    three_launches.kernels.cache_clear()
    yield stand_in
    three_launches.kernels.cache_clear()


def check(case: Case, cupy: ModuleType, offset: float = 0.0, tolerance: float = 1e-5) -> None:
    """Compare two calls in a row with the reference: the second must not depend on what the first left."""
    arrays = inputs(case, Host().random)
    arrays["x"] += np.float32(offset)
    arrays = cast(case, arrays)
    running = to_float64(arrays)
    call = three_launches.prepare(case, {name: cupy.asarray(array) for name, array in arrays.items()})
    for _ in range(2):
        exact = expression.reference(case, running, np)  # updates the running statistics, as the call does
        found = [cupy.asnumpy(output).astype(np.float64) for output in call()]
        assert measure.error_of(case, found, exact) < tolerance


@pytest.mark.emulator
@pytest.mark.parametrize("epilogue", ["", "relu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_emulated_kernels_are_right(
    shape: tuple[int, int], direction: str, epilogue: str, cupy: ModuleType
) -> None:
    case = Case("batch_norm", direction, shape, "float32", "NC", epilogue)
    check(case, cupy)
    names = [launch.entry_point for launch in cupy.driver.launches]
    assert names == 2 * [f"three_launches_{direction}_{phase}" for phase in ("sums", "finalise", "apply")]


@pytest.mark.emulator
def test_a_mean_far_from_zero_does_not_ruin_the_variance(cupy: ModuleType) -> None:
    # x itself is rounded to 2^-24 of 1000, 6e-5; the squares of x would lose everything below 0.06.
    check(Case("batch_norm", "forward", (200, 5)), cupy, offset=1000.0, tolerance=1e-4)


@pytest.mark.parametrize(
    ("dtype", "layout", "epilogue"),
    [("bfloat16", "NC", ""), ("float64", "NC", ""), ("float32", "NHWC", ""), ("float32", "NC", "add_relu")],
)
def test_other_cases_are_not_supported(dtype: str, layout: str, epilogue: str) -> None:
    shape = (4, 3) if layout == "NC" else (4, 3, 2, 2)
    with pytest.raises(NotSupportedError, match="float32 matrices"):
        three_launches.prepare(Case("batch_norm", "forward", shape, dtype, layout, epilogue), {})


@pytest.mark.parametrize("rows", [1, 64, 65, 2**15, 2**15 + 1, 100_000, 2**24])
def test_every_example_is_in_one_block_and_no_block_is_empty(rows: int) -> None:
    case = Case("batch_norm", "forward", (rows, 40))
    sums, finalise, apply = three_launches.launches(case)
    blocks, size = sums.grid[1], three_launches.rows_of_block(case)
    assert (blocks - 1) * size < rows <= blocks * size
    assert blocks <= three_launches.MOST_BLOCKS
    assert (apply.grid, finalise.grid) == (sums.grid, (2, 1, 1))
    assert three_launches.describe(case, {}) == f"blocks of examples: {blocks}"


def test_the_kernels_compile_for_every_architecture_and_nothing_spills(nvrtc: ModuleType) -> None:
    text = three_launches.source()
    layouts = {"forward": three_launches.FORWARD, "backward": three_launches.BACKWARD}
    names = {f"three_launches_{direction}_{phase}" for direction in layouts for phase in three_launches.PHASES}
    for architecture in nvrtc.architectures():
        found = nvrtc.resources(text, architecture)
        assert set(found) == names
        assert all((r.spill_stores, r.spill_loads, r.stack) == (0, 0, 0) for r in found.values()), architecture
    for name, size in ptx.parameter_bytes(nvrtc.ptx(text, 90)).items():
        assert layouts[name.split("_")[2]][np.dtype(np.float32)].itemsize == size


def test_an_error_is_reported_at_its_file_and_line(nvrtc: ModuleType) -> None:
    line = "struct Moments {"
    number = three_launches.SOURCE.read_text(encoding="utf-8").splitlines().index(line) + 1
    with pytest.raises(nvrtc.CompileError, match=rf"three_launches\.cu\({number}\): error"):
        nvrtc.resources(three_launches.source().replace(line, "int syntax error;"), 90)


@pytest.mark.cuda
@pytest.mark.parametrize("epilogue", ["", "relu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", [*SHAPES, (100_000, 32)], ids=str)
def test_on_a_gpu(shape: tuple[int, int], direction: str, epilogue: str) -> None:
    import cupy

    check(Case("batch_norm", direction, shape, "float32", "NC", epilogue), cupy)
