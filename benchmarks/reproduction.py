"""The paper's mask statistics and storage (arXiv 2405.07813), and what our files take beside it.

    python benchmarks/reproduction.py              # ten minutes, 17 GB of temporary disk
    python benchmarks/reproduction.py --predict    # sizes alone, from the shapes, at once

Makes checkpoints of exactly the paper's shapes (shapes.py) with independent Gaussian weights and
task vectors, nothing downloaded, and encodes them. Two questions:

Agreement: the share of trained weights that are active in 0, 1, … T tasks, as encode counts
them by the published rule, against the paper's figure, on T independent task vectors.

Storage: P trained and F frozen float32 parameters take, as the paper counts, 32(TP + F) bits
fine-tuned, 32(P + F) merged, (64 + T)P + 32F as TALL masks; a .tall file takes what it takes, to
the byte. The size of a raw plane does not depend on its values, so outside ViT-B-32 the tasks
are two checkpoints under T names in turn; at ViT-B-32 both ways are encoded, and must agree. Every
size must be the one that `file_size` computes from the shapes.

Writes results/reproduction_agreement.csv, reproduction_distance.csv and reproduction_storage.csv.
"""

import argparse
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tallcodec
from common import RESULTS, clean_up_when_terminated, write_csv
from shapes import ARCHITECTURES, Architecture
from synthetic import elements, normal, write_checkpoint
from tallcodec import _core
from tallcodec.reference import records

# Percent of weights active in 0, 1, … T tasks, ViT-B/32, task arithmetic: the bars of the figures
# on the authors' page, tall-masks.github.io, measured in pixels (11.5 to a point; the bars of
# each figure add up to 99.99 or 100.00). They are not published as numbers.
PUBLISHED_AGREEMENT = {
    8: (5.26, 16.43, 23.05, 17.63, 11.27, 8.39, 6.75, 5.85, 5.36),
    14: (6.99, 11.25, 12.93, 12.04, 9.83, 7.86, 6.50, 5.53, 4.84, 4.34, 3.97, 3.71, 3.52, 3.38,
         3.30),
    20: (8.80, 10.08, 10.01, 9.08, 7.77, 6.51, 5.52, 4.78, 4.22, 3.79, 3.46, 3.19, 2.98, 2.81,
         2.67, 2.55, 2.46, 2.39, 2.34, 2.29, 2.27),
}  # fmt: skip
# 10⁹ bits of the paper's tables: fine-tuned, merged, TALL masks. None was found for ViT-B/16.
PUBLISHED_GB = {
    ("ViT-B-32", 8): (23.3, 3.6, 7.1),
    ("ViT-B-32", 14): (40.2, 3.6, 7.7),
    ("ViT-B-32", 20): (57.0, 3.6, 8.2),
    ("ViT-L-14", 8): (79.1, 11.0, 23.1),
    ("ViT-L-14", 14): (137.4, 11.0, 24.9),
    ("ViT-L-14", 20): (195.8, 11.0, 26.8),
    ("T5-large", 7): (169.1, 25.1, 54.3),
    ("T5-large", 8): (193.1, 25.1, 55.1),
    ("T5-large", 11): (265.1, 25.1, 57.3),
}
TASKS = {name: (7, 8, 11) if name == "T5-large" else (8, 14, 20) for name in ARCHITECTURES}
PUBLISHED_METHOD = {"merge": "task-arithmetic", "method": "tall", "scale": "none"}
GRID = (0.2, 0.3, 0.4, 0.5, 0.6)  # the paper's λ
THRESHOLDS = {8: 0.5, 14: 0.4, 20: 0.4}  # that of the grid nearest to the figure
AGREEMENT_MODEL = "ViT-B-32"
SHARED_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8 + 32 / 128}  # a scale per 128 elements

BASE_SPREAD, TASK_SPREAD = 0.02, 3e-4  # standard deviations of θ₀ and of every τ


class Paper(NamedTuple):
    """10⁹ bits, as the paper counts."""

    fine_tuned: float
    merged: float
    tall: float


def paper_storage(trained: int, frozen: int, tasks: int) -> Paper:
    """The paper's count for P = trained and F = frozen parameters."""
    return Paper(
        32 * (tasks * trained + frozen) / 1e9,
        32 * (trained + frozen) / 1e9,
        counted_bits(trained, frozen, tasks, 32) / 1e9,
    )


def counted_bits(trained: int, frozen: int, tasks: int, shared_bits: float) -> float:
    """The paper's (64 + T)P + 32F for a shared vector of 32 bits, and alike for others."""
    return (32 + shared_bits + tasks) * trained + 32 * frozen


