"""The data sets: what is loaded, how it is split, and the arrays they may be made of."""

from dataclasses import replace

import numpy as np
import pytest

from bnkernels.train.data import DataError, Dataset, load_dataset, load_examples
from bnkernels.train.trainer import TrainingConfig, train
from tests.train.test_data_files import write_npz


def test_digits_are_scaled_and_split_the_same_way_every_time():
    data, repeated = load_dataset(), load_dataset()
    assert data.x_train.shape == (1437, 64)
    assert data.x_test.shape == (360, 64)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert set(data.y_test) == set(range(10))
    assert data.digest == repeated.digest


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
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(DataError, match=r"pip install 'bnkernels\[train\]'"):
        load_dataset()


def test_an_unknown_data_set_is_named():
    with pytest.raises(DataError, match="'cifar'"):
        load_dataset("cifar")


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


def test_labels_that_are_text_are_numbered_in_sorted_order(tmp_path):
    y = np.array(["dog", "cat", "emu", "cat", "dog"] * 10)
    more = {"x_test": np.zeros((2, 2, 3)), "y_test": np.array(["emu"] * 2)}
    data = load_dataset("npz", write_npz(tmp_path / "a.npz", y=y, **more))
    assert data.classes == ("cat", "dog", "emu")
    assert data.n_classes == 3
    assert data.y_train[:3].tolist() == [1, 0, 2]
    assert data.y_test.tolist() == [2, 2]
    numbers = np.unique(y, return_inverse=True)[1]
    other = load_dataset("npz", write_npz(tmp_path / "b.npz", y=numbers, **more | {"y_test": np.array([2, 2])}))
    assert other.digest != data.digest


def test_a_label_that_is_no_class_of_the_training_set_is_refused(tmp_path):
    y = np.array(["cat", "dog"] * 25)
    path = write_npz(tmp_path / "a.npz", y=y, x_test=np.zeros((1, 2, 3)), y_test=np.array(["cow"]))
    with pytest.raises(DataError, match=r"y_test has the label 'cow', which is none of the 2 classes"):
        load_dataset("npz", path)
    with pytest.raises(DataError, match=r"classes must be 3 sorted names, or \(\), got \('b', 'a', 'c'\)"):
        replace(in_memory(), classes=("b", "a", "c"))


def test_the_digest_tells_data_apart(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 2, 3))
    digest = load_dataset("npz", write_npz(tmp_path / "a.npz", x=x)).digest
    x[17, 1, 2] += 1e-3
    assert load_dataset("npz", write_npz(tmp_path / "b.npz", x=x)).digest != digest


def in_memory(**changes):
    """Return a data set of 40 training and 10 test examples of 3 classes, with changes."""
    x, y = np.random.default_rng(0).standard_normal((50, 6)), np.arange(50, dtype=np.int32) % 3
    arrays = {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]} | changes
    return Dataset("npz", **arrays, n_classes=3)


LAYOUTS = {
    "F order": np.asfortranarray,
    "every second column": lambda x: x.repeat(2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "transposed": lambda x: x.T.copy().T,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "matrix": lambda x: x.view(np.matrix),
    "mask of nothing": np.ma.array,
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_arrays_is_no_part_of_the_data(tmp_path, layout):
    """A DataFrame's values, a slice, a transpose are the same data and train to the same bits, in a folder too."""
    config = TrainingConfig(steps=2, norm="batch", device="cpu", dtype="float64", batch_size=8)
    plain = in_memory()
    change = LAYOUTS[layout]
    data = in_memory(x_train=change(plain.x_train), x_test=change(plain.x_test))
    assert data.digest == plain.digest
    result = train(config, dataset=data, folder=tmp_path / "run")
    expected = train(config, dataset=plain)
    np.testing.assert_array_equal(result.models["batch"].parameters, expected.models["batch"].parameters)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", "i4", "u4", "i8", ">i8", "u8"])
def test_labels_may_be_integers_of_any_type(dtype):
    data = in_memory(y_train=(np.arange(80, dtype=dtype) % 3)[::2])
    assert data.y_train.dtype == np.int32
    assert data.y_train.flags.c_contiguous
    np.testing.assert_array_equal(data.y_train, np.arange(0, 80, 2) % 3)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("?", "f4"), ("u1", "f4"), ("i8", "f4"), ("f2", "f4"), (">f4", "f4"), (">f8", "f8"), (np.longdouble, "f4")],
)
def test_inputs_may_be_real_numbers_of_any_type(dtype, kept):
    x = np.arange(40 * 6).reshape(40, 6) % 2
    x.flags.writeable = False
    data = in_memory(x_train=x.astype(dtype))
    assert (data.x_train.dtype, data.x_test.dtype) == (kept, kept)
    np.testing.assert_array_equal(data.x_train, x)


