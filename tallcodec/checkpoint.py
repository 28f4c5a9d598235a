"""Checkpoints in: files, folders and state dicts as named tensors, not yet read.

:func:`open_checkpoint` takes every kind of input and returns a :class:`Checkpoint`; writing is in
:mod:`tallcodec.checkpoint_write`. PyTorch is imported only when a torch file is opened, and no
file is ever unpickled freely.
"""

import ctypes
import io
import json
import math
import os
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .errors import ArgumentError, CheckpointError, ClosedError, ReadError, TallcodecError


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

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_ZIP_RECORD = b"PK\x03\x04"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_DIMS = 64  # NumPy's limit
_MAX_SIDE_FILE = 32 << 20
_LFS_POINTER = b"version https://git-lfs"
_LORA_NAME = re.compile(r"lora_(A|B|embedding|magnitude|down|up)")
# In the order in which transformers looks for them.
_FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SIDE_FILE = re.compile(
    r"[^./\\][^/\\]*\.(json|jsonl|txt|model|jinja|md|yaml|yml|tiktoken|bpe|vocab|codes)"
    r"|LICENSE|NOTICE"
)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: it has no UTF-8
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")  # torch.compile inside or outside of DDP


def dtype_name(dtype: Any) -> str | None:
    """The safetensors name of a NumPy or torch dtype, of either byte order; None if it has none."""
    return _SAFETENSORS_NAMES.get(getattr(dtype, "name", str(dtype).removeprefix("torch.")))


def torch_dtype(name: str):
    """The torch dtype of a safetensors dtype name (imports torch)."""
    import torch

    dtype = getattr(torch, DTYPES[name].numpy.name, None)
    if dtype is None:
        raise ArgumentError(f"torch {torch.__version__} has no dtype for {name}: a newer one has")
    return dtype


def is_side_file(name: str) -> bool:
    """Whether a Hugging Face folder's file of this name travels with the checkpoint.

    Configuration, tokenizer and text files do; weights, pickles, Python code, hidden files and
    whatever is not a plain name do not.
    """
    return bool(
        _SIDE_FILE.fullmatch(name) and name.isprintable() and not name.endswith(".index.json")
    )


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
            return _pread(self.owner, self.nbytes, self.offset)
        out = np.empty(self.nbytes, np.uint8)
        ctypes.memmove(out.ctypes.data, self.offset, self.nbytes)
        return out


class _Inputs:
    """The files that a checkpoint is read from: open, each with its stat from then."""

    def __init__(self):
        self._files: dict[io.FileIO, os.stat_result] = {}

    def open(self, path: Path) -> io.FileIO:
        """Open an input that must exist and not be a git-lfs pointer."""
        _require_file(path)
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
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]

    def check_unchanged(self) -> None:
        for file, then in self._files.items():
            if file.closed:
                raise _closed_error(file)
            refuse_changed(file.name, then, os.fstat(file.fileno()))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "_Inputs":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@dataclass(eq=False)
class Checkpoint:
    """An open checkpoint. A context manager; closing it twice is harmless."""

    label: str
    """What messages call it: the path, or "state dict"."""
    kind: str
    """"safetensors", "folder", "torch" or "memory"."""
    tensors: dict[str, Tensor]
    """By name, in sorted order."""
    metadata: dict[str, str] = field(default_factory=dict)
    """safetensors' ``__metadata__``, merged over shards."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The small files of a Hugging Face folder, by plain name (see :func:`is_side_file`)."""
    _inputs: _Inputs = field(default_factory=_Inputs, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def identity(self) -> list[tuple[int, ...]]:
        """What changes when a file of it does. Raises ArgumentError where it is in memory."""
        if self.kind == "memory":
            raise ArgumentError(
                "only checkpoints in files can be known again: save the state dict, or encode it "
                "without resume"
            )
        return self._inputs.identity()

    def check_unchanged(self) -> None:
        """Raise ReadError where a file was written to since it was opened: what was read of it may
        be of two states. One that was replaced by a rename is read as it was."""
        self._inputs.check_unchanged()

    def close(self) -> None:
        self._inputs.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_checkpoint(source: str | os.PathLike | Mapping[str, Any]) -> Checkpoint:
    """Open a checkpoint of any kind; the tensors' bytes are read only when asked for.

    ``source`` is the path of a `.safetensors` file, of a torch file (`.pt`, `.pth`, `.bin`,
    `.ckpt`) or of a Hugging Face folder, or a mapping of names to torch tensors or NumPy arrays.
    A torch file may nest its state dict under "state_dict", "model_state_dict", "model" or
    "module", and the prefixes "module." and "_orig_mod." are dropped where every name has them.

    Raises CheckpointError when the source is not a usable checkpoint, ReadError when the
    operating system cannot read it.
    """
    with ExitStack() as on_error:
        inputs = on_error.enter_context(_Inputs())
        if isinstance(source, Mapping):
            checkpoint = Checkpoint("state dict", "memory", _from_memory(source, "state dict"))
        elif isinstance(source, (str, os.PathLike)):
            try:
                checkpoint = _open_path(Path(source), inputs)
            except TallcodecError:
                raise
            except OSError as error:
                raise _read_error(error.filename or source, error) from error
        elif hasattr(source, "state_dict"):
            raise CheckpointError(
                f"a {type(source).__name__} is a module, not a checkpoint: pass its .state_dict()"
            )
        else:
            raise CheckpointError(
                f"a {type(source).__name__} is not a checkpoint: expected a path or a mapping of "
                "names to tensors"
            )
        if not checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.label}: the checkpoint holds no tensors")
        for name in checkpoint.tensors:
            if _LORA_NAME.search(name):
                raise _adapter_error(checkpoint.label, f"tensor {name!r}")
        checkpoint.tensors = dict(sorted(checkpoint.tensors.items()))
        checkpoint._inputs = inputs
        on_error.pop_all()
        return checkpoint


