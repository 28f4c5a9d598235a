"""Tasks come to a `.tall` file and go: what stays is not written again."""

import contextlib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from . import _core, numbers
from .checkpoint import Checkpoint, open_checkpoint
from .encoding import (
    BITS,
    CODINGS,
    DENSITY,
    add_side_data,
    append_verbatim,
    are_tied,
    bits_of,
    check_has_base,
    check_names,
    check_names_and_shapes,
    check_tasks,
    choose,
    classify,
    encode,
    source_of,
    thresholds_of,
)
from .errors import ArgumentError, TaskNotFoundError, label
from .file import inflate
from .info import MERGED, SCORES, FileInfo, read_info
from .machine import check_threads, memory
from .numbers import name_of
from .output import (
    atomic_file,
    changed_file,
    place,
    sync_folder,
    temporary_sibling,
    write_errors,
)
from .progress import Progress, check_progress
from .tensors import Tensor
from .verify import verify
from .version import __version__

METHODS_OF_NEW = ("auto", "tall", "ternary")
_WRITER = f"tallcodec {__version__}"


def add(
    path: str | os.PathLike,
    tasks: Mapping[str, str | os.PathLike | Mapping[str, Any]],
    *,
    base: str | os.PathLike | Mapping[str, Any] | None = None,
    method: str | Mapping[str, str] = "auto",
    threshold: float | Mapping[str, float] | str = "auto",
    bits: float | Mapping[str, float] | None = None,
    coding: str = "auto",
    rebuild: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> FileInfo:
    """Add fine-tuned checkpoints to a `.tall` file, which stays as it is for whoever has it open.

    What the file holds is not decoded and not written again: new planes and a new index go behind
    it. Its shared vector stays as it is, and with it every task that is there; a new task is coded
    against it, or without it. For a shared vector that the new tasks have a part in, encode anew.

    - ``tasks``: names, new to the file, and checkpoints, as for :func:`encode`.
    - ``base``: needed where the file only references its base; it is checked. Where the file has
      its base, one that is given is checked too, and used.
    - ``method``: "tall", masks of the stored shared vector (tensors that have none in the file
      become ternary planes, of one bit per parameter, as masks have); "ternary"; or "auto", for
      each task whichever leaves the smaller error at equal bits. A task is coded by masks, then in
      ternary planes with as many bits as these take in the file, and ‖τ̂ − τ‖² ÷ ‖τ‖² is compared,
      both norms over all tensors and both at unit gain; masks win ties. So "auto" reads the
      checkpoints once or twice more. In a file without any shared vector it is "ternary" with the
      bits of :func:`encode`. Or one of the three per task.
    - ``threshold``: of masks, "auto" (adapted masks) or λ, one number or one per task. λ's masks
      have the scale that the file's have; adapted ones too, or unit gain where those have none.
    - ``bits``: per parameter, of tasks of method "ternary", as for :func:`encode`.
    - ``coding``: "raw" or "entropy", as for :func:`encode`; "auto": masks as the file's are,
      ternary planes entropy coded.
    - ``rebuild``: make the file anew, all of it, from all its tasks' checkpoints and the new ones
      (``tasks`` names each) and ``base``, which are checked to be those it was made from, with the
      file's own options: what :func:`encode` makes, with what the file says of how it was made.
      What it does not tell, a density, is refused: for these use :func:`encode`, or give ``bits``.
      "auto" is what a task is in the file, and masks for new ones where there is a shared vector;
      ``method="tall"`` brings all into it.
    - ``threads``, ``progress``: as for :func:`encode`; the file is the same for any number.

    The change is there all at once, with one write at the end: a process that is killed leaves the
    file as it was (bytes behind its end are ignored), and one that fails takes back what it wrote.
    Several tasks in one call are one change, and one new index: those of changes before are space
    that :func:`compact` gives back. Nobody else can change the file meanwhile.

    Returns what :attr:`tallcodec.File.info` returns. Raises ArgumentError (also for a task that is
    there already: remove it first), BaseMismatchError, CheckpointError, ReadError, FormatError,
    ChecksumError, WriteError (at once, where another process is changing the file).
    """
    check_tasks(tasks)
    choose("coding", coding, CODINGS)
    threads = check_threads(threads)
    check_progress(progress)
    methods = _methods(method, tasks)
    if rebuild:
        return _rebuild(path, tasks, base, methods, threshold, bits, coding, threads, progress)
    masked = [task for task, m in methods.items() if m != "ternary"]
    sparse = [task for task, m in methods.items() if m == "ternary"]
    if not masked and threshold != "auto":
        raise ArgumentError('threshold is for masks, not for method "ternary"')
    if isinstance(threshold, str) and threshold == "search":
        raise ArgumentError('threshold must be a number, one per task, or "auto": encode searches')
    thresholds = thresholds_of(threshold, masked, tasks)
    planes_bits = bits_of(bits, None, sparse, tasks, False)
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(task)) for task in tasks.values()]
        given = None if base is None else stack.enter_context(open_checkpoint(base))
        change = stack.enter_context(_changing(path, threads, progress))
        for task in tasks:
            if task in change.tasks:
                raise ArgumentError(f"{change.name} has a task {task!r} already: remove it first")
        addition = _Addition(
            change, given, dict(zip(tasks, checkpoints)), isinstance(threshold, str), coding,
            least_bits=bits is None,
        )  # fmt: skip
        if not addition.shared:
            if "tall" in methods.values():
                raise ArgumentError(
                    f'{change.name} has no shared vector for masks: use method="ternary"'
                )
            auto = [task for task, m in methods.items() if m == "auto"]
            planes_bits |= bits_of(None, None, auto, tasks, False)
        codes = {
            task: _Code(False, thresholds[task])
            if m == "tall" or (m == "auto" and addition.shared)
            else _Code(True, planes_bits[task])
            for task, m in methods.items()
        }
        unsure = [task for task, m in methods.items() if m == "auto" and addition.shared]
        encoder = addition.encode(codes, unsure)
        add_side_data(encoder, enumerate(checkpoints), change.file_planes(checkpoints))
        masked = [task for task, code in addition.codes.items() if not code.ternary]
        change.note_merged(encoder, [*change.masked, *masked])
        for checkpoint in (addition.base, *checkpoints):
            checkpoint.check_unchanged()
        encoder.finish()
        return change.info()


