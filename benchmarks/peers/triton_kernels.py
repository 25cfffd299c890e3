"""Batch norm in Triton, written by us for the comparison: what a day's work in that language gets.

One kernel where the rows of a few channels fit into the registers of a block of threads; else two, of which the first
ends with a merge of what its programs found, done by whichever of them is last. Block sizes follow from the shape;
nothing is tuned by trial.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider
from benchmarks.peers.pytorch import absent as absent_pytorch
from benchmarks.peers.pytorch import load, tensor_of

SECTOR = 32  # bytes: the least that global memory delivers
HELD_BYTES = {"forward": 128 << 10, "backward": 64 << 10}  # one operand in registers; the backward has two or three
TILE_BYTES = 16 << 10  # accumulators of a range of rows
MERGED_BYTES = 32 << 10  # read by the last program at once
PROGRAMS_PER_MULTIPROCESSOR = 4
MOST_ELEMENTS = 2**31 - 1


class Plan(NamedTuple):
    """Division of a case into programs.

    Attributes
    ----------
    block_rows, block_channels : int
        The tile of a program.
    split_rows : int
        The rows of a program; 0 if it holds all rows of its channels, in one tile.
    splits : int
        The programs that share the rows.
    warps : int
        Number of warps of a program.
    """

    block_rows: int
    block_channels: int
    split_rows: int
    splits: int
    warps: int

    def __str__(self) -> str:
        """Return the plan as the results show it."""
        tile = f"{self.block_rows} x {self.block_channels} tiles, {self.warps} warps"
        return f"rows split {self.splits} times, {tile}" if self.split_rows else f"all rows held, {tile}"


def absent() -> str | None:
    """Return why Triton has no GPU to compile for, or None."""
    return absent_pytorch("cuda") or (None if find_spec("triton") else "Triton is not installed")


@cache
def kernels() -> ModuleType:
    """Return the kernels."""
    from benchmarks.peers import _triton_batch_norm

    return _triton_batch_norm


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def sizes_of(case: Case) -> tuple[int, int, int]:
    """Return rows, channels, and how many rows are neighbours in memory.

    Raises
    ------
    NotSupportedError
        If places in memory do not fit into 32 bits, or the unbiased variance does not exist.
    """
    channels = case.shape[1]
    rows = case.size // channels
    if case.size > MOST_ELEMENTS:
        raise NotSupportedError("the kernels count elements in 32 bits")
    if rows < 2:
        raise NotSupportedError("the unbiased variance needs two values per channel")
    return rows, channels, 1 if case.layout == "NHWC" else rows // case.shape[0]


def plan_of(case: Case, multiprocessors: int) -> Plan:
    """Choose: hold all rows if they fit; else split them so far that every multiprocessor has a few programs."""
    rows, channels, length = sizes_of(case)
    acc_bytes = 8 if case.accumulator == "float64" else 4
    width = min(power_of_two(-(-SECTOR // (length * case.itemsize))), power_of_two(channels))
    held = power_of_two(rows) * width
    if held * acc_bytes <= HELD_BYTES[case.direction]:
        warps = min(max(held // 256, 1), 16)  # with more warps a thread has 64 registers, which is too few
        return Plan(power_of_two(rows), width, 0, 1, warps)
    width = min(2 * width, power_of_two(channels)) if length == 1 else width
    block_rows = min(TILE_BYTES // acc_bytes // width, power_of_two(rows))
    wanted = max(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // -(-channels // width), 1)
    wanted = min(wanted, MERGED_BYTES // acc_bytes // width)
    split_rows = -(-rows // (wanted * block_rows)) * block_rows
    return Plan(block_rows, width, split_rows, -(-rows // split_rows), 8)


def plan_on(x: Any, case: Case) -> Plan:
    """Return the plan for the GPU of a tensor."""
    return plan_of(case, load().cuda.get_device_properties(x.device).multi_processor_count)


def describe(case: Case, arrays: Arrays) -> str:
    """Return the plan."""
    try:
        return str(plan_on(tensor_of(arrays["x"]), case))
    except NotSupportedError:
        return ""


def prepare(case: Case, arrays: Arrays, plan: Plan | None = None) -> Call:
    """Prepare a case; the first call of a shape compiles.

    Parameters
    ----------
    case, arrays
        See `benchmarks.harness.case.Provider`.
    plan : Plan, optional
        By default what `plan_of` chooses for the GPU.
    """
    tensors = {name: tensor_of(array) for name, array in arrays.items()}
    plan = plan or plan_on(tensors["x"], case)
    if case.direction == "forward":
        call, _ = _forward(case, tensors, plan)
        return call
    torch = load()
    for name, value in (("running_mean", 0), ("running_var", 1)):
        tensors[name] = torch.full_like(tensors["gamma"], value)
    normalise, saved = _forward(case, tensors, plan)
    normalise()
    return _backward(case, tensors, saved, plan)


def _constants(case: Case, plan: Plan) -> dict[str, Any]:
    """Return what all kernels are compiled for, and how; Triton's defaults of the latter change with its version."""
    rows, channels, length = sizes_of(case)
    tile = {"BLOCK_ROWS": plan.block_rows, "BLOCK_CHANNELS": plan.block_channels}
    options = {"num_warps": plan.warps, "enable_fp_fusion": True}
    return {"ROWS": rows, "CHANNELS": channels, "LENGTH": length} | tile | options


