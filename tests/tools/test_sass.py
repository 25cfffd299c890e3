"""The machine code of the kernels: what a disassembly tells, and that ``make sass`` shows it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.counts import sass as report
from benchmarks.counts.devices import H200
from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training import launch
from bnkernels.runtime import source
from tools.compile import __main__ as command
from tools.compile import nvrtc, sass

pytestmark = pytest.mark.usefixtures("nvrtc")

DISASSEMBLY = """
	.section	.nv.info.k,"",@"SHT_CUDA_INFO"
	//----- nvinfo : EIATTR_MAX_THREADS
	.align		4
        /*0134*/ 	.byte	0x04, 0x05
        /*0138*/ 	.word	0x00000140

//--------------------- .text.k --------------------------
	.section	.text.k,"ax",@progbits
	.align	128
k:
.text.k:
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/                   LDG.E.64.CONSTANT R2, desc[UR4][R12.64] ;
        /*0020*/              @!P0 LDG.E R2, desc[UR4][R12.64] ;
        /*0030*/              @UP1 BRA `(.L_x_1) ;
.L_x_1:
        /*0040*/               @P0 EXIT ;
        /*0050*/                   NOP;

	.section	.nv.constant0.k,"a",@progbits
        /*0000*/ 	.byte	0x00, 0x00
"""


def test_a_disassembly_is_read() -> None:
    assert sass.parse(DISASSEMBLY) == {"k": sass.MachineCode(5, 96, 1, 320)}


@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_a_load_that_may_miss_what_the_launch_writes_is_seen(architecture: int) -> None:
    text = 'extern "C" __global__ void __launch_bounds__(96) k(const int* %s a, int* %s b) { b[1] = a[0]; }'
    for qualifier, loads in ("", 0), ("__restrict__", 1):
        found = nvrtc.resources(text % (qualifier, qualifier), architecture, disassemble=True)
        code = found["k"].code
        assert (code.constant_loads, code.threads) == (loads, 96)
        assert 0 < code.instructions <= code.code_bytes / 16
        lines = command.excesses({"k": {str(architecture): found["k"]}})
        assert lines == [f"k on sm_{architecture}: 1 loads by LDG.CONSTANT, must be 0"][:loads]


def test_a_kernel_compiled_for_one_network_is_shorter() -> None:
    model, dtype = MLP((64, 20, 10)), np.dtype("float32")
    sizes = launch.Problem(model.fused, 64, "sgd", dtype, model.parameters.size, model.running.size)
    constants = launch.choose(sizes, H200.choice).launch.constants
    texts = (source.read("fused_training", "bnk_fused_training_f32", given) for given in ((), constants))
    general, ours = (nvrtc.resources(text, 90, disassemble=True) for text in texts)
    assert ours["bnk_fused_training_f32"].code.instructions < 0.8 * general["bnk_fused_training_f32"].code.instructions


def test_the_table_of_machine_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--only", "90", "--kernel", "softmax_cross_entropy"]) == 0
    head, *lines, last = [line for line in capsys.readouterr().out.splitlines() if line]
    kernel, *cells = lines[0].split()
    instructions, code_bytes, registers, threads, occupancy = cells[1:6]
    known = command.baseline(nvrtc.NEWEST)
    assert head.split()[:2] == ["kernel", "sm"]
    assert [int(instructions), int(registers)] == [
        known[figure][kernel]["90"] for figure in ("instructions", "registers")
    ]
    assert int(code_bytes) % 128 == 0
    assert (threads, occupancy, cells[6:]) == ("256", "75%", ["0", "0"])
    assert (
        last == f"8 kernels for 1 architectures with NVRTC {nvrtc.NEWEST}: 0 failures, 0 differences from the baseline"
    )


@pytest.mark.parametrize("run", [command.main, report.main])
def test_a_missing_disassembler_is_one_line_with_the_way_out(
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sass, "PACKAGE", "nvidia-cuda-nothing")
    assert run([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"nvdisasm is missing: python3 tools/install\.py test installs .*, of which .*\n", printed.err)
