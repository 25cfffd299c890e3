"""Launch choice of a time step of an LSTM: a pure function of the problem; nothing has been tuned."""

from __future__ import annotations

from functools import lru_cache

from bnkernels.ops.lstm.problem import GATES, Problem
from bnkernels.runtime.arguments import arguments_type, suffix
from bnkernels.runtime.occupancy import WARP, most_shared, resident
from bnkernels.runtime.seam import Launch, LaunchPlan, Limits, ceil_div

ARGUMENTS = {
    "forward": arguments_type(
        "x_part h_part before bias gamma_x gamma_h gamma_c beta_c gates cells c_hat rstd h h_n c_n lengths mean_x "
        "var_x mean_h var_h mean_c var_c weight_hh h0 counts barrier_counter",
        "rows units step end chosen steps tracked gates_pitch h_part_pitch state_pitch rstd_pitch",
        "eps momentum count inverse_count",
        "live moving held",
    ),
    "backward": arguments_type(
        "dy dh dh_n dc_n dc gates before cells c_hat x_hat h_hat rstd gamma_x gamma_h gamma_c beta_c dx_part dh_part "
        "da dz sums lengths states weight_hh counts barrier_counter",
        "rows units step end steps rstd_pitch sums_pitch",
        "inverse_count",
        "live held",
    ),
}
HELD = 2  # pairs of a thread in registers, as in cuda/lib/reduce/step_items.cuh
SECTOR = 32  # bytes of neighbouring units that a block reads
WORKERS = 64  # threads of a unit, at most
MOST_WIDTH = 256  # threads of an example, at most
FEW = 64  # threads of a block by example, at least
ROWS = {"forward": 1, "backward": 4}  # numbers of a unit and example that a block of a sequence by example shares
MOST_ROWS, MOST_STATE = 512, 2**15  # examples or units, and numbers of a state, of a sequence in one launch
THREADS = 256  # threads of a block of a sequence, at most, as in the launch bounds of its kernels
MIN_BLOCKS = 1  # resident blocks of a multiprocessor, promised by these
# Sums of a warp that two buffers hold, of every unit that it has.
BUFFERS = {"forward": {None: 0, "batch": 16, "layer": 4}, "backward": {None: 8, "batch": 24, "layer": 8}}


def _power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1024)
def choose(direction: str, problem: Problem) -> LaunchPlan:
    """Return the launch of a step.

    By unit a block has the units of a sector, and as many threads for each as there are examples, up to 64. By example,
    with layer norm, it has a thread for each unit, up to 256.

    Examples
    --------
    >>> import numpy as np
    >>> problem = Problem(784, 64, 1, 100, np.dtype("float32"), "batch", True, 0)
    >>> choose("forward", problem).launch
    Launch(grid=(13, 1, 1), block=(8, 64, 1), shared_bytes=8192, cooperative=False)
    >>> choose("forward", problem._replace(norm="layer")).launch
    Launch(grid=(64, 1, 1), block=(128, 1, 1), shared_bytes=64, cooperative=False)
    """
    rows, units, number = problem.rows, problem.units, problem.dtype.itemsize
    if problem.norm == "layer":
        width = min(MOST_WIDTH, max(WARP, _power(units)))
        workers = max(1, FEW // width)
        blocks, items, places = ceil_div(rows, workers), ceil_div(units, width), width * workers // WARP
    else:
        width = min(SECTOR // number, _power(units))
        workers = max(WARP // width, min(WORKERS, _power(rows)))
        blocks, items, places = ceil_div(units, width), ceil_div(rows, workers), width * workers // WARP * width
    shared = BUFFERS[direction][problem.norm] * places * number
    held = int(items <= HELD)
    constants = (("live", int(problem.live)), ("held", held)) if problem.norm else ()
    launch = Launch((blocks, 1, 1), (width, workers, 1), shared, constants=constants)
    kernel = f"bnk_lstm_{direction}_{problem.norm or 'plain'}_{suffix(problem.dtype)}"
    return LaunchPlan(f"lstm_{direction}", kernel, launch, ARGUMENTS[direction][problem.dtype], held=held)


@lru_cache(maxsize=1024)
def choose_sequence(direction: str, problem: Problem, limits: Limits) -> LaunchPlan | None:
    """Return the launch of a whole sequence; None where every step is one of its own.

    By unit a block has as few units as leave no multiprocessor more than one block, and keeps their recurrent weights.
    By example, with layer norm, it has as few examples, and keeps all weights. Beyond 2^15 numbers of a state a library
    multiplies faster, as far as instructions tell.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> problem = Problem(784, 64, 1, 100, np.dtype("float32"), "batch", True, 0)
    >>> choose_sequence("forward", problem, h200).launch
    Launch(grid=(100, 1, 1), block=(1, 64, 1), shared_bytes=1728, cooperative=True)
    >>> choose_sequence("forward", problem._replace(norm="layer"), h200).launch
    Launch(grid=(64, 1, 1), block=(128, 1, 1), shared_bytes=162064, cooperative=False)
    """
    rows, units, number = problem.rows, problem.units, problem.dtype.itemsize
    if max(rows, units) > MOST_ROWS or rows * units > MOST_STATE:
        return None
    if problem.norm == "layer":
        width = max(WARP, _power(units))
        workers = max(1, min(THREADS // width, max(FEW // width, ceil_div(rows, limits.sms))))
        blocks, items, places = ceil_div(rows, workers), ceil_div(units, width), width * workers // WARP
        kept, waiting = units * (GATES * (units | 1) + ROWS[direction] * workers), 1
    else:
        width = min(WARP, _power(ceil_div(units, limits.sms)))
        workers = max(WARP // width, min(THREADS // width, _power(rows)))
        blocks, items, places = ceil_div(units, width), ceil_div(rows, workers), width * workers // WARP * width
        kept = GATES * width * units
        waiting = blocks
    shared = (kept + BUFFERS[direction][problem.norm] * places) * number
    fits = width <= THREADS and shared <= most_shared(limits, MIN_BLOCKS)
    if not fits or resident(limits, width * workers, shared, MIN_BLOCKS) < waiting:
        return None
    if waiting > 1 and not limits.cooperative:
        return None
    held = int(items <= HELD)
    constants = (("live", int(problem.live)), ("held", held)) if problem.norm else ()
    launch = Launch((blocks, 1, 1), (width, workers, 1), shared, waiting > 1, constants)
    kernel = f"bnk_lstm_{direction}_cooperative_{problem.norm or 'plain'}_{suffix(problem.dtype)}"
    source = f"lstm_{direction}_cooperative"
    return LaunchPlan(source, kernel, launch, ARGUMENTS[direction][problem.dtype], held=held)
