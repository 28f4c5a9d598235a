"""Checkpoints out: safetensors files, torch files and Hugging Face folders, written atomically."""

import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .checkpoint import TORCH_SUFFIXES, is_side_file
from .errors import ArgumentError, OutputExistsError
from .output import (
    atomic_file,
    exists_error,
    place,
    sync_folder,
    synced_file,
    temporary_sibling,
    write_errors,
)
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
        return request(self.memory.ctypes.data, self.begin, self.memory.nbytes, dtype)


def request(address: int, begin: int, nbytes: int, dtype: str) -> tuple[int, int, int]:
    """The memory for some bytes of a tensor, from number ``begin`` on: its address, the first
    element and how many there are."""
    size = DTYPES[dtype].itemsize
    return address, begin // size, nbytes // size


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
        raise exists_error(path)

    # Inside of an existing folder, since that may be another file system than its parent.
    staging = temporary_sibling(target / "tallcodec" if exists else target)
    with write_errors(path):
        try:
            staging.mkdir()
            names = _write_folder_files(staging, specs, fill, metadata, files, limit)
            sync_folder(staging)
            if exists:
                _move_files(staging, target, names, overwrite)
            else:
                _rename_folder(staging, target)
            sync_folder(target if exists else target.parent)
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
        with synced_file(folder / name) as file:
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
        with synced_file(folder / name) as file:
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
            raise exists_error(target) from error
        raise


def _move_files(staging: Path, target: Path, names: list[str], overwrite: bool) -> None:
    """Move files into an existing folder, weights first, and remove the weights they replace."""
    moved = []
    try:
        for name in names:
            place(staging / name, target / name, overwrite)
            moved.append(name)
    except BaseException:
        if not overwrite:  # then every one of them is new
            for name in moved:
                (target / name).unlink()
        raise
    for name in os.listdir(target):
        if _WEIGHTS_NAME.fullmatch(name) and name not in names:
            (target / name).unlink()
