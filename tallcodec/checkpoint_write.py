"""Checkpoints out: safetensors files, torch files and Hugging Face folders, written atomically."""

import errno
import fcntl
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .checkpoint import TORCH_SUFFIXES, is_side_file
from .errors import ArgumentError, OutputExistsError, TallcodecError, WriteError
from .machine import memory
from .progress import Progress
from .tensors import DTYPES, torch_dtype

Specs = Mapping[str, tuple[str, tuple[int, ...]]]


class Part(NamedTuple):
    """Memory for a tensor's bytes from number ``begin`` on: a uint8 array, C-contiguous."""

    name: str
    begin: int
    memory: np.ndarray

    def request(self, dtype: str) -> tuple[int, int, int]:
        """Where it lies, its first element and how many it has, of a tensor of this dtype."""
        size = DTYPES[dtype].itemsize
        return self.memory.ctypes.data, self.begin // size, self.memory.nbytes // size


class Partial(NamedTuple):
    """A file in the making, and one that says how far it is."""

    file: BinaryIO
    journal: BinaryIO | None = None


Fill = Callable[[list[Part]], None]

_BATCH_BYTES = 64 << 20
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}
_WEIGHTS_NAME = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)

_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")  # not that of Llama-3.1-8B


def write_checkpoint(
    path: str | os.PathLike,
    specs: Specs,
    fill: Fill,
    *,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a checkpoint, of the kind its path asks for; returns the paths of the files written.

    `.safetensors` is one safetensors file; `.pt`, `.pth`, `.bin` and `.ckpt` are a torch file with
    a plain dict (which needs torch, and the whole checkpoint in memory); a path without such an
    ending, one that ends with a slash, and an existing folder are a Hugging Face folder.

    ``specs`` maps each tensor's name to its safetensors dtype and its shape. ``fill`` is called
    with lists of parts of them, in all every byte once, and must fill their memory, which is valid
    during the call: at most 64 MiB, cut at multiples of that where a tensor is larger (a torch
    file's in one list, uncut).
    ``metadata`` goes into safetensors' ``__metadata__`` (a folder's says ``format: pt`` if nothing
    else, since transformers demands it). ``files`` are a folder's side files; other kinds have no
    place for them. ``max_shard_size`` ("5GB", or bytes) splits a folder's weights into shards.
    ``progress`` is called as ``progress("decoding", done, total)``, in bytes.

    The files appear complete or not at all; only where a folder is overwritten do they replace the
    old ones one by one. Raises OutputExistsError, WriteError (``errno`` and ``filename`` say
    which), ArgumentError, and whatever ``fill`` raises.
    """
    for name, (dtype, _) in specs.items():
        if dtype not in DTYPES:
            raise ArgumentError(f"tensor {name!r}: unknown dtype {dtype!r}")
        if name == "__metadata__":
            raise ArgumentError("safetensors files cannot hold a tensor named __metadata__")
    if progress is not None:
        fill = _watched(fill, sum(map(_nbytes, specs.values())), progress)
    as_folder = os.path.isdir(path) or os.fspath(path).endswith("/")
    path = Path(path)
    if not as_folder and path.suffix in (".safetensors", *TORCH_SUFFIXES):
        if max_shard_size is not None:
            raise ArgumentError(f"{path}: max_shard_size is for folders, not for a single file")
        with atomic_file(path, overwrite) as file:
            if path.suffix == ".safetensors":
                _write_safetensors(file, specs, fill, metadata or {})
            else:
                _write_torch(file, specs, fill)
        return [path]
    if not as_folder and (path.name == "-" or _SUFFIX.search(path.name)):
        raise ArgumentError(
            f"{path}: expected .safetensors, {', '.join(TORCH_SUFFIXES)}, or a folder: "
            "to make a folder of that name, end it with a slash"
        )
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    return _write_folder(path, specs, fill, metadata or {}, files or {}, limit, overwrite)


def _watched(fill: Fill, total: int, progress: Progress) -> Fill:
    done = 0

    def watched(parts: list[Part]) -> None:
        nonlocal done
        fill(parts)
        done += sum(part.memory.nbytes for part in parts)
        progress("decoding", done, total)

    return watched


def parse_size(size: int | str) -> int:
    """A number of bytes from 5000, "5000", "500MB" (powers of 1000) or "1.5GiB" (of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?I?B|)", str(size).strip().upper())
    nbytes = int(Decimal(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if nbytes < 1:
        raise ArgumentError(f"not a size: {size!r}; expected a number of bytes, or like '5GB'")
    return nbytes


@contextmanager
def atomic_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A new binary file, open for writing and reading, that appears under ``path`` when complete.

    The file is written beside ``path``; when the block ends it is synced to disk and renamed.
    When the block raises, nothing is left and what was at ``path`` is as it was. Whoever writes
    through ``fileno()`` leaves the buffered ``write()`` alone, or flushes first.

    Raises OutputExistsError when ``path`` exists and ``overwrite`` is false, even if it came to
    exist meanwhile, or when it is not a regular file; WriteError for the operating system's.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))  # a link stays one, and what it points to is replaced
    temporary = _temporary_sibling(target)
    with _write_errors(path):
        try:
            with _synced_file(temporary) as file:
                yield file
            _place(temporary, target, overwrite)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def resumable_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Partial]:
    """As :func:`atomic_file`, but when the block raises, or the process is killed, what was written
    stays beside ``path``, as `NAME.partial` and `NAME.partial.journal`, and is there again the next
    time; but for an ArgumentError the first time, which would be raised again.

    Raises WriteError, too, while another process has it open, and where those files are not ones
    that this function has left.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))
    partial = target.with_name(target.name + ".partial")
    name = target.with_name(target.name + ".partial.journal")
    with _write_errors(path), ExitStack() as stack:
        journal = stack.enter_context(_open_locked(name))
        is_new, file = not _size(journal), None
        try:
            file = stack.enter_context(_open_partial(partial, target, is_new))
            if not _size(file):
                os.ftruncate(journal.fileno(), 0)  # there is nothing that it could speak of
            yield Partial(file, journal)
            _sync(file)
            _place(partial, target, overwrite)
        except BaseException as error:
            if not _size(journal) or (is_new and isinstance(error, ArgumentError)):
                if file is not None:
                    partial.unlink(missing_ok=True)
                name.unlink(missing_ok=True)
            raise
        name.unlink(missing_ok=True)
        _sync_folder(target.parent)


def check_output(path: str | os.PathLike, overwrite: bool) -> None:
    """Raise OutputExistsError where :func:`atomic_file` would, as far as can be told beforehand."""
    if not overwrite and os.path.lexists(path):
        raise _exists_error(Path(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputExistsError(f"{path}: exists and is not a regular file: remove it yourself")


# Files


def _write_safetensors(
    file: BinaryIO, specs: Specs, fill: Fill, metadata: Mapping[str, str]
) -> None:
    """The safetensors format, its tensors sorted by falling item size so that all are aligned."""
    names = sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + _nbytes(specs[name])
        dtype, shape = specs[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)

    memory = np.empty(min(end, _BATCH_BYTES), np.uint8)
    for batch in batches(names, specs):
        ends = list(itertools.accumulate(size for _, _, size in batch))
        parts = [Part(name, begin, memory[to - size : to])
                 for (name, begin, size), to in zip(batch, ends)]  # fmt: skip
        fill(parts)
        file.write(memory[: ends[-1]])


def batches(names: Iterable[str], specs: Specs) -> Iterator[list[tuple[str, int, int]]]:
    """Lists of (name, first byte, bytes), at most 64 MiB each: whole tensors, or a piece of one
    that is too large."""
    batch: list[tuple[str, int, int]] = []
    room = _BATCH_BYTES
    for name in names:
        size = _nbytes(specs[name])
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH_BYTES
        for begin in range(0, size, _BATCH_BYTES) if size > room else (0,):
            piece = min(size - begin, _BATCH_BYTES)
            batch.append((name, begin, piece))
            room -= piece
            if begin + piece < size:
                yield batch
                batch, room = [], _BATCH_BYTES
    if batch:
        yield batch


def _write_torch(file: BinaryIO, specs: Specs, fill: Fill) -> None:
    try:
        import torch
    except ImportError as error:
        raise ArgumentError(
            "writing a torch file needs PyTorch: install torch, or write .safetensors"
        ) from error
    memories = {
        name: torch.empty(_nbytes(spec), dtype=torch.uint8, device="cpu")
        for name, spec in specs.items()
    }
    fill([Part(name, 0, memory.numpy()) for name, memory in memories.items()])
    state_dict = {
        name: memory.view(torch_dtype(specs[name][0])).reshape(specs[name][1])
        for name, memory in memories.items()
    }
    try:
        torch.save(state_dict, file)
    except RuntimeError as error:  # torch hides the operating system's error behind its own
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype].itemsize


# Folders


def _write_folder(
    path: Path,
    specs: Specs,
    fill: Fill,
    metadata: Mapping[str, str],
    files: Mapping[str, bytes],
    limit: int | None,
    overwrite: bool,
) -> list[Path]:
    for name in files:
        if not is_side_file(name):
            raise ArgumentError(f"{name!r} is not the name of a side file of a checkpoint")
    target = Path(os.path.realpath(path))
    exists = os.path.lexists(target)
    if exists and not target.is_dir():
        raise OutputExistsError(f"{path}: exists and is not a folder: choose another path")
    if exists and not overwrite and any(target.iterdir()):
        raise _exists_error(path)

    # Inside of an existing folder, since that may be another file system than its parent.
    staging = _temporary_sibling(target / "tallcodec" if exists else target)
    with _write_errors(path):
        try:
            staging.mkdir()
            names = _write_folder_files(staging, specs, fill, metadata, files, limit)
            _sync_folder(staging)
            if exists:
                _move_files(staging, target, names, overwrite)
            else:
                _rename_folder(staging, target)
            _sync_folder(target if exists else target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return [path / name for name in names]


def _write_folder_files(
    folder: Path,
    specs: Specs,
    fill: Fill,
    metadata: Mapping[str, str],
    files: Mapping[str, bytes],
    limit: int | None,
) -> list[str]:
    """Write all files of a folder; returns their names, weights first."""
    shards = _split(specs, limit)
    if len(shards) == 1:
        weights = ["model.safetensors"]
    else:
        count = len(shards)
        weights = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(weights, shards):
        with _synced_file(folder / name) as file:
            shard_specs = {tensor: specs[tensor] for tensor in shard}
            _write_safetensors(file, shard_specs, fill, {"format": "pt", **metadata})
    others = dict(sorted(files.items()))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_nbytes, specs.values()))},
            "weight_map": {tensor: w for w, shard in zip(weights, shards) for tensor in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        others = {"model.safetensors.index.json": text.encode(), **others}
    for name, data in others.items():
        with _synced_file(folder / name) as file:
            file.write(data)
    return [*weights, *others]


def _split(specs: Specs, limit: int | None) -> list[list[str]]:
    """Names in order, cut into shards of at most ``limit`` bytes or one larger tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs):
        size += _nbytes(specs[name])
        if limit is not None and size > limit and shards[-1]:
            shards.append([])
            size = _nbytes(specs[name])
        shards[-1].append(name)
    return shards


def _rename_folder(staging: Path, target: Path) -> None:
    try:
        os.rename(staging, target)  # refuses everything but an empty folder
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists_error(target) from error
        raise


def _move_files(staging: Path, target: Path, names: list[str], overwrite: bool) -> None:
    """Move files into an existing folder, weights first, and remove the weights they replace."""
    moved = []
    try:
        for name in names:
            _place(staging / name, target / name, overwrite)
            moved.append(name)
    except BaseException:
        if not overwrite:  # then every one of them is new
            for name in moved:
                (target / name).unlink()
        raise
    for name in os.listdir(target):
        if _WEIGHTS_NAME.fullmatch(name) and name not in names:
            (target / name).unlink()


# The file system


@contextmanager
def _synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, with the permissions the umask leaves, that is on disk when the block ends."""
    with open(path, "x+b") as file:
        yield file
        file.flush()
        _sync(file)


def _open_own(path: Path) -> BinaryIO:
    """A file of this user's that has no other name, or a new one."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        file.close()
        raise WriteError(
            errno.EEXIST, f"{path}: is no file that an interrupted encoding left: move it away"
        )
    return file


def _open_locked(path: Path) -> BinaryIO:
    """A file that no other process has open so, under its name."""
    while True:
        file = _open_own(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        except BlockingIOError as error:
            file.close()
            raise WriteError(error.errno, f"{path}: another process is writing it") from error
        file.close()  # whoever had it is done, and has removed it


def _open_partial(path: Path, target: Path, is_new: bool) -> BinaryIO:
    if path.exists() and target.exists() and os.path.samefile(path, target):
        path.unlink()  # a process was killed when all was done but this
    file = _open_own(path)
    if is_new and _size(file):
        file.close()
        raise WriteError(
            errno.EEXIST, f"{path}: is there without the journal of an encoding: move it away"
        )
    return file


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _sync(file: BinaryIO) -> None:
    os.fsync(file.fileno())
    if _size(file) > memory() // 2:
        # Little else would be left in the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file its name; without ``overwrite``, only if nothing has that name."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, it never replaces
    except FileExistsError as error:
        raise _exists_error(path) from error
    except OSError:  # a file system without links: claim the name, then replace what we own
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        except FileExistsError as error:
            raise _exists_error(path) from error
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
    else:
        temporary.unlink()


def _temporary_sibling(path: Path) -> Path:
    # Names the output, if a killed process leaves it behind, and is short whatever that is called.
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename that has happened survive a crash, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into a WriteError that names ``path``."""
    try:
        yield
    except TallcodecError:  # a ReadError is an OSError too
        raise
    except OSError as error:
        folder = Path(path).parent
        why = error if folder.is_dir() else f"there is no folder {folder}: make it first"
        result = WriteError(f"{path}: cannot be written: {why}")
        result.errno, result.filename = error.errno, str(path)
        raise result from error


def _exists_error(path: Path) -> OutputExistsError:
    result = OutputExistsError(
        f"{path}: exists already: choose another path, or allow it to be replaced (overwrite=True, "
        "--overwrite)"
    )
    result.errno, result.filename = errno.EEXIST, str(path)
    return result
