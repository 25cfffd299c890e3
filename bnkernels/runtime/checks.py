"""Argument checks of the ops: everything is checked before the first launch and before anything is written.

`TypeError` for a wrong container or data type, `ValueError` for a wrong shape, layout or value. Every message names the
argument and says what was expected, what came, and the way out; of what came it shows little, and of an array never the
contents.

Most checks depend on nothing but each array's type, data type, shape and strides: its signature. So the ops make them
in cached functions of signatures, once per combination and not once per call.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnkernels.runtime.arguments import SUFFIX, accumulator, suffix
from bnkernels.runtime.registry import runtime_of
from bnkernels.runtime.seam import Runtime

Signature = tuple[type, np.dtype, tuple[int, ...], tuple[int, ...]]
MOST_SHOWN = 100  # characters of a value in a message
SMALLEST_NORMAL = {dtype: float(np.finfo(dtype).tiny) for dtype in SUFFIX}
LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in SUFFIX}
SMALLEST_SINGLE, LARGEST_SINGLE = SMALLEST_NORMAL[np.dtype(np.float32)], LARGEST[np.dtype(np.float32)]
MOST_COUNTED = 2**53  # steps and mini-batches: as far as double precision counts


def shown(value: Any) -> str:
    """Return a value as messages show it: of an array or a large number what it is, of anything else the beginning."""
    if isinstance(value, (list, tuple)):
        few = [kind_of(item) if isinstance(item, (list, tuple)) else shown(item) for item in value[:4]]
        text = ", ".join([*few, f"... ({len(value)} of them)"] if len(value) > 4 else few)
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    if hasattr(value, "shape") and not isinstance(value, np.generic):  # to print an array may wait for a device
        return f"{kind_of(value)} of the shape {value.shape} and the type {getattr(value, 'dtype', 'unknown')}"
    if isinstance(value, (dict, set, frozenset)):
        return f"{kind_of(value)} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # a foreign class may raise anything; the message must come out
        text = object.__repr__(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def kind_of(value: Any) -> str:
    """Return the type of a value as messages name it."""
    return f"a {_name(type(value))}"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def signature(array: Any) -> Signature | None:
    """Return the signature of an array for cached checks; None for None. `arguments` refuses what is no array."""
    if array is None:
        return None
    try:
        return type(array), array.dtype, array.shape, array.strides
    except AttributeError:
        return type(array), None, None, None


def signatures(arrays: tuple) -> list[Signature | None]:
    """Return the signature of each array."""
    try:
        return [None if array is None else (type(array), array.dtype, array.shape, array.strides) for array in arrays]
    except AttributeError:
        return [signature(array) for array in arrays]


@dataclass(frozen=True)
class Argument:
    """A named array argument, known by its signature, and whether the op writes it."""

    name: str
    kind: type
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    written: bool = False

    @property
    def contiguous(self) -> bool:
        """Whether the array lies in memory in C order."""
        expected = self.dtype.itemsize
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent > 1 and stride != expected and 0 not in self.shape:
                return False
            expected *= extent
        return True

    @property
    def element_strides(self) -> tuple[int, ...]:
        """The strides in elements."""
        return tuple(stride // self.dtype.itemsize for stride in self.strides)


def arguments(
    signatures: dict[str, Signature | None], optional: tuple[str, ...] = (), written: int = 0
) -> dict[str, Argument | None]:
    """Return the arguments of these signatures, the first of which are `written`.

    All must be arrays of one kind, in the byte order of the machine, and None only where optional.
    """
    found: dict[str, Argument | None] = {}
    first: Argument | None = None
    for position, (name, given) in enumerate(signatures.items()):
        if given is None:
            if name not in optional:
                raise TypeError(f"{name} must be an array, got None")
            found[name] = None
            continue
        found[name] = argument = Argument(name, *given, written=position < written)
        runtime = runtime_of(argument.kind, name)
        first = first or argument
        if runtime is not runtime_of(first.kind):
            raise TypeError(
                f"{name} is a {_name(argument.kind)} but {first.name} is a {_name(first.kind)}; nothing is transferred "
                "silently: convert one of them with cupy.asarray or cupy.asnumpy"
            )
        if not argument.dtype.isnative:
            raise TypeError(
                f"{name} must be in the byte order of this machine, got {argument.dtype}; convert it with "
                f"{name}.astype({name}.dtype.newbyteorder('='))"
            )
    return found


def _way_out(argument: Argument, dtype: Any) -> str:
    """Return advice to get an argument of another data type."""
    if argument.dtype.kind == "c":
        return f"pass {argument.name}.real, or what else shall stand for complex numbers"
    return f"convert it with {argument.name}.astype('{dtype}')"


def float32_or_float64(argument: Argument) -> None:
    """Check for float32 or float64."""
    if argument.dtype not in SUFFIX:
        raise TypeError(
            f"{argument.name} must be float32 or float64, got {argument.dtype}; {_way_out(argument, 'float32')}"
        )


def floating(argument: Argument) -> None:
    """Check for a data type of the batch-norm kernels."""
    if suffix(argument.dtype) is None:
        raise TypeError(
            f"{argument.name} must be float16, bfloat16, float32 or float64, got {argument.dtype}; "
            f"{_way_out(argument, 'float32')}"
        )


def like(argument: Argument | None, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check for exactly this shape and data type, where given."""
    if argument is None:
        return
    name = argument.name
    if argument.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {argument.dtype}; {_way_out(argument, dtype)}")
    if argument.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {argument.shape}")


