"""Ranks that are processes, and exchange arrays by MPI."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import TIMEOUT, Communicator, RankError, named
from bnkernels.distributed.roll_call import LOOK, RollCall
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.cpu.threads import processors
from bnkernels.runtime.registry import runtime_of

# Variables that Open MPI, and the launchers of MPICH, Intel MPI and Slurm's PMI, set for each rank.
SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"
SPIN = 1e-4  # seconds of looking again and again, where each rank has a core, as MPI libraries do
PATIENT, NAP = 2e-2, 1e-4  # seconds of giving the core to others in between, after which a rank sleeps in between
ERROR_CODE = 1


def launched_by_mpi() -> bool:
    """Return whether ``mpiexec`` started this process.

    Returns
    -------
    bool
        Whether it did, by the variables that Open MPI, MPICH and Intel MPI set.
    """
    return any(name in os.environ for name in SIZES)


class MPICommunicator(Communicator):
    """Ranks of an MPI communicator, which `mpi` makes.

    An all-gather does not block in the library, where a missing rank could not be told and Ctrl-C would wait: this rank
    looks whether it has ended, gives the processor to others in between, and after a time-out finds out who is missing.
    """

    def __init__(self, comm: Any, timeout: float, cuda_aware: bool) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._roll_call = MPI, comm.Dup(), RollCall(comm)
        self.rank, self.size = comm.rank, comm.size
        self.timeout, self.cuda_aware = timeout, cuda_aware
        self.number = 0  # all-gathers so far
        beside = comm.Split_type(MPI.COMM_TYPE_SHARED)  # ranks of this machine
        self._crowded = beside.size > processors()
        beside.Free()

    def allgather(self, values: Any) -> Any:
        """Return the arrays of all ranks; see `Communicator.allgather`."""
        return self.start(values)()

    def start(self, values: Any) -> Callable[[], Any]:
        """Begin an all-gather, which goes on in the library; see `Communicator.start`."""
        runtime = runtime_of(type(values), "values")
        if runtime is not None:
            self._check_device(runtime)
        gathered = empty(runtime, (self.size, *values.shape), values)
        self.number += 1
        sent, received = _as_bytes(values), _as_bytes(gathered)
        try:
            request = self._comm.Iallgather(sent, received)
        except self._mpi.Exception as error:
            raise self._failed(f"MPI refuses it: {error}") from error
        return partial(self._end, request, gathered, values)

    def _check_device(self, runtime: Any) -> None:
        if not self.cuda_aware:
            raise TypeError(
                "MPI reads arrays in the memory of a GPU only where it was built for CUDA: say so by "
                "mpi(cuda_aware=True), or exchange them by nccl(mpi())"
            )
        runtime.xp.cuda.get_current_stream().synchronize()  # MPI knows of no stream

    def _end(self, request: Any, gathered: Any, values: Any) -> Any:
        """Wait for the end of an all-gather; `values` is kept alive until then."""
        try:
            if not request.Test():
                self.wait(request.Test)
        except self._mpi.Exception as error:
            raise self._failed(
                f"the ranks gather arrays of different lengths, this one {values.nbytes} bytes ({error})"
            ) from error
        return gathered

    def wait(self, ended: Callable[[], bool]) -> None:
        """Wait until a function says that a collective has ended.

        Parameters
        ----------
        ended : callable
            Function that returns whether it has.

        Raises
        ------
        RankError
            If it has not within the time-out: it names the ranks that are missing.
        """
        begin, looked = time.monotonic(), 0.0
        while not ended():
            waited = time.monotonic() - begin
            if waited < PATIENT:
                if self._crowded or waited > SPIN:
                    os.sched_yield()
                continue
            time.sleep(NAP)
            if waited - looked > LOOK:
                looked = waited
                self._roll_call.answer(self.number)
            if waited > self.timeout:
                missing = self._roll_call.missing(self.number)
                if ended():
                    return
                raise self._failed(
                    f"{named(missing)} did not come to it within {self.timeout:g} s: ended, stalled, or busy with "
                    "something else"
                    if missing
                    else f"it did not end within {self.timeout:g} s, though all ranks are in it: they may gather "
                    "arrays of different lengths"
                )

    def _failed(self, reason: str) -> RankError:
        _end_of_process.failed = True
        return RankError(f"rank {self.rank} of {self.size}, all-gather {self.number}: {reason}")

    def split(self, color: int) -> MPICommunicator:
        """Return the group of the ranks that give this color; see `Communicator.split`."""
        return MPICommunicator(
            self._comm.Split(check.integer("color", color, 0), self.rank), self.timeout, self.cuda_aware
        )

    def abort(self, reason: str) -> None:
        """End all processes, with the reason on standard error."""
        if self.size > 1:
            _abort(f"rank {self.rank} of {self.size} ends all ranks: {reason}")


class _EndOfProcess:
    """The last thing that a rank does: MPI would let a process with an error wait for those that wait for it."""

    failed = False
    registered = False

    def register(self) -> None:
        """Look at the end of the process how it ends."""
        if not self.registered:
            self.registered = True
            atexit.register(self)

    def __call__(self) -> None:
        """End all ranks if this one ends with an error: a collective that failed, or an exception nobody caught."""
        from mpi4py import MPI

        uncaught = getattr(sys, "last_value", None)
        if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1 and (self.failed or uncaught):
            reason = f"{type(uncaught).__name__}: {uncaught}" if uncaught else "a collective failed on it"
            _abort(f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} ends all ranks: {reason}")


_end_of_process = _EndOfProcess()


def _abort(message: str) -> None:
    from mpi4py import MPI

    sys.stdout.flush()
    print(f"bnkernels: {' '.join(message.split())}", file=sys.stderr, flush=True)
    MPI.COMM_WORLD.Abort(ERROR_CODE)


def mpi(comm: Any = None, *, timeout: float = TIMEOUT, cuda_aware: bool = False) -> MPICommunicator:
    """Return a communicator of MPI ranks; all of them must call this.

    A process that ends with an exception, or after a time-out, ends all ranks: MPI alone would wait for ever.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        Ranks; by default all that ``mpiexec`` started.
    timeout : float
        Time to wait for the other ranks, in seconds.
    cuda_aware : bool
        Whether the MPI library was built for CUDA, and reads CuPy arrays. NumPy arrays are always taken.

    Returns
    -------
    MPICommunicator
        Communicator.

    Raises
    ------
    ImportError
        If mpi4py or an MPI library is missing; the message says how to install them.
    TypeError, ValueError
        If an argument is wrong.
    """
    timeout, cuda_aware = check.number("timeout", timeout, 0), check.boolean("cuda_aware", cuda_aware)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # it finds the MPI library when it is imported
        raise ImportError(
            f"MPI needs mpi4py and an MPI library ({error}): pip install 'bnkernels[mpi]', which brings Open MPI"
        ) from error
    comm = MPI.COMM_WORLD if comm is None else comm
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm must be an mpi4py.MPI.Comm, got {check.shown(comm)}; drop it for all ranks")
    _end_of_process.register()
    return MPICommunicator(comm, timeout, cuda_aware)


def _as_bytes(array: Any) -> Any:
    """Return an array as MPI takes it: of whatever type, it is bytes."""
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8)
    return array
