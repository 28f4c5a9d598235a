"""Merged models: one checkpoint for all tasks, from a `.tall` file alone, or from checkpoints."""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import _core, frameworks, numbers
from .checkpoint import refuse_input_as_output
from .checkpoint_write import Part, write_checkpoint
from .encoding import encode
from .errors import ArgumentError, WriteError
from .file import File
from .file import open as open_file
from .output import check_output
from .progress import Progress, check_progress
from .stats import by_masks
from .thresholds import best, check_score

METHODS = ("consensus", *numbers.MERGES)
GRID = tuple(k / 10 for k in range(1, 11))  # the paper's

Checkpoint = str | os.PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class MergeInfo:
    """How a merged model was made, and what of the tasks is not in it."""

    method: str
    vector: str
    """The shared vector that was used: "task-arithmetic", "average" or "ties"."""
    min_tasks: int | None
    """Of Consensus Merging; else None."""
    scale: float
    """α."""
    parameters: int
    """Elements of the tensors that tasks have masks of."""
    active: int
    """Those of them that follow the shared vector, by the rule of the masks; where it is not 0 they
    differ from the base's. The others keep the base's values."""
    scores: dict[float, float]
    """The score of every α that was tried; empty where it was given."""
    written: list[str]
    kept: list[str]
    """Tensors that keep the base's values though a task has others: all such tasks hold them
    verbatim (NaN, infinity, another shape, no arithmetic type)."""
    merged: list[str]
    """The tasks that are in the shared vector: those the file was encoded from, but for ternary
    ones. :func:`tallcodec.add` and :func:`tallcodec.remove` leave it as it is."""
    removed: list[str]
    """Those of them that the file no longer has."""
    added: list[str]
    """Tasks that have masks of the shared vector, and are not in it."""
    partly: dict[str, list[str]]
    """Merged tensors, and the tasks that hold them verbatim and so are not in the merger."""
    dropped: list[str]
    """Tensors of tasks that the base lacks: not in the merged model."""

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        tasks = f" of {self.min_tasks} tasks or more" if self.min_tasks is not None else ""
        lines = [
            *self.written,
            f"{self.method}{tasks}, vector {self.vector}, α {self.scale:g}, on {self.active:,} of "
            f"{self.parameters:,} parameters that tasks have masks of",
        ]
        if self.parameters and not self.active:
            lines.append(
                f"no parameter is active in {self.min_tasks} tasks: this is the base. Masks that "
                "are not adapted are denser: encode with a threshold, as published 0.4"
            )
        lines += [f"α {alpha:g}: score {score:.6g}" for alpha, score in self.scores.items()]
        lines += [f"as in the base, though tasks differ: {name}" for name in self.kept]
        lines += [f"removed from the file, and still in the vector: {t!r}" for t in self.removed]
        lines += [f"added to the file, and not in the vector: {task!r}" for task in self.added]
        lines += [f"without {', '.join(map(repr, t))}: {name}" for name, t in self.partly.items()]
        lines += [f"not in the base, left out: {name}" for name in self.dropped]
        return "\n".join(lines)


class Merged(dict):
    """A merged state dict; ``info`` says how it was made."""

    info: MergeInfo


