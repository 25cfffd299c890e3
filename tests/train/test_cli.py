"""The command line: every option, every refusal, and the main job itself."""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnkernels
from bnkernels.cli import main
from bnkernels.runtime import cpu
from bnkernels.train.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def npz(tmp_path, monkeypatch):
    """Work in an empty folder with a small data file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bnkernels.train.runs.draw_curves", lambda history, title: b"drawn by test_plots.py")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    np.savez(tmp_path / "data.npz", x=5 * np.eye(3, 6)[y] + rng.standard_normal((200, 6)), y=y)
    return tmp_path / "data.npz"


SMALL = ["train", "--dataset", "npz", "--data", "data.npz", "--batch-size", "32", "--device", "cpu", "--out", "run"]


def run(capsys, *arguments):
    """Run a command line; return its exit code and what it printed on stdout and stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def document(capsys, *arguments):
    """Train with --json; return the document."""
    code, out, err = run(capsys, *SMALL, "--json", *arguments)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_main_job_answers_the_question(capsys):
    """One seed of the five behind the promised mean accuracy of 0.965, with a margin for the spread between seeds."""
    code, out, _ = run(capsys, "train", "--device", "cpu")
    assert code == 0
    assert "digits: 1437 training and 360 test examples\nnetwork 64-20-10, relu, float32" in out
    rows = re.findall(r"^ +(\d+) +(\d+) \|.*%.*\|.*%.*$", out, re.MULTILINE)
    assert rows == [(str(epoch), str(22 * epoch)) for epoch in range(1, 51)]
    (accuracies,) = re.findall(r"^test accuracy +([\d.]+)% +([\d.]+)%$", out, re.MULTILINE)
    assert min(map(float, accuracies)) > 96
    assert re.search(r"^steps to 95 % +\d+ +\d+$", out, re.MULTILINE)
    assert re.search(r"^µs per step +[\d.]+ +[\d.]+$", out, re.MULTILINE)
    verdict = (
        r"takes [\d.]+ times a step without \(quartiles [\d.]+ and [\d.]+ of (1099|49) rounds\). Accepted wisdom: 3 to"
    )
    busy = r"No verdict .*: half of (1099|49) rounds lie between [\d.]+ and [\d.]+, more than 15 % from the median, "
    assert re.search(f"{verdict}|{busy}", out)
    (files,) = re.findall(r"^Files: (.*)$", out, re.MULTILINE)
    names = [re.fullmatch(r"runs/digits-\d{8}-\d{6}/(.*)", file)[1] for file in files.split(", ")]
    assert names == ["checkpoint.npz", "metrics.json", "curves.png"]


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--hidden", "20"], "hidden", [20]),
        (["--hidden", "9", "--hidden", "8,7"], "hidden", [9, 8, 7]),
        (["--batch-size", "16"], "batch_size", 16),
        (["--activation", "identity"], "activation", "identity"),
        (["--activation", "relu"], "activation", "relu"),
        (["--activation", "sigmoid"], "activation", "sigmoid"),
        (["--activation", "tanh"], "activation", "tanh"),
        (["--activation", "gelu"], "activation", "gelu"),
        (["--optimizer", "sgd"], "lr", 0.5),
        (["--optimizer", "momentum"], "lr", 0.1),
        (["--optimizer", "adam"], "lr", 0.01),
        (["--lr", "0.25"], "lr", 0.25),
        (["--seed", "7"], "seed", 7),
        (["--dtype", "float64"], "dtype", "float64"),
    ],
)
def test_an_option_reaches_the_run(capsys, arguments, field, value):
    result = document(capsys, "--epochs", "1", *arguments)
    assert result["config"][field] == value
    meta, arrays = load_checkpoint("run/checkpoint.npz")
    assert meta["config"][field] == value
    hidden, dtype = result["config"]["hidden"], result["config"]["dtype"]
    assert arrays["batch/model/0.weight"].shape == (6, hidden[0])
    assert arrays["none/model/0.weight"].dtype == dtype
    assert meta["networks"]["none"]["step"] == 160 // result["config"]["batch_size"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("--seed=0", "--seed=1"), ("--lr=0.1", "--lr=0.2"), ("--activation=relu", "--activation=tanh")],
)
def test_an_option_changes_what_is_learnt(capsys, first, second):
    losses = [
        document(capsys, "--epochs", "1", "--out", option.strip("-"), option)["history"]["batch"][0]["loss"]
        for option in (first, second)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("norm", "networks"),
    [("layer", ["layer"]), ("none", ["none"]), ("both", ["batch", "none"]), ("all", ["batch", "layer", "none"])],
)
def test_norm_chooses_the_columns(capsys, norm, networks):
    code, out, _ = run(capsys, *SMALL, "--epochs", "2", "--norm", norm)
    assert code == 0
    assert ("with batch norm" in out) == ("batch" in networks)
    assert ("without norm" in out) == ("none" in networks)
    assert ("time of a step with batch norm: 10 steps" in out) == ({"batch", "none"} <= set(networks))
    assert list(json.loads(Path("run/metrics.json").read_text())["history"]) == networks


