"""The files of data sets: every name and form they come in, and what is refused, before much of it is read."""

import gzip
import io
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from bnkernels.train.data import DataError, load_dataset


def write_idx(path, array, compress=False):
    """Write an IDX file of unsigned bytes."""
    content = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def write_mnist(folder, separator="-", compress=False):
    """Write a tiny MNIST: 30 and 10 images of 3 x 4 pixels."""
    rng = np.random.default_rng(0)
    suffix = ".gz" if compress else ""
    for part, count in (("train", 30), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 3, 4)), np.arange(count) % 10
        write_idx(folder / f"{part}-images{separator}idx3-ubyte{suffix}", images, compress)
        write_idx(folder / f"{part}-labels{separator}idx1-ubyte{suffix}", labels, compress)
    return np.random.default_rng(0).integers(0, 256, (30, 3, 4))


def write_npz(path, **changes):
    """Write a valid .npz of 50 examples and 3 classes, with changes; None leaves an entry out."""
    entries = {"x": np.random.default_rng(0).standard_normal((50, 2, 3)), "y": np.arange(50) % 3} | changes
    np.savez(path, **{name: array for name, array in entries.items() if array is not None})
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_mnist_under_the_names_it_is_distributed_by(tmp_path, separator, compress):
    images = write_mnist(tmp_path, separator, compress)
    data = load_dataset("mnist", tmp_path, "float64")
    assert data.x_test.shape == (10, 12)
    assert data.n_classes == 10
    assert np.array_equal(data.x_train, images.reshape(30, 12) / 255)
    assert np.array_equal(data.y_train, np.arange(30) % 10)


def break_mnist(folder, how):
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    if how == "missing":
        images.unlink()
    elif how == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
    elif how == "empty":
        images.write_bytes(b"")
    elif how == "other file":
        images.write_bytes(labels.read_bytes())
    elif how == "huge header":
        images.write_bytes(np.array([0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1], ">u4").tobytes())
    elif how == "memory bomb":
        content = np.array([0x0803, 2**14, 2**10, 2**10], ">u4").tobytes() + bytes(2**20)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        images.unlink()
    elif how == "more than it says":
        (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images.read_bytes() + bytes(2**27)))
        images.unlink()
    elif how == "end of gzip missing":
        (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images.read_bytes())[:-4])
        images.unlink()
    elif how == "part of a header":
        images.write_bytes(images.read_bytes()[:9])
    elif how == "folder":
        images.unlink()
        images.mkdir()
    elif how == "broken gzip":
        images.rename(folder / "train-images-idx3-ubyte.gz")
    elif how == "label 10":
        write_idx(labels, np.full(30, 10))
    elif how == "too few labels":
        write_idx(labels, np.zeros(29))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "has no train-images-idx3-ubyte"),
        ("truncated", "holds 359 values where its header says"),
        ("empty", "is not an IDX file"),
        ("other file", "is not an IDX file of unsigned bytes with 3 axes"),
        ("huge header", "takes 792,.*bytes of memory, more than the 1,073,741,824 there are"),
        ("memory bomb", "says that it holds 17,179,869,184 values"),
        ("more than it says", "holds more values where its header says"),
        ("end of gzip missing", "cannot read .*gz: .*: download it again"),
        ("part of a header", "is not an IDX file of unsigned bytes with 3 axes"),
        ("folder", "has no train-images-idx3-ubyte"),
        ("broken gzip", "cannot read .*gz"),
        ("label 10", "y must lie in 0 to 9, got 10 to 10"),
        ("too few labels", "one label per row"),
    ],
)
def test_a_damaged_mnist_says_what_is_wrong(tmp_path, monkeypatch, how, message):
    """And no more is read of it than it says that it holds."""
    monkeypatch.setattr("bnkernels.train.data_files.total_memory", lambda: 2**30)
    write_mnist(tmp_path)
    break_mnist(tmp_path, how)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as error:
            load_dataset("mnist", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_a_folder_of_mnist_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"MNIST's folder .*file is a file: give the folder"):
        load_dataset("mnist", tmp_path / "file")


