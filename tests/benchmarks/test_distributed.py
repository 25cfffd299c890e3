"""The benchmark of ranks, and the model of many of them: fitted, sound at its ends, told from what is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.distributed import __main__ as command
from benchmarks.distributed import model
from benchmarks.report import distributed

A, B = 5.0, 1e-3
AT, RELATIVE = [0, 0.5, 0.99, 1], [0.9, 1, 1.2, 3]


def document(a: float = A, b: float = B, relative: list[float] = RELATIVE) -> dict[str, Any]:
    """Return measurements as a machine of these constants would give them."""

    def us(value: float) -> dict[str, float]:
        return {"median": value, "p20": value, "p80": value}

    gathers = [
        {"ranks": ranks, "bytes": size, "us": us(a * math.log2(ranks) + b * size * (ranks - 1))}
        for ranks in (1, 2, 3, 4)
        for size in (64, 4096, 2**18)
    ]
    steps = [
        {"ranks": ranks, "network": "64-20-10", "parameters": 1568, "way": way, "us": us(100.0)}
        for ranks in (1, 2)
        for way in ("alone", "synchronised", "ghost batches")
    ]
    layers = [
        {"ranks": 2, "shape": "64x20", "provider": name, "collectives": 2, "bytes": [320, 240], "us": us(time)}
        for name, time in ((distributed.OURS, 50.0), (distributed.PYTORCH, 200.0))
    ]
    delays = [{"ranks": ranks, "us": 20.0, "at": AT, "relative": relative} for ranks in (1, 2)]
    about = {"place": "cpu", "device": "a machine, 2 cores", "versions": {}, "commit": "0", "date": "2026-01-01"}
    found = {"layers": layers, "gathers": gathers, "delays": delays, "steps": steps}
    return about | {"threads": 1, "cores": 2, "load": 0.1} | found


def test_the_fit_finds_the_machine_that_made_the_figures() -> None:
    machine = model.fit(document())
    assert machine.a == pytest.approx(A)
    assert machine.b == pytest.approx(B)
    assert machine.gather(1000, 8) == pytest.approx(3 * A + 7000 * B)


def test_one_rank_neither_exchanges_nor_waits() -> None:
    machine, (network,) = model.fit(document()), model.networks(document()).values()
    for way in model.WAYS:
        assert model.predict(machine, network, way, 1) == pytest.approx(network.work)


@pytest.mark.parametrize("ranks", [2, 64, 10000])
def test_who_exchanges_less_is_faster(ranks: int) -> None:
    machine, (network,) = model.fit(document()), model.networks(document()).values()
    times = {way: model.predict(machine, network, way, ranks) for way in model.WAYS}
    whole, ghost = times["synchronised, one all-gather"], times["ghost batches"]
    assert ghost == min(times.values())
    assert times["delayed statistics"] <= whole
    if ranks > model.GROUP:
        assert times[f"groups of {model.GROUP} ranks"] < whole
    if ranks >= 64:
        assert times["synchronised, merged in two steps"] < whole


def test_no_rank_waits_longer_than_the_longest_delay() -> None:
    machine = model.fit(document())
    waits = [machine.waiting(20.0, ranks) for ranks in (1, 2, 10, 100, 10**6)]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(20 * (RELATIVE[-1] - 1), rel=0.05)
    assert model.fit(document(relative=[1, 1, 1, 1])).waiting(20.0, 1000) == 0


def test_slower_messages_break_it_earlier() -> None:
    fast, slow = (model.fit(document(a=a, b=a * 1e-5)) for a in (0.01, 5.0))
    (network,) = model.networks(document()).values()
    way = "synchronised, one all-gather"
    assert model.breaking(slow, network, way) < model.breaking(fast, network, way)


def test_the_page_marks_what_is_predicted_and_gives_the_ratio() -> None:
    page = distributed.page(document(), "results")
    assert "**predicted**" in page
    assert "| 0.25 |" in page
    assert "refuses CPU tensors" in page
    assert distributed.page(None, "results") == "Ranks: not yet measured."


def test_the_picture_depends_on_the_document_alone() -> None:
    first, second = model.draw(document()), model.draw(document())
    assert first == second
    assert b"<svg" in first


@pytest.mark.mpi
def test_a_quick_run_writes_every_kind_of_row(tmp_path: Path) -> None:
    if command.mpiexec() is None:
        pytest.skip("needs mpiexec")
    command.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "distributed.json").read_text(encoding="utf-8"))
    ours = [row for row in found["layers"] if row["provider"] == distributed.OURS]
    assert [(row["ranks"], row["shape"], row["collectives"], row["bytes"]) for row in ours] == [
        (ranks, "64x20", 2, [16 * 20, 12 * 20]) for ranks in (1, 2)
    ]
    assert {row["way"] for row in found["steps"]} == {"alone", "synchronised", "ghost batches"}
    assert (tmp_path / "distributed.svg").read_bytes().startswith(b"<?xml")
