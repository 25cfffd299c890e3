"""Files that are either whole or absent, and the checkpoint format: an ``.npz`` of plain arrays with a digest."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_NAME = "bnkernels checkpoint"
FORMAT_VERSION = 1
META, DIGEST = "meta", "digest"  # the two entries of the archive that are not arrays of the run


class CheckpointError(ValueError):
    """A file is no checkpoint this version can read; the message says why. The file itself is never touched."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file in one step: whoever looks, even after a crash, finds the old content or the new, never a mix.

    Parameters
    ----------
    path : path
        The file to write; its folder must exist.
    content : bytes
        All of the new content.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    path = Path(path)
    # The same name every time: what a kill leaves behind is overwritten by the next write instead of piling up.
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must reach the disk before the next step relies on it
    finally:
        os.close(folder)


def save_checkpoint(path: str | Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint atomically.

    Parameters
    ----------
    path : path
        The file to write or replace; by custom it ends in ``.npz``.
    meta : mapping
        Everything that is not an array; it must survive JSON.
    arrays : mapping of str to numpy.ndarray
        The arrays by name, of any plain dtype (no objects: nothing is pickled). The names ``meta`` and ``digest`` are
        taken.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **meta}
    text = np.array(json.dumps(header, allow_nan=False).encode())
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{META: text, DIGEST: np.array(_digest(text, arrays)), **arrays})
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a checkpoint and verify its digest.

    Parameters
    ----------
    path : path
        A file written by `save_checkpoint`.

    Returns
    -------
    meta : dict
        What was saved, with ``format`` and ``version`` added.
    arrays : dict of str to numpy.ndarray
        The arrays by name.

    Raises
    ------
    OSError
        If there is no such file or it cannot be read.
    CheckpointError
        If the file is truncated or damaged, is something else, or was written by a newer version.
    """
    content = Path(path).read_bytes()
    if content and not content.startswith(b"PK"):
        raise CheckpointError(f"{path} is not a bnkernels checkpoint")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            entries = {key: archive[key] for key in archive.files}
    except Exception as error:  # numpy and zipfile raise a dozen types for damaged bytes
        raise CheckpointError(f"{path} is truncated or damaged") from error
    text, digest = entries.pop(META, None), entries.pop(DIGEST, None)
    meta = _parse(text)
    if meta.get("format") != FORMAT_NAME:
        raise CheckpointError(f"{path} is not a bnkernels checkpoint")
    if meta.get("version", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version (format {meta['version']}, this version reads up to "
            f"{FORMAT_VERSION}): upgrade bnkernels"
        )
    if digest is None or digest.tolist() != _digest(text, entries):
        raise CheckpointError(f"{path} is truncated or damaged")
    return meta, entries


def _parse(text: np.ndarray | None) -> dict[str, Any]:
    """Return the meta data of an archive's meta entry; empty where that is none of ours."""
    if text is None or text.dtype.kind != "S" or text.ndim != 0:
        return {}
    try:
        meta = json.loads(text.item())
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


def _digest(text: np.ndarray, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the SHA-256 of the meta data and of every array's name, type, shape and content, as hexadecimal text."""
    digest = hashlib.sha256(text.item())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest().encode()
