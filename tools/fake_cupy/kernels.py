"""Kernels of the stand-in for CuPy: modules, functions, and what CuPy makes of a launch's arguments."""

from __future__ import annotations

import math
import types
import warnings
from typing import Any, ClassVar

import numpy as np

from bnkernels.runtime.seam import SHARED_BYTES, Launch


class CPointer:
    """``cupy.cuda.function.CPointer``: where an argument lies on the host. It keeps nothing alive."""

    def __init__(self, p: int = 0) -> None:
        self._ptr = p

    ptr = property(lambda self: self._ptr)


class CNumpyArray(CPointer):
    """``cupy.cuda.function.CNumpyArray``: the address of an array's memory, and the array."""

    def __init__(self, v: np.ndarray) -> None:
        super().__init__(v.ctypes.data)
        self._array = v


def converted(driver: Any, value: Any) -> Any:
    """Return an argument as a launch takes it: CuPy's arrays, addresses, and host numbers by value."""
    if value is None or isinstance(value, CPointer | driver.array_type):
        return value
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError(
                f"You are trying to pass a numpy.ndarray of shape {value.shape} as a kernel parameter. "
                "Only numpy.ndarrays of size one can be passed by value."
            )
        driver.described += value.dtype.fields is not None
        return CNumpyArray(value)
    if isinstance(value, bool | int | float | complex | np.generic):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


class Function:
    """``cupy.cuda.Function``: a kernel of one device, which runs there on the current stream."""

    _kernel: ClassVar[RawKernel | None] = None  # None for a function that is no kernel

    def __init__(self, kernel: RawKernel) -> None:
        self._kernel, self.ptr = kernel, next(kernel.driver.handles)
        kernel.driver.pointers[self.ptr] = self

    def __call__(
        self,
        grid: tuple,
        block: tuple,
        args: Any,
        shared_mem: int = 0,
        stream: Any = None,
        enable_cooperative_groups: bool = False,
    ) -> None:
        """Launch: a kernel of ours, with one struct as argument, on the emulator; any other as its host version."""
        for name, given in (("grid", grid), ("block", block)):
            if type(given) is not tuple:
                raise TypeError(f"Argument '{name}' has incorrect type (expected tuple, got {type(given).__name__})")
        kernel = self._kernel
        values = [converted(kernel.driver if kernel else _NOBODY, value) for value in args]
        if kernel is None:
            raise RuntimeError("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
        grid, block = (tuple(max(1, size) for size in (*given, 1, 1)[:3]) for given in (grid, block))
        driver = kernel.driver
        driver.make_context()
        if enable_cooperative_groups:
            grid = self._cut(grid, driver.resident(self.ptr, math.prod(block), shared_mem))
        if shared_mem > kernel.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory without opting in")
        kernel.run(Launch(grid, block, shared_mem, bool(enable_cooperative_groups)), values)

    @staticmethod
    def _cut(grid: tuple[int, int, int], most: int) -> tuple[int, int, int]:
        """Return as much of a grid as is resident at once."""
        if math.prod(grid) <= most:
            return grid
        if grid[1:] != (1, 1):
            raise ValueError(f"The specified grid size ({grid[0]} * {grid[1]} * {grid[2]}) exceeds the limit ({most}).")
        warnings.warn(
            f"The grid size will be reduced from {grid[0]} to {most}, as the specified grid size exceeds the limit.",
            stacklevel=3,
        )
        return most, 1, 1


_NOBODY = types.SimpleNamespace(described=0, array_type=CPointer)


class RawKernel:
    """``cupy.RawKernel``: runs on the current device and its current stream, whatever device its arrays are on."""

    def __init__(self, driver: Any, code: str, name: str, options: tuple, cooperative: bool) -> None:
        self.driver, self.code, self.name, self.options = driver, code, name, options
        self.enable_cooperative_groups = cooperative
        self.max_dynamic_shared_size_bytes, self.preferred_shared_memory_carveout = SHARED_BYTES, -1
        self._functions: dict[int, Function] = {}

    @property
    def kernel(self) -> Function:
        """The function of the current device."""
        device = self.driver.device
        return self._functions.get(device) or self._functions.setdefault(device, Function(self))

    def __call__(self, grid: tuple, block: tuple, args: Any, **kwargs: Any) -> None:
        """Launch."""
        self.kernel(grid, block, args, enable_cooperative_groups=self.enable_cooperative_groups, **kwargs)

    def run(self, launch: Launch, values: list) -> None:
        """Do what the driver does with a launch."""
        if self.name in self.driver.host_kernels:
            args = tuple(value._array if isinstance(value, CNumpyArray) else value for value in values)
            self.driver.launch_twin(self.name, launch, args)
            return
        (struct,) = values
        if not isinstance(struct, CPointer):
            raise TypeError(f"the emulator runs kernels of one argument, a struct; {self.name} got {struct!r}")
        self.driver.launch(self.driver.load(self.code, self.options), self.name, launch, struct.ptr)


class RawModule:
    """``cupy.RawModule``: compiled for a device at the first look for a kernel there."""

    def __init__(self, driver: Any, *, code: str, options: tuple[str, ...] = ()) -> None:
        if type(code) is not str or type(options) is not tuple or not all(type(o) is str for o in options):
            raise TypeError(f"code must be a str and options a tuple of str, got {type(code)} and {options!r}")
        self._driver, self._code, self._options = driver, code, options

    def get_function(self, name: str) -> RawKernel:
        """Return a new kernel object, compiled for the current device."""
        self._driver.load(self._code, self._options)
        self._driver.functions[self._driver.device, name] += 1
        kernel = RawKernel(self._driver, self._code, name, self._options, cooperative=False)
        self._driver.kernels.append(kernel)
        return kernel


MODULE = types.SimpleNamespace(CPointer=CPointer, CNumpyArray=CNumpyArray, Function=Function)  # cupy.cuda.function
