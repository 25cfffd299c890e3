"""Ranks that have a GPU each, and exchange CuPy arrays by NCCL, on the current stream."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import TIMEOUT, Communicator, RankError, checked
from bnkernels.distributed.mpi import MPICommunicator
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of

SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
UNIQUE_ID_BYTES = 128
NAP = 1e-5  # seconds


class NCCLCommunicator(Communicator):
    """Ranks of an NCCL communicator, which `nccl` makes.

    An all-gather is enqueued on the current stream, and nothing waits on the host; `synchronize` does, with a time-out.
    """

    def __init__(self, comm: Any, xp: Any, timeout: float, bootstrap: Communicator | None) -> None:
        self._comm, self._xp, self.timeout, self._bootstrap = comm, xp, timeout, bootstrap
        self.rank, self.size = comm.rank, comm.nranks

    def allgather(self, values: Any) -> Any:
        """Return the arrays of all ranks; see `Communicator.allgather`."""
        runtime = runtime_of(type(values), "values")
        if runtime is None:
            raise TypeError("NCCL exchanges CuPy arrays, got a NumPy array; move it, or exchange it by mpi()")
        gathered = empty(runtime, (self.size, *values.shape), values)
        if values.size:
            stream = self._xp.cuda.get_current_stream()
            self._comm.allgather(values.reshape(-1), gathered.reshape(-1), stream=stream.ptr)
        return gathered

    def _gather_bytes(self, values: np.ndarray) -> np.ndarray:
        if self._bootstrap is not None:
            return self._bootstrap._gather_bytes(values)
        gathered = self.allgather(self._xp.asarray(values))
        self.synchronize()
        return gathered.get()

    def synchronize(self) -> None:
        """Wait on the host for what is enqueued on the current stream, all-gathers too.

        Raises
        ------
        RankError
            If it does not end within the time-out, or NCCL has an error; the communicator is aborted then. With a
            bootstrap by MPI the message names the ranks that are missing.
        """
        stream, begin = self._xp.cuda.get_current_stream(), time.monotonic()

        def ended() -> bool:
            state = int(self._comm.get_async_error())
            if state not in (SUCCESS, IN_PROGRESS):
                raise self._failed(f"NCCL has the error {state}: {self._comm.get_last_error()}")
            return stream.done

        if isinstance(self._bootstrap, MPICommunicator):
            self._bootstrap.number += 1
            try:
                self._bootstrap.wait(ended)
            except RankError:
                self._comm.abort()
                raise
            return
        while not ended():
            if time.monotonic() - begin > self.timeout:
                raise self._failed(f"it did not end within {self.timeout:g} s: a rank is missing")
            time.sleep(NAP)

    def _failed(self, reason: str) -> RankError:
        self._comm.abort()
        return RankError(f"rank {self.rank} of {self.size}, all-gather: {reason}")

    def split(self, color: int) -> NCCLCommunicator:
        """Return the group of the ranks that give this color; see `Communicator.split`."""
        color = check.integer("color", color, 0)
        bootstrap = None if self._bootstrap is None else self._bootstrap.split(color)
        return NCCLCommunicator(self._comm.split(color, self.rank), self._xp, self.timeout, bootstrap)

    def abort(self, reason: str) -> None:
        """Abort the communicator, and end all processes where they are ranks of MPI."""
        self._comm.abort()
        if self._bootstrap is not None:
            self._bootstrap.abort(reason)


def nccl(bootstrap: Communicator | None = None, *, timeout: float = TIMEOUT) -> NCCLCommunicator:
    """Return a communicator of ranks with a GPU each: the current device of CuPy; all ranks must call this.

    Parameters
    ----------
    bootstrap : Communicator, optional
        Ranks, such as `mpi` returns, through which NCCL's identifier gets to all; by default this process is the only
        rank.
    timeout : float
        Time that `NCCLCommunicator.synchronize` waits for the other ranks, in seconds.

    Returns
    -------
    NCCLCommunicator
        Communicator of the same ranks.

    Raises
    ------
    ImportError
        If nccl4py, NCCL or CuPy is missing; the message says how to install them.
    TypeError, ValueError
        If an argument is wrong.
    """
    timeout = check.number("timeout", timeout, 0)
    rank, size = (0, 1) if bootstrap is None else (checked(bootstrap).rank, bootstrap.size)
    try:
        from nccl import core

        from bnkernels.runtime.cuda import CudaRuntime
    except ImportError as error:
        raise ImportError(
            f"NCCL needs CuPy and nccl4py ({error}): pip install 'bnkernels[cuda13,nccl]', or nccl4py and "
            "nvidia-nccl-cu12 beside 'bnkernels[cuda12]'"
        ) from error
    try:
        own = bytes(core.get_unique_id()) if rank == 0 else bytes(UNIQUE_ID_BYTES)
        if bootstrap is not None:
            own = bootstrap._gather_bytes(np.frombuffer(own, np.uint8))[0].tobytes()
        comm = core.Communicator.init(size, rank, core.UniqueId.from_bytes(own))
    except RuntimeError as error:  # cuda-pathfinder looks for libnccl.so.2 at the first call
        if "libnccl" not in str(error):
            raise
        raise ImportError(f"NCCL itself is missing ({error}): pip install 'bnkernels[nccl]'") from error
    return NCCLCommunicator(comm, CudaRuntime.xp, timeout, bootstrap)
