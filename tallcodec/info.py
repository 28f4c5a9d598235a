"""What a file holds and what it costs, as numbers and as a table."""

import contextlib
import json
import math
from dataclasses import asdict, dataclass

import numpy as np

from . import _core, numbers
from .numbers import name_of

# Keys of the file's metadata that are the library's own, and hold JSON: a search's scores, and the
# tasks whose sum the shared vector is, where these are no longer those that have masks of it.
SCORES, MERGED = "tallcodec.scores", "tallcodec.merged"
_LISTED = 20  # verbatim tensors that the table names per task


@dataclass(frozen=True)
class VerbatimTensor:
    """A tensor stored as it is, and why."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    """As stored, perhaps compressed."""
    reason: str


@dataclass(frozen=True)
class TaskInfo:
    """One task: how it is coded, what that costs, and how close it comes.

    ``density``, ``gain`` and ``error`` are over the task's coded parameters, from sums in float64
    of the float32 values τ = θ_t − θ₀ and τ̂ = g·(m∘s). Only those of ternary planes count the
    rounding to the checkpoint's dtype. NaN where nothing is coded.
    """

    name: str
    method: str
    threshold: float
    """λ of "tall"; of "magnitude" the smallest magnitude that is active; of "adapted" the share of
    the best cosine that the masks of a tensor must have; of "ternary" the bits per parameter that
    were asked for, 0 where a density was."""
    parameters: int
    """Elements of all tensors of the task."""
    coded_parameters: int
    """Elements of those that have a mask or a ternary plane."""
    bytes: int
    """Of the planes that are the task's own: masks or ternary planes, scales per row, verbatim
    tensors."""
    bits: float
    """8 · ``bytes`` ÷ ``parameters``."""
    density: float
    """Share of mask bits that are 1, or of a ternary plane's elements that are not 0."""
    published_density: float
    """The same by the method's rule; λ's also sets bits where the shared vector is zero."""
    gain: float
    """⟨τ̂,τ⟩ ÷ ⟨τ,τ⟩."""
    error: float
    """‖τ̂ − τ‖ ÷ ‖τ‖."""
    tensors: dict[str, int]
    """How many are "as the base", "mask", "ternary", "verbatim", "absent" or "tied"."""
    verbatim: list[VerbatimTensor]


