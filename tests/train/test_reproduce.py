"""The paper's experiment: binary images, the same mini-batches for both networks, percentiles, a run to the end."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from bnkernels import cli
from bnkernels.nn.mlp import MLP
from bnkernels.train import data_files, reproduce
from bnkernels.train.config import ConfigError
from bnkernels.train.data import DataError, Dataset, load_dataset

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "ioffe2015" / "ioffe2015.json"


def small_images(rng: np.random.Generator) -> Dataset:
    """Return a few binary images of four classes."""
    y = rng.integers(0, 4, 200).astype(np.int32)
    x = (rng.random((200, 784)) < 0.2 + 0.2 * (np.arange(784) % 4 == y[:, None])).astype(np.float32)
    return Dataset("small", x[:150], y[:150], x[150:], y[150:], 4)


@pytest.fixture(autouse=True)
def without_fashion_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let no test depend on what is installed; return where Debian's package would be."""
    monkeypatch.setattr(reproduce, "FASHION_MNIST", tmp_path / "fashion-mnist")
    return tmp_path / "fashion-mnist"


def test_the_digits_become_binary_images_of_784_pixels() -> None:
    pytest.importorskip("sklearn")
    images = reproduce.load_images()
    assert images.name == "digits"
    assert images.x_train.shape == (1437, 784)
    assert set(np.unique(images.x_train)) == {0.0, 1.0}
    square = images.x_train[0].reshape(28, 28)
    assert not square[:2].any(), "the margin"
    blocks = square[2:26, 2:26].reshape(8, 3, 8, 3)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))


def write_mnist(folder: Path, pixels: np.ndarray, zipped: bool = False) -> None:
    """Write these images as both parts of MNIST."""
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(len(pixels), dtype=np.uint8) % 10)):
            header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
            content = header + array.tobytes()
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_taken_as_it_is(tmp_path: Path, rng: np.random.Generator, zipped: bool) -> None:
    pixels = rng.integers(0, 256, (20, 28, 28)).astype(np.uint8)
    pixels[0, 0, :4] = 0, 127, 128, 255  # half of the largest value is between
    write_mnist(tmp_path, pixels, zipped)
    images = reproduce.load_images(str(tmp_path))
    np.testing.assert_array_equal(images.x_test, pixels.reshape(20, 784) > 127)
    assert images.x_train.dtype == np.float32
    np.testing.assert_array_equal(images.y_train, np.arange(20) % 10)


def test_grey_images_keep_their_pixels(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (20, 28, 28)).astype(np.uint8)
    write_mnist(tmp_path, pixels)
    images = reproduce.load_images(tmp_path, "grey")
    np.testing.assert_allclose(images.x_train, pixels.reshape(20, 784) / 255, rtol=1e-6)
    pytest.importorskip("sklearn")
    assert len(np.unique(reproduce.load_images(pixels="grey").x_train)) == 17
    with pytest.raises(ConfigError, match="pixels must be one of binary, grey; got 'colour'"):
        reproduce.load_images(tmp_path, "colour")


def test_the_images_of_debians_package_are_found(without_fashion_mnist: Path, rng: np.random.Generator) -> None:
    without_fashion_mnist.mkdir()
    write_mnist(without_fashion_mnist, rng.integers(0, 256, (20, 28, 28)).astype(np.uint8), zipped=True)
    assert len(reproduce.load_images().x_train) == 20


