"""The result of a run, and its folder with ``metrics.json``, ``curves.png`` and the checkpoint."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import strftime
from typing import Any

import numpy as np

from bnkernels.train.checkpoint import CheckpointError, save_checkpoint
from bnkernels.train.documents import to_json
from bnkernels.train.environment import versions
from bnkernels.train.files import FULL, check_replaceable, locked, write_atomically
from bnkernels.train.plots import draw_curves
from bnkernels.train.run_config import ConfigError, RunConfig
from bnkernels.train.step_time import StepTimeRatio

TARGET_ACCURACY = 0.95  # that of "steps to 95 %"
CHECKPOINT_NAME = "checkpoint.npz"


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Result of a run.

    Attributes
    ----------
    status : {"finished", "stopped", "already finished"}
        ``stopped``: asked to before the end; ``already finished``: the resumed run had nothing left to do.
    config : RunConfig
        Options of the run.
    data : dict
        Number of ``training_examples``, ``test_examples``, ``features`` and ``classes``.
    device : str
        Device in words.
    models : dict of str to network or list of networks
        The networks, ``"batch"`` and ``"none"`` (or the one of them that was asked for); of an ensemble lists.
    history : dict of str to list of dict
        For each network its evaluations, one per epoch: ``epoch``, ``step``, ``loss`` (mean cross-entropy over the
        training set, in nats; None if not finite), ``accuracy`` (on the test set, 0 to 1), ``us_per_step``
        (microseconds per training step, the median of that epoch). Of an ensemble, means; with ``loss_spread`` and
        ``accuracy_spread``, sample standard deviations, and under ``models`` the same of each.
    step_time_ratio : StepTimeRatio or None
        Time of a step with batch norm, relative to one without; None if not both were trained.
    files : dict of str to pathlib.Path
        The files of the run: ``checkpoint``, ``metrics``, ``curves``. Empty if it wrote none.
    """

    status: str
    config: RunConfig
    data: dict[str, int]
    device: str
    models: dict[str, Any]
    history: dict[str, list[dict[str, Any]]]
    step_time_ratio: StepTimeRatio | None
    files: dict[str, Path]

    @property
    def summary(self) -> dict[str, Any]:
        """Results and cost of each network, and the ratio of the costs (None without both)."""
        networks = {norm: summarise(entries) for norm, entries in self.history.items() if entries}
        ratio = self.step_time_ratio and self.step_time_ratio._asdict()
        return {"networks": networks, "step_time_ratio": ratio}

    @property
    def continuation(self) -> str:
        """The command that continues the run; a run whose checkpoint lies elsewhere is told its folder."""
        folder, checkpoint = self.files["metrics"].parent, self.files["checkpoint"]
        out = [] if checkpoint.parent == folder else ["--out", str(folder)]
        return shlex.join(["bnkernels", self.config.command, "--resume", str(checkpoint), *out])

    def document(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``."""
        return {
            "status": self.status,
            "config": asdict(self.config),
            "data": self.data,
            "environment": versions(self.device),
            "summary": self.summary,
            "history": self.history,
            "files": {name: str(path) for name, path in self.files.items()},
        }


def summarise(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results and the cost of one network.

    Parameters
    ----------
    history : list of dict
        At least one evaluation, as in `TrainingResult`.

    Returns
    -------
    dict
        ``test_accuracy`` (0 to 1) and ``training_loss`` (nats) at the end, ``steps_to_95_percent`` (of the first
        evaluation at or above; None if there is none), ``us_per_step`` (microseconds; the median of the epochs, the
        first left out as a warm-up where there are more). Of an ensemble also ``test_accuracy_spread`` (sample standard
        deviation) and under ``models`` loss and accuracy of each.
    """
    times = [entry["us_per_step"] for entry in history]
    last, spread = history[-1], {}
    if "models" in last:
        spread = {"test_accuracy_spread": last["accuracy_spread"], "models": last["models"]}
    return spread | {
        "test_accuracy": history[-1]["accuracy"],
        "training_loss": history[-1]["loss"],
        "steps_to_95_percent": next((e["step"] for e in history if e["accuracy"] >= TARGET_ACCURACY), None),
        "us_per_step": statistics.median(times[1:] or times),
    }


def default_folder(beginning: str) -> Path:
    """Make the folder of a run that was given none, named after what it trains on and the time, and return it.

    However many runs begin in one second, each gets a folder of its own: the first to make one has it.

    Raises
    ------
    ConfigError
        If it cannot be made.
    """
    name, repeat = f"{beginning}-{strftime('%Y%m%d-%H%M%S')}", 1
    folder = Path("runs", name)
    _make(folder.parent)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            repeat += 1
            folder = Path("runs", f"{name}-{repeat}")
        except OSError as error:
            raise _cannot_make(error) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_make(error) from error


def _cannot_make(error: OSError) -> ConfigError:
    reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
    return ConfigError(f"cannot make the folder {error.filename}: {reason}: choose another")


@dataclass(frozen=True)
class RunFolder:
    """The places of a run: its folder, and its checkpoint, which may lie elsewhere."""

    folder: Path
    checkpoint: Path

    @classmethod
    @contextmanager
    def create(
        cls, folder: str | Path | Callable[[], Path], checkpoint: str | Path | None = None
    ) -> Iterator[RunFolder]:
        """Make the folders of a new run, and keep other runs out of them until the end of the context.

        Parameters
        ----------
        folder : path or callable
            Folder of ``metrics.json`` and ``curves.png``; created if absent. A callable makes and returns it.
        checkpoint : path, optional
            The checkpoint; by default ``checkpoint.npz`` in the folder.

        Raises
        ------
        ConfigError
            If a run is there already, or a folder cannot be made.
        OSError
            If another run is at work there.
        """
        folder = Path(folder() if callable(folder) else folder)
        run = cls(folder, Path(checkpoint) if checkpoint is not None else folder / CHECKPOINT_NAME)
        if len({os.path.realpath(path) for path in run.files.values()}) < len(run.files):
            raise ConfigError(f"the checkpoint {run.checkpoint} would be another file of the run: choose another name")
        if not run._there():
            _make(run.folder)
            _make(run.checkpoint.parent)
        with run.lock_folder(), locked(run.checkpoint):
            for path in run._there():
                raise ConfigError(f"{path} exists already: continue that run with --resume, or choose another place")
            yield run

    def _there(self) -> list[Path]:
        """Return which of the files are there; a link is, wherever it points."""
        return [path for path in self.files.values() if os.path.lexists(path)]

    def lock_folder(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder; see `locked`."""
        return locked(self.files["metrics"])

    def check_writable(self) -> None:
        """Raise the OSError now that writing a file of the run would raise after an epoch's work."""
        for path in self.files.values():
            check_replaceable(path)

    def check_places(self, folder: str | Path | None, checkpoint: str | Path | None) -> None:
        """Raise a ConfigError if the folder or the checkpoint that the caller gives is another than the run's."""
        for name, given, place in (("folder", folder, self.folder), ("checkpoint", checkpoint, self.checkpoint)):
            if given is not None and Path(given).resolve() != place.resolve():
                raise ConfigError(f"the {name} of the run is {place}, not {given}: drop it or start a new run")

    @classmethod
    def find_checkpoint(cls, path: str | Path) -> Path:
        """Return the checkpoint that a path means: the file itself, or the one in a run's folder; no link to it.

        Raises
        ------
        CheckpointError
            If there is none.
        """
        found = Path(path, CHECKPOINT_NAME) if Path(path).is_dir() else Path(path)
        if not found.is_file():
            raise CheckpointError(f"there is no checkpoint {found}: give a run's folder or its checkpoint file")
        return found.resolve() if found.is_symlink() else found  # the run is where the file is, not where the link is

    @property
    def files(self) -> dict[str, Path]:
        """The run's three files by what they are."""
        return {
            "checkpoint": self.checkpoint,
            "metrics": self.folder / "metrics.json",
            "curves": self.folder / "curves.png",
        }

    def save(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write the checkpoint, which remembers where the folder is, seen from itself."""
        folder = os.path.relpath(self.folder, self.checkpoint.parent)
        try:
            save_checkpoint(self.checkpoint, {**meta, "folder": folder}, arrays)
        except OSError as error:
            if error.errno in FULL and self.checkpoint.exists():
                error.strerror = f"{error.strerror}, and --resume continues from it"
            raise

    def write(self, result: TrainingResult) -> None:
        """Write the curves and the metrics, each whole or not at all."""
        config = result.config
        network = config.describe((result.data["features"], *config.widths, result.data["classes"]))
        title = f"{config.dataset}, {network}, mini-batches of {config.batch_size}"
        title += f", {config.models} models" if config.models > 1 else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.files["curves"], draw_curves(result.history, title))
        write_atomically(self.files["metrics"], to_json(result.document()).encode())
