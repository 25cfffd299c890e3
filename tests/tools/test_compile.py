"""The kernels as NVRTC compiles them: arguments, arithmetic; and that ``make compile`` reports what is wrong."""

from __future__ import annotations

import json
import locale
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bnkernels.ops.activations import activation_named
from bnkernels.runtime import source
from tests.argument_structs import LAYOUTS, struct_of
from tools.compile import __main__ as command
from tools.compile import nvrtc, ptx, sass

ARCHITECTURE = 90
# By the end of a kernel's name, the type that it computes in.
DTYPES = {"f16": np.dtype(np.float32), "bf16": np.dtype(np.float32)}
DTYPES |= {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
# The first and the last kernel of every file, which differ in their data types.
COMPILED = [
    (stem, kernel)
    for stem in source.stems()
    for kernel in source.entry_points(stem)[:: max(1, len(source.entry_points(stem)) - 1)]
]


pytestmark = pytest.mark.usefixtures("nvrtc")


def test_the_baseline_holds_the_compilers_that_are_installed_and_all_their_architectures() -> None:
    pinned = Path(nvrtc.__file__).with_name("compilers.txt").read_text(encoding="utf-8")
    for file in command.FOLDER.glob("baseline*.json"):
        version = json.loads(file.read_text(encoding="utf-8"))["nvrtc"]
        assert command.baseline_file(version) == file
        assert f"=={version}" in pinned
    for version in nvrtc.VERSIONS:
        baseline = command.baseline(version)
        compiled = {int(architecture) for row in baseline["registers"].values() for architecture in row}
        assert compiled == set(nvrtc.architectures(version))
    registers, instructions = (command.baseline(nvrtc.NEWEST)[figure] for figure in command.FIGURES)
    for kernel, row in registers.items():
        assert list(instructions[kernel]) == [str(one) for one in sass.ARCHITECTURES if str(one) in row]


@pytest.mark.parametrize(("stem", "kernel"), COMPILED)
def test_ptx_takes_what_python_packs_and_needs_no_options_of_cupys(
    stem: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the oldest compiler with our options alone: no kernel leans on those of CuPy, which `make compile` has."""
    monkeypatch.setattr(nvrtc, "OPTIONS", source.OPTIONS)
    text = source.read(stem, kernel, command.CONSTANTS.get(stem, ()))
    assembly = nvrtc.ptx(text, ARCHITECTURE, nvrtc.OLDEST)
    size = LAYOUTS[struct_of(stem, kernel)][DTYPES[kernel.rpartition("_")[2]]].itemsize
    assert ptx.parameter_bytes(assembly) == {kernel: size}
    assert ".rn" in assembly or stem == "mini_batch", "only a copy computes nothing"


def test_data_move_16_bytes_at_a_time_where_they_lie_in_vectors() -> None:
    """All data of the cooperative kernels for vectors; only parameters and partial results move in single words."""
    for stem, loads, stores in (("batch_norm_forward_cooperative", 2, 1), ("batch_norm_backward_cooperative", 3, 2)):
        kernels = source.entry_points(stem)
        vectors = [kernel for kernel in kernels if not re.search(r"_(pair|single)_", kernel)]
        assert (len(vectors), len(kernels)) == (6, 18)
        for kernel in vectors:
            entry = nvrtc.ptx(source.read(stem, kernel, command.CONSTANTS[stem]), nvrtc.OLDEST_ARCHITECTURE)
            assert entry.count("ld.global.v4.u32") >= loads
            assert entry.count("st.global.v4.u32") >= stores
            assert not re.search(r"(ld|st)\.global(\.\w+)*\.[bu](16|8)\b", entry), "no number of 16 bits on its own"


@pytest.mark.parametrize("version", nvrtc.VERSIONS)
def test_masked_kernels_with_the_most_numbers_do_not_spill(version: str) -> None:
    """The baseline has the kernels without a mask; the registers of eight channels a thread are the fewest to spare."""
    gelu = activation_named("gelu", None).code  # the longest
    for stem in command.CONSTANTS:
        if stem.startswith("batch_norm"):
            constants = ("activation", gelu), ("masked", 1), ("groups", 1)
            assert_nothing_spills(stem, f"bnk_{stem}_f16", constants, version)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "stages"), [("f16", 2), ("f64", 1)])  # the most, as the planner has them
@pytest.mark.parametrize("last", ["", "last_"])
@pytest.mark.parametrize("inner", [49, 3136])
@pytest.mark.parametrize("rows", ["", "_cooperative"])
def test_kernels_of_group_norm_do_not_spill(rows: str, inner: int, last: str, suffix: str, stages: int) -> None:
    """The baseline has those of layer norm; here they are as launched, with gelu and rows that are not aligned."""
    launched = {"activation": activation_named("gelu", None).code, "shape": 0, "scaled": 1, "shifted": 1, "centred": 1}
    launched |= {"channel_groups": 32, "inner": inner, "adjacent": 10 if last else 0}
    launched |= {"held": 2, "stages": stages, "at_once": 1}
    for stem, variant in ((f"layer_norm_forward{rows}", ""), (f"layer_norm_backward{rows}", "curved_")):
        kernel = f"bnk_{stem}_{variant}{last}{suffix}"
        names = LAYOUTS[struct_of(stem, kernel)][DTYPES[suffix]].names
        constants = tuple((name, code) for name, code in launched.items() if name in names)
        assert_nothing_spills(stem, kernel, constants, nvrtc.NEWEST)


def assert_nothing_spills(stem: str, kernel: str, constants: tuple, version: str) -> None:
    """Compile a kernel for the oldest architecture and for sm_90."""
    text = source.read(stem, kernel, constants)
    for architecture in (75, 90):
        found = nvrtc.resources(text, architecture, version)[kernel]
        assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0), (kernel, architecture)


def test_16_bit_products_are_those_of_tensor_cores_from_sm_80_on() -> None:
    for stem in ("linear_batch_norm_forward", "linear_batch_norm_backward"):
        for suffix in ("f16", "bf16", "f32"):
            text = source.read(stem, f"bnk_{stem}_{suffix}")
            for architecture, there in ((75, False), (80, True), (90, True)):
                assembly = nvrtc.ptx(text, architecture)
                found = set(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)", assembly))
                assert found == ({suffix} if there and suffix != "f32" else set()), (architecture, suffix)


def test_every_product_of_tf32x3_is_made_by_tensor_cores() -> None:
    """Three instructions for each of a warp's 2 x 4 tiles; the forward multiplies once, the backward twice."""
    for direction, products in (("forward", 1), ("backward", 2)):
        for norm in ("batch", "layer"):
            text = source.read(f"linear_batch_norm_{direction}", f"bnk_linear_{norm}_norm_{direction}_tf32x3_f32")
            instruction = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
            assert nvrtc.ptx(text, 80).count(instruction) == 3 * 2 * 4 * products
            assert ".visible .entry" not in nvrtc.ptx(text, 75)


def test_the_ptx_checks_see_what_they_look_for() -> None:
    text = 'extern "C" __global__ void k(float* a, int n) { atomicAdd(a, float(n)); }'
    assembly, found = nvrtc.ptx(text, 75), nvrtc.resources(text, 75)
    assert (len(ptx.float_atomics(assembly)), found["k"].float_atomics) == (1, 1)
    assert "k on sm_75: 1 atomic sums, whose order changes from run to run, must be 0" in command.excesses(
        {"k": {"75": found["k"]}}
    )
    with pytest.raises(ValueError, match="k must have one parameter, a struct by value; it has 2"):
        ptx.parameter_bytes(assembly)
    assert ptx.float_atomics("atom.global.add.u32 %r1, [%rd1], 1;") == []
    assert ptx.contractible("mul.ftz.f32 %f1, %f2, %f3;\nadd.f64 %d1, %d2, %d3;\nadd.s32 %r1, %r2, %r3;") == [
        *("mul.ftz.f32", "add.f64"),
    ]
    two = ".visible .entry a(.param .u64 p) { add.f32 %f1; }\n.visible .entry b(.param .u64 p) { add.rn.f32 %f1; }"
    assert [len(ptx.contractible(text)) for text in ptx.entries(two).values()] == [1, 0]
    assert ptx.contractible("mul.rn.ftz.f32 %f1, %f2, %f3;\nfma.rn.f64 %d1, %d2, %d3, %d4;") == []


def test_a_syntax_error_is_reported_at_its_file_and_line() -> None:
    stem = source.stems()[0]
    lines = source.read(stem).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("BNK_KERNEL") or line.startswith("#define BATCH"))
    path = source.folder() / f"{stem}.cu"
    number = path.read_text(encoding="utf-8").splitlines().index(lines[at]) + 1
    lines[at] = "int syntax error;"
    with pytest.raises(nvrtc.CompileError, match=rf"cuda/{stem}\.cu\({number}\): error"):
        nvrtc.resources("\n".join(lines), ARCHITECTURE)


def test_an_error_in_a_header_is_reported_in_the_header() -> None:
    text = source.read(source.stems()[0]).replace("struct Pair {", "struct Pair { int syntax error;")
    header = (source.folder() / "lib/numbers/pair.cuh").read_text(encoding="utf-8").splitlines()
    number = header.index("struct Pair {") + 1
    with pytest.raises(nvrtc.CompileError, match=rf"cuda/lib/numbers/pair\.cuh\({number}\): error"):
        nvrtc.resources(text, ARCHITECTURE)


def test_a_spill_is_seen() -> None:
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


@pytest.mark.parametrize("version", nvrtc.VERSIONS)
def test_a_compiler_leaves_the_locale_as_it_was(version: str) -> None:
    """NVRTC 12.0 does not, and what a later test decoded was ASCII."""
    before = locale.getpreferredencoding(False)
    nvrtc.ptx('extern "C" __global__ void k() {}', ARCHITECTURE, version)
    assert locale.getpreferredencoding(False) == before


def test_static_shared_memory_is_seen() -> None:
    text = 'extern "C" __global__ void k(int* a) { __shared__ int s[8]; s[a[0]] = 1; __syncthreads(); a[1] = s[a[2]]; }'
    assert nvrtc.resources(text, ARCHITECTURE)["k"].static_shared == 32


def test_every_difference_from_the_baseline_is_told() -> None:
    baseline = {
        "registers": {"kept": {"75": 30, "90": 32}, "gone": {"90": 20}},
        "instructions": {"kept": {"90": 100}, "gone": {"90": 9}},
    }
    assert command.differences(baseline, baseline) == []
    found = {
        "registers": {"kept": {"75": 30, "90": 40, "100": 8}, "new": {"90": 20}},
        "instructions": {"kept": {"90": 101}, "new": {"90": 9}},
    }
    assert command.differences(found, baseline) == [
        "new: not in the baseline",
        "gone: in the baseline, but gone",
        "kept: registers sm_90 32 -> 40, sm_100 no -> 8",
        "kept: instructions sm_90 100 -> 101",
    ]


def test_a_kernel_of_newer_architectures_is_not_missed_on_an_older_one() -> None:
    baseline = {"registers": {"kept": {"75": 30, "90": 32}, "of_clusters": {"90": 40}}, "instructions": {}}
    assert command.differences({"registers": {"kept": {"75": 30}}, "instructions": {}}, baseline) == []
    assert command.differences({"registers": {"kept": {"90": 32}}, "instructions": {}}, baseline) == [
        "of_clusters: in the baseline, but gone"
    ]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let compilers find in one kernel, which they need not compile, these registers; and the baseline be a copy."""
    registers = dict.fromkeys(nvrtc.VERSIONS, 30)

    def measure(version: str, architectures: list[int], stems: Sequence[str]) -> command.Table:
        return {"k": {str(one): nvrtc.Resources(registers[version], 0, 0, 0, 0) for one in architectures}}

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert command.main(["--update"]) == 0
    return registers


@pytest.mark.parametrize("version", nvrtc.VERSIONS)
def test_the_command_fails_on_a_difference_of_either_compiler(
    version: str, measured: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([]) == 0
    measured[version] = 31
    capsys.readouterr()
    assert command.main(["--only", "90"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("k: registers sm_90 30 -> 31") == 1
    assert f"1 kernels for 1 architectures with NVRTC {version}: 0 failures, 1 differences" in printed.out
    assert command.main(["--update"]) == 0
    assert command.main([]) == 0


def test_one_file_is_compared_and_updated_on_its_own(
    measured: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    kept, gone = source.entry_points("mini_batch")[0], "bnk_which_no_file_makes_any_more"
    rows = {kernel: {"90": 1} for kernel in (kept, gone)}
    command.update_baseline(nvrtc.NEWEST, {"registers": rows, "instructions": rows})
    one = ["--nvrtc", nvrtc.NEWEST, "--kernel", "mini_batch"]
    assert command.main(["--update", *one]) == 0
    assert command.main(one) == 0
    known = command.baseline(nvrtc.NEWEST)
    assert [sorted(known[figure]) for figure in command.FIGURES] == [[kept, "k"], [kept]]
    measured[nvrtc.NEWEST] += 1
    assert command.main(one) == 1
    assert "k: registers sm_75 30 -> 31" in capsys.readouterr().err


@pytest.mark.usefixtures("measured")
def test_the_command_says_what_it_does_not_compare(capsys: pytest.CaptureFixture[str]) -> None:
    command.baseline_file(nvrtc.NEWEST).unlink()
    assert command.main(["--nvrtc", nvrtc.NEWEST, "--only", "90"]) == 0
    assert f"with NVRTC {nvrtc.NEWEST}: 0 failures, which the baseline lacks" in capsys.readouterr().out
    newer = set(nvrtc.architectures()) - set(nvrtc.architectures(nvrtc.OLDEST))
    if newer:
        assert command.main(["--only", str(max(newer))]) == 0
        assert f"NVRTC {nvrtc.OLDEST} knows none of these architectures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--only", "12"], "not for [12]"), (["--only", "90", "--update"], "leave out --only")]
)
def test_the_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_spills_and_errors_of_a_compiler_fail_the_command(
    measured: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(version: str, architectures: list[int], stems: Sequence[str]) -> command.Table:
        if version == nvrtc.NEWEST:
            return {"k": {"90": nvrtc.Resources(30, 0, 4, 0, 0)}}
        raise nvrtc.CompileError("cuda/x.cu(1): error")

    monkeypatch.setattr(command, "measure", measure)
    assert command.main([]) == 1
    printed = capsys.readouterr().err
    assert "k on sm_90: 4 bytes of spill loads, must be 0" in printed
    if nvrtc.OLDEST != nvrtc.NEWEST:
        assert printed.startswith(f"NVRTC {nvrtc.OLDEST}\ncuda/x.cu(1): error\n")


def test_a_compiler_that_is_not_there_is_named_with_the_way_out() -> None:
    with pytest.raises(FileNotFoundError, match=r"one libnvrtc.so of NVRTC 1\.0 in .*; python3 tools/install\.py test"):
        nvrtc.architectures("1.0")
