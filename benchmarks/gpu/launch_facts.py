"""Host cost of a kernel launch, in every way that CuPy and CUDA's Python bindings offer."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.gpu.device import Gpu

Call = Callable[[], Any]
Maker = Callable[["Gpu", "Arguments"], Call]

BURST = 256  # launches between two waits: less than the queue of a stream holds
ARGUMENTS = np.dtype(
    [(name, np.uint64) for name in ("a", "b", "c", "d", "e", "f", "count")]
    + [("rows", np.int64), ("channels", np.int64), ("eps", np.float32)],
    align=True,
)  # cuda/launches.cu: Arguments


class Arguments:
    """The arguments of the counting kernels in every form, and what keeps them alive."""

    def __init__(self, gpu: Gpu) -> None:
        self.arrays = [gpu.cupy.zeros((64, 20), "float32") for _ in range(6)]
        self.count = gpu.counter()
        addresses = [array.data.ptr for array in (*self.arrays, self.count)]
        self.separate = (*self.arrays, self.count, np.int64(64), np.int64(20), np.float32(0.5))
        self.struct = np.array((*addresses, 64, 20, 0.5), ARGUMENTS)
        self._pointers = (ctypes.c_void_p * 1)(self.struct.ctypes.data)
        self.packed = ctypes.addressof(self._pointers)  # the argument of cuLaunchKernel


def launches(gpu: Gpu) -> dict[str, Any]:
    """Measure microseconds of the host per call of every way, each by itself."""
    arguments = Arguments(gpu)
    found: dict[str, Any] = {}
    for name, (make, counts) in WAYS.items():
        try:
            found[name] = one_way(gpu, arguments, make, counts)
        except ImportError as reason:
            found[name] = {"unavailable": str(reason)}
        except Exception as problem:  # a way may be gone in another version of CuPy; the others are measured
            found[name] = {"error": f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"}
    return found


def one_way(gpu: Gpu, arguments: Arguments, make: Maker, counts: bool) -> Any:
    """Measure one way, and that the kernel ran as often as it was called, where it is one that counts."""
    call = make(gpu, arguments)
    before = int(arguments.count[0])
    times, calls = host_us(gpu, call)
    counted = int(arguments.count[0]) - before
    if counted != calls * counts:
        raise ArithmeticError(f"{calls} calls, but the kernel ran {counted} times with its arguments")
    return gpu.figure(times)


def host_us(gpu: Gpu, call: Callable[[], Any]) -> tuple[list[float], int]:
    """Return the host's microseconds per call, burst by burst, and how many calls there were."""
    burst = 4 if gpu.rehearsal else BURST
    call()
    gpu.stream.synchronize()
    times = []
    for _ in range(gpu.rounds):
        started = perf_counter()
        for _ in range(burst):
            call()
        times.append(1e6 * (perf_counter() - started) / burst)
        gpu.stream.synchronize()
    return times, 1 + burst * gpu.rounds


# ---- the ways: each returns the call ---------------------------------------------------------------------------------


def kernel_of(gpu: Gpu, kind: str, *args: Any) -> Any:
    """Return one of the counting kernels, compiled."""
    kernel = gpu.kernel("launches", f"bnk_count_{kind}")
    kernel((1,), (32,), args)
    return kernel


def raw_kernel_many(gpu: Gpu, given: Arguments) -> Call:
    """Take six arrays, a counter and three scalars."""
    kernel = kernel_of(gpu, "arguments", *given.separate)
    return lambda: kernel((1,), (32,), given.separate)


def raw_kernel_struct(gpu: Gpu, given: Arguments) -> Call:
    """Take one structured NumPy array, whose type CuPy describes at every launch."""
    kernel = kernel_of(gpu, "struct", given.struct)
    return lambda: kernel((1,), (32,), (given.struct,))


def function_struct(gpu: Gpu, given: Arguments) -> Call:
    """Skip RawKernel's look for the device's function."""
    function = kernel_of(gpu, "struct", given.struct).kernel
    return lambda: function((1,), (32,), (given.struct,))


def function_address(gpu: Gpu, given: Arguments) -> Call:
    """Take the address of the struct, as bnkernels does."""
    function, pointer = kernel_of(gpu, "struct", given.struct).kernel, gpu.cupy.cuda.function.CPointer
    address = given.struct.ctypes.data
    return lambda: function((1,), (32,), (pointer(address),))


def function_prebuilt(gpu: Gpu, given: Arguments) -> Call:
    """Skip the wrapping of the argument too, and the look for the current stream."""
    function = kernel_of(gpu, "struct", given.struct).kernel
    wrapped = (gpu.cupy.cuda.function.CNumpyArray(given.struct),)
    return lambda: function((1,), (32,), wrapped, 0, gpu.stream)


def backend_prepacked(gpu: Gpu, given: Arguments) -> Call:
    """Call the driver through CuPy's private binding."""
    driver = importlib.import_module("cupy_backends.cuda.api.driver")
    kernel = kernel_of(gpu, "struct", given.struct)
    function, handle, stream, packed = kernel.kernel, kernel.kernel.ptr, gpu.stream.ptr, given.packed
    return lambda function=function: driver.launchKernel(handle, 1, 1, 1, 32, 1, 1, 0, stream, packed, 0)


def bindings_prepacked(gpu: Gpu, given: Arguments) -> Call:
    """Call the driver through NVIDIA's public binding."""
    driver = importlib.import_module("cuda.bindings.driver")
    kernel = kernel_of(gpu, "struct", given.struct)
    function, packed = kernel.kernel, given.packed
    handle, stream = driver.CUfunction(function.ptr), driver.CUstream(gpu.stream.ptr)
    return lambda function=function: driver.cuLaunchKernel(handle, 1, 1, 1, 32, 1, 1, 0, stream, packed, 0)


def ufunc(gpu: Gpu, given: Arguments) -> Call:
    """Multiply in place."""
    x = gpu.cupy.full((64, 20), 2.0, "float32")
    if float(gpu.cupy.multiply(x, x)[3, 3]) != 4.0:
        raise ArithmeticError("two times two is not four")
    ones = gpu.cupy.ones((64, 20), "float32")
    return lambda: gpu.cupy.multiply(x, ones, out=x)


def mean(gpu: Gpu, given: Arguments) -> Call:
    """Take the mean over the examples: what batch norm as an expression begins with."""
    x = gpu.cupy.full((64, 20), 2.0, "float32")
    if float(x.mean(axis=0)[3]) != 2.0:
        raise ArithmeticError("the mean of twos is not two")
    return lambda: x.mean(axis=0)


def empty(gpu: Gpu, given: Arguments) -> Call:
    """Take memory from CuPy's pool, and give it back."""
    return lambda: gpu.cupy.empty((64, 20), "float32")


WAYS: dict[str, tuple[Maker, bool]] = {  # the way, and whether it launches a kernel that counts
    "RawKernel, arrays and scalars": (raw_kernel_many, True),
    "RawKernel, one struct": (raw_kernel_struct, True),
    "Function, one struct": (function_struct, True),
    "Function, address of a struct (bnkernels)": (function_address, True),
    "Function, prebuilt argument and stream": (function_prebuilt, True),
    "cupy_backends launchKernel, prepacked": (backend_prepacked, True),
    "cuda.bindings cuLaunchKernel, prepacked": (bindings_prepacked, True),
    "cupy.multiply, out given": (ufunc, False),
    "x.mean(axis=0)": (mean, False),
    "cupy.empty": (empty, False),
}
