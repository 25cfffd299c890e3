"""Bytes that the kernels move, counted access by access, against the Traffic field of each header in ``cuda/``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.counts import counting, traffic
from benchmarks.counts.devices import RTX_5090
from benchmarks.harness.case import Case
from bnkernels.ops.batch_norm.launch import SERIAL_WORKERS
from tools.emulator import Counts, EmulatorRuntime, LaunchRecord

pytestmark = pytest.mark.emulator

# A thread holds 16 float32 or 8 float64 beyond registers4; a block has 512 threads for 1 to 32 channels. Up to 64 KiB,
# beyond which the cooperative kernels are taken.
HELD = [
    (shape, dtype) for shape in [(2, 1), (64, 20), (67, 32), (128, 33), (1024, 3)] for dtype in ("float32", "float64")
]
HELD += [((256, 33), "float32"), ((257, 20), "float32"), ((129, 20), "float64"), ((8192, 1), "float32")]
STREAMED = [((8193, 1), "float32"), ((4100, 1), "float64"), ((2049, 3), "float32"), ((1366, 3), "float64")]
STREAMED += [((400, 33), "float32"), ((240, 33), "float64"), ((257, 32), "float32"), ((129, 33), "float64")]


def barriers(record: LaunchRecord) -> int:
    """Return the barriers of a reduction: a second one where its workers merge in two levels."""
    return 2 if record.launch.block[1] > SERIAL_WORKERS else 1


@pytest.fixture
def counted(emulated: EmulatorRuntime) -> EmulatorRuntime:
    """Return the emulator, of a build that sees accesses."""
    if emulated.build not in ("plain", "coverage"):
        pytest.skip(f"the build {emulated.build!r} does not count accesses")
    return emulated


def make(runtime: EmulatorRuntime, *shape: int, dtype: str = "float32") -> np.ndarray:
    return runtime.asarray(np.random.default_rng(0).uniform(0.5, 2, shape).astype(dtype))


def only_launch(runtime: EmulatorRuntime, kernel: str) -> Counts:
    """Return the counts of the launch since the last call: one, of this kernel."""
    (record,) = runtime.launches
    assert record.entry_point.startswith(f"bnk_{kernel}_f")
    counts = record.counts
    runtime.reset()
    return counts


def assert_moved(counts: Counts, array: np.ndarray, *, reads: int = 0, writes: int = 0) -> None:
    """Check how often each byte of the array was read and written."""
    traffic = counts.of(array)
    assert (traffic.bytes_read, traffic.unique_bytes_read) == (reads * array.nbytes, min(reads, 1) * array.nbytes)
    assert (traffic.bytes_written, traffic.unique_bytes_written) == (
        writes * array.nbytes,
        min(writes, 1) * array.nbytes,
    )


def assert_only(counts: Counts, *arrays: np.ndarray) -> None:
    """Check that nothing but these arrays was touched."""
    assert sum((traffic.unique_bytes_read + traffic.unique_bytes_written) for traffic in counts.arrays.values()) == sum(
        counts.of(array).unique_bytes_read + counts.of(array).unique_bytes_written for array in arrays
    )


def test_64_by_20_is_one_launch_one_barrier_and_each_byte_once(counted: EmulatorRuntime) -> None:
    """The question of the project: mean and variance over the whole mini-batch cost no second pass over it."""
    x, dy = (make(counted, 64, 20) for _ in range(2))
    gamma, beta, running_mean, running_var = (make(counted, 20) for _ in range(4))
    y, statistics = bn.batch_norm_forward(x, gamma, beta, running_mean, running_var, activation="relu")
    (record,) = counted.launches
    assert (record.launch.grid, record.launch.block) == ((1, 1, 1), (20, 16, 1))
    counts = only_launch(counted, "batch_norm_forward_registers4")
    assert counts.barriers == 1
    assert_moved(counts, x, reads=1)
    assert_moved(counts, y, writes=1)
    assert_moved(counts, statistics, writes=1)
    for running in (running_mean, running_var):
        assert_moved(counts, running, reads=1, writes=1)
    for vector in (gamma, beta):
        assert_moved(counts, vector, reads=16)  # by each of the 16 workers
    assert_only(counts, x, y, statistics, running_mean, running_var, gamma, beta)

    dx, dgamma, dbeta = bn.batch_norm_backward(dy, x, gamma, beta, statistics, activation="relu")
    counts = only_launch(counted, "batch_norm_backward_registers4")
    assert counts.barriers == 1
    for array in (x, dy):
        assert_moved(counts, array, reads=1)
    for array in (dx, dgamma, dbeta):
        assert_moved(counts, array, writes=1)
    assert_only(counts, x, dy, dx, gamma, beta, statistics, dgamma, dbeta)


@pytest.mark.parametrize(("shape", "dtype"), HELD + STREAMED)
def test_training_reads_held_rows_once_and_two_pass_rows_twice(
    counted: EmulatorRuntime, shape: tuple[int, int], dtype: str
) -> None:
    x, dy = (make(counted, *shape, dtype=dtype) for _ in range(2))
    y, statistics = bn.batch_norm_forward(x)
    (forward,) = counted.launches
    dx, dgamma, dbeta = bn.batch_norm_backward(dy, x, None, None, statistics)
    _, backward = counted.launches
    streamed = (shape, dtype) in STREAMED
    for record in (forward, backward):
        assert ("two_pass" in record.entry_point) == streamed
        assert record.counts.barriers == barriers(record)
    assert_moved(forward.counts, x, reads=1 + streamed)
    assert_moved(forward.counts, y, writes=1)
    assert_moved(forward.counts, statistics, writes=1)
    for array in (x, dy):
        assert_moved(backward.counts, array, reads=1 + streamed)
    for array in (dx, dgamma, dbeta):
        assert_moved(backward.counts, array, writes=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (64, 20), (600, 33), (1100, 3)])
def test_inference_reads_and_writes_once_at_any_length(
    counted: EmulatorRuntime, shape: tuple[int, int], dtype: str
) -> None:
    x, dy = (make(counted, *shape, dtype=dtype) for _ in range(2))
    mean, var = (make(counted, shape[1], dtype=dtype) for _ in range(2))
    y = bn.batch_norm_inference(x, None, None, mean, var)
    counts = only_launch(counted, "batch_norm_inference")
    assert counts.barriers == 0
    assert_moved(counts, x, reads=1)
    assert_moved(counts, y, writes=1)
    assert_only(counts, x, y, mean, var)

    dx, dgamma, dbeta = bn.batch_norm_inference_backward(dy, x, None, None, mean, var)
    expected = barriers(counted.launches[0])
    counts = only_launch(counted, "batch_norm_inference_backward")
    assert counts.barriers == expected
    for array in (x, dy):
        assert_moved(counts, array, reads=1)
    for array in (dx, dgamma, dbeta):
        assert_moved(counts, array, writes=1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3, 40), 1), ((2, 3, 8, 9), 1), ((4, 6, 5, 3), -1), ((3, 70, 2), 1)])
def test_any_channel_axis_reads_and_writes_once(
    counted: EmulatorRuntime, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    """No transposition, no copy: one launch each, and a residual costs one read and its gradient one write."""
    x, dy, residual = (make(counted, *shape, dtype=dtype) for _ in range(3))
    y, statistics = bn.batch_norm_forward(x, axis=axis, residual=residual, activation="relu")
    (forward,) = counted.launches
    grads = bn.batch_norm_backward(dy, x, None, None, statistics, axis=axis, residual=residual, activation="relu")
    _, backward = counted.launches
    for record in (forward, backward):
        assert "registers" in record.entry_point
        assert record.counts.barriers == barriers(record)
    for array in (x, residual):
        assert_moved(forward.counts, array, reads=1)
        assert_moved(backward.counts, array, reads=1)
    assert_moved(forward.counts, y, writes=1)
    assert_moved(backward.counts, dy, reads=1)
    for array in grads:
        assert_moved(backward.counts, array, writes=1)
    counted.reset()
    vectors = grads[1], make(counted, shape[axis], dtype=str(grads[1].dtype))
    frozen = bn.batch_norm_inference(x, None, None, *vectors, axis=axis)
    counts = only_launch(counted, "batch_norm_inference")
    assert_moved(counts, x, reads=1)
    assert_moved(counts, frozen, writes=1)


@pytest.mark.parametrize("shape", [(1, 1), (64, 10), (9, 70)])
def test_softmax_cross_entropy_of_few_classes_reads_and_writes_once(
    counted: EmulatorRuntime, shape: tuple[int, int]
) -> None:
    logits, labels = make(counted, *shape), counted.asarray(np.zeros(shape[0], np.int64))
    loss, dlogits = bn.softmax_cross_entropy(logits, labels)
    counts = only_launch(counted, "softmax_cross_entropy_few_i64")
    assert counts.barriers == 0
    assert_moved(counts, logits, reads=1)
    assert_moved(counts, labels, reads=32)  # by each worker of the row's warp
    assert_moved(counts, loss, writes=1)
    assert_moved(counts, dlogits, writes=1)
    assert_only(counts, logits, labels, loss, dlogits)


def test_every_size_of_the_table_can_be_counted() -> None:
    """The launches change, and what of them is counted has to change with them."""
    for case in traffic.CASES:
        small, times = counting.part_to_count(case, traffic.MOST)
        assert small.size * times == case.size


@pytest.mark.parametrize("size", [1, 256, 1530])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "rmsprop", "adam"])
def test_parameter_update_reads_and_writes_each_array_once(
    counted: EmulatorRuntime, rule: str, size: int, dtype: str
) -> None:
    parameters, gradients, *moments = (make(counted, size, dtype=dtype) for _ in range(4))
    state = moments[: {"sgd": 0, "adam": 2}.get(rule, 1)]
    options = {"step": 1} if rule == "adam" else {}
    getattr(bn, f"{rule}_update")(parameters, gradients, *state, lr=0.1, **options)
    counts = only_launch(counted, f"parameter_update_{rule}")
    assert counts.barriers == 0
    assert_moved(counts, gradients, reads=1)
    for array in (parameters, *state):
        assert_moved(counts, array, reads=1, writes=1)
    assert_only(counts, parameters, gradients, *state)


def test_the_table_judges_what_was_counted(
    counted: EmulatorRuntime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case("batch_norm", "forward", shape) for shape in [(64, 20), (1024, 64), (2000, 6)]]
    monkeypatch.setattr(traffic, "CASES", cases)
    assert traffic.main() == 1, "2000 x 6 lies in no vectors of 16 bytes: it is streamed, and read twice"
    *_, first, second, third, last = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" at the limit") and "NOT" not in line for line in (first, second))
    assert "144,000 of         96,000 bytes  NOT at the limit" in third
    assert last == "2 of 3 at the limit"
    monkeypatch.setattr(traffic, "CASES", cases[:2])
    assert traffic.main() == 0


def test_what_does_not_fit_on_the_chip_may_be_read_twice(
    counted: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "DEVICE", dataclasses.replace(RTX_5090, sms=2))
    line = traffic.line_of(Case("batch_norm", "backward", (20_000, 8)))
    assert line.at_the_limit
    assert 0.05 < line.on_chip < 0.5
    assert line.moved > 3 * line.case.size * line.case.itemsize
    assert line._replace(launches=2).at_the_limit is line._replace(moved=line.moved + 1).at_the_limit is False
