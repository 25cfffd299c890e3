"""The host cost of an op's call: what Python does before a kernel is enqueued, beside a whole call of PyTorch's.

``make host-cost`` times `batch_norm_forward`, `batch_norm_backward` and `batch_norm_inference` with ``out=``, CuPy's
launch replaced by a function that does nothing, in rounds interleaved with `torch.nn.functional.batch_norm` on one
number. The arrays are stand-ins, whose attributes are made by C code at every look, as CuPy's are; where CuPy has a
GPU, its own arrays are measured as well; and so are NumPy's, with no kernel called. The last line is the ratio. Exit
status: 0, or 1 where PyTorch is absent and there is nothing to compare with. A verdict does not change it: other work
on a machine can.

A row of its own, which the verdicts add, is what CuPy makes of the launch's argument, in CuPy's own code and without a
driver. What is in no figure: CuPy's looks for the stream and the context, and the driver's call, some 2 us; nor, with
stand-ins, the change of the device, two calls of the CUDA runtime. Without CuPy the calls end before our launch.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import cache
from importlib import import_module
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import bnkernels as bn
from benchmarks.harness.timing import interleave
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, INFERENCE
from bnkernels.runtime import cpu, registry, seam

ROUNDS, CALLS = 1000, 100  # the best round had the machine to itself
MOST_US = 4.0
ROWS, CHANNELS = 64, 20
TRAINING = ("batch_norm_forward", "batch_norm_backward")  # the ops of the verdicts
ELSEWHERE = "batch_norm_forward, x at a new address"
ARGUMENT = "the argument, as CuPy converts it"
MANY = 100  # arguments at once: the error at the end of a launch that cannot be costs more than one

Calls = dict[str, tuple[str, dict[str, Any]]]  # a statement, and the names in it


class Address(int):
    """Stand-in for CuPy's ``array.data``: two numbers, each made by a C getter."""

    __slots__ = ()
    ptr = int.real
    device_id = int.imag  # 0: there is one device


class Here(nullcontext):
    """The device of all stand-ins."""

    id = 0

    def __enter__(self) -> Any:
        return self


class Standin(np.ndarray):
    """An array with the attributes of CuPy's that ops read."""

    __slots__ = ("data",)
    device = Here()


class StandinRuntime(seam.Runtime):
    """Reads arrays and launches as the CUDA runtime does, but for CuPy's launch, which does nothing."""

    array_type = Standin
    xp = np

    def __init__(self) -> None:
        self._functions: dict[tuple, Callable[..., None]] = {}

    def asarray(self, array: np.ndarray) -> Standin:
        """Return a copy."""
        copy = np.array(array).view(Standin)
        copy.data = Address(copy.ctypes.data)
        return copy

    def pointer(self, array: Standin) -> int:
        """Return the address of the array's first element."""
        return array.data.ptr

    def device(self, array: Standin) -> int:
        """Return 0: there is one."""
        return array.data.device_id

    def launch(self, source: str, entry_point: str, launch: seam.Launch, arguments: np.ndarray, like: Any) -> None:
        """Do nothing: what is without CuPy."""

    def _compiled(self, key: tuple, source: str, like: Any) -> Callable[..., None]:
        return self._functions.setdefault(key, nothing)


def nothing(
    grid: tuple,
    block: tuple,
    args: tuple,
    shared_mem: int = 0,
    stream: Any = None,
    enable_cooperative_groups: bool = False,
) -> None:
    """Stand for ``cupy.cuda.Function``, compiled."""


def cuda_runtime() -> Any:
    """Return the CUDA runtime's module, which needs no GPU to be imported, or None where CuPy is not."""
    try:
        from bnkernels.runtime import cuda
    except Exception:  # the reason is printed by `main`
        return None
    return cuda


_standins = cache(StandinRuntime)


def standins() -> StandinRuntime:
    """Return the one runtime of stand-ins, known to the ops from now on, which launches as the CUDA runtime does."""
    runtime, module = _standins(), cuda_runtime()
    vars(runtime).pop("launch", None)
    if module is not None:
        runtime.launch = module.CudaRuntime.launch.__get__(runtime)
    registry.register(runtime)
    return runtime


def our_calls(asarray: Callable[[Any], Any]) -> Calls:
    """Return calls of the ops on arrays that `asarray` makes."""
    shapes = dict.fromkeys(("x", "y", "dy", "dx"), (ROWS, CHANNELS)) | {"statistics": (3, CHANNELS)}
    shapes |= dict.fromkeys(("gamma", "beta", "mean", "var", "dgamma", "dbeta"), (CHANNELS,))
    names = {name: asarray(np.ones(shape, np.float32)) for name, shape in shapes.items()}
    names |= vars(bn)
    names |= {"outputs": (names["y"], names["statistics"]), "gradients": (names["dx"], names["dgamma"], names["dbeta"])}
    names["others"] = cycle([asarray(np.ones((ROWS, CHANNELS), np.float32)) for _ in range(64)])
    forward = "batch_norm_forward({}, gamma, beta, mean, var, activation='relu', out=outputs)"
    statements = {
        "batch_norm_forward": forward.format("x"),
        "batch_norm_backward": "batch_norm_backward(dy, x, gamma, beta, statistics, activation='relu', out=gradients)",
        "batch_norm_inference": "batch_norm_inference(x, gamma, beta, mean, var, activation='relu', out=y)",
        ELSEWHERE: forward.format("next(others)"),
    }
    return {name: (statement, names) for name, statement in statements.items()}


