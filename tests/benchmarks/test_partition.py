"""The picture of both partitions: right before fast, and drawn from the file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import partition
from benchmarks.harness.case import NotSupportedError, WrongResultError
from benchmarks.peers import three_phase

pytestmark = pytest.mark.skipif(three_phase.absent() is not None, reason="the threads need g++")


def test_a_run_writes_a_row_for_every_partition_and_number_of_threads(tmp_path: Path) -> None:
    partition.main(["--quick", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "partition.json").read_text(encoding="utf-8"))
    assert [(row["shape"], row["partition"], row["threads"]) for row in document["rows"]] == [
        (shape, way, threads) for shape in ("64x20", "64x1024") for way in partition.WAYS for threads in (1, 2)
    ]
    assert all(0 < row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] for row in document["rows"])
    picture = (tmp_path / "partition.png").read_bytes()
    (tmp_path / "partition.png").unlink()
    partition.main(["--plot", str(tmp_path)])
    assert (tmp_path / "partition.png").read_bytes() == picture


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_phase, "EPSILON", 1e-2)
    with pytest.raises(WrongResultError, match="not timed"):
        partition.layer((64, 20), by_example=True, threads=1)


def test_a_layer_has_as_many_threads_as_it_is_asked_for() -> None:
    with pytest.raises(NotSupportedError, match="2000 threads"):
        partition.layer((64, 20), by_example=True, threads=2000)
