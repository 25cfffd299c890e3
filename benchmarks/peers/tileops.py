"""TileOPs: batch norm written in TileLang, the fastest published on an H200 (tile-ai/TileOPs, pull request 2056).

Channels come second in memory and nothing is fused behind the normalisation. It is installed from its repository, with
tilelang.
"""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider
from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.peers.pytorch import NEEDED, normalise_and_save, tensors_of
from benchmarks.peers.pytorch import absent as absent_pytorch

# The shapes of its own table, all float16: benchmarks/ops/bench_batch_norm.py times them too.
SHAPES = [(32, 64), (8, 64, 32, 32), (4, 128, 32, 32), (4, 256, 28, 28), (4, 128, 1024, 1024)]


def absent() -> str | None:
    """Return why TileOPs cannot run, or None."""
    return absent_pytorch("cuda") or (None if find_spec("tileops") else "TileOPs is not installed")


def prepare(case: Case, arrays: Arrays) -> Call:
    """Prepare a case; its first call compiles.

    Raises
    ------
    NotSupportedError
        For an activation, and for channels-last images.
    """
    if case.epilogue or case.layout == "NHWC":
        raise NotSupportedError("TileOPs normalises with channels second, and fuses nothing")
    from tileops.ops import BatchNormBwdOp, BatchNormFwdOp

    tensors = tensors_of(case, arrays)
    if case.direction == "forward":
        x, gamma, beta, running_mean, running_var = (tensors[name] for name in NEEDED["forward"])
        normalise = BatchNormFwdOp(training=True, momentum=MOMENTUM, eps=EPSILON)
        return lambda: (normalise(x, running_mean, running_var, gamma, beta), running_mean, running_var)
    x, gamma, beta, dy = (tensors[name] for name in NEEDED["backward"])
    _, mean, rstd = normalise_and_save(x, gamma, beta)
    differentiate = BatchNormBwdOp()
    return lambda: differentiate(dy, x, gamma, mean, rstd)


PROVIDERS = (Provider("TileOPs", "cuda", prepare, absent, engine="torch", slow_start=True),)
