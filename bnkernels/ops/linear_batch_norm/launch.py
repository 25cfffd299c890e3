"""Launch choice of the linear layers with a norm: a pure function of problem and limits.

The thresholds follow from what the kernels of ``cuda/linear_batch_norm_*.cu`` hold on the chip; none has been tuned.
"""

from __future__ import annotations

from functools import lru_cache

from bnkernels.ops import gemm
from bnkernels.ops.linear_batch_norm.problem import Problem
from bnkernels.runtime.arguments import arguments_type, suffix
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import Launch, LaunchPlan, Limits, ceil_div

SIZES = "rows inputs outputs width buffers"
ARGUMENTS = {
    "forward": arguments_type(
        "x weight gamma beta z y statistics running_mean running_var",
        SIZES,
        "momentum correction eps alpha",
        "activation",
    ),
    "backward": arguments_type(
        "dy x weight gamma beta z statistics dx dweight dgamma dbeta dz barrier_counter", SIZES, "alpha", "activation"
    ),
}


@lru_cache(maxsize=1024)
def choose(
    direction: str,
    problem: Problem,
    limits: Limits,
    input_gradient: bool = True,
    norm: str | None = "batch",
    precision: str | None = None,
) -> LaunchPlan | None:
    """Return the plan of a launch, or None where library products are to be taken.

    They are taken for more than 512 examples or 1024 inputs or outputs, where something is empty, and where the device
    cannot do what the kernel needs. A block owns as few neurons, or for layer norm examples, as leave no multiprocessor
    more than one block.

    Raises
    ------
    ValueError
        If the device lacks what the precision needs.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> plan = choose("forward", Problem(64, 64, 20, np.dtype("float32")), h200)
    >>> plan.launch, plan.width
    (Launch(grid=(5, 1, 1), block=(256, 1, 1), shared_bytes=77120, cooperative=False), 4)
    >>> choose("forward", Problem(1024, 64, 20, np.dtype("float32")), h200) is None
    True
    """
    if precision is not None and not limits.tf32:
        raise ValueError(
            f"precision='{precision}' must have tensor cores that multiply TF32, of compute capability 8.0 or newer; "
            "the device has none; pass precision=None"
        )
    rows, inputs, outputs, _ = problem
    if not (0 < rows <= gemm.MOST_ROWS and 0 < inputs <= gemm.MOST_NEURONS and 0 < outputs <= gemm.MOST_NEURONS):
        return None
    layer, backward, acc_dtype = norm == "layer", direction == "backward", problem.acc_dtype
    owned, length = (rows, outputs) if layer else (outputs, rows)  # columns of all blocks, and how long they are
    width = gemm.tile_width(owned, limits.sms, acc_dtype)
    tile = width * gemm.pitch(max(length, rows) if backward else length)
    kept = (0, 2 * tile) if backward else (tile, 0)
    most = most_shared(limits, gemm.MIN_BLOCKS)
    buffers, shared = gemm.buffers_and_bytes(width, acc_dtype, most, *kept)
    if shared > most:
        return None
    blocks = ceil_div(owned, width)
    if backward:
        second = outputs if layer else inputs * input_gradient  # owned behind the grid barrier
        most = resident(limits, gemm.THREADS, shared, gemm.MIN_BLOCKS)
        blocks = min(max(blocks, ceil_div(second, width)), most)
    cooperative = backward and (layer or input_gradient) and blocks > 1
    if cooperative and not limits.cooperative:
        return None
    launch = Launch((blocks, 1, 1), (gemm.THREADS, 1, 1), shared, cooperative)
    types = "_".join(filter(None, (precision, suffix(problem.dtype))))
    kernel = f"bnk_linear_{norm or 'batch'}_norm_{direction}_{types}"
    arguments = ARGUMENTS[direction][acc_dtype]
    return LaunchPlan(f"linear_batch_norm_{direction}", kernel, launch, arguments, width=width, stages=buffers)