def remove(path: str | os.PathLike, tasks: Iterable[str]) -> FileInfo:
    """Remove tasks from a `.tall` file, which stays as it is for whoever has it open.

    The other tasks and the base do not change, and so the shared vector does not: it still has the
    removed tasks in it, and :func:`merge` says so. (For a file without any trace of them, encode
    anew.) The space of what was the tasks' own becomes free ranges, whose bytes are there until
    :func:`compact`; so does a shared vector that no mask is left of. All tasks may go: a base is
    left, to which others may be added. The change is there all at once, as that of :func:`add`.

    Returns what :attr:`tallcodec.File.info` returns. Raises ArgumentError, TaskNotFoundError,
    FormatError, WriteError (at once, where another process is changing the file).
    """
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise ArgumentError(f"tasks must be a list of names, not {tasks!r}")
    gone = list(tasks)
    if not gone or not all(isinstance(task, str) for task in gone):
        raise ArgumentError(f"name at least one task, not {gone!r}")
    with _changing(path) as change:
        for task in gone:
            if task not in change.tasks:
                known = ", ".join(map(repr, change.tasks)) or "none"
                raise TaskNotFoundError(f"{change.name} has no task {task!r}; it has {known}")
        kept = [number for number, task in enumerate(change.tasks) if task not in gone]
        encoder = change.extend(kept)
        scores = change.metadata.get(SCORES)
        if scores is not None:
            encoder.add_metadata(_core.SCOPE_FILE, SCORES, _without_scores(scores, gone))
        change.note_merged(encoder, [task for task in change.masked if task not in gone])
        encoder.finish()
        return change.info()


