"""States of layers in files: safetensors, which other frameworks read too, and NumPy's npz."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bnkernels.nn.state import plain
from bnkernels.runtime import checks as check

SUFFIXES = (".safetensors", ".npz")


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state to a file, whole or not at all.

    Parameters
    ----------
    path : path
        File, whose name ends in .safetensors or .npz. One that exists is replaced.
    state : mapping of str to array, or layer
        State by name, or a layer or an MLP, whose `state_dict` is taken.

    Raises
    ------
    ImportError
        If the name ends in .safetensors and that package is missing.
    TypeError
        If there is no such state, or an .npz cannot hold a data type.
    ValueError
        If the name ends otherwise.

    See Also
    --------
    load : The way back.

    Examples
    --------
    >>> import tempfile
    >>> from bnkernels.nn import BatchNorm
    >>> layer, other = BatchNorm(3), BatchNorm(3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/norm.npz", layer)
    ...     other.load_state_dict(load(f"{folder}/norm.npz"))
    """
    path = _checked(path)
    given = state.state_dict() if hasattr(state, "state_dict") else state
    if not isinstance(given, Mapping):
        raise TypeError(f"state must be a dict of arrays by name, or a layer, got {check.shown(state)}")
    arrays = {str(name): np.array(plain(str(name), array), order="C") for name, array in given.items()}
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        if path.suffix == ".npz":
            for name, array in arrays.items():
                if array.dtype.kind not in "biufc":
                    raise TypeError(f"{name} is {array.dtype}, which an .npz does not name; save it as .safetensors")
            np.savez(unfinished, **arrays)
        else:
            _safetensors().save_file(arrays, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a state from a file.

    Parameters
    ----------
    path : path
        File, whose name ends in .safetensors or .npz.

    Returns
    -------
    dict of str to numpy.ndarray
        State by name, for `load_state_dict`.

    Raises
    ------
    ImportError
        If the name ends in .safetensors and that package is missing.
    OSError
        If the file cannot be read.
    ValueError
        If the name ends otherwise, or the file is no such file.

    See Also
    --------
    save : The way there.
    """
    path = _checked(path)
    if path.suffix == ".safetensors":
        return _safetensors().load_file(path)
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise ValueError(f"{path} is no .npz of several arrays; it holds one without a name")
    with file:
        return {name: file[name] for name in file.files}


def _checked(path: str | os.PathLike[str]) -> Path:
    """Return a path whose name says the format."""
    found = Path(path)
    if found.suffix not in SUFFIXES:
        raise ValueError(f"the name of the file must end in {' or '.join(SUFFIXES)}, got {found.name!r}")
    return found


def _safetensors() -> ModuleType:
    """Return the module that reads and writes safetensors."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"safetensors cannot be imported ({error}); install bnkernels[safetensors], or save as .npz"
        ) from None
    return safetensors.numpy
