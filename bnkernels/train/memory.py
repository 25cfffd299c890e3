"""How much memory there is, so that what cannot be held is refused before it is allocated."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Where a container is told its limit: control groups of version 2, and of version 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory() -> int | None:
    """Return the bytes of memory that this process can have at most.

    Returns
    -------
    int or None
        The machine's memory, or the limit of the container it runs in; None where the system does not say.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and another system may lack the names
        return None
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, int(limit.read_text(encoding="ascii")))
    return total
