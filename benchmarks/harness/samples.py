"""Samples: one call of an op on named arrays of any sizes, for tests, counts and sanitizers.

The ``bench_*.py`` of an op declares them as ``SAMPLES``; `benchmarks.ops.every_sample` finds all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.harness.case import DTYPES, Arrays, native_dtype
from bnkernels.runtime.arguments import accumulator

Sizes = Mapping[str, int]

# Type and axes of an array, by its name. T: the data's type. A: the accumulator's. N rows, C channels, L positions of
# an image, G groups, K inputs, O classes, P parameters, Q parts of a mini-batch, S steps, E examples of all steps.
SPECS = {
    **dict.fromkeys(("x", "y", "dy", "dx", "ddx", "ddy", "out", "residual", "dresidual"), "T GNCL"),
    **dict.fromkeys(("gamma", "beta", "dgamma", "dbeta", "ddgamma", "ddbeta"), "A C"),
    **dict.fromkeys(("running_mean", "running_var"), "A GC"),
    **dict.fromkeys(("statistics", "sums"), "A 3C"),
    **dict.fromkeys(("moments", "merged"), "A 4C"),
    **dict.fromkeys(("parameters", "gradients", "velocity", "square", "first", "second"), "A P"),
    **dict.fromkeys(("logits", "dlogits"), "T NO"),
    **dict.fromkeys(("weight", "dweight"), "T KC"),
    "z": "T NC",
    "parts": "A Q4C",
    "mask": "bool GN",
    "labels": "int32 N",
    "loss": "A N",
    "scalars": "A 3",
}
SMALL = {"N": 6, "C": 3, "K": 4, "O": 3, "P": 6, "Q": 2, "S": 2, "E": 12}  # an axis that is not named is not there
BELOW = {"labels": "O", "indices": "E"}  # the axis that integers are indices of; other integers are 0


@dataclass(frozen=True)
class Sample:
    """One call of an op on named arrays.

    Attributes
    ----------
    reads, writes : str, then tuple of str
        Names of the arrays that the call reads, and of those that it writes, whether it reads them or not.
    run : callable
        ``run(arrays)`` makes the call.
    any_strides : str, then tuple of str
        Names of the arrays whose layout is free.
    specs : dict of str to str
        Types and axes that differ from `SPECS`.
    fixed : dict of str to int
        Sizes that the call has always.
    sizes : sequence of dict of str to int
        Sizes with which the calls of all samples together launch every kernel.
    dtypes : sequence of str
        Data types that the op takes.
    counted : bool
        Whether it is launched in a training step of the network of the question, and counted as such.
    """

    reads: Any
    writes: Any
    run: Callable[[Arrays], Any]
    any_strides: Any = ()
    specs: Mapping[str, str] = field(default_factory=dict)
    fixed: Sizes = field(default_factory=dict)
    sizes: tuple[Sizes, ...] = ({},)
    dtypes: tuple[str, ...] = DTYPES
    counted: bool = False

    def __post_init__(self) -> None:
        """Split the names."""
        for kind in ("reads", "writes", "any_strides"):
            names = getattr(self, kind)
            object.__setattr__(self, kind, tuple(names.split()) if isinstance(names, str) else names)

    @property
    def names(self) -> tuple[str, ...]:
        """All arrays."""
        return (*self.reads, *self.writes)

    def arrays(self, sizes: Sizes | None = None, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
        """Return new arrays of these sizes, filled, also where they are written; those left out are `SMALL`."""
        rng, found = np.random.default_rng(seed), {}
        sizes = {**SMALL, **(sizes or {}), **self.fixed}
        types = {"T": native_dtype(dtype), "A": accumulator(native_dtype(dtype))}
        for name in self.names:
            kind, *axes = self.specs.get(name, SPECS.get(name, "")).split()
            shape = shape_of("".join(axes), sizes)
            found[name] = filled(name, shape, sizes, rng).astype(types.get(kind, kind))
        return found


def shape_of(axes: str, sizes: Sizes) -> tuple[int, ...]:
    """Return the lengths of axes such as ``3C``; an axis without a size is left out, and ``512*C`` is one axis."""
    factors = (axis.split("*") for axis in re.findall(r"(?:\d+\*)?[A-Z]|\d+", axes))
    lengths = ([int(factor) if factor.isdigit() else sizes.get(factor) for factor in axis] for axis in factors)
    return tuple(math.prod(axis) for axis in lengths if None not in axis)


def filled(name: str, shape: tuple[int, ...], sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """Return an array of random numbers, of indices, or of a mask that leaves out every third row."""
    if name == "mask":
        return np.arange(math.prod(shape)).reshape(shape) % 3 > 0
    if name in BELOW:
        return rng.integers(sizes[BELOW[name]], size=shape)
    numbers = np.zeros(shape) if name == "counter" else rng.uniform(0.5, 2, shape)
    if name in ("parts", "sums"):
        numbers[..., 0 if name == "parts" else 2, :] = sizes["N"]  # the count of rows
    return numbers


def take(arrays: Arrays, names: str) -> tuple:
    """Return arrays by their names."""
    return tuple(arrays[name] for name in names.split())