@dataclass(frozen=True)
class FileInfo:
    """A `.tall` file. ``str()`` of it is a table, :meth:`to_dict` is for machines."""

    path: str
    writer: str
    bytes: int
    base_storage: str
    merge: str
    scale: str
    tensors: int
    base_parameters: int
    base_bytes: int
    """Of the base checkpoint's tensors, embedded or not."""
    planes: dict[str, int]
    """Stored bytes by kind: "base", "shared", "mask", "ternary", "scales", "verbatim", "file"."""
    overhead: int
    """Bytes of the file in no plane: header, index, padding and free ranges."""
    reclaimable: int
    """Bytes that :func:`tallcodec.compact` gives back: free ranges, and what is behind the end."""
    metadata: dict[str, str]
    tasks: list[TaskInfo]
    scores: dict[str, dict[float, float]]
    """Of every task, by λ or bits: what a search for them found. Empty where there was none."""
    merged: list[str]
    """The tasks that the shared vector was made of: those that have masks, until some are added or
    removed, which leaves it as it is."""

    @property
    def masked(self) -> list[str]:
        """The tasks whose method is one of masks."""
        return _masked(self.tasks)

    @property
    def models(self) -> float:
        """The file's size in base checkpoints, counting a base that is only referenced."""
        external = self.base_bytes if self.base_storage == "reference" else 0
        return (self.bytes + external) / self.base_bytes if self.base_bytes else math.nan

    def to_dict(self) -> dict:
        return asdict(self) | {"models": self.models}

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {_size(self.bytes)}, {tasks_text(len(self.tasks))}, "
            f"{self.tensors} tensors, {self.base_parameters:,} parameters",
            f"base {self.base_storage}, merge {self.merge}, scale {self.scale}, "
            f"{self.models:.3f} × the base for base and tasks together; written by {self.writer}",
            "bytes: " + ", ".join(f"{kind} {_size(n)}" for kind, n in self.planes.items())
            + f", else {_size(self.overhead)}"
            + (f", of these {_size(self.reclaimable)} to reclaim" if self.reclaimable else ""),
            "",
        ]  # fmt: skip
        if self.metadata:
            lines.insert(-1, "metadata: " + ", ".join(f"{k}={v}" for k, v in self.metadata.items()))
        if self.masked and self.merged != self.masked:
            lines.insert(-1, f"the shared vector is of: {', '.join(self.merged)}")
        rows = [(
            "task", "λ", "bits/param", "density", "gain", "error", "coded", "base", "verbatim",
            "absent",
        )]  # fmt: skip
        for t in self.tasks:
            rows.append((
                t.name, _rule(t), _3(t.bits), _3(t.density), _3(t.gain), _3(t.error),
                str(t.tensors["mask"] + t.tensors["ternary"]), str(t.tensors["as the base"]),
                str(t.tensors["verbatim"]), str(t.tensors["absent"]),
            ))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
            lines.append("  ".join(cells).rstrip())
        for t in self.tasks:
            if t.tensors["verbatim"] and not t.tensors["mask"] + t.tensors["ternary"]:
                lines.append(f"{t.name}: all stored as it is; is it a fine-tune of this base?")
        ternary = {task.name for task in self.tasks if task.method == "ternary"}
        for task, scores in self.scores.items():
            found = ", ".join(f"{value:g}: {score:.6g}" for value, score in scores.items())
            lines.append(f"scores by {'bits' if task in ternary else 'λ'}: {task}, {found}")
        for task in self.tasks:
            for v in task.verbatim[:_LISTED]:
                lines.append(
                    f"verbatim: {task.name}, {v.name} {v.dtype} {list(v.shape)}, "
                    f"{_size(v.bytes)}: {v.reason}"
                )
            if len(task.verbatim) > _LISTED:
                more = len(task.verbatim) - _LISTED
                lines.append(f"verbatim: {task.name}, {more} more (see JSON)")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    """What :func:`tallcodec.verify` found to be whole."""

    path: str
    bytes: int
    tasks: int
    tensors: int
    planes: int
    ignored: int
    """Bytes behind the file's end, as an interrupted append leaves them; they mean nothing."""
    base_checked: bool
    """Whether a referenced base was given and is the right one; True where it is embedded."""
    damaged_slot: bool
    """Whether one of the header's two slots is damaged, and does not matter: the one before the
    latest change, or that change's own, which is then not there. Another copy repairs it."""
    repaired: int = 0
    """Blocks that were repaired before, header and index among them."""
    proved: int = 0
    """How many tasks were proved against their checkpoints."""

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        base = "" if self.base_checked else "; its base is only referenced and was not checked"
        if self.proved:
            base += f"; {tasks_text(self.proved)} proved by what it says of their checkpoints"
        if self.ignored:
            base += f"; {self.ignored} bytes behind its end are ignored"
        if self.damaged_slot:
            base += "; a slot of its header is damaged: if it is that of the last change, this is "
            base += "the file before it, and a copy repairs it (--repair-from)"
        if self.repaired:
            base += f"; {self.repaired} blocks were repaired"
        return (
            f"{self.path}: whole: {_size(self.bytes)}, {tasks_text(self.tasks)}, "
            f"{self.tensors} tensors, {self.planes} planes{base}"
        )


def tasks_text(count: int) -> str:
    return f"{count} task" if count == 1 else f"{count} tasks"