def compact(
    path: str | os.PathLike, *, threads: int | None = None, progress: Progress | None = None
) -> FileInfo:
    """Give the space of removed tasks and old indices back: the file without its free ranges takes
    its place, whole, with its permissions. What it holds is the same, and what is moved is checked.
    Where there is nothing to reclaim, it stays as it is, and nothing is checked.

    It needs as much space again, beside the file, until it is done. Other names of the file (hard
    links) keep the old one. Returns what
    :attr:`tallcodec.File.info` returns. Raises FormatError, ChecksumError, WriteError (at once,
    where another process is changing the file).
    """
    threads = check_threads(threads)
    check_progress(progress)
    with changed_file(path) as old:
        found = _Change(path, old, threads, progress)
        if not found.core.free() and os.fstat(old.fileno()).st_size == found.core.size():
            return found.info()
        with atomic_file(path, overwrite=True) as new:
            then = os.fstat(old.fileno())
            with contextlib.suppress(OSError):  # not everybody may give files away
                os.fchown(new.fileno(), then.st_uid, then.st_gid)
            os.fchmod(new.fileno(), stat.S_IMODE(then.st_mode))
            _core.compact(old.fileno(), new.fileno(), found.name, _WRITER, threads, progress)
            return _Change(path, new, threads, progress).info()


class _Change:
    """A file that is being changed, and what it holds."""

    def __init__(
        self, path: str | os.PathLike, file: BinaryIO, threads: int, progress: Progress | None
    ):
        self.name = label(path)
        self.file = file
        self.threads, self.progress = threads, progress
        self.core = _core.File(self.name, self._map())
        self.tasks = [task["name"] for task in self.core.tasks()]
        self.metadata = {k: v for s, k, v in self.core.metadata() if s == _core.SCOPE_FILE}
        self.masked = [
            task["name"]
            for task in self.core.tasks()
            if task["method"] != numbers.METHODS["ternary"]
        ]
        self._encoder: _core.Encoder | None = None

    def _map(self) -> mmap.mmap | bytes:
        size = os.fstat(self.file.fileno()).st_size
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def extend(
        self,
        kept: Iterable[int],
        more: Iterable[str] = (),
        untied: Iterable[str] = (),
        **recipe: Any,
    ) -> _core.Encoder:
        """An encoder of a change; what one before wrote is taken back."""
        recipe = {
            "merge": 1, "method": numbers.METHODS["ternary"], "density": DENSITY, "scale": 0,
            "base_storage": 1, **recipe,
        }  # fmt: skip
        self._encoder = _core.Encoder(self.file.fileno(), self.name, _WRITER, **recipe)
        self._encoder.extend(list(kept), list(more), list(untied))
        return self._encoder

    def withdraw(self) -> None:
        if self._encoder is not None:
            self._encoder.withdraw()

    def file_planes(self, checkpoints: Iterable[Checkpoint]) -> dict[bytes, int]:
        """The planes of small files that hold what one of the checkpoints' does, by that."""
        wanted = {content for checkpoint in checkpoints for content in checkpoint.files.values()}
        sizes, planes = {len(content) for content in wanted}, self.core.planes()
        found = {}
        for plane in sorted({plane for _, _, plane in self.core.files() if plane is not None}):
            if planes[plane][4] in sizes:
                content = self.core.read_plane(plane, inflate)
                if content in wanted:
                    found[content] = plane
        return found

    def note_merged(self, encoder: _core.Encoder, masked: list[str]) -> None:
        """Have the file say whose sum its shared vector is, where that is not of these tasks, which
        will have masks of it."""
        if masked and MERGED not in self.metadata and masked != self.masked:
            encoder.add_metadata(_core.SCOPE_FILE, MERGED, json.dumps(self.masked))

    def info(self) -> FileInfo:
        """What the file holds now."""
        data = self._map()
        return read_info(self.name, len(data), _core.File(self.name, data))