def test_epochs_and_steps_set_the_length(capsys):
    assert document(capsys, "--epochs", "3")["history"]["batch"][-1]["step"] == 15
    assert document(capsys, "--steps", "7", "--out", "other")["history"]["batch"][-1]["step"] == 7


def test_mnist_is_read_from_its_folder(capsys, tmp_path):
    for part, count in (("train", 64), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.repeat(labels, 4).reshape(count, 2, 2)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    code, out, _ = run(capsys, "train", "--dataset", "mnist", "--data", tmp_path, "--epochs", "1", "--out", "run")
    assert code == 0
    assert re.search(r"^images [0-9a-f]{8}: 64 training and 20 test examples\nnetwork 4-20-10", out, re.MULTILINE)


def test_device_auto_says_where_it_trains(capsys, monkeypatch):
    monkeypatch.setattr("bnkernels.runtime.registry.why_no_cuda", lambda: "no driver answers")
    code, out, _ = run(capsys, *SMALL, "--device", "auto", "--epochs", "1")
    assert code == 0
    assert re.search(
        "\ndevice cpu, because no driver answers; engine (fused|layers .not fused: it needs the c.*)\n", out
    )


def test_the_engine_of_numpy_arrays_and_the_way_to_a_faster_one_are_said_once(capsys, monkeypatch):
    with cpu.using("compiled"):
        assert run(capsys, *SMALL, "--epochs", "1", "--out", "one")[1].count("NumPy arrays: compiled by Numba\n") == 1
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in cpu.PACKAGES else real(name))
    with cpu.using("auto"):
        code, out, _ = run(capsys, *SMALL, "--epochs", "1", "--out", "two")
    assert code == 0
    said = "NumPy arrays: NumPy reference, because numba and scipy cannot be found; install bnkernels[cpu] for compiled"
    assert out.count(said) == 1


def test_json_is_one_document_and_the_content_of_metrics(capsys):
    result = document(capsys, "--epochs", "2")
    assert result == json.loads(Path("run/metrics.json").read_text())
    assert result["environment"]["bnkernels"] == bnkernels.__version__
    assert result["files"] == {
        "checkpoint": "run/checkpoint.npz",
        "metrics": "run/metrics.json",
        "curves": "run/curves.png",
    }
    ratio = result["summary"]["step_time_ratio"]
    low, high = ratio["quartiles"]
    assert 0 < low <= ratio["median"] <= high
    assert ratio["steps"] == 10
    assert ratio["rounds"] in (9, 1)  # the end of a step, or with compiled steps of an epoch
    assert ratio["why_no_verdict"] == "10 steps of each were timed, and 200 are needed"


def test_compilation_is_shown_unless_all_is_quiet(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "compilation_shown", lambda stream: contextlib.nullcontext(print("shown", file=stream)))
    for said, *options in (("shown\n", "--out", "table"), ("", "--out", "answer", "--quiet"), ("", "--json")):
        assert run(capsys, *SMALL, "--epochs", "1", *options)[::2] == (0, said)


def test_quiet_prints_the_answer_only(capsys):
    code, out, err = run(capsys, *SMALL, "--quiet", "--epochs", "1")
    assert (code, err) == (0, "")
    assert out.startswith("\n  ")
    assert "epoch" not in out
    assert "test accuracy" in out


def test_a_loss_that_is_not_finite_is_reported(capsys):
    code, out, _ = run(capsys, *SMALL, "--lr", "1e30", "--epochs", "2")
    assert code == 0
    assert "diverged" in out
    assert "The loss without norm is not finite: take a smaller --lr." in out


def test_checkpoint_chooses_its_place_and_resume_finds_the_rest(capsys, tmp_path):
    assert document(capsys, "--epochs", "1", "--checkpoint", "safe/c.npz")["files"]["checkpoint"] == "safe/c.npz"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curves.png", "metrics.json"]
    code, out, _ = run(capsys, "train", "--resume", "safe/c.npz", "--epochs", "2")
    assert code == 0
    assert "Files: safe/c.npz, run/metrics.json, run/curves.png" in out


def test_resume_of_a_finished_run_says_so(capsys):
    document(capsys, "--epochs", "1")
    code, out, _ = run(capsys, "train", "--resume", "run")
    assert code == 0
    assert out.startswith("This run had finished already; nothing was changed. Extend it with --epochs or --steps.\n")


def test_resume_shows_only_the_new_epochs(capsys):
    document(capsys, "--epochs", "2")
    _, out, _ = run(capsys, "train", "--resume", "run", "--epochs", "4")
    assert re.findall(r"^ +(\d+) +\d+ \|", out, re.MULTILINE) == ["3", "4"]


