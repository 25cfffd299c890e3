"""Launch choice of fused training: one block a network, or several with a grid barrier.

A pure function of problem and limits. The thresholds follow from what the kernels of ``cuda/fused_training*.cu`` hold
on the chip; none has been tuned.
"""

from __future__ import annotations

from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from bnkernels.ops import gemm
from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training.spec import NetworkSpec
from bnkernels.runtime.arguments import arguments_type, suffix
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import Constant, Launch, LaunchPlan, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_BARRIERS

POINTERS = (
    "x labels indices seeds schedule layers parameters first second running losses rates workspace barrier_counter"
)
SIZES = (
    "steps batch depth parameter_count running_count rows index_stride data_rows first_step scratch_rows "
    "workspace_count blocks width buffers widest kept"
)
SCALARS = "beta1 beta2 one_minus_beta1 one_minus_beta2 optimizer_eps correction eps alpha"
ARGUMENTS = arguments_type(POINTERS, SIZES, SCALARS, "activation optimizer subwarp_size")
EXAMPLES = 8  # per thread, as in cuda/lib/gemm/subwarp.cuh
MOST_EXAMPLES_OF_BLOCK = EXAMPLES * gemm.SUBWARPS[-1]
MOST_EXAMPLES = gemm.MOST_ROWS
THREADS = {np.dtype(np.float32): 512, np.dtype(np.float64): 256}  # at most: the launch bounds of cuda/fused_training.cu
FEWEST_THREADS = 128  # per block, however few neurons there are
TILE = 4, 2  # inputs and outputs between which a thread updates the weights, as in cuda/lib/train/block_step.cuh
LAYERS_WRITTEN_OUT = 4  # as in cuda/lib/train/network.cuh
WARPS = gemm.THREADS // 32
CLUSTER = 8  # blocks, as in cuda/lib/sync/grid_barrier.cuh
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}  # the number of each is also that of its states