def test_data_is_named_by_its_content(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is that of the digest of the training images' file as it is unpacked, and no folder's."""
    write_mnist(tmp_path, rng.integers(0, 256, (20, 28, 28)).astype(np.uint8))
    digest = hashlib.sha256((tmp_path / "train-images-idx3-ubyte").read_bytes()).hexdigest()
    assert reproduce.load_images(tmp_path).name == load_dataset("mnist", tmp_path).name == f"images {digest[:8]}"
    monkeypatch.setitem(data_files.KNOWN_IMAGES, digest, "fashion-mnist")
    assert reproduce.load_images(tmp_path).name == load_dataset("mnist", tmp_path).name == "fashion-mnist"


@pytest.mark.parametrize("shape", [(32, 32), (14, 56), (10, 20), (8, 8), (1, 784)])
def test_images_of_another_size_are_refused(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    """Not scrambled because the number of pixels is right, nor black because they are larger."""
    write_mnist(tmp_path, rng.integers(0, 256, (20, *shape)).astype(np.uint8))
    with pytest.raises(DataError, match=f"takes images of 28 x 28 pixels, and .* are {shape[0]} x {shape[1]}$"):
        reproduce.load_images(str(tmp_path))


def test_what_mnist_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="MNIST needs its four IDX files"):
        reproduce.load_images(str(tmp_path))


def test_an_epoch_has_every_example_at_most_once() -> None:
    rows = list(reproduce.mini_batches(150, 5, seed=1))
    assert [len(batch) for batch in rows] == [60] * 5
    for epoch in (rows[:2], rows[2:4]):
        assert len(set(np.concatenate(epoch))) == 120
    assert set(rows[0]) != set(rows[2]), "another permutation"
    for one, two in zip(rows, reproduce.mini_batches(150, 5, seed=1), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ConfigError, match="a mini-batch takes 60 training examples, and there are 59"):
        next(reproduce.mini_batches(59, 1, 0))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_inputs_are_those_of_the_last_sigmoids(rng: np.random.Generator, norm: str) -> None:
    model = MLP((9, 6, 5, 3), norm=norm, activation="sigmoid", dtype="float64", seed=1)
    model.forward(rng.standard_normal((40, 9)), training=True)
    x = rng.standard_normal((7, 9))
    h = 1 / (1 + np.exp(-reproduce.last_hidden_inputs(model, x)))
    last = model.layer_arrays[-1].parameters
    np.testing.assert_allclose(h @ last["weight"] + last["bias"], model.forward(x, training=False), rtol=1e-12)


def test_both_networks_see_the_same(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[np.ndarray]] = {"batch": [], "none": []}
    train = reproduce.Learner.train

    def watched(learner: reproduce.Learner, x: np.ndarray, *rest: object) -> None:
        seen[learner.model.norm].append(x)
        train(learner, x, *rest)

    monkeypatch.setattr(reproduce.Learner, "train", watched)
    document = reproduce.run(reproduce.Experiment(steps=7, device="cpu"), lambda line: None, small_images(rng))
    for one, two in zip(seen["batch"], seen["none"], strict=True):
        np.testing.assert_array_equal(one, two)
    assert sum(map(len, seen["batch"])) == 7 * 60
    starts = [network["input_percentiles"] for network in document["networks"].values()]
    assert starts[0] != starts[1]


def test_the_curves_are_those_of_the_run(rng: np.random.Generator) -> None:
    images, said = small_images(rng), []
    document = reproduce.run(reproduce.Experiment(steps=250, device="cpu", seed=3), said.append, images)
    assert said[0].startswith("250 steps, shortened from the paper's 50,000 (--steps 50000) on cpu")
    assert document["settings"]["sizes"] == (784, 100, 100, 100, 4)
    for network in document["networks"].values():
        assert network["steps"][0] == 0
        assert network["steps"][-1] == 250
        assert len(network["steps"]) == len(network["test_accuracy"]) == 101
        low, middle, high = (np.array(network["input_percentiles"][name]) for name in ("15", "50", "85"))
        assert len(low) == 101
        assert (low <= middle).all()
        assert (middle <= high).all()
    accuracy = document["networks"]["batch"]["test_accuracy"]
    assert accuracy[-1] > 0.9 > accuracy[0]


def test_examples_of_many_steps_are_gathered_in_parts(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the run is between two evaluations, memory is that of a part; and the parts are the whole."""
    images, documents = small_images(rng), []
    for at_once in (1000, 7):
        monkeypatch.setattr(reproduce, "AT_ONCE", at_once)
        monkeypatch.setattr(reproduce, "EVALUATIONS", 2)
        documents.append(reproduce.run(reproduce.Experiment(steps=40, device="cpu"), lambda line: None, images))
    assert documents[0]["networks"] == documents[1]["networks"]
    assert documents[0]["networks"]["batch"]["steps"] == [0, 20, 40]


def test_the_typical_sigmoid_has_the_median_spread() -> None:
    percentiles = np.zeros((3, 5))
    percentiles[2] = [5.0, 1, 4, 2, 3]
    curve = reproduce._curve([(0, 0.1, percentiles), (10, 0.5, percentiles)])
    assert curve["typical_sigmoid"] == 4
    assert curve["input_percentiles"]["85"] == [3.0, 3.0]


def test_the_command_writes_document_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reproduce, "load_images", lambda mnist, pixels: small_images(rng))
    arguments = ["reproduce", "ioffe2015", "--steps", "20", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    assert "with batch norm     test accuracy " in capsys.readouterr().out
    document = json.loads((tmp_path / "run" / "ioffe2015.json").read_text())
    assert document["settings"]["steps"] == 20
    for picture in ("accuracy.png", "percentiles.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(cli, "reproduce", lambda *_, **__: pytest.fail("computed before the folder was looked at"))
    assert cli.main(arguments) == 2
    assert "run/ioffe2015.json exists already: choose another place" in capsys.readouterr().err


def test_a_network_that_diverged_is_a_document_and_pictures_too(tmp_path: Path, rng: np.random.Generator) -> None:
    """The JSON has no NaN, and nothing warns on the way."""
    pytest.importorskip("matplotlib")
    experiment = reproduce.Experiment(steps=np.int64(60), lr=np.float64(1e38), seed=np.int32(1), device="cpu")
    document = reproduce.run(experiment, lambda line: None, small_images(rng))
    files = reproduce.write(document, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(files["document"].read_text(), parse_constant=refuse)
    assert None in found["networks"]["none"]["input_percentiles"]["50"]
    assert (found["settings"]["steps"], found["settings"]["lr"], found["settings"]["seed"]) == (60, 1e38, 1)
    assert files["percentiles"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "cannot make the folder .*file: .*file is a file: choose another"),
        ("file/run", "cannot make the folder .*file/run: .*file is a file: choose another"),
        ("closed/run", "cannot write in the folder .*closed: choose another"),
        ("a\0b", "out must be a path, got text with a null character"),
        ("", "out must be a path, got empty text"),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    access = reproduce.os.access
    monkeypatch.setattr(reproduce.os, "access", lambda path, mode: path.name != "closed" and access(path, mode))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        reproduce.require_folder(place)
    reproduce.require_folder("new/folder")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--lr", "-1"], "lr must be a positive number, got -1.0"),
        (["--steps", str(10**20)], "steps must be at most"),
        (["--mnist", "/nowhere"], "MNIST's folder /nowhere does not exist"),
        (["--engine", "graph", "--device", "cpu"], "the engine cannot be graph: it needs a GPU"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["reproduce", "ioffe2015", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_page_has_the_figures_of_the_run() -> None:
    documents = {"black and white": RESULT, "grey (`--pixels grey`)": RESULT.parent / "grey" / RESULT.name}
    page = (RESULT.parents[3] / "docs" / "ioffe2015.md").read_text()
    for pixels, path in documents.items():
        document, rows = json.loads(path.read_text()), []
        for network in (document["networks"][norm] for norm in ("batch", "none")):
            steps = [network["steps"].index(step) for step in (500, 2000, 10000, 50000)]
            rows.append(" | ".join(f"{network['test_accuracy'][step]:.1%}" for step in steps))
        assert f"| {pixels}, with batch norm | {rows[0]} |\n| without | {rows[1]} |" in page
        assert document["settings"]["steps"] == 50_000
        assert document["environment"]["commit"].rstrip("+") in page
