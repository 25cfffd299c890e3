"""Documents in JSON that every reader takes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np


def to_json(document: Any) -> str:
    """Write a document as JSON, which knows neither NaN nor infinity.

    Parameters
    ----------
    document : any
        Mappings with text as keys, sequences, text, numbers of Python or NumPy, None.

    Returns
    -------
    str
        ASCII text with a line for every item. Numbers that are not finite have become null.

    Examples
    --------
    >>> print(to_json({"loss": float("nan"), "steps": np.int64(3)}))
    {
      "loss": null,
      "steps": 3
    }
    """
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return Python's own values for JSON, None for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
