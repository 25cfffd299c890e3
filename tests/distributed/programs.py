"""Programs of a rank, which tests start under mpiexec: ``python -m tests.distributed.programs NAME``."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

import bnkernels as bn
from bnkernels import nn
from bnkernels.distributed import (
    Communicator,
    GradientExchange,
    RankError,
    mpi,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from tools import oracle

SHARDS = (7, 0, 30, 3)
TIMEOUT = 2.0


def concatenated() -> None:
    """Compare uneven and empty parts on four ranks with extended precision, and the ranks with one another."""
    ranks = mpi()
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float64"):
        x, dy = (rng.standard_normal((sum(SHARDS), 5)) + offset for offset in (300, 0.2))
        x, dy, gamma, beta = (a.astype(dtype) for a in (x, dy, rng.uniform(0.5, 2, 5), rng.standard_normal(5)))
        mine = slice(sum(SHARDS[: ranks.rank]), sum(SHARDS[: ranks.rank + 1]))
        running = np.zeros(5, dtype), np.ones(5, dtype)
        y, statistics = sync_batch_norm_forward(ranks, x[mine], gamma, beta, *running, activation="tanh")
        options = {"activation": "tanh"}
        dx, dgamma, dbeta = sync_batch_norm_backward(ranks, dy[mine], x[mine], gamma, beta, statistics, **options)
        exact = oracle.forward(x, gamma, beta, 1e-5, "tanh")
        grads = oracle.backward(dy, x, gamma, beta, 1e-5, "tanh")
        oracle.assert_within(y, exact.y[mine], 2 * exact.z_bound[mine], "y")
        oracle.assert_within(dx, grads.dx[mine], 2 * grads.dx_bound[mine], "dx")
        totals = ranks.allgather(np.stack([dgamma, dbeta])).sum(0)
        oracle.assert_within(totals[0], grads.dgamma, 2 * grads.dgamma_bound, "dgamma")
        oracle.assert_within(totals[1], grads.dbeta, 2 * grads.dbeta_bound, "dbeta")
        for array in (statistics, *running):
            each = ranks.allgather(array)
            np.testing.assert_array_equal(each, each[:1].repeat(ranks.size, 0))
    groups(ranks)
    done(ranks)


def groups(ranks: Communicator) -> None:
    """Normalise in two groups of two ranks."""
    x = np.random.default_rng(1).standard_normal((4, 6, 3))
    y, _ = sync_batch_norm_forward(ranks.split(ranks.rank % 2), x[ranks.rank])
    right, _ = bn.batch_norm_forward(np.concatenate([x[ranks.rank % 2], x[ranks.rank % 2 + 2]]))
    np.testing.assert_allclose(y, right.reshape(2, 6, 3)[ranks.rank // 2], rtol=1e-12, atol=1e-14)


def model() -> None:
    """Train a converted model for a few steps, of 16-bit data at the end of it, and compare the ranks' bits."""
    ranks = mpi()
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((64, 8)).astype("float32"), rng.integers(0, 3, 64).astype("int32")
    layers = nn.Linear(8, 6, bias=False, seed=0), nn.BatchNorm(6, activation="relu"), nn.Linear(6, 3, seed=1)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*layers), ranks)
    parameters, gradients = network.flatten()
    optimiser, exchange = nn.SGD(network, lr=0.3), GradientExchange(ranks, [gradients])
    mine = slice(64 * ranks.rank // ranks.size, 64 * (ranks.rank + 1) // ranks.size)
    losses = []
    for _ in range(30):
        each, dlogits = bn.softmax_cross_entropy(network(x[mine]), labels[mine])
        network.backward(dlogits / ranks.size)
        exchange(1.0)
        optimiser.step()
        losses.append(each.mean())
    assert losses[-1] < 0.9 * losses[0]
    each = ranks.allgather(parameters)
    np.testing.assert_array_equal(each, each[:1].repeat(ranks.size, 0))
    half = nn.SyncBatchNorm(3, communicator=ranks, name="half", dtype="float16")
    assert half(rng.standard_normal((4, 3)).astype("float16")).dtype == np.float16
    done(ranks)


def differ() -> None:
    """Expect the same error on all ranks where they differ; they can go on then."""
    ranks = mpi(timeout=20)
    odd = ranks.rank == 1
    for given, text in (
        ({"x": np.ones((4, 3 + odd))}, "4 channels"),
        ({"x": np.ones((4, 3), "float32" if odd else "float64")}, "float32"),
        ({"x": np.ones((4, 3)), "eps": 1e-3 if odd else 1e-5}, "eps 0.001"),
        ({"x": np.ones((4, 3)), "name": "second" if odd else "first"}, "layer 'second'"),
    ):
        try:
            sync_batch_norm_forward(ranks, **given)
        except RankError as error:
            message = str(error)
        assert "rank 1" in message
        assert text in message, message
        ranks.agree(message)  # it is the same on all
    done(ranks)


def lengths() -> None:
    """Gather arrays of different lengths, which no message announced."""
    ranks = mpi(timeout=TIMEOUT)
    ranks.allgather(np.ones(100 * (ranks.rank + 1)))


def raises() -> None:
    """Fail on one rank while the others wait for it."""
    ranks = mpi()
    if ranks.rank == 1:
        raise ValueError("a mistake on one rank")
    ranks.allgather(np.ones(3))


def killed() -> None:
    """Die on one rank."""
    ranks = mpi()
    if ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.allgather(np.ones(3))


def sleeps() -> None:
    """Do something else on one rank."""
    ranks = mpi(timeout=TIMEOUT)
    if ranks.rank == 1:
        time.sleep(600)
    ranks.allgather(np.ones(3))


def stopped() -> None:
    """Stop on one rank, as a debugger or a broken machine would."""
    ranks = mpi(timeout=TIMEOUT)
    ranks.allgather(np.ones(3))
    if ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.allgather(np.ones(3))


def done(ranks: Communicator) -> None:
    """Say that this rank has come to its end."""
    print(f"rank {ranks.rank} of {ranks.size} has finished", flush=True)


PROGRAMS: dict[str, Callable[[], None]] = {
    program.__name__: program for program in (concatenated, model, differ, lengths, raises, killed, sleeps, stopped)
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
