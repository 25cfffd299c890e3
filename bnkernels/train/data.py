"""The data sets the trainer reads: scikit-learn's digits, MNIST in its IDX files, and any ``.npz`` with x and y."""

from __future__ import annotations

import gzip
import hashlib
import operator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bnkernels.train.data_files import IN_FILE, DataError, name_of, read_mnist, read_npz

DATASETS = ("digits", "mnist", "npz")
FIELDS = ("x_train", "y_train", "x_test", "y_test")  # IN_FILE, as arguments


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, split into training and test examples.

    Attributes
    ----------
    name : str
        ``"digits"`` or ``"npz"``; of IDX files the name that `name_of` finds, ``"mnist"`` or ``"fashion-mnist"``.
    x_train, x_test : numpy.ndarray, shape (N, features), float32 or float64
        The inputs, one row per example. Any real numbers may be given, of any layout and byte order, and with more
        axes: they are kept in C order, one row per example, as float64 if `x_train` is, else as float32.
    y_train, y_test : numpy.ndarray, shape (N,), int32
        The labels, 0 to `n_classes` - 1. Integers of any type may be given.
    n_classes : int
        The number of classes.
    classes : tuple of str
        Names of the classes, sorted; empty where they are numbers.

    Raises
    ------
    DataError
        If an array is none of those, the arrays do not belong together, or an input is not finite.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    n_classes: int
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the arrays, and keep them as everything else takes them for granted."""
        try:
            n_classes = operator.index(self.n_classes)
        except TypeError:
            raise DataError(f"n_classes must be an integer, got {type(self.n_classes).__name__}") from None
        if self.classes and (len(self.classes) != n_classes or list(self.classes) != sorted(set(self.classes))):
            raise DataError(f"classes must be {n_classes} sorted names, or (), got {str(self.classes)[:60]}")
        double = isinstance(self.x_train, np.ndarray) and self.x_train.dtype.type is np.float64  # in either byte order
        dtype = "float64" if double else "float32"
        parts = _checked("the data set", FIELDS, tuple(getattr(self, name) for name in FIELDS), dtype, n_classes)
        for name, value in (*zip(FIELDS, parts, strict=True), ("n_classes", n_classes)):
            object.__setattr__(self, name, value)

    def astype(self, dtype: str) -> Dataset:
        """Return the data set with inputs of this type: itself where they are."""
        if self.x_train.dtype == dtype:
            return self
        x_train, _, x_test, _ = _checked(
            "the data set", FIELDS, tuple(getattr(self, name) for name in FIELDS), dtype, self.n_classes
        )
        return replace(self, x_train=x_train, x_test=x_test)

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
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()


def load_dataset(name: str = "digits", path: str | Path | None = None, dtype: str = "float32") -> Dataset:
    """Load a data set and check everything that training relies on.

    Parameters
    ----------
    name : {"digits", "mnist", "npz"}
        ``digits``: scikit-learn's 1,797 images of 8 x 8 pixels. ``mnist``: a folder with MNIST's four IDX files, or
        Fashion-MNIST's, gzipped or not. ``npz``: a file with ``x`` (N, ...) and ``y`` (N,), and optionally ``x_test``
        and ``y_test``; labels are 0 to K - 1, or text.
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
    Without a test set, a fifth of the examples, chosen by a fixed permutation, is held out: 1,437 of the digits
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


