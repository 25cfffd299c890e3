"""Our kernels in Triton: run by Triton's interpreter on the CPU, compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.case import EPILOGUES, Arrays, Case, NotSupportedError, WrongResultError
from benchmarks.harness.clocks import HostClock
from benchmarks.harness.measure import error_of
from benchmarks.harness.places import Host, cast, copies, to_float64
from benchmarks.ops import bench_batch_norm
from benchmarks.ops.bench_batch_norm import inputs
from benchmarks.peers import expression, triton_kernels
from benchmarks.peers.triton_kernels import Plan, plan_of, power_of_two, sizes_of

ROOT = Path(__file__).parents[2]
DIRECTIONS = ("forward", "backward")
SHAPES = {"NC": (13, 5), "NCL": (2, 3, 7), "NCHW": (3, 2, 2, 3), "NHWC": (3, 6, 2, 3)}
HELD, SPLIT, ALONE = "held", "split", "alone"  # all rows in one tile; in ranges of rows; in one range of several tiles
RUNS = [(Case("batch_norm", d, SHAPES["NC"], epilogue=e), HELD) for d in DIRECTIONS for e in EPILOGUES]
RUNS += [(case, SPLIT) for case, _ in RUNS]
RUNS += [
    (Case("batch_norm", d, SHAPES[layout], "float32", layout, "add_relu"), how)
    for d in DIRECTIONS
    for layout in ("NCL", "NCHW", "NHWC")
    for how in (HELD, SPLIT)
]
RUNS += [
    (Case("batch_norm", d, SHAPES["NHWC"], dtype, "NHWC", "add_relu"), how)
    for d in DIRECTIONS
    for dtype in ("float16", "bfloat16", "float64")
    for how in (HELD, SPLIT)
]
RUNS += [(Case("batch_norm", d, SHAPES["NC"]), ALONE) for d in DIRECTIONS]
FAR = Case("batch_norm", "forward", (14, 3))  # its data are far from 0
MULTIPROCESSORS = 132
RUN = "from tests.benchmarks.test_peers_triton import print_interpreted; print_interpreted()"
IMPORT = """
import sys
sys.modules |= {"triton": None, "torch": None}
from benchmarks.peers.triton_kernels import PROVIDERS
print([provider.name for provider in PROVIDERS])
"""


def cut(case: Case, how: str) -> Plan:
    """Return a plan that the smallest of cases has, too; neither rows nor channels are a multiple of its tile."""
    rows, _, _ = sizes_of(case)
    if how == HELD:
        return Plan(power_of_two(rows), 4, 0, 1, 1)
    tiles = 1 if how == SPLIT else 4
    return Plan(4, 4, 4 * tiles, -(-rows // (4 * tiles)), 1)


def arrays_of(case: Case) -> Arrays:
    """Return the inputs of a case."""
    return cast(case, inputs(case, Host().random))


def errors(case: Case, arrays: Arrays, plan: Plan) -> list[float] | str:
    """Return how far two calls are off, or that they are too far off; the second updates what the first left."""
    exact = to_float64(arrays)
    call = triton_kernels.prepare(case, copies(arrays, 1)[0], plan)
    to_wide = HostClock().to_float64
    try:
        return [error_of(case, map(to_wide, call()), expression.reference(case, exact, np)) for _ in range(2)]
    except WrongResultError as wrong:
        return str(wrong)


def print_interpreted() -> None:
    """Run everything where TRITON_INTERPRET was set before Triton was imported; print the results as JSON."""
    results: dict[str, Any] = {}
    for case, how in RUNS:
        try:
            results[f"{case} {how}"] = errors(case, arrays_of(case), cut(case, how))
        except NotSupportedError as refusal:  # bfloat16 without ml_dtypes
            results[f"{case} {how}"] = str(refusal)
    for how in (HELD, SPLIT, ALONE):
        arrays = arrays_of(FAR)
        arrays["x"] += np.float32(1000)
        results[f"far {how}"] = errors(FAR, arrays, cut(FAR, how))
    case = Case("batch_norm", "forward", SHAPES["NC"], epilogue="relu")
    arrays = arrays_of(case)
    arrays["x"][3, 1] = np.nan
    y, *_ = triton_kernels.prepare(case, arrays, cut(case, SPLIT))()
    results["NaN"] = np.isnan(y.numpy()).sum(axis=0).tolist()
    print(json.dumps(results))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Return what the interpreter computed, in a process of its own: Triton is either interpreted or compiled."""
    for name in ("torch", "triton"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "how"), RUNS, ids=lambda value: str(value))