def _open_path(path: Path, inputs: _Inputs) -> Checkpoint:
    label = str(path)
    if path.is_dir():
        return _open_folder(path, inputs)
    if path.name.startswith("adapter_model."):
        raise _adapter_error(label, "an adapter's file name")
    if shard := _SHARD.search(path.name):
        raise CheckpointError(
            f"{label}: one shard of {int(shard[1])}, expected all of them: pass the folder"
        )
    if path.suffix == ".safetensors":
        tensors, metadata = _open_safetensors(path, inputs)
        return Checkpoint(label, "safetensors", tensors, metadata)
    if path.suffix in TORCH_SUFFIXES:
        return Checkpoint(label, "torch", _open_torch(path, inputs, _unwrap))
    _require_file(path)
    raise CheckpointError(
        f"{label}: unknown kind of checkpoint {path.suffix!r}: expected .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)} or a Hugging Face folder"
    )


# Hugging Face folders


def _open_folder(folder: Path, inputs: _Inputs) -> Checkpoint:
    label = str(folder)
    names = sorted(os.listdir(folder))
    for name in names:
        if name == "adapter_config.json" or name.startswith("adapter_model."):
            raise _adapter_error(label, name)
    weights = next((name for name in _FOLDER_WEIGHTS if name in names), None)
    if weights is None:
        others = [name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES))]
        hint = f"; to use {others[0]}, pass the path of that file" if others else ""
        raise CheckpointError(
            f"{label}: not a Hugging Face folder: expected one of {', '.join(_FOLDER_WEIGHTS)}"
            + hint
        )
    if weights.endswith(".index.json"):
        tensors, metadata = _open_shards(folder / weights, inputs)
    else:
        tensors, metadata = _open_weights(folder / weights, inputs)
    files = {name: _read_side_file(folder / name) for name in names if is_side_file(name)}
    files = {name: data for name, data in files.items() if data is not None}
    return Checkpoint(label, "folder", tensors, metadata, files)


def _open_weights(path: Path, inputs: _Inputs) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path, inputs)
    return _open_torch(path, inputs, _state_dict), {}


def _open_shards(index: Path, inputs: _Inputs) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _Inputs() as index_only:
        file = index_only.open(index)
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_HEADER:
            raise CheckpointError(f"{index}: an index of {size} bytes, at most {_MAX_HEADER} taken")
        weight_map = _parse_json(_pread(file, size, 0).tobytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to shard names")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # A plain name: an index must not reach outside of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^./\\\0][^/\\\0]*", shard):
            raise CheckpointError(
                f"{index}: tensor {name!r}: shard {shard!r} is not the plain name of a file"
            )
        if not shard.endswith(suffix):
            raise CheckpointError(
                f"{index}: tensor {name!r}: shard {shard!r}, expected a {suffix} file"
            )
        listed.setdefault(shard, set()).add(name)

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard, expected in sorted(listed.items()):
        shard_tensors, shard_metadata = _open_weights(index.parent / shard, inputs)
        for name in sorted(shard_tensors.keys() ^ expected):
            missing, holder = (shard, index.name) if name in expected else (index.name, shard)
            raise CheckpointError(
                f"{index.parent}: tensor {name!r} is in {holder} but not in {missing}: index and "
                "shards do not belong together; download or save the folder again"
            )
        tensors |= shard_tensors
        metadata |= shard_metadata
    return tensors, metadata


