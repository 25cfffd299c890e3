"""Arrays of other libraries, taken in without a copy through ``__dlpack__``."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime import registry

HOST, CUDA = (1, 3), (2, 13)  # DLPack's numbers of a device: memory of the CPU, pinned; of a GPU, managed


def incoming(name: str, array: Any) -> Any:
    """Return an array of NumPy's or CuPy's that shares the memory of `array`; what has no ``__dlpack__`` is returned.

    Parameters
    ----------
    name : str
        Name of the argument, for messages.
    array : array_like
        Array of any library.

    Returns
    -------
    array
        The array.

    Raises
    ------
    TypeError
        If its memory is neither the CPU's nor a GPU's that CuPy can use.
    """
    kind = type(array)
    if kind is np.ndarray or isinstance(array, np.ndarray) or on_device(kind) or not hasattr(kind, "__dlpack__"):
        return array
    device = int(array.__dlpack_device__()[0])
    if device in HOST:
        return np.from_dlpack(array)
    if device not in CUDA:
        raise TypeError(f"{name} must lie in the memory of a CPU or of a CUDA device, got {check.shown(array)}")
    return registry.choose_device("cuda").xp.from_dlpack(array)


def on_device(kind: type) -> bool:
    """Return whether arrays of this type are a device's, such as CuPy's."""
    return kind in registry.runtimes or kind.__module__.partition(".")[0] == "cupy"
