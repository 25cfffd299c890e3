"""Machine code of batch norm's CPU kernels: hot loops work on several numbers at a time."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable

import pytest

numba = pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from llvmlite import binding  # noqa: E402
from numba import types  # noqa: E402

from bnkernels.ops.batch_norm.cpu import backward, normalisation, rows, sums  # noqa: E402

ADDRESS, COUNT, COLUMNS, SINGLE = types.uint64, types.intp, types.Array(types.float64, 1, "C"), types.float32
FLOAT64_SUM, FLOAT32_LINE = r"v(add|fmadd\w+)pd\s.*%ymm", r"v(sub|fmadd\w+)ps\s.*%ymm"
# Kernel, the types of its arguments, and an instruction on four or eight numbers that it must have. Those on halves end
# in x, or y for eight numbers in memory, where the processor has AVX-512 for them.
LOOPS = {
    "add_row": (sums.add_row, (ADDRESS, COUNT, COLUMNS), FLOAT64_SUM),
    "add_rows": (sums.add_rows, (types.UniTuple(ADDRESS, 8), COUNT, COLUMNS), FLOAT64_SUM),
    "add_row_exactly": (sums.add_row_exactly, (ADDRESS, COUNT, COLUMNS), FLOAT64_SUM),
    "add_product": (sums.add_product, (ADDRESS, ADDRESS, COUNT, COLUMNS), FLOAT64_SUM),
    "add_products": (sums.add_products, (*[types.UniTuple(ADDRESS, 4)] * 2, COUNT, COLUMNS), FLOAT64_SUM),
    "add_product_exactly": (sums.add_product_exactly, (ADDRESS, ADDRESS, COUNT, COLUMNS), FLOAT64_SUM),
    "before the activation": (
        normalisation.before_activation,
        (SINGLE, ADDRESS, ADDRESS, COLUMNS, ADDRESS, COUNT),
        FLOAT32_LINE,
    ),
    "gradient of the input": (
        backward._gradient_of_input,
        (ADDRESS, ADDRESS, COLUMNS, ADDRESS, COUNT),
        r"vcvtpd2ps\w?\s.*%ymm",
    ),
    "from float16": (rows._gather, (ADDRESS, COUNT, COUNT, COUNT, ADDRESS, COUNT), r"vcvtph2psx?\s.*%ymm"),
    "to float16": (rows.store, (ADDRESS, COUNT, COUNT, ADDRESS, COUNT), r"vcvtps2ph(x?\s.*%ymm|xy\s)"),
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
