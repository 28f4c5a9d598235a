"""What bounds encoding and decoding, and how they grow with a family.

    python benchmarks/encoding.py              # ten minutes, 6 GB of disk for a while
    python benchmarks/encoding.py --scale .01  # small tensors, few repeats: a look, nothing written

Writes results/encoding.csv and results/scaling.csv; with --docs also the tables and plots of
docs/benchmarks.md. Families are synthetic: a Llama's shapes, Gaussian weights and task vectors.

Stages: 25 M parameters, 8 tasks, checkpoints in the page cache. Beside the whole `encode`, in the
same turns and on as many threads, what it cannot do without, each alone: reading the checkpoints
with pread into a buffer that stays in cache, the kernel from and to memory, the checksums of what
is written, writing that many bytes to a new file, fsync of it. `of whole` is a stage's time ÷ that
of the default `encode` to disk (for decoding: of `save`); `of kernel` is the kernel's time, with
the same rule for the masks, ÷ a row's. What goes to tmpfs has no disk to wait for.

From disk: the same with the checkpoints evicted from the page cache before each run, beside reading
the same files front to back on as many threads.

Scaling: seconds against the number of parameters and of tasks, with a straight line fitted.
"""

import argparse
import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import tallcodec
from common import (
    DOCS,
    RESULTS,
    around,
    clean_up_when_terminated,
    markdown,
    median_of,
    print_table,
    write_csv,
    write_part,
)  # fmt: skip
from shapes import Shapes, llama
from synthetic import DTYPES, Family, make_family, values
from tallcodec._core import kernels

PAGE = DOCS / "benchmarks.md"
TASKS = 8
LAYERS = 2  # of 12.5 M parameters each
THREADS = (1, 2)
DEFAULT = "TALL, default"
WAYS = {
    DEFAULT: {},
    "TALL, λ = .4": {"threshold": 0.4},
    "TIES, λ = .4": {"threshold": 0.4, "merge": "ties"},
    "TALL, entropy coded": {"coding": "entropy"},
    "ternary": {"method": "ternary"},
}
RULES = {"adapted": [DEFAULT, "TALL, entropy coded"], "published": ["TALL, λ = .4", "TIES, λ = .4"]}
SWEEPS = {  # layers, tasks
    "parameters": [(1, 4), (2, 4), (4, 4), (8, 4)],
    "tasks": [(2, 1), (2, 2), (2, 4), (2, 8), (2, 16)],
}
PIECE = 1 << 18  # bytes per system call
NOISE = os.urandom(PIECE)


def model(layers: int, width: int) -> Shapes:
    """12.5 M parameters per layer at a width of 1024, a tenth of them in the embedding."""
    return llama(width, layers, layers * 6 * width // 5)


def in_pieces(call, files: list, threads: int) -> None:
    """call(descriptor, [piece], offset) for all of these (descriptor, bytes), each thread's pieces
    in order and in one buffer."""
    pieces = [(fd, at, min(PIECE, size - at)) for fd, size in files for at in range(0, size, PIECE)]

    def work(k):
        buffer = memoryview(bytearray(NOISE))
        for fd, at, size in pieces[k::threads]:
            call(fd, [buffer[:size]], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def read(paths: list[Path], threads: int) -> None:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", 0)) for path in paths]
        in_pieces(os.preadv, [(f.fileno(), os.fstat(f.fileno()).st_size) for f in files], threads)


def hash_bytes(size: int, threads: int) -> None:
    """Checksums of so many bytes that are in cache."""
    block = NOISE[:65536]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: kernels.hash(block, repeat=size // len(block) // threads),
                      range(threads)))  # fmt: skip


class Scratch:
    """New files on a disk and, where there is room for so many bytes, in memory."""

    def __init__(self, disk: Path, room: int):
        self._stack = contextlib.ExitStack()
        self.folders = {"disk": disk}
        memory = Path("/dev/shm")
        if memory.is_dir() and shutil.disk_usage(memory).free > room:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(dir=memory))
            self.folders["tmpfs"] = Path(folder)
        self._written = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.clear("")
        self._stack.close()

    def path(self, to: str, suffix: str = "tall") -> Path:
        return self.folders[to] / f"output.{suffix}"

    def clear(self, name) -> None:
        """Nothing is left of the last contender, but of a write that is to be synced."""
        if name == "fsync":
            return
        if self._written:
            self._written.close()
            self._written = None
        for folder in self.folders.values():
            for path in folder.glob("output.*"):
                path.unlink()

    def write(self, size: int, threads: int) -> None:
        self._written = open(self.path("disk", "bytes"), "wb", 0)
        in_pieces(os.pwritev, [(self._written.fileno(), size)], threads)

    def fsync(self) -> None:
        os.fsync(self._written.fileno())


