"""An open `.tall` file: tasks out of it, as tensors, lazily, or as checkpoint files."""

import builtins
import contextlib
import errno
import math
import mmap
import operator
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import zstandard

from . import _core, frameworks, numbers
from .backends import Backend, choose, forced
from .checkpoint import Checkpoint, open_checkpoint, refuse_input_as_output
from .checkpoint_write import Part, batches, write_checkpoint
from .errors import (
    ArgumentError,
    ClosedError,
    FormatError,
    ReadError,
    TaskNotFoundError,
    TensorMismatchError,
    TensorNotFoundError,
    label,
)
from .info import FileInfo, read_info
from .machine import check_threads
from .progress import Progress, check_progress
from .tensors import DTYPES, is_changed, pread, refuse_changed

# What is mapped counts as the process's memory: of a file that is larger, the pages that were read
# are let go of whenever a quarter of this has been decoded.
_MAPPED = 384 << 20
# All small files of a checkpoint, in bytes: a stranger's file may name the same plane ever again.
_MAX_FILES = 1 << 30
_DTYPE_NAMES = {number: name for name, number in numbers.DTYPES.items()}


def open(
    path: str | os.PathLike,
    framework: str = "pt",
    base: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    threads: int | None = None,
    verify: bool = True,
    backend: str | None = None,
) -> "File":
    """Open a `.tall` file.

    ``framework`` says what tensors are made of: "pt" (PyTorch) or "np" (NumPy, with ml_dtypes'
    bfloat16 and float8). ``base`` is the base checkpoint, needed where the file only references
    it. ``threads``: for decoding; default, one per CPU. ``verify=False`` leaves the checksums of
    what is decoded unchecked (never those of header and index). ``backend``: what decodes to
    devices, "cpu", "cuda" or "triton" (see :func:`tallcodec.backends`); "cpu" decodes on the CPU
    and copies. Default: what TALLCODEC_BACKEND says, or else what there is for a device.

    The file is mapped: replace it by renaming another over it, as everything here does, or change
    it by :func:`tallcodec.add` and :func:`tallcodec.remove`, which leave what is there in its
    place: what is open stays what it was. One that is cut short in place while it is open is a
    ReadError, or, while it is read, ends the process.

    Raises FormatError (VersionError, ChecksumError) when it is not a sound `.tall` file,
    ReadError when it cannot be read, ArgumentError for a back-end that is not here, and what
    opening a checkpoint raises for ``base``.
    """
    return File(path, framework, base, threads=threads, verify=verify, backend=backend)


