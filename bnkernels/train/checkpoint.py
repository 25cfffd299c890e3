"""The checkpoint format: an ``.npz`` of plain arrays with a digest."""

from __future__ import annotations

import hashlib
import json
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bnkernels.train.archive import ArchiveError, check_name, pack_arrays, read_arrays
from bnkernels.train.files import write_atomically

FORMAT_NAME = "bnkernels checkpoint"
FORMAT_VERSION = 1
META, DIGEST = "meta", "digest"  # the two entries of the archive that are not arrays of the run
DTYPES = "dtypes"  # key of the meta data: names of the ml_dtypes types of arrays that are stored as unsigned integers
TAKEN = {"format", "version", DTYPES}


class CheckpointError(ValueError):
    """A file is no checkpoint this version can read; the message says why. The file itself is never touched."""


def save_checkpoint(path: str | Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint atomically, by `write_atomically`.

    Parameters
    ----------
    path : path
        The file to write or replace; by custom it ends in ``.npz``.
    meta : mapping
        Everything that is not an array and that JSON can hold. The keys ``format``, ``version`` and ``dtypes`` are
        taken.
    arrays : mapping of str to numpy.ndarray
        The arrays by name: of numbers, times or text, or of a type of ``ml_dtypes``, such as bfloat16; no Python
        objects, for nothing is pickled, and no masked arrays. A name is made of words with single slashes between
        them; ``meta`` and ``digest`` are taken.

    Raises
    ------
    TypeError, ValueError
        If JSON cannot hold the meta data, or a name or an array would not come back as it is; nothing is written.
    OSError
        If the file cannot be written.
    """
    stored, dtypes = {}, {}
    for name, array in arrays.items():
        check_name(name)
        if name in (META, DIGEST):
            raise ValueError(f"the name {name} is taken by the checkpoint itself: choose another for the array")
        if isinstance(array, np.ma.MaskedArray):
            raise ValueError(f"the array {name} is masked, and its mask would be lost: save its data and its mask")
        stored[name] = np.asarray(array)
        if not _is_plain(stored[name].dtype):
            dtypes[name] = _ml_name(name, stored[name].dtype)
    text = np.array(_header_text(meta, dtypes).encode())
    digest = np.array(_digest(text, stored))
    plain = {name: array.view(f"u{array.itemsize}") if name in dtypes else array for name, array in stored.items()}
    write_atomically(path, pack_arrays({META: text, DIGEST: digest, **plain}))


def _header_text(meta: Mapping[str, Any], dtypes: Mapping[str, str]) -> str:
    """Return the meta data as JSON, with what the format adds."""
    if clash := TAKEN & set(meta):
        raise ValueError(f"{', '.join(sorted(clash))} of the meta data is taken by the format: choose another key")
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **meta} | ({DTYPES: dtypes} if dtypes else {})
    try:
        return json.dumps(header, allow_nan=False)
    except RecursionError:
        raise ValueError("the meta data are nested too deeply for JSON") from None


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a checkpoint and verify its digest. Whatever the file declares, no more is allocated than its own size.

    Parameters
    ----------
    path : path
        A file written by `save_checkpoint`.

    Returns
    -------
    meta : dict
        Meta data as they were saved, with ``format`` and ``version`` added.
    arrays : dict of str to numpy.ndarray
        The arrays by name.

    Raises
    ------
    OSError
        If there is no such file or it cannot be read.
    CheckpointError
        If the file is truncated or damaged, is something else, was written by a newer version, or holds types of
        ``ml_dtypes`` and that is not installed.
    """
    entries = _read_entries(Path(path))
    text, digest = entries.pop(META, None), entries.pop(DIGEST, None)
    meta = _parse(text)
    if meta.get("format") != FORMAT_NAME or type(meta.get("version")) is not int or meta["version"] < 1:
        raise CheckpointError(f"{path} is not a bnkernels checkpoint")
    if meta["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version (format {str(meta['version'])[:20]}, this version reads up to "
            f"{FORMAT_VERSION}): upgrade bnkernels"
        )
    dtypes = meta.pop(DTYPES, {})
    if not isinstance(dtypes, dict) or not dtypes.keys() <= entries.keys():
        raise CheckpointError(f"{path} is truncated or damaged")
    for name, of in dtypes.items():
        dtype = _ml_type(path, of)
        if entries[name].dtype != f"u{dtype.itemsize}":
            raise CheckpointError(f"{path} is truncated or damaged")
        entries[name] = entries[name].view(dtype)
    if digest is None or digest.tolist() != _digest(text, entries):
        raise CheckpointError(f"{path} is truncated or damaged")
    return meta, entries


def _read_entries(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of the file. None is compressed, so together they are smaller than the file."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a pipe would wait for its writer
        raise CheckpointError(f"{path} is a device or a pipe, not a bnkernels checkpoint")
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size and file.read(2) != b"PK"[:size]:
            raise CheckpointError(f"{path} is not a bnkernels checkpoint")
        try:
            return read_arrays(file, size)
        except ArchiveError as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}") from error


def _parse(text: np.ndarray | None) -> dict[str, Any]:
    """Return the meta data of an archive's meta entry; empty where that is none of ours."""
    if text is None or text.dtype.kind != "S" or text.ndim != 0:
        return {}
    try:
        meta = json.loads(text.item(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _is_plain(dtype: np.dtype) -> bool:
    """Whether an ``.npy`` file says the type as it is, without pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that objects would be pickled, which nothing here does
        try:
            description = np.lib.format.dtype_to_descr(dtype)
            return not dtype.hasobject and np.lib.format.descr_to_dtype(description) == dtype
        except TypeError:  # "<f1", as what float8 describes itself
            return False


def _ml_name(name: str, dtype: np.dtype) -> str:
    """Return by what name ``ml_dtypes`` has the type of an array."""
    if dtype.type.__module__.partition(".")[0] != "ml_dtypes":
        raise ValueError(
            f"the array {name} is of the type {dtype}, which cannot be saved: objects are not; convert it to numbers"
        )
    return dtype.type.__name__


def _ml_type(path: str | Path, name: Any) -> np.dtype:
    """Return a type of ``ml_dtypes`` by its name."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise CheckpointError(f"{path} holds numbers of other types than NumPy's: pip install ml_dtypes") from error
    found = getattr(ml_dtypes, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, np.generic)):
        raise CheckpointError(f"{path} holds numbers of a type that the installed ml_dtypes lacks: upgrade it")
    return np.dtype(found)


def _digest(text: np.ndarray, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the SHA-256 of the meta data and of every array's name, type, shape and content, as hexadecimal text."""
    digest = hashlib.sha256(text.item())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}\0{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest().encode()