def passed(statement: str, names: dict[str, Any]) -> tuple:
    """Return the arguments that CuPy's launch gets from a call on stand-ins."""
    runtime, given = standins(), []

    def launch(grid: tuple, block: tuple, args: tuple, *_: Any, **__: Any) -> None:
        given.append(args)

    with mock.patch.multiple(runtime, _functions={}, _compiled=lambda key, source, like: launch):
        timeit.Timer(statement, globals=names).timeit(1)
    return given[0]


def argument_times(args: tuple) -> np.ndarray:
    """Return the microseconds that CuPy takes to turn a launch's arguments into the driver's, round by round.

    The function is of no kernel: what it is called with is converted, and then it fails, with and without a driver.
    """
    import cupy

    function, stream = cupy.cuda.Function.__new__(cupy.cuda.Function), SimpleNamespace(ptr=0)

    def call(given: tuple) -> float:
        def launch() -> None:
            with suppress(RuntimeError):
                function((1,), (1,), given, 0, stream)

        return timeit.timeit(launch, number=1) * 1e6

    times = interleave({"many": lambda: call(args * MANY), "none": lambda: call(())}, ROUNDS)
    return np.maximum(times["many"] - times["none"].min(), 0) / MANY


def argument_row() -> dict[str, np.ndarray]:
    """Return the row of the argument; none without CuPy."""
    if cuda_runtime() is None:
        return {}
    calls = our_calls(standins().asarray)
    return {ARGUMENT: max((argument_times(passed(*calls[name])) for name in TRAINING), key=np.min)}


def torch_calls() -> Calls:
    """Return calls of PyTorch's batch norm on the CPU, with one thread; none where PyTorch is absent."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    names = {"batch_norm": torch.nn.functional.batch_norm, "one": torch.ones(1, 1), "two": torch.ones(2, 1)}
    names |= {"mean": torch.zeros(1), "var": torch.ones(1), "gamma": torch.ones(1), "beta": torch.zeros(1)}
    return {
        "PyTorch, 1 x 1, inference": ("batch_norm(one, mean, var, gamma, beta)", names),
        # It refuses to take statistics of one value per channel.
        "PyTorch, 2 x 1, training": ("batch_norm(two, mean, var, gamma, beta, training=True)", names),
    }


def measured(calls: Calls) -> dict[str, np.ndarray]:
    """Return the microseconds of every call, round by round."""
    timers = {name: timeit.Timer(statement, globals=names) for name, (statement, names) in calls.items()}
    for timer in timers.values():  # the first call of each takes the long way
        timer.timeit(1)
    watches = {name: lambda timer=timer: timer.timeit(CALLS) / CALLS * 1e6 for name, timer in timers.items()}
    return interleave(watches, ROUNDS)


def report(arrays: str, figures: dict[str, np.ndarray]) -> float | None:
    """Print the table and the verdicts of one kind of arrays; return the ratio, None without PyTorch."""
    print(f"\nmicroseconds per call, {arrays}; {ROUNDS} interleaved rounds of {CALLS} calls")
    print(f"{'':38} {'best':>7} {'median':>7}")
    for name, times in figures.items():
        print(f"{name:38} {times.min():7.2f} {np.median(times):7.2f}")
    ours = max(figures[name].min() for name in TRAINING)
    if ARGUMENT in figures:
        ours += figures[ARGUMENT].min()
    verdict = "met" if ours <= MOST_US else "not met"
    print(f"at most {MOST_US:g} us, best round of the slower of forward and backward: {ours:.2f}, {verdict}")
    theirs = [times.min() for name, times in figures.items() if name.startswith("PyTorch, 1 x 1")]
    if not theirs:
        return None
    print(
        f"below PyTorch's on a 1 x 1 tensor: {ours:.2f} and {theirs[0]:.2f}, {'met' if ours < theirs[0] else 'not met'}"
    )
    return ours / theirs[0]


def idle(arrays: tuple) -> None:
    """Stand for the calls of compiled kernels."""


def bound(addresses: tuple[int, ...]) -> Callable[[tuple], None]:
    """Stand for what makes those of a call's addresses."""
    return idle


def report_numpy(rivals: Calls) -> None:
    """Print table and verdicts of NumPy's arrays, of a call that ends where the compiled kernels begin."""
    if reason := cpu.why_reference():
        print(f"\nNumPy's arrays: not measured: {reason}")
        return
    kernels = import_module("bnkernels.ops.batch_norm.cpu")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "prepare", return_value=bound))
        for kind in (FORWARD, BACKWARD, INFERENCE):  # no later call may replay one that does nothing
            stack.enter_context(mock.patch.multiple(kind.calls, _entries={}, _guesses={}))
        report("NumPy's arrays", measured(our_calls(np.asarray) | rivals))


def main() -> int:
    """Measure, print; return the exit status."""
    rivals = torch_calls()
    argument = argument_row()
    report_numpy(rivals)
    ratio = report("stand-ins for CuPy's arrays", measured(our_calls(standins().asarray) | rivals) | argument)
    absent = registry.why_no_cuda()
    with ExitStack() as stack:
        if absent is None:
            import cupy

            runtime = registry.runtime_of(cupy.ndarray)
            compiled = StandinRuntime._compiled.__get__(runtime)
            stack.enter_context(mock.patch.multiple(runtime, _functions={}, _compiled=compiled))
            ratio = report("CuPy's arrays", measured(our_calls(cupy.asarray) | rivals) | argument)
        else:
            print(f"\nCuPy's own arrays: not measured: {absent}")
    if ratio is None:
        print("no ratio: PyTorch is not installed; make host-cost installs it")
        return 1
    print(f"ours / PyTorch's: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
