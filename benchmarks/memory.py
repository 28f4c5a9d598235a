"""What encoding and decoding take in memory, whatever the size of the family.

    python benchmarks/memory.py                   # half an hour, 30 GB of disk for a while
    python benchmarks/memory.py --elements 1e6    # a small family: a look, nothing written

Peak resident memory (VmHWM, which counts pages of mapped files) of a process of its own for each
operation, over that of the interpreter when it has imported tallcodec; what is decoded into tensors
of the caller's is not counted. `seconds` are of that one call, from and to the disk or the page
cache, as it comes. All families are bfloat16, with a Llama's shapes, most of it one embedding.

- parameters: 8 tasks, a 64th, a 16th and a quarter of the full size;
- tasks: 1 to 32 of a 16th;
- largest: 32 tasks of 1.25 G parameters, 262,144 × 4,096 of them in the embedding.

Families of more than 4 tasks have 4 checkpoints under several names: each name is opened, read and
coded like any other task. `published` is what the published method's code needs, which holds
(30·T + 24) bytes per parameter. Writes results/memory.csv; with --docs also the table in
docs/benchmarks.md.
"""

import argparse
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

import tallcodec
from common import (
    DOCS,
    RESULTS,
    around,
    clean_up_when_terminated,
    markdown,
    print_table,
    write_csv,
    write_part,
)
from shapes import Shapes, llama
from synthetic import DTYPES, Family, elements, make_family

PAGE = DOCS / "benchmarks.md"
MIB, GIB = 1 << 20, 1 << 30
CHECKPOINTS = 4
ROWS = 16  # of the embedding, decoded alone
WAYS = {
    "TALL, default": {},
    "TALL, entropy coded": {"coding": "entropy"},
    "TIES": {"merge": "ties"},
    "ternary": {"method": "ternary"},
    "ternary, raw": {"method": "ternary", "coding": "raw"},
}


def model(width: int) -> Shapes:
    """One layer, and an embedding that is six times as large."""
    return llama(width, 1, 64 * width)


FULL = elements(model(4096))


def width_of(parameters: float) -> int:
    return 64 * max(1, round(4096 * math.sqrt(parameters / FULL) / 64))


def peak() -> int:
    """Bytes that were resident in this process at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def encode(family: Family, tasks: int, path: Path, way: str) -> int:
    tallcodec.encode(family.base, family.tasks(tasks), path, **WAYS[way])
    return 0


def save(family: Family, tasks: int, path: Path, way: str) -> int:
    with tallcodec.open(path, "np") as file:
        file.save("task01", path.with_suffix(".safetensors"), overwrite=True)
    return 0


def decode(family: Family, tasks: int, path: Path, way: str) -> int:
    out = {name: np.empty(shape, DTYPES[family.dtype]) for name, shape in family.shapes.items()}
    with tallcodec.open(path, "np") as file:
        file.decode("task01", out=out)
    return sum(tensor.nbytes for tensor in out.values())


def decode_rows(family: Family, tasks: int, path: Path, way: str) -> int:
    name, (rows, _) = next(iter(family.shapes.items()))
    with tallcodec.open(path, "np") as file:
        file.decode_rows("task01", name, rows // 2, rows // 2 + ROWS)
    return 0


def watched(operation, *arguments) -> tuple[int, float]:
    """Bytes at most, and seconds. ``operation`` returns the bytes that are its caller's."""
    before, start = peak(), time.perf_counter()
    callers = operation(*arguments)
    return peak() - before - callers, time.perf_counter() - start


