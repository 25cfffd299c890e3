"""Files: replaced whole or not at all, whoever else writes, links or kills."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bnkernels.train import files
from bnkernels.train.files import check_replaceable, write_atomically

WRITE_FOR_EVER = """
import sys
from bnkernels.train.files import write_atomically
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomically(sys.argv[1], bytes([letter]) * 1_000_000)
"""


def started(program: str, *arguments: object) -> subprocess.Popen:
    """Start a program and return when it says that it is ready."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- one file, several writers --------------------------------------------------------------------------------------


def test_two_writers_never_publish_a_mix(tmp_path: Path) -> None:
    path, errors = tmp_path / "file", []

    def write(letter: bytes) -> None:
        for turn in range(60):
            try:
                write_atomically(path, letter * (1000 * turn + 1))
                content = path.read_bytes()
                assert len(set(content)) == 1
                assert len(content) % 1000 == 1
            except (OSError, AssertionError) as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == ["file"]


def test_no_planted_link_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of the name former versions used, nor one of a name that could be guessed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(tokens))
    for name in (".file.partial", f".file.{'0' * 16}.partial"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"new")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("plant", ["symbolic", "dangling", "hard"])
def test_a_link_is_replaced_and_what_it_stands_for_left_alone(tmp_path: Path, plant: str) -> None:
    target, path = tmp_path / "target", tmp_path / "file"
    if plant != "dangling":
        target.write_bytes(b"precious")
    os.link(target, path) if plant == "hard" else path.symlink_to(target)
    write_atomically(path, b"new")
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"
    assert target.read_bytes() == b"precious" if plant != "dangling" else not target.exists()


def test_leftovers_of_killed_writers_do_not_pile_up(tmp_path: Path) -> None:
    path, rng = tmp_path / "file", random.Random(0)
    path.write_bytes(b"a" * 1_000_000)
    for _ in range(5):
        process = started(WRITE_FOR_EVER, path)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        content = path.read_bytes()
        assert content in (b"a" * 1_000_000, b"b" * 1_000_000)
        assert len(names(tmp_path)) <= 2
    (tmp_path / f".file.{'0' * 16}.partial").write_bytes(b"of a writer that was killed")
    (tmp_path / ".file.mine.partial").write_bytes(b"of somebody else")
    write_atomically(path, b"end")
    assert names(tmp_path) == [".file.mine.partial", "file"]


def test_what_a_living_writer_has_begun_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, inner = tmp_path / "file", os.replace, []

    def replace_later(*arguments: object) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_atomically(path, b"another")  # while the first is about to be renamed
        inner.append(path.read_bytes())
        replace(*arguments)

    monkeypatch.setattr(os, "replace", replace_later)
    write_atomically(path, b"first")
    assert inner == [b"another"]
    assert path.read_bytes() == b"first"


def test_a_name_as_long_as_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_atomically(path, b"content")
    assert names(tmp_path) == [path.name]


# ---- permissions, kinds of files, file systems ----------------------------------------------------------------------


def test_permissions_are_kept_and_new_files_have_the_usual_ones(tmp_path: Path) -> None:
    path, before = tmp_path / "file", os.umask(0o027)
    try:
        write_atomically(path, b"new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o666):
            path.chmod(mode)
            write_atomically(path, b"newer")
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_what_is_protected_or_no_file_stays(tmp_path: Path) -> None:
    protected, pipe, folder = (tmp_path / name for name in ("protected", "pipe", "folder"))
    protected.write_bytes(b"old")
    protected.chmod(0o444)
    os.mkfifo(pipe)
    folder.mkdir()
    for path, message in ((protected, "read-only"), (pipe, "a device or a pipe"), (folder, "a folder is where")):
        before = path.lstat()
        for act in (lambda path=path: write_atomically(path, b"new"), lambda path=path: check_replaceable(path)):
            with pytest.raises(OSError, match=rf"{message}.*{path.name}"):
                act()
        assert path.lstat() == before
    assert names(tmp_path) == ["folder", "pipe", "protected"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_saves_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_that_cannot_be_opened_saves_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error.*file"):
        write_atomically(tmp_path / "file", b"content")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_or_an_interrupt_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as caught:
        write_atomically(path, b"new")
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
        assert caught.value.strerror.endswith(": free some space; what the file held before is still there")


def test_a_real_limit_on_the_size_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"free some space.*file"):
            write_atomically(path, b"new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"