def test_a_run_converts_a_data_set_to_its_own_type(tmp_path):
    result = train(TrainingConfig(steps=2, batch_size=8, device="cpu"), dataset=in_memory(), folder=tmp_path / "run")
    assert result.models["batch"].parameters.dtype == np.float32
    single = in_memory().astype("float32")
    assert single.astype("float32") is single
    with pytest.raises(DataError, match="x_train has NaN or infinity in 40 rows as float32"):
        in_memory(x_train=np.full((40, 6), 1e300)).astype("float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": [[1.0, 2.0]]}, "x_train must be a NumPy array, got list"),
        ({"x_train": np.zeros((40, 6), object)}, r"x_train must be real numbers, got object: .*astype\(float\)"),
        ({"x_train": np.zeros((40, 6), [("a", "f4")])}, "x_train must be real numbers, got a structured array"),
        ({"x_train": np.ma.masked_less(np.eye(40, 6), 0.5)}, "x_train has masked values: fill them in"),
        ({"y_train": np.ma.masked_less(np.arange(40) % 3, 1)}, "y_train has masked values"),
        ({"y_train": np.full(40, -1)}, "y_train must lie in 0 to 2, got -1 to -1"),
        ({"y_train": np.full(40, 2**32)}, "y_train must lie in 0 to 2"),
        ({"x_test": np.zeros((10, 5))}, r"x_test must have rows of shape \(6,\) like x_train, got \(5,\)"),
        ({"x_test": np.full((10, 6), np.nan)}, "x_test has NaN or infinity in 10 rows"),
    ],
)
def test_a_data_set_made_by_hand_is_checked_as_one_from_a_file(changes, message):
    with pytest.raises(DataError, match=f"the data set: {message}"):
        in_memory(**changes)


def test_the_number_of_classes_is_a_whole_number():
    assert type(replace(in_memory(), n_classes=np.int64(3)).n_classes) is int
    with pytest.raises(DataError, match="n_classes must be an integer, got float"):
        replace(in_memory(), n_classes=3.0)


def test_other_data_are_evaluated_whole_and_the_runs_own_on_what_it_held_out(tmp_path):
    path = write_npz(tmp_path / "data.npz")
    data = load_dataset("npz", path)
    x, y = load_examples("npz", path, "float32", 3, data.digest)
    np.testing.assert_array_equal(x, data.x_test)
    np.testing.assert_array_equal(y, data.y_test)
    x, y = load_examples("npz", path, "float32", 3, "of others")
    with np.load(path) as archive:
        np.testing.assert_array_equal(x, archive["x"].reshape(50, 6).astype("f4"))
        np.testing.assert_array_equal(y, archive["y"])


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_class_need_not_occur_in_other_data(tmp_path, rows):
    path = write_npz(tmp_path / "data.npz", x=np.ones((rows, 6)), y=np.full(rows, 2))
    x, y = load_examples("npz", path, "float64", 3, "of others")
    assert (x.shape, y.tolist()) == ((rows, 6), [2] * rows)
    with pytest.raises(DataError, match="y must lie in 0 to 1, got 2 to 2"):
        load_examples("npz", path, "float64", 2, "of others")


def test_of_other_data_with_a_test_set_only_that_is_evaluated(tmp_path):
    path = write_npz(tmp_path / "data.npz", x_test=np.ones((4, 2, 3)), y_test=np.zeros(4, int))
    x, y = load_examples("npz", path, "float32", 3, "of others")
    assert (x.shape, y.tolist()) == ((4, 6), [0] * 4)
