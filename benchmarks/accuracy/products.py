"""Errors of float32 products by plain arithmetic and on tensor cores (3xTF32), against exact ones.

``python -m benchmarks.accuracy.products`` prints the table of ``docs/fused_layers.md``; a test compares the two. The
kernels run on the emulator, so it needs g++: it rounds once where a GPU cuts off several times.
"""

from __future__ import annotations

import numpy as np

import bnkernels as bn
from tools import backends
from tools.oracle import Extended

ROWS, COLUMNS = 64, 8
TERMS = (1, 8, 64, 256, 1024)
PRECISIONS = {"float32": None, "3xTF32": "tf32x3"}


def errors(terms: int) -> dict[str, tuple[float, float]]:
    """Return the largest and the mean error of each arithmetic.

    The unit is 2^-24 times the sum of the absolute products.
    """
    rng = np.random.default_rng(0)
    backend = backends.make("emulator")
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, terms), (terms, COLUMNS)))
    wide_x, wide_weight = x.astype(Extended), weight.astype(Extended)
    unit = 2.0**-24 * (np.abs(wide_x) @ np.abs(wide_weight))
    found = {}
    for name, precision in PRECISIONS.items():
        z = bn.linear_batch_norm_forward(*backend.arrays(x, weight), norm=None, precision=precision)[1]
        error = np.abs(backend.asnumpy(z) - wide_x @ wide_weight) / unit
        found[name] = float(error.max()), float(error.mean())
    return found


def lines() -> list[str]:
    """Return the rows of the table, one for each number of terms."""
    rows = []
    for terms in TERMS:
        cells = (f"{largest:.2f} ({mean:.2f})" for largest, mean in errors(terms).values())
        rows.append(f"| {terms} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Print the table."""
    print(f"| terms | {' | '.join(PRECISIONS)} |", f"| ---: |{' ---: |' * len(PRECISIONS)}", *lines(), sep="\n")


if __name__ == "__main__":
    main()
