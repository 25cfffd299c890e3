"""The command as a process: closed, full, broken and ASCII streams, and interrupts from its first import to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bnkernels import _process, cli
from bnkernels.runtime import cpu

COMMAND = [sys.executable, "-m", "bnkernels"]
TRAIN = ["train", "--dataset", "digits", "--device", "cpu", "--norm", "batch", "--steps", "5", "--out"]


@pytest.fixture(autouse=True)
def packages() -> None:
    for name in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(name)


def run(arguments: list[str | bytes], redirect: str = "", **environment: str) -> tuple[int, bytes, bytes]:
    """Run the command from a shell, with its redirections; return its exit status, output and errors.

    No compiled kernels: on which stream their compilation is told is another test's matter.
    """
    script = f'"$@" {redirect}; exit $?'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, *arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "", cpu.VARIABLE: "reference"}
        | environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("encoding", "folder", "printed"),
    [
        ("ascii", b"run", rb"\xb1 standard deviation"),
        ("ascii:surrogateescape", b"run", rb"\xb1 standard deviation"),
        ("utf-8:strict", b"r\xff", rb"r\udcff/metrics.json"),
        ("utf-8:surrogateescape", b"r\xff", b"r\xff/metrics.json"),
    ],
)
def test_what_an_encoding_lacks_is_printed_as_its_code(
    tmp_path: Path, encoding: str, folder: bytes, printed: bytes
) -> None:
    """Not a traceback after all of the training, for a ± or for the name of a folder."""
    code, out, err = run(
        [*TRAIN, os.fsencode(tmp_path) + b"/" + folder, "--quiet", "--models", "2"], PYTHONIOENCODING=encoding
    )
    assert (code, err) == (0, b"")
    assert printed in out


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_place_and_nothing_else_takes_it(tmp_path: Path, redirect: str) -> None:
    """A daemon or pythonw has none. A file that took the place of standard error would get what libraries print."""
    folder = tmp_path / "run"
    code, out, err = run([*TRAIN, str(folder)], redirect)
    assert code == 0
    assert err == b""
    assert (b"test accuracy" in out) == (">&-" not in redirect.replace("2>&-", ""))
    assert json.loads((folder / "metrics.json").read_text())["status"] == "finished"


def test_the_numbers_of_closed_streams_are_taken(tmp_path: Path) -> None:
    program = "import os; from bnkernels import _process; _process.open_streams(); print(os.open('/dev/null', 0))"
    code = f"import sys; sys.stdout = open({str(tmp_path / 'number')!r}, 'w'); {program}"
    subprocess.run(["bash", "-c", '"$@" <&- 2>&-', "bash", sys.executable, "-c", code], check=True, timeout=60)
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize("arguments", [["info"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_a_broken_pipe_ends_the_command_quietly(arguments: list[str]) -> None:
    """So it is in ``bnkernels info | head -0``; exit code 141 is what a shell gives a program that SIGPIPE ended."""
    code, _, err = run(arguments, "| true; exit ${PIPESTATUS[0]}")
    assert (code, err) == (141, b"")


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    code, _, err = run(["info"], "> /dev/full")
    assert (code, err) == (2, b"bnkernels: error: No space left on device: standard output\n")


@pytest.mark.parametrize("module", ["numpy", "argparse"])
@pytest.mark.parametrize("command", ["module", "script"])
def test_an_interrupt_while_the_command_loads_ends_it_silently(tmp_path: Path, module: str, command: str) -> None:
    """Whether the package is loading, NumPy first of all, or the command's own modules; 130 in a shell."""
    ready = tmp_path / "ready"
    (tmp_path / f"{module}.py").write_text(f"import time; open({str(ready)!r}, 'w').close(); time.sleep(60)")
    script = tmp_path / "bnkernels"  # as an installer writes it
    script.write_text("import sys\nfrom bnkernels.cli import main\nsys.exit(main())\n")
    script.rename(tmp_path / "bin") if command == "module" else None
    process = subprocess.Popen(
        [*COMMAND, "info"] if command == "module" else [sys.executable, str(script), "info"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("argv", "original", "found"),
    [
        (["/usr/bin/bnkernels", "train"], ["python", "/usr/bin/bnkernels", "train"], True),
        ([r"bnkernels.exe"], ["python", "bnkernels.exe"], True),
        (["-m", "train"], ["python", "-X", "dev", "-m", "bnkernels", "train"], True),
        (["-m"], ["python", "-mbnkernels"], True),
        (["-m", "bnkernels"], ["python", "-m", "benchmarks", "bnkernels"], False),
        (["/usr/bin/pytest", "bnkernels"], ["python", "/usr/bin/pytest", "bnkernels"], False),
        (["-c"], ["python", "-c", "import bnkernels"], False),
        ([""], ["python"], False),
        ([], ["embedded"], False),
    ],
)
def test_only_the_command_itself_handles_interrupts(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], original: list[str], found: bool
) -> None:
    """A program that imports the package keeps its own."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert _process.end_on_interrupt() is found
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_DFL if found else signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert _process.end_on_interrupt() is False
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_any_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    for place in ("report", "build_parser"):
        with monkeypatch.context() as patch:
            patch.setattr(cli, place, interrupted)
            assert cli.main(["info"]) == 130
        assert capsys.readouterr() == ("", "bnkernels: interrupted\n")


def test_memory_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, line in ((MemoryError(), "not enough memory"), (MemoryError("9\nGiB"), "not enough memory: 9 GiB")):

        def refuse(error: MemoryError = error) -> str:
            raise error

        monkeypatch.setattr(cli, "report", refuse)
        assert cli.main(["info"]) == 2
        assert capsys.readouterr().err == f"bnkernels: error: {line}\n"


def test_the_command_runs_in_a_thread_too(tmp_path: Path) -> None:
    """Only the main thread can handle signals."""
    codes: list[int] = []
    arguments = [*TRAIN, str(tmp_path / "run"), "--quiet"]
    thread = threading.Thread(target=lambda: codes.append(cli.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0]