class Bench:
    """A family in files and in memory, and its `.tall` files."""

    def __init__(self, folder: Path, scratch: Scratch, family: Family, repeat: int):
        self.family, self.scratch, self.repeat = family, scratch, repeat
        self.talls = {way: folder / f"{k}.tall" for k, way in enumerate(WAYS)}
        self.infos = {
            way: tallcodec.encode(family.base, family.tasks(TASKS), path, **WAYS[way])
            for way, path in self.talls.items()
        }
        raw = np.uint16 if family.dtype == "bfloat16" else np.float32
        self.base, *self.tasks = [np.array(values(p, family.dtype).view(raw)) for p in family.paths]
        self.encoded = None
        self.kernel(1, "published")

    def kernel(self, threads: int, rule: str) -> None:
        self.encoded = kernels.encode(
            self.base, self.tasks, self.family.dtype, [0.4] * TASKS, self.family.dtype,
            threads=threads, rule=rule, out=self.encoded,
        )  # fmt: skip

    def encode(self, way: str, to: str, threads: int) -> None:
        tallcodec.encode(self.family.base, self.family.tasks(TASKS), self.scratch.path(to),
                         threads=threads, **WAYS[way])  # fmt: skip

    def encoding(self, threads: int) -> list[dict]:
        given = self.family.nbytes * (TASKS + 1)
        made = {way: info.bytes for way, info in self.infos.items()}
        masked = given + made[DEFAULT]
        stages = {
            "read": (given, lambda: read(self.family.paths, threads)),
            **{f"kernel, {rule}": (masked, lambda rule=rule: self.kernel(threads, rule))
               for rule in RULES},
            "checksums": (made[DEFAULT], lambda: hash_bytes(made[DEFAULT], threads)),
            "write": (made[DEFAULT], lambda: self.scratch.write(made[DEFAULT], threads)),
            "fsync": (made[DEFAULT], self.scratch.fsync),
            **{("encode", way, to): (given + made[way],
                                     lambda way=way, to=to: self.encode(way, to, threads))
               for to in self.scratch.folders for way in WAYS},
        }  # fmt: skip
        kernel = {way: f"kernel, {rule}" for rule, ways in RULES.items() for way in ways}
        return self.rows("encode", stages, threads, ("encode", DEFAULT, "disk"), kernel)

    def decoding(self, threads: int) -> list[dict]:
        family, info, task = self.family, self.infos[DEFAULT], "task01"
        dtype, size = DTYPES[family.dtype], family.nbytes
        # Base, shared vector and the first task's masks lie at the front, in this order.
        used = info.planes["base"] + info.planes["shared"] + info.tasks[0].bytes
        out = {name: np.ones(shape, dtype) for name, shape in family.shapes.items()}
        target = np.ones(size, np.uint8)

        def touch():
            mapped = np.memmap(self.talls[DEFAULT], np.uint8, "r")
            kernels.read([mapped[:used]], threads=threads)

        def kernel():
            kernels.decode(self.base, self.encoded["shared"], self.encoded["masks"][0],
                           *[family.dtype] * 3, threads=threads, out=target)  # fmt: skip

        def decode(way, verify=True):
            with tallcodec.open(self.talls[way], "np", threads=threads, verify=verify) as file:
                file.decode(task, out=out)

        def save(way, to):
            with tallcodec.open(self.talls[way], "np", threads=threads) as file:
                file.save(task, self.scratch.path(to, "safetensors"))

        def own(way):  # bytes read and written
            planes = self.infos[way].planes
            return size + planes["base"] + planes.get("shared", 0) + self.infos[way].tasks[0].bytes

        ways = [way for way in WAYS if way not in RULES["published"]]
        unchecked = f"{DEFAULT}, verify=False"
        stages = {
            "read": (used, touch),
            "kernel": (used + size, kernel),
            "checksums": (used, lambda: hash_bytes(used, threads)),
            "write": (size, lambda: self.scratch.write(size, threads)),
            "fsync": (size, self.scratch.fsync),
            **{("decode", way, "tensors"): (own(way), lambda way=way: decode(way)) for way in ways},
            ("decode", unchecked, "tensors"): (own(DEFAULT), lambda: decode(DEFAULT, False)),
            **{("save", way, to): (own(way), lambda way=way, to=to: save(way, to))
               for to in self.scratch.folders for way in ways},
        }  # fmt: skip
        kernels_of = dict.fromkeys((DEFAULT, unchecked), "kernel")
        return self.rows("decode", stages, threads, ("save", DEFAULT, "disk"), kernels_of)

    def from_disk(self, threads: int) -> list[dict]:
        paths, given = self.family.paths, self.family.nbytes * (TASKS + 1)
        evict(paths)
        if max(map(cached, paths)) > 0.05:
            print(f"{paths[0].parent} keeps its pages in memory: nothing is measured from disk")
            return []

        def before(name):
            self.scratch.clear(name)
            evict(paths)

        ways = (DEFAULT, "TALL, λ = .4", "ternary")
        stages = {
            "read": (given, lambda: read(paths, threads)),
            **{("encode", way, to): (given + self.infos[way].bytes,
                                     lambda way=way, to=to: self.encode(way, to, threads))
               for to in self.scratch.folders for way in ways},
        }  # fmt: skip
        return self.rows("encode from disk", stages, threads, "read", {}, before)

    def rows(self, part, stages, threads, whole, kernel, before=None) -> list[dict]:
        """Measure stages, {name: (bytes moved, function)}; names of whole operations are (what,
        way, where to). ``kernel`` names the stage that is the kernel of a way."""
        runs = {name: run for name, (_, run) in stages.items()}
        seconds = median_of(runs, self.repeat, before=before or self.scratch.clear)
        rows = []
        for name, elapsed in seconds.items():
            what, way, to = name if isinstance(name, tuple) else (name, "", "")
            rows.append({
                "part": part, "dtype": self.family.dtype, "threads": threads,
                "what": what, "file": way, "to": to, "ms": round(1e3 * elapsed, 2),
                "GB/s": round(stages[name][0] / elapsed / 1e9, 2),
                "of whole": round(elapsed / seconds[whole], 3),
                "of kernel": round(seconds[kernel[way]] / elapsed, 3) if way in kernel else "",
                "parameters": self.family.parameters, "tasks": TASKS,
                "variant": kernels.available()[0],
            })  # fmt: skip
        return rows