def _grid(case: Case, plan: Plan) -> tuple[int, int]:
    """Return the number of programs: channels by rows."""
    return -(-case.shape[1] // plan.block_channels), plan.splits


def _shared(case: Case, gamma: Any, plan: Plan) -> tuple[Any, Any]:
    """Return memory for what the programs of a split tell each other: two numbers each, and who was there."""
    partials = gamma.new_empty((2, plan.splits, case.shape[1]))
    return partials, load().zeros(_grid(case, plan)[0], dtype=load().int32, device=gamma.device)


def _forward(case: Case, tensors: dict[str, Any], plan: Plan) -> tuple[Call, Any]:
    """Return the call, and the memory of mean and 1/deviation, which it fills."""
    x, gamma, beta, running_mean, running_var = (
        tensors[name] for name in ("x", "gamma", "beta", "running_mean", "running_var")
    )
    residual, grid, constants = tensors.get("residual"), _grid(case, plan), _constants(case, plan)
    y, saved, relu = load().empty_like(x), gamma.new_empty((2, case.shape[1])), bool(case.epilogue)
    outputs = y, running_mean, running_var
    if not plan.split_rows:
        held = kernels().forward_held[grid]

        def in_one() -> tuple:
            held(x, residual, gamma, beta, running_mean, running_var, saved, y, RELU=relu, **constants)
            return outputs

        return in_one, saved
    statistics, apply = kernels().forward_statistics[grid], kernels().forward_apply[grid]
    constants["SPLIT_ROWS"], merged = plan.split_rows, power_of_two(plan.splits)
    partials, tickets = _shared(case, gamma, plan)

    def in_two() -> tuple:
        statistics(x, running_mean, running_var, saved, partials, tickets, MERGED=merged, **constants)
        apply(x, residual, gamma, beta, saved, y, RELU=relu, **constants)
        return outputs

    return in_two, saved


def _backward(case: Case, tensors: dict[str, Any], saved: Any, plan: Plan) -> Call:
    """Return the call, given mean and 1/deviation."""
    x, dy, gamma, beta = (tensors[name] for name in ("x", "dy", "gamma", "beta"))
    residual, grid, constants = tensors.get("residual"), _grid(case, plan), _constants(case, plan)
    dx, sums, relu = load().empty_like(x), load().empty_like(saved), bool(case.epilogue)
    dresidual = None if residual is None else load().empty_like(x)
    outputs = (dx, *sums) if residual is None else (dx, *sums, dresidual)
    if not plan.split_rows:
        held = kernels().backward_held[grid]

        def in_one() -> tuple:
            held(x, dy, residual, gamma, beta, saved, dx, sums, dresidual, RELU=relu, **constants)
            return outputs

        return in_one
    add_up, apply = kernels().backward_sums[grid], kernels().backward_apply[grid]
    constants["SPLIT_ROWS"], merged = plan.split_rows, power_of_two(plan.splits)
    partials, tickets = _shared(case, gamma, plan)
    # The gradient of the residual is that behind the activation, which the second kernel then need not compute again.
    behind, recompute = (dy, relu) if residual is None else (dresidual, False)

    def in_two() -> tuple:
        shared = (partials, tickets)
        add_up(x, dy, residual, gamma, beta, saved, sums, dresidual, *shared, RELU=relu, MERGED=merged, **constants)
        apply(x, behind, gamma, beta, saved, dx, sums, RELU=recompute, **constants)
        return outputs

    return in_two


PROVIDERS = (Provider("Triton kernel (ours)", "cuda", prepare, absent, engine="torch", describe=describe),)
