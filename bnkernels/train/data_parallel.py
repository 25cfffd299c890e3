"""Data-parallel training: every rank takes its part of each mini-batch, and the gradients are added up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from bnkernels.distributed.communicator import Communicator, RankError
from bnkernels.distributed.gradients import GradientExchange
from bnkernels.distributed.nccl import nccl
from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import Optimizer
from bnkernels.train.engines import LayersEngine
from bnkernels.train.run_config import ConfigError, RunConfig

Result = TypeVar("Result")
LOCAL_RANKS = "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"  # variables


class SharedStop:
    """The wish of any rank to stop, which goes along with the gradients: all ranks stop behind the same step.

    Parameters
    ----------
    should_stop : callable
        Question for the wish of this rank.

    Attributes
    ----------
    agreed : bool
        Answer: whether a rank wished so in the last exchange.
    """

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.own, self.agreed = should_stop, False

    def __call__(self) -> bool:
        """Return the answer."""
        return self.agreed


class DataParallelEngine(LayersEngine):
    """Makes a step layer by layer on this rank's part of the mini-batch, and adds up the gradients of all ranks.

    The loss of a part is weighted by its share of the examples, so that the gradients are those of the whole
    mini-batch, however it is divided. One exchange a step carries them, the running statistics of batch norms that
    each rank computes for itself, and whether a rank wishes to stop.
    """

    def __init__(self, trained: Sequence[tuple[MLP, Optimizer]], config: RunConfig, ranks: Communicator) -> None:
        super().__init__(trained, config, [f"{ranks.size} ranks"])
        self.ranks, self.steps_at_once = ranks, 1
        self._exchanges = {}
        for model, _ in trained:
            arrays = [model.gradients]
            if model.running.size and model.communicator is None:
                arrays.append(model.running)
            self._exchanges[id(model)] = GradientExchange(ranks, arrays), len(arrays)

    @property
    def part(self) -> tuple[int, int]:
        """The first of the rows of a mini-batch that this rank takes, and the one behind its last."""
        batch, rank, size = self.config.batch_size, self.ranks.rank, self.ranks.size
        return batch * rank // size, batch * (rank + 1) // size

    @property
    def _share(self) -> float:
        first, end = self.part
        return (end - first) / self.config.batch_size

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train up to step `last`, or until a rank asks to stop; see `Engine.train`."""
        self._stop = should_stop if isinstance(should_stop, SharedStop) else SharedStop(should_stop)
        super().train(x, y, first, last, self._stop)

    def backward(self, model: Any, dlogits: Any) -> None:
        """Write the gradients of this rank's share of the loss."""
        dlogits *= dlogits.dtype.type(self._share)  # first: synchronised batch norms add up these of all ranks
        model.backward(dlogits)

    def update(self, model: Any, optimizer: Optimizer) -> None:
        """Add up the gradients of all ranks, and update the parameters."""
        exchange, arrays = self._exchanges[id(model)]
        wish = exchange(*(1.0, self._share)[:arrays], flag=float(self._stop.own()))
        self._stop.agreed = self._stop.agreed or wish > 0
        optimizer.step()


def check_ranks(config: RunConfig, ranks: Communicator) -> None:
    """Refuse a configuration that several ranks cannot train.

    Raises
    ------
    ConfigError
        If it is not one of perceptrons, names another engine, or leaves too few examples to a rank.
    """
    if ranks.size == 1:
        return
    if config.command != "train":
        raise ConfigError(f"bnkernels {config.command} runs on one rank, got {ranks.size}: start it without mpiexec")
    if config.engine not in ("auto", "layers"):
        raise ConfigError(f"{ranks.size} ranks exchange gradients every step, got engine {config.engine}: take layers")
    least = 2 if "batch" in config.norms else 1
    if config.batch_size // ranks.size < least:
        way = "; or synchronise with norm sync-batch" if least == 2 and config.batch_size >= ranks.size else ""
        raise ConfigError(
            f"batch size must be at least {least * ranks.size} on {ranks.size} ranks, {least} for each, got "
            f"{config.batch_size}: give more examples or fewer ranks{way}"
        )


def ranks_beside(ranks: Communicator, xp: Any) -> Communicator | None:
    """Return ranks that exchange arrays of a module, with a GPU each where it is CuPy; None for a single rank."""
    if ranks.size == 1:
        return None
    if xp is np:
        return ranks
    local = next((int(os.environ[name]) for name in LOCAL_RANKS if name in os.environ), ranks.rank)
    xp.cuda.Device(local % xp.cuda.runtime.getDeviceCount()).use()
    return nccl(ranks)


def together(ranks: Communicator, prepare: Callable[[], Result], text: Callable[[Result], str]) -> Result:
    """Return what a function returns, if it succeeds on all ranks and they agree on its description.

    Raises
    ------
    RankError
        If ranks differ, or it fails on another one.
    Exception
        The error of the function, which ends it on the other ranks too.
    """
    try:
        result = prepare()
    except RankError:
        raise
    except Exception as error:
        ranks.agree(error)
        raise
    ranks.agree(text(result))
    return result
