"""Predict the classes of new data with the networks of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bnkernels.runtime.registry import choose_device
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.data import DataError, load_inputs
from bnkernels.train.evaluate import trained_learners
from bnkernels.train.run_config import ConfigError
from bnkernels.train.runs import RunFolder
from bnkernels.train.saved_run import load_run


def predict(path: str | Path, data: str | Path, *, norm: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Predict the class of every row of a file.

    Parameters
    ----------
    path : path
        Folder of a run, or its checkpoint.
    data : path
        An ``.npz`` file with `x`, scaled as the run's own data; labels in it are not read.
    norm : {"batch", "sync-batch", "layer", "none"}, optional
        Network to ask; by default all of the run.
    device : {"auto", "cpu", "cuda"}
        Device that computes.

    Returns
    -------
    dict
        ``checkpoint``, ``data``, ``examples``, and under ``predictions`` a list of classes for each network, their
        names where the labels were text: those of the greatest probability, of an ensemble the mean over its models.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, it cannot be read, or its network gives no finite numbers for these data.
    ConfigError, DataError, DeviceError
        If the run has no such network, the data are missing or do not fit, or the device is not usable.
    """
    path = RunFolder.find_checkpoint(path)
    config, meta, arrays = load_run(path)
    if norm is not None and norm not in config.norms:
        raise ConfigError(f"the run has networks with norm {' and '.join(config.norms)}, not {norm}")
    inputs = meta["sizes"][0]
    x = load_inputs(data, config.dtype)
    if x.shape[1] != inputs:
        raise DataError(
            f"{data}: the networks take {inputs} features, but x has {x.shape[1]}: give data of the kind they were "
            "trained on"
        )
    xp = choose_device(device).xp
    learners = trained_learners(config, meta, arrays, device, xp)
    x, predictions = xp.asarray(x), {}
    for name in config.norms if norm is None else (norm,):
        with np.errstate(over="ignore", invalid="ignore"):
            probabilities = learners[name].probabilities(x)
        if not np.isfinite(probabilities).all():
            raise CheckpointError(f"the network with norm {name} gives no finite probabilities: its training diverged")
        numbers = probabilities.argmax(axis=1).tolist()
        predictions[name] = [meta["classes"][number] for number in numbers] if meta.get("classes") else numbers
    return {"checkpoint": str(path), "data": str(data), "examples": len(x), "predictions": predictions}
