"""Requirements when an op refuses its arguments: the right error, nothing written, nothing launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tools import backends
from tools.backends import Backend


@contextmanager
def refused(backend: Backend, error: type[Exception], message: str, *unwritten: Any) -> Iterator[None]:
    """Expect exactly this error with this message, and every array of `unwritten` as it was."""
    before = [np.array(backend.asnumpy(array)) for array in unwritten]
    launches = backends.emulated_runtime().launches if backend.name == "emulator" else []
    launches.clear()
    with pytest.raises(error, match=message) as caught:
        yield
    assert type(caught.value) is error
    for old, array in zip(before, unwritten, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(array), old)
    assert not launches
