"""What batch norm adds in instructions, counted in the PTX of the kernels: at most a tenth."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import bnkernels as bn
from benchmarks import instructions
from benchmarks.harness.timing import ROOT
from benchmarks.instructions import LAYERS, MOST, NORMS, TRAINERS, Line
from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training import launch
from tests.ptx import Counts, registered
from tools.compile import nvrtc

pytestmark = pytest.mark.usefixtures("nvrtc")


def documented(page: str, name: str, line: Line) -> None:
    """Assert that a page of ``docs/`` has these counts, and says which NVRTC they belong to."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    row = f"| {name} | {line.without.total:,} | {line.batch.total:,} | {line.ratio:.3f} |"
    assert row in text, "run python -m benchmarks.instructions"
    assert f"NVRTC {nvrtc.NEWEST}" in text


@pytest.mark.parametrize("sizes", TRAINERS)
def test_a_training_step_executes_little_more_with_batch_norm(sizes: tuple[int, ...]) -> None:
    line = Line("", *(instructions.training_step(sizes, norm) for norm in NORMS))
    assert 1 < line.ratio <= MOST
    without, batch = line.without.by_kind, line.batch.by_kind
    documented("fused_training", "-".join(map(str, sizes)), line)
    assert batch["barrier"] == without["barrier"], "a team adds up by shuffles"
    assert batch["shuffle"] > without["shuffle"]


def test_nor_does_a_step_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_why_no_block", lambda *_: "a test wants groups")
    line = Line("", *(instructions.training_step.__wrapped__((64, 40, 10), norm) for norm in NORMS))
    assert registered().launches[-1].launch.grid == (1, 16, 1)
    assert 1 < line.ratio <= MOST
    assert line.batch.by_kind["barrier"] == line.without.by_kind["barrier"]


@pytest.mark.parametrize("form", ["block", "group"])
def test_a_kernel_compiled_for_a_network_does_the_same_with_less(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "group":
        monkeypatch.setattr(launch, "_why_no_block", lambda *_: "a test wants groups")
    found = []
    for constants in (launch.Sizes.constants, ()):
        monkeypatch.setattr(launch.Sizes, "constants", constants)
        runtime, model = registered(), MLP((6, 9, 3), activation="tanh")
        rng = np.random.default_rng(0)
        data = rng.standard_normal((21, 6), dtype="float32"), rng.integers(0, 3, 21).astype(np.int32)
        parameters, running, *data = map(runtime.asarray, (model.parameters, model.running, *data))
        runtime.reset()
        losses = bn.fused_training(model.fused, parameters, (), running, *data, batch=7, lr=0.1)
        (record,) = runtime.launches
        found.append((np.concatenate([losses, parameters, running]), record.counts.total))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] < 0.97 * found[1][1]


@pytest.mark.parametrize("sizes", LAYERS)
def test_a_linear_layer_executes_at_most_a_tenth_more_with_batch_norm(sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    both = zip(*(instructions.linear_layer(sizes, norm) for norm in NORMS), strict=True)
    for direction, counts in zip(("forward", "backward"), both, strict=True):
        line = Line("", *counts)
        assert 1 < line.ratio <= MOST
        documented("linear_batch_norm", f"{rows}x{inputs} -> {outputs}, {direction}", line)
        assert line.batch.by_kind["barrier"] == line.without.by_kind["barrier"]


def test_the_products_of_a_step_are_counted() -> None:
    """At least the fma of the three products of every layer, 32 of them an instruction."""
    for sizes in TRAINERS:
        weights = sum(a * b for a, b in pairwise(sizes))
        products = 3 * weights - sizes[0] * sizes[1]  # no gradient of the inputs
        assert instructions.training_step(sizes, None).by_kind["float"] >= products * instructions.BATCH / 32


def test_the_command_says_what_was_counted_and_what_is_above(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few, more = (Counts(dict.fromkeys(Counts().by_kind, number)) for number in (100, 109))
    good, bad = Line("good", few, more), Line("bad", few, more + more)
    monkeypatch.setattr(instructions, "lines", lambda: [good])
    assert instructions.main() == 0
    printed = capsys.readouterr().out
    assert f"sm_90 of NVRTC {nvrtc.NEWEST}, before ptxas" in printed
    assert "| good | none | 900 |  |  | 100 |" in printed
    assert "|  | batch | 981 | 1.090 | 1.090 | 109 |" in printed
    monkeypatch.setattr(instructions, "lines", lambda: [good, bad])
    assert instructions.main() == 1
    assert capsys.readouterr().out.endswith(
        "\n1 of 2 at most 1.10 times the instructions of the same without batch norm\n"
    )
