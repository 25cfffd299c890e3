"""The kernels as NVRTC compiles them: resources, arguments, arithmetic; and that the command reports what is wrong.

One architecture here; ``make compile`` takes them all.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: kernels are not compiled")

from bnkernels import _batch_norm_general as general
from bnkernels import _source, parameter_update
from bnkernels._batch_norm_plan import BACKWARD, FORWARD, INFERENCE
from bnkernels._batch_norm_spread import ARGUMENTS as SPREAD
from bnkernels.batch_norm_double_backward import ARGUMENTS as DOUBLE_BACKWARD
from bnkernels.batch_norm_statistics import ARGUMENTS as STATISTICS
from bnkernels.fused_training import ARGUMENTS as FUSED_TRAINING
from bnkernels.layer_norm import ARGUMENTS as LAYER_NORM
from bnkernels.linear_batch_norm import ARGUMENTS as LINEAR_BATCH_NORM
from bnkernels.mini_batch import ARGUMENTS as MINI_BATCH
from bnkernels.softmax_cross_entropy import ARGUMENTS as SOFTMAX_CROSS_ENTROPY
from tests.compile import __main__ as command
from tests.compile import nvrtc, ptx

ARCHITECTURE = 90
LAYOUTS = {
    "bnk_batch_norm_forward": FORWARD,
    "bnk_batch_norm_inference": INFERENCE,
    "bnk_batch_norm_inference_backward": BACKWARD,
    "bnk_batch_norm_backward": BACKWARD,
    "bnk_batch_norm_double_backward": DOUBLE_BACKWARD,
    **{f"bnk_batch_norm_{direction}_spread": {np.dtype("f4"): argument} for direction, argument in SPREAD.items()},
    "bnk_batch_norm_forward_general": general.FORWARD,
    "bnk_batch_norm_backward_general": general.BACKWARD,
    "bnk_batch_norm_statistics": STATISTICS,
    "bnk_fused_training": FUSED_TRAINING["fused_training"],
    "bnk_fused_training_layer_norm": FUSED_TRAINING["fused_training"],
    "bnk_fused_training_grid": FUSED_TRAINING["fused_training_group"],
    "bnk_fused_training_grid_layer_norm": FUSED_TRAINING["fused_training_group"],
    **{f"bnk_layer_norm_{direction}": layout for direction, layout in LAYER_NORM.items()},
    **{f"bnk_linear_{norm}_norm_{way}": of for norm in ("batch", "layer") for way, of in LINEAR_BATCH_NORM.items()},
    "bnk_mini_batch": MINI_BATCH,
    "bnk_parameter_update": parameter_update.ARGUMENTS,
    "bnk_softmax_cross_entropy": SOFTMAX_CROSS_ENTROPY,
}
# By the end of a kernel's name, the type that it computes in.
DTYPES = {"f16": np.dtype(np.float32), "bf16": np.dtype(np.float32)}
DTYPES |= {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}


@pytest.fixture(scope="module")
def table() -> command.Table:
    try:
        nvrtc.version()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    return command.measure([ARCHITECTURE])


@pytest.fixture(scope="module", params=_source.stems())
def assembly(request: pytest.FixtureRequest, table: command.Table) -> str:
    return nvrtc.ptx(_source.read(request.param), min(nvrtc.architectures()))


def test_no_kernel_spills(table: command.Table) -> None:
    assert command.excesses(table) == []


def test_kernels_and_registers_are_those_of_the_baseline(table: command.Table) -> None:
    assert command.compare(command.baseline_of(table, nvrtc.version())) == []


def test_the_argument_struct_has_the_size_that_python_packs(assembly: str) -> None:
    for kernel, size in ptx.parameter_bytes(assembly).items():
        stem = max((stem for stem in LAYOUTS if kernel.startswith(stem + "_")), key=len)
        assert LAYOUTS[stem][DTYPES[kernel.rpartition("_")[2]]].itemsize == size, kernel


def test_data_move_16_bytes_at_a_time_where_they_lie_in_vectors() -> None:
    """In the spread kernels all data; what is left in single words are vectors of channels and partial results."""
    for stem, loads, stores in (("batch_norm_forward_spread", 2, 1), ("batch_norm_backward_spread", 3, 2)):
        entries = nvrtc.ptx(_source.read(stem), min(nvrtc.architectures())).split(".visible .entry")[1:]
        assert len(entries) == 6
        for entry in entries:
            assert entry.count("ld.global.v4.u32") >= loads
            assert entry.count("st.global.v4.u32") >= stores
            assert not re.search(r"(ld|st)\.global(\.\w+)*\.[bu](16|8)\b", entry), "no number of 16 bits on its own"


def test_16_bit_products_are_those_of_tensor_cores_from_sm_80_on() -> None:
    for direction in ("forward", "backward"):
        text = _source.read(f"linear_batch_norm_{direction}")
        for architecture, there in ((75, False), (80, True), (90, True)):
            for entry in nvrtc.ptx(text, architecture).split(".visible .entry bnk_")[1:]:
                suffix = entry.partition("(")[0].rpartition("_")[2]
                found = set(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)", entry))
                assert found == ({suffix} if there and suffix in ("f16", "bf16") else set()), (architecture, suffix)


def test_no_float_is_added_atomically(assembly: str) -> None:
    assert ptx.float_atomics(assembly) == []


def test_no_product_and_sum_are_contracted_but_by_fma(assembly: str) -> None:
    assert ".rn" in assembly or "bnk_mini_batch" in assembly, "only a copy computes nothing"
    assert ptx.contractible(assembly) == []


def test_the_ptx_checks_see_what_they_look_for(table: command.Table) -> None:
    assembly = nvrtc.ptx('extern "C" __global__ void k(float* a, int n) { atomicAdd(a, float(n)); }', 75)
    assert len(ptx.float_atomics(assembly)) == 1
    with pytest.raises(ValueError, match="k must have one parameter, a struct by value; it has 2"):
        ptx.parameter_bytes(assembly)
    assert ptx.float_atomics("atom.global.add.u32 %r1, [%rd1], 1;") == []
    assert ptx.contractible("mul.ftz.f32 %f1, %f2, %f3;\nadd.f64 %d1, %d2, %d3;\nadd.s32 %r1, %r2, %r3;") == [
        *("mul.ftz.f32", "add.f64"),
    ]
    assert ptx.contractible("mul.rn.ftz.f32 %f1, %f2, %f3;\nfma.rn.f64 %d1, %d2, %d3, %d4;") == []


def test_a_syntax_error_is_reported_at_its_file_and_line(table: command.Table) -> None:
    stem = _source.stems()[0]
    lines = _source.read(stem).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("BNK_KERNEL") or line.startswith("#define BATCH"))
    path = _source.folder() / f"{stem}.cu"
    number = path.read_text(encoding="utf-8").splitlines().index(lines[at]) + 1
    lines[at] = "int syntax error;"
    with pytest.raises(nvrtc.CompileError, match=rf"cuda/{stem}\.cu\({number}\): error"):
        nvrtc.resources("\n".join(lines), ARCHITECTURE)


def test_an_error_in_a_header_is_reported_in_the_header(table: command.Table) -> None:
    text = _source.read(_source.stems()[0]).replace("struct Pair {", "struct Pair { int syntax error;")
    header = (_source.folder() / "common.cuh").read_text(encoding="utf-8").splitlines()
    number = header.index("struct Pair {") + 1
    with pytest.raises(nvrtc.CompileError, match=rf"cuda/common\.cuh\({number}\): error"):
        nvrtc.resources(text, ARCHITECTURE)


def test_a_spill_is_seen(table: command.Table) -> None:
    text = """
        extern "C" __global__ void __launch_bounds__(1024) k(double* a) {
            double v[64];
        #pragma unroll
            for (int i = 0; i < 64; ++i) v[i] = a[threadIdx.x + i];
            __syncthreads();
        #pragma unroll
            for (int i = 0; i < 64; ++i) a[threadIdx.x * 64 + i] = v[i] * v[63 - i];
        }"""
    found = nvrtc.resources(text, ARCHITECTURE)
    assert found["k"].spill_stores > 0
    assert command.excesses({"k": {"90": found["k"]}})[0].startswith("k on sm_90: ")


def test_static_shared_memory_is_seen(table: command.Table) -> None:
    text = 'extern "C" __global__ void k(int* a) { __shared__ int s[8]; s[a[0]] = 1; __syncthreads(); a[1] = s[a[2]]; }'
    assert nvrtc.resources(text, ARCHITECTURE)["k"].static_shared == 32


def test_every_difference_from_the_baseline_is_told(table: command.Table) -> None:
    baseline = {"nvrtc": "13.5", "registers": {"kept": {"75": 30, "90": 32}, "gone": {"90": 20}}}
    found = copy.deepcopy(baseline)
    assert command.differences(found, baseline) == []
    found["registers"] = {"kept": {"75": 30, "90": 40, "100": 8}, "new": {"90": 20}}
    assert command.differences(found, baseline) == [
        "new: not in the baseline",
        "gone: in the baseline, but gone",
        "kept: registers sm_90 32 -> 40, sm_100 no -> 8",
    ]
    found["nvrtc"] = "14.0"
    assert command.differences(found, baseline) == ["new: not in the baseline", "gone: in the baseline, but gone"]


def test_some_architectures_are_compared_with_theirs(
    table: command.Table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", lambda architectures: table if architectures == [90] else {})
    assert command.main(["--only", "90"]) == 0
    assert "kernels for 1 architectures" in capsys.readouterr().out
    for arguments, message in ((["--only", "12"], "not for [12]"), (["--only", "90", "--update"], "leave out --only")):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


def test_a_kernel_of_newer_architectures_is_not_missed_on_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = {"nvrtc": "13.5", "registers": {"kept": {"75": 30, "90": 32}, "of_clusters": {"90": 40}}}
    monkeypatch.setattr(command, "BASELINE", tmp_path / "baseline.json")
    command.BASELINE.write_text(json.dumps(baseline))
    assert command.compare({"nvrtc": "13.5", "registers": {"kept": {"75": 30}}}) == []
    assert command.compare({"nvrtc": "13.5", "registers": {"kept": {"90": 32}}}) == [
        "of_clusters: in the baseline, but gone"
    ]


def test_the_command_fails_on_a_difference(
    table: command.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(command, "measure", lambda architectures: table)
    assert command.main(["--update"]) == 0
    assert command.main([]) == 0
    kernel = next(iter(table))
    changed = table | {kernel: {"90": table[kernel]["90"]._replace(registers=1, spill_loads=4)}}
    monkeypatch.setattr(command, "measure", lambda architectures: changed)
    capsys.readouterr()
    assert command.main([]) == 1
    printed = capsys.readouterr()
    assert f"{kernel} on sm_90: 4 bytes of spill loads, must be 0" in printed.err
    assert f"{kernel}: registers sm_90 {table[kernel]['90'].registers} -> 1\n" in printed.err
    assert printed.out.endswith("1 failures, 1 differences from the baseline\n")
