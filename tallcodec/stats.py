"""What the masks of a file say: how dense they are, how many tasks agree, how much two share."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

from .errors import ArgumentError
from .file import open as open_file
from .info import tasks_text
from .progress import Progress, check_progress

_MAX_TASKS = 4096  # the square of it in numbers are held at once
_LISTED = 24  # layers that the table shows one by one
_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")  # "encoder.layer.3" of encoder.layer.3.output.bias


@dataclass(frozen=True)
class Agreement:
    """How many elements are active in 0, 1, …, T of the T tasks."""

    counts: tuple[int, ...]

    @property
    def shares(self) -> list[float]:
        """The counts as shares of all elements, NaN where there are none."""
        return [_ratio(count, sum(self.counts)) for count in self.counts]

    @property
    def catastrophic(self) -> float:
        """The share of elements that are active in no task."""
        return self.shares[0]

    @property
    def selfish(self) -> float:
        """The share of those that are active in exactly one."""
        return self.shares[1] if self.counts[1:] else math.nan

    @property
    def universal(self) -> float:
        """The share of those that are active in all."""
        return self.shares[-1]

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(tuple(map(sum, zip(self.counts, other.counts))))

    def to_dict(self) -> dict:
        names = ("shares", "counts", "selfish", "catastrophic", "universal")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TensorStats:
    """One tensor that has masks, or several taken together."""

    name: str
    elements: int
    dont_cares: int
    """Elements on which the shared vector is 0: there a mask's bit would decode to nothing."""
    set_bits: dict[str, int]
    """By task, of those that have a mask."""
    coded: dict[str, int]
    """By task, the elements that have a mask."""
    published: Agreement
    """By the method's rule, which for a λ can be active at don't-cares, as published (an adapted
    mask is not). A task that equals the base is never active. Where tasks with masks were added to
    the file or removed, by the stored masks."""
    stored: Agreement
    """By the stored masks, over the elements that are no don't-cares."""

    @property
    def density(self) -> dict[str, float]:
        """The share of each task's mask bits that are 1."""
        return {task: _ratio(self.set_bits[task], n) for task, n in self.coded.items()}

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "elements": self.elements,
            "dont_cares": self.dont_cares,
            "density": self.density,
            "agreement": self.published.shares,
            "agreement_without_dont_cares": self.stored.shares,
        }


@dataclass(frozen=True)
class FileStats:
    """The masks of a `.tall` file. ``str()`` of it is a table, :meth:`to_dict` is for machines.

    *Trained* parameters are those of tensors for which a task has a mask; *all* are the base's, of
    which the others count as active in no task. Tied tensors count once.
    """

    path: str
    tasks: list[str]
    parameters: int
    """All of the base's."""
    trained: TensorStats
    """Over all trained parameters."""
    tensors: list[TensorStats]
    overlap: list[list[int]]
    """Task × task: elements on which both masks are set."""

    @property
    def jaccard(self) -> list[list[float]]:
        """Task × task: |a∧b| ÷ |a∨b|, NaN where neither has a bit set."""
        o = self.overlap
        return [
            [_ratio(both, o[a][a] + o[b][b] - both) for b, both in enumerate(row)]
            for a, row in enumerate(o)
        ]

    @property
    def layers(self) -> list[TensorStats]:
        """The tensors, those of one numbered block ("encoder.layer.3") taken together."""
        blocks: dict[str, list[TensorStats]] = {}
        for tensor in self.tensors:
            block = _BLOCK.match(tensor.name)
            blocks.setdefault(block[0] if block else tensor.name, []).append(tensor)
        return [_total(name, self.tasks, tensors) for name, tensors in blocks.items()]

    def over_all(self, agreement: Agreement) -> Agreement:
        """An agreement over the trained parameters, the untrained ones added."""
        none, *some = agreement.counts
        return Agreement((none + self.parameters - self.trained.elements, *some))

    def to_dict(self) -> dict:
        countings = {
            "agreement": self.trained.published,
            "agreement_without_dont_cares": self.trained.stored,
            "agreement_all": self.over_all(self.trained.published),
            "agreement_all_without_dont_cares": self.over_all(self.trained.stored),
        }
        return {
            "path": self.path,
            "tasks": self.tasks,
            "parameters": self.parameters,
            "trained_parameters": self.trained.elements,
            "dont_cares": self.trained.dont_cares,
            **{name: counting.shares for name, counting in countings.items()},
            "countings": {name: counting.to_dict() for name, counting in countings.items()},
            "density": self.trained.density,
            "layers": [layer.to_dict() for layer in self.layers],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "overlap": self.overlap,
            "jaccard": self.jaccard,
        }

    def __str__(self) -> str:
        trained, tasks = self.trained, self.tasks
        if not trained.elements:
            return f"{self.path}: {tasks_text(len(tasks))}, none of them has masks"
        lines = [
            f"{self.path}: {tasks_text(len(tasks))}, {trained.elements:,} of {self.parameters:,} "
            f"parameters trained, {trained.dont_cares:,} don't-cares among them",
            "",
            "shares in % of the parameters that are active in so many tasks; don't-cares: where "
            "the shared vector is 0",
        ]
        countings = {
            "trained, published": trained.published,
            "trained, no don't-cares": trained.stored,
            "all, published": self.over_all(trained.published),
            "all, no don't-cares": self.over_all(trained.stored),
        }
        head = ("", *map(str, range(len(tasks) + 1)), "selfish", "catastrophic", "universal")
        lines += _table([head] + [
            (name, *map(_percent, (*a.shares, a.selfish, a.catastrophic, a.universal)))
            for name, a in countings.items()
        ])  # fmt: skip
        lines += ["", "density of the masks in %"]
        parts = self.tensors if len(self.tensors) <= _LISTED else self.layers
        lines += _table([("", "elements", *tasks)] + [
            (part.name, f"{part.elements:,}",
             *(_percent(part.density.get(task, math.nan)) for task in tasks))
            for part in (*parts, trained)
        ])  # fmt: skip
        lines += ["", "overlap |a∧b| ÷ |a∨b| in %"]
        rows = zip(tasks, self.jaccard)
        lines += _table([("", *tasks), *((task, *map(_percent, row)) for task, row in rows)])
        return "\n".join(lines)


