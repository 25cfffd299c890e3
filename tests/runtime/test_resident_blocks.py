"""Blocks that wait for one another are resident at once: every plan of every op, on every device of a table.

What is resident follows from the registers that the compiler reports, not from what a planner believes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.counts.devices import DEVICES, SM_75, Device
from benchmarks.counts.limits import occupancy
from bnkernels.ops import gemm
from bnkernels.ops.batch_norm import launch as batch_norm
from bnkernels.ops.batch_norm import problem as batch_norm_problem
from bnkernels.ops.fused_training import launch as fused
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.ops.layer_norm import launch as layer_norm
from bnkernels.ops.layer_norm import long_rows
from bnkernels.ops.linear_batch_norm import launch as linear
from bnkernels.ops.linear_batch_norm.problem import Problem
from bnkernels.ops.linear_softmax_cross_entropy import launch as linear_softmax
from bnkernels.ops.lstm import launch as lstm
from bnkernels.ops.softmax_cross_entropy.op import LABELS
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import Launch, Limits

ROOT = Path(__file__).parents[2]
TYPES = [np.dtype(name) for name in ("float32", "float64", "float16")]
try:
    from ml_dtypes import bfloat16

    TYPES.append(np.dtype(bfloat16))
except ImportError:
    pass
DIRECTIONS = "forward", "backward"
NORMS = "batch", "layer", None
Plan = tuple[str, Launch]  # a kernel, and how it is launched


@cache
def registers_of(kernel: str, architecture: str) -> int:
    """Return the registers of a thread, with the compiler that takes most of those in the committed baseline."""
    files = (ROOT / "tools/compile").glob("baseline*.json")
    rows = [json.loads(file.read_text(encoding="utf-8"))["registers"].get(kernel, {}) for file in files]
    return max(row[architecture] for row in rows if architecture in row)


def limits_of(device: Device) -> Limits:
    """Return the limits of a device, with clusters where it has them."""
    return device.choice._replace(clusters=int(device.architecture.name) >= 90)


# ---- every plan -----------------------------------------------------------------------------------------------------


def batch_norm_plans(limits: Limits) -> Iterator[Plan]:
    """Yield those of the cooperative kernels; no other batch-norm kernel waits."""
    examples, channels = (4000, 70_000, 10**6), (16, 64, 99, 1000, 1022, 4096)
    shapes = [(n, c, 1) for n, c in product(examples, channels)]
    shapes += [(n, c, inner) for n, c, inner in product((1, 8, 256), (1, 3, 64, 256), (49, 196, 3136, 50_176, 10**6))]
    for dtype, kind, shape in product(TYPES, (batch_norm_problem.FORWARD, batch_norm_problem.BACKWARD), shapes):
        strides = shape[1] * shape[2], shape[2], 1 if shape[2] > 1 else 0
        inputs = batch_norm.PLANES[kind.direction]
        for groups in (1, 7):
            problem = batch_norm_problem.Problem(groups, *shape, dtype, (strides,) * inputs)
            count = batch_norm.elements_of_access(kind, problem)
            choice = batch_norm.cooperative(kind, problem, limits, count) if count else None
            if choice is not None:
                yield choice.kernel, choice.launch


def layer_norm_plans(limits: Limits) -> Iterator[Plan]:
    """Yield one for each data type and shape."""
    columns = (1, 8, 20, 64, 256, 768, 1000, 1024, 2047, 2048, 4096, 5120, 8192, 20_000, 300_000)
    for dtype, rows, c in product(TYPES, (1, 64, 700, 5000, 100_000), columns):
        problem = layer_norm.Problem(rows, c, dtype)
        backwards = (layer_norm.choose_backward(problem, limits, curved) for curved in (False, True))
        for chosen in (layer_norm.choose_forward(problem, limits), *backwards):
            yield chosen.kernel, chosen.launch


def group_norm_plans(limits: Limits) -> Iterator[Plan]:
    """Yield one for each data type and shape; a backward has as many blocks for each group of channels."""
    sizes = product(TYPES, (1, 64, 5000), (1, 2, 32, 300), (1, 10, 16), (1, 49, 3136, 20_000), (False, True))
    for dtype, examples, groups, channels, inner, last in sizes:
        shape = {"channel_groups": groups, "inner": inner, "channels_last": last and inner > 1}
        problem = layer_norm.Problem(examples * groups, channels * inner, dtype, **shape)
        for curved in (False, True):
            chosen = layer_norm.choose_backward(problem, limits, curved)
            assert chosen.launch.grid[0] % groups == 0
            yield chosen.kernel, chosen.launch


def linear_plans(limits: Limits) -> Iterator[Plan]:
    """Yield those of the kernels; where there is none, a library multiplies."""
    sizes = product((2, 64, 100, 512), (1, 64, 784, 1024), (1, 20, 100, 1000, 1024), TYPES)
    for size, norm, direction, dx in product(sizes, NORMS, DIRECTIONS, (True, False)):
        problem = Problem(*size)
        for precision in (None, "tf32x3")[: 2 if limits.tf32 and problem.dtype == np.float32 else 1]:
            chosen = linear.choose(direction, problem, limits, dx, norm, precision)
            if chosen is not None:
                yield chosen.kernel, chosen.launch


def linear_softmax_plans(limits: Limits) -> Iterator[Plan]:
    """Yield those of the kernel; where there is none, a library multiplies."""
    sizes = product((2, 64, 100, 512), (1, 64, 784, 1024), (1, 10, 100, 1000, 1024), TYPES[:2])
    for size, labels in product(sizes, LABELS):
        chosen = linear_softmax.choose(*size, labels, limits)
        if chosen is not None:
            yield chosen.kernel, chosen.launch


def lstm_plans(limits: Limits) -> Iterator[Plan]:
    """Yield those of whole sequences; where there is none, every step is a launch."""
    sizes = product((1, 2, 64, 100, 512), (1, 20, 100, 256, 500, 512), TYPES[:2], ("batch", None), DIRECTIONS)
    for rows, units, dtype, norm, direction in sizes:
        chosen = lstm.choose_sequence(direction, lstm.Problem(9, rows, 1, units, dtype, norm, True, 0), limits)
        if chosen is not None:
            yield chosen.kernel, chosen.launch


def networks() -> Iterator[fused.Problem]:
    """Yield what may be trained in one launch."""
    hidden = (64, 20, 10), (64, 300, 10), (784, 100, 100, 100, 10), (64, 1024, 10), (1000, 9, 2), (8, 300, 1000)
    given = product(hidden, ("batch", "layer"), (2, 64, 512), TYPES[:2], ("sgd", "adam"), (1, 3, 30, 200))
    for sizes, norm, batch, dtype, optimizer, models in given:
        pairs = list(pairwise(sizes))
        layers = tuple(LayerSpec(i, o, 0, -(n + 1 == len(pairs)), 0) for n, (i, o) in enumerate(pairs))
        parameters = sum((i + 2) * o for i, o in pairs)
        network = NetworkSpec(layers, norm=norm)
        yield fused.Problem(network, batch, optimizer, dtype, parameters, 2 * sum(sizes[1:-1]), models)


def fused_training_plans(limits: Limits) -> Iterator[Plan]:
    """Yield those of the networks that the device takes, with clusters and without."""
    for given, clusters in product(networks(), {False, limits.clusters}):
        choice = fused.choose(given, limits._replace(clusters=clusters))
        if choice is not None:
            yield choice.kernel, choice.launch


OPS = {
    "batch_norm": batch_norm_plans,
    "layer_norm": layer_norm_plans,
    "group_norm": group_norm_plans,
    "linear_batch_norm": linear_plans,
    "linear_softmax_cross_entropy": linear_softmax_plans,
    "fused_training": fused_training_plans,
    "lstm": lstm_plans,
}


@cache
def plans_of(op: str, device: Device) -> frozenset[Plan]:
    """Return all plans of an op for a device."""
    return frozenset(OPS[op](limits_of(device)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_blocks_that_wait_are_resident_and_others_fit(device: Device, op: str) -> None:
    architecture, cooperatives = device.architecture, 0
    for kernel, launch in plans_of(op, device):
        registers = registers_of(kernel, architecture.name)
        blocks = occupancy(architecture, launch.threads, registers, launch.shared_bytes).blocks
        assert blocks >= 1, f"{kernel}: not one block of {launch} fits"
        if launch.cooperative:
            cooperatives += 1
            assert launch.blocks <= blocks * device.sms, f"{kernel}: {launch}, {blocks} fit on each of {device.sms}"
    assert cooperatives > 0, "a table without such a plan would show nothing"


# ---- what a planner believes ----------------------------------------------------------------------------------------


NAMES = {
    "suffix": "(?:f16|bf16|(?:tf32x3_)?f32|f64)",
    "labels": "(?:i32|i64)",
    "variant": "(?:cooperative(?:_inner)?(?:_pair|_single)?|linear|curved|plain|batch)",
}  # parameters of macros


@cache
def promise_of(kernel: str) -> int:
    """Return how many blocks on a multiprocessor the launch bounds of a kernel promise."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cuda").glob("*.cu"))
    made = re.findall(r"BNK_KERNEL\w*\((bnk_[\w#]+), \([^)]*\), \w+, (\d),", re.sub(r"\s*\\\n\s*", " ", text))
    patterns = [("".join(NAMES.get(part, part) for part in name.split("##")), int(blocks)) for name, blocks in made]
    (blocks,) = (blocks for pattern, blocks in patterns if re.fullmatch(pattern, kernel))
    return blocks


