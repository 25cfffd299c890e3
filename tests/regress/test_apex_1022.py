"""Kernels on a device that was not the current one: zeros, or an illegal access.

tests/runtime/test_cuda_runtime.py sees to it that the runtime makes the arrays' device the current one.
"""

from __future__ import annotations

import pytest

from tests.regress.calls import ARRAYS, CALLS, make_arrays
from tests.regress.device import record_of, recording


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_apex_1022_an_array_on_another_device_is_an_error(op: str, name: str) -> None:
    """A pointer of one device was passed to a kernel on another; the error names the array and both devices."""
    on = record_of(make_arrays(op))
    on[name].device_number = 1
    with recording() as runtime:
        with pytest.raises(ValueError, match=r"is on device [01] but .* is on device [01]; move one of them"):
            CALLS[op].run(on)
        assert runtime.launches == []


@pytest.mark.parametrize("op", CALLS)
def test_apex_1022_all_arrays_on_the_second_device(op: str) -> None:
    """The launch is for the device of the arrays, not for the current one."""
    on = record_of(make_arrays(op))
    for array in on.values():
        array.device_number = 1
    with recording() as runtime:
        CALLS[op].run(on)
        assert [record.like.device_number for record in runtime.launches] == [1]