def in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure(family: Family, sweep: str, tasks: int, folder: Path) -> list[dict]:
    """Every operation with every kind of file, of which there is one at a time."""
    rows = []
    for way in WAYS:
        path = folder / "family.tall"
        for operation in (encode, save, decode, decode_rows):
            most, seconds = in_new_process(watched, operation, family, tasks, path, way)
            rows.append({
                "sweep": sweep, "parameters": family.parameters, "tasks": tasks, "file": way,
                "operation": operation.__name__, "peak MiB": round(most / MIB, 1),
                "seconds": round(seconds, 3), "threads": os.cpu_count(),
                "checkpoint bytes": family.nbytes, "file bytes": path.stat().st_size,
                "published GiB": round((30 * tasks + 24) * family.parameters / GIB, 1),
                "machine GiB": round(machine_memory() / GIB, 1),
            })  # fmt: skip
            print(f"{tasks} tasks of {family.parameters:,}, {way}, {operation.__name__}: "
                  f"{most / MIB:.1f} MiB, {seconds:.3f} s", flush=True)  # fmt: skip
            path.with_suffix(".safetensors").unlink(missing_ok=True)
        path.unlink()
    return rows


def machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def needed_bytes(parameters: int, tasks: int) -> int:
    """Disk for a family: its checkpoints, its largest file and a checkpoint saved from it."""
    checkpoint = DTYPES["bfloat16"].itemsize * parameters
    masks, raw_ternary = tasks * parameters // 8, tasks * parameters // 4
    largest = checkpoint + max(checkpoint + masks, raw_ternary)
    return (1 + CHECKPOINTS + 1) * checkpoint + largest + GIB // 16


def run(parameters: float, folder: Path) -> list[dict]:
    """Every family, each removed before the next is made."""
    rows = []
    for share, sweep, counts in (
        (64, "parameters", [8]),
        (16, "parameters", [8]),
        (4, "parameters", [8]),
        (16, "tasks", [1, 2, 4, 16, 32]),
        (1, "largest", [32]),
    ):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            scratch, shapes = Path(scratch), model(width_of(parameters / share))
            family = make_family(scratch / "family", shapes, "bfloat16", CHECKPOINTS)
            for tasks in counts:
                rows += measure(family, sweep, tasks, scratch)
    return rows


def tables(rows: list[dict]) -> str:
    """The largest family by file; every family: each file to make, and to read at most."""
    largest, families = {}, {}
    for row in rows:
        operation = row["operation"]
        if row["sweep"] == "largest":
            line = largest.setdefault(row["file"], {"file": row["file"]})
            line[f"{operation}, MiB"] = f"{row['peak MiB']:.0f}"
            line[f"{operation}, s"] = row["seconds"]
        key = row["parameters"], row["tasks"]
        line = families.setdefault(key, {
            "parameters": f"{row['parameters']:,}", "tasks": row["tasks"],
            "published, GiB": f"{row['published GiB']:.1f}",
            **{f"encode: {way}": "" for way in WAYS},
        })  # fmt: skip
        column = f"encode: {row['file']}" if operation == "encode" else f"{operation}, any"
        line[column] = f"{max(row['peak MiB'], float(line.get(column) or 0)):.0f}"
    return "\n\n".join(markdown(list(lines.values())) for lines in (largest, families))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=float, default=FULL,
                        help="parameters of the largest family")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()),
                        help="where checkpoints and files go")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/")
    args = parser.parse_args()
    if args.docs and args.elements != FULL:
        parser.error("--docs is for complete runs: without --elements")
    if args.docs:
        around(PAGE, "memory")  # not after half an hour
    needed = needed_bytes(elements(model(width_of(args.elements))), 32)
    free = shutil.disk_usage(args.folder).free
    if needed > free:
        raise SystemExit(f"{needed:,} bytes are needed in {args.folder}, which has {free:,} free: "
                         "give another --folder, or fewer --elements")  # fmt: skip
    clean_up_when_terminated()
    rows = run(args.elements, args.folder)
    print_table(rows)
    if args.elements == FULL:
        write_csv(RESULTS / "memory.csv", rows)
    if args.docs:
        write_part(PAGE, "memory", tables(rows))


if __name__ == "__main__":
    main()