def file_size(architecture: Architecture, tasks: list, shared_dtype: str = "float32") -> int:
    """Bytes of the .tall file of such a family, from shapes and names alone (docs/format.md).

    ``tasks`` are the tasks' names. Holds for float32 checkpoints without metadata and side files,
    no tensor empty and no two equal, whose trained tensors differ from the base's in every task and
    whose frozen ones do not; for files without a scale that embed the base.
    """
    trained, frozen = architecture
    planes = [4 * math.prod(shape) for shape in (*trained.values(), *frozen.values())]
    for shape in trained.values():
        n = math.prod(shape)
        planes.append({"float32": 4, "bfloat16": 2, "int8": 1}[shared_dtype] * n)
        planes += [4 * -(-n // 128)] if shared_dtype == "int8" else []
        planes += [-(-n // 8)] * len(tasks)
    names = [*trained, *frozen]
    texts = [f"tallcodec {tallcodec.__version__}", *names, *tasks]
    numbers = (  # 64-bit: dims, sums, counts
        sum(len(shape) for shape in (*trained.values(), *frozen.values()))
        + sum(records.sum_count(size) for size in planes)
        + len(trained) * (len(tasks) + 1)
    )
    index = (
        records.INDEX.size
        + records.TENSOR.size * len(names)
        + records.TASK.size * len(tasks)
        + records.ENTRY.size * len(names) * len(tasks)
        + records.PLANE.size * len(planes)
        + 8 * numbers
        + sum(len(text.encode()) for text in texts)
    )
    return records.HEADER_SIZE + sum(map(records.align64, planes)) + records.align64(index)


def write_base(path: Path, architecture: Architecture) -> None:
    """A float32 checkpoint of Gaussian weights, written as it is made."""
    random = np.random.Generator(np.random.SFC64(0))
    _write(path, architecture, lambda _, count: normal(random, count, BASE_SPREAD))


def write_task(path: Path, architecture: Architecture, base: Path, seed: int) -> None:
    """The base with a Gaussian task vector added to what is trained. ``seed`` is at least 1."""
    random = np.random.Generator(np.random.SFC64(seed))
    with open(base, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))

        def make(name: str, count: int) -> np.ndarray:
            values = np.fromfile(file, np.float32, count)
            trained = name in architecture.trained
            return values + normal(random, count, TASK_SPREAD) if trained else values

        _write(path, architecture, make)


def _write(path: Path, architecture: Architecture, make) -> None:
    write_checkpoint(path, architecture.trained | architecture.frozen, "float32", make)


def agreement(path: Path, tasks: int) -> np.ndarray:
    """Trained weights active in 0, 1, … T tasks by the published rule, as the file counts them."""
    counts = np.zeros(tasks + 1, np.int64)
    for tensor in _core.File(str(path), np.memmap(path, np.uint8, "r")).tensors():
        if tensor["agreement"]:
            counts += tensor["agreement"]
    return counts


def distance(a, b) -> float:
    """Σ|a − b| of two histograms; their total variation distance is half of it."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).sum())


class Family:
    """A base and some task checkpoints of an architecture, in a folder."""

    def __init__(self, name: str, folder: Path, checkpoints: int):
        self.name, self.folder = name, folder
        self.architecture = ARCHITECTURES[name]
        self.base = folder / "base.safetensors"
        self.checkpoints = [folder / f"task{i + 1}.safetensors" for i in range(checkpoints)]
        write_base(self.base, self.architecture)
        for i, path in enumerate(self.checkpoints):
            write_task(path, self.architecture, self.base, i + 1)
        self.output = folder / "family.tall"

    def tasks(self, count: int, distinct: int) -> dict[str, Path]:
        """``count`` names for the first ``distinct`` checkpoints, in turn."""
        turns = itertools.cycle(self.checkpoints[:distinct])
        return {task: next(turns) for task in task_names(count)}

    def encode(
        self, tasks: Mapping[str, Path], threads: int, shared_dtype: str, threshold: float = 0.4
    ) -> float:
        """Encode to ``output``; returns the seconds. Exits where the size is not the predicted."""
        self.output.unlink(missing_ok=True)  # or the disk holds the last one and the next
        start = time.perf_counter()
        info = tallcodec.encode(
            self.base, tasks, self.output, **PUBLISHED_METHOD, threshold=threshold,
            shared_dtype=shared_dtype, base_storage="embed", threads=threads,
        )  # fmt: skip
        elapsed = time.perf_counter() - start
        found = self.output.stat().st_size
        expected = file_size(self.architecture, list(tasks), shared_dtype)
        if not found == info.bytes == expected:
            raise SystemExit(f"{self.name}: {found} bytes where {expected} were predicted")
        return elapsed


def task_names(count: int) -> list[str]:
    return [f"task{i + 1:02}" for i in range(count)]


def storage_row(name: str, tasks: int, shared_dtype: str, size: int, **columns) -> dict:
    """One line of the storage table; ``size`` is the file's, in bytes."""
    trained, frozen = map(elements, ARCHITECTURES[name])
    paper = paper_storage(trained, frozen, tasks)
    published = PUBLISHED_GB.get((name, tasks), ("", "", ""))
    counted = counted_bits(trained, frozen, tasks, SHARED_BITS[shared_dtype]) / 8
    return {
        "model": name, "tasks": tasks, "shared": shared_dtype,
        "trained": trained, "frozen": frozen,
        **{f"paper_{k}_gb": round(v, 4) for k, v in paper._asdict().items()},
        **{f"published_{k}_gb": v for k, v in zip(Paper._fields, published)},
        "bytes": size, "gb": round(8 * size / 1e9, 4),
        "counted_bytes": round(counted), "overhead_bytes": size - round(counted),
        "overhead": size / counted - 1,
        "models": size / (4 * (trained + frozen)),
        "ratio": 1e9 * paper.fine_tuned / 8 / size,
        **columns,
    }  # fmt: skip


def predict(models: list) -> list[dict]:
    """The storage table without a file: sizes from the shapes."""
    return [
        storage_row(name, tasks, dtype, file_size(ARCHITECTURES[name], task_names(tasks), dtype))
        for name in models
        for tasks in TASKS[name]
        for dtype in SHARED_BITS
    ]


def measure_storage(family: Family, threads: int) -> Iterator[dict]:
    """Encode each number of tasks with each type of shared vector."""
    distinct = len(family.checkpoints)
    for tasks, dtype in itertools.product(TASKS[family.name], SHARED_BITS):
        chosen = family.tasks(tasks, distinct)
        elapsed = family.encode(chosen, threads, shared_dtype=dtype)
        size = family.output.stat().st_size
        yield storage_row(family.name, tasks, dtype, size, distinct=min(tasks, distinct),
                          encode_s=elapsed, threads=threads)  # fmt: skip


def measure_agreement(family: Family, threads: int) -> Iterator[dict]:
    """Encode with every λ of the grid and read the counts: one row per λ and number of tasks."""
    trained, frozen = map(elements, family.architecture)
    for tasks, threshold in itertools.product(TASKS[family.name], GRID):
        chosen = family.tasks(tasks, len(family.checkpoints))
        family.encode(chosen, threads, shared_dtype="float32", threshold=threshold)
        counts = agreement(family.output, tasks)
        if counts.sum() != trained:
            raise SystemExit(f"{counts.sum()} weights counted, not {trained}")
        shares = 100 * counts / trained
        everything = counts + frozen * (np.arange(tasks + 1) == 0)  # frozen: active in no task
        yield {"tasks": tasks, "threshold": threshold, "trained": shares,
               "all": 100 * everything / (trained + frozen),
               "l1": distance(shares, PUBLISHED_AGREEMENT[tasks]),
               "l1_all": distance(100 * everything / (trained + frozen),
                                  PUBLISHED_AGREEMENT[tasks])}  # fmt: skip


def check_repeated(family: Family, threads: int) -> None:
    """Two checkpoints in turn make a file as large as distinct ones do: checked by encode."""
    tasks = TASKS[family.name][0]
    family.encode(family.tasks(tasks, 2), threads, shared_dtype="float32")


def needed_bytes(name: str, checkpoints: int) -> int:
    """Disk for a family: its checkpoints and the largest file."""
    model = 4 * sum(map(elements, ARCHITECTURES[name]))
    largest = file_size(ARCHITECTURES[name], task_names(max(TASKS[name])))
    return (checkpoints + 1) * model + largest


def markdown(header: list, rows: Iterator, left: int = 1) -> str:
    """A table; the first ``left`` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in (header, rule, *rows))


def storage_table(rows: list) -> str:
    def cells(r):
        published = [r[f"published_{k}_gb"] for k in ("fine_tuned", "tall")]
        yield from (r["model"], r["shared"], r["tasks"])
        for key, figure in zip(("fine_tuned", "tall"), published):
            own = f"{r[f'paper_{key}_gb']:.2f}"
            yield f"{own} ({figure})" if figure != "" else own
        yield from (f"{r['bytes']:,}", f"{r['gb']:.2f}", f"{r['overhead_bytes']:,}")
        yield from (f"{r['overhead']:.3%}", f"{r['models']:.3f}", f"{r['ratio']:.2f}")
        yield f"{r['encode_s']:.1f}" if "encode_s" in r else ""

    header = ["model", "shared vector", "tasks", "fine-tuned, Gb", "TALL, Gb", "file, bytes",
              "file, Gb", "over the count, bytes", "over the count", "models", "× smaller",
              "encode s"]  # fmt: skip
    return markdown(header, map(cells, rows), left=2)


def agreement_table(rows: list) -> str:
    """The histograms at the nearest λ, beside the published."""
    def lines():
        for r in rows:
            if r["threshold"] == THRESHOLDS[r["tasks"]]:
                for who, shares in (("paper", PUBLISHED_AGREEMENT[r["tasks"]]),
                                    ("Gaussian", r["trained"])):  # fmt: skip
                    padded = [f"{x:.1f}" for x in shares] + [""] * (20 - r["tasks"])
                    yield [f"{r['tasks']}, {who}", *padded]

    return markdown(["tasks", *range(21)], lines())


def distance_table(rows: list) -> str:
    """Σ|a − b| in points for every λ of the grid; the smallest of each row is bold."""
    def lines():
        for tasks, group in itertools.groupby(rows, lambda r: r["tasks"]):
            found = [r["l1"] for r in group]
            best = min(found)
            yield [tasks, *(f"**{x:.2f}**" if x == best else f"{x:.2f}" for x in found),
                   f"{best / 2:.2f}"]  # fmt: skip

    return markdown(["tasks", *(f"λ = {x}" for x in GRID), "total variation"], lines(), left=0)


def agreement_rows(rows: list) -> Iterator[dict]:
    """One line per bar."""
    for r in rows:
        for active, bars in enumerate(zip(PUBLISHED_AGREEMENT[r["tasks"]], r["trained"], r["all"])):
            yield {"tasks": r["tasks"], "threshold": r["threshold"], "active": active,
                   **{k: round(float(v), 4)
                      for k, v in zip(("published", "trained", "all"), bars)}}  # fmt: skip


def distance_rows(rows: list) -> Iterator[dict]:
    for r in rows:
        yield {"tasks": r["tasks"], "threshold": r["threshold"], "l1": round(r["l1"], 3),
               "total_variation": round(r["l1"] / 2, 3),
               "l1_all_parameters": round(r["l1_all"], 3)}  # fmt: skip


def run(models: list, folder: Path, threads: int) -> tuple[list, list]:
    """(storage rows, agreement rows), each family removed before the next is made."""
    storage, shares = [], []
    for name in models:
        checkpoints = max(TASKS[name]) if name == AGREEMENT_MODEL else 2
        needed, free = needed_bytes(name, checkpoints), shutil.disk_usage(folder).free
        if needed > free:
            raise SystemExit(f"{name} needs {needed:,} bytes in {folder}, which has {free:,}")
        with tempfile.TemporaryDirectory(prefix="reproduction-", dir=folder) as scratch:
            start = time.perf_counter()
            family = Family(name, Path(scratch), checkpoints)
            print(f"{name}: {checkpoints} checkpoints made in {time.perf_counter() - start:.0f} s",
                  flush=True)  # fmt: skip
            for row in measure_storage(family, threads):
                storage.append(row)
                print(f"{name}, {row['tasks']} tasks, {row['shared']}: {row['bytes']:,} bytes, "
                      f"{row['encode_s']:.1f} s", flush=True)  # fmt: skip
            if name == AGREEMENT_MODEL:
                check_repeated(family, threads)
                shares += measure_agreement(family, threads)
    return storage, shares


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--predict", action="store_true", help="sizes from the shapes; makes nothing")
    ap.add_argument("--models", default=",".join(ARCHITECTURES),
                    help="which, separated by commas (results are written for all of them only)")
    ap.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()),
                    help="where the checkpoints are made, up to 17 GB; removed in the end")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    models = args.models.split(",")
    if unknown := set(models) - set(ARCHITECTURES):
        ap.error(f"no such model: {', '.join(sorted(unknown))}")
    if args.predict:
        print(storage_table(predict(models)))
        return
    clean_up_when_terminated()
    storage, shares = run(models, args.folder, args.threads)
    if shares:
        print("\n" + agreement_table(shares) + "\n\n" + distance_table(shares))
    print("\n" + storage_table(storage))
    if set(models) == set(ARCHITECTURES):
        write_csv(RESULTS / "reproduction_storage.csv", storage)
        write_csv(RESULTS / "reproduction_agreement.csv", list(agreement_rows(shares)))
        write_csv(RESULTS / "reproduction_distance.csv", list(distance_rows(shares)))


if __name__ == "__main__":
    main()
