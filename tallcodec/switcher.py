"""A live model that is switched from task to task, in place."""

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from . import frameworks, hf, numbers
from .checkpoint import dtype_name
from .errors import ArgumentError, ClosedError, SwitchError, TensorMismatchError
from .file import File, Loaded
from .file import open as open_file
from .gate import Gate, Use

_NAMED = 8  # tensors that a message names


@dataclass(frozen=True)
class SwitchMetrics:
    """What a Switcher has done. Bytes are those of tensors written; of ``resident_bytes``, planes
    of tasks in memory now. ``hits`` and ``misses`` are switches whose task's planes were, or were
    not, in memory already (or on their way there)."""

    switches: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    tensors: int = 0
    bytes: int = 0
    milliseconds: float = 0.0
    last_milliseconds: float = 0.0
    resident_tasks: int = 0
    resident_bytes: int = 0


class Switcher:
    """Puts a live model on the tasks of a `.tall` file, one after the other, in place.

        switcher = tallcodec.Switcher(model, "vision.tall")
        switcher.switch("cars")
        with switcher.task("dtd"):
            model(images)                 # on "dtd"; afterwards on "cars" again

    Parameters keep their memory (``data_ptr``), so compiled modules, CUDA graphs and tied weights
    stay valid, and hold exactly what :meth:`File.decode` gives, after any number of switches: every
    value is computed from the base. Only tensors that either task changes are written. For
    inference: autograd is not told, and keeps no version of what it had.

    - ``model``: an ``nn.Module`` (or what torch.compile or DataParallel makes of one), or a mapping
      from the file's tensor names to the tensors to be switched, where names differ. Those of
      transformers' models are their checkpoints' (see :func:`tallcodec.hf.targets`). Tensors that
      are not contiguous memory of the CPU are decoded beside and copied. Whoever else writes to
      them, another Switcher too, is not noticed.
    - ``file``: a path, or an open :class:`File`, which stays open. ``base``: as in :func:`open`.
    - ``task``: what the model is put on at once; None is the base.
    - ``strict``: the model and each task have the same tensors. Otherwise what only one of them has
      is left alone; dtypes and shapes have to agree all the same. A head that is another in every
      task is left out with a mapping that lacks it.
    - ``budget``: bytes of planes that are kept in memory for tasks that the model is not on, the
      least recently used going first; None keeps all. A TALL task takes one bit per parameter, a
      ternary one two. Base and shared vector are used in the file's mapping.
    - ``guard``: forward passes of ``model`` (an ``nn.Module``) and switches wait for each other. In
      a model that is compiled, passes are not seen: use :meth:`task` there.

    Any number of threads may use one. Raises what :func:`open` and :meth:`switch` raise.
    """

    def __init__(
        self,
        model: Any,
        file: str | os.PathLike | File,
        *,
        base: Any = None,
        task: str | None = None,
        strict: bool = True,
        budget: int | None = None,
        guard: bool = True,
    ):
        model = _unwrapped(model)
        if not isinstance(model, Mapping) and not hasattr(model, "state_dict"):
            raise ArgumentError(
                f"model must be an nn.Module or a mapping of tensors, not {model!r}"
            )
        if not isinstance(file, (str, os.PathLike, File)):
            raise ArgumentError(f"file must be a path or a File, not a {type(file).__name__}")
        if isinstance(file, File) and base is not None:
            raise ArgumentError("base is for a path: open the file with its base")
        self._gate = Gate()
        self._lock, self._load_lock = threading.Lock(), threading.Lock()
        self._hooks: list[Any] = []
        weakref.finalize(self, _remove, self._hooks)
        self._loading = ThreadPoolExecutor(1, "tallcodec-prefetch")
        self._cache = _Cache(budget)
        self._metrics = SwitchMetrics()
        self._resources = contextlib.ExitStack()
        self._resources.callback(self._loading.shutdown, cancel_futures=True)  # waits
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._resources.close)
            self._file = (
                file
                if isinstance(file, File)
                else self._resources.enter_context(open_file(file, "pt", base))
            )
            self._plan = _Plan(self._file, model, strict)
            self._current: str | None = None
            self._home: str | None = None
            self._blocks = 0
            self._restoring = False  # to _home, when nobody uses the model
            self._closed = False
            self._held: Loaded | None = None  # of the current task; None: it is not known
            with self._gate.changing():
                self._put(task)
            self._home = task
            if guard and not isinstance(model, Mapping):
                self._hooks += _watch(model, self)
            on_error.pop_all()

    @property
    def current(self) -> str | None:
        """The task that the model is on; None is the base."""
        return self._current

    @property
    def tasks(self) -> list[str]:
        """The file's tasks, in its order."""
        return self._file.tasks

    @property
    def metrics(self) -> SwitchMetrics:
        """What has been done so far."""
        tasks, size, evictions = self._cache.size()  # the base has no planes of its own
        return replace(
            self._metrics, resident_tasks=tasks, resident_bytes=size, evictions=evictions
        )

    def switch(self, task: str | None) -> None:
        """Put the model on a task, or on the base (None), once no forward pass is running.

        Everything that will be read is checked before the first tensor is written; if writing
        fails all the same, what the model was on is put back. Raises TaskNotFoundError,
        TensorMismatchError, ChecksumError, BaseMismatchError, ReadError, and SwitchError where this
        thread is itself in a forward pass or in a block of :meth:`task`: the model is then as it
        was.
        """
        with self._gate.changing():
            self._put(task)
            self._home, self._restoring = task, False

    @contextlib.contextmanager
    def task(self, task: str | None, *, restore: bool = True) -> Iterator[None]:
        """A block in which the model stays on a task. Then it is put back on what :meth:`switch`
        last asked for, or, without ``restore``, left there for whoever comes next, as in a server.
        Threads may be in blocks of the same task at once; one that wants another waits. Raises what
        :meth:`switch` raises."""
        use = self._enter_block(task)
        try:
            yield
        finally:
            self._leave_block(use, restore)

    def prefetch(self, task: str | None) -> "Future[None]":
        """Bring a task's planes into memory, in a thread of its own. The future's result is None,
        or raises what :meth:`switch` would."""
        self._check_open()
        self._plan.check(task)

        def load() -> None:
            self._load(task)
            self._cache.trim(self._current)

        return self._loading.submit(load)

    def forget(self, task: str | None) -> None:
        """Let go of a task's planes in memory, if they are there: for who keeps account of them
        elsewhere. A task that the model is on stays; forgetting twice is harmless."""
        self._cache.drop(task)

    def close(self) -> None:
        """Let go of the model, which stays as it is, and of the file, once nobody uses it. Closing
        twice is harmless."""
        if self._closed:
            return
        with self._gate.changing():
            self._closed = True
            _remove(self._hooks)
        self._resources.close()
        self._cache.clear()
        self._held = None

    def __enter__(self) -> "Switcher":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tallcodec.Switcher on {self._current!r}, of {self._file!r}>"

    def _enter_block(self, task: str | None) -> Use:
        self._plan.check(task)
        use = self._gate.enter()
        if not self._is_on(task):
            self._gate.leave(use)
            with self._gate.changing(unless=lambda: self._is_on(task)) as found:
                if found is None:
                    self._put(task)
                use = found or self._gate.stay()
        with self._lock:
            self._blocks += 1
            self._restoring = False  # whoever leaves last sees to it
        self._gate.wake()
        return use

    def _is_on(self, task: str | None) -> bool:
        return self._current == task and self._held is not None

    def _leave_block(self, use: Use, restore: bool) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                if not restore:
                    self._home = self._current
                self._restoring = self._current != self._home
        self._gate.leave(use)
        if not self._gate.is_user():  # else the pass that it is in does so at its end
            self._restore()

    def _restore(self) -> None:
        """Put the model back where blocks have left it, once nobody uses it, unless there are new
        ones by then."""
        if self._restoring:
            with self._gate.changing(unless=lambda: not self._restoring) as use:
                if use is not None:
                    self._gate.leave(use)
                elif self._restoring:
                    self._put(self._home)
                    self._restoring = False

    def _begin_pass(self, frame: FrameType) -> Use:
        if self._gate.is_free():
            self._restore()
        use = self._gate.enter(frame)
        if self._held is None and not self._closed:
            self._gate.leave(use)
            raise SwitchError("the model is in between tasks, since a switch failed: switch it")
        return use

    def _end_pass(self, use: Use) -> None:
        self._gate.leave(use)
        if self._gate.is_free():  # else whoever is the last does so
            self._restore()

    def _put(self, task: str | None) -> None:
        """Write what differs. Called alone with the model."""
        start = time.perf_counter()
        self._check_open()
        self._plan.check(task)
        self._plan.check_memory()
        if self._held is not None and task == self._current:
            return
        try:
            loaded, hit = self._load(task)
            names = self._plan.names(task, self._held)
            self._file.check_unchanged()
            try:
                self._plan.write(loaded, names)
                self._file.check_unchanged()
            except BaseException as error:
                self._put_back(names, error)
                raise
            self._current, self._held = task, loaded
        finally:
            self._cache.trim(self._current)
        elapsed = 1e3 * (time.perf_counter() - start)
        done = self._metrics
        self._metrics = replace(
            done,
            switches=done.switches + 1,
            hits=done.hits + hit,
            misses=done.misses + (not hit),
            tensors=done.tensors + len(names),
            bytes=done.bytes + self._plan.size(names),
            milliseconds=done.milliseconds + elapsed,
            last_milliseconds=elapsed,
        )

    def _put_back(self, names: list[str], error: BaseException) -> None:
        """After a failure between writes."""
        held, self._held = self._held, None
        if held is not None:
            with contextlib.suppress(Exception):
                self._plan.write(held, names)
                self._file.check_unchanged()
                self._held = held
        if self._held is None:
            raise SwitchError(
                f"{error}; and what the model was on could not be put back: it is in between tasks "
                "until a switch succeeds"
            ) from error

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the Switcher was closed")
        self._file._file  # raises where the file was

    def _load(self, task: str | None) -> tuple[Loaded, bool]:
        """A task's planes, and whether they were in memory, or a prefetch was bringing them."""
        loaded = self._cache.get(task)
        if loaded is not None:
            return loaded, True
        with self._load_lock:
            loaded = self._cache.get(task)
            if loaded is not None:
                return loaded, True
            loaded = self._file.load(task)
            self._cache.put(task, loaded)
            return loaded, False