BAD = [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--hidden", "a"], "expected widths such as 20 or 100,100,100, got 'a'"),
    (["--hidden", "0"], "hidden must be at least 1, got 0"),
    (["--norm", "group"], "invalid choice: 'group'"),
    (["--batch-size", "1"], "batch size must be at least 2, got 1"),
    (["--batch-size", "161"], "at most the 160 training examples, got 161"),
    (["--epochs", "0"], "epochs must be at least 1, got 0"),
    (["--epochs", "1", "--steps", "1"], "argument --steps: not allowed with argument --epochs"),
    (["--lr", "-0.1"], "lr must be a positive number, got -0.1"),
    (["--seed", "-1"], "seed must be at least 0"),
    (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["--seed", "9" * 400], "seed must be at most"),
    (["--steps", "9" * 5000], "argument --steps: invalid int value: '999"),
    (["--steps", "5.5"], "argument --steps: invalid int value: '5.5'"),
    (["--epochs", "9" * 30], "epochs must be at most 9223372036854775807, got 999"),
    (["--lr", "nan"], "lr must be a positive number, got nan"),
    (["--lr", "inf"], "lr must be a positive number, got inf"),
    (["--lr", "-0"], "lr must be a positive number, got -0.0"),
    (["--lr", "1e-999"], "lr must be a positive number, got 0.0"),
    (["--lr", "1" * 400], "lr must be a positive number, got inf"),
    (["--dataset", "x" * 5000], "argument --dataset: invalid choice: 'xxx"),
    (["--hidden", "100000000000"], "bytes of memory, more than the"),
    (["--models", "1000000000000"], "bytes of memory, more than the"),
    (["--data", ""], "data must be a path, got empty text"),
    (["--data", "."], "is a folder: give an .npz file with x and y"),
    (["--device", "cuda"], "device cuda is not usable: no driver answers"),
    (["--data", "nowhere.npz"], "nowhere.npz does not exist"),
    (["--data", "bad.npz"], "NaN or infinity in 8 rows"),
    (["--dataset", "digits"], "take no path"),
    (["--out", "data.npz"], "cannot make the folder data.npz: it is a file: choose another"),
    (["--out", "data.npz/run"], "cannot make the folder data.npz/run: Not a directory: choose another"),
    (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    (["--resume", "data.npz"], "data.npz is not a bnkernels checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments)[:40] for arguments, _ in BAD])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr("bnkernels.runtime.registry.why_no_cuda", lambda: "no driver answers")
    np.savez(tmp_path / "bad.npz", x=np.full((10, 2), np.nan), y=np.arange(10) % 2)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"bnkernels: error: [^\n]+\n", err)
    assert message in err
    assert len(err) < 700
    assert sorted(tmp_path.rglob("*")) == before


def test_a_resumed_run_names_both_values_of_a_conflict(capsys):
    document(capsys, "--epochs", "1")
    code, _, err = run(capsys, "train", "--resume", "run", "--batch-size", "16")
    assert code == 2
    assert "the run was started with batch_size 32, not 16: drop it or start a new run" in err


def test_a_second_run_in_the_same_folder_is_refused(capsys):
    document(capsys, "--epochs", "1")
    code, _, err = run(capsys, *SMALL, "--epochs", "1")
    assert code == 2
    assert "run/checkpoint.npz exists already: continue that run with --resume" in err


def test_without_any_package_one_hint_is_the_whole_of_it(capsys, monkeypatch):
    """The hint names everything to install: following it leads to no second hint."""
    for module in ("tqdm", "matplotlib", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(capsys, "train", "--epochs", "1")
    assert (code, err) == (2, "bnkernels: error: the curves need Matplotlib: pip install 'bnkernels[train]'\n")


def test_numbers_are_read_as_python_reads_them(capsys):
    config = document(capsys, "--steps", "0_7", "--seed", "\uff11\uff12", "--lr", "1e-1")["config"]
    assert (config["steps"], config["seed"], config["lr"]) == (7, 12, 0.1)


@pytest.mark.parametrize("module", ["tqdm", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_before_anything_is_written(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    before = sorted(tmp_path.iterdir())
    code, _, err = run(capsys, "train", "--epochs", "1")
    assert code == 2
    assert re.fullmatch(r"bnkernels: error: the [^\n]+: pip install 'bnkernels\[train\]'[^\n]*\n", err)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_without_permission_is_one_line(capsys, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("bnkernels.train.checkpoint.write_atomically", refuse)
    code, _, err = run(capsys, *SMALL)
    assert (code, err) == (2, "bnkernels: error: Permission denied: run/checkpoint.npz\n")


def test_info_and_version(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert f"bnkernels: {bnkernels.__version__}" in out
    assert run(capsys, "--version") == (0, f"bnkernels {bnkernels.__version__}\n", "")


def test_help_names_every_option_and_its_default(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    options = set(re.findall(r"--[a-z-]+", out))
    expected = (
        "dataset data hidden batch-size norm activation optimizer lr epochs steps seed models dtype device engine "
        "checkpoint resume out quiet json help"
    )
    assert options == {f"--{name}" for name in expected.split()}
    for group in ("data:", "network:", "training:", "run:", "output:"):
        assert f"\n{group}\n" in out


def test_no_command_is_an_error(capsys):
    code, _, err = run(capsys)
    assert code == 2
    assert "COMMAND" in err


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "bnkernels", "--version"]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out == f"bnkernels {bnkernels.__version__}\n"
