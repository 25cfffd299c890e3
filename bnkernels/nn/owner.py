"""Base of the layers as owners of arrays: parameters, gradients and buffers by name, moved, converted, saved, shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from bnkernels.nn import display, state
from bnkernels.nn.flat import flat_views
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap
from bnkernels.runtime.arguments import empty, suffix
from bnkernels.runtime.dlpack import incoming
from bnkernels.runtime.registry import choose_device, runtime_of

Self = TypeVar("Self", bound="Owner")


class Owner:
    """Owner of arrays by name, and of owners inside it."""

    def __init__(self) -> None:
        self._parameters: dict[str, Any] = {}
        self._gradients: dict[str, Any] = {}
        self._buffers: dict[str, Any] = {}
        self._flat: tuple[dict[str, Any], Any, Any] | None = None

    @property
    def children(self) -> Mapping[str, Any]:
        """Layers inside this one, by name."""
        return {}

    @property
    def parts_shown(self) -> Mapping[str, Any]:
        """Layers inside, where they are shown one by one."""
        return self.children

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters by name; those of layers inside have dotted names. The arrays are the layer's own."""
        return self._all("_parameters")

    @property
    def gradients(self) -> Mapping[str, Any]:
        """Gradients of the parameters, by the same names."""
        return self._all("_gradients")

    @property
    def buffers(self) -> Mapping[str, Any]:
        """Arrays that are no parameters, such as running statistics, by name."""
        return self._all("_buffers")

    def _all(self, kind: str) -> Mapping[str, Any]:
        return MappingProxyType({name: getattr(owner, kind)[own] for name, owner, own in self._owners(kind)})

    def _owners(self, kind: str, prefix: str = "") -> Iterator[tuple[str, Owner, str]]:
        """Yield the dotted name of every array of a kind, the layer that owns it, and its name there."""
        yield from ((f"{prefix}{name}", self, name) for name in getattr(self, kind))
        for name, child in self.children.items():
            yield from child._owners(kind, f"{prefix}{name}.")

    def _take_gradients(self, given: Mapping[str, Any] | None) -> None:
        """Keep these arrays for the gradients, and make those that are missing."""
        given = given or {}
        for name, array in self._parameters.items():
            gradient = zeros_beside(array, array.shape) if given.get(name) is None else given[name]
            gradient = vector(f"the gradient of {name}", gradient, array.shape, array.dtype, array)
            self._gradients[name] = gradient

    def zero_gradients(self) -> None:
        """Set all gradients to 0."""
        for array in self.gradients.values():
            array[...] = 0

    @property
    def parameter_count(self) -> int:
        """Number of parameters, each number counted."""
        return sum(array.size for array in self.parameters.values())

    @property
    def xp(self) -> Any:
        """Array module of the layer's arrays, `numpy` or `cupy`; `numpy` where there are none."""
        for array in (*self.parameters.values(), *self.buffers.values()):
            runtime = runtime_of(type(array))
            return np if runtime is None else runtime.xp
        return np

    def flatten(self) -> tuple[Any, Any]:
        """Move all parameters into one flat array and all gradients into another, of which they become views.

        Returns
        -------
        parameters : array, shape (P,)
            All parameters.
        gradients : array, shape (P,)
            All gradients. Both arrays start every parameter at a multiple of 64 bytes, and are 0 in between.

        Raises
        ------
        ValueError
            If the parameters have several data types, or there are none.
        """
        mine = self.parameters
        if self._flat is not None:
            views, *flats = self._flat
            if views.keys() == mine.keys() and all(mine[name] is view for name, view in views.items()):
                return flats[0], flats[1]
        dtypes = sorted({str(array.dtype) for array in mine.values()})
        if len(dtypes) != 1:
            raise ValueError(f"parameters must have one data type to lie in one array, got {', '.join(dtypes) or None}")
        shapes = {name: array.shape for name, array in mine.items()}
        flats, like = [], next(iter(mine.values()))
        for kind in ("_parameters", "_gradients"):
            _, flat, views = flat_views(shapes, like.dtype, _Allocator(like))
            for name, owner, own in list(self._owners(kind)):
                views[name][...] = getattr(owner, kind)[own]
                getattr(owner, kind)[own] = views[name]
            flats.append(flat)
        self._flat = dict(self.parameters), *flats
        return flats[0], flats[1]

    def to(self: Self, device: Any) -> Self:
        """Move all arrays to a device.

        Parameters
        ----------
        device : {"cpu", "cuda"} or module
            Device, or array module: `numpy` or `cupy`. An optimiser is made after that: its arrays stay where they are.

        Returns
        -------
        Layer
            This layer.

        Raises
        ------
        DeviceError
            If the device cannot be used; the message says why.
        TypeError
            If it is no device.
        """
        xp = device_module(device)
        self._map(lambda owner, name, array: state.host(array) if xp is np else xp.asarray(array))
        return self

    def astype(self: Self, dtype: Any) -> Self:
        """Convert the layer to another data type.

        Parameters
        ----------
        dtype : data type
            Type of the data: float16, bfloat16, float32 or float64. Norms and biases keep float32 for 16-bit data.

        Returns
        -------
        Layer
            This layer.

        Raises
        ------
        ValueError
            If layers cannot have that data type.
        """
        data = data_type(dtype)
        self._map(lambda owner, name, array: array.astype(owner._dtype_of(name, data)))
        return self

    def _dtype_of(self, name: str, data: np.dtype) -> np.dtype:
        """Return the data type of an array of this layer, for data of a type."""
        return data

    def _map(self, change: Callable[[Owner, str, Any], Any]) -> None:
        for kind in ("_parameters", "_gradients", "_buffers"):
            for name, array in list(getattr(self, kind).items()):
                getattr(self, kind)[name] = change(self, name, array)
        self._forget()
        for child in self.children.values():
            child._map(change)

    def _forget(self) -> None:
        """Forget what was derived from the arrays."""
        self._flat = None

    def __getstate__(self) -> dict[str, Any]:
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._forget()
        return copy.__dict__

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of all arrays on the host, in PyTorch's names and layout.

        Returns
        -------
        dict of str to numpy.ndarray
            `weight`, of a `Linear` (outputs, inputs); `bias`; `running_mean`, `running_var`, `num_batches_tracked`.
            Names of layers inside come first: ``0.weight``.
        """
        return state.collected(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take the numbers of all arrays from a state in PyTorch's names and layout.

        Parameters
        ----------
        state_dict : mapping of str to array
            State as `state_dict` returns it, or as PyTorch's modules do. Shapes may have axes of length 1 more.
        strict : bool
            Whether all names of this layer must be there and no other; `num_batches_tracked` may always be missing.

        Raises
        ------
        TypeError
            If something is not an array of real numbers; nothing is changed then.
        ValueError
            If a name is missing or unknown, a shape differs, or a number does not fit; nothing is changed then.
        """
        state.load(self, state_dict, check.boolean("strict", strict))

    def _exported(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return an array in PyTorch's layout. It is its own inverse."""
        return array

    # ---- display ----------------------------------------------------------------------------------------------------

    def _options(self) -> list[str]:
        """Return the arguments of the constructor that describe the layer, as text."""
        return []

    def __repr__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.html(self)


class _Allocator:
    """Zeros beside an array, for `flat_views`."""

    def __init__(self, like: Any) -> None:
        self._like = like

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        return zeros_beside(self._like, (size,), dtype)


def zeros_beside(like: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """Return zeros on the device of an array, of its data type or another."""
    array = empty(runtime_of(type(like)), shape, like, dtype)
    array[...] = 0
    return array


def device_module(device: Any) -> Any:
    """Return the array module of a device, which may be one itself."""
    if isinstance(device, str):
        check.one_of("device", device, ("cpu", "cuda"))
        return choose_device(device).xp
    if not hasattr(device, "matmul"):
        raise TypeError(f"device must be 'cpu', 'cuda', or an array module, got {check.shown(device)}")
    return device


def data_type(given: Any) -> np.dtype:
    """Return a data type that a layer may have, from anything that NumPy takes for one."""
    try:
        dtype = None if given is None else np.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or suffix(dtype) is None:
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {check.shown(given)}")
    return dtype


def array_module(given: Any) -> Any:
    """Check for an array module; return it."""
    if not hasattr(given, "matmul"):
        raise TypeError(f"xp must be an array module, numpy or cupy, got {check.shown(given)}; import it and pass it")
    return given


def described(name: str, array: Any) -> tuple[Any, check.Argument]:
    """Return an array that is given for a parameter, as one of ours, and its description; check its data type."""
    array = incoming(name, array)
    argument = check.arguments({name: check.signature(array)})[name]
    assert argument is not None
    check.floating(argument)
    return array, argument


def vector(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype | None = None, beside: Any = None) -> Any:
    """Return an array, which may have axes of length 1 more such as (1, C, 1, 1), as a view of this shape.

    It must be contiguous, writable, of this data type, and lie beside another array, where those are given.
    """
    array = incoming(name, array)
    first = {} if beside is None else {"the first array": check.signature(beside)}
    argument = check.arguments({**first, name: check.signature(array)})[name]
    check.floating(argument)
    if [n for n in argument.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(f"{name} must have the shape {shape}, or axes of length 1 more, got {argument.shape}")
    view = array if argument.shape == shape else array.reshape(shape)
    seen = check.Argument(name, *check.signature(view), written=True)
    check.contiguous(seen, shape, argument.dtype if dtype is None else dtype)
    if runtime_of(argument.kind) is None:
        overlap.writable(name, array)
    return view
