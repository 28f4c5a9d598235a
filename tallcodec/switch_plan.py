"""Which tensor of a file belongs where in a model."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import _core, frameworks, hf, numbers
from .errors import ArgumentError, SwitchError, TensorMismatchError
from .file import File, Loaded
from .tensors import dtype_name

_NAMED = 8  # tensors that a message names


class TaskPlanes(NamedTuple):
    """A task's planes where a model needs them."""

    task: str | None
    loaded: list[Loaded]  # one per device

    @property
    def nbytes(self) -> int:
        return sum(loaded.nbytes for loaded in self.loaded)


class Plan:
    """Which tensor of a file belongs where in a model, and what each task changes."""

    def __init__(self, file: File, model: Any, strict: bool):
        self._file = file
        self._model = model
        self._strict = strict
        self._in_file = set(file.tensors)
        self._targets = _targets(model, self._in_file)
        if not self._in_file & self._targets.keys():
            raise TensorMismatchError(
                f"none of the model's tensors ({_count('in all', list(map(repr, self._targets)))}) "
                f"is in the file ({_count('in all', list(map(repr, file.tensors)))})"
            )
        self._refuse_own_base()
        self._pointers = {name: t.data_ptr() for name, t in self._targets.items()}
        self._memory = _addresses(model)
        devices = {target.device for target in self._targets.values()}
        places = {device: _place(file, device) for device in devices}
        self._places = {name: places[t.device] for name, t in self._targets.items()}
        self._devices = sorted(set(places.values()))
        self._beside = {
            name for name, t in self._targets.items()
            if frameworks.flaw(t) or str(t.device) != self._places[name]
        }  # fmt: skip
        self._flat = {
            name: frameworks.flat(t) for name, t in self._targets.items()
            if name not in self._beside
        }  # fmt: skip
        self._streams: dict[str, Any] = {}
        self._kept: set[Any] = set()  # planes on devices that tasks share
        self._checked: set[str | None] = set()
        self._changes: dict[str, set[str]] = {}

    def _refuse_own_base(self) -> None:
        """A base in the memory that is to be switched would change with it."""
        base = self._file._base
        sources = [] if base is None else [
            (tensor.offset, tensor.offset + tensor.nbytes)
            for tensor in base.tensors.values() if tensor.fd < 0
        ]  # fmt: skip
        ours = {target.data_ptr() for target in self._targets.values() if target.numel()}
        if any(begin <= place < end for begin, end in sources for place in ours):
            raise ArgumentError("base is the model's own memory: pass a copy, or its checkpoint")

    def check(self, task: str | None) -> None:
        """Refuse a task whose tensors are not the model's."""
        if task in self._checked:
            return
        number = self._file._number(task)
        names = dict.fromkeys(self._file._names(number))
        owners = {self._pointers[name] for name in names if name in self._targets}
        found = {
            "of another dtype or shape": [
                text for name in names if name in self._targets
                for text in self._mismatch(number, name)
            ],
            "that cannot be written to": [
                f"{name!r} ({flaw})" for name in names if name in self._targets
                for flaw in _unwritable(self._targets[name])
            ],
            "that the model ties and the file does not": self._falsely_tied(names),
            "that only the file has": [repr(n) for n in names if n not in self._targets],
            "that only the model has": [
                repr(n) for n in self._targets
                if n not in names and (self._strict or n in self._in_file)
                and self._pointers[n] not in owners  # tied, and stored once
            ],
        }  # fmt: skip
        if not self._strict:
            del found["that only the file has"]
        flaws = [_count(what, which) for what, which in found.items() if which]
        if flaws:
            owner = "the base" if task is None else f"task {task!r}"
            raise TensorMismatchError(
                f"the model does not fit {owner}: {'; '.join(flaws)}. Load the model in the "
                "file's dtypes; leave out tensors of other shapes with a mapping that lacks them, "
                "and what only one side has with strict=False"
            )
        self._checked.add(task)

    def check_memory(self) -> None:
        """Refuse a model whose tensors have moved since."""
        now = _addresses(self._model)
        moved = [name for name, place in self._memory.items() if now.get(name) != place]
        if moved:
            raise SwitchError(
                f"the model has been moved or changed since (as by model.to()): "
                f"{_count('that are elsewhere', list(map(repr, moved)))}; make a new Switcher"
            )

    def names(self, task: str | None, before: TaskPlanes | None) -> list[str]:
        """What is to be written to get from one task to another, or from anything at all."""
        ours = [name for name in self._targets if name in self._in_file]
        if before is None:
            return ours
        touched = self._changed(task) | self._changed(before.task)
        return [name for name in ours if name in touched]

    def load(self, task: str | None) -> TaskPlanes:
        """A task's planes for the model's tensors, where these are. What they share with others on
        devices stays there until :meth:`close`."""
        names = self._file._names(self._file._number(task))
        loaded = []
        for place in self._devices:
            ours = [name for name in names if self._places.get(name) == place]
            loaded.append(self._file._load(task, ours, place))
            if not isinstance(loaded[-1]._planes, _core.Loaded):
                self._kept |= loaded[-1]._planes.shared
        return TaskPlanes(task, loaded)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A block in which work is queued on streams of its own, beside what the model does."""
        with contextlib.ExitStack() as streams:
            for place in self._devices:
                if place != "cpu":
                    import torch

                    stream = self._streams.get(place) or torch.cuda.Stream(place)
                    self._streams[place] = stream
                    streams.enter_context(torch.cuda.stream(stream))
            yield

    def write(self, planes: TaskPlanes, names: list[str]) -> None:
        """Decode tensors of a task to where they belong."""
        number, file = self._file._number(planes.task), self._file._file
        for loaded in planes.loaded:
            ours = [name for name in names if self._places[name] == loaded.device]
            direct = [name for name in ours if name not in self._beside]
            if isinstance(loaded._planes, _core.Loaded):
                requests = [(file.find_tensor(name), self._pointers[name]) for name in direct]
                self._file._decode(number, requests, loaded._planes)
            else:
                originals = (file.original(file.find_tensor(name)) for name in direct)
                loaded._planes.decode(zip(originals, (self._flat[name] for name in direct)))
            for name in ours:
                if name in self._beside:
                    self._copy(name, loaded)

    def close(self) -> None:
        """Let go of what is kept on devices."""
        self._kept.clear()

    def size(self, names: list[str]) -> int:
        return sum(self._targets[name].nbytes for name in names)

    def _copy(self, name: str, loaded: Loaded) -> None:
        import torch

        target = self._targets[name]
        value = torch.empty(target.shape, dtype=target.dtype, device=loaded.device)
        loaded.decode([name], {name: value})
        frameworks.copy(value, target.detach())

    def _changed(self, task: str | None) -> set[str]:
        """The tensors of a task that are not as the base's."""
        if task is None:
            return set()
        if task not in self._changes:
            file = self._file._file
            entries = file.entries(self._file._number(task))
            self._changes[task] = {
                name for name in self._targets.keys() & self._in_file
                if entries[file.original(file.find_tensor(name))]["coding"] != numbers.BASE
            }  # fmt: skip
        return self._changes[task]

    def _mismatch(self, number: int, name: str) -> list[str]:
        dtype, shape, _ = self._file._info(number, self._file._tensor(name))
        target = self._targets[name]
        ours = dtype_name(target.dtype) or str(target.dtype), tuple(target.shape)
        if ours == (dtype, shape):
            return []
        return [f"{name!r} (the model's {ours[0]} {ours[1]}, the file's {dtype} {shape})"]

    def _falsely_tied(self, names: Mapping[str, None]) -> list[str]:
        file, owners, flaws = self._file._file, {}, []
        for name, target in self._targets.items():
            if name in names and target.numel() and target.data_ptr():
                place = target.device, target.data_ptr(), tuple(target.shape), target.stride()
                first = owners.setdefault(place, name)
                if file.original(file.find_tensor(name)) != file.original(file.find_tensor(first)):
                    flaws.append(f"{name!r} with {first!r}")
        return flaws


def _state(model: Any) -> dict[str, Any]:
    """The tensors of a model by its own names."""
    import torch

    state = model if isinstance(model, Mapping) else model.state_dict()
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _addresses(model: Any) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in _state(model).items()}


def _targets(model: Any, names: set[str]) -> dict[str, Any]:
    """The tensors of a model by a file's names: the memory that is switched."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return hf.targets(model, names)
    return _state(model)


def _place(file: File, device: Any) -> str:
    """Where what belongs on a device is decoded: there, or on the CPU, to be copied."""
    there = device.type == "cuda" and file._backend(device) is not None
    return str(device) if there else "cpu"


def _unwritable(target: Any) -> list[str]:
    if target.device.type == "meta":
        return ["it has no memory, as of an offloaded model"]
    if any(size > 1 and stride == 0 for size, stride in zip(target.shape, target.stride())):
        return ["its elements share memory"]
    return []


def _count(what: str, which: list[str]) -> str:
    """ "12 tensors WHAT: a, b, ... and 4 more" """
    more = f" and {len(which) - _NAMED} more" if len(which) > _NAMED else ""
    return f"{len(which)} tensors {what}: {', '.join(which[:_NAMED])}{more}"