class _Hook:
    """A hook of a watched module. A copy of the module is not watched."""

    def __init__(self, run: Callable[[], None] | None = None):
        self._run = run

    def __call__(self, module: Any, *arguments: Any) -> None:
        if self._run is not None:
            self._run()

    def __reduce__(self):
        return _Hook, ()


def _watch(module: Any, switcher: Switcher) -> list[Any]:
    """Hooks by which forward passes count as use. They do not keep the Switcher alive."""
    import torch

    passes, compiling = threading.local(), torch.compiler.is_compiling
    of = weakref.ref(switcher)

    def begin() -> None:
        switcher = None if compiling() else of()
        if switcher is not None:
            uses = passes.__dict__.setdefault("uses", [])
            uses.append(switcher._begin_pass(sys._getframe(2)))  # of torch's call of the module

    def end() -> None:
        switcher = None if compiling() else of()
        if switcher is not None and passes.__dict__.get("uses"):
            switcher._end_pass(passes.uses.pop())

    return [
        module.register_forward_pre_hook(_Hook(begin), prepend=True),
        module.register_forward_hook(_Hook(end), always_call=True),
    ]


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()


class _Cache:
    """Planes in memory by task, the least recently used first; those of the task that a model is on
    do not count."""

    def __init__(self, budget: int | None):
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise ArgumentError(f"budget must be a number of bytes, not {budget!r}")
        self._budget = budget
        self._lock = threading.Lock()
        self._tasks: OrderedDict[str | None, Loaded] = OrderedDict()
        self._evictions = 0

    def get(self, task: str | None) -> Loaded | None:
        with self._lock:
            if task in self._tasks:
                self._tasks.move_to_end(task)
            return self._tasks.get(task)

    def put(self, task: str | None, loaded: Loaded) -> None:
        with self._lock:
            self._tasks[task] = loaded

    def trim(self, current: str | None) -> None:
        with self._lock:
            others = [t for t, loaded in self._tasks.items() if t != current and loaded.nbytes]
            size = sum(self._tasks[t].nbytes for t in others)
            for task in others:
                if self._budget is None or size <= self._budget:
                    break
                size -= self._tasks.pop(task).nbytes
                self._evictions += 1

    def drop(self, task: str | None) -> None:
        with self._lock:
            if self._tasks.pop(task, None) is not None:
                self._evictions += 1

    def clear(self) -> None:
        with self._lock:
            self._tasks.clear()

    def size(self) -> tuple[int, int, int]:
        with self._lock:
            sizes = [loaded.nbytes for task, loaded in self._tasks.items() if task is not None]
            return len(sizes), sum(sizes), self._evictions


