"""The trainer: the same network with and without batch norm, on the same batches, timed, saved and resumable."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import Communicator, OneRank
from bnkernels.runtime.registry import choose_device
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.config import TrainingConfig
from bnkernels.train.data import DataError, Dataset, load_dataset
from bnkernels.train.data_parallel import SharedStop, check_ranks, ranks_beside, together
from bnkernels.train.ensemble import make_learner
from bnkernels.train.environment import blas_threads
from bnkernels.train.files import locked
from bnkernels.train.learner import load_learners
from bnkernels.train.plots import require_matplotlib
from bnkernels.train.run_config import ConfigError, RunConfig, as_path, require_memory
from bnkernels.train.runs import RunFolder, TrainingResult
from bnkernels.train.saved_run import load_run, merged, run_folder
from bnkernels.train.step_time import Rounds

__all__ = ["ConfigError", "Trainer", "TrainingConfig", "TrainingResult", "resume", "train"]


def never() -> bool:
    """Tell a run to go on to its end."""
    return False


class Trainer:
    """All the state of a run: the learners, the order of the examples, and how far it is.

    Parameters
    ----------
    config : RunConfig
        Options of the run.
    dataset : Dataset, optional
        Data set; by default the one that the configuration names is loaded.
    communicator : Communicator, optional
        Ranks that train together; by default one.

    Raises
    ------
    ConfigError, DataError, DeviceError, ImportError
        If the configuration does not fit the data or the machine, or the data are unusable.
    """

    def __init__(
        self, config: RunConfig, dataset: Dataset | None = None, communicator: Communicator | None = None
    ) -> None:
        self.config, self.ranks = config, communicator or OneRank()
        check_ranks(config, self.ranks)
        self.dataset = (dataset or load_dataset(config.dataset, config.data, config.dtype)).astype(config.dtype)
        self.steps_per_epoch = len(self.dataset.x_train) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch size must be at most the {len(self.dataset.x_train)} training examples, got {config.batch_size}"
            )
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        device = choose_device(config.device)
        self.xp, self.device = device.xp, device.description
        self.sizes = (self.dataset.n_features, *config.widths, self.dataset.n_classes)
        require_memory(config, self.sizes, min(config.evaluation_rows(self.sizes), len(self.dataset.x_train)))
        ranks = ranks_beside(self.ranks, self.xp)
        self.learners = {norm: make_learner(norm, config, self.sizes, self.xp, ranks) for norm in config.norms}
        self.rounds = Rounds(device, [str(learner.engine) for learner in self.learners.values()])
        self.epoch = 0  # complete ones
        self._generator = np.random.default_rng(config.seed)  # its state is that at the start of the current epoch
        self._train = self._to_device(self.dataset.x_train, self.dataset.y_train)
        self._test = self._to_device(self.dataset.x_test, self.dataset.y_test)

    @property
    def finished(self) -> bool:
        """Whether every network has done all its steps."""
        return all(learner.step >= self.total_steps for learner in self.learners.values())

    def run_epoch(self, should_stop: Callable[[], bool] = never) -> bool:
        """Train each network to the end of the current epoch (or of the run) and evaluate it.

        Parameters
        ----------
        should_stop : callable
            Question asked before every step; after the answer True the epoch stays as it is and can be resumed.

        Returns
        -------
        bool
            Whether the end was reached.
        """
        first = self.epoch * self.steps_per_epoch
        last = min(first + self.steps_per_epoch, self.total_steps)
        generator = copy.deepcopy(self._generator)
        order = self.xp.asarray(generator.permutation(len(self.dataset.x_train)))
        x, y = (array[order] for array in self._train)  # shuffled once: batches are views, the same for every network
        behind = {norm: learner for norm, learner in self.learners.items() if learner.step < last}
        # Overflow is no accident to warn about line by line: it shows in the history as a loss of None.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            times = self.rounds.train(behind, x, y, first, last, should_stop)
            for norm, learner in behind.items():
                if learner.step == last:
                    entry = {"epoch": last / self.steps_per_epoch, "step": last}
                    learner.engine.before_evaluation(x)
                    found = learner.assess(self._train, self._test)
                    learner.history.append(entry | found | {"us_per_step": statistics.median(times[norm])})
        if any(learner.step < last for learner in self.learners.values()):
            return False
        if last == first + self.steps_per_epoch:
            self.epoch, self._generator = self.epoch + 1, generator
        return True

    def __str__(self) -> str:
        """Return what ranks must agree on to train together."""
        return f"{self.config}, {[each.step for each in self.learners.values()]} done, data {self.dataset.digest}"

    def _to_device(self, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
        return self.xp.asarray(x), self.xp.asarray(y)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return everything that a checkpoint holds: meta data for JSON, and the arrays by name."""
        meta = {
            "command": self.config.command,
            "config": asdict(self.config),
            "sizes": self.sizes,
            "data_digest": self.dataset.digest,
            "classes": list(self.dataset.classes),
            "epoch": self.epoch,
            "generator": self._generator.bit_generator.state,
            "networks": {
                norm: {"step": learner.step, "history": learner.history} for norm, learner in self.learners.items()
            },
            "rounds": self.rounds.state(),
        }
        arrays = {
            f"{norm}/{name}": array
            for norm, learner in self.learners.items()
            for name, array in learner.arrays().items()
        }
        return meta, arrays

    def load_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` returned.

        Raises
        ------
        CheckpointError
            If parts of the state do not belong together, or are not of these networks; nothing is changed then.
        DataError
            If the data are not those the state comes from.
        ConfigError
            If the run is meant to end before the point the state has reached.
        """
        if meta["data_digest"] != self.dataset.digest:
            raise DataError("the data are not those the checkpoint was trained on: restore them, or start a new run")
        steps = [network["step"] for network in meta["networks"].values()]
        first, last = (epoch * self.steps_per_epoch for epoch in (meta["epoch"], meta["epoch"] + 1))
        if tuple(meta["sizes"]) != self.sizes or not first <= min(steps) < last or not max(steps) <= last:
            raise CheckpointError(
                f"the checkpoint's sizes {tuple(meta['sizes'])}, steps {steps} and {meta['epoch']} complete epochs do "
                "not belong together: take another checkpoint, or start a new run"
            )
        if max(steps) > self.total_steps:
            raise ConfigError(
                f"the run has already done {max(steps)} steps, more than the {self.total_steps} asked for: give more"
            )
        load_learners(self.learners, meta, arrays)
        self.rounds.load_state(meta.get("rounds"))
        self.epoch = meta["epoch"]
        self._generator.bit_generator.state = meta["generator"]


def train(
    config: RunConfig | None = None,
    *,
    folder: str | Path | Callable[[], Path] | None = None,
    checkpoint: str | Path | None = None,
    dataset: Dataset | None = None,
    communicator: Communicator | None = None,
    on_epoch: Callable[[Trainer], None] = lambda trainer: None,
    should_stop: Callable[[], bool] = never,
) -> TrainingResult:
    """Train the networks of a configuration from the beginning.

    Parameters
    ----------
    config : RunConfig, optional
        Options of the run; by default 64-20-10 on the digits, with batch norm and without.
    folder : path or callable, optional
        Folder of the checkpoint, written after every epoch, and of ``metrics.json`` and ``curves.png``, written at the
        end. By default nothing is written. A callable makes and returns the folder, once all else is known to be right.
    checkpoint : path, optional
        Place of the checkpoint outside the folder; needs a `folder`.
    dataset : Dataset, optional
        Data set, if it is already loaded.
    communicator : Communicator, optional
        Ranks that train together, each with its part of every mini-batch; rank 0 writes the files. By default one.
    on_epoch : callable
        Function called with the trainer before the first epoch and after each one.
    should_stop : callable
        Question asked before every step: whether to save and stop.

    Returns
    -------
    TrainingResult
        The networks, their history and the summary.

    Raises
    ------
    ConfigError, DataError, DeviceError, ImportError
        If the configuration, the data or the machine do not allow it; nothing has been written then.
    OSError
        If the folder cannot be written, or another run is at work there: it is locked to the end of this one.

    Examples
    --------
    >>> result = train(TrainingConfig(epochs=10, norm="batch"))
    >>> result.summary["networks"]["batch"]["test_accuracy"] > 0.9
    True
    """
    if folder is None and checkpoint is not None:
        raise ConfigError(f"the checkpoint {checkpoint} needs a folder for the rest of the run: give one")
    if folder is not None:
        require_matplotlib()
        folder = folder if callable(folder) else as_path("folder", folder)
    if checkpoint is not None:
        checkpoint = as_path("checkpoint", checkpoint)
    ranks = communicator or OneRank()
    with ExitStack() as locks:

        def prepare() -> tuple[Trainer, RunFolder | None]:
            trainer, run = Trainer(config or TrainingConfig(), dataset, ranks), None
            if folder is not None and ranks.rank == 0:
                run = locks.enter_context(RunFolder.create(folder, checkpoint))
                run.save(*trainer.state())  # from here on a killed run can be resumed
            return trainer, run

        trainer, run = together(ranks, prepare, lambda made: str(made[0]))
        return _run(trainer, run, on_epoch, should_stop)


def resume(
    path: str | Path,
    *,
    folder: str | Path | None = None,
    checkpoint: str | Path | None = None,
    communicator: Communicator | None = None,
    on_epoch: Callable[[Trainer], None] = lambda trainer: None,
    should_stop: Callable[[], bool] = never,
    **options: Any,
) -> TrainingResult:
    """Continue a run from its checkpoint, to the same bits as if it had never been interrupted (on the same device).

    Parameters
    ----------
    path : path
        Folder of the run, or its checkpoint.
    folder, checkpoint : path, optional
        Places of the run, as they were given to `train`: other places are an error. The folder must be given if the
        checkpoint lies outside it and nothing in it says yet that it is the run's: before the run's end.
    communicator : Communicator, optional
        Ranks, as of `train`; their number may be another than before. All read the checkpoint.
    on_epoch, should_stop : callable
        Arguments of `train`.
    **options : any
        Fields of the run's configuration. ``epochs`` or ``steps`` extend the run, ``device`` moves it, ``engine`` goes
        on in another way, ``data`` says where the same data are now; any other must be what the run was started with.

    Returns
    -------
    TrainingResult
        Result, as of `train`; its history begins with that of the saved run.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, it cannot be read, or it names a folder that does not know the run.
    ConfigError, DataError, DeviceError, ImportError
        If an option contradicts the run, or the data are missing or others.
    OSError
        If the folder cannot be written, or another run is at work there: it is locked to the end of this one.
    """
    require_matplotlib()
    ranks = communicator or OneRank()
    with ExitStack() as locks:

        def prepare() -> tuple[Trainer, RunFolder]:
            found = RunFolder.find_checkpoint(path)
            if ranks.rank == 0:
                locks.enter_context(locked(found))
            config, meta, arrays = load_run(found)
            run = run_folder(found, meta, folder)
            run.check_places(folder, checkpoint)
            if ranks.rank == 0:
                locks.enter_context(run.lock_folder())
            trainer = Trainer(merged(config, options), communicator=ranks)
            trainer.load_state(meta, arrays)
            return trainer, run

        trainer, run = together(ranks, prepare, lambda made: str(made[0]))
        if trainer.finished and all(file.exists() for file in run.files.values()):
            return _result("already finished", trainer, run)
        if ranks.rank == 0:
            run.check_writable()
        return _run(trainer, run if ranks.rank == 0 else None, on_epoch, should_stop)


def _run(
    trainer: Trainer, run: RunFolder | None, on_epoch: Callable[[Trainer], None], should_stop: Callable[[], bool]
) -> TrainingResult:
    """Train to the end or until asked to stop, saving after every epoch."""
    should_stop = should_stop if trainer.ranks.size == 1 else SharedStop(should_stop)
    on_epoch(trainer)
    with blas_threads(trainer.sizes, trainer.config.batch_size):
        while not trainer.finished and not should_stop():
            complete = trainer.run_epoch(should_stop)
            if run is not None:
                run.save(*trainer.state())
            if complete:
                on_epoch(trainer)
    result = _result("finished" if trainer.finished else "stopped", trainer, run)
    if run is not None and trainer.finished:
        run.write(result)
    return result


def _result(status: str, trainer: Trainer, run: RunFolder | None) -> TrainingResult:
    data = trainer.dataset
    return TrainingResult(
        status=status,
        config=trainer.config,
        data={
            "training_examples": len(data.x_train),
            "test_examples": len(data.x_test),
            "features": data.n_features,
            "classes": data.n_classes,
        },
        device=trainer.device,
        models={norm: getattr(learner, "models", None) or learner.model for norm, learner in trainer.learners.items()},
        history={norm: learner.history for norm, learner in trainer.learners.items()},
        step_time_ratio=trainer.rounds.ratio() if {"batch", "none"} <= trainer.learners.keys() else None,
        files=run.files if run is not None else {},
    )
