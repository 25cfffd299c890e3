"""Targets of the ops on a CPU: cases, how long ours may take there, and beside whom.

A target is a ratio of medians of the same rounds: ours, with outputs that exist already, to the fastest of the rivals.
Those of training steps are in `benchmarks.steps.bench_train_step` and `benchmarks.steps.overhead`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.harness.case import Case

PYTORCH = ("PyTorch eager", "PyTorch eager, out=", "PyTorch eager, fused")
ANYBODY = ()
BOTH = ("forward", "backward")
QUESTION = (64, 20)
MATRICES = [(256, 64), (256, 1024), (1024, 1024), (4096, 1024), (8192, 1024), (100_000, 32)]
IMAGE = (32, 64, 56, 56)
IMAGES = [((20, 6, 65536), "NCL"), ((128, 2048, 4, 4), "NCHW"), ((128, 2048, 4, 4), "NHWC")]
LAYOUT_OF = {1: "NC", 2: "NC", 3: "NCL", 4: "NCHW"}  # by the number of axes, where nothing else is said
OTHERS = {  # op: its directions, and shapes
    "batch_norm_masked": (BOTH, [(64, 20), (256, 1024), (8192, 1024), (100_000, 32)]),
    "batch_norm_double_backward": (("double backward",), [(64, 20), (256, 1024), (8192, 1024), IMAGE]),
    "batch_norm_statistics": (("moments",), [(64, 20), (256, 1024), (8192, 1024), IMAGE]),
    "softmax_cross_entropy": (("forward+backward",), [(64, 10), (256, 1000), (4096, 1000)]),
    **{f"{rule}_update": (("step",), [(1568,), (1_000_000,)]) for rule in ("sgd", "momentum", "adam")},
    "mini_batch": (("forward",), [(64, 64), (60, 784), (512, 1024)]),
}


# Additions and multiplications for a number of the data, as the formulas have them; an exponential counts as 20.
FLOPS = {
    "batch_norm": {"forward": 8, "backward": 10},
    "batch_norm_masked": {"forward": 8, "backward": 10},
    "batch_norm_double_backward": {"double backward": 40},
    "batch_norm_statistics": {"moments": 4, "merge": 10},
    "layer_norm": {"forward alone": 8, "backward alone": 14},
    "softmax_cross_entropy": {"forward+backward": 25},
    "sgd_update": {"step": 2},
    "momentum_update": {"step": 4},
    "adam_update": {"step": 12},
    "mini_batch": {"forward": 0},
}


class Target(NamedTuple):
    """One line.

    Attributes
    ----------
    group : str
        Heading that it comes under.
    case : Case
        Case of an op.
    limit : float
        Largest ratio that meets the target.
    rivals : tuple of str
        Names of those that count; empty for everybody.
    below : bool
        Whether the ratio must be below the limit, instead of at most the limit.
    """

    group: str
    case: Case
    limit: float
    rivals: tuple[str, ...]
    below: bool = False

    @property
    def flops(self) -> int:
        """Additions and multiplications of the case."""
        return FLOPS[self.case.op][self.case.direction] * self.case.size

    def met(self, ratio: float) -> bool:
        """Tell whether a ratio meets it."""
        return ratio < self.limit if self.below else ratio <= self.limit


def batch_norm(group: str, limit: float, shape: tuple[int, ...], **how: Any) -> Iterator[Target]:
    """Yield forward and backward of a shape."""
    how = {"layout": LAYOUT_OF[len(shape)]} | how
    for direction in BOTH:
        yield Target(group, Case("batch_norm", direction, shape, **how), limit, PYTORCH)


def every_target() -> Iterator[Target]:
    """Yield all targets, the question's size first."""
    yield from batch_norm("The size of the question", 0.6, QUESTION)
    for group, limit, all_cores in (("One thread", 0.7, False), ("All cores", 0.8, True)):
        for shape in (*MATRICES, IMAGE):
            yield from batch_norm(f"{group}, float32", limit, shape, all_cores=all_cores)
    for dtype in ("float16", "bfloat16"):
        for shape in (QUESTION, (256, 1024), (8192, 1024)):
            yield from batch_norm("16 bits", 0.8, shape, dtype=dtype)
    for dtype in ("float32", "float16", "bfloat16"):
        for shape, layout in IMAGES:
            yield from batch_norm("Large images", 0.8, shape, dtype=dtype, layout=layout)
    for shape in ((64, 20), (256, 1024), (4096, 1024), (4096, 4096)):
        for direction in ("forward alone", "backward alone"):
            yield Target("Layer norm", Case("layer_norm", direction, shape), 0.8, PYTORCH)
    for op, (directions, shapes) in OTHERS.items():
        for direction in directions:
            for shape in shapes:
                case = Case(op, direction, shape, layout=LAYOUT_OF[len(shape)])
                yield Target("Other ops", case, 1.0, ANYBODY, below=True)
    yield Target("Other ops", Case("batch_norm_statistics", "merge", (8, 1024)), 1.0, ANYBODY, below=True)


TARGETS = tuple(every_target())
