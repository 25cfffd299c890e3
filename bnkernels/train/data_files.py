"""The files of data sets: MNIST's IDX files and ``.npz``, refused before what they say they hold is allocated."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np

from bnkernels.train.archive import ArchiveError, declared_arrays, read_arrays
from bnkernels.train.environment import total_memory

IDX_UINT8_IMAGES, IDX_UINT8_LABELS = 0x0803, 0x0801  # first four bytes: unsigned bytes, three axes or one
# SHA-256 of train-images-idx3-ubyte as it is unpacked: whoever has these files has this data, whatever its folder is.
KNOWN_IMAGES = {
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db": "mnist",
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888": "fashion-mnist",
}
IN_FILE = ("x", "y", "x_test", "y_test")  # names of the arrays in an .npz, and in messages about a file


class DataError(ValueError):
    """The data are missing or unusable; the message says why and what to do."""


def read_mnist(folder: Path, dtype: str) -> list[np.ndarray]:
    """Read MNIST's four IDX files, gzipped or not.

    Parameters
    ----------
    folder : pathlib.Path
        Folder of the files.
    dtype : {"float32", "float64"}
        Type that the pixels will be converted to, for which there must be memory.

    Returns
    -------
    list of numpy.ndarray
        Images and labels of the training set, images and labels of the test set, unsigned bytes.

    Raises
    ------
    DataError
        If the folder or a file is missing, damaged or too large.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"MNIST's folder {folder} {what}: give the folder that holds train-images-idx3-ubyte(.gz)")
    arrays = []
    for part in ("train", "t10k"):
        arrays.append(_read_idx(_find_idx(folder, f"{part}-images", "idx3-ubyte"), IDX_UINT8_IMAGES, dtype))
        arrays.append(_read_idx(_find_idx(folder, f"{part}-labels", "idx1-ubyte"), IDX_UINT8_LABELS, dtype))
    return arrays


def name_of(images: np.ndarray) -> str:
    """Return the name of the data set that training images of IDX files belong to.

    Parameters
    ----------
    images : numpy.ndarray, shape (N, height, width), uint8
        First array that `read_mnist` returned.

    Returns
    -------
    str
        ``"mnist"`` or ``"fashion-mnist"``, by the digest of the file; of other images, the digest's beginning.
    """
    digest = hashlib.sha256(np.array([IDX_UINT8_IMAGES, *images.shape], ">u4").tobytes())
    digest.update(np.ascontiguousarray(images))
    found = digest.hexdigest()
    return KNOWN_IMAGES.get(found, f"images {found[:8]}")


def _find_idx(folder: Path, stem: str, kind: str) -> Path:
    """Return the file of that stem under any of the names it is distributed by."""
    names = [f"{stem}{separator}{kind}{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {names[0]}: MNIST needs its four IDX files there, gzipped or not")


def _read_idx(path: Path, magic: int, dtype: str) -> np.ndarray:
    """Return the array of an IDX file: a big-endian magic number and extents, then the bytes."""
    n_axes = magic & 0xFF
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 * (1 + n_axes))
            found, *shape = np.frombuffer(header, ">u4", count=len(header) // 4).tolist() or [None]
            if found != magic or len(shape) < n_axes:
                expected = f"unsigned bytes with {n_axes} axes: expected magic 0x{magic:08x}"
                raise DataError(f"{path} is not an IDX file of {expected}")
            size = math.prod(shape)
            _require_memory(path, size, size, dtype)
            content = file.read(size + 1)  # no more of what unpacks to more than it says
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}: download it again") from error
    if len(content) != size:
        holds = "more" if len(content) > size else len(content)
        raise DataError(f"{path} holds {holds} values where its header says {tuple(shape)}: download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _require_memory(path: Path, values: int, size: int, dtype: str) -> None:
    """Refuse what memory cannot hold before it is read: bytes as in the file, split; values converted, shuffled."""
    needed, total = 2 * (size + values * np.dtype(dtype).itemsize), total_memory()
    if total is not None and needed > total:
        raise DataError(
            f"{path} says that it holds {values:,} values: training on them takes {needed:,} bytes of memory, more "
            f"than the {total:,} there are; give fewer examples, or download it again if that is not so"
        )


def read_npz(path: Path, dtype: str, needed: tuple[str, ...] = IN_FILE[:2]) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    dtype : {"float32", "float64"}
        The type that the inputs will be converted to, for which there must be memory.
    needed : tuple of str
        Names of arrays that must be there.

    Returns
    -------
    dict of str to numpy.ndarray
        ``x`` and ``y``, and ``x_test`` and ``y_test`` if the file has them.

    Raises
    ------
    DataError
        If the file is missing, damaged or too large, or lacks an array.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"the data file {path} {what}: give an .npz file with {' and '.join(needed)}")
    try:
        with open(path, "rb") as file:
            declared = declared_arrays(file, IN_FILE).values()
            size = sum(math.prod(shape) * of_file.itemsize for shape, of_file in declared)
            _require_memory(path, sum(math.prod(shape) for shape, _ in declared), size, dtype)
            arrays = read_arrays(file, os.fstat(file.fileno()).st_size + size, IN_FILE)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ArchiveError as error:
        raise DataError(f"cannot read {path} as an .npz of plain arrays: {error}: write it with numpy.savez") from error
    missing = [key for key in needed if key not in arrays]
    if missing:
        given = ", ".join(f"{key}=..." for key in needed)
        raise DataError(f"{path} has no {' and no '.join(missing)}: write it with numpy.savez(path, {given})")
    if "y" in needed and ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path} has only one of x_test and y_test: give both or neither")
    return arrays
