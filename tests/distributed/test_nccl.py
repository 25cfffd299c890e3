"""Ranks of NCCL: our code on a stand-in at nccl4py's own seam, the stand-in against the package, one rank on a GPU."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.distributed import (
    Communicator,
    GradientExchange,
    RankError,
    nccl,
    run_threads,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from bnkernels.distributed.nccl import IN_PROGRESS, SUCCESS, UNIQUE_ID_BYTES
from bnkernels.runtime import registry
from tests.runtime.test_cuda_runtime import forget_the_runtime
from tools import fake_nccl
from tools.emulator import EmulatorRuntime
from tools.fake_cupy import graphs, streams

OWN = {"streams", "state", "init"}  # members for tests; and `init`, which is compared by itself


@pytest.fixture
def cupy(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Put the stand-ins in the places of CuPy and nccl4py."""
    stand_in, package = streams.make(emulated), fake_nccl.make()
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setitem(sys.modules, "nccl", package)
    monkeypatch.setitem(sys.modules, "nccl.core", package.core)
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    forget_the_runtime()
    yield stand_in
    forget_the_runtime()


@pytest.mark.emulator
def test_ranks_with_a_device_array_each_are_the_mini_batch(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 12, 5)).astype("float32")

    def work(bootstrap: Communicator) -> list[np.ndarray]:
        ranks = nccl(bootstrap)
        assert (ranks.rank, ranks.size) == (bootstrap.rank, 2)
        mine = slice(0, 3) if ranks.rank == 0 else slice(3, 12)
        part, gradient = cupy.asarray(x[mine]), cupy.asarray(dy[mine])
        with cupy.cuda.Stream(non_blocking=True) as stream:
            y, statistics = sync_batch_norm_forward(ranks, part, activation="relu")
            given = gradient, part, None, None, statistics
            dx, dgamma, _ = sync_batch_norm_backward(ranks, *given, activation="relu")
        assert ranks._comm.streams == [stream.ptr] * 2  # the agreements go by the bootstrap
        flat = cupy.asarray(np.array([1.0 + ranks.rank, 2.0]))
        assert GradientExchange(ranks, [flat])(1.0, flag=ranks.rank) == 1
        np.testing.assert_array_equal(flat.get(), [3, 4])
        return [array.get() for array in (y, dx, dgamma)]

    found = run_threads(2, work, timeout=20)
    y, statistics = bn.batch_norm_forward(x, activation="relu")
    dx, dgamma, _ = bn.batch_norm_backward(dy, x, None, None, statistics, activation="relu")
    for place, right in ((0, y), (1, dx)):
        np.testing.assert_allclose(np.concatenate([of[place] for of in found]), right, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(found[0][2] + found[1][2], dgamma, rtol=1e-4, atol=1e-5)


@pytest.mark.emulator
def test_groups(cupy: types.ModuleType) -> None:
    def work(bootstrap: Communicator) -> list[float]:
        group = nccl(bootstrap).split(bootstrap.rank % 2)
        return group.allgather(cupy.asarray(np.array([float(bootstrap.rank)]))).get()[:, 0].tolist()

    assert run_threads(4, work, timeout=20) == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.mark.emulator
def test_one_rank_needs_no_bootstrap_and_agrees_by_nccl_itself(cupy: types.ModuleType) -> None:
    ranks = nccl()
    ranks.agree("something")
    y, _ = sync_batch_norm_forward(ranks, cupy.asarray(np.array([[1.0], [3.0]], "float32")))
    np.testing.assert_allclose(y.get(), [[-1], [1]], rtol=1e-4)
    with pytest.raises(TypeError, match="NCCL exchanges CuPy arrays"):
        ranks.allgather(np.ones(3))


@pytest.mark.emulator
def test_a_rank_that_is_missing_ends_the_wait_and_aborts(
    cupy: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = nccl(timeout=0.05)
    monkeypatch.setattr(graphs.Stream, "done", False)
    with pytest.raises(RankError, match=r"did not end within 0\.05 s: a rank is missing"):
        ranks.synchronize()
    with pytest.raises(fake_nccl.NcclInvalid, match="not initialized"):
        ranks.allgather(cupy.asarray(np.ones(3)))


@pytest.mark.emulator
def test_an_error_of_nccl_is_told(cupy: types.ModuleType) -> None:
    ranks = nccl()
    ranks._comm.state = 2
    with pytest.raises(RankError, match="NCCL has the error 2: unhandled system error"):
        ranks.synchronize()


def test_without_nccl4py_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nccl", None)
    with pytest.raises(ImportError, match=r"pip install 'bnkernels\[cuda13,nccl\]'"):
        nccl()


# ---- the stand-in, and the package -----------------------------------------------------------------------------------


def real() -> types.ModuleType:
    return pytest.importorskip("nccl.core", reason="nccl4py is not installed: there are no wheels for this platform")


@pytest.mark.parametrize("name", ["Communicator", "UniqueId"])
def test_every_member_of_the_stand_in_is_one_of_the_package(name: str) -> None:
    ours, theirs = getattr(fake_nccl, name), getattr(real(), name)
    for member in [member for member in vars(ours) if not member.startswith("_") and member not in OWN]:
        assert hasattr(theirs, member), member
        assert_same_parameters(getattr(ours, member), getattr(theirs, member))
    if name == "Communicator":
        assert_same_parameters(ours.init, theirs.init)
        assert {"rank", "nranks"} <= {member for member, value in vars(theirs).items() if isinstance(value, property)}


def assert_same_parameters(ours: object, theirs: object) -> None:
    """Compare names, kinds and defaults of the parameters."""
    found, right = ([(p.name, p.kind) for p in inspect.signature(each).parameters.values()] for each in (ours, theirs))
    assert found == right


def test_functions_and_numbers_are_those_of_the_package() -> None:
    core = real()
    assert_same_parameters(fake_nccl.get_unique_id, core.get_unique_id)
    from nccl import bindings

    result = bindings.nccl.Result
    assert (int(result.Success), int(result.InProgress)) == (SUCCESS, IN_PROGRESS)
    assert len(bytes(core.UniqueId())) == UNIQUE_ID_BYTES == fake_nccl.BYTES
    assert isinstance(core.NcclInvalid("text"), Exception)


def test_a_stream_may_be_given_as_its_handle() -> None:
    """``int`` is one of the forms of a stream that the package takes, and CuPy arrays one of a buffer."""
    real()
    from nccl.core.cuda import get_stream_ptr

    assert get_stream_ptr(4096) == 4096


# ---- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_one_rank_on_a_gpu_is_batch_norm(rng: np.random.Generator) -> None:
    import cupy

    real()

    ranks, x = nccl(), cupy.asarray(rng.standard_normal((64, 20)).astype("float32"))
    with cupy.cuda.Stream(non_blocking=True):
        y, statistics = sync_batch_norm_forward(ranks, x)
        dx, *_ = sync_batch_norm_backward(ranks, y, x, None, None, statistics)
        ranks.synchronize()
        right, saved = bn.batch_norm_forward(x)
        right_dx, *_ = bn.batch_norm_backward(right, x, None, None, saved)
    cupy.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-6)
    cupy.testing.assert_allclose(dx, right_dx, rtol=1e-4, atol=1e-6)
