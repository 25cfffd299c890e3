"""The examples: each runs with few steps, and prints what it promises; the word that takes it to a GPU is the only one.

That word is put in place by the test, with the emulator's arrays for those of a GPU: like CuPy's, they are refused
beside NumPy's.
"""

from __future__ import annotations

import ast
import gzip
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.backends import emulated_runtime, make
from tools.real_cupy import real

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"from_pytorch": ("torch", "safetensors")}
MODULE = "import numpy as xp  # on a GPU: import cupy as xp\n"
FEW_STEPS = {
    "cnn": ["--steps=1"],
    "crossq": ["--steps=2"],
    "from_pytorch": ["--steps=4"],
    "gradient_penalty": ["--steps=1"],
    "masked_sequences": ["--steps=1"],
    "residual_mlp": ["--steps=1", "--blocks=1"],
}


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str, xp: Any = np) -> list[list[float]]:
    """Run an example with an array module; return the numbers of each line that it prints."""
    for package in ("sklearn", *NEEDS.get(name, ())):
        pytest.importorskip(package, reason=f"{package} is not installed")
    before, after = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        code = compile(f"{before}\n{after}", EXAMPLES / f"{name}.py", "exec")
        exec(code, {"__name__": "__main__", "xp": xp})
    lines = capsys.readouterr().out.splitlines()
    return [[float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", line)] for line in lines]


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == FEW_STEPS.keys()


def lines(name: str, *beginnings: str) -> int:
    """Return the number of lines of code of the statements of an example that begin so, without their docstrings."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    texts = [ast.get_source_segment(source, node) or "" for node in statements]
    found = [next(text for text in texts if text.startswith(beginning)) for beginning in beginnings]
    code = [line.strip() for text in found for line in text.splitlines()]
    return len([line for line in code if line and not line.startswith(('"""', "#"))])


def test_the_page_counts_the_lines_of_the_examples() -> None:
    page = (EXAMPLES.parent / "docs" / "layers.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    counted = {row[0]: int(row[2]) for row in rows if len(row) == 4 and row[2].isdigit()}
    assert counted["a CNN: network and training step"] == lines("cnn", "model = ", "optimiser = ", "for _ in range(opt")
    assert counted["its convolution, as a layer of any width and stride"] == lines("cnn", "class Convolution")
    assert counted["a residual block of two norms, both ways"] == lines(
        "residual_mlp", "inside", "behind", "layers.app"
    )


@pytest.mark.slow  # under the sanitizers, which have no part in what is tested here
@pytest.mark.emulator
@pytest.mark.parametrize("name", sorted(FEW_STEPS))
def test_a_gpu_takes_one_word(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    emulated_runtime()
    emulated = run(name, capsys, *FEW_STEPS[name], xp=make("emulator").xp)
    for got, want in zip(emulated, run(name, capsys, *FEW_STEPS[name]), strict=True):
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", sorted(FEW_STEPS))
def test_cupy_has_the_functions_that_are_called(name: str) -> None:
    called = set(re.findall(r"\bxp\.(\w+)", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert "asarray" in called
    assert called <= set(dir(real()))


def test_cnn(capsys: pytest.CaptureFixture[str]) -> None:
    ((loss, accuracy, count),) = run("cnn", capsys, "--steps=80")
    assert (loss < 0.2, accuracy > 0.88, count) == (True, True, 397)


def test_cnn_reads_the_files_of_mnist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 128), ("t10k", 100)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 50, (count, 28, 28))
        images[np.arange(count), 2 * labels + 4] = 255  # a line, at the height of its class
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
            content = gzip.compress(header + array.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    ((_, accuracy, count),) = run("cnn", capsys, f"--data={tmp_path}", "--steps=15")
    assert (accuracy > 0.95, count) == (True, 100)


def test_crossq(capsys: pytest.CaptureFixture[str]) -> None:
    ((explained, mean_error),) = run("crossq", capsys, "--steps=800")
    assert explained > 0.98
    assert abs(mean_error) < 0.4


def test_from_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    (difference, others), (before, after) = run("from_pytorch", capsys)
    assert difference < 1e-5
    assert others == 0
    assert before > 0.8
    assert after > before + 0.01


def test_gradient_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    (error,), plain, penalised = run("gradient_penalty", capsys)
    assert error < 1e-6
    (_, norm, accuracy, of_noisy), (_, norm_penalised, accuracy_penalised, of_noisy_penalised) = plain, penalised
    assert norm_penalised < 0.6 * norm
    assert accuracy_penalised > accuracy - 0.02 > 0.87
    assert of_noisy_penalised > of_noisy + 0.02


def test_masked_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    ((loss, accuracy, count, padding),) = run("masked_sequences", capsys, "--steps=150")
    assert (loss < 0.5, accuracy > 0.85, count) == (True, True, 1000)
    assert 30 < padding < 45


def test_residual_mlp(capsys: pytest.CaptureFixture[str]) -> None:
    (layers, accuracy), (_, without_sums) = run("residual_mlp", capsys, "--steps=150")
    assert (layers, accuracy > 0.85) == (32, True)
    assert without_sums < accuracy - 0.2