def stats(
    path: str | PathLike, *, threads: int | None = None, progress: Progress | None = None
) -> FileStats:
    """Count what the masks of a `.tall` file say; the checksums of what is read are checked.
    ``progress`` is called as ``progress(step, done, total)``.

    Raises what opening a file raises, VersionError where a task's tensor is coded in a way that is
    not known here, ChecksumError.
    """
    check_progress(progress)
    with open_file(path, "np", threads=threads) as file:
        core, tasks = file._file, file.tasks
        records = core.tensors()
        own = [i for i, t in enumerate(records) if t["in_base"] and t["alias"] is None]
        if len(tasks) > _MAX_TASKS:
            raise ArgumentError(
                f"{file._label}: {len(tasks):,} tasks, whose overlaps would be {len(tasks) ** 2:,} "
                f"numbers: at most {_MAX_TASKS:,} are counted"
            )
        batch = max(1, _MAX_TASKS**2 // max(1, len(tasks)) ** 2)  # tensors, for memory's sake
        counted = itertools.chain.from_iterable(
            core.count_masks(own[i : i + batch], file._threads, True, progress)
            for i in range(0, len(own), batch)
        )
        tensors = []
        overlap = [[0] * len(tasks) for _ in tasks]
        for i, counts in zip(own, counted):
            coded = counts["tasks"]
            if not coded:
                continue
            pairs = iter(counts["overlap"])
            for a in coded:
                for b in coded:
                    overlap[a][b] += next(pairs)
            elements = math.prod(records[i]["shape"])
            set_bits = counts["overlap"][:: len(coded) + 1]
            tensors.append(
                TensorStats(
                    name=records[i]["name"],
                    elements=elements,
                    dont_cares=counts["zeros"],
                    set_bits={tasks[k]: bits for k, bits in zip(coded, set_bits)},
                    coded={tasks[k]: elements for k in coded},
                    published=_agreement(records[i]["agreement"] or by_masks(counts), tasks),
                    stored=_agreement(counts["agreement"], tasks),
                )
            )
        return FileStats(
            path=file._label,
            tasks=tasks,
            parameters=sum(math.prod(records[i]["shape"]) for i in own),
            trained=_total("all of them", tasks, tensors),
            tensors=tensors,
            overlap=overlap,
        )


def by_masks(counts: dict) -> list[int]:
    """The elements on which 0, 1, … masks are set, don't-cares among them: where tasks have come or
    gone, the file has no counts by their rule. Of adapted masks these are the same."""
    return [counts["agreement"][0] + counts["zeros"], *counts["agreement"][1:]]


def _agreement(counts: list[int], tasks: list[str]) -> Agreement:
    """Of T tasks, from counts of those that are coded: the others are never active."""
    return Agreement((*counts, *[0] * (len(tasks) + 1 - len(counts))))


def _total(name: str, tasks: list[str], tensors: Iterable[TensorStats]) -> TensorStats:
    """Several tensors taken together."""
    tensors = list(tensors)
    coded = {task: sum(t.coded.get(task, 0) for t in tensors) for task in tasks}
    return TensorStats(
        name=name,
        elements=sum(t.elements for t in tensors),
        dont_cares=sum(t.dont_cares for t in tensors),
        set_bits={task: sum(t.set_bits.get(task, 0) for t in tensors) for task in tasks},
        coded=coded,
        published=sum((t.published for t in tensors), _agreement([], tasks)),
        stored=sum((t.stored for t in tensors), _agreement([], tasks)),
    )


def _ratio(a: int, b: int) -> float:
    return a / b if b else math.nan


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