def test_interpreted_the_kernels_compute_the_case(case: Case, how: str, interpreted: dict[str, Any]) -> None:
    found = interpreted[f"{case} {how}"]
    if "ml_dtypes" in found:
        pytest.skip(found)
    assert isinstance(found, list), found
    exact = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 4e-15}[case.dtype]
    assert max(found) < exact


@pytest.mark.slow
@pytest.mark.parametrize("how", [HELD, SPLIT, ALONE])
def test_data_far_from_0_keep_their_variance(how: str, interpreted: dict[str, Any]) -> None:
    found = interpreted[f"far {how}"]
    assert isinstance(found, list), found
    assert max(found) < 1e-4


@pytest.mark.slow
def test_nan_spoils_its_channel_through_the_relu(interpreted: dict[str, Any]) -> None:
    assert interpreted["NaN"] == [0, 13, 0, 0, 0]


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in bench_batch_norm.CASES if not case.epilogue], ids=str)
def test_a_plan_covers_every_row_once_with_tiles_that_fit(case: Case) -> None:
    plan = plan_of(case, MULTIPROCESSORS)
    rows, channels, length = sizes_of(case)
    bytes_of_tile = plan.block_rows * plan.block_channels * np.dtype(case.accumulator).itemsize
    assert plan.block_rows == power_of_two(plan.block_rows)
    assert plan.block_channels == power_of_two(plan.block_channels) <= power_of_two(channels)
    assert plan.block_channels * length * case.itemsize >= 32 or plan.block_channels >= channels
    assert bytes_of_tile // plan.warps <= 8 << 10  # 64 registers of a thread
    blocks = -(-channels // plan.block_channels)
    if plan.split_rows:
        assert plan.split_rows % plan.block_rows == 0
        assert (plan.splits - 1) * plan.split_rows < rows <= plan.splits * plan.split_rows
        assert MULTIPROCESSORS < blocks * plan.splits <= 4 * MULTIPROCESSORS
        assert power_of_two(plan.splits) * plan.block_channels <= 8192
    else:
        assert plan.splits == 1
        assert plan.block_rows >= rows


def test_the_usual_cases_need_one_kernel() -> None:
    case = Case("batch_norm", "forward", (64, 20))
    assert plan_of(case, MULTIPROCESSORS) == Plan(64, 8, 0, 1, 2)
    assert str(plan_of(case, MULTIPROCESSORS)) == "all rows held, 64 x 8 tiles, 2 warps"


def test_the_backward_holds_less_as_it_has_more_operands() -> None:
    forward, backward = (plan_of(Case("batch_norm", d, (4096, 1024)), MULTIPROCESSORS) for d in DIRECTIONS)
    assert str(forward) == "all rows held, 4096 x 8 tiles, 16 warps"
    assert str(backward) == "rows split 8 times, 256 x 16 tiles, 8 warps"


def test_more_channels_than_programs_are_wanted_are_not_split() -> None:
    assert plan_of(Case("batch_norm", "forward", (100_000, 16_384)), MULTIPROCESSORS).splits == 1


@pytest.mark.parametrize(
    ("shape", "why"), [((2**16, 2**15), "in 32 bits"), ((1, 20), "two values per channel"), ((1, 3, 1), "two values")]
)
def test_what_the_kernels_cannot_do_is_refused(shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(NotSupportedError, match=why):
        plan_of(Case("batch_norm", "forward", shape), MULTIPROCESSORS)


def test_the_plan_shown_is_for_the_gpu_that_holds_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "tensor_of", lambda array: array)
    properties = type("Properties", (), {"multi_processor_count": 78})
    cuda = type("Cuda", (), {"get_device_properties": staticmethod(lambda device: properties)})
    monkeypatch.setattr(triton_kernels, "load", lambda: type("Torch", (), {"cuda": cuda}))
    x = type("Tensor", (), {"device": "cuda:0"})
    case = Case("batch_norm", "forward", (65_536, 1024))
    assert triton_kernels.describe(case, {"x": x}) == str(plan_of(case, 78)) != str(plan_of(case, MULTIPROCESSORS))
    assert triton_kernels.describe(Case("batch_norm", "forward", (1, 20)), {"x": x}) == ""


# ---- where there is no Triton ---------------------------------------------------------------------------------------


def test_the_provider_is_listed_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['Triton kernel (ours)']\n"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (provider,) = triton_kernels.PROVIDERS
    monkeypatch.setattr(triton_kernels, "absent_pytorch", lambda place: f"nothing for {place}")
    assert provider.absent() == "nothing for cuda"
    monkeypatch.setattr(triton_kernels, "absent_pytorch", lambda place: None)
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    assert provider.absent() == "Triton is not installed"
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: object())
    assert provider.absent() is None