class File:
    """A `.tall` file, open for reading. Made by :func:`open`.

    Immutable: any number of threads may use one at once. It can be pickled (by its path), and
    unpickling fails where another file is under that path by then, or tasks were added to it or
    removed: open it again. A context manager; closing it twice is harmless, and closing it while
    another thread decodes either lets that thread finish or makes it raise ClosedError before it
    has written anything.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        framework: str = "pt",
        base: str | os.PathLike | Mapping[str, Any] | None = None,
        *,
        threads: int | None = None,
        verify: bool = True,
        backend: str | None = None,
    ):
        self._core: _core.File | None = None
        self._base: Checkpoint | None = None
        self._framework = frameworks.check_framework(framework)
        forced(backend)  # refuses what is not there
        self._forced = backend
        self._threads = check_threads(threads)
        self._check = verify
        self._path = os.path.abspath(path)
        self._label = label(path)
        self._base_source = os.path.abspath(base) if isinstance(base, (str, os.PathLike)) else base
        try:
            data = self._open()
        except OSError as error:
            message = f"{self._label}: cannot be read: {error.strerror}"
            if error.errno == errno.EISDIR:
                message += "; is it a checkpoint? `tallcodec encode` makes .tall files of those"
            raise ReadError(error.errno, message) from error
        self._map = data or None
        self._decoded = 0  # since pages were let go of
        self._on_device: dict[Any, Any] = {}  # planes that tasks share there: device.Residents
        if base is not None:
            self._base = open_checkpoint(base)
            # Not before the last decoding that uses it has ended: see close.
            weakref.finalize(self._base, self._base._inputs.close)
        self._tasks = {task["name"]: number for number, task in enumerate(self._core.tasks())}

    def _open(self) -> mmap.mmap | bytes:
        """The mapped file, parsed. It may grow before its header is read, and be longer by it than
        what is mapped."""
        with builtins.open(self._path, "rb", buffering=0) as file:
            while True:
                self._stat = os.fstat(file.fileno())
                size = self._stat.st_size
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
                try:
                    self._core = _core.File(self._label, data)
                    self._header = data[:192]
                    self._seen = os.fstat(file.fileno())  # what is written from now on is noticed
                    return data
                except FormatError:
                    if os.fstat(file.fileno()).st_size <= len(data):
                        raise

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order in which they were encoded."""
        return list(self._tasks)

    @property
    def tensors(self) -> list[str]:
        """The names of all tensors, of the base and of all tasks, sorted."""
        return [tensor["name"] for tensor in self._file.tensors()]

    @property
    def info(self) -> FileInfo:
        """What the file holds, what it costs, and how close each task comes."""
        return read_info(self._label, self._stat.st_size, self._file)

    def metadata(self, task: str | None = None) -> dict[str, str]:
        """The ``__metadata__`` of a task's checkpoint, or of the base's."""
        scope = self._scope(task)
        return {key: value for s, key, value in self._file.metadata() if s == scope}

    def files(self, task: str | None = None) -> dict[str, bytes]:
        """The small files (configuration, tokenizer) of a task's folder, or of the base's."""
        scope = self._scope(task)
        file = self._file
        found = [(name, plane) for s, name, plane in file.files() if s == scope]
        planes = file.planes()
        size = sum(planes[plane][4] for _, plane in found if plane is not None)
        if size > _MAX_FILES:
            raise FormatError(
                f"{self._label}: the small files of {'the base' if task is None else repr(task)} "
                f"are {size:,} bytes; more than {_MAX_FILES:,} are not believed"
            )
        data = {plane: file.read_plane(plane, inflate) for _, plane in found if plane is not None}
        return {name: b"" if plane is None else data[plane] for name, plane in found}

    def decode(
        self,
        task: str | None,
        tensors: Iterable[str] | None = None,
        out: Mapping[str, Any] | None = None,
        device: Any = None,
    ) -> dict[str, Any]:
        """Decode a task's checkpoint, or those of its tensors named in ``tensors``.

        Gives name -> tensor, in the fine-tuned checkpoint's own dtypes and shapes. Each has memory
        of its own, tied ones too: equal bytes do not tell a tie from two biases that are both
        zero. ``out`` maps names to torch tensors or NumPy arrays of just these dtypes and
        shapes, contiguous, on the CPU or on CUDA devices, or to whatever else gives such memory by
        ``__dlpack__``, to decode into; they are undefined where decoding fails. ``device`` ("cuda",
        a torch.device) is where new tensors are made, and where those of ``out`` have to be; by
        default the CPU, and wherever they are.
        A ``task`` of None is the base.

        What goes to a CUDA device is decoded there, by a back-end (see
        :func:`tallcodec.backends`): checksums are looked at here, planes go there as they are
        stored, and work is queued on the device's current stream; only copies to the device are
        waited for, and once for coded planes to be unpacked.

        Raises TaskNotFoundError, TensorNotFoundError, TensorMismatchError, ArgumentError before
        anything is written; ChecksumError, FormatError, BaseMismatchError, ReadError on bad bytes.
        """
        number = self._number(task)
        result, groups = self._targets(number, tensors, out, device)
        backends = {where: self._backend(where) for where in groups}  # before anything is written
        for where, targets in groups.items():
            self._decode_to(where, backends[where], number, targets)
        return result

    def decode_rows(
        self,
        task: str | None,
        tensor: str,
        start: int,
        stop: int,
        out: Any = None,
        device: Any = None,
    ) -> Any:
        """Decode rows ``start`` to ``stop`` (exclusive) of a tensor, the indices on dimension 0:
        what is stored of the others is hardly touched.

        Gives a tensor of the same dtype with ``stop - start`` rows: ``out``, where it is given.
        ``out`` and ``device`` are as in :meth:`decode`. Raises what that raises, and ArgumentError
        for rows the tensor does not have.
        """
        number = self._number(task)
        index = self._tensor(tensor)
        dtype, shape, _ = self._info(number, index)
        if not shape:
            raise ArgumentError(f"tensor {tensor!r} is a scalar: it has no rows")
        try:
            start, stop = operator.index(start), operator.index(stop)
        except TypeError as error:
            raise ArgumentError(f"rows are whole numbers, not {start!r} to {stop!r}") from error
        if not 0 <= start <= stop <= shape[0]:
            raise ArgumentError(
                f"rows {start} to {stop} of tensor {tensor!r}: it has rows 0 to {shape[0]}"
            )
        part = (stop - start, *shape[1:])
        device = self._device(device)
        if out is None:
            out = memory = frameworks.empty(self._framework, dtype, part, device)
        else:
            memory = frameworks.memory(tensor, out, dtype, part, device)
        row = math.prod(shape[1:])
        rows = _Target(index, frameworks.flat(memory), dtype, part[0] * row, start * row)
        where = frameworks.device_of(memory)
        self._decode_to(where, self._backend(where), number, [rows])
        return out

    def load(self, task: str | None, device: Any = None) -> "Loaded":
        """A task's own planes in memory, unpacked, to decode from at the speed of memory, again and
        again. Everything it will be decoded from, base and shared vector too, is checked once, now.
        The base (None) has none of its own.

        It takes one bit per parameter of a TALL task and two of a ternary one, and uses the file,
        which stays open for it. ``device`` ("cuda", a torch.device) has the planes there, and those
        of the base and the shared vector too, once for all tasks of this File that are loaded
        there, until the last of them is let go of. Raises what :meth:`decode` raises.
        """
        return self._load(task, self._names(self._number(task)), device)

    def state_dict(self, task: str | None, device: Any = None) -> "StateDict":
        """A task's checkpoint as a lazy mapping: each tensor is decoded when it is asked for, anew
        each time, on the CPU or on ``device``. Works as ``state_dict=`` for ``load_state_dict`` and
        ``from_pretrained``.
        """
        self._number(task)
        return StateDict(self, task, self._device(device))

    def save(
        self,
        task: str | None,
        path: str | os.PathLike,
        *,
        max_shard_size: int | str | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> list[str]:
        """Decode a task into a checkpoint: a `.safetensors` file, a torch file, or, where the path
        has no such ending, a Hugging Face folder with the task's small files.

        ``max_shard_size`` ("5GB", or bytes) splits a folder's weights. ``progress`` is called as
        ``progress("decoding", done, total)``, in bytes; what it raises ends the saving, and nothing
        is left of it. Returns the files written.
        Raises what :meth:`decode` raises, OutputExistsError, WriteError and ArgumentError.
        """
        number = self._number(task)
        forced(self._forced)
        refuse_input_as_output(path, (self._path, self._base_source))
        ids = {name: self._file.find_tensor(name) for name in self._names(number)}
        specs = {name: self._info(number, tensor)[:2] for name, tensor in ids.items()}

        def fill(parts: list[Part]) -> None:
            self._decode(number, [(ids[p.name], *p.request(specs[p.name][0])) for p in parts])
            self._unmap()

        written = write_checkpoint(
            path,
            specs,
            fill,
            metadata=self.metadata(task),
            files=self.files(task),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=check_progress(progress),
        )
        return [os.fspath(p) for p in written]

    def check_unchanged(self) -> None:
        """Raise ReadError where the file, or the base, was written to in place since it was opened:
        what is read of it is no longer what was checked. One that was replaced by a rename stays as
        it was; to one that tasks were added to, or removed from, nothing was done that matters."""
        base = self._base  # kept, and so its descriptors, until this is done
        if base is not None:
            base.check_unchanged()
        try:
            now = os.stat(self._path)
        except OSError:
            return
        if not os.path.samestat(now, self._stat):
            return
        if not is_changed(self._seen, now) or not is_changed(self._stat, now):
            return
        if not self._is_extended():
            refuse_changed(self._label, self._stat, now)
        self._seen = now

    def _is_extended(self) -> bool:
        """Whether a file that was written to has its index where it was, and more: what an
        addition, a removal, or a part of one leaves."""
        offset, size = self._file.index_range()
        with builtins.open(self._path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            if length < self._file.size():
                return False
            header = os.pread(file.fileno(), len(self._header), 0)
            index = pread(file, size, offset)
        more = length > self._file.size() or header != self._header
        return more and _core.kernels.hash(index) == self._file.identity()

    def close(self) -> None:
        self._core = self._base = self._map = None

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._core is None else f"tasks {self.tasks}"
        return f"<tallcodec.File {self._path!r}, {state}>"

    def __reduce__(self):
        arguments = (self._path, self._framework, self._base_source)
        options = {"threads": self._threads, "verify": self._check, "backend": self._forced}
        return _reopen, (arguments, options, self._file.identity())

    @property
    def _file(self) -> _core.File:
        file = self._core
        mapped = self._map
        if file is None or mapped is None:
            raise ClosedError(f"{self._label}: the file was closed")
        if mapped.size() < file.size():  # reading what is mapped of it would end the process
            raise ReadError(f"{self._label}: was cut short since it was opened")
        return file

    def _number(self, task: str | None) -> int:
        if task is None:
            return _core.NONE
        try:
            return self._tasks[task]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self._tasks)) or "none"
            message = f"{self._label} has no task {task!r}; it has {known}"
            with contextlib.suppress(OSError):
                if is_changed(self._seen, os.stat(self._path)):
                    message += "; it was changed or replaced since it was opened: open it again"
            raise TaskNotFoundError(message) from None

    def _scope(self, task: str | None) -> int:
        return _core.SCOPE_BASE if task is None else self._number(task)

    def _tensor(self, name: str) -> int:
        try:
            return self._file.find_tensor(name)
        except TypeError:  # no string, or none that UTF-8 can hold
            raise TensorNotFoundError(f"{self._label} has no tensor {name!r}") from None

    def _names(self, number: int) -> list[str]:
        return self._file.names(number)

    def _info(self, number: int, tensor: int) -> tuple[str, tuple[int, ...], int]:
        file = self._file
        file.require_known(number, tensor)  # before memory is made for it
        dtype, shape, nbytes = file.info(number, tensor)
        return _DTYPE_NAMES[dtype], shape, nbytes

    def _backend(self, device: Any) -> Backend | None:
        """What decodes to a torch device, or None, where NumPy's arrays are; None: the core."""
        return choose(device, self._forced)

    def _device(self, device: Any) -> Any:
        return frameworks.check_device(self._framework, device)

    def _targets(
        self,
        number: int,
        tensors: Iterable[str] | None,
        out: Mapping[str, Any] | None,
        device: Any,
    ) -> tuple[dict[str, Any], dict[Any, list["_Target"]]]:
        """What a decoding gives, and what is decoded for it, by torch device (None: NumPy's)."""
        names = self._names(number) if tensors is None else list(tensors)
        if isinstance(tensors, str):
            raise ArgumentError(f"tensors must be a list of names, not the string {tensors!r}")
        names = list(dict.fromkeys(names))
        if out is not None and not isinstance(out, Mapping):
            raise ArgumentError(f"out must map names to tensors, not be a {type(out).__name__}")
        out = dict(out or {})
        for name in out.keys() - set(names):
            raise TensorNotFoundError(f"out[{name!r}]: that tensor is not among those decoded")
        device = self._device(device)
        result: dict[str, Any] = {}
        groups: dict[Any, list[_Target]] = {}
        for name in names:
            tensor = self._tensor(name)
            dtype, shape, _ = self._info(number, tensor)
            if name in out:
                result[name] = out[name]
                memory = frameworks.memory(name, out[name], dtype, shape, device)
            else:
                result[name] = memory = frameworks.empty(self._framework, dtype, shape, device)
            target = _Target(tensor, frameworks.flat(memory), dtype, math.prod(shape))
            groups.setdefault(frameworks.device_of(memory), []).append(target)
        return result, groups

    def _decode_to(
        self, device: Any, backend: Backend | None, number: int, targets: list["_Target"]
    ) -> None:
        if backend is not None:
            from .device import Decoding

            decoding = Decoding(self, number, device, backend)
            for parts in _parts(targets):
                decoding.decode([(t.tensor, t.memory, t.first, t.count) for t in parts])
                self._let_go(_size(parts))
            decoding.finish()
        elif device is None or device.type == "cpu":
            self._decode_here(number, targets)
        else:
            for parts in _parts(targets):
                made = [frameworks.empty("pt", t.dtype, t.memory.shape) for t in parts]
                self._decode_here(number, [t._replace(memory=m) for t, m in zip(parts, made)])
                for target, memory in zip(parts, made):
                    frameworks.copy(memory, target.memory)

    def _decode_here(
        self, number: int, targets: list["_Target"], loaded: _core.Loaded | None = None
    ) -> None:
        whole = loaded is not None or self._stat.st_size <= _MAPPED
        for parts in [targets] if whole else _parts(targets):
            requests = [(t.tensor, frameworks.pointer(t.memory), t.first, t.count) for t in parts]
            self._decode(number, requests, loaded)
            self._let_go(_size(parts))

    def _load(self, task: str | None, names: Iterable[str], device: Any) -> "Loaded":
        """Those of a task's planes that decoding these tensors takes."""
        number = self._number(task)
        base, file = self._base, self._file
        tensors = [file.find_tensor(name) for name in names]
        device = self._device("cpu" if device is None else device)
        backend = self._backend(device)
        if backend is not None:
            from .device import Planes

            return Loaded(self, task, Planes(self, number, tensors, device, backend))
        if device is not None and device.type != "cpu":
            raise ArgumentError(f"the back-end cpu has planes on the CPU, not on {device}")
        forced(self._forced)
        requests = self._with_base(number, [(tensor, 0) for tensor in tensors], base)
        return Loaded(self, task, file.load(number, requests, self._threads, inflate))

    def _decode(
        self, number: int, requests: list[tuple[int, ...]], loaded: _core.Loaded | None = None
    ) -> None:
        """Decode tensors: (number, address of its memory), and of a part its first element and how
        many it has."""
        base, file = self._base, self._file  # in this order, see close; kept until this is done
        requests = self._with_base(number, requests, base)
        file.decode(requests, self._threads, self._check and not loaded, inflate, loaded)

    def _device_plan(
        self,
        number: int,
        parts: list[tuple[int, int, int]],
        there: Iterable[int],
        verify: bool,
        base: Checkpoint | None,
    ) -> _core.DevicePlan:
        """What a device that has the planes ``there`` takes to decode parts of tensors: (number,
        first element, elements). It keeps neither the file nor the base open."""
        requests = [(tensor, 0, first, count) for tensor, first, count in parts]
        requests = self._with_base(number, requests, base)
        return self._file.device_plan(requests, set(there), self._threads, verify, inflate)

    def _unmap(self) -> None:
        """Let go of the pages of the file that were read; they stay in the page cache."""
        mapped = self._map
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _let_go(self, nbytes: int) -> None:
        """So many bytes were decoded: of a large file, unmap what was read from time to time."""
        self._decoded += nbytes
        if self._decoded >= _MAPPED // 4 and self._stat.st_size > _MAPPED:
            self._decoded = 0
            self._unmap()

    def _with_base(
        self, number: int, requests: list[tuple[int, ...]], base: Checkpoint | None
    ) -> list[tuple[Any, ...]]:
        return [
            (number, tensor, address, self._base_tensor(number, tensor, base), *part)
            for tensor, address, *part in requests
        ]

    def _base_tensor(
        self, number: int, tensor: int, base: Checkpoint | None
    ) -> tuple[int, int] | None:
        """Where the referenced base's tensor lies, if decoding needs it."""
        if base is None or not self._file.needs_base(number, tensor):
            return None
        tensor = self._file.original(tensor)
        dtype, shape, _ = self._info(_core.NONE, tensor)
        found = base.base_tensor(self._label, self._file.name(tensor), dtype, shape)
        return found.fd, found.offset