def contiguous(argument: Argument | None, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check for exactly this shape and data type, in C order, where given."""
    like(argument, shape, dtype)
    if argument is not None and not argument.contiguous:
        hint = " (writing to a silent copy would lose the result)" if argument.written else ", such as a copy"
        raise ValueError(
            f"{argument.name} must be contiguous in C order, got strides {argument.strides}; pass a contiguous array"
            f"{hint}"
        )


def one_device(runtime: Runtime, names: tuple[str, ...], arrays: tuple) -> None:
    """Check that all arrays of a runtime, None apart, are on one of its devices."""
    devices = [runtime.device(array) for array in arrays if array is not None]
    if devices.count(devices[0]) == len(devices):
        return
    given = [name for name, array in zip(names, arrays, strict=True) if array is not None]
    first, wanted = given[0], devices[0]
    for name, device in zip(given, devices, strict=True):
        if device != wanted:
            raise ValueError(f"{name} is on device {device} but {first} is on device {wanted}; move one of them")


def cumulative(batches_before: Any) -> float:
    """Check the number of mini-batches before; return the weight of the next one in the mean over all."""
    return 1 / (integer("batches_before", batches_before, 0) + 1)


def number(name: str, given: Any, low: float | None, high: float = sys.float_info.max) -> float:
    """Check for a finite real number between two bounds, both allowed; return it as a float. No `low` is no bound."""
    if type(given) is float and low is not None and low <= given <= high:
        return given + 0.0  # -0.0 is 0
    if isinstance(given, (bool, np.bool_)) or not _is_number(given):
        raise TypeError(f"{name} must be a number, got {shown(given)}; pass a float")
    try:
        number = float(given)
    except OverflowError:
        number = math.inf
    least = -high if low is None else low
    if not (least <= number <= high and math.isfinite(number)):
        wanted = f"at least {low} and" if high == sys.float_info.max else f"between {low} and {high} and"
        raise ValueError(f"{name} must be {'' if low is None else f'{wanted} '}finite, got {shown(given)}")
    return number + 0.0


def _is_number(given: Any) -> bool:
    """Return whether a value is one real number on the host: to read one on a device would wait for it."""
    if isinstance(given, (np.generic, np.ndarray)):
        return given.ndim == 0 and (given.dtype.kind in "iuf" or suffix(given.dtype) is not None)
    return not hasattr(given, "shape") and (hasattr(given, "__float__") or hasattr(given, "__index__"))


def epsilon(given: Any, like: Any = None) -> float:
    """Check for an `eps` of a norm that computes in the accumulator's type of the array `like`; return it as a float.

    A constant channel has the variance 0, so only eps keeps ``1 / sqrt(var + eps)`` finite. Below the smallest normal
    number it does not on a GPU, which may flush such numbers to 0.
    """
    if type(given) is float and SMALLEST_SINGLE <= given <= LARGEST_SINGLE:
        return given
    dtype = getattr(like, "dtype", None)
    kind = accumulator(dtype) if isinstance(dtype, np.dtype) and suffix(dtype) else np.dtype(np.float64)
    found = number("eps", given, None)
    if found < SMALLEST_NORMAL[kind]:
        raise ValueError(
            f"eps must be at least {SMALLEST_NORMAL[kind]:.4g}, the smallest normal {kind}, got {shown(given)}: a "
            "channel of equal values has the variance 0 and would be NaN; pass a small number, such as the usual 1e-5"
        )
    if found > LARGEST[kind]:
        raise ValueError(f"eps must be at most {LARGEST[kind]:.4g}, the largest {kind}, got {shown(given)}")
    return found


def integer(name: str, given: Any, low: int | None = None, high: int | None = None) -> int:
    """Check for an integer, not below `low` and not above `high` where these are given; return it as an int."""
    try:
        found = given if type(given) is int else operator.index(given)
    except TypeError:
        found = None
    if found is None or isinstance(given, bool):
        raise TypeError(f"{name} must be an integer, got {shown(given)}")
    if low is not None and (found < low or (high is not None and found > high)):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {wanted}, got {shown(given)}")
    return found


def one_of(name: str, given: Any, choices: Any) -> None:
    """Check for one of these names, or None where that is one of them."""
    if not (type(given) is str or given is None) or given not in choices:
        wanted = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {wanted}; got {shown(given)}")


def count(name: str, given: Any) -> int:
    """Check for a number that was counted and saved, as an integer or an array of one; return it as an int."""
    array = np.asarray(given)
    if array.shape or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an integer, got {shown(given)}")
    return integer(name, int(array), 0, MOST_COUNTED)


def saved(name: str, given: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Check an array of a saved state; return it in this type, if that only rounds."""
    if isinstance(given, np.ma.MaskedArray) or hasattr(given, "__cuda_array_interface__"):
        raise TypeError(f"{name} must be a plain NumPy array, got {shown(given)}; pass what state() returned")
    array = np.asarray(given)
    if array.dtype.kind not in "iuf" and suffix(array.dtype) is None:
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}; pass what state() returned")
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {array.shape}; pass the state of such a network")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
    if (np.isinf(converted) & ~np.isinf(array)).any():
        raise ValueError(
            f"{name} holds numbers beyond the range of {dtype}, got {array.dtype}; load it into {array.dtype}"
        )
    return converted


