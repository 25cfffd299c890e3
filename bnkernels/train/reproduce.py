"""``bnkernels reproduce ioffe2015``: the MNIST experiment of the batch-norm paper, section 4.1 and figure 1.

Images of 28 x 28 pixels, binary as in the paper or grey, three hidden layers of 100 sigmoids, 10 classes, mini-batches
of 60, with and without batch norm: the same weights to begin with, the same mini-batches. What is watched over the
steps is the test accuracy, and the 15th, 50th and 85th percentiles, over the test examples, of the input of a typical
sigmoid of the last hidden layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import Any

import numpy as np

from bnkernels.nn.mlp import MLP
from bnkernels.ops.batch_norm.inference import batch_norm_inference
from bnkernels.runtime.registry import choose_device
from bnkernels.train.config import TrainingConfig
from bnkernels.train.data import Dataset, load_dataset
from bnkernels.train.data_files import DataError, name_of, read_mnist
from bnkernels.train.documents import to_json
from bnkernels.train.environment import blas_threads, versions
from bnkernels.train.files import write_atomically
from bnkernels.train.learner import Learner
from bnkernels.train.plots import draw_accuracy, draw_percentiles
from bnkernels.train.run_config import LABELS, ConfigError, as_path, choice

HIDDEN, BATCH, STEPS = (100, 100, 100), 60, 50_000  # the paper's
SHORTENED = 10_000  # steps on a CPU
LR = 0.5  # the paper does not say
EVALUATIONS = 100
AT_ONCE = 1000  # steps, at most, whose examples are gathered together
PERCENTILES = (15, 50, 85)
SIDE = 28
PIXELS = ("binary", "grey")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
FILES = {"document": "ioffe2015.json", "accuracy": "accuracy.png", "percentiles": "percentiles.png"}


@dataclass(frozen=True)
class Experiment:
    """Options of the experiment.

    Attributes
    ----------
    mnist : str, optional
        Folder of the IDX files of MNIST or Fashion-MNIST; None takes those of Debian's package
        ``dataset-fashion-mnist`` where it is installed, else the digits of scikit-learn.
    pixels : {"binary", "grey"}
        Pixels above half of the largest value as 1 and others as 0, which is the paper's way; or as they are, from 0
        to 1.
    steps : int, optional
        Number of steps; None takes 50,000 on a GPU, 10,000 on a CPU.
    lr : float
        Learning rate of plain gradient descent, per step.
    seed : int
        Seed of weights and mini-batches.
    device, engine : str
        Options of `TrainingConfig`.
    """

    mnist: str | None = None
    pixels: str = "binary"
    steps: int | None = None
    lr: float = LR
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"


def load_images(mnist: str | Path | None = None, pixels: str = "binary") -> Dataset:
    """Return images of 28 x 28 pixels.

    Parameters
    ----------
    mnist, pixels
        Members of `Experiment`. Each of the digits' 8 x 8 pixels becomes 3 x 3, with a margin of 2.

    Returns
    -------
    Dataset
        Training and test examples, as `load_dataset` splits them; inputs are float32.

    Raises
    ------
    ConfigError
        If `pixels` is none of its values.
    DataError
        If the files are missing or damaged, or their images are not 28 x 28.
    """
    binary = choice("pixels", pixels, PIXELS) == "binary"
    if mnist is None and not FASHION_MNIST.is_dir():
        digits = load_dataset("digits")
        x_train, x_test = (_enlarged(x > 0.5 if binary else x) for x in (digits.x_train, digits.x_test))
        return Dataset(digits.name, x_train, digits.y_train, x_test, digits.y_test, digits.n_classes)
    folder = FASHION_MNIST if mnist is None else Path(mnist)
    x_train, y_train, x_test, y_test = read_mnist(folder, "float32")
    for images in (x_train, x_test):
        if images.shape[1:] != (SIDE, SIDE):
            found = " x ".join(map(str, images.shape[1:]))
            raise DataError(f"the experiment takes images of {SIDE} x {SIDE} pixels, and those in {folder} are {found}")
    name = name_of(x_train)
    x_train, x_test = (x > 127 if binary else np.divide(x, 255, dtype=np.float32) for x in (x_train, x_test))
    return Dataset(name, x_train, y_train, x_test, y_test, 10)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Return the digits' 8 x 8 pixels as 3 x 3 each, with a margin."""
    images = pixels.reshape(-1, 8, 8).repeat(3, axis=1).repeat(3, axis=2)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(len(images), -1)