@pytest.mark.parametrize(
    ("op", "planner", "among"),
    [
        ("batch_norm", batch_norm, ""),
        ("layer_norm", layer_norm, "backward_(linear|curved)"),
        ("layer_norm", long_rows, "(forward|backward)_cooperative"),
        ("group_norm", long_rows, "forward_cooperative_last|backward_cooperative_(linear|curved)_(?!last)"),
        ("group_norm", layer_norm, "backward_(cooperative_)?(linear|curved)_last"),
        ("lstm", lstm, ""),
        *((op, gemm, "") for op in ("linear_batch_norm", "linear_softmax_cross_entropy", "fused_training")),
    ],
)
def test_launch_bounds_promise_what_planners_count_on(op: str, planner: ModuleType, among: str) -> None:
    plans = {plan for device in DEVICES for plan in plans_of(op, device)}
    kernels = {kernel for kernel, launch in plans if launch.cooperative and re.search(among, kernel)}
    assert {promise_of(kernel) for kernel in kernels} == {planner.MIN_BLOCKS}


@pytest.mark.parametrize("op", OPS)
def test_no_grid_is_larger_than_its_launch_bounds_allow(op: str) -> None:
    """One block more would be resident with today's compiler alone."""
    for device in DEVICES:
        limits = limits_of(device)
        for kernel, launch in plans_of(op, device):
            if launch.cooperative:
                held = resident(limits, launch.threads, launch.shared_bytes, promise_of(kernel))
                assert launch.blocks <= held, f"{kernel} on {device.name}: {launch}, {held} are promised"


