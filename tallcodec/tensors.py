"""Tensors, not yet read: in the files of checkpoints, which are read with pread, and in memory."""

import ctypes
import functools
import io
import math
import os
import re
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .errors import ArgumentError, CheckpointError, ClosedError, ReadError


class DType(NamedTuple):
    """What a safetensors dtype name stands for."""

    itemsize: int
    numpy: np.dtype


DTYPES: dict[str, DType] = {
    name: DType(np.dtype(dtype).itemsize, np.dtype(dtype))
    for name, dtype in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "C64": "<c8", "BOOL": "?",
    }.items()
}
# NumPy, ml_dtypes and torch agree on these names: "float32", "bfloat16", "float8_e4m3fn", …
_SAFETENSORS_NAMES = {dtype.numpy.name: name for name, dtype in DTYPES.items()}

_LFS_POINTER = b"version https://git-lfs"
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: it has no UTF-8


def dtype_name(dtype: Any) -> str | None:
    """The safetensors name of a NumPy or torch dtype, of either byte order; None if it has none."""
    return _SAFETENSORS_NAMES.get(getattr(dtype, "name", str(dtype).removeprefix("torch.")))


@functools.cache
def torch_dtype(name: str):
    """The torch dtype of a safetensors dtype name (imports torch)."""
    import torch

    dtype = getattr(torch, DTYPES[name].numpy.name, None)
    if dtype is None:
        raise ArgumentError(f"torch {torch.__version__} has no dtype for {name}: a newer one has")
    return dtype


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a checkpoint, not yet read: little endian, C order, no gaps."""

    dtype: str
    """The safetensors name of the dtype, a key of :data:`DTYPES`."""
    shape: tuple[int, ...]
    fd: int
    """File descriptor to pread from, or -1 when the tensor is in memory."""
    offset: int
    """Byte offset in the file, or the address in memory."""
    owner: Any
    """The open file, or whatever keeps the memory alive."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """A copy of the bytes: uint8, shape ``(nbytes,)``.

        Raises ReadError when the file cannot be read or has become shorter, ClosedError when its
        checkpoint was closed.
        """
        if self.fd >= 0:
            return pread(self.owner, self.nbytes, self.offset)
        out = np.empty(self.nbytes, np.uint8)
        ctypes.memmove(out.ctypes.data, self.offset, self.nbytes)
        return out


class Inputs:
    """The files that a checkpoint is read from: open, each with its stat from then."""

    def __init__(self):
        self._files: dict[io.FileIO, os.stat_result] = {}

    def open(self, path: Path) -> io.FileIO:
        """Open an input that must exist and not be a git-lfs pointer."""
        require_file(path)
        file = open(path, "rb", buffering=0)
        self._files[file] = os.fstat(file.fileno())
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path}: a git-lfs pointer, expected the weights themselves: run `git lfs pull`"
            )
        file.seek(0)
        return file

    def identity(self) -> list[tuple[int, ...]]:
        stats = self._files.values()
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]

    def check_unchanged(self) -> None:
        for file, then in self._files.items():
            if file.closed:
                raise closed_error(file)
            refuse_changed(file.name, then, os.fstat(file.fileno()))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "Inputs":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def from_memory(mapping: Mapping[str, Any], label: str) -> dict[str, Tensor]:
    """The tensors of a state dict; what is a :class:`Tensor` already stays what it is."""
    torch = sys.modules.get("torch")  # who passes torch tensors has imported it
    memories: dict[Hashable, Any] = {}
    tensors = {}
    for name, value in mapping.items():
        where = f"{label}: tensor {name!r}"
        if not isinstance(name, str) or name == "__metadata__" or _SURROGATE.search(name):
            raise CheckpointError(f"{where}: this name cannot be stored: rename it")
        if isinstance(value, Tensor):
            tensors[name] = value
            continue
        if isinstance(value, (np.ndarray, np.generic)):
            value = np.asarray(value)
            describe, contiguous = _describe_numpy, _contiguous_numpy
        elif torch is not None and isinstance(value, torch.Tensor):
            describe, contiguous = _describe_torch, _contiguous_torch
        else:
            raise CheckpointError(
                f"{label}: {name!r} is a {type(value).__name__}, not a tensor: leave it out, or "
                "pass the state dict inside it"
            )
        identity = describe(value, where)
        dtype = dtype_name(value.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{where}: dtype {value.dtype} is not one that safetensors knows: convert it"
            )
        if identity not in memories:
            memories[identity] = contiguous(value)
        memory = memories[identity]
        address = memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data_ptr()
        # The original is kept too: while it lives, no other tensor can have its address.
        tensors[name] = Tensor(dtype, tuple(value.shape), -1, address, (memory, value))
    return tensors


def _describe_numpy(array: np.ndarray, where: str) -> Hashable:
    """Equal for arrays that are the very same memory, seen the same way."""
    return "numpy", array.ctypes.data, array.dtype.str, array.dtype.name, array.shape, array.strides


def _contiguous_numpy(array: np.ndarray) -> np.ndarray:
    """The array itself where it is in C order and little endian already."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _describe_torch(tensor, where: str) -> Hashable:
    """Equal for tensors that are the very same memory, seen the same way."""
    for refused, what in (
        (tensor.is_quantized, "quantized: dequantize it first"),
        (tensor.is_meta, "on the meta device and has no values: load the weights first"),
        (str(tensor.layout) != "torch.strided" or tensor.is_nested, "sparse: make it dense first"),
    ):
        if refused:
            raise CheckpointError(f"{where} is {what}")
    if tensor.numel() and not tensor.data_ptr():
        raise CheckpointError(
            f"{where} is a {type(tensor).__name__} without memory of its own: make it a plain "
            "tensor first (full_tensor() of a DTensor, dequantize() of a quantized one)"
        )
    flags = tensor.is_conj(), tensor.is_neg()
    shape, strides = tuple(tensor.shape), tensor.stride()
    return str(tensor.device), tensor.data_ptr(), str(tensor.dtype), shape, strides, flags


def _contiguous_torch(tensor):
    """The tensor itself where it is contiguous and on the CPU already."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def require_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, or a link that leads nowhere: check the path")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a regular file")


def pread(file: io.FileIO, nbytes: int, offset: int) -> np.ndarray:
    if file.closed:
        raise closed_error(file)
    out = np.empty(nbytes, np.uint8)
    done = 0
    while done < nbytes:
        try:
            count = os.preadv(file.fileno(), [out[done:]], offset + done)
        except OSError as error:
            raise read_error(file.name, error) from error
        if count == 0:
            raise ReadError(
                f"{file.name}: ended at byte {offset + done}, expected {offset + nbytes}: "
                "the file became shorter while it was read"
            )
        done += count
    return out


def read_error(path: str | os.PathLike, error: OSError) -> ReadError:
    result = ReadError(f"{path}: cannot be read: {error.strerror or error}")
    result.errno, result.filename = error.errno, os.fspath(path)
    return result


def closed_error(file: io.FileIO) -> ClosedError:
    return ClosedError(f"{file.name}: its checkpoint was closed")


def is_changed(then: os.stat_result, now: os.stat_result) -> bool:
    """Whether a file's stat says that it was written to in between."""
    return (now.st_mtime_ns, now.st_size) != (then.st_mtime_ns, then.st_size)


def refuse_changed(label: str | os.PathLike, then: os.stat_result, now: os.stat_result) -> None:
    """Raise ReadError where a file's stat says that it was written to in between."""
    if is_changed(then, now):
        raise ReadError(
            f"{label}: was written to while it was read: read it anew when nothing writes to it"
        )


