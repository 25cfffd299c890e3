"""Every op with all of its arrays by name, for the tests that spoil, move, misalign or count them one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.ops import every_sample

EVERY = {name.removeprefix("batch_norm_"): sample for name, sample in every_sample().items()}
CALLS = {  # calls whose arrays have the shapes of their names
    op: call for op, call in EVERY.items() if not call.specs and not {"residual", "scalars"} & {*call.reads}
}
ARRAYS = [(op, name) for op, call in CALLS.items() for name in call.names]
EVERY_OUTPUT = [(op, name) for op, call in EVERY.items() for name in call.writes]
SAID = {"parts": "moments"}  # names of arrays in messages
STATE = {"fused_training": {"velocity": "first"}}


def make_arrays(op: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return valid arrays for a call, those to be written filled with positive numbers too."""
    return EVERY[op].arrays(dtype=dtype)


def named(op: str, name: str) -> str:
    """Return what messages call an array."""
    return (SAID | STATE.get(op, {})).get(name, name)


def run(op: str, arrays: dict[str, Any]) -> Any:
    """Make a call."""
    return EVERY[op].run(arrays)
