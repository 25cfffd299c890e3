"""Launch choice of fused training by several blocks: what a device grants, and what its blocks have room for."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from bnkernels.ops.fused_training import launch
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from bnkernels.runtime.seam import MAX_SHARED_BYTES, Limits

H200 = Limits(132, 227 * 1024, 228 * 1024, cooperative=True, clusters=True)


def network(*sizes: int, norm: str = "batch") -> NetworkSpec:
    """Return what `choose` looks at, wherever the parameters lie."""
    hidden = len(sizes) - 2
    pairs = pairwise(sizes)
    return NetworkSpec(tuple(LayerSpec(i, o, 0, -(n == hidden), 0) for n, (i, o) in enumerate(pairs)), norm=norm)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("models", [1, 3, 64, 200])
@pytest.mark.parametrize("sizes", [(784, 100, 100, 100, 10), (64, 1024, 10), (1000, 9, 2), (8, 300, 1000)])
@pytest.mark.parametrize("batch", [2, 64, 512])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_launch_is_one_that_the_device_grants(
    dtype: str, batch: int, sizes: tuple[int, ...], models: int, norm: str
) -> None:
    given = launch.Problem(network(*sizes, norm=norm), batch, "adam", np.dtype(dtype), 300_000, 4000, models)
    for limits in (H200, H200._replace(clusters=False)):
        choice = launch.choose(given, limits)
        assert choice.launch.blocks == models * choice.splits
        assert choice.launch.shared_bytes <= min(limits.shared_bytes, MAX_SHARED_BYTES)
        if "cluster" in choice.kernel:
            assert (limits.clusters, choice.splits, choice.launch.cooperative) == (True, 8, False)
        else:
            assert choice.launch.cooperative == (choice.splits > 1)
            assert choice.splits == 1 or models * choice.splits <= limits.sms, "all are resident at once"
        assert ("layer_norm" in choice.kernel) == (norm == "layer")


def test_a_network_has_as_many_blocks_as_leave_each_the_fewest_neurons() -> None:
    def chosen(*sizes: int, models: int = 1, limits: Limits = H200) -> tuple[str, int, int]:
        given = launch.Problem(network(*sizes), 64, "sgd", np.dtype("float32"), 300_000, 4000, models)
        choice = launch.choose(given, limits)
        return choice.kernel.split("_")[3], choice.splits, choice.width

    assert chosen(784, 100, 10) == ("grid", 32, 4)
    assert chosen(784, 600, 10) == ("grid", 128, 8)
    assert chosen(784, 100, 10, models=16) == ("cluster", 8, 16)
    assert chosen(784, 100, 10, models=16, limits=H200._replace(clusters=False)) == ("grid", 8, 16)
    assert chosen(784, 30, 10) == ("cluster", 8, 4)
    assert chosen(784, 100, 10, models=1000, limits=H200._replace(clusters=False)) == ("grid", 1, 32)


def test_a_block_keeps_the_arrays_of_its_weights_that_have_room() -> None:
    def kept(*sizes: int, name: str = "adam", models: int = 1, dtype: str = "float32", norm: str = "batch") -> int:
        given = launch.Problem(network(*sizes, norm=norm), 60, name, np.dtype(dtype), 300_000, 4000, models)
        return launch.choose(given, H200).kept

    paper = 784, 100, 100, 100, 10
    assert [kept(*paper, name=name) for name in ("sgd", "momentum", "adam")] == [1, 2, 3]
    assert kept(*paper, norm="layer") == 3
    assert kept(*paper, models=16) == 2, "16 neurons of each layer, 69 KiB of weights"
    assert kept(*paper, models=16, dtype="float64") == 0
    assert kept(1024, 1024, 1024) == 2


@pytest.mark.parametrize(
    ("batch", "sizes", "limits", "message"),
    [
        (600, (64, 20, 10), H200, "one block takes mini-batches of at most 256, got 600; several take .* 512, got 600"),
        (60, (64, 2000, 10), H200, r"one block needs [\d,]+ bytes .*; several take layers of at most 1024, got 2000"),
        (60, (784, 500, 10), H200._replace(cooperative=False, clusters=False), "several would have to wait for each"),
        (60, (784, 500, 10), H200._replace(shared_bytes=32 * 1024), r"several need [\d,]+ bytes .* have 32,768"),
    ],
)
def test_why_a_network_cannot_be_trained_in_one_launch(
    batch: int, sizes: tuple[int, ...], limits: Limits, message: str
) -> None:
    given = launch.Problem(network(*sizes), batch, "sgd", np.dtype("float32"), 300_000, 4000)
    assert launch.choose(given, limits) is None
    assert re.search(message, launch.why_not(given, limits))
    small = launch.Problem(network(64, 20, 10), 64, "sgd", np.dtype("float32"), 1600, 40)
    assert launch.why_not(small, H200) is None
