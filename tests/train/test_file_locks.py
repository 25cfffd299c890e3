"""Locks of files: one holder at a time, named to the others, and none that outlives its process."""

from __future__ import annotations

import errno
import os
import threading
import time
import types
from contextlib import suppress
from pathlib import Path

import pytest

from bnkernels.train import files
from bnkernels.train.files import InUseError, locked, write_atomically
from tests.train.test_files import names, started

HOLD = """
import sys, time
from bnkernels.train.files import locked
with locked(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def open_files() -> set[str]:
    """Return the paths of all files this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def test_a_second_holder_is_told_who_the_first_is_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = started(HOLD, path, 60)
    message = rf"file is in use by another run \(process {process.pid}\): wait for its end or stop it$"
    for _ in range(2):
        with pytest.raises(InUseError, match=message), locked(path):
            pass
    with locked(tmp_path / "other"):
        pass
    process.kill()
    process.communicate()
    with locked(path):
        assert names(tmp_path) == [".file.lock"]
    assert names(tmp_path) == []


def test_many_that_take_turns_are_never_two_at_once(tmp_path: Path) -> None:
    """The hidden file comes and goes while others wait for it: who locks one that is gone has locked nothing."""
    path, inside, most, turns = tmp_path / "file", [], [], []

    def take() -> None:
        while len(turns) < 200:
            try:
                with locked(path):
                    inside.append(None)
                    most.append(len(inside))
                    turns.append(None)
                    inside.pop()
            except InUseError:
                time.sleep(0)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert names(tmp_path) == []


def test_a_lock_of_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the hidden file, its holder may end and remove it, and the next one make another."""
    path, try_lock, lock = tmp_path / "file", files._try_lock, tmp_path / ".file.lock"

    def late(descriptor: int) -> bool:
        monkeypatch.setattr(files, "_try_lock", try_lock)
        lock.unlink()
        lock.write_text("the next one's")
        return try_lock(descriptor)

    monkeypatch.setattr(files, "_try_lock", late)
    with locked(path):
        assert lock.read_text() == str(os.getpid())
        with pytest.raises(InUseError), locked(path):
            pass


def test_a_planted_link_is_no_lock(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".file.lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"cannot be locked.*\.file\.lock"), locked(tmp_path / "file"):
        pass
    assert victim.read_bytes() == b"precious"


def test_without_locks_a_warning_says_so_and_files_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    path = tmp_path / "file"
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\): let no other run write"), locked(path):
        write_atomically(path, b"content")
    assert names(tmp_path) == ["file"]


def test_where_nothing_can_be_written_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "nowhere" / "file"):
        assert names(tmp_path) == []
    original = os.open

    def read_only(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with locked(tmp_path / "file"):
        assert names(tmp_path) == []


def test_windows_locks_a_byte_and_closes_what_it_renames_or_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in: it locks by `fcntl`, and refuses, as Windows does, to rename or remove what is open."""
    fcntl, path = files.fcntl, tmp_path / "file"

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (os.lseek(descriptor, 0, os.SEEK_CUR), mode, count) == (files.LOCKED_BYTE, "no wait", 1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def closed(path: object) -> None:
        if str(path) in open_files():
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK="no wait"), raising=False)
    for name in ("replace", "unlink"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, original=original: (closed(a[0]), original(*a))[1])
    with locked(path):
        with pytest.raises(InUseError, match=rf"process {os.getpid()}\)"), locked(path):
            pass
        (tmp_path / f".file.{'0' * 16}.partial").write_bytes(b"of a writer that was killed")
        write_atomically(path, b"content")
        assert names(tmp_path) == [".file.lock", "file"]
    assert names(tmp_path) == ["file"]