def _read_side_file(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > _MAX_SIDE_FILE:
        warnings.warn(f"{path}: left out: {size} bytes, at most {_MAX_SIDE_FILE} kept per file")
        return None
    return path.read_bytes()


# safetensors files


def _open_safetensors(path: Path, inputs: _Inputs) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = inputs.open(path)
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(_pread(file, 8, 0).tobytes(), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file: it announces a header of {length} "
            f"bytes where {size - 8} follow and at most {_MAX_HEADER} are taken; "
            "download or save it again"
        )
    header = _parse_json(_pread(file, length, 8).tobytes(), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")

    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(entry, f"{path}: tensor {name!r}")
        tensors[name] = Tensor(dtype, shape, file.fileno(), 8 + length + begin, file)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data, expected {position}: "
                + ("it overlaps another" if begin < position else "there is a hole before it")
            )
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            f"{path}: {size - 8 - length} bytes of data where the header describes {position}: "
            "truncated or extended; download or save it again"
        )
    return tensors, metadata


def _parse_entry(entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """The dtype, shape, begin and end of one tensor in a safetensors header, validated."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where}: the shape must be at most {_MAX_DIMS} whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets must be two whole numbers")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize  # Python integers: nothing overflows
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: data_offsets {begin} to {end}, but shape {shape} in {dtype} takes "
            f"{expected} bytes"
        )
    return dtype, tuple(shape), begin, end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file; duplicate keys are refused at every level."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"duplicate key {twice!r}")
        return result

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique)
        json.dumps(parsed, ensure_ascii=False).encode()  # refuses lone surrogates in names
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the JSON in it is not valid: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(parsed).__name__}")
    return parsed


# torch files


def _open_torch(
    path: Path, inputs: _Inputs, unwrap: Callable[[Any, str], Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The tensors of a torch file: where they lie in it, or, where one does not lie there as it is
    in memory, in memory all of them."""
    label = str(path)
    file = inputs.open(path)
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading a torch file needs PyTorch: install torch, or convert the file to "
            "safetensors"
        ) from error
    try:
        loaded = _unpickle_archive(file)
    except TallcodecError:
        raise
    except Exception:  # torch.load takes it all the same, or says what is wrong
        loaded = None
    if loaded is not None:
        state = unwrap(loaded, label)
        tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
        located = {name: _locate(name, tensor, file) for name, tensor in tensors.items()}
        if all(tensor is not None for tensor in located.values()):
            return _from_memory({**state, **located}, label)
    return _from_memory(unwrap(_load_torch(path), label), label)


def _unpickle_archive(file: io.FileIO) -> Any:
    """What torch.save put into a zip archive, without the tensors' values: they are on the meta
    device, and their storages have a `place`, where their bytes begin and end in the file.

    Raises CheckpointError where those are not all there, and anything else for another file or
    where they are not as they are in memory.
    """
    import torch

    if os.pread(file.fileno(), 4, 0) != _ZIP_RECORD:
        raise ValueError("the legacy format")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = names[0].partition("/")[0]
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise ValueError("big endian")
        storages = {}

        def load_storage(saved: tuple) -> Any:
            _, kind, key, _, count = saved
            if key not in storages:
                dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
                storage = torch.UntypedStorage(count * dtype.itemsize, device="meta")
                storage.place = _place(archive.getinfo(f"{root}/data/{key}"), file)
                storages[key] = torch.storage.TypedStorage(
                    wrap_storage=storage, dtype=dtype, _internal=True
                )
            return storages[key]

        # torch.load(weights_only=True) uses it too, but reads the values with the rest.
        unpickler = torch._weights_only_unpickler.Unpickler(
            io.BytesIO(archive.read(f"{root}/data.pkl")), encoding="utf-8"
        )
        unpickler.persistent_load = load_storage
        try:
            return unpickler.load()
        finally:
            torch._utils._sparse_tensors_to_validate.clear()  # the next torch.load would, in vain


