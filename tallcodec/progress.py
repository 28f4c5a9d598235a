"""How far a long operation is."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from .errors import ArgumentError

Progress = Callable[[str, int, int], object]
"""``progress(step, done, total)``: what is being done, and how many of its parts are. Called by the
thread that asked for the operation, some twenty times a second and at the end of each step. What it
raises ends the operation, as an error would."""


def check_progress(progress: Progress | None) -> Progress | None:
    if progress is not None and not callable(progress):
        raise ArgumentError(f"progress must be a function, not {progress!r}")
    return progress


@contextlib.contextmanager
def bar() -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal, for what takes longer than a second."""
    from tqdm import tqdm

    shown: list[tuple[str, tqdm]] = []
    start = time.monotonic()

    def progress(step: str, done: int, total: int) -> None:
        if not shown or shown[-1][0] != step or shown[-1][1].total != total:
            close()
            delay = max(0, start + 1 - time.monotonic())
            new = tqdm(
                desc=step, total=total, delay=delay, leave=False, disable=None, file=sys.stderr,
                bar_format="{desc} {percentage:3.0f} %|{bar}| {elapsed} < {remaining}",
            )  # fmt: skip
            shown.append((step, new))
        shown[-1][1].update(done - shown[-1][1].n)

    def close() -> None:
        while shown:
            shown.pop()[1].close()

    try:
        yield progress
    finally:
        close()
