"""Data-parallel training on several ranks: the same run as on one, resumable on another number, errors on all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnkernels.distributed import Communicator, RankError, run_threads
from bnkernels.train.config import TrainingConfig
from bnkernels.train.run_config import ConfigError
from bnkernels.train.trainer import Trainer, TrainingResult, resume, train

CONFIG = TrainingConfig(norm="sync-batch", hidden=(12, 8), epochs=2, batch_size=50, engine="layers", device="cpu")


def parameters(result: TrainingResult) -> np.ndarray:
    (model,) = result.models.values()
    return model.parameters


def on_ranks(size: int, config: TrainingConfig, **options: Any) -> list[TrainingResult]:
    return run_threads(size, lambda ranks: train(config, communicator=ranks, **options), timeout=60)


def test_ranks_train_as_one_up_to_rounding_and_the_same_bits_in_every_run() -> None:
    config = replace(CONFIG, dtype="float64", optimizer="adam")
    alone = train(replace(config, norm="batch"))
    first, again = on_ranks(3, config), on_ranks(3, config)
    for result in (*first, *again):
        np.testing.assert_array_equal(parameters(result), parameters(first[0]))
    np.testing.assert_allclose(parameters(first[0]), parameters(alone), rtol=1e-9, atol=1e-11)
    (mine,), (right,) = first[0].history.values(), alone.history.values()
    assert [entry["accuracy"] for entry in mine] == [entry["accuracy"] for entry in right]


def test_one_rank_trains_sync_batch_as_batch() -> None:
    np.testing.assert_array_equal(parameters(train(CONFIG)), parameters(train(replace(CONFIG, norm="batch"))))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_other_networks_are_trained_in_parallel_too(norm: str) -> None:
    config = replace(CONFIG, norm=norm, dtype="float64", optimizer="momentum")
    alone = train(config)
    for result in on_ranks(2, config):
        np.testing.assert_allclose(parameters(result), parameters(alone), rtol=1e-9, atol=1e-11)


def test_ghost_batches_differ_from_the_whole_and_leave_all_ranks_the_same() -> None:
    config = replace(CONFIG, norm="batch")
    first, second = on_ranks(2, config)
    np.testing.assert_array_equal(parameters(first), parameters(second))
    (one,), (two,) = first.models.values(), second.models.values()
    np.testing.assert_array_equal(one.running, two.running)
    assert np.abs(parameters(first) - parameters(train(config))).max() > 1e-3
    assert first.history["batch"][-1]["accuracy"] > 0.8


def test_several_models_are_trained_in_turn() -> None:
    config = replace(CONFIG, models=2, dtype="float64", epochs=1)
    alone, (first, second) = train(replace(config, norm="batch")), on_ranks(2, config)
    for right, one, two in zip(
        alone.models["batch"], first.models["sync-batch"], second.models["sync-batch"], strict=True
    ):
        np.testing.assert_array_equal(one.parameters, two.parameters)
        np.testing.assert_allclose(one.parameters, right.parameters, rtol=1e-9, atol=1e-11)


def test_rank_0_writes_and_another_number_of_ranks_resumes(tmp_path: Path) -> None:
    config = replace(CONFIG, dtype="float64")
    results = on_ranks(2, config, folder=tmp_path / "run")
    assert all(file.exists() for file in results[0].files.values())
    assert results[1].files == {}
    whole = train(replace(config, norm="batch", epochs=4))
    resumed = run_threads(3, lambda ranks: resume(tmp_path / "run", epochs=4, communicator=ranks), timeout=60)
    assert [result.status for result in resumed] == ["finished"] * 3
    for result in resumed:
        np.testing.assert_allclose(parameters(result), parameters(whole), rtol=1e-9, atol=1e-11)
    again = run_threads(2, lambda ranks: resume(tmp_path / "run", communicator=ranks), timeout=60)
    assert [result.status for result in again] == ["already finished"] * 2
    assert resume(tmp_path / "run", epochs=5).status == "finished"  # on one rank


def test_the_wish_of_one_rank_stops_all_behind_the_same_step(tmp_path: Path) -> None:
    def work(ranks: Communicator) -> tuple[str, int]:
        asked = iter(range(100))

        def should_stop() -> bool:
            return ranks.rank == 1 and next(asked) >= 7

        folder = {"folder": tmp_path / "run"} if ranks.rank == 0 else {}
        result = train(CONFIG, communicator=ranks, should_stop=should_stop, **folder)
        return result.status, result.models["sync-batch"].batches

    assert run_threads(2, work, timeout=60) == [("stopped", 8)] * 2
    right = parameters(train(replace(CONFIG, norm="batch", dtype="float32")))
    np.testing.assert_allclose(parameters(resume(tmp_path / "run")), right, rtol=1e-3, atol=1e-4)


def test_an_error_of_rank_0_ends_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.npz").touch()
    messages = {}

    def work(ranks: Communicator) -> None:
        with pytest.raises((ConfigError, RankError)) as raised:
            train(CONFIG, communicator=ranks, folder=tmp_path / "run")
        messages[ranks.rank] = raised.type, str(raised.value)
        assert ranks.speaker == 0

    run_threads(2, work, timeout=60)
    assert messages[0][0] is ConfigError
    assert messages[1][0] is RankError
    assert "rank 0 cannot go on: ConfigError" in messages[1][1]


def test_ranks_that_are_configured_differently_are_told() -> None:
    def work(ranks: Communicator) -> None:
        with pytest.raises(RankError, match=r"the ranks differ.*rank 0.*rank 1"):
            train(replace(CONFIG, seed=ranks.rank), communicator=ranks)

    run_threads(2, work, timeout=60)


def test_what_ranks_cannot_train_is_refused() -> None:
    for options, text in (
        ({"engine": "fused"}, "engine fused: take layers"),
        ({"norm": "batch", "batch_size": 3}, "or synchronise with norm sync-batch"),
        ({"norm": "none", "batch_size": 2}, None),
    ):
        config = replace(CONFIG, **options)

        def work(ranks: Communicator, config: TrainingConfig = config, text: str | None = text) -> None:
            if text is None:
                Trainer(config, communicator=ranks)
                return
            with pytest.raises(ConfigError, match=text):
                Trainer(config, communicator=ranks)

        run_threads(2, work, timeout=60)
