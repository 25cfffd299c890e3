"""How networks are trained in one launch: by a block each, or by a group of blocks each that meet.

A pure function of sizes and limits. The thresholds follow from what the kernels of ``cuda/fused_training*.cu`` hold on
the chip; none has been tuned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training.network import Network
from bnkernels.ops.linear_batch_norm import launch as linear
from bnkernels.runtime.seam import Launch, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_GROUPS, most_shared, resident

EXAMPLES = 8  # of a thread, as in cuda/lib/gemm/subwarp.cuh
TEAMS = (8, 16, 32)  # threads that share a neuron
MOST_EXAMPLES_OF_BLOCK = EXAMPLES * TEAMS[-1]
MOST_EXAMPLES = linear.MOST_ROWS
THREADS = {np.dtype(np.float32): 512, np.dtype(np.float64): 256}  # at most: the launch bounds of cuda/fused_training.cu
FEWEST_THREADS = 128  # that a step is shared by, however few neurons there are
CLUSTER = 8  # blocks, as in cuda/lib/sync/grid_barrier.cuh
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}  # the number of each is also that of its states


class Sizes(NamedTuple):
    """What is trained: M networks, and the numbers of parameters and of running statistics of each."""

    network: Network
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
    def team(self) -> int:
        """How many threads of a block share a neuron."""
        return next((team for team in TEAMS if EXAMPLES * team >= self.batch), TEAMS[-1])

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        """What the kernels are compiled for, of the members of their argument."""
        activation = activation_named(self.network.activation).code
        return ("activation", activation), ("optimizer", OPTIMIZERS[self.optimizer]), ("batch", self.batch)

    @property
    def widest(self) -> int:
        """The outputs of the widest layer."""
        return max(layer.outputs for layer in self.network.layers)

    @property
    def memory(self) -> int:
        """The numbers that a group keeps in global memory, laid out as ``multi_block_step_by_*.cuh`` says."""
        first = self.network.layers[0]
        if self.network.scratch_rows:
            return self.batch * (2 * first.inputs + 4 * self.rows + 1)
        return self.batch * (2 * first.inputs + 2 * self.rows + first.outputs) + self.rows


class Choice(NamedTuple):
    """A kernel, its launch, and of a group: how many blocks, and how many neurons each owns at a time."""

    kernel: str
    launch: Launch
    blocks: int = 1
    width: int = 0


def choose(sizes: Sizes, limits: Limits) -> Choice | None:
    """Return how the networks are trained: by a block each if they fit, else by groups; None: `why_not` knows why.

    A group has as many blocks as leave each the fewest neurons, if so many can be resident for every model at once.
    Where that is no more than a cluster of this device, it is one: its blocks meet faster, and any number of models has
    room.

    Examples
    --------
    >>> from bnkernels.ops.fused_training.network import Layer, Network
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> paper = tuple(Layer(i, o, 0, 0, 0) for i, o in ((784, 100), (100, 100), (100, 100), (100, 10)))
    >>> choice = choose(Sizes(Network(paper), 60, "sgd", np.dtype("float32"), 100_000, 600), h200)
    >>> choice.kernel, choice.launch.grid, choice.blocks, choice.width
    ('fused_training_grid', (1, 32, 1), 32, 4)
    """
    if _why_no_block(sizes, limits) is None:
        return _by_blocks(sizes)
    if _why_no_group(sizes, limits) is None:
        return _by_groups(sizes, limits)
    return None


def why_not(sizes: Sizes, limits: Limits) -> str | None:
    """Return why the networks cannot be trained in one launch, or None.

    Examples
    --------
    >>> from bnkernels.ops.fused_training.network import Layer, Network
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> wide = tuple(Layer(i, o, 0, 0, 0) for i, o in ((64, 2000), (2000, 10)))
    >>> why_not(Sizes(Network(wide), 60, "sgd", np.dtype("float32"), 200_000, 4000), h200)
    'one block needs 1,953,152 bytes of shared memory and has 232,448; several take layers of at most 1024, got 2000'
    """
    reasons = _why_no_block(sizes, limits), _why_no_group(sizes, limits)
    return None if None in reasons else "; ".join(map(str, reasons))


def shared_bytes(sizes: Sizes) -> int:
    """Return the shared memory that a block needs for a network of its own, laid out as ``Kept`` in the kernel."""
    network, inputs = sizes.network, sizes.network.layers[0].inputs
    pitch = EXAMPLES * sizes.team + 4
    rstds = len(network.layers) * pitch if network.scratch_rows else sizes.rows
    kept = sizes.parameters * (1 + OPTIMIZERS[sizes.optimizer]) + sizes.running + rstds
    numbers = ceil_div(kept, 4) * 4 + 8
    return (numbers + pitch * (3 + 2 * inputs + 2 * sizes.rows + network.scratch_rows)) * sizes.dtype.itemsize


def _why_no_block(sizes: Sizes, limits: Limits) -> str | None:
    if sizes.batch > MOST_EXAMPLES_OF_BLOCK:
        return f"one block takes mini-batches of at most {MOST_EXAMPLES_OF_BLOCK}, got {sizes.batch}"
    needed = shared_bytes(sizes)
    if needed > limits.shared_bytes:
        return f"one block needs {needed:,} bytes of shared memory and has {limits.shared_bytes:,}"
    return None


def _by_blocks(sizes: Sizes) -> Choice:
    """Return the launch of a block for each model, of as many threads as the widest layer has work for."""
    wanted = max(FEWEST_THREADS, sizes.batch, min(sizes.widest * sizes.team, THREADS[sizes.dtype]))
    block, constants = (ceil_div(wanted, 32) * 32, 1, 1), (*sizes.constants, ("subwarp_size", sizes.team))
    launch = Launch((sizes.models, 1, 1), block, shared_bytes(sizes), constants=constants)
    return Choice("fused_training_layer_norm" if sizes.network.scratch_rows else "fused_training", launch)


def _group(sizes: Sizes, limits: Limits) -> tuple[int, int, int]:
    """Return the blocks of a group, the neurons or examples that each owns at a time, and the bytes of its memory."""
    layer_norm = bool(sizes.network.scratch_rows)
    owned = max(sizes.batch, sizes.widest) if layer_norm else sizes.widest
    on_device = resident(limits, linear.THREADS, most_shared(limits, linear.MIN_BLOCKS), linear.MIN_BLOCKS)
    most = 1 << (max(on_device // sizes.models, 1).bit_length() - 1)
    product = linear.Sizes(sizes.batch, sizes.widest, sizes.widest, sizes.dtype)
    widths = [teams * product.columns for teams in linear.TEAMS]
    width = next((width for width in widths if ceil_div(owned, width) <= most), widths[-1])
    blocks = min(most, 1 << (ceil_div(owned, width) - 1).bit_length())
    if limits.clusters and (blocks <= CLUSTER or not limits.cooperative):
        blocks = CLUSTER
        width = next((width for width in widths if ceil_div(owned, width) <= blocks), widths[-1])
    of_layers = len(sizes.network.layers) * width if layer_norm else 0
    tile = width * linear.pitch(sizes.widest if layer_norm else sizes.batch)
    numbers = of_layers + 7 * linear.pitch(sizes.batch) + tile + product.product_numbers(width)
    return blocks, width, numbers * sizes.dtype.itemsize


def _why_no_group(sizes: Sizes, limits: Limits) -> str | None:
    if sizes.batch > MOST_EXAMPLES:
        return f"several take mini-batches of at most {MOST_EXAMPLES}, got {sizes.batch}"
    largest = max(sizes.widest, *(layer.inputs for layer in sizes.network.layers))
    if largest > linear.MOST_NEURONS:
        return f"several take layers of at most {linear.MOST_NEURONS}, got {largest}"
    blocks, _, needed = _group(sizes, limits)
    if blocks > 1 and not (limits.cooperative or limits.clusters):
        return "several would have to wait for each other, which this device cannot"
    if needed > (most := most_shared(limits, linear.MIN_BLOCKS)):
        return f"several need {needed:,} bytes of shared memory each and have {most:,}"
    return None


def _by_groups(sizes: Sizes, limits: Limits) -> Choice:
    blocks, width, shared = _group(sizes, limits)
    cluster = limits.clusters and blocks == CLUSTER
    assert cluster or blocks == 1 or sizes.models <= MOST_GROUPS, "no device has so many multiprocessors"
    # Of two dimensions, so that nobody cuts it where fewer blocks are resident than were planned.
    grid = (sizes.models * blocks, 1, 1) if cluster else (sizes.models, blocks, 1)
    constants = (*sizes.constants, ("blocks", blocks), ("width", width))
    launch = Launch(grid, (linear.THREADS, 1, 1), shared, not cluster and blocks > 1, constants)
    kernel = f"fused_training_{'cluster' if cluster else 'grid'}{'_layer_norm' if sizes.network.scratch_rows else ''}"
    return Choice(kernel, launch, blocks, width)