def evict(paths: list[Path]) -> None:
    """Let go of a file's pages in the page cache, which must be clean for that."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-mapped.nbytes // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(*map(ctypes.c_void_p, (mapped.ctypes.data, mapped.nbytes, pages.ctypes.data))):
        raise OSError(ctypes.get_errno(), "mincore")
    return float((pages & 1).mean())


def stages(folder: Path, width: int, repeat: int) -> list[dict]:
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(dir=folder) as disk:
            disk = Path(disk)
            family = make_family(disk / "family", model(LAYERS, width), dtype, TASKS)
            with Scratch(disk, 3 * family.nbytes) as scratch:
                bench = Bench(disk, scratch, family, repeat)
                for measure in (bench.encoding, bench.decoding, bench.from_disk):
                    for threads in THREADS:
                        found = measure(threads)
                        rows += found
                        if found:
                            print_table(found)
                            print(flush=True)
    return rows


def scaling(folder: Path, width: int, repeat: int) -> list[dict]:
    """One row per point: seconds, and of the line through its sweep's points the slope and R²."""
    rows = []
    for sweep, points in SWEEPS.items():
        with tempfile.TemporaryDirectory(dir=folder) as disk:
            disk = Path(disk)
            families = {}
            for layers in sorted({layers for layers, _ in points}):
                tasks = max(tasks for n, tasks in points if n == layers)
                families[layers] = make_family(disk / f"{layers}", model(layers, width), "float32",
                                               tasks)  # fmt: skip
            with Scratch(disk, 3 * max(f.nbytes for f in families.values())) as scratch:
                output = scratch.path(list(scratch.folders)[-1])

                def encode(way, threads, layers, tasks):
                    family = families[layers]
                    tallcodec.encode(family.base, family.tasks(tasks), output, threads=threads,
                                     **WAYS[way])  # fmt: skip

                keys = [(way, threads, layers, tasks) for way in (DEFAULT, "ternary")
                        for threads in THREADS for layers, tasks in points]  # fmt: skip
                runs = {key: partial(encode, *key) for key in keys}
                seconds = median_of(runs, repeat, before=scratch.clear)
            for way in (DEFAULT, "ternary"):
                for threads in THREADS:
                    y = [seconds[way, threads, layers, tasks] for layers, tasks in points]
                    x = [tasks if sweep == "tasks" else families[layers].parameters
                         for layers, tasks in points]  # fmt: skip
                    rows += [{
                        "sweep": sweep, "file": way, "threads": threads,
                        "parameters": families[layers].parameters, "tasks": tasks,
                        "seconds": round(elapsed, 4), **straight_line(x, y),
                    } for (layers, tasks), elapsed in zip(points, y)]  # fmt: skip
            print_table([row for row in rows if row["sweep"] == sweep])
            print(flush=True)
    return rows