def boolean(name: str, given: Any) -> bool:
    """Check for True or False; return it as a bool."""
    if not isinstance(given, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(given)}")
    return bool(given)


def renorm_limits(given: Any) -> tuple[float, float] | None:
    """Check for the limits of batch renormalisation, or None; return them as floats."""
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"renorm must be a tuple (r_max, d_max), such as (3.0, 5.0), got {shown(given)}")
    return number("r_max", given[0], 1), number("d_max", given[1], 0)


def pack_outputs(out: Any, names: tuple[str, ...]) -> tuple:
    """Check `out`, a tuple with one array for every name, or None; return it, or as many None."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, tuple) or len(out) != len(names) or type(None) in map(type, out):
        raise TypeError(f"out must be a tuple of the {len(names)} arrays ({', '.join(names)}), got {shown(out)}")
    return out


def pack_wanted(out: Any, names: tuple[str, ...], wanted: tuple[bool, ...]) -> tuple:
    """Check `out`, None or a tuple with an array for every result that is wanted; return it, or as many None."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, tuple) or [array is not None for array in out] != list(wanted):
        expected = ", ".join(name if want else "None" for name, want in zip(names, wanted, strict=True))
        raise TypeError(f"out must be the tuple of arrays ({expected}), got {shown(out)}")
    return out


def pack_gradients(out: Any, residual: Any) -> tuple[Any, ...]:
    """Return the four arrays of `out`, or None for each; the last is None without a residual."""
    if residual is not None:
        return pack_outputs(out, ("dx", "dgamma", "dbeta", "dresidual"))
    return *pack_outputs(out, ("dx", "dgamma", "dbeta")), None
