"""Whether a file is whole, and what it says of itself is true."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import _core, numbers
from .checkpoint import Checkpoint, open_checkpoint
from .errors import ArgumentError, BaseMismatchError, ChecksumError
from .file import File, inflate
from .info import Verification
from .progress import Progress, check_progress
from .proof import prove
from .repair import has_damaged_slot, repair


def verify(
    path: str | os.PathLike,
    base: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    tasks: Mapping[str, Any] | None = None,
    repair_from: str | os.PathLike | Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check every byte of a file: its structure, all checksums, that compressed planes decompress,
    and, where ``base`` is given, that it is the base that the file has, or references.

    ``tasks``: checkpoints (as :func:`encode` takes them) of tasks by name, all or some. Each task
    is proved to decode as near to its checkpoint as the file says: the same tensors; those that are
    stored as they are, bit for bit; and all others with a task vector of the length that the file
    has of it, and with the gain and error that ``inspect`` shows, but for rounding.

    ``repair_from``: another copy of the file, damaged elsewhere or not at all, made before a change
    of it or after, or a checkpoint it was encoded from. First, whatever is sound there of the
    damaged blocks of 64 KiB, by the file's checksums, is written over these in place, of another
    copy also the header or the index. Nothing else is written.

    Raises FormatError, ChecksumError naming every damaged plane with its tensor and task,
    BaseMismatchError or TaskMismatchError naming the tensor, ArgumentError, TaskNotFoundError,
    WriteError, and what opening a checkpoint raises.
    """
    if tasks is not None and not isinstance(tasks, Mapping):
        raise ArgumentError(f"tasks must map names to checkpoints, not be a {type(tasks).__name__}")
    repaired = 0 if repair_from is None else repair(path, repair_from, threads)
    with File(path, "np", base, threads=threads) as file:
        for task in tasks or ():
            file._number(task)
        found = _check(file, check_progress(progress))
        for task, checkpoint in (tasks or {}).items():
            with open_checkpoint(checkpoint) as opened:
                prove(file, task, opened)
        return replace(found, repaired=repaired, proved=len(tasks or ()))


def _check_base(file: File, name: str, base: Checkpoint, referenced: bool) -> None:
    """Whether a base that was given is the file's: where it is only referenced, decoding checks
    it."""
    ours = file.decode(None, [name])[name]
    if not referenced:
        dtype, shape, _ = file._info(_core.NONE, file._tensor(name))
        theirs = base.base_tensor(file._label, name, dtype, shape).read()
        if ours.tobytes() != theirs.tobytes():
            raise BaseMismatchError(
                f"{base.label} is not the base of {file._label}: tensor {name!r} has other values"
            )


def _check(file: File, progress: Progress | None) -> Verification:
    """Every byte of an open file."""
    core = file._file
    damaged = core.verify(file._threads, progress)
    if damaged:
        what = "; ".join(core.describe_all(sorted({plane for plane, _ in damaged})))
        raise ChecksumError(
            f"{file._label}: damaged, wrong checksums in: {what} (another copy of the file repairs "
            "it: repair_from=, --repair-from)"
        )
    planes = core.planes()
    for number, (_, coding, *_) in enumerate(planes):
        if coding == numbers.ZSTD:
            core.read_plane(number, inflate)
    referenced = any(coding == numbers.EXTERNAL for _, coding, *_ in planes)
    if file._base is not None:
        for name in file._names(_core.NONE):
            _check_base(file, name, file._base, referenced)
    return Verification(
        path=file._label,
        bytes=file._stat.st_size,
        tasks=len(file._tasks),
        tensors=len(core.tensors()),
        planes=len(planes),
        ignored=file._stat.st_size - core.size(),
        base_checked=not referenced or file._base is not None,
        damaged_slot=has_damaged_slot(file._header),
    )