def load_examples(
    name: str, path: str | Path, dtype: str, n_classes: int, trained_on: str, classes: tuple[str, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Load the examples of other data that a trained network is to be evaluated on.

    Parameters
    ----------
    name, path, dtype
        Arguments of `load_dataset`.
    n_classes : int
        Number of classes that the network tells apart; not every one of them has to occur.
    trained_on : str
        Digest of the data that the network was trained on.
    classes : tuple of str
        Names of the classes; empty where they are numbers.

    Returns
    -------
    x : numpy.ndarray, shape (N, features)
        The inputs: the test set, where the data have one. Else every example; but of the very data that the network
        was trained on only those that were held out.
    y : numpy.ndarray, shape (N,), int32
        The labels.

    Raises
    ------
    DataError
        As `load_dataset`; and if a label is none of the network's.
    """
    if name != "npz":
        data = load_dataset(name, path, dtype)
        return data.x_test, data.y_test
    path = Path(path)
    arrays = _numbered(path, read_npz(path, dtype), classes)
    if "x_test" in arrays:
        x, y = arrays["x_test"], arrays["y_test"]
        return _checked(str(path), IN_FILE[2:], (x, y), dtype, n_classes)
    x, y = _checked(str(path), IN_FILE[:2], (arrays["x"], arrays["y"]), dtype, n_classes)
    if len(x) > 1:
        data = Dataset(name, *_split(x, y), n_classes, classes)
        if data.digest == trained_on:
            return data.x_test, data.y_test
    return x, y


def load_inputs(path: str | Path, dtype: str) -> np.ndarray:
    """Load new data, which need no labels.

    Parameters
    ----------
    path : path
        An ``.npz`` file with `x`, (N, features) or (N, ...).
    dtype : {"float32", "float64"}
        Data type of what is returned.

    Returns
    -------
    numpy.ndarray, shape (N, features)
        Inputs, as they are.

    Raises
    ------
    DataError
        If the file is missing, damaged, too large or without `x`, or an input is not a finite number.
    """
    x = _plain(path, "x", read_npz(Path(path), dtype, needed=("x",))["x"])
    _check_inputs(path, "x", x)
    return _converted(path, "x", x, dtype)


def _digits(dtype: str) -> Dataset:
    """Return scikit-learn's bundled digits, pixels 0 to 16 scaled to 0 to 1."""
    found = find_spec("sklearn")
    if found is None:
        raise DataError("the digits need scikit-learn: pip install 'bnkernels[train]'")
    # Read from its file: loading scikit-learn for that takes more than a second.
    with gzip.open(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",")
    x, y = table[:, :-1], table[:, -1].astype(np.int64)
    return Dataset("digits", *_checked("digits", IN_FILE, _split(x / 16, y), dtype, 10), 10)


def _mnist(folder: Path, dtype: str) -> Dataset:
    """Return MNIST from its four IDX files, pixels 0 to 255 scaled to 0 to 1."""
    images, labels, test_images, test_labels = read_mnist(folder, dtype)
    pixels = (np.divide(array, 255, dtype=dtype) for array in (images, test_images))
    parts = (next(pixels), labels, next(pixels), test_labels)
    return Dataset(name_of(images), *_checked(str(folder), IN_FILE, parts, dtype, 10), 10)


def _npz(path: Path, dtype: str) -> Dataset:
    """Return the data set of an ``.npz`` file; it may bring its own test set."""
    arrays, classes = read_npz(path, dtype), ()
    if arrays["y"].dtype.kind == "U":
        classes = tuple(np.unique(arrays["y"]).tolist())
        arrays = _numbered(path, arrays, classes)
    _check_pair(path, "x", arrays["x"], "y", arrays["y"])
    n_classes = _count_classes(path, arrays["y"])
    parts = tuple(arrays[key] for key in IN_FILE) if "x_test" in arrays else _split(arrays["x"], arrays["y"])
    return Dataset("npz", *_checked(str(path), IN_FILE, parts, dtype, n_classes), n_classes, classes)


def _numbered(source: Any, arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the arrays of a file, labels that are text as numbers of these classes."""
    known, numbered = np.array(classes, str), dict(arrays)
    for name in IN_FILE[1::2]:
        labels = arrays.get(name)
        if labels is None or labels.dtype.kind != "U" or not classes:
            continue
        strange = labels[~np.isin(labels, known)]
        if strange.size:
            raise DataError(
                f"{source}: {name} has the label {str(strange.flat[0])[:60]!r}, which is none of the {len(classes)} "
                "classes of the training set: remove those rows"
            )
        numbered[name] = np.searchsorted(known, labels)
    return numbered


def _plain(source: Any, name: str, array: Any) -> np.ndarray:
    """Return an array without what a subclass adds to it; refuse what is none, or says that values are missing."""
    if not isinstance(array, np.ndarray):
        raise DataError(f"{source}: {name} must be a NumPy array, got {type(array).__name__}: convert it")
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise DataError(f"{source}: {name} has masked values: fill them in, or remove those rows")
    return np.asarray(array)


def _check_inputs(source: Any, x_name: str, x: np.ndarray) -> None:
    """Refuse inputs that are no rows of real numbers."""
    if x.ndim < 2 or x.size == 0:
        raise DataError(f"{source}: {x_name} must be (N, features) with N and features at least 1, got shape {x.shape}")
    if x.dtype.names:
        plain = "numpy.lib.recfunctions.structured_to_unstructured"
        raise DataError(f"{source}: {x_name} must be real numbers, got a structured array: convert it with {plain}")
    if x.dtype.kind not in "fiub":
        raise DataError(f"{source}: {x_name} must be real numbers, got {x.dtype}: convert it with astype(float)")


def _converted(source: Any, name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    """Return inputs as rows of features of a data type, all finite."""
    with np.errstate(over="ignore"):  # an overflow shows as inf, which is reported below
        x = np.ascontiguousarray(x.reshape(len(x), -1), dtype)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise DataError(f"{source}: {name} has NaN or infinity in {bad.size} rows as {dtype}: remove those rows")
    return x


def _check_pair(source: Any, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> None:
    """Refuse inputs and labels that do not belong together."""
    _check_inputs(source, x_name, x)
    if y.shape != x.shape[:1]:
        one_hot = "; of one-hot labels take argmax(axis=1)" if y.ndim == 2 else ""
        raise DataError(
            f"{source}: {y_name} must have one label per row of {x_name}, shape {x.shape[:1]}, got {y.shape}{one_hot}"
        )
    if y.dtype.kind not in "iu":
        ways = {"b": "astype(int)", "f": "astype(int)", "S": "astype(str)"}
        way = ways.get(y.dtype.kind, "numpy.unique(y, return_inverse=True)[1]")
        got = "a structured array" if y.dtype.names else y.dtype
        raise DataError(f"{source}: {y_name} must be integers or text, got {got}: convert it with {way}")


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


def _checked(
    source: str, names: tuple[str, ...], parts: tuple[Any, ...], dtype: str, n_classes: int
) -> tuple[np.ndarray, ...]:
    """Return inputs and labels, of one set of examples or of two, in their final types once they pass every check."""
    arrays = {name: _plain(source, name, part) for name, part in zip(names, parts, strict=True)}
    pairs = list(zip(names[::2], names[1::2], strict=True))
    for x_name, y_name in pairs:
        x, y = arrays[x_name], arrays[y_name]
        _check_pair(source, x_name, x, y_name, y)
        rows = arrays[names[0]].shape[1:]
        if x.shape[1:] != rows:
            raise DataError(f"{source}: {x_name} must have rows of shape {rows} like {names[0]}, got {x.shape[1:]}")
        if y.min() < 0 or y.max() >= n_classes:
            raise DataError(
                f"{source}: {y_name} must lie in 0 to {n_classes - 1}, got {y.min()} to {y.max()}: remove those rows"
            )
    for x_name, y_name in pairs:
        arrays[x_name] = _converted(source, x_name, arrays[x_name], dtype)
        arrays[y_name] = np.ascontiguousarray(arrays[y_name], np.int32)
    return tuple(arrays.values())
