"""Paths through machine code: loops, what is left out, and the cycles of dependent instructions."""

from __future__ import annotations

import pytest

from bnkernels.runtime import source
from tools.compile import nvrtc, paths, sass

pytestmark = pytest.mark.usefixtures("nvrtc")

KERNEL = """
extern "C" __global__ void __launch_bounds__(32) k(const float* x, float* y, int n, float d) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < n; ++i)
        sum = x[(int)sum];
    if (d < 0.0f)
        sum = sqrtf(sum) / (d + 2.0f) + sqrtf(d);
    y[threadIdx.x] = sum;
}
"""
LOOP, BRANCH = "for (int i", "sqrtf(sum)"


def machine(text: str = KERNEL) -> paths.Machine:
    """Return the machine code of a text that names itself cuda/k.cu."""
    cubin = nvrtc.cubin('#line 1 "cuda/k.cu"\n' + text.lstrip("\n"), 90)
    code, labels = paths.parse(sass.text_of(cubin, "-c", "-hex", "-gi"))
    return paths.Machine(code, labels, {"k.cu": text.lstrip("\n").splitlines()})


def test_every_turn_of_a_loop_waits_for_its_load() -> None:
    k = machine()
    (loop,) = [one for one in k.loops(k.reachable(), 0)]
    assert LOOP in loop.line
    few, many = (k.path({LOOP: (times,)}, avoid=[BRANCH]) for times in (10, 110))
    body = (k.instructions(many) - k.instructions(few)) / 100
    assert 4 <= body <= 12
    turn = (k.cycles(many) - k.cycles(few)) / 100
    assert paths.LATENCIES["LDG"] < turn < paths.LATENCIES["LDG"] + 60
    assert (k.cycles(many, 700) - k.cycles(few, 700)) / 100 == turn + 700 - paths.LATENCIES["LDG"]


def test_the_longest_path_has_the_branch_unless_its_line_is_avoided_and_never_a_call() -> None:
    k = machine()
    without, longest = k.path({LOOP: (1,)}, avoid=[BRANCH]), k.path({LOOP: (1,)})
    assert k.instructions(longest) > k.instructions(without) + 10
    assert any(one.kind == "MUFU" for one in k.executed(longest))
    assert not any(one.kind == "MUFU" for one in k.executed(without))
    assert any(one.kind == "CALL" for one in k.code)
    assert not any(one.kind == "CALL" for one in k.executed(longest))


def test_loops_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 loops expected at 'for \(int i', found 1 among \['for \(int i"):
        machine().path({LOOP: (1, 2)})
    with pytest.raises(ValueError, match="1 loops expected at 'while', found 0"):
        machine().path({"while": (3,)})


COPIES = """
extern "C" __global__ void __launch_bounds__(32) k(const float* x, float* y) {
    extern __shared__ float s[];
    for (int i = 0; i < 2; ++i) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(0), "l"(x + i) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    asm volatile("cp.async.wait_group PENDING;" ::: "memory");
    y[threadIdx.x] = s[threadIdx.x];
}
"""


def test_a_copy_is_waited_for_where_its_group_is() -> None:
    cycles = []
    for pending in "012":
        k = machine(COPIES.replace("PENDING", pending))
        cycles.append(k.cycles(k.path({}), 5000))
    assert cycles[0] >= cycles[1] > 5000 > 1000 > cycles[2]


def test_the_lines_of_a_kernel_are_those_of_its_files() -> None:
    k = paths.machine("softmax_cross_entropy", source.entry_points("softmax_cross_entropy")[0])
    found = {line for one in k.code for line in k.lines(one)}
    assert any("__shfl_xor_sync" in line for line in found)
    assert sum(one.bytes_loaded for one in k.code) > 0
