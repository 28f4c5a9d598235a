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

from .errors import ArgumentError, ClosedError, SwitchError
from .file import File
from .file import open as open_file
from .gate import Gate, Use
from .switch_plan import Plan, TaskPlanes


@dataclass(frozen=True)
class SwitchMetrics:
    """What a Switcher has done. Bytes are those of tensors written; of ``resident_bytes``, planes
    of tasks in memory now, of the CPU and of devices. ``hits`` and ``misses`` are switches whose
    task's planes were, or were not, in memory already (or on their way there). ``milliseconds`` are
    the host's: what is queued on a CUDA device may run longer."""

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
      transformers' models are their checkpoints' (see :func:`tallcodec.hf.targets`). Tensors on
      CUDA devices are decoded there, by work that is queued on the current stream: passes are to be
      on that stream, too, or ordered with it. Those that are not contiguous are decoded beside and
      copied. Whoever else writes to them, another Switcher too, is not noticed.
    - ``file``: a path, or an open :class:`File`, which stays open. ``base``, ``backend``: of a
      path, as in :func:`open`; a File has its own.
    - ``task``: what the model is put on at once; None is the base.
    - ``strict``: the model and each task have the same tensors. Otherwise what only one of them has
      is left alone; dtypes and shapes have to agree all the same. A head that is another in every
      task is left out with a mapping that lacks it.
    - ``budget``: bytes of planes that are kept in memory for tasks that the model is not on, the
      least recently used going first; None keeps all. A TALL task takes one bit per parameter, a
      ternary one two. Base and shared vector are used in the file's mapping; on a device they
      stay until the Switcher is closed, and do not count.
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
        backend: str | None = None,
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
        if isinstance(file, File) and backend is not None:
            raise ArgumentError("backend is for a path: open the file with it")
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
                else self._resources.enter_context(
                    open_file(file, "pt", base, backend=backend)
                )
            )
            self._plan = Plan(self._file, model, strict)
            self._current: str | None = None
            self._home: str | None = None
            self._blocks = 0
            self._restoring = False  # to _home, when nobody uses the model
            self._closed = False
            self._held: TaskPlanes | None = None  # of the current task; None: it is not known
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
            with self._plan.aside():
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
        self._plan.close()
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

    def _load(self, task: str | None) -> tuple[TaskPlanes, bool]:
        """A task's planes, and whether they were in memory, or a prefetch was bringing them."""
        loaded = self._cache.get(task)
        if loaded is not None:
            return loaded, True
        with self._load_lock:
            loaded = self._cache.get(task)
            if loaded is not None:
                return loaded, True
            loaded = self._plan.load(task)
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
        self._tasks: OrderedDict[str | None, TaskPlanes] = OrderedDict()
        self._evictions = 0

    def get(self, task: str | None) -> TaskPlanes | None:
        with self._lock:
            if task in self._tasks:
                self._tasks.move_to_end(task)
            return self._tasks.get(task)

    def put(self, task: str | None, loaded: TaskPlanes) -> None:
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