# ---- compiled -------------------------------------------------------------------------------------------------------


class Compiler:
    """Stands for a kernel: where that is launched, it is compiled for compute capability 9.0 with the same arguments.

    Attributes
    ----------
    made : list of tuple
        Names, and what came out.
    """

    def __init__(self, function: Any, made: list) -> None:
        self.function, self.made = function, made

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        """Return what is called in place of the launch."""
        return self.compile

    def compile(self, *pointers: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
        """Compile as Triton does for pointers that are multiples of 16."""
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = self.function.arg_names
        types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
        types |= {torch.int32: "*i32"}
        given = dict(zip(names, pointers, strict=False)) | constants
        assert set(given) == set(names)
        pointing = {name for name, value in given.items() if isinstance(value, torch.Tensor)}
        signature = {name: types[given[name].dtype] if name in pointing else "constexpr" for name in names}
        source = ASTSource(
            fn=self.function,
            signature=signature,
            constexprs={(i,): given[name] for i, name in enumerate(names) if name not in pointing},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointing},
        )
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.made.append((self.function.__name__, compiled.asm))


COMPILED = [
    ((64, 20), "float32", "NC", 1),
    ((1024, 1024), "bfloat16", "NC", 1),
    ((65_536, 4096), "bfloat16", "NC", 2),
    ((20, 6, 65_536), "float16", "NCL", 2),
    ((256, 256, 56, 56), "float16", "NHWC", 2),
    ((100_000, 64), "float64", "NC", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("shape", "dtype", "layout", "launches"), COMPILED, ids=lambda value: str(value))
def test_compiled_for_a_gpu_the_loads_are_vectors(
    shape: tuple[int, ...],
    dtype: str,
    layout: str,
    launches: int,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case("batch_norm", direction, shape, dtype, layout, "add_relu")
    made: list = []
    kernels = triton_kernels.kernels()
    stand_ins = type("Kernels", (), {"__getattr__": lambda _, name: Compiler(getattr(kernels, name), made)})()
    monkeypatch.setattr(triton_kernels, "kernels", lambda: stand_ins)
    monkeypatch.setattr(triton_kernels, "tensor_of", lambda tensor: tensor)
    like = {"device": "meta"}  # tensors without memory
    data = {
        name: torch.empty(case.memory_shape, dtype=getattr(torch, dtype), **like) for name in ("x", "dy", "residual")
    }
    vectors = ("gamma", "beta", "running_mean", "running_var")
    data |= {name: torch.empty(shape[1], dtype=getattr(torch, case.accumulator), **like) for name in vectors}
    call = triton_kernels.prepare(case, data, plan_of(case, MULTIPROCESSORS))
    made.clear()
    call()
    assert len(made) == launches
    wide = "ld.global.v2.b64" if dtype == "float64" else "ld.global.v4.b32"
    for name, code in made:
        assert name.startswith(direction)
        assert wide in code["ptx"]
        assert len(code["cubin"]) > 0


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((64, 20), "NC"),
        ((50_000, 37), "NC"),
        ((3, 5, 7), "NCL"),
        ((16, 3, 99, 101), "NCHW"),
        ((16, 3, 99, 101), "NHWC"),
    ],
)
def test_on_a_gpu(shape: tuple[int, ...], layout: str, dtype: str, epilogue: str, direction: str) -> None:
    import cupy

    (provider,) = triton_kernels.PROVIDERS
    if reason := provider.absent():
        pytest.skip(reason)
    case = Case("batch_norm", direction, shape, dtype, layout, epilogue)
    arrays = arrays_of(case)
    exact = to_float64(arrays)
    call = provider.prepare(case, {name: cupy.asarray(array) for name, array in arrays.items()})
    for _ in range(3):
        found = [output.double().cpu().numpy() for output in call()]
        assert error_of(case, found, expression.reference(case, exact, np)) < (1e-2 if dtype == "float16" else 1e-4)
