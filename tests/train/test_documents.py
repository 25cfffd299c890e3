"""Documents are JSON for every reader: no NaN, no infinity, NumPy's numbers as numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bnkernels.train.documents import to_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (np.float32("-inf"), None),
        (np.float64("nan"), None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.True_, True),
        ((1, 2.5, "text ±", None), [1, 2.5, "text ±", None]),
        ({"a": [{"b": (float("nan"), 1)}]}, {"a": [{"b": [None, 1]}]}),
        ("folder \udcff", "folder \udcff"),
    ],
)
def test_a_document_is_read_back(value: Any, read: Any) -> None:
    text = to_json(value)
    assert text.isascii()
    assert json.loads(text, parse_constant=refuse) == read


def test_what_is_no_document_is_refused() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_json({"array": np.zeros(3)})
