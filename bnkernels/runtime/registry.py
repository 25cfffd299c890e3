"""Registry of runtimes by the type of their arrays, and the choice of a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime.seam import Runtime

runtimes: dict[type, Runtime] = {}  # by the type of their arrays


class DeviceError(ValueError):
    """The device that was asked for cannot be used; the message says why and what to do."""


class Device(NamedTuple):
    """Place that computes.

    Attributes
    ----------
    xp : module
        Its array module, ``cupy`` or ``numpy``.
    description : str
        ``"cuda"`` or ``"cpu"``; a CPU that ``auto`` chose is followed by the reason.
    emulated : bool
        Whether it is an emulator, whose times mean nothing.
    """

    xp: Any
    description: str
    emulated: bool = False


def register(runtime: Runtime) -> None:
    """Let arrays of ``runtime.array_type`` run on `runtime`, for good: the ops keep what they learn of it."""
    runtimes[runtime.array_type] = runtime


def runtime_of(kind: type, name: str = "") -> Runtime | None:
    """Return the runtime of arrays of this type, or None for NumPy arrays, which take the NumPy path.

    Raises TypeError for anything else, with the `name` of the argument: also for those of NumPy's arrays that mean more
    than their numbers, or multiply in another way.
    """
    runtime = runtimes.get(kind)
    if runtime is not None or kind is np.ndarray:
        return runtime
    if kind.__module__.partition(".")[0] == "cupy" and kind.__name__ == "ndarray":
        from bnkernels.runtime import cuda

        register(cuda.CudaRuntime())
        return runtimes[kind]
    name = f"{name}: " if name else ""
    if issubclass(kind, np.ndarray):
        if issubclass(kind, np.ma.MaskedArray):
            raise TypeError(
                f"{name}expected a plain array, got a {kind.__qualname__}, whose mask would be lost; pass its data, "
                "and to batch norm mask=, True where a value counts; or numpy.ma.filled of it"
            )
        if issubclass(kind, np.matrix):
            raise TypeError(f"{name}expected a plain array, got a {kind.__qualname__}; pass numpy.asarray of it")
        return None
    raise TypeError(
        f"{name}expected a NumPy or a CuPy array, got {kind.__module__}.{kind.__qualname__}; "
        "other device arrays come in through cupy.from_dlpack, lists through numpy.asarray"
    )


def why_no_cuda() -> str | None:
    """Return None where CUDA kernels can run, else the reason why they cannot and the way out."""
    try:
        from bnkernels.runtime import cuda
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); install bnkernels[cuda13] or bnkernels[cuda12]"
    except Exception as error:  # it makes the folder of its cache, and looks for CUDA's libraries
        return (
            f"CuPy cannot be imported ({type(error).__name__}: {error}); "
            "set CUPY_CACHE_DIR to a folder that can be written, or see what `import cupy` says"
        )
    return cuda.available()


def choose_device(option: str) -> Device:
    """Return the device of an option.

    Parameters
    ----------
    option : {"auto", "cpu", "cuda"}
        Name of the device; ``auto`` takes a GPU where one is usable.

    Returns
    -------
    Device
        Array module and description.

    Raises
    ------
    DeviceError
        If ``cuda`` is asked for and not usable; the message says why.
    """
    if option == "cpu":
        return Device(np, "cpu")
    reason = why_no_cuda()
    if reason is None:
        from bnkernels.runtime.cuda import CudaRuntime

        return Device(CudaRuntime.xp, "cuda")
    if option == "cuda":
        raise DeviceError(f"device cuda is not usable: {reason}, or take device cpu")
    return Device(np, f"cpu, because {reason}")
