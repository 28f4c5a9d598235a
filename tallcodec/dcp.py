"""A task of a `.tall` file as a checkpoint of torch.distributed.checkpoint.

    dcp.load(state_dict, storage_reader=tallcodec.dcp.Reader("vision.tall", "cars"))

Importing this module needs PyTorch.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from . import frameworks
from .file import File
from .file import open as open_file
from .tensors import torch_dtype


class Reader(StorageReader):
    """Reads a task, or the base (None), in place: whole tensors, and rows of those whose shards are
    cut along dimension 0, are decoded into the caller's memory; other shards beside it, and copied.

    ``file`` is a path, opened with ``base`` as in :func:`tallcodec.open`, or an open
    :class:`tallcodec.File`. Every rank opens its own. Raises what opening raises, and
    TaskNotFoundError; what goes wrong in reading is said by the CheckpointException in which torch
    wraps it.
    """

    def __init__(
        self,
        file: str | os.PathLike | File,
        task: str | None,
        base: str | os.PathLike | Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._task, self._base = task, base
        self._file = file if isinstance(file, File) else open_file(file, "pt", base)
        self._file._number(task)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id:
            self._file = open_file(checkpoint_id, "pt", self._base)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return os.fspath(checkpoint_id).endswith(".tall")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """One chunk per tensor."""
        file = self._file
        number, tensors = file._number(self._task), {}
        for name in file._names(number):
            dtype, shape, _ = file._info(number, file._tensor(name))
            size = torch.Size(shape)
            chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=size)
            properties = TensorProperties(dtype=torch_dtype(dtype))
            tensors[name] = TensorStorageMetadata(properties, size, [chunk])
        places = {MetadataIndex(name, tensor.chunks[0].offsets): name
                  for name, tensor in tensors.items()}  # fmt: skip
        paths = {name: (name,) for name in tensors}
        return Metadata(tensors, paths, storage_data=places, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        whole = {}
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            if self._is_whole(item, target) and item.storage_index.fqn not in whole:
                whole[item.storage_index.fqn] = item, target
            else:
                self._read_part(item, target)
                planner.commit_tensor(item, target)
        self._file.decode(self._task, whole, {name: t for name, (_, t) in whole.items()})
        for item, target in whole.values():
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _is_whole(self, item: ReadItem, target: torch.Tensor) -> bool:
        dtype, shape = self._spec(item)
        return (
            not any(item.storage_offsets)
            and tuple(item.lengths) == shape
            and target.dtype == torch_dtype(dtype)
            and not frameworks.flaw(target)
        )

    def _read_part(self, item: ReadItem, target: torch.Tensor) -> None:
        file, name = self._file, item.storage_index.fqn
        dtype, shape = self._spec(item)
        offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
        if not shape:
            target.copy_(file.decode(self._task, [name])[name])
            return
        rows = offsets[0], offsets[0] + lengths[0]
        inner = (lengths[1:] != shape[1:], target.dtype != torch_dtype(dtype))
        if any(inner) or frameworks.flaw(target):
            part = torch.empty((lengths[0], *shape[1:]), dtype=torch_dtype(dtype))
            file.decode_rows(self._task, name, *rows, part)
            for dim in range(1, len(shape)):
                part = part.narrow(dim, offsets[dim], lengths[dim])
            target.copy_(part)
        else:
            file.decode_rows(self._task, name, *rows, target)

    def _spec(self, item: ReadItem) -> tuple[str, tuple[int, ...]]:
        file = self._file
        number = file._number(self._task)
        return file._info(number, file._tensor(item.storage_index.fqn))[:2]
