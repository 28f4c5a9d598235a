"""Damaged blocks of a `.tall` file, restored from another copy or a checkpoint it was made of."""

import mmap
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

from . import _core, numbers
from .checkpoint import Checkpoint, open_checkpoint
from .errors import ArgumentError, FormatError, label
from .file import File
from .output import changed_file
from .tensors import pread

_BLOCK = 65536  # bytes per checksum

Read = Callable[[int, int, int], bytes | None]
"""Of a plane, from an offset of the file, so many bytes: what they should be, or may be."""


def repair(path: str | os.PathLike, other: Any, threads: int | None) -> int:
    """Write over what is damaged in a file what ``other`` has in its place, where that is right by
    the file's checksums. Gives how many blocks that were, header and index among them.

    May be interrupted at any point: nothing that is right is written over, and the index is right
    before the header names it. Raises ArgumentError where the file cannot be opened, and ``other``
    does not help; WriteError.
    """
    real = os.path.realpath(path)
    with changed_file(path) as file:
        if _is_tall(other):
            with File(other, "np") as copy:
                written = _repair_head(file, label(path), copy)
                with File(real, "np", threads=threads) as damaged:
                    return written + _repair_planes(
                        file, damaged, lambda _, at, size: copy._map[at : at + size]
                    )
        with open_checkpoint(other) as given, File(real, "np", threads=threads) as damaged:
            return _repair_planes(file, damaged, _planes_of(given, damaged))


def _is_tall(path: Any) -> bool:
    if isinstance(path, Mapping) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(5) == b"\x89TALL"


class _Slot(NamedTuple):
    is_right: bool
    sequence: int
    begin: int
    size: int
    identity: int  # the index's hash
    file_size: int


def _slots(header: bytes) -> list[_Slot | None]:
    """Those of a header; None for an empty one."""
    return [slot and _Slot(*slot) for slot in _core.slots(header)]


def has_damaged_slot(header: bytes) -> bool:
    return any(slot and not slot.is_right for slot in _slots(header))


def _repair_head(file: BinaryIO, name: str, copy: File) -> int:
    """Header and index, where one of them is damaged and the other shows that it is a copy."""
    length = os.fstat(file.fileno()).st_size
    theirs = copy._header
    header = pread(file, min(len(theirs), length), 0).tobytes()
    is_open, ours = _can_be_opened(file, length), _slots(header)
    latest = max((s for s in _slots(theirs) if s and s.is_right), key=lambda s: s.sequence)
    named = max((s for s in ours if s and s.is_right), key=lambda s: s.sequence, default=None)
    if named and named.sequence > latest.sequence:
        if not is_open:
            raise ArgumentError(
                f"{name}: what its last change wrote is damaged or cut off, and {copy._label} is "
                "from before that change"
            )
        return 0
    has_index = length >= latest.file_size and latest.identity == _core.kernels.hash(
        pread(file, latest.size, latest.begin)
    )
    if has_index and header != theirs and (not is_open or has_damaged_slot(header)):
        return _write(file, theirs, 0)
    if is_open:
        return 0
    if named == latest:  # it was cut short, or its index is damaged
        begin, end = latest.begin, latest.begin + latest.size
        if length < latest.file_size:
            begin, end = length, latest.file_size
        return _write(file, copy._map[begin:end], begin)
    raise ArgumentError(
        f"{name}: cannot be repaired from {copy._label}: it is another file, or nothing that is "
        "left of header and index shows that it is not"
    )


def _can_be_opened(file: BinaryIO, length: int) -> bool:
    if not length:
        return False
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            core = _core.File("", data)
            del core
    except FormatError:
        return False
    return True


def _repair_planes(file: BinaryIO, damaged: File, read: Read) -> int:
    core = damaged._file
    try:
        blocks = core.verify(damaged._threads)
    except FormatError:
        return 0  # all checksums are right: another copy has nothing else
    planes, written = core.planes(), 0
    for plane, block in blocks:
        _, _, offset, size, _ = planes[plane]
        begin = block * _BLOCK
        data = read(plane, offset + begin, min(_BLOCK, -(-size // 64) * 64 - begin))
        if data is not None and _core.kernels.hash(data) == core.sum(plane, block):
            written += _write(file, data, offset + begin)
    return written


def _write(file: BinaryIO, data: bytes, offset: int) -> int:
    """And have it on the disk before anything else is written."""
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
    os.fsync(file.fileno())
    return 1


def _planes_of(checkpoint: Checkpoint, damaged: File) -> Read:
    """Raw planes as a checkpoint would have them: those of the base, if it is that, and what is
    verbatim of a task. Which it is of which, the checksums say."""
    core = damaged._file
    planes = core.planes()
    at = {offset: number for number, (_, _, offset, *_) in enumerate(planes)}
    names: dict[int, list[str]] = {}
    for i, tensor in enumerate(core.tensors()):
        if tensor["in_base"]:
            for offset, _ in core.ranges(_core.NONE, i):
                names.setdefault(at[offset], []).append(tensor["name"])
    for task in range(len(core.tasks())):
        for tensor, entry in zip(core.tensors(), core.entries(task)):
            if entry["coding"] == numbers.VERBATIM and entry["plane"] is not None:
                names.setdefault(entry["plane"], []).append(tensor["name"])

    def read(plane: int, offset: int, size: int) -> bytes | None:
        _, coding, begin, length, _ = planes[plane]
        for name in names.get(plane, []):
            tensor = checkpoint.tensors.get(name)
            if coding == 0 and tensor is not None and tensor.nbytes == length:
                first = offset - begin
                source = (tensor.fd, tensor.offset + first)
                return _core.read_source(source, min(size, length - first)).ljust(size, b"\0")
        return None

    return read
