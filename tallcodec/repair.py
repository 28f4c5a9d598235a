"""Damaged blocks of a `.tall` file, restored from another copy or a checkpoint it was made of."""

import mmap
import os
import struct
from collections.abc import Callable
from typing import BinaryIO

from . import _core, numbers
from .checkpoint import Checkpoint, open_checkpoint
from .errors import ArgumentError, FormatError, label
from .file import File
from .output import changed_file
from .tensors import pread

_BLOCK = 65536  # bytes per checksum
_HEADER, _SLOTS = 192, (64, 128)
_SLOT = struct.Struct("<5Q16xQ")  # sequence, index offset, size and hash, file size; its own hash

Read = Callable[[int, int, int], bytes | None]
"""Of a plane, from an offset of the file, so many bytes: what they should be, or may be."""


def repair(path: str | os.PathLike, other: str | os.PathLike, threads: int | None) -> None:
    """Write over what is damaged in a file what ``other`` has in its place, where that is right by
    the file's checksums.

    May be interrupted at any point: nothing that is right is written over, and the index is right
    before the header names it. Raises ArgumentError where ``other`` is another file, WriteError.
    """
    real = os.path.realpath(path)
    with changed_file(path) as file:
        if _is_tall(other):
            with File(other, "np") as copy:
                _repair_head(file, label(path), copy)
                with File(real, "np", threads=threads) as damaged:
                    _repair_planes(file, damaged, lambda _, at, size: copy._map[at : at + size])
        else:
            with open_checkpoint(other) as given, File(real, "np", threads=threads) as damaged:
                _repair_planes(file, damaged, _planes_of(given, damaged))


def _is_tall(path: str | os.PathLike) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(5) == b"\x89TALL"


def _repair_head(file: BinaryIO, name: str, copy: File) -> None:
    """Header and index, where one of them is damaged and the other shows what file it is."""
    identity = copy._file.identity()
    header = copy._map[:_HEADER]
    _, begin, size, *_ = _slot_of(header, identity)
    length = os.fstat(file.fileno()).st_size
    found = _identity(file, length)
    if found == identity:
        return
    if found is None and length >= copy._file.size():
        index = pread(file, size, begin).tobytes()
        is_right = _core.kernels.hash(index) == identity
        is_named = _slot_of(pread(file, _HEADER, 0).tobytes(), identity) is not None
        if is_named and not is_right:
            return _write(file, copy._map[begin : begin + size], begin)
        if is_right and not is_named:
            return _write(file, header, 0)
    raise ArgumentError(
        f"{name}: cannot be repaired from {copy._label}: it is another file, or nothing that is "
        "left of header and index shows that it is not"
    )


def _identity(file: BinaryIO, length: int) -> int | None:
    if not length:
        return None
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            core = _core.File("", data)
            identity = core.identity()
            del core
            return identity
    except FormatError:
        return None


def _slot_of(header: bytes, identity: int) -> tuple[int, ...] | None:
    """The slot of a header that is sound and names the index of this checksum."""
    for at in _SLOTS:
        *fields, own = _SLOT.unpack_from(header, at)
        bytes_ = (header[:64] + header[at : at + 56]).ljust(128, b"\0")
        if fields[0] and fields[3] == identity and own == _core.kernels.hash(bytes_):
            return tuple(fields)
    return None


def _repair_planes(file: BinaryIO, damaged: File, read: Read) -> None:
    core = damaged._file
    try:
        blocks = core.verify(damaged._threads)
    except FormatError:
        return  # all checksums are right: another copy has nothing else
    planes = core.planes()
    for plane, block in blocks:
        _, _, offset, size, _ = planes[plane]
        begin = block * _BLOCK
        data = read(plane, offset + begin, min(_BLOCK, -(-size // 64) * 64 - begin))
        if data is not None and _core.kernels.hash(data) == core.sum(plane, block):
            _write(file, data, offset + begin)


def _write(file: BinaryIO, data: bytes, offset: int) -> None:
    """And have it on the disk before anything else is written."""
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
    os.fsync(file.fileno())


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