def straight_line(x: list, y: list) -> dict:
    """What fits best; and growth, by how much more than x y has grown: 1 is in proportion."""
    slope, start = np.polyfit(x, y, 1)
    rest = np.var(np.subtract(y, np.multiply(slope, x) + start))
    return {"slope": float(slope), "start": float(start), "R²": float(1 - rest / np.var(y)),
            "growth": y[-1] / y[0] / (x[-1] / x[0])}  # fmt: skip


def stage_table(rows: list[dict], part: str, threads: int) -> str:
    """What a part measured on so many threads, the types beside each other."""
    lines = {}
    for row in rows:
        if (row["part"], row["threads"]) == (part, threads):
            name = ": ".join(filter(None, (row["what"], row["file"])))
            line = lines.setdefault((name, row["to"]), {"": name, "to": row["to"]})
            for column in ("ms", "GB/s", "of whole", "of kernel"):
                if column != "of kernel" or part != "encode from disk":
                    line[f"{row['dtype']}: {column}"] = row[column]
    return markdown(list(lines.values()), text=2)


def scaling_table(rows: list[dict], sweep: str) -> str:
    """One line per file and number of threads: seconds at every point, and the straight line."""
    lines = {}
    for row in rows:
        if row["sweep"] == sweep:
            key = row["file"], row["threads"]
            line = lines.setdefault(key, {"file": row["file"], "threads": row["threads"]})
            x = row["tasks"] if sweep == "tasks" else f"{row['parameters'] / 1e6:.3g} M"
            line[str(x)] = f"{row['seconds']:.2f}"
    for row in rows:
        if row["sweep"] == sweep:
            line = lines[row["file"], row["threads"]]
            per = "s per task" if sweep == "tasks" else "s per 10⁹ parameters"
            line[per] = row["slope"] * (1 if sweep == "tasks" else 1e9)
            line["R²"], line["growth"] = f"{row['R²']:.4f}", f"{row['growth']:.2f}"
    return markdown(list(lines.values()), text=1)


def write_docs(stage_rows: list[dict], scaling_rows: list[dict]) -> None:
    """Tables and plots of docs/benchmarks.md."""
    from plots import plot_scaling  # matplotlib is installed for this alone

    parts = []
    for part, threads in dict.fromkeys((row["part"], row["threads"]) for row in stage_rows):
        heading = f"**{part.capitalize()}, {threads} thread{'s'[:threads - 1]}.**"
        parts += [heading, stage_table(stage_rows, part, threads)]
    write_part(PAGE, "encoding", "\n\n".join(parts))
    parts = []
    for sweep in SWEEPS:
        name = f"scaling-{sweep}.svg"
        plot_scaling([row for row in scaling_rows if row["sweep"] == sweep], sweep, DOCS / name)
        parts += [scaling_table(scaling_rows, sweep), f"![Seconds against {sweep}]({name})"]
    write_part(PAGE, "scaling", "\n\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1, help="of the parameters; for a look, .01")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()),
                        help="where checkpoints and files go, on the disk to measure")
    parser.add_argument("--docs", action="store_true", help="write tables and plots into docs/")
    args = parser.parse_args()
    if args.docs and args.scale != 1:
        parser.error("--docs is for complete runs: without --scale")
    if args.docs:
        around(PAGE, "encoding"), around(PAGE, "scaling")  # not after ten minutes
    clean_up_when_terminated()
    width = 64 * max(1, round(16 * args.scale**0.5))
    repeat = 5 if args.scale == 1 else 2
    stage_rows = stages(args.folder, width, repeat)
    scaling_rows = scaling(args.folder, width, repeat)
    if args.scale == 1:
        write_csv(RESULTS / "encoding.csv", stage_rows)
        write_csv(RESULTS / "scaling.csv", scaling_rows)
    if args.docs:
        write_docs(stage_rows, scaling_rows)


if __name__ == "__main__":
    main()