def _place(record: zipfile.ZipInfo, file: io.FileIO) -> tuple[int, int]:
    """Where the bytes of an archive's record begin and end in the file."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    size = os.fstat(file.fileno()).st_size
    if 0 <= record.header_offset <= size - 30:
        header = _pread(file, 30, record.header_offset).tobytes()
        # The name and the extra field, which torch.save fills up so that the bytes are aligned.
        begin = record.header_offset + len(header) + sum(struct.unpack_from("<HH", header, 26))
        end = begin + record.file_size
        if header[:4] == _ZIP_RECORD and end <= size and record.compress_size == record.file_size:
            return begin, end
    raise CheckpointError(
        f"{file.name}: damaged: record {record.filename!r} of the archive is not where its "
        "directory says; download or save it again"
    )


def _locate(name: str, tensor: Any, file: io.FileIO) -> Any:
    """Where a tensor on the meta device lies in its archive, or a copy of it where its elements do
    not lie there in order; None where what lies there is not its values as they are in memory."""
    import torch

    dtype = dtype_name(tensor.dtype)
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_nested or tensor.is_conj() or tensor.is_neg() or dtype is None:
        return None
    place = getattr(tensor.untyped_storage(), "place", None)
    if place is None:
        return None
    shape, strides, itemsize = tuple(tensor.shape), tensor.stride(), tensor.itemsize
    begin, end = place[0] + tensor.storage_offset() * itemsize, place[1]
    located = Tensor(dtype, shape, file.fileno(), begin, file)
    in_order = tensor.is_contiguous()
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    length = located.nbytes if in_order else span * itemsize
    if begin + length > end:
        raise CheckpointError(
            f"{file.name}: damaged: tensor {name!r} takes {length} bytes where its storage has "
            f"{max(0, end - begin)} left; download or save it again"
        )
    if in_order:
        return located
    elements = torch.from_numpy(_pread(file, length, begin)).view(tensor.dtype)
    return elements.as_strided(shape, strides).contiguous()


def _load_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=False)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: torch.load(weights_only=True) refused it: {reason}\n"
            "The file is damaged, or holds Python objects, which are never unpickled here. If you "
            "trust it, load it yourself and save its state dict alone: "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error


def _state_dict(loaded: Any, label: str) -> Mapping[str, Any]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{label}: holds a {type(loaded).__name__}, expected a state dict")
    return loaded


def _unwrap(loaded: Any, label: str) -> Mapping[str, Any]:
    """The state dict inside what a torch file holds, its names without wrappers' prefixes."""
    for _ in range(8):  # a pickle can hold itself
        nested = [k for k, v in _state_dict(loaded, label).items() if isinstance(v, Mapping)]
        if not nested:
            break
        wrappers = [key for key in nested if key in _WRAPPERS]
        if len(wrappers) != 1:
            raise CheckpointError(
                f"{label}: which of its entries {', '.join(map(repr, nested))} is the state dict "
                "is not clear: load the file yourself and pass the one you mean"
            )
        loaded = loaded[wrappers[0]]
    else:
        raise CheckpointError(f"{label}: the state dict is nested too deeply")
    for prefix in _PREFIXES:
        if all(isinstance(name, str) and name.startswith(prefix) for name in loaded):
            loaded = {name.removeprefix(prefix): value for name, value in loaded.items()}
    return loaded


# Tensors in memory


def _from_memory(mapping: Mapping[str, Any], label: str) -> dict[str, Tensor]:
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


# Reading bytes


def _require_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, or a link that leads nowhere: check the path")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a regular file")


def _pread(file: io.FileIO, nbytes: int, offset: int) -> np.ndarray:
    if file.closed:
        raise _closed_error(file)
    out = np.empty(nbytes, np.uint8)
    done = 0
    while done < nbytes:
        try:
            count = os.preadv(file.fileno(), [out[done:]], offset + done)
        except OSError as error:
            raise _read_error(file.name, error) from error
        if count == 0:
            raise ReadError(
                f"{file.name}: ended at byte {offset + done}, expected {offset + nbytes}: "
                "the file became shorter while it was read"
            )
        done += count
    return out


def _read_error(path: str | os.PathLike, error: OSError) -> ReadError:
    result = ReadError(f"{path}: cannot be read: {error.strerror or error}")
    result.errno, result.filename = error.errno, os.fspath(path)
    return result


def _closed_error(file: io.FileIO) -> ClosedError:
    return ClosedError(f"{file.name}: its checkpoint was closed")


def refuse_changed(label: str | os.PathLike, then: os.stat_result, now: os.stat_result) -> None:
    """Raise ReadError where a file's stat says that it was written to in between."""
    if (now.st_mtime_ns, now.st_size) != (then.st_mtime_ns, then.st_size):
        raise ReadError(
            f"{label}: was written to while it was read: read it anew when nothing writes to it"
        )


def _adapter_error(label: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{label}: a LoRA/PEFT adapter ({found}), expected the full weights: merge it first "
        "(model.merge_and_unload(), then save_pretrained)"
    )


def refuse_input_as_output(output: str | os.PathLike, inputs: Iterable[Any]) -> None:
    """Raise ArgumentError where ``output`` is one of the checkpoints or files that are read for it.

    Replacing it would lose it: what is encoded cannot be decoded without loss.
    """
    if not os.path.exists(output):
        return
    for source in inputs:
        if not isinstance(source, (str, os.PathLike)):
            continue
        files = [source]
        if os.path.isdir(source):
            files += [os.path.join(source, name) for name in os.listdir(source)]
        if any(os.path.exists(file) and os.path.samefile(file, output) for file in files):
            raise ArgumentError(f"{os.fspath(output)!s}: is an input too: choose another path")
