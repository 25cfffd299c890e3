"""The data sets the trainer reads: scikit-learn's digits, MNIST in its IDX files, and any ``.npz`` with x and y."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

DATASETS = ("digits", "mnist", "npz")
IDX_UINT8_IMAGES, IDX_UINT8_LABELS = 0x0803, 0x0801  # first four bytes: unsigned bytes, three axes or one


class DataError(ValueError):
    """The data are missing or unusable; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, split into training and test examples.

    Attributes
    ----------
    name : str
        ``"digits"``, ``"mnist"`` or ``"npz"``.
    x_train, x_test : numpy.ndarray, shape (N, features), float32 or float64
        The inputs, one row per example.
    y_train, y_test : numpy.ndarray, shape (N,), int32
        The labels, 0 to `n_classes` - 1.
    n_classes : int
        The number of classes.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    n_classes: int

    @property
    def n_features(self) -> int:
        """Number of inputs of one example."""
        return self.x_train.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, by which a resumed run knows its data again."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.data if array.size else b"")
        return digest.hexdigest()


def load_dataset(name: str = "digits", path: str | Path | None = None, dtype: str = "float32") -> Dataset:
    """Load a data set and check everything that training relies on.

    Parameters
    ----------
    name : {"digits", "mnist", "npz"}
        ``digits``: scikit-learn's 1,797 images of 8 x 8 pixels. ``mnist``: a folder with MNIST's four IDX files,
        gzipped or not. ``npz``: a file with ``x`` (N, ...) and ``y`` (N,), and optionally ``x_test`` and ``y_test``.
    path : path, optional
        The folder of ``mnist`` or the file of ``npz``; ``digits`` takes none.
    dtype : {"float32", "float64"}
        The type of the inputs.

    Returns
    -------
    Dataset
        Inputs flattened to one row per example. Pixels are divided by their largest value (16 for digits, 255 for
        MNIST); the inputs of an ``.npz`` are taken as they are.

    Raises
    ------
    DataError
        If the files are missing, damaged, empty or of the wrong shape, the labels are not 0 to K - 1, or an input is
        not finite in `dtype`.

    Notes
    -----
    Where there is no test set, a fifth of the examples, chosen by a fixed permutation, is held out: 1,437 of the digits
    train and 360 test, the same ones whatever the seed of a run.
    """
    if name not in DATASETS:
        raise DataError(f"the data set must be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        if path is not None:
            raise DataError(
                f"the digits come with scikit-learn and take no path, got {path}: choose mnist or npz, or drop it"
            )
        return _digits(dtype)
    if path is None:
        wanted = "the folder of its IDX files" if name == "mnist" else "an .npz file with x and y"
        raise DataError(f"the data set {name} needs --data: {wanted}")
    return _mnist(Path(path), dtype) if name == "mnist" else _npz(Path(path), dtype)


def _digits(dtype: str) -> Dataset:
    """Return scikit-learn's bundled digits, pixels 0 to 16 scaled to 0 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need scikit-learn: pip install 'bnkernels[train]'") from error
    x, y = load_digits(return_X_y=True)
    return _checked("digits", "digits", _split(x / 16, y), dtype, n_classes=10)


def _mnist(folder: Path, dtype: str) -> Dataset:
    """Return MNIST from its four IDX files, pixels 0 to 255 scaled to 0 to 1."""
    if not folder.is_dir():
        raise DataError(
            f"MNIST's folder {folder} does not exist: give the folder that holds train-images-idx3-ubyte(.gz)"
        )
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(_find_idx(folder, f"{part}-images", "idx3-ubyte"), IDX_UINT8_IMAGES)
        arrays.append(np.divide(images, 255, dtype=dtype))
        arrays.append(_read_idx(_find_idx(folder, f"{part}-labels", "idx1-ubyte"), IDX_UINT8_LABELS))
    return _checked("mnist", str(folder), tuple(arrays), dtype, n_classes=10)


def _find_idx(folder: Path, stem: str, kind: str) -> Path:
    """Return the file of that stem under any of the names it is distributed by."""
    names = [f"{stem}{separator}{kind}{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {names[0]}: MNIST needs its four IDX files there, gzipped or not")


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the array of an IDX file: a big-endian magic number and extents, then the bytes."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}: download it again") from error
    n_axes = magic & 0xFF
    header = np.frombuffer(content, ">u4", count=min(1 + n_axes, len(content) // 4))
    if header.size < 1 + n_axes or header[0] != magic:
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {n_axes} axes: expected magic 0x{magic:08x}")
    shape = tuple(int(extent) for extent in header[1:])
    values = np.frombuffer(content, np.uint8, offset=4 * header.size)
    if values.size != np.prod(shape, dtype=object):  # exact: a damaged header may ask for more than 2^63
        raise DataError(f"{path} holds {values.size} values where its header says {shape}: download it again")
    return values.reshape(shape)


def _npz(path: Path, dtype: str) -> Dataset:
    """Return the data set of an ``.npz`` file; it may bring its own test set."""
    if not path.is_file():
        raise DataError(f"the data file {path} does not exist: give an .npz file with x and y")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("x", "y", "x_test", "y_test") if key in archive}
    except Exception as error:  # numpy and zipfile raise a dozen types for damaged bytes
        raise DataError(f"cannot read {path} as an .npz of plain arrays: {error}: write it with numpy.savez") from error
    missing = [key for key in ("x", "y") if key not in arrays]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(missing)}: write it with numpy.savez(path, x=..., y=...)")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path} has only one of x_test and y_test: give both or neither")
    _check_pair(path, "x", arrays["x"], "y", arrays["y"])
    if "x_test" not in arrays:
        return _checked("npz", str(path), _split(arrays["x"], arrays["y"]), dtype, _count_classes(path, arrays["y"]))
    parts = (arrays["x"], arrays["y"], arrays["x_test"], arrays["y_test"])
    return _checked("npz", str(path), parts, dtype, _count_classes(path, arrays["y"]))


def _check_pair(source: Any, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> None:
    """Refuse inputs and labels that do not belong together."""
    if x.ndim < 2 or x.size == 0:
        raise DataError(f"{source}: {x_name} must be (N, features) with N and features at least 1, got shape {x.shape}")
    if x.dtype.kind not in "fiub":
        raise DataError(f"{source}: {x_name} must be real numbers, got {x.dtype}: convert it with astype(float)")
    if y.dtype.kind not in "iu":
        raise DataError(f"{source}: {y_name} must be integers, got {y.dtype}: convert it with astype(int)")
    if y.shape != x.shape[:1]:
        raise DataError(
            f"{source}: {y_name} must have one label per row of {x_name}, shape {x.shape[:1]}, got {y.shape}"
        )


def _count_classes(source: Any, y: np.ndarray) -> int:
    """Return the number of distinct labels, which must be exactly 0 to K - 1."""
    labels = np.unique(y)
    if labels.size < 2 or labels[0] != 0 or labels[-1] != labels.size - 1:
        raise DataError(
            f"{source}: y must hold every label from 0 to K - 1 with K at least 2, got {labels.size} distinct labels "
            f"from {labels[0]} to {labels[-1]}: renumber them with numpy.unique(y, return_inverse=True)[1]"
        )
    return int(labels.size)


def _split(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hold out a fifth of the examples for the test, always the same ones."""
    n_train = len(x) * 4 // 5
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:n_train], order[n_train:]
    return x[train], y[train], x[test], y[test]


def _checked(name: str, source: str, parts: tuple[np.ndarray, ...], dtype: str, n_classes: int) -> Dataset:
    """Return the data set in its final types once both halves pass every check."""
    x_train, y_train, x_test, y_test = parts
    _check_pair(source, "x", x_train, "y", y_train)
    _check_pair(source, "x_test", x_test, "y_test", y_test)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(f"{source}: x_test must have rows of shape {x_train.shape[1:]} like x, got {x_test.shape[1:]}")
    for key, y in (("y", y_train), ("y_test", y_test)):
        if y.min() < 0 or y.max() >= n_classes:
            raise DataError(
                f"{source}: {key} must lie in 0 to {n_classes - 1}, got {y.min()} to {y.max()}: remove those rows"
            )
    with np.errstate(over="ignore"):  # an overflow shows as inf, which is reported below
        x_train, x_test = (np.ascontiguousarray(x.reshape(len(x), -1), dtype) for x in (x_train, x_test))
    for key, x in (("x", x_train), ("x_test", x_test)):
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if bad.size:
            raise DataError(f"{source}: {key} has NaN or infinity in {bad.size} rows as {dtype}: remove those rows")
    return Dataset(name, x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32), n_classes)
