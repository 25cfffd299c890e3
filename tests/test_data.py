"""The data sets: what is loaded, how it is split, and what is refused."""

import gzip

import numpy as np
import pytest

from bnkernels.data import DataError, load_dataset


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


def test_digits_are_scaled_and_split_the_same_way_every_time():
    data, again = load_dataset(), load_dataset()
    assert data.x_train.shape == (1437, 64)
    assert data.x_test.shape == (360, 64)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert set(data.y_test) == set(range(10))
    assert data.digest == again.digest


def test_digits_of_training_and_test_are_all_digits_once():
    from sklearn.datasets import load_digits

    data = load_dataset(dtype="float64")
    rows = np.vstack([data.x_train, data.x_test])
    assert np.array_equal(np.sort(rows.ravel()), np.sort(load_digits().data.ravel() / 16))
    assert not {row.tobytes() for row in data.x_train} & {row.tobytes() for row in data.x_test}


def test_digits_take_no_path():
    with pytest.raises(DataError, match="take no path"):
        load_dataset("digits", "somewhere")


def test_without_scikit_learn_the_digits_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'bnkernels\[train\]'"):
        load_dataset()


def test_an_unknown_data_set_is_named():
    with pytest.raises(DataError, match="'cifar'"):
        load_dataset("cifar")


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
        ("huge header", "holds 0 values"),
        ("broken gzip", "cannot read .*gz"),
        ("label 10", "y must lie in 0 to 9, got 10 to 10"),
        ("too few labels", "one label per row"),
    ],
)
def test_a_damaged_mnist_says_what_is_wrong(tmp_path, how, message):
    write_mnist(tmp_path)
    break_mnist(tmp_path, how)
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", tmp_path)


def test_npz_without_a_test_set_holds_out_a_fifth(tmp_path):
    data = load_dataset("npz", write_npz(tmp_path / "data.npz"))
    assert data.x_train.shape == (40, 6)
    assert data.x_test.shape == (10, 6)
    assert data.n_classes == 3


def test_npz_with_a_test_set_keeps_it(tmp_path):
    x_test = np.arange(24).reshape(4, 2, 3)
    data = load_dataset("npz", write_npz(tmp_path / "data.npz", x_test=x_test, y_test=np.array([0, 1, 2, 0])))
    assert data.x_train.shape == (50, 6)
    assert np.array_equal(data.x_test, x_test.reshape(4, 6))


def test_the_digest_tells_data_apart(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 2, 3))
    digest = load_dataset("npz", write_npz(tmp_path / "a.npz", x=x)).digest
    x[17, 1, 2] += 1e-3
    assert load_dataset("npz", write_npz(tmp_path / "b.npz", x=x)).digest != digest


BAD_NPZ = [
    ({"x": None}, "has no x"),
    ({"y": None}, "has no y"),
    ({"x": np.zeros(50)}, r"x must be \(N, features\)"),
    ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "N and features at least 1"),
    ({"x": np.zeros((50, 0))}, "N and features at least 1"),
    ({"x": np.full((50, 3), "a")}, "real numbers"),
    ({"x": np.full((50, 3), 1j)}, "real numbers"),
    ({"x": np.full((50, 3), None, object)}, "plain arrays"),
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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"x,y\n1,2\n"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        load_dataset("npz", path)


@pytest.mark.parametrize("name", ["npz", "mnist"])
def test_a_missing_path_is_named(tmp_path, name):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_dataset(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match="needs --data"):
        load_dataset(name)