def mini_batches(examples: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of every mini-batch; an epoch is a permutation, less what whole mini-batches leave over."""
    generator = np.random.default_rng(seed)
    of_epoch = examples // BATCH
    if of_epoch == 0:
        raise ConfigError(f"a mini-batch takes {BATCH} training examples, and there are {examples}")
    for step in range(steps):
        if step % of_epoch == 0:
            order = generator.permutation(examples)
        yield order[step % of_epoch * BATCH :][:BATCH]


def last_hidden_inputs(model: MLP, x: Any) -> Any:
    """Return the inputs of the sigmoids of the last hidden layer, shape (N, 100), with running statistics."""
    for arrays in model.layer_arrays[:-1]:
        of = arrays.parameters
        u = model.xp.matmul(x, of["weight"])
        if "gamma" in of:
            u = batch_norm_inference(u, of["gamma"], of["beta"], *arrays.running.values(), eps=model.fused.eps)
        else:
            u += of["bias"]
        x = 1 / (1 + model.xp.exp(-u))
    return u


def run(experiment: Experiment, say: Callable[[str], None] = print, dataset: Dataset | None = None) -> dict[str, Any]:
    """Run the experiment; return its document.

    Parameters
    ----------
    experiment : Experiment
        Options of the experiment.
    say : callable
        Receiver of lines about the progress.
    dataset : Dataset, optional
        Other images, by default `load_images`.

    Returns
    -------
    dict
        Settings, environment, and the curves of each network, as JSON can hold them.

    Raises
    ------
    ConfigError, DataError, ImportError
        If the options do not fit the machine, or the data are unusable.
    """
    xp, device, _ = choose_device(experiment.device)
    images = dataset or load_images(experiment.mnist, experiment.pixels)
    steps = (SHORTENED if xp is np else STEPS) if experiment.steps is None else experiment.steps
    config = TrainingConfig(
        hidden=HIDDEN,
        batch_size=BATCH,
        activation="sigmoid",
        lr=experiment.lr,
        steps=steps,
        seed=experiment.seed,
        device=experiment.device,
        engine=experiment.engine,
    )
    sizes = (images.n_features, *HIDDEN, images.n_classes)
    learners = {norm: Learner(norm, config, sizes, xp) for norm in config.norms}
    shortened = f", shortened from the paper's {STEPS:,} (--steps {STEPS})" if steps < STEPS else ""
    examples = f"{len(images.x_train):,} training examples of {images.name}, {experiment.pixels}"
    say(f"{steps:,} steps{shortened} on {device}; {examples}")
    # Overflow is no accident to warn about line by line: it shows in the document as null.
    with blas_threads(sizes, BATCH), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        curves = _train(learners, images, config.steps, config.seed, xp, say)
    return {
        "experiment": "Ioffe and Szegedy 2015, arXiv:1502.03167, section 4.1, figure 1",
        "data": {
            "name": images.name,
            "digest": images.digest,
            "training_examples": len(images.x_train),
            "test_examples": len(images.x_test),
            "inputs": f"{images.n_features} {experiment.pixels}",
        },
        "settings": {"sizes": sizes, "batch": BATCH, "steps": config.steps, "lr": config.lr, "seed": config.seed}
        | {
            "weights": "normal, variance 1 / inputs",
            "engine": {norm: str(learner.engine) for norm, learner in learners.items()},
        },
        "environment": versions(device) | {"date": strftime("%Y-%m-%d")},
        "networks": {norm: _curve(curve) for norm, curve in curves.items()},
    }


def _train(
    learners: dict[str, Learner], images: Dataset, steps: int, seed: int, xp: Any, say: Callable[[str], None]
) -> dict[str, list[tuple[int, float, np.ndarray]]]:
    """Train all networks on the same mini-batches; return of each step, accuracy and percentiles, as they went."""
    x_train, y_train, x_test, y_test = map(xp.asarray, (images.x_train, images.y_train, images.x_test, images.y_test))
    curves: dict[str, list[tuple[int, float, np.ndarray]]] = {norm: [] for norm in learners}
    rows = mini_batches(len(images.x_train), steps, seed)
    stops = sorted({steps * i // EVALUATIONS for i in range(EVALUATIONS + 1)})
    for first, last in zip([0, *stops], stops, strict=False):
        for begin in range(first, last, AT_ONCE):
            end = min(begin + AT_ONCE, last)
            order = xp.asarray(np.concatenate([next(rows) for _ in range(begin, end)]))
            x, y = x_train[order], y_train[order]
            for learner in learners.values():
                learner.train(x, y, begin, end, lambda: False)
        for norm, learner in learners.items():
            _, accuracy = learner.evaluate(x_test, y_test)
            inputs = last_hidden_inputs(learner.model, x_test)
            host = getattr(xp, "asnumpy", np.asarray)(inputs)
            curves[norm].append((last, accuracy, np.percentile(host, PERCENTILES, axis=0)))
        if 10 * last // steps > 10 * first // steps:
            reached = ", ".join(f"{curve[-1][1]:.1%} {LABELS[norm]}" for norm, curve in curves.items())
            say(f"step {last:>6,}: test accuracy {reached}")
    return curves


def _curve(curve: list[tuple[int, float, np.ndarray]]) -> dict[str, Any]:
    """Return the curves of a network: of all sigmoids, the one whose spread at the end is the layer's median."""
    percentiles = np.array([entry[2] for entry in curve])  # (evaluations, percentiles, sigmoids)
    spread = percentiles[-1, -1] - percentiles[-1, 0]
    typical = int(np.argsort(spread, kind="stable")[len(spread) // 2])
    return {
        "steps": [entry[0] for entry in curve],
        "test_accuracy": [round(entry[1], 6) for entry in curve],
        "typical_sigmoid": typical,
        "input_percentiles": {
            str(percentile): [round(float(value), 5) for value in percentiles[:, i, typical]]
            for i, percentile in enumerate(PERCENTILES)
        },
    }


def require_folder(folder: str | Path) -> None:
    """Refuse a folder that `write` could not write to, before anything is computed.

    Raises
    ------
    ConfigError
        If the folder has an experiment already, or cannot be made or written.
    """
    folder = Path(as_path("out", folder))
    for path in (folder / file for file in FILES.values()):
        if path.exists():
            raise ConfigError(f"{path} exists already: choose another place")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"cannot make the folder {folder}: {there} is a file: choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write in the folder {there}: choose another")


def write(document: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the document and the pictures; return the files.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    files = {name: Path(folder, file) for name, file in FILES.items()}
    accuracy, percentiles = draw_accuracy(document), draw_percentiles(document)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(files["accuracy"], accuracy)
    write_atomically(files["percentiles"], percentiles)
    write_atomically(files["document"], f"{to_json(document)}\n".encode())
    return files