def merge(
    path: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    method: str = "consensus",
    min_tasks: int = 2,
    scale: float | None = None,
    score: Callable[[dict[str, Any]], float] | None = None,
    grid: Iterable[float] = GRID,
    out: Mapping[str, Any] | None = None,
    base: Checkpoint | None = None,
    framework: str = "pt",
    threads: int | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged | MergeInfo:
    """Merge the tasks of a `.tall` file into one model, from its shared vector s and its masks m_t.

    ``method`` is "consensus": θ₀ + α·s where at least ``min_tasks`` masks are set, else θ₀ (arXiv
    2405.07813, whose masks are those of a λ: encode with a ``threshold``); it takes whichever
    vector and masks the file has. Or it is how that vector was made,
    "task-arithmetic", "average" or "ties": θ₀ + α·s everywhere. Arithmetic is float32, one rounding
    per operation, the last one to the base's dtype.

    α is ``scale``, rounded to float32 (default 1); or, where ``score`` is given, the number of
    ``grid`` for which ``score(state_dict)`` is highest, the smallest of equals. It is called with
    one dict, whose tensors (those of ``out``, say ``model.state_dict()``, where they are named
    there) are filled anew for each α.

    The merged model has the base's tensors. Where a task holds one verbatim, that task is not in
    the merger: see MergeInfo. Without ``output`` the state dict is returned, its ``info`` the
    MergeInfo, its tensors of ``framework``; else the checkpoint is written as File.save does,
    with the base's metadata and small files, and its MergeInfo is returned. ``base`` is the base
    checkpoint, where the file only references it. ``progress`` is called as
    ``progress("decoding", done, total)``; what it raises ends the merging, and nothing is written.

    Raises ArgumentError, before any value is read; what opening, decoding and saving raise; what
    ``score`` raises, and ArgumentError where it gives NaN or no number: then nothing is written.
    """
    if method not in METHODS:
        known = ", ".join(map(repr, METHODS))
        raise ArgumentError(f"method must be one of {known}, not {method!r}")
    if isinstance(min_tasks, bool) or not isinstance(min_tasks, int) or min_tasks < 1:
        raise ArgumentError(f"min_tasks must be a whole number of at least 1, not {min_tasks!r}")
    if score is not None and scale is not None:
        raise ArgumentError("scale and score exclude each other: score chooses the scale")
    if score is not None and not callable(score):
        raise ArgumentError(f"score must be a function of a state dict, not {score!r}")
    scales = [_scale(1.0 if scale is None else scale)] if score is None else _grid(grid)
    if out is not None and not isinstance(out, Mapping):
        raise ArgumentError(f"out must map names to tensors, not be a {type(out).__name__}")
    check_progress(progress)
    if output is not None:
        if out is not None and score is None:
            raise ArgumentError("out is for a score, or where there is no output")
        _check_output(output, (path, base), overwrite)

    with open_file(path, framework, base, threads=threads) as file:
        merger = _Merger(file, method, min_tasks)
        state, pointers, scores = None, [], {}
        if output is None or score:
            state, pointers = merger.tensors(out or {})
        for alpha in scales if score else ():
            merger.fill(pointers, alpha, progress)
            scores[alpha] = check_score(score(state), f"score(…) at scale {alpha:g}")
        alpha = best(scales, list(scores.values())) if scores else scales[0]
        if output is None:
            merger.fill(pointers, alpha, progress)
            merged = Merged(state)
            merged.info = merger.info(alpha, scores, [])
            return merged
        written = write_checkpoint(
            output,
            merger.specs,
            lambda parts: merger.fill(map(merger.part, parts), alpha),
            metadata=file.metadata(),
            files=file.files(),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
        return merger.info(alpha, scores, [os.fspath(p) for p in written])


def task_arithmetic(
    base: Checkpoint, tasks: Mapping[str, Checkpoint], output=None, *, scale=None, **options
) -> Merged | MergeInfo:
    """θ₀ + α·Σ τ_t, from checkpoints; ``options`` are those of :func:`merge`."""
    return _merge_checkpoints(base, tasks, output, "task-arithmetic", {}, scale=scale, **options)


def average(
    base: Checkpoint, tasks: Mapping[str, Checkpoint], output=None, *, scale=None, **options
) -> Merged | MergeInfo:
    """θ₀ + α·(Σ τ_t ÷ T), from checkpoints; ``options`` are those of :func:`merge`."""
    return _merge_checkpoints(base, tasks, output, "average", {}, scale=scale, **options)


def ties(
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint],
    output=None,
    *,
    scale=None,
    density: float = 0.2,
    **options,
) -> Merged | MergeInfo:
    """θ₀ + α·s with s of TIES (arXiv 2306.01708), its disjoint part summed as in arXiv 2405.07813,
    from checkpoints; ``options`` are those of :func:`merge`."""
    recipe = {"density": density}
    return _merge_checkpoints(base, tasks, output, "ties", recipe, scale=scale, **options)


def consensus(
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint],
    output=None,
    *,
    merge: str = "task-arithmetic",
    threshold: float | Mapping[str, float] = 0.4,
    density: float | None = None,
    min_tasks: int = 2,
    scale=None,
    **options,
) -> Merged | MergeInfo:
    """Consensus Merging (arXiv 2405.07813) from checkpoints: ``merge``, ``threshold`` and
    ``density`` are those of :func:`tallcodec.encode`, ``options`` those of :func:`merge`."""
    recipe = {"threshold": threshold, "density": density}
    return _merge_checkpoints(
        base, tasks, output, merge, recipe, "consensus", min_tasks=min_tasks, scale=scale, **options
    )


def _merge_checkpoints(
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint],
    output: str | os.PathLike | None,
    vector: str,
    recipe: dict,
    method: str | None = None,
    **options,
) -> Merged | MergeInfo:
    """Encode into a temporary file that references the base, and merge from it."""
    if output is not None:
        sources = tasks.values() if isinstance(tasks, Mapping) else ()
        _check_output(output, (base, *sources), options.get("overwrite", False))
    with _temporary_file(output) as path:
        encode(
            base,
            tasks,
            path,
            merge=vector,
            shared_dtype="float32",
            base_storage="reference",
            threads=options.get("threads"),
            progress=options.get("progress"),
            **{"threshold": 0.4, **recipe},  # as published, where the masks count at all
        )
        return merge(path, output, method=method or vector, base=base, **options)


@contextmanager
def _temporary_file(output: str | os.PathLike | None):
    """A path for a file that is gone afterwards: beside the output, or where such files go."""
    folder = None if output is None else os.path.dirname(os.path.abspath(output))
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".tallcodec-", dir=folder)
    except OSError as error:
        message = f"{folder or tempfile.gettempdir()}: cannot be written: {error.strerror}"
        raise WriteError(error.errno, message) from error
    with temporary as name:
        yield os.path.join(name, "merging.tall")


