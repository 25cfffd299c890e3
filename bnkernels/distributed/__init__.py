"""Synchronised batch norm and data-parallel training: ranks that exchange arrays by MPI, NCCL or threads."""

from bnkernels.distributed.batch_norm import sync_batch_norm_backward, sync_batch_norm_forward
from bnkernels.distributed.communicator import Communicator, OneRank, RankError
from bnkernels.distributed.gradients import GradientExchange
from bnkernels.distributed.mpi import launched_by_mpi, mpi
from bnkernels.distributed.nccl import nccl
from bnkernels.distributed.threads import run_threads, threads

__all__ = [
    "Communicator",
    "GradientExchange",
    "OneRank",
    "RankError",
    "launched_by_mpi",
    "mpi",
    "nccl",
    "run_threads",
    "sync_batch_norm_backward",
    "sync_batch_norm_forward",
    "threads",
]
