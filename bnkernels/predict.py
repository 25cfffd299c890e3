"""Evaluate the networks of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bnkernels.data import DataError, load_dataset
from bnkernels.ensemble import make_network
from bnkernels.network import array_module, load_networks
from bnkernels.runs import RunFolder
from bnkernels.saved_run import load_run


def predict(path: str | Path, *, data: str | Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Evaluate the networks of a checkpoint on the test set.

    Parameters
    ----------
    path : path
        A run's folder, or its checkpoint.
    data : path, optional
        Other data of the same kind; by default those of the run.
    device : {"auto", "cpu", "cuda"}
        Where to compute.

    Returns
    -------
    dict
        ``checkpoint``, ``dataset``, ``test_examples``, and under ``networks`` for each ``step``, ``test_loss`` (nats)
        and ``test_accuracy`` (0 to 1).

    Raises
    ------
    CheckpointError
        If there is no checkpoint or it cannot be read.
    ConfigError, DataError, ImportError
        If the data are missing or do not fit the networks, or the device is not usable.
    """
    path = RunFolder.find_checkpoint(path)
    config, meta, arrays = load_run(path)
    config = replace(config, device=device)
    if data is not None:
        config = replace(config, data=str(data))
    dataset = load_dataset(config.dataset, config.data, config.dtype)
    xp, _ = array_module(config.device)
    sizes = tuple(meta["sizes"])
    if dataset.n_features != sizes[0] or dataset.n_classes > sizes[-1]:
        raise DataError(
            f"the networks take {sizes[0]} features and tell {sizes[-1]} classes apart, but the data have "
            f"{dataset.n_features} and {dataset.n_classes}: give data of the kind they were trained on"
        )
    networks = {norm: make_network(norm, config, sizes, xp) for norm in config.norms}
    load_networks(networks, meta, arrays)
    results = {}
    for norm, network in networks.items():
        loss, accuracy = network.evaluate(xp.asarray(dataset.x_test), xp.asarray(dataset.y_test))
        results[norm] = {"step": network.step, "test_loss": loss, "test_accuracy": accuracy}
    return {
        "checkpoint": str(path),
        "dataset": config.data or config.dataset,
        "test_examples": len(dataset.x_test),
        "networks": results,
    }
