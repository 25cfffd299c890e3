"""Files that are whole or absent, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

LOCKED_BYTE = 2**30  # Windows locks bytes, which nobody can read then: one far behind the text
# Errors of a file system that cannot flush: some FUSE, SMB and shared folders; and of Windows, which opens no folder.
CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF} | {errno.EACCES, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HELD = {
    errno.EAGAIN,
    errno.EWOULDBLOCK,
    errno.EACCES,
    errno.EDEADLK,
}  # errors of the lock calls where another process has the lock
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor wait for the other end of a planted pipe
READ_WRITE = os.O_RDWR | getattr(os, "O_BINARY", 0) | NO_LINK


class InUseError(OSError):
    """Another process holds the lock of a file; the message names both."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file in one step: whoever looks, even after a crash, finds the old content or the new, never a mix.

    Parameters
    ----------
    path : path
        The file to write; its folder must exist.
    content : bytes
        Whole new content.

    Raises
    ------
    OSError
        If the file cannot be written, is read-only for everybody, or is no plain file (a folder, a device, a pipe). The
        error names the file, and the old content is still there.

    Notes
    -----
    The content goes to a new file of a unique name beside the old one, which then takes its place: with its
    permissions, or with those of any new file where there was none. A symbolic link is replaced, and so is one of
    several hard links; what it stood for is never written to. What killed writers left beside the file is removed,
    where the file system has locks to tell them from those that still write.
    """
    path = Path(path)
    mode = check_replaceable(path)
    try:
        _remove_leftovers(path)
        _replace(path, content, mode)
    except OSError as error:
        if error.errno is None:
            raise
        way_out = ": free some space; what the file held before is still there" if error.errno in FULL else ""
        raise OSError(error.errno, f"{error.strerror}{way_out}", str(path)) from error
    _flush_folder(path.parent)  # the rename itself must reach the disk before the next step relies on it


def check_replaceable(path: Path) -> int | None:
    """Return the permissions of the file to be replaced, None if it is not there or a link; OSError if it must stay."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder is where a file is to be written", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a device or a pipe is where a file is to be written", str(path))
    if not mode & 0o222:
        raise PermissionError(errno.EACCES, "the file is read-only: make it writable or choose another", str(path))
    return mode & 0o777


def _replace(path: Path, content: bytes, mode: int | None) -> None:
    """Write the content to a new file and rename it; on any error, an interrupt included, it is gone again."""
    partial, descriptor = _create_partial(path, 0o666 if mode is None else mode)
    file = open(descriptor, "wb")
    try:
        file.write(content)
        file.flush()
        _flush(file.fileno())
        if mode is not None:
            with suppress(OSError):  # which is only wider than the mask of new files lets it be
                os.chmod(file.fileno() if os.chmod in os.supports_fd else partial, mode)
        if fcntl is None:
            file.close()  # Windows renames no open file
        os.replace(partial, path)  # still locked, so that nobody takes it for a leftover
    except BaseException:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(partial)
        raise
    file.close()


def _partial_prefix(path: Path) -> str:
    return f".{path.name[:32]}."  # the whole name could be too long with more behind it


def _create_partial(path: Path, mode: int) -> tuple[Path, int]:
    """Create a new file beside this one, locked, which tells others that its writer is alive."""
    flags = READ_WRITE | os.O_CREAT | os.O_EXCL
    while True:
        partial = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(8)}.partial")
        descriptor = os.open(partial, flags, mode)
        try:
            mine = _try_lock(descriptor) and _is_there(partial, descriptor)
        except OSError:
            mine = True  # no locks here, so nobody removes it either
        if mine:
            return partial, descriptor
        os.close(descriptor)  # another writer found it unlocked and removes it


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers of this file left; a living one holds the lock of its own."""
    pattern = re.compile(re.escape(_partial_prefix(path)) + r"[0-9a-f]{16}\.partial")
    names: list[str] = []
    with suppress(PermissionError):  # a folder may be one to write in and not to look at
        names = os.listdir(path.parent)
    for name in filter(pattern.fullmatch, names):
        with suppress(OSError):
            descriptor = os.open(path.with_name(name), READ_WRITE)
            try:
                dead = _try_lock(descriptor) and stat.S_ISREG(os.fstat(descriptor).st_mode)
            except OSError:
                dead = False
            if dead:
                _remove(path.with_name(name), descriptor)
            else:
                os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Have the disk hold what was written, as far as the file system can promise it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise


def _flush_folder(folder: Path) -> None:
    """Have the disk hold the names of a folder. Nothing is lost where that cannot be: the file is there already."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold a file, there already or not, against other runs, by the lock of a hidden file beside it.

    The lock ends with the process, however that ends, so that none is ever stale; the hidden file is removed at the end
    of the context, or by the next run. Where the folder is not there or nobody can write to it, there is nothing to
    hold. Where the file system has no locks (NFS without its lock service), a warning says so.

    Parameters
    ----------
    path : path
        The file.

    Raises
    ------
    InUseError
        If another process, or another thread of this one, holds it.
    OSError
        If the hidden file cannot be opened for another reason.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(lock, path)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                _remove(lock, descriptor)


def _acquire(lock: Path, path: Path) -> int | None:
    """Return the descriptor of the file that is now locked by this process; None where there can be none."""
    while (descriptor := _open_lock(lock)) is not None:
        try:
            mine = _try_lock(descriptor)
        except OSError as error:
            warnings.warn(f"{path.parent} has no locks ({error.strerror}): let no other run write there", stacklevel=4)
            return descriptor
        if not mine:
            holder = os.read(descriptor, 20).decode("ascii", errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise InUseError(f"{path} is in use by another run (process {holder}): wait for its end or stop it")
        if _is_there(lock, descriptor):
            with suppress(OSError):  # a number that cannot be written is only missed in a message
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)
    return None


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name: it may have been removed since it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _open_lock(lock: Path) -> int | None:
    """Open or create the file of a lock; one of another user can at least be read."""
    for flags in (READ_WRITE | os.O_CREAT, os.O_RDONLY | NO_LINK):
        try:
            return os.open(lock, flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
                raise OSError(error.errno, f"{error.strerror}, so the run cannot be locked", str(lock)) from error
    return None


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; False if another has it, OSError where the file system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in HELD:
            raise
        return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True


def _remove(path: Path, descriptor: int) -> None:
    """Remove a file that is locked through this descriptor, and end the lock: nobody else can take it in between."""
    if fcntl is None:
        os.close(descriptor)  # Windows removes no open file, so neither this one if another has it by now
        os.unlink(path)
        return
    try:
        os.unlink(path)
    finally:
        os.close(descriptor)