BAD_NPZ = [
    ({"x": None}, "has no x"),
    ({"y": None}, "has no y"),
    ({"x": np.zeros(50)}, r"x must be \(N, features\)"),
    ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "N and features at least 1"),
    ({"x": np.zeros((50, 0))}, "N and features at least 1"),
    ({"x": np.full((50, 3), "a")}, "real numbers"),
    ({"x": np.full((50, 3), 1j)}, "real numbers"),
    ({"x": np.full((50, 3), None, object)}, "x holds Python objects"),
    ({"y": np.array(["cat", "dog"] * 25, object)}, "y holds Python objects"),
    ({"x": np.zeros((50, 3), [("a", "f4"), ("b", "f4")])}, "got a structured array: .*structured_to_unstructured"),
    ({"x": np.zeros((50, 3), "M8[s]")}, "real numbers"),
    ({"y": np.zeros(50, "M8[s]")}, r"got datetime64.*: convert it with numpy.unique\(y, return_inverse=True"),
    ({"y": np.array(["cat"] * 50)}, "K at least 2"),
    ({"y": np.array(["cat", "dog"] * 20)}, "one label per row"),
    ({"y": np.array([b"cat", b"dog"] * 25)}, r"must be integers or text, got \|S3: convert it with astype\(str\)"),
    ({"y": np.arange(50) % 2 == 0}, r"must be integers or text, got bool: convert it with astype\(int\)"),
    ({"y": np.arange(50) % 3 + 0.0}, r"must be integers or text, got float64: convert it with astype\(int\)"),
    ({"y": np.eye(3)[np.arange(50) % 3]}, r"one label per row .*of one-hot labels take argmax\(axis=1\)"),
    ({"y": np.arange(50, dtype="u8") % 3 + 2**63}, "every label from 0 to K - 1"),
    ({"x": np.full((50, 3), np.nan)}, "NaN or infinity in 40 rows"),
    ({"x": np.full((50, 3), np.inf)}, "NaN or infinity"),
    ({"x": np.full((50, 3), 1e300)}, "NaN or infinity in 40 rows as float32"),
    ({"y": np.arange(50) % 3 + 0.5}, "must be integers"),
    ({"y": np.arange(49) % 3}, "one label per row"),
    ({"y": np.arange(50).reshape(50, 1) % 3}, "one label per row"),
    ({"y": np.arange(50) % 3 - 1}, "every label from 0 to K - 1"),
    ({"y": np.arange(50) % 3 * 2}, "every label from 0 to K - 1"),
    ({"y": np.zeros(50, int)}, "K at least 2"),
    ({"x_test": np.zeros((4, 2, 3))}, "only one of x_test and y_test"),
    ({"x_test": np.zeros((4, 5)), "y_test": np.zeros(4, int)}, "rows of shape"),
    ({"x_test": np.zeros((4, 2, 3)), "y_test": np.full(4, 3)}, "y_test must lie in 0 to 2"),
    ({"x_test": np.zeros((0, 2, 3)), "y_test": np.zeros(0, int)}, "x_test must be"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_NPZ, ids=[message for _, message in BAD_NPZ])
def test_a_bad_npz_says_what_is_wrong(tmp_path, changes, message):
    path = tmp_path / "data.npz"
    write_npz(path, **changes)
    with pytest.raises(DataError, match=message) as error:
        load_dataset("npz", path)
    assert "\n" not in str(error.value)


def npy(header, content=b""):
    """Return the bytes of an array's file whose header is this text."""
    return b"\x93NUMPY\x01\x00" + np.array(len(header), "<u2").tobytes() + header.encode() + content


def zipped(**entries):
    """Return an .npz whose arrays are these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def of_zeros(shape):
    """Return the header of an array of bytes, all zero."""
    return npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n")


NO_NPZ = {
    "empty": b"",
    "cut off": b"PK\x03\x04 cut off",
    "text": b"x,y\n1,2\n",
    "pickle": b"\x80\x04\x95 a pickle",
    "npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2)}\n", bytes(4)),
    "truncated": zipped(x=of_zeros((2**20, 8)) + bytes(2**23), y=of_zeros((2**20,)) + bytes(2**20))[:-30],
    "no array": zipped(x=b"nothing", y=b""),
    "header too long": zipped(x=npy(" " * 20000), y=b""),
    "version 9": zipped(x=b"\x93NUMPY\x09\x00", y=b""),
}


@pytest.mark.parametrize("content", NO_NPZ.values(), ids=NO_NPZ)
def test_a_file_that_is_no_npz_is_refused_without_numpys_advice(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .* as an .npz of plain arrays: it is damaged or") as error:
        load_dataset("npz", path)
    assert not re.search("allow_pickle|unsafe|max_header_size|\n", str(error.value))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": of_zeros((2**40, 2)), "y": of_zeros((2**40,))}, "x is not as large as its header says"),
        ({"x": of_zeros((10**3000, 2)), "y": of_zeros((2,))}, "x is not as large as its header says"),
        (
            {"x": of_zeros((2**20, 32)) + bytes(2**25), "y": of_zeros((2**20,)) + bytes(2**20)},
            "takes 346,030,080 bytes",
        ),
    ],
    ids=["lying header", "number of 3000 digits", "memory bomb"],
)
def test_what_an_npz_says_of_its_size_is_checked_before_it_is_read(tmp_path, monkeypatch, entries, message):
    monkeypatch.setattr("bnkernels.train.data_files.total_memory", lambda: 2**28)
    path = tmp_path / "data.npz"
    path.write_bytes(zipped(**entries))
    assert path.stat().st_size < 2**16
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as error:
            load_dataset("npz", path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 400


def test_a_folder_in_place_of_an_npz_is_told(tmp_path):
    with pytest.raises(DataError, match=r"is a folder: give an .npz file with x and y"):
        load_dataset("npz", tmp_path)


@pytest.mark.parametrize("name", ["npz", "mnist"])
def test_a_missing_path_is_named(tmp_path, name):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_dataset(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs --data"):
        load_dataset(name)
