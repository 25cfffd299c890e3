"""Archives of arrays, ``.npz``: written so that every name comes back, and read without trusting what they declare."""

from __future__ import annotations

import errno
import io
import math
import zipfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, BinaryIO

import numpy as np

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those of numpy.savez and numpy.savez_compressed
LONGEST_NAME = 1000  # bytes; a zip file could take 65,535
PIECE = 2**20  # bytes read at a time, so that no second copy of an array is made


class ArchiveError(ValueError):
    """An archive is damaged, is none, or declares more than it may; the message says why, in a few words."""


def check_name(name: str) -> None:
    """Refuse a name that would not come back from an archive, or that unpacking it would take for a path elsewhere.

    Raises
    ------
    TypeError, ValueError
        If the name is not a string; is empty or too long; holds a NUL, a backslash or what UTF-8 cannot say; or has an
        empty part, ``.`` or ``..`` between its slashes.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an array must be a string, got {type(name).__name__}")
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise ValueError(f"the name of an array must be at most {LONGEST_NAME} bytes long, got {shown}: shorten it")
    if (
        {"", ".", ".."} & set(name.split("/"))
        or {"\0", "\\"} & set(name)
        or any("\ud800" <= c <= "\udfff" for c in name)
    ):
        raise ValueError(
            f"the name of an array must be words with single slashes between them, got {shown}: choose another"
        )


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the ``.npz`` of these arrays, uncompressed; unlike `numpy.savez` it takes the name ``file``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return buffer.getvalue()


def read_arrays(file: BinaryIO, limit: int, names: Container[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz``; nothing is allocated before its size has been checked.

    Parameters
    ----------
    file : binary file
        The archive, open for reading and seekable.
    limit : int
        The most bytes that the arrays together may take. That of an uncompressed archive is the size of the file.
    names : container of str, optional
        The arrays to read; by default all. The others are neither counted nor looked at.

    Returns
    -------
    dict of str to numpy.ndarray
        The arrays by name, without ``.npy``; they are writable.

    Raises
    ------
    ArchiveError
        If the file is no archive, is damaged, holds a name twice or what is no plain array, or declares more than
        `limit` bytes.
    OSError
        If the file cannot be read.
    """
    with _opened(file) as archive:
        entries = _entries(archive, names)
        if sum(info.file_size for info in entries.values()) > limit:
            raise ArchiveError(f"its arrays would take more than {limit} bytes")
        return {name: _read(archive, info) for name, info in entries.items()}


def declared_arrays(file: BinaryIO, names: Container[str] | None = None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the shape and the data type that an ``.npz`` declares for each array; none of them is allocated.

    Parameters, keys and errors are those of `read_arrays`; what is declared is as large as what the file holds.
    """
    found = {}
    with _opened(file) as archive:
        for name, info in _entries(archive, names).items():
            with archive.open(info) as entry:
                shape, _, dtype = _read_header(entry, info)
            found[name] = shape, dtype
    return found


@contextmanager
def _opened(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """Open an archive; whatever damage raises inside is an `ArchiveError`."""
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (ArchiveError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # these are of zipfile and of a seek to before the beginning
            raise
        raise ArchiveError("it is damaged or something else") from error
    except Exception as error:  # numpy and zipfile raise a dozen types for damaged bytes
        raise ArchiveError("it is damaged or something else") from error


def _entries(archive: zipfile.ZipFile, names: Container[str] | None) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of these arrays, by name."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = _array_name(info)
        if names is not None and name not in names:
            continue
        if name in entries:
            raise ArchiveError("it holds a name twice")
        entries[name] = info
    return entries


def _array_name(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _read_header(entry: IO[bytes], info: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and data type of an entry's array, which is as large as the entry says."""
    if info.compress_type not in COMPRESSIONS:
        raise ArchiveError("it is compressed in a way that numpy does not write")
    version = np.lib.format.read_magic(entry)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[version](entry)
    if dtype.hasobject:
        raise ArchiveError(f"{_array_name(info)} holds Python objects")
    if math.prod(shape) * dtype.itemsize != info.file_size - entry.tell() or dtype.itemsize == 0:
        raise ArchiveError(f"{_array_name(info)} is not as large as its header says")
    return shape, fortran, dtype


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Return the array of an entry, which yields no more bytes than it declares, and then compares its checksum."""
    with archive.open(info) as entry:
        shape, fortran, dtype = _read_header(entry, info)
        size = math.prod(shape) * dtype.itemsize
        content = bytearray(size)
        with memoryview(content) as view:
            done = 0
            while done < size:
                piece = entry.read(min(PIECE, size - done))
                if not piece:
                    raise ArchiveError("it is truncated")
                view[done : done + len(piece)] = piece
                done += len(piece)
    return np.ndarray(shape, dtype, buffer=content, order="F" if fortran else "C")
