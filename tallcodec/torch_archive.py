"""Torch files: their tensors where they lie in the zip archive, without torch reading them.

PyTorch is imported only when such a file is opened, and no file is ever unpickled freely.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, TallcodecError
from .tensors import Inputs, Tensor, dtype_name, from_memory, pread

_ZIP_RECORD = b"PK\x03\x04"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")  # torch.compile inside or outside of DDP


def open_torch(
    path: Path, inputs: Inputs, unwrap: Callable[[Any, str], Mapping[str, Any]]
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
            return from_memory({**state, **located}, label)
    return from_memory(unwrap(_load_torch(path), label), label)


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
        header = pread(file, 30, record.header_offset).tobytes()
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
    elements = torch.from_numpy(pread(file, length, begin)).view(tensor.dtype)
    return elements.as_strided(shape, strides).contiguous()


def _load_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=False)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        # What was found, without what PyTorch wraps it in: advice on how to load it all the same.
        found = error.__context__ or error
        reason = (str(found).strip() or type(found).__name__).splitlines()[0].split(" Please")[0]
        raise CheckpointError(
            f"{path}: torch.load(weights_only=True) refused it: {reason}\n"
            "The file is damaged, or holds Python objects, which are never unpickled here. If you "
            "trust it, load it yourself and save its state dict alone: "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error


def state_dict(loaded: Any, label: str) -> Mapping[str, Any]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{label}: holds a {type(loaded).__name__}, expected a state dict")
    return loaded


def unwrap(loaded: Any, label: str) -> Mapping[str, Any]:
    """The state dict inside what a torch file holds, its names without wrappers' prefixes."""
    for _ in range(8):  # a pickle can hold itself
        nested = [k for k, v in state_dict(loaded, label).items() if isinstance(v, Mapping)]
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


