"""The cost of the first call: which kernels count, and that the command says what it measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.steps import first_call
from bnkernels.runtime.source import entry_points


@pytest.mark.emulator
def test_the_kernels_are_those_of_a_training_run() -> None:
    layers, fused = (first_call.launched(engine) for engine in first_call.ENGINES)
    assert ("batch_norm_forward", "bnk_batch_norm_forward_registers4_f32") in [kernel[:2] for kernel in layers]
    constants = {name: dict(given) for _, name, given in fused}
    assert constants["bnk_fused_training_f32"]["batch"] == 64
    assert not any(source == "fused_training" for source, *_ in layers)
    for kernels in (layers, fused):
        assert len(set(kernels)) == len(kernels)
        assert all(name in entry_points(source) for source, name, _ in kernels)


def test_a_new_process_reads_the_texts_and_reports_what_goes_wrong() -> None:
    kernels = [("batch_norm_statistics", "bnk_batch_norm_statistics_f32")]
    imported, read, compiled = first_call.child(kernels, "read")
    assert 0 < read < imported < 60
    assert compiled == []
    with pytest.raises(RuntimeError, match=r"LookupError: cuda/batch_norm_statistics\.cu makes no kernel bnk_x"):
        first_call.child([("batch_norm_statistics", "bnk_x")], "read")


@pytest.mark.parametrize(("seconds", "verdict"), [(0.4, "met"), (1.4, "not met")])
def test_the_lines_say_what_is_met(seconds: float, verdict: str) -> None:
    kernels = [{"kernel": "bnk_x", "compile_s": seconds}]
    found: dict[str, Any] = {"kernels": kernels, "cold_s": seconds, "import_s": seconds / 20, "read_s": 0.01}
    lines = first_call.text({"engines": {"fused": found}}).splitlines()
    assert lines[0] == "engine fused"
    assert lines[2].endswith(f"at most 1, {verdict}")
    assert f"at most 50, {verdict}; CuPy's own part: not measured" in lines[3]
