"""The bugs that `mutants.py` plants in the product that a CUDA graph can capture."""

from __future__ import annotations

from .mutants import Mutant

KERNEL, EVERY = "matmul.cu", "test_every_layout_tile_and_part"

MUTANTS = [
    Mutant(
        "matmul: all tiles have the first rows",
        KERNEL,
        "row = blockIdx.y * a.tile_rows,",
        "row = 0,",
        select=EVERY,
    ),
    Mutant("matmul: all parts have the first terms", KERNEL, "blockIdx.z * a.part", "0", select=EVERY),
    Mutant(
        "matmul: the last part has terms that are not there",
        KERNEL,
        "min(a.terms - term, a.part)",
        "a.part",
        select=EVERY,
    ),
    Mutant(
        "matmul: a transposed matrix begins where the other would",
        KERNEL,
        ": column * pitch + row",
        ": row * pitch + column",
        select=EVERY,
    ),
    Mutant(
        "matmul: all parts are written to the first",
        KERNEL,
        "(blockIdx.z * a.rows + row)",
        "row",
        select=EVERY,
    ),
]