class Problem(NamedTuple):
    """M networks, and the numbers of parameters and of running statistics of each."""

    network: NetworkSpec
    batch: int
    optimizer: str
    dtype: np.dtype
    parameters: int
    running: int
    models: int = 1

    @property
    def rows(self) -> int:
        """The outputs of all layers."""
        return sum(layer.outputs for layer in self.network.layers)

    @property
    def subwarp_size(self) -> int:
        """The threads of a block that share a neuron."""
        return next((size for size in gemm.SUBWARPS if EXAMPLES * size >= self.batch), gemm.SUBWARPS[-1])

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Members of the argument that are known when the kernels are compiled."""
        activation = activation_named(self.network.activation).code
        return ("activation", activation), ("optimizer", OPTIMIZERS[self.optimizer]), ("batch", self.batch)

    @property
    def sizes(self) -> tuple[Constant, ...]:
        """Further constants, of a network of few layers: the code is written for it."""
        if len(self.network.layers) > LAYERS_WRITTEN_OUT:
            return ()
        sizes = ("depth", "parameter_count", "running_count", "rows", "scratch_rows")
        numbers = len(self.network.layers), self.parameters, self.running, self.rows, self.network.scratch_rows
        return (*zip(sizes, numbers, strict=True), ("layers", self.table))

    @property
    def table(self) -> tuple[int, ...]:
        """The fields of all layers, each with the row in which its outputs begin."""
        begins = accumulate((layer.outputs for layer in self.network.layers), initial=0)
        return tuple(
            chain.from_iterable((*layer, row) for layer, row in zip(self.network.layers, begins, strict=False))
        )

    @property
    def tiles(self) -> int:
        """The tiles of weights that threads of one block update."""
        return sum(ceil_div(layer.inputs, TILE[0]) * ceil_div(layer.outputs, TILE[1]) for layer in self.network.layers)

    @property
    def widest(self) -> int:
        """The outputs of the widest layer."""
        return max(layer.outputs for layer in self.network.layers)

    @property
    def workspace_count(self) -> int:
        """The numbers of a network in global memory, laid out as ``cuda/lib/train/multi_block_step_by_*.cuh`` says."""
        first = self.network.layers[0]
        if self.network.scratch_rows:
            return self.batch * (2 * first.inputs + 4 * self.rows + 1)
        return self.batch * (2 * first.inputs + 2 * self.rows + first.outputs) + self.rows


def choose(problem: Problem, limits: Limits) -> LaunchPlan | None:
    """Return the plan: one block a network if it fits, else several; None if neither does, see `why_not`.

    Several are as many blocks as leave each the fewest neurons, if so many can be resident for every model at once.
    Where that is no more than a cluster of this device, they are one: its barrier is faster, and any number of models
    has room.

    Examples
    --------
    >>> from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> paper = tuple(LayerSpec(i, o, 0, 0, 0) for i, o in ((784, 100), (100, 100), (100, 100), (100, 10)))
    >>> plan = choose(Problem(NetworkSpec(paper), 60, "sgd", np.dtype("float32"), 100_000, 600), h200)
    >>> plan.kernel, plan.launch.grid, plan.splits, plan.width
    ('bnk_fused_training_grid_f32', (1, 32, 1), 32, 4)
    """
    if _why_not_one(problem, limits) is None:
        return _one_block(problem)
    if _why_not_several(problem, limits) is None:
        return _multi_block(problem, limits)
    return None


def why_not(problem: Problem, limits: Limits) -> str | None:
    """Return why the networks cannot be trained in one launch, or None.

    Examples
    --------
    >>> from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> layers = tuple(LayerSpec(i, o, 0, 0, 0) for i, o in ((64, 2000), (2000, 10)))
    >>> why_not(Problem(NetworkSpec(layers), 60, "sgd", np.dtype("float32"), 200_000, 4000), h200)
    'one block needs 1,953,696 bytes of shared memory and has 232,448; several take layers of at most 1024, got 2000'
    """
    reasons = _why_not_one(problem, limits), _why_not_several(problem, limits)
    return None if None in reasons else "; ".join(map(str, reasons))


def shared_bytes(problem: Problem) -> int:
    """Return the shared memory that a block needs for a network of its own, laid out as in the kernel."""
    network, inputs = problem.network, problem.network.layers[0].inputs
    pitch = EXAMPLES * problem.subwarp_size + 4
    rstds = len(network.layers) * pitch if network.scratch_rows else problem.rows
    saved = problem.parameters * (1 + OPTIMIZERS[problem.optimizer]) + problem.running + rstds
    numbers = ceil_div(saved, 4) * 4 + 8
    return (numbers + pitch * (5 + 2 * inputs + 2 * problem.rows + network.scratch_rows)) * problem.dtype.itemsize


def _why_not_one(problem: Problem, limits: Limits) -> str | None:
    if problem.batch > MOST_EXAMPLES_OF_BLOCK:
        return f"one block takes mini-batches of at most {MOST_EXAMPLES_OF_BLOCK}, got {problem.batch}"
    needed = shared_bytes(problem)
    if needed > limits.shared_bytes:
        return f"one block needs {needed:,} bytes of shared memory and has {limits.shared_bytes:,}"
    return None


def _one_block(problem: Problem) -> LaunchPlan:
    """Return the launch of a block for each model, of as many threads as the widest layer, or its update, has work for.

    The code is written for the network, if that has few layers.
    """
    finish = (problem.network.layers[-1].outputs + 1) * problem.subwarp_size
    work = max(problem.widest * problem.subwarp_size, problem.tiles + finish, 2 * problem.batch)
    threads = ceil_div(min(max(FEWEST_THREADS, work), THREADS[problem.dtype]), 32) * 32
    constants = (*problem.constants, *problem.sizes, ("subwarp_size", problem.subwarp_size))
    launch = Launch((problem.models, 1, 1), (threads, 1, 1), shared_bytes(problem), constants=constants)
    return _plan(problem, "fused_training", "", launch)


def _plan(problem: Problem, source: str, barrier: str, launch: Launch, *tiles: int) -> LaunchPlan:
    norm = "_layer_norm" if problem.network.scratch_rows else ""
    kernel = f"bnk_fused_training{barrier}{norm}_{suffix(problem.dtype)}"
    splits, width, buffers, kept = tiles or (1, 0, 1, 0)
    return LaunchPlan(source, kernel, launch, ARGUMENTS[problem.dtype], splits, width, stages=buffers, kept=kept)


def kept_numbers(network: NetworkSpec, blocks: int, width: int, dtype: np.dtype) -> int:
    """Return the weights that a block has room for if it keeps its own, as ``cuda/lib/train/own_weights.cuh`` does.

    Examples
    --------
    >>> from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
    >>> layers = tuple(LayerSpec(i, o, 0, 0, 0) for i, o in ((784, 100), (100, 10)))
    >>> kept_numbers(NetworkSpec(layers), 32, 4, np.dtype("float32"))
    3536
    """
    vector = gemm.columns(dtype)
    return sum(
        ceil_div(layer.outputs, blocks * width) * width * ceil_div(layer.inputs, vector) * vector
        for layer in network.layers
    )


def _tiles(problem: Problem, limits: Limits) -> tuple[int, int, int, int, int]:
    """Return blocks of a network, columns that each owns at a time, buffers, kept arrays and bytes of shared memory."""
    layer_norm = bool(problem.network.scratch_rows)
    owned = max(problem.batch, problem.widest) if layer_norm else problem.widest
    on_device = resident(limits, gemm.THREADS, most_shared(limits, gemm.MIN_BLOCKS), gemm.MIN_BLOCKS)
    enough = 1 << (max(on_device // problem.models, 1).bit_length() - 1)
    width = gemm.tile_width(owned, enough, problem.dtype)
    blocks = min(enough, 1 << (ceil_div(owned, width) - 1).bit_length())
    if limits.clusters and (blocks <= CLUSTER or not limits.cooperative):
        blocks = CLUSTER
        width = gemm.tile_width(owned, blocks, problem.dtype)
    of_layers = len(problem.network.layers) * width if layer_norm else min(width, WARPS) * gemm.pitch(problem.batch)
    tile = width * gemm.pitch(problem.widest if layer_norm else problem.batch)
    beside = of_layers + 7 * gemm.pitch(problem.batch) + tile
    most = most_shared(limits, gemm.MIN_BLOCKS)
    buffers, needed = gemm.buffers_and_bytes(width, problem.dtype, most, beside)
    of_array = kept_numbers(problem.network, blocks, width, problem.dtype) * problem.dtype.itemsize
    kept = max(0, min(1 + OPTIMIZERS[problem.optimizer], (most - needed) // of_array))
    return blocks, width, buffers, kept, needed + kept * of_array


def _why_not_several(problem: Problem, limits: Limits) -> str | None:
    if problem.batch > MOST_EXAMPLES:
        return f"several take mini-batches of at most {MOST_EXAMPLES}, got {problem.batch}"
    largest = max(problem.widest, *(layer.inputs for layer in problem.network.layers))
    if largest > gemm.MOST_NEURONS:
        return f"several take layers of at most {gemm.MOST_NEURONS}, got {largest}"
    blocks, *_, needed = _tiles(problem, limits)
    if blocks > 1 and not (limits.cooperative or limits.clusters):
        return "several would have to wait for each other, which this device cannot"
    if needed > (most := most_shared(limits, gemm.MIN_BLOCKS)):
        return f"several need {needed:,} bytes of shared memory each and have {most:,}"
    return None


def _multi_block(problem: Problem, limits: Limits) -> LaunchPlan:
    blocks, width, buffers, kept, shared = _tiles(problem, limits)
    cluster = limits.clusters and blocks == CLUSTER
    assert cluster or blocks == 1 or problem.models <= MOST_BARRIERS, "no device has so many multiprocessors"
    # Two dimensions: CuPy cuts a cooperative grid of one if fewer blocks are resident than planned.
    grid = (problem.models * blocks, 1, 1) if cluster else (problem.models, blocks, 1)
    tiles = ("blocks", blocks), ("width", width), ("buffers", buffers), ("kept", kept), ("widest", problem.widest)
    constants = (*problem.constants, *problem.sizes, *tiles)
    launch = Launch(grid, (gemm.THREADS, 1, 1), shared, not cluster and blocks > 1, constants)
    barrier = "_cluster" if cluster else "_grid"
    return _plan(problem, "fused_training_multi_block", barrier, launch, blocks, width, buffers, kept)