def _check_output(output: str | os.PathLike, inputs: Iterable[Any], overwrite: bool) -> None:
    """Before anything is done, refuse an output that cannot be written in the end."""
    refuse_input_as_output(output, inputs)
    if not os.path.isdir(output):  # a folder may be there: it depends on what is in it
        check_output(output, overwrite)


class _Merger:
    """An open file, seen as one merged model."""

    def __init__(self, file: File, method: str, min_tasks: int):
        self._file = file
        self._method = method
        self._about = file.info
        self._vector = self._about.merge
        tasks = len(file.tasks)
        ternary = [t.name for t in self._about.tasks if t.tensors["ternary"]]
        if ternary:
            raise ArgumentError(
                f"{file._label} cannot be merged: what it has of {', '.join(map(repr, ternary))} "
                "is in ternary planes and in no shared vector; merge the checkpoints "
                "(tallcodec.merging)"
            )
        if method == "consensus" and min_tasks > tasks:
            raise ArgumentError(f"min_tasks is {min_tasks}, {file._label} has {tasks} tasks")
        if method not in ("consensus", self._vector):
            raise ArgumentError(
                f"{file._label} cannot be merged by {method!r}: its shared vector is of "
                f"{self._vector!r}; use that, or 'consensus', or encode with merge={method!r}"
            )
        self._min_tasks = min_tasks if method == "consensus" else 0
        self._tensors = {n: file._tensor(n) for n in file._names(_core.NONE)}
        self.specs = {n: file._info(_core.NONE, t)[:2] for n, t in self._tensors.items()}

    def tensors(self, out: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, int]]]:
        """A state dict that is not filled, of the caller's tensors where there are any, and where
        its tensors' memory is."""
        state, pointers = {}, []
        for name, spec in self.specs.items():
            made = None if name in out else frameworks.empty(self._file._framework, *spec)
            state[name] = out.get(name, made)
            pointers.append((name, frameworks.address(name, state[name], *spec)))
        self._memory = list(state.values())  # whatever becomes of the dict
        return state, pointers

    def part(self, part: Part) -> tuple:
        """A part of a tensor as :meth:`fill` takes it."""
        return (part.name, *part.request(self.specs[part.name][0]))

    def fill(
        self, buffers: Iterable[tuple], scale: float, progress: Progress | None = None
    ) -> None:
        """Merge the named tensors into the memory at these addresses, or of parts of them their
        first element and how many they have."""
        file, base = self._file, self._file._base
        requests = []
        for name, pointer, *part in buffers:
            tensor = self._tensors[name]
            source = file._base_tensor(_core.NONE, tensor, base)
            requests.append((_core.NONE, tensor, pointer, source, *part))
        file._file.merge(requests, self._min_tasks, scale, file._threads, file._check, progress)
        file._unmap()

    def info(self, scale: float, scores: dict[float, float], written: list[str]) -> MergeInfo:
        core, tasks = self._file._file, self._file.tasks
        entries = [core.entries(k) for k in range(len(tasks))]
        kept, partly, dropped = [], {}, []
        parameters = active = 0
        tensors = core.tensors()
        uncounted = [i for i, t in enumerate(tensors) if t["shared_dtype"] and not t["agreement"]]
        found = core.count_masks(uncounted, self._file._threads, self._file._check)
        by_tensor = dict(zip(uncounted, map(by_masks, found)))
        for i, tensor in enumerate(tensors):
            counts = tensor["agreement"] or by_tensor.get(i, [])
            parameters += sum(counts)
            active += sum(counts[self._min_tasks :])
            codings = [task[core.original(i)]["coding"] for task in entries]
            verbatim = [task for task, c in zip(tasks, codings) if c == numbers.VERBATIM]
            if not tensor["in_base"]:
                dropped.append(tensor["name"])
            elif verbatim and numbers.MASK in codings:
                partly[tensor["name"]] = verbatim
            elif verbatim:
                kept.append(tensor["name"])
        min_tasks = self._min_tasks or None
        masked, merged = self._about.masked, self._about.merged
        return MergeInfo(
            self._method, self._vector, min_tasks, scale, parameters, active, scores, written, kept,
            merged, [task for task in merged if task not in masked],
            [task for task in masked if task not in merged], partly, dropped,
        )  # fmt: skip


def _scale(value: Any) -> float:
    """α as a float. Raises ArgumentError where it is not a finite float32."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(number)):
            raise ArgumentError(f"scale must be a finite number, not {value!r}")
    return number


def _grid(grid: Iterable[float]) -> list[float]:
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise ArgumentError(f"grid must be a list of scales, not {grid!r}")
    scales = sorted({_scale(value) for value in grid})
    if not scales:
        raise ArgumentError("grid is empty: give at least one scale")
    return scales
