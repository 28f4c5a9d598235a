"""Checkpoints in: files, folders and state dicts as named tensors, not yet read.

:func:`open_checkpoint` takes every kind of input and returns a :class:`Checkpoint`; writing is in
:mod:`tallcodec.checkpoint_write`. PyTorch is imported only when a torch file is opened, and no
file is ever unpickled freely.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ArgumentError, BaseMismatchError, CheckpointError, TallcodecError
from .tensors import DTYPES, Inputs, Tensor, from_memory, pread, read_error, require_file
from .torch_archive import open_torch, state_dict, unwrap

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_DIMS = 64  # NumPy's limit
_MAX_SIDE_FILE = 32 << 20
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


def is_side_file(name: str) -> bool:
    """Whether a Hugging Face folder's file of this name travels with the checkpoint.

    Configuration, tokenizer and text files do; weights, pickles, Python code, hidden files and
    whatever is not a plain name do not.
    """
    return bool(
        _SIDE_FILE.fullmatch(name) and name.isprintable() and not name.endswith(".index.json")
    )


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
    _inputs: Inputs = field(default_factory=Inputs, repr=False)

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

    def base_tensor(self, file: str, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, for a file that has the base's so. Raises BaseMismatchError where it is of
        another dtype or shape here, or missing."""
        found = self.tensors.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            has = "lacks it" if found is None else f"has {found.dtype} {found.shape}"
            raise BaseMismatchError(
                f"{file}: the base that was given is not the one the file was encoded against: "
                f"tensor {name!r} is {dtype} {shape}, {self.label} {has}"
            )
        return found

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
        inputs = on_error.enter_context(Inputs())
        if isinstance(source, Mapping):
            checkpoint = Checkpoint("state dict", "memory", from_memory(source, "state dict"))
        elif isinstance(source, (str, os.PathLike)):
            try:
                checkpoint = _open_path(Path(source), inputs)
            except TallcodecError:
                raise
            except OSError as error:
                raise read_error(error.filename or source, error) from error
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


def _open_path(path: Path, inputs: Inputs) -> Checkpoint:
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
        return Checkpoint(label, "torch", open_torch(path, inputs, unwrap))
    require_file(path)
    raise CheckpointError(
        f"{label}: unknown kind of checkpoint {path.suffix!r}: expected .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)} or a Hugging Face folder"
    )


# Hugging Face folders


def _open_folder(folder: Path, inputs: Inputs) -> Checkpoint:
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


def _open_weights(path: Path, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path, inputs)
    return open_torch(path, inputs, state_dict), {}


def _open_shards(index: Path, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, str]]:
    with Inputs() as index_only:
        file = index_only.open(index)
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_HEADER:
            raise CheckpointError(f"{index}: an index of {size} bytes, at most {_MAX_HEADER} taken")
        weight_map = _parse_json(pread(file, size, 0).tobytes(), index).get("weight_map")
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


def _open_safetensors(path: Path, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = inputs.open(path)
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(pread(file, 8, 0).tobytes(), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file: it announces a header of {length} "
            f"bytes where {size - 8} follow and at most {_MAX_HEADER} are taken; "
            "download or save it again"
        )
    header = _parse_json(pread(file, length, 8).tobytes(), path)
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