class _Plan:
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
        self._beside = {name for name, t in self._targets.items() if frameworks.flaw(t)}
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

    def names(self, task: str | None, before: Loaded | None) -> list[str]:
        """What is to be written to get from one task to another, or from anything at all."""
        ours = [name for name in self._targets if name in self._in_file]
        if before is None:
            return ours
        touched = self._changed(task) | self._changed(before.task)
        return [name for name in ours if name in touched]

    def write(self, loaded: Loaded, names: list[str]) -> None:
        """Decode tensors of a task to where they belong."""
        number, file = self._file._number(loaded.task), self._file._file
        direct = [n for n in names if n not in self._beside]
        requests = [(file.find_tensor(name), self._pointers[name]) for name in direct]
        self._file._decode(number, requests, loaded._core)
        for name in names:
            if name in self._beside:
                self._copy(name, loaded)

    def size(self, names: list[str]) -> int:
        return sum(self._targets[name].nbytes for name in names)

    def _copy(self, name: str, loaded: Loaded) -> None:
        import torch

        target = self._targets[name]
        value = torch.empty(target.shape, dtype=target.dtype)
        loaded.decode([name], {name: value})
        with torch.no_grad():
            target.copy_(value)

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


def _unwritable(target: Any) -> list[str]:
    if target.device.type == "meta":
        return ["it has no memory, as of an offloaded model"]
    if any(size > 1 and stride == 0 for size, stride in zip(target.shape, target.stride())):
        return ["its elements share memory"]
    return []


def _unwrapped(model: Any) -> Any:
    """What torch.compile or DataParallel wraps: the same memory, under the names of checkpoints."""
    while True:
        wrapper = type(model).__name__
        if wrapper == "OptimizedModule":
            model = model._orig_mod
        elif wrapper in ("DataParallel", "DistributedDataParallel"):
            model = model.module
        else:
            return model


def _count(what: str, which: list[str]) -> str:
    """ "12 tensors WHAT: a, b, ... and 4 more" """
    more = f" and {len(which) - _NAMED} more" if len(which) > _NAMED else ""
    return f"{len(which)} tensors {what}: {', '.join(which[:_NAMED])}{more}"
