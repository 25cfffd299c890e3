"""Evaluate the networks of a checkpoint on labelled data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bnkernels.runtime.registry import choose_device
from bnkernels.train.data import DataError, load_dataset, load_examples
from bnkernels.train.ensemble import Ensemble, make_learner
from bnkernels.train.learner import Learner, load_learners
from bnkernels.train.run_config import RunConfig
from bnkernels.train.runs import RunFolder
from bnkernels.train.saved_run import load_run


def evaluate(path: str | Path, *, data: str | Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Evaluate the networks of a checkpoint on the test set, or on other data.

    Parameters
    ----------
    path : path
        Folder of a run, or its checkpoint.
    data : path, optional
        Other data of the same kind, with labels: their test set if they have one, else all of them. By default the test
        set of the run's own data; also where these very data are given from another place.
    device : {"auto", "cpu", "cuda"}
        Device that computes.

    Returns
    -------
    dict
        ``checkpoint``, ``dataset``, ``test_examples``, and under ``networks`` for each ``step``, ``test_loss`` (nats;
        None if not finite) and ``test_accuracy`` (0 to 1).

    Raises
    ------
    CheckpointError
        If there is no checkpoint or it cannot be read.
    ConfigError, DataError, DeviceError, ImportError
        If the data are missing or do not fit the networks, or the device is not usable.
    """
    path = RunFolder.find_checkpoint(path)
    config, meta, arrays = load_run(path)
    config, sizes = replace(config, data=config.data if data is None else data), tuple(meta["sizes"])
    if data is None:
        dataset = load_dataset(config.dataset, config.data, config.dtype)
        x, y = dataset.x_test, dataset.y_test
    else:
        classes = tuple(meta.get("classes", ()))
        x, y = load_examples(config.dataset, config.data, config.dtype, sizes[-1], meta["data_digest"], classes)
    if x.shape[1] != sizes[0] or y.max() >= sizes[-1]:
        raise DataError(
            f"the networks take {sizes[0]} features and tell {sizes[-1]} classes apart, but the data have "
            f"{x.shape[1]} and {y.max() + 1}: give data of the kind they were trained on"
        )
    xp = choose_device(device).xp
    learners = trained_learners(config, meta, arrays, device, xp)
    x, y, results = xp.asarray(x), xp.asarray(y), {}
    for norm, learner in learners.items():
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # it shows as None
            loss, accuracy = learner.evaluate(x, y)
        loss = loss if math.isfinite(loss) else None
        results[norm] = {"step": learner.step, "test_loss": loss, "test_accuracy": accuracy}
    return {
        "checkpoint": str(path),
        "dataset": config.data or config.dataset,
        "test_examples": len(x),
        "networks": results,
    }


def trained_learners(
    config: RunConfig, meta: dict[str, Any], arrays: dict[str, np.ndarray], device: str, xp: Any
) -> dict[str, Learner | Ensemble]:
    """Return the learners of a run that was loaded, on a device."""
    config = config.for_evaluation(device)
    learners = {norm: make_learner(norm, config, tuple(meta["sizes"]), xp) for norm in config.norms}
    load_learners(learners, meta, arrays)
    return learners
