"""Matrix products, against the libraries' own, which a CUDA graph of CuPy cannot capture.

A case's shape is (rows, terms, columns); its direction says which factors are transposed: "nt" is a times b'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample
from benchmarks.peers import expression, pytorch

# Products of an LSTM: 64 steps of 64 examples with 28 inputs and 100 units, their gradients, and one step.
CASES = [("nt", (4096, 28, 400)), ("tn", (400, 4096, 100)), ("nn", (4096, 400, 28)), ("nt", (64, 100, 400))]
LAYOUTS = ("nn", "nt", "tn", "tt")


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return the arrays whose rows are contiguous.

    Raises
    ------
    NotSupportedError
        For 16-bit data, and for what belongs to other ops.
    """
    if case.dtype not in ("float32", "float64") or case.direction not in LAYOUTS or case.epilogue:
        raise NotSupportedError("matmul is for two matrices in float32 or float64")
    rows, terms, columns = case.shape
    shapes = (rows, terms), (terms, columns)
    return {
        name: random(shape if layout == "n" else shape[::-1])
        for name, layout, shape in zip("ab", case.direction, shapes, strict=True)
    }


def factors(case: Case, arrays: Arrays) -> list:
    """Return the factors, transposed where they are."""
    return [_given(arrays[name], layout) for name, layout in zip("ab", case.direction, strict=True)]


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    given = factors(case, arrays)
    out = bn.matmul(*given)
    return lambda: (bn.matmul(*given, out=out),)


def library(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write."""
    a, b = factors(case, arrays)
    return lambda: (a @ b,)


def eager(case: Case, arrays: Arrays) -> Call:
    """Prepare PyTorch's product."""
    a, b = factors(case, {name: pytorch.tensor_of(array) for name, array in arrays.items()})
    return lambda: (a @ b,)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the product of float64 matrices."""
    return library(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of both factors and of the product, each once."""
    rows, terms, columns = case.shape
    return (rows * terms + terms * columns + rows * columns) * case.itemsize


OP = Op(
    "matmul",
    cases=[Case("matmul", layouts, shape) for layouts, shape in CASES],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(*on_both("bnkernels", ours), *expression.providers(library), *pytorch.providers(eager)),
)


def _given(array: Any, layout: str) -> Any:
    """Return a factor, transposed where it is; what a test passes in place of an array stays as it is."""
    return array if layout == "n" else getattr(array, "T", array)


def _sample(layouts: str) -> Sample:
    shapes = {"n": ("NK", "KC"), "t": ("KN", "CK")}
    specs = {name: f"T {shapes[layout][i]}" for i, (name, layout) in enumerate(zip("ab", layouts, strict=True))}
    return Sample(
        "a b",
        "out",
        lambda arrays: bn.matmul(
            *[_given(arrays[name], layout) for name, layout in zip("ab", layouts, strict=True)],
            out=arrays["out"],
        ),
        specs=specs | {"out": "T NC"},
        dtypes=("float32", "float64"),
        sizes=({}, {"N": 5, "K": 1030, "C": 3}),
    )


SAMPLES = {f"matmul_{layouts}": _sample(layouts) for layouts in LAYOUTS}