# ---- what a device is refused ---------------------------------------------------------------------------------------


def test_a_network_is_refused_for_its_shared_memory_alone() -> None:
    """All other ops take on every device what they take on one: `OPS` has run them, or a library does."""
    most = max((limits_of(device) for device in DEVICES), key=lambda limits: (limits.shared_bytes, limits.sms))
    taken = [given for given in networks() if fused.why_not(given, most) is None]
    assert len(taken) > 100
    for device, given in product(DEVICES, taken):
        reason = fused.why_not(given, limits_of(device))
        assert reason is None or re.search(r"several need [\d,]+ bytes of shared memory each and have", reason), reason


def test_a_device_without_cooperative_launches_has_clusters_or_none_wait() -> None:
    for device in DEVICES:
        limits = limits_of(device)._replace(cooperative=False)
        for plans in OPS.values():
            assert not any(launch.cooperative for _, launch in plans(limits))


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_most_shared_memory_of_a_block_leaves_room_for_the_others(blocks: int) -> None:
    for limits in map(limits_of, DEVICES):
        most = most_shared(limits, blocks)
        assert resident(limits, 256, most, blocks) == blocks * limits.sms
        assert resident(limits, 256, most + 1, blocks) < blocks * limits.sms


def test_blocks_too_large_for_the_device_are_not_resident() -> None:
    limits = limits_of(DEVICES[0])
    assert DEVICES[0].architecture is SM_75
    assert resident(limits, 1024, 0, 2) == limits.sms
    assert resident(limits, 256, limits.shared_bytes + 1, 2) == 0
    assert resident(limits._replace(blocks_of_sm=1), 32, 0, 2) == limits.sms
