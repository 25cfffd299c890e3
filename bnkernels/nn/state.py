"""State of layers by name, in PyTorch's names and layout: collected, and loaded whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.dlpack import incoming, on_device
from bnkernels.runtime.registry import runtime_of

COUNT = "num_batches_tracked"


def host(array: Any) -> np.ndarray:
    """Return a copy of an array on the host."""
    runtime = runtime_of(type(array))
    return np.array(getattr(None if runtime is None else runtime.xp, "asnumpy", np.asarray)(array), subok=False)


def plain(name: str, given: Any) -> Any:
    """Return an array of any library as one of NumPy's; anything else as it is."""
    array = incoming(name, given)
    return host(array) if on_device(type(array)) else array


def collected(owner: Any) -> dict[str, np.ndarray]:
    """Return the state of an owner of arrays and of those inside it."""
    found = {
        name: np.ascontiguousarray(one._exported(own, host(getattr(one, kind)[own])))
        for kind in ("_parameters", "_buffers")
        for name, one, own in owner._owners(kind)
    }
    counts = {f"{name}{COUNT}": np.array(one.batches) for name, one in _counting(owner)}
    order = {prefix: place for place, prefix in enumerate(_prefixes(owner))}
    return dict(sorted((found | counts).items(), key=lambda item: order[item[0].rpartition(".")[0]]))


def load(owner: Any, given: Mapping[str, Any], strict: bool) -> None:
    """Check a state, then write it into the arrays of an owner."""
    if not isinstance(given, Mapping):
        raise TypeError(f"the state must be a dict of arrays by name, got {check.shown(given)}")
    mine = {name: (one, kind, own) for kind in ("_parameters", "_buffers") for name, one, own in owner._owners(kind)}
    counts = {f"{name}{COUNT}": one for name, one in _counting(owner)}
    missing, unknown = sorted(mine.keys() - given.keys()), sorted(map(str, given.keys() - mine.keys() - counts.keys()))
    if strict and (missing or unknown):
        raise ValueError(
            f"the state is of another layer: missing {check.shown(missing)}, unknown {check.shown(unknown)}; "
            "strict=False takes what there is"
        )
    writes: list[Callable[[], None]] = []
    for name, (one, kind, own) in mine.items():
        if name in given:
            array = getattr(one, kind)[own]
            writes.append(_write(array, _numbers(name, given[name], one, own, array)))
    batches = {
        name: check.count(f"the state's {name}", plain(f"the state's {name}", given[name]))
        for name in counts
        if name in given
    }
    for write in writes:
        write()
    for name, number in batches.items():
        counts[name].batches = number


def _numbers(name: str, given: Any, one: Any, own: str, array: Any) -> Any:
    """Return an array of a state in the layout and data type of ours, on the device of ours."""
    numbers = plain(f"the state's {name}", given)
    numbers = numbers if isinstance(numbers, np.ndarray) else np.asarray(numbers)
    shape = one._exported(own, np.empty(array.shape, np.bool_)).shape
    if numbers.shape != shape and [n for n in numbers.shape if n != 1] == [n for n in shape if n != 1]:
        numbers = numbers.reshape(shape)
    checked = one._exported(own, check.saved(f"the state's {name}", numbers, shape, array.dtype))
    runtime = runtime_of(type(array))
    return checked if runtime is None else runtime.on_device(np.ascontiguousarray(checked), array)


def _write(array: Any, numbers: Any) -> Callable[[], None]:
    def write() -> None:
        array[...] = numbers

    return write


def _counting(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the layers that count mini-batches for their running statistics, each with the beginning of its names."""
    if owner._buffers:
        yield prefix, owner
    for name, child in owner.children.items():
        yield from _counting(child, f"{prefix}{name}.")


def _prefixes(owner: Any, name: str = "") -> Iterator[str]:
    """Yield the names of an owner and those inside, in order."""
    yield name
    for child_name, child in owner.children.items():
        yield from _prefixes(child, f"{name}.{child_name}" if name else child_name)
