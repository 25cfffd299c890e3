"""The kernel in stages: each computes the formula, and what is counted is what the stages are about."""

from __future__ import annotations

import pytest

from benchmarks import stages


@pytest.mark.emulator
@pytest.mark.plain_build
def test_the_stages_read_less_and_less() -> None:
    found = {stage.name: stage for stage in stages.measure(20)}
    ours = found.popitem()[1]
    assert {name: (stage.read, stage.written) for name, stage in found.items()} == {
        "three_reads": (3, 1),
        "on_chip": (1, 1),
        "vectors": (1, 1),
    }
    assert (ours.read, ours.written, ours.barriers, ours.instructions) == (1, 1, 1, None)
    assert found["three_reads"].instructions > 3 * 64 > ours.registers
    lines = stages.table([*found.values(), ours]).splitlines()
    assert lines[0].split() == [
        "neurons",
        "kernel",
        "x",
        "read",
        "y",
        "written",
        "barriers",
        "registers",
        "warps",
        "instructions",
        "in",
        "all",
    ]
    assert lines[1].split()[:4] == ["20", "three_reads", "3", "1"]
    assert lines[-1].startswith("     20  bnk_batch_norm_forward_")
