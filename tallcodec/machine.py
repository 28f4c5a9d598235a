"""What the machine has: CPUs, which the `threads` argument defaults to, and memory."""

import os

from .errors import ArgumentError


def check_threads(threads: int | None) -> int:
    """``threads``, or one per CPU this process may use where it is None."""
    if threads is None:
        return len(os.sched_getaffinity(0))
    if not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads must be a whole number of at least 1, not {threads!r}")
    return min(threads, 1024)


def memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