class Loaded:
    """A task whose planes are in memory, on the CPU or another ``device``. Made by
    :meth:`File.load`; any number of threads may use one at once. ``nbytes`` is what its own planes
    take.
    """

    def __init__(self, file: File, task: str | None, planes: Any):
        self._file = file
        self._planes = planes  # _core.Loaded or device.Planes
        self.task = task
        self.device = "cpu" if isinstance(planes, _core.Loaded) else str(planes.device)
        self.nbytes: int = planes.bytes()

    def decode(
        self, tensors: Iterable[str] | None = None, out: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """As :meth:`File.decode` of the task, the same bits, to the device that the planes are on;
        no checksum is looked at again, and nothing is waited for."""
        file = self._file
        number = file._number(self.task)
        result, groups = file._targets(number, tensors, out, self.device)
        for where, targets in groups.items():
            if where is not None and str(where) != self.device:  # not refused to framework "np"
                raise TensorMismatchError(f"out is on {where}, the planes are on {self.device}")
            if isinstance(self._planes, _core.Loaded):
                file._decode_here(number, targets, self._planes)
            else:
                original = file._file.original
                self._planes.decode((original(t.tensor), t.memory) for t in targets)
        return result

    def __reduce__(self):
        return File.load, (self._file, self.task, self.device)

    def __repr__(self) -> str:
        return f"<tallcodec.Loaded {self.task!r}, {self.nbytes:,} bytes, of {self._file!r}>"


class _Target(NamedTuple):
    """What is decoded into: flat memory for ``count`` elements of a tensor, from number ``first``
    on."""

    tensor: int
    memory: Any  # torch's or NumPy's
    dtype: str
    count: int
    first: int = 0


def _parts(targets: list[_Target]) -> Iterator[list[_Target]]:
    """The same, in lists of at most 64 MiB, cut where they are larger."""
    specs = {k: (target.dtype, (target.count,)) for k, target in enumerate(targets)}
    for batch in batches(specs, specs):
        parts = []
        for k, begin, nbytes in batch:
            size = DTYPES[targets[k].dtype].itemsize
            a, b = begin // size, (begin + nbytes) // size
            t = targets[k]
            parts.append(t._replace(memory=t.memory[a:b], count=b - a, first=t.first + a))
        yield parts


def _size(targets: list[_Target]) -> int:
    return sum(target.count * DTYPES[target.dtype].itemsize for target in targets)


class StateDict(Mapping):
    """A task's checkpoint, decoded tensor by tensor as it is asked for. See File.state_dict."""

    def __init__(self, file: File, task: str | None, device: Any):
        self._file = file
        self._task = task
        self._device = device
        self._keys = dict.fromkeys(file._names(file._number(task)))

    def __getitem__(self, name: str) -> Any:
        if name not in self._keys:
            raise TensorNotFoundError(f"task {self._task!r} has no tensor {name!r}")
        return self._file.decode(self._task, [name], device=self._device)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:  # Mapping's own would decode the tensor
        return name in self._keys


def _reopen(arguments, options, identity) -> File:
    path, file = arguments[0], File(*arguments, **options)
    if file._file.identity() != identity:
        file.close()
        raise FormatError(
            f"{path}: this is not the file that was pickled: it was changed or replaced since"
        )
    return file


def inflate(frame: memoryview, raw_size: int) -> bytes | None:
    """One zstd frame of known raw size, which it must state itself: nothing larger is allocated.
    None where it is not sound."""
    try:
        if zstandard.frame_content_size(frame) != raw_size:
            return None
        return zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=raw_size, allow_extra_data=False
        )
    except zstandard.ZstdError:
        return None