def read_info(path: str, size: int, file: _core.File) -> FileInfo:
    """Gather a file's numbers from its index."""
    header, tensors, planes = file.header(), file.tensors(), file.planes()
    tasks = [_task_info(file, i, task, tensors, planes) for i, task in enumerate(file.tasks())]
    stored = dict.fromkeys(numbers.PLANES, 0)
    for number, _, _, plane_size, _ in planes:
        kind = name_of(number, numbers.PLANES)
        stored[kind] = stored.get(kind, 0) + plane_size
    base_bytes = base_parameters = 0
    for i, tensor in enumerate(tensors):
        if tensor["in_base"] and tensor["alias"] is None:
            base_bytes += file.info(_core.NONE, i)[2]
            base_parameters += math.prod(tensor["shape"])
    metadata = {k: v for scope, k, v in file.metadata() if scope == _core.SCOPE_FILE}
    return FileInfo(
        path=path,
        writer=header["writer"],
        bytes=size,
        base_storage=name_of(header["base_storage"], numbers.BASE_STORAGES),
        merge=name_of(header["merge"], numbers.MERGES),
        scale=name_of(header["scale"], numbers.SCALES),
        tensors=len(tensors),
        base_parameters=base_parameters,
        base_bytes=base_bytes,
        planes={kind: count for kind, count in stored.items() if count},
        overhead=size - sum(stored.values()),
        reclaimable=size - file.size() + sum(length for _, length in file.free()),
        metadata={k: v for k, v in metadata.items() if k not in (SCORES, MERGED)},
        scores=_scores(metadata.get(SCORES)),
        merged=_merged(metadata.get(MERGED), tasks),
        tasks=tasks,
    )


def _task_info(file: _core.File, number: int, task: dict, tensors: list, planes: list) -> TaskInfo:
    kinds = ("as the base", "mask", "verbatim", "absent", "ternary")
    tally = dict.fromkeys((*kinds, "tied", "unknown"), 0)
    parameters = coded = stored = set_bits = published = 0
    tau_sq = dot = approx_sq = 0.0
    verbatim = []
    for i, (tensor, entry) in enumerate(zip(tensors, file.entries(number))):
        if tensor["alias"] is not None:
            tally["tied"] += 1
            continue
        if entry["coding"] >= len(kinds):
            tally["unknown"] += 1
            continue
        tally[kinds[entry["coding"]]] += 1
        if entry["coding"] == numbers.ABSENT:
            continue
        dtype, shape, _ = file.info(number, i)
        elements = math.prod(shape)
        parameters += elements
        own = [planes[p][3] for p in (entry["plane"], entry["scales_plane"]) if p is not None]
        stored += sum(own)
        if entry["coding"] == numbers.VERBATIM:
            reason = name_of(entry["reason"], numbers.REASONS)
            name = name_of(dtype, numbers.DTYPES)
            verbatim.append(VerbatimTensor(tensor["name"], name, shape, sum(own), reason))
        elif entry["coding"] in (numbers.MASK, numbers.TERNARY):
            coded += elements
            set_bits += entry["set_bits"]
            published += entry["published_bits"]
            tau_sq += entry["tau_sq"]
            dot += entry["dot"]
            approx_sq += entry["approx_sq"]
    error_sq = _ratio(max(0.0, approx_sq - 2 * dot + tau_sq), tau_sq)
    return TaskInfo(
        name=task["name"],
        method=name_of(task["method"], numbers.METHODS),
        threshold=float(str(np.float32(task["threshold"]))),  # 0.4, not 0.4000000059604645
        parameters=parameters,
        coded_parameters=coded,
        bytes=stored,
        bits=_ratio(8 * stored, parameters),
        density=_ratio(set_bits, coded),
        published_density=_ratio(published, coded),
        gain=_ratio(dot, tau_sq),
        error=math.sqrt(error_sq) if error_sq >= 0 else math.nan,  # a file may claim anything
        tensors={kind: count for kind, count in tally.items() if kind != "unknown" or count},
        verbatim=verbatim,
    )


def _scores(text: str | None) -> dict[str, dict[float, float]]:
    """Those of a search, as encode keeps them; what is not of that form is nobody's scores."""
    try:
        found = json.loads(text or "{}")
        return {
            str(task): dict(zip(map(float, found["grid"]), map(float, scores), strict=True))
            for task, scores in found.get("scores", {}).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _merged(text: str | None, tasks: list[TaskInfo]) -> list[str]:
    """What a change has noted, or else the tasks that have masks."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return [str(name) for name in json.loads(text)]
    return _masked(tasks)


def _masked(tasks: list[TaskInfo]) -> list[str]:
    return [task.name for task in tasks if task.method != "ternary"]


def _rule(task: TaskInfo) -> str:
    return f"{task.threshold:g}" if task.method == "tall" else task.method


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _3(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.3f}"


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"