@contextlib.contextmanager
def _changing(
    path: str | os.PathLike, threads: int = 1, progress: Progress | None = None
) -> Iterator[_Change]:
    """A file that is changed in place. When the block raises, it is as it was."""
    with changed_file(path) as file:
        change = _Change(path, file, threads, progress)
        then = os.fstat(file.fileno())
        try:
            yield change
        except BaseException:
            change.withdraw()
            with contextlib.suppress(OSError):
                if os.fstat(file.fileno()).st_size == then.st_size == change.core.size():
                    # Nothing has changed, and whoever looks at the time is to see that.
                    os.utime(file.fileno(), ns=(then.st_atime_ns, then.st_mtime_ns))
            raise


class _Code(NamedTuple):
    """How a task is coded."""

    ternary: bool
    threshold: float
    """λ, or the bits of ternary planes."""


class _Addition:
    """Checkpoints on their way into a file."""

    def __init__(
        self,
        change: _Change,
        given: Checkpoint | None,
        tasks: dict[str, Checkpoint],
        adapted: bool,
        coding: str,
        *,
        least_bits: bool,
    ):
        self._change, self._tasks = change, tasks
        self._records = change.core.tensors()
        self._by_name = {record["name"]: record for record in self._records}
        self.shared = any(record["shared_dtype"] for record in self._records)
        self.base = self._stored_base() if given is None else self._given_base(given)
        known = {record["name"] for record in self._records}
        self._more = sorted({n for task in tasks.values() for n in task.tensors} - known)
        self._names = sorted(known.union(self._more))
        aliases = [record for record in self._records if record["alias"] is not None]
        self._untied = [record["name"] for record in aliases if not self._is_tied(record)]
        mode = change.core.header()["scale"]
        masks, ternary = CODINGS[coding]
        if coding == "auto":
            kinds = {(kind, plane_coding) for kind, plane_coding, *_ in change.core.planes()}
            masks = (numbers.PLANES["mask"], numbers.CONDITIONAL) in kinds
        self._recipe = {
            "method": numbers.METHODS["adapted" if adapted else "tall"],
            "scale": mode or (numbers.SCALES["unit-gain"] if adapted else mode),
            "code_masks": masks,
            "code_ternary": ternary,
            "least_bits": least_bits,
        }
        self._plan: list[tuple] | None = None
        self.codes: dict[str, _Code] = {}
        """How the tasks were coded last."""

    def encode(self, codes: dict[str, _Code], unsure: list[str]) -> _core.Encoder:
        """All planes of all tasks, those of which it is unsure coded the better way."""
        if not unsure:
            return self._encode(codes)
        masks = self._encode({task: codes[task] for task in unsure})
        sparse, left = {}, {}
        for number, task in enumerate(unsure):
            bits, elements, _, left[task] = masks.cost(number)
            if bits:  # there is something to code
                sparse[task] = _Code(True, bits / elements)
        if not sparse:
            return masks if codes.keys() == set(unsure) else self._encode(codes)
        planes = self._encode(sparse)
        for number, task in enumerate(sparse):
            if planes.cost(number)[3] < left[task]:
                codes = codes | {task: sparse[task]}
        return planes if codes == sparse else self._encode(codes)

    def _encode(self, codes: dict[str, _Code]) -> _core.Encoder:
        self.codes = codes
        change, tasks = self._change, [self._tasks[task] for task in codes]
        kept = range(len(change.tasks))
        encoder = change.extend(kept, self._more, self._untied, **self._recipe)
        for task, code in codes.items():
            encoder.add_task(task, code.threshold, code.ternary)
        self._set_base(encoder)
        if self._plan is None:
            encoder.check_stored(change.threads, change.progress)
            self._plan = self._make_plan()
        place = {task: number for number, task in enumerate(codes)}
        for task, tensor, coding, *entry in self._plan:
            if task not in codes:
                continue
            if coding == numbers.MASK and (codes[task].ternary or not self._has_shared(tensor)):
                coding = numbers.TERNARY
            encoder.set_entry(place[task], tensor, coding, *entry)
        nbytes = sum(c.nbytes for c in (self.base, *tasks))
        encoder.run(change.threads, change.progress, nbytes > memory() // 2)
        append_verbatim(encoder, self._names, tasks)
        return encoder

    def _make_plan(self) -> list[tuple]:
        """What every tensor of every task becomes, and the rest of its entry."""
        plan = []
        for task_name, task in self._tasks.items():
            check_names_and_shapes(task)
            check_has_base(task, self.base, f"the base of {self._change.name}")
            for tensor, name in enumerate(self._names):
                theirs = task.tensors.get(name)
                if theirs is None or self._is_alias(name):
                    continue
                coding, reason = classify(self.base.tensors.get(name), theirs)
                plan.append((task_name, tensor, coding, numbers.DTYPES[theirs.dtype], theirs.shape,
                             numbers.REASONS[reason], source_of(theirs)))  # fmt: skip
        return plan

    def _set_base(self, encoder: _core.Encoder) -> None:
        for tensor, name in enumerate(self._names):
            if name in self.base.tensors and not self._is_alias(name):
                encoder.set_base(tensor, source_of(self.base.tensors[name]))

    def _is_alias(self, name: str) -> bool:
        """Whether a tensor is tied to another, and stays so."""
        record = self._by_name.get(name)
        return record is not None and record["alias"] is not None and name not in self._untied

    def _is_tied(self, record: dict) -> bool:
        """Whether each of the new tasks has the same under a tensor's name as under the one that it
        is tied to."""
        target = self._records[record["alias"]]["name"]
        return are_tied(self._tasks.values(), target, record["name"])

    def _has_shared(self, tensor: int) -> bool:
        return bool(self._original(self._by_name[self._names[tensor]])["shared_dtype"])

    def _original(self, record: dict) -> dict:
        return record if record["alias"] is None else self._records[record["alias"]]

    def _stored_base(self) -> Checkpoint:
        """The base that the file has."""
        core, file = self._change.core, self._change.file
        if core.header()["base_storage"] == numbers.BASE_STORAGES["reference"]:
            raise ArgumentError(
                f"{self._change.name} only references its base: give it (base=, --base)"
            )
        tensors = {}
        for number, record in enumerate(self._records):
            if record["in_base"]:
                ranges = core.ranges(_core.NONE, number) or [(0, 0)]  # none where it is empty
                dtype = name_of(record["dtype"], numbers.DTYPES)
                shape = tuple(record["shape"])
                tensors[record["name"]] = Tensor(dtype, shape, file.fileno(), ranges[0][0], file)
        return Checkpoint(self._change.name, "tall", tensors)

    def _given_base(self, given: Checkpoint) -> Checkpoint:
        """A base that was given, if it is the file's by its types and shapes; of its values the
        encoder finds out."""
        tensors = {}
        for record in self._records:
            if not record["in_base"]:
                continue
            name = self._original(record)["name"]
            dtype, shape = name_of(record["dtype"], numbers.DTYPES), tuple(record["shape"])
            found = given.base_tensor(self._change.name, name, dtype, shape)
            tensors[record["name"]] = found
        return Checkpoint(given.label, given.kind, tensors, _inputs=given._inputs)


def _methods(method: str | Mapping[str, str], tasks: Mapping) -> dict[str, str]:
    """The method of every new task, by name in task order."""
    if isinstance(method, Mapping):
        check_names("method", method, tasks)
    methods = {task: method[task] if isinstance(method, Mapping) else method for task in tasks}
    for value in methods.values():
        choose("method", value, METHODS_OF_NEW)
    return methods


def _without_scores(scores: str, tasks: list[str]) -> str:
    """A search's scores as the file keeps them, but for those of tasks that are gone."""
    try:
        found = json.loads(scores)
        found["scores"] = {k: v for k, v in found["scores"].items() if k not in tasks}
        return json.dumps(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return scores  # nobody's


def _rebuild(
    path: str | os.PathLike,
    tasks: Mapping[str, Any],
    base: Any,
    methods: dict[str, str],
    threshold: Any,
    bits: Any,
    coding: str,
    threads: int,
    progress: Progress | None,
) -> FileInfo:
    """The file encoded anew, with the options that it tells of itself."""
    if base is None:
        raise ArgumentError("rebuild takes all checkpoints, that of the base too (base=, --base)")
    with changed_file(path) as file:
        change = _Change(path, file, threads, progress)
        options = _options(change, tasks, methods, threshold, bits, coding)
        verify(path, base, tasks={t: tasks[t] for t in change.tasks}, threads=threads)
        target = Path(os.path.realpath(path))
        made = temporary_sibling(target)
        with write_errors(path):
            try:
                info = encode(base, tasks, made, **options, threads=threads, progress=progress)
                place(made, target, overwrite=True)
                sync_folder(target.parent)
            finally:
                made.unlink(missing_ok=True)
        return replace(info, path=change.name)


def _options(
    change: _Change,
    tasks: Mapping[str, Any],
    methods: dict[str, str],
    threshold: Any,
    bits: Any,
    coding: str,
) -> dict[str, Any]:
    """What the file tells of how it was made, and what is said otherwise, as :func:`encode`'s."""
    info = change.info()
    records, planes = change.core.tensors(), change.core.planes()
    missing = [task for task in change.tasks if task not in tasks]
    if missing:
        raise ArgumentError(f"rebuild takes the checkpoints of all tasks; missing: {missing}")
    then = {task.name: task for task in info.tasks}
    shared = {(r["shared_dtype"], r["dtype"]) for r in records if r["shared_dtype"]}
    for task, m in methods.items():
        if m == "auto":
            was = then[task].method if task in then else "tall" if shared else "ternary"
            methods[task] = "ternary" if was == "ternary" else "tall"
    masked = [task for task, m in methods.items() if m == "tall"]
    sparse = [task for task, m in methods.items() if m == "ternary"]
    known = {task: then[task].threshold for task in sparse if task in then}
    if (
        info.merge == "ties"
        or "magnitude" in {task.method for task in info.tasks}
        or (bits is None and not all(known.values()))
    ):
        raise ArgumentError(
            f"{change.name} does not tell the density it was made with: use encode, with overwrite"
        )
    if bits is None and sparse:
        new = [task for task in sparse if task not in then]
        bits = known | bits_of(None, None, new, tasks, False)
        if set(bits.values()) == {BITS}:
            bits = None  # the default, which gives way where it is too few
    lambdas = {t: then[t].threshold for t in masked if t in then and then[t].method == "tall"}
    if threshold == "auto" and lambdas:
        if len(lambdas) < len(masked):
            raise ArgumentError(
                f"{change.name} has tasks with a λ of their own, which others have not: give "
                "threshold, for all tasks"
            )
        threshold = lambdas
    stored = {name_of(number, numbers.DTYPES) for number, _ in shared}
    own = all(a == b for a, b in shared)
    names = {dtype: name for name, dtype in numbers.SHARED_DTYPES.items()}
    kinds = {(kind, plane_coding) for kind, plane_coding, *_ in planes}
    if coding == "auto":
        if (numbers.PLANES["mask"], numbers.CONDITIONAL) in kinds:
            coding = "entropy"
        elif {c for kind, c in kinds if kind == numbers.PLANES["ternary"]} == {numbers.RAW}:
            coding = "raw"
    return {
        "merge": info.merge, "threshold": threshold, "method": methods, "bits": bits,
        "scale": info.scale, "base_storage": info.base_storage, "coding": coding,
        "shared_dtype": "auto" if own or len(stored) != 1 else names[stored.pop()],
        "metadata": info.metadata,
    }  # fmt: skip
