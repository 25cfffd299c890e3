"""Machine code of batch norm's CPU kernels: hot loops work on several numbers at a time."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from llvmlite import binding  # noqa: E402
from numba import types  # noqa: E402

from bnkernels.ops.batch_norm.cpu import LAYOUT, backward, normalisation, rows, sums  # noqa: E402

ADDRESS, COUNT, COLUMNS = types.uint64, types.intp, types.Array(types.float64, 1, "C")
ADDRESSES = types.Array(types.uint64, 1, "C")
SINGLE, FLOAT16 = types.float32, types.int16
FLOAT64_SUM, FLOAT32_LINE, WIDENED = (
    r"v(add|fmadd\w+)pd\s.*%[yz]mm",
    r"v(sub|fmadd\w+)ps\s.*%[yz]mm",
    r"vcvtph2p[sd]x?\s.*%[yz]mm",
)
ROWS, PRODUCTS = (ADDRESSES, COUNT, COUNT, COLUMNS), (ADDRESSES, ADDRESSES, COUNT, COUNT, COLUMNS)
LOOPS = {  # kernel: the types of its arguments, and an instruction on four or eight numbers that it must have
    "add_rows": (sums.add_rows, (SINGLE, *ROWS), FLOAT64_SUM),
    "add_rows of float16": (sums.add_rows, (FLOAT16, *ROWS), WIDENED),
    "add_row_exactly": (sums.add_row_exactly, (ADDRESS, COUNT, COLUMNS), FLOAT64_SUM),
    "add_products": (sums.add_products, (SINGLE, *PRODUCTS), FLOAT64_SUM),
    "add_products of float16": (sums.add_products, (FLOAT16, *PRODUCTS), WIDENED),
    "add_product_exactly": (sums.add_product_exactly, (ADDRESS, ADDRESS, COUNT, COLUMNS), FLOAT64_SUM),
    "before the activation": (
        normalisation.before_activation,
        (SINGLE, ADDRESS, ADDRESS, COLUMNS, ADDRESS, COUNT),
        FLOAT32_LINE,
    ),
    "gradient before a ReLU": (
        normalisation.rectify,
        (SINGLE, ADDRESS, ADDRESS, ADDRESS, COLUMNS, ADDRESS, COUNT),
        FLOAT32_LINE,
    ),
    "gradient of the input": (
        backward._gradient_of_input,
        (numba.typeof(np.zeros((), LAYOUT)[()]), SINGLE, ADDRESS, ADDRESS, COLUMNS, ADDRESS, COUNT),
        FLOAT32_LINE,
    ),
    "from float16": (rows._gather, (FLOAT16, ADDRESS, COUNT, COUNT, ADDRESS, COUNT), WIDENED),
    "to float16": (rows.store, (FLOAT16, ADDRESS, ADDRESS, COUNT), r"vcvtps2ph[xy]*\s.*mm"),
}


def machine_code(loop: Callable, arguments: tuple) -> str:
    """Return the assembly of a kernel, compiled anew: that of one from the cache cannot be read."""
    options = {name: loop.targetoptions[name] for name in ("nogil", "error_model", "fastmath")}
    fresh = numba.njit(**options)(loop.py_func)
    fresh.compile(arguments)
    return fresh.inspect_asm(arguments)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not binding.get_host_cpu_features().get("avx2"),
    reason="the processor has no AVX2, whose instructions are looked for",
)
@pytest.mark.parametrize("name", LOOPS)
def test_hot_loops_are_vectorised(name: str) -> None:
    loop, arguments, packed = LOOPS[name]
    assert re.search(packed, machine_code(loop, arguments)), f"no {packed}"
