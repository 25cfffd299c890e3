"""Threads of the CPU kernels: a pool, and how a kernel's tasks are shared among them.

A kernel gives the same bits for any number of threads: what a task computes depends on the shapes alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from bnkernels.runtime import checks as check

VARIABLE = "BNKERNELS_NUM_THREADS"
WORTH_SHARING = 2**20  # numbers from which on threads save more than the 100 us that waking them takes

_pool: Any = None  # a ThreadPoolExecutor
_here = threading.local()  # has `worker` in threads of the pool
_threads = 0  # 0: not yet asked for
_given = False  # by `set_num_threads`


def get_num_threads() -> int:
    """Return the number of threads that compute large NumPy arrays.

    Returns
    -------
    int
        Number that `set_num_threads` was given; before, ``BNKERNELS_NUM_THREADS``, or the processors that this process
        may run on.
    """
    global _threads
    if not _threads:
        given = os.environ.get(VARIABLE, "")
        if given and not (given.isdecimal() and int(given) > 0):
            raise ValueError(f"{VARIABLE} must be a number of threads, at least 1, got {given!r}")
        _threads = int(given) if given else processors()
    return _threads


def set_num_threads(threads: int) -> None:
    """Set the number of threads that compute large NumPy arrays, of all that call from now on.

    Parameters
    ----------
    threads : int
        Number of threads, at least 1. Results do not depend on it.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is less than 1.
    """
    global _threads, _given
    _threads, _given = check.integer("threads", threads, 1), True
    _forget_pool()


def described() -> str:
    """Return the number of threads and where it comes from."""
    number = get_num_threads()
    if _given:
        return f"{number}, set by bnkernels.set_num_threads"
    return f"{number}, " + (f"set by {VARIABLE}" if os.environ.get(VARIABLE) else "the processors of this process")


def processors() -> int:
    """Return the number of processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def threads_for(tasks: int, size: int) -> int:
    """Return how many threads `share` takes for so many tasks that together read so many numbers."""
    if size < WORTH_SHARING or hasattr(_here, "worker"):  # within a task, it would wait for threads that wait for it
        return 1
    return max(1, min(get_num_threads(), tasks))


def share(work: Callable[..., Any], tasks: int, size: int, *arguments: Any) -> None:
    """Call ``work(*arguments, first, last)`` on ranges that make up all tasks, in threads if that pays.

    Parameters
    ----------
    work : callable
        Kernel that releases Python's lock.
    tasks : int
        Number of tasks.
    size : int
        Number of numbers that all tasks together read.
    *arguments
        First arguments of the kernel.
    """
    threads = threads_for(tasks, size)
    if threads == 1:
        work(*arguments, 0, tasks)
        return
    pool = _pool or _new_pool()
    ends = [tasks * number // threads for number in range(threads + 1)]
    others = [pool.submit(work, *arguments, first, last) for first, last in pairwise(ends[1:])]
    try:
        work(*arguments, 0, ends[1])
    finally:
        for other in others:  # before the caller may take its arrays away
            other.exception()
    for other in others:
        other.result()


def _new_pool() -> Any:
    global _pool
    from concurrent.futures import ThreadPoolExecutor  # takes as long to import as half of this package

    _pool = pool = ThreadPoolExecutor(get_num_threads(), "bnkernels", partial(setattr, _here, "worker", True))
    return pool


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child has no threads but the one that forked
