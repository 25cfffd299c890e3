"""Counts of an LSTM beside other libraries: what is counted, and the page that shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.counts import recurrent, recurrent_peers
from benchmarks.harness.case import Case
from benchmarks.ops import bench_lstm
from benchmarks.report import recurrent as page
from benchmarks.report.documents import load
from tools.emulator import EmulatedArray, EmulatorRuntime

SHAPE = 5, 6, 2, 7


@pytest.mark.emulator
@pytest.mark.parametrize("norm", ["", ", batch norm", ", layer norm"])
@pytest.mark.parametrize("way", ["forward", "both ways"])
def test_a_step_of_ours_adds_no_launch(emulated: EmulatorRuntime, way: str, norm: str) -> None:
    case = Case("lstm", way + norm, SHAPE)
    step, once = recurrent.of_step(case, recurrent.ours)
    assert step.launches == 0
    whole = recurrent.ours(case)
    assert (len(whole), sum(whole)) == (once.launches, once.bytes + SHAPE[0] * step.bytes)  # as it is for 3 and 4


@pytest.mark.emulator
@pytest.mark.plain_build
def test_the_bytes_of_a_forward_are_those_of_its_arrays(emulated: EmulatorRuntime) -> None:
    steps, rows, inputs, units = SHAPE
    found = sorted(recurrent.ours(Case("lstm", "forward", SHAPE)))
    weights, state, gates = 4 * units * units, rows * units, 4 * rows * units
    product = steps * rows * inputs + 4 * units * inputs + steps * gates
    read = steps * gates + gates + 2 * state + steps * state + weights + 4 * units + steps  # c0 and c, h0 and h
    written = steps * gates + gates + state + steps * state + 2 * state  # gates, h W, c, h, h_n and c_n
    counter = 1 + 1  # the grid barrier's, read and written
    assert found == sorted(4 * number for number in (steps, product, read + written + counter))


def test_calls_of_a_library_are_noted() -> None:
    a, b = (np.ones(shape, np.float32).view(EmulatedArray) for shape in ((2, 3), (3, 4)))
    with recurrent.library_calls(EmulatedArray) as calls:
        out = np.empty((2, 4), np.float32).view(EmulatedArray)
        np.matmul(a, b, out=out)
        out += 1
        out[...] = 0
        out[2:] = 0  # nothing
        made = a.T + 1
    assert calls == [4 * (6 + 12 + 8), 2 * 4 * 8, 4 * 8, 2 * 4 * 6]
    assert type(made) is EmulatedArray
    assert not out.any()
    assert "__setitem__" not in vars(EmulatedArray)


def test_operators_of_pytorch(torch: ModuleType) -> None:
    """A cell is two products and what is behind them; every way through a norm needs more."""
    plain = recurrent.of_step(Case("lstm", "forward", SHAPE), recurrent_peers.torch_cells)[0]
    assert plain.launches == 3
    for norm in ("batch", "layer"):
        step = recurrent.of_step(Case("lstm", f"forward, {norm} norm", SHAPE), recurrent_peers.torch_loop)[0]
        # Products, norms, their sum and the bias's, three products of gates and a sum, five activations.
        assert step.launches == 2 + 3 + 2 + 4 + 5
        both = recurrent.of_step(Case("lstm", f"both ways, {norm} norm", SHAPE), recurrent_peers.torch_loop)[0]
        assert both.launches > 2 * step.launches


def test_operators_of_tensorflow() -> None:
    pytest.importorskip("tensorflow")
    step = recurrent.of_step(Case("lstm", "forward", SHAPE), recurrent_peers.tensorflow_graph)[0]
    # Products, their sum, bias and split; three products of gates and a sum, five activations.
    assert step.launches == 2 + 3 + 4 + 5


def test_who_is_not_counted_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, case = tmp_path / "recurrent.json", bench_lstm.OP.cases[0]
    monkeypatch.setattr(recurrent, "PATH", path)
    monkeypatch.setattr(bench_lstm, "OP", replace(bench_lstm.OP, cases=[case]))
    monkeypatch.setattr(recurrent, "ours", lambda case: [1] * 7)
    monkeypatch.setattr(recurrent_peers, "found", lambda: {"B": ("2", lambda case: [8] * case.shape[0], [case])})
    assert recurrent.main([]) == 0
    monkeypatch.setattr(recurrent_peers, "found", dict)
    assert recurrent.main([]) == 0
    document = load(path)
    assert document["versions"] == {"B": "2"}
    assert [(row["provider"], row["step"], row["once"]) for row in document["rows"]] == [
        ("bnkernels", [0, 0], [7, 7]),
        ("B", [1, 8], [0, 0]),
    ]


def test_the_page_shows_step_and_sequence() -> None:
    row = {"shape": [10, 2, 1, 3], "provider": "A"}
    rows = [row | {"direction": way, "step": [2, 1000], "once": [-1, 5]} for way in page.WAYS]
    text = page.page({"versions": {"A, b": "1", "A, c": "1"}, "rows": rows})
    assert "## 10 time steps, 2 examples, 1 input, 3 hidden units" in text
    assert "| no norm | A | 2 | 1,000 | 2 | 1,000 | 19 | 10,005 |" in text
    assert "\n\nA 1." in text
    assert "not counted" in text
    assert page.page(None) == "Launches and bytes: not yet measured."
