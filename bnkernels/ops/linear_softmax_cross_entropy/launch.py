"""Launch choice of the last layer with its loss: a pure function of sizes and limits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnkernels.ops import gemm
from bnkernels.ops.softmax_cross_entropy.op import LABELS
from bnkernels.runtime.arguments import SUFFIX, arguments_type
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import Launch, LaunchPlan, Limits, ceil_div

ARGUMENTS = arguments_type(
    "x weight bias labels loss dx dweight dbias dlogits barrier_counter", "rows inputs outputs width buffers", "", ""
)


@lru_cache(maxsize=1024)
def choose(
    rows: int, inputs: int, outputs: int, dtype: np.dtype, labels: np.dtype, limits: Limits
) -> LaunchPlan | None:
    """Return the plan of a launch, or None where library products and the loss alone are to be taken.

    They are taken for more than 512 examples or 1024 inputs or classes, where something is empty, and where the device
    cannot do what the kernel needs: without cooperative launches it takes what one block owns at a time.

    Examples
    --------
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose(64, 20, 10, np.dtype("float32"), np.dtype("int32"), h200).launch
    Launch(grid=(16, 1, 1), block=(256, 1, 1), shared_bytes=76288, cooperative=True)
    """
    if not (0 < rows <= gemm.MOST_ROWS and 0 < inputs <= gemm.MOST_NEURONS and 0 < outputs <= gemm.MOST_NEURONS):
        return None
    owned = max(rows, outputs)  # examples, and behind the grid barrier classes
    width = gemm.tile_width(owned, limits.sms if limits.cooperative else 1, dtype)
    most = most_shared(limits, gemm.MIN_BLOCKS)
    kept = width * gemm.pitch(outputs), width * gemm.pitch(rows)
    buffers, shared = gemm.buffers_and_bytes(width, dtype, most, *kept)
    if shared > most:
        return None
    blocks = min(ceil_div(owned, width), resident(limits, gemm.THREADS, shared, gemm.MIN_BLOCKS))
    if blocks > 1 and not limits.cooperative:
        return None
    launch = Launch((blocks, 1, 1), (gemm.THREADS, 1, 1), shared, blocks > 1)
    kernel = f"bnk_linear_softmax_cross_entropy_{LABELS[labels]}_{SUFFIX[dtype]}"
    return LaunchPlan("linear_softmax_cross_entropy", kernel, launch, ARGUMENTS[dtype], width=width, stages=buffers)
