"""Seconds from a file in the page cache to the tensors of one checkpoint.

    python benchmarks/load_time.py

Decodes one MiniLM task out of a .tall file of eight, file opened included, against safetensors
reading the original. safetensors' load_file maps the file and has read nothing when it returns,
so each of its tensors is cloned, or copied where tallcodec decodes into the caller's tensors.

What the checksums cost: 25 M parameters decoded into tensors that are there already, with them and
without, on one thread, by the shared vector's type.

Then one tensor alone, the largest and the smallest, files open: out of the same file, and of one of
1.2 GB with 64 tasks (4 checkpoints of 100 M parameters under several names). And opening a file of
100,000 planes (48 tasks of 2,000 tensors of 64 elements), without and with decoding one of them,
against safetensors opening one of the 49 checkpoints.
"""

import argparse
import math
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tallcodec
from common import RESULTS, median_of, print_table, write_csv
from minilm import FAMILY, Family
from shapes import llama
from synthetic import make_family

SAFETENSORS, UNCHECKED = "safetensors", "tallcodec, verify=False"


def contenders(original, tall, task, threads):
    """{(reader, into): function}: the same tensors, new or in memory that is there already."""
    ready = {k: torch.empty_like(v) for k, v in load_file(original).items()}

    def clone():
        return {k: v.clone() for k, v in load_file(original).items()}

    def copy():
        for k, v in load_file(original).items():
            ready[k].copy_(v)

    def decode(out=None, verify=True):
        with tallcodec.open(tall, framework="pt", threads=threads, verify=verify) as f:
            return f.decode(task, out=out)

    return {
        (SAFETENSORS, "new tensors"): clone,
        ("tallcodec", "new tensors"): decode,
        (SAFETENSORS, "caller's tensors"): copy,
        ("tallcodec", "caller's tensors"): lambda: decode(ready),
        (UNCHECKED, "caller's tensors"): lambda: decode(ready, verify=False),
    }


def one_tensor(original, tall, task, name, threads, stack):
    """{(reader, into): function}: a tensor by its name, out of files that are open."""
    one = stack.enter_context(safe_open(original, "pt"))
    many = stack.enter_context(tallcodec.open(tall, framework="pt", threads=threads))
    return {
        (SAFETENSORS, "new tensors"): lambda: one.get_tensor(name).clone(),
        ("tallcodec", "new tensors"): lambda: many.decode(task, [name]),
    }


def opening(original, tall, task, name):
    """{(reader, into): function}: opening a file, without and with decoding a tensor of it."""

    def of_original(decode):
        with safe_open(original, "pt") as f:
            return f.get_tensor(name).clone() if decode else None

    def of_family(decode):
        with tallcodec.open(tall, framework="pt", threads=1) as f:
            return f.decode(task, [name]) if decode else None

    return {
        (reader, into): partial(open_file, bool(into))
        for into in ("", "a new tensor of 64")
        for reader, open_file in ((SAFETENSORS, of_original), ("tallcodec", of_family))
    }


def make_many_planes(folder):
    """(a checkpoint of 2,000 tensors, a file of it and 47 more: 2,000 · (2 + 48) planes, a task)"""
    random = torch.Generator().manual_seed(0)

    def state():
        values = torch.randn(2000, 64, generator=random)
        return {f"layer{i:04}.weight": row.clone() for i, row in enumerate(values)}

    tasks = {f"task{k:02}": state() for k in range(48)}
    save_file(tasks["task00"], folder / "many.safetensors")
    tallcodec.encode(state(), tasks, folder / "many.tall")
    planes = tallcodec.verify(folder / "many.tall").planes
    if planes != 100_000:
        raise SystemExit(f"{planes:,} planes, not 100,000")
    return folder / "many.safetensors", folder / "many.tall", "task00"


def checks(tall, stack):
    """{(reader, into): function}: a task, with and without checksums, the file open."""
    files = {name: stack.enter_context(tallcodec.open(tall, "pt", threads=1, verify=verify))
             for name, verify in ((UNCHECKED, False), ("tallcodec", True))}  # fmt: skip
    ready = files[UNCHECKED].decode("task01")
    return {(name, "caller's tensors"): partial(file.decode, "task01", out=ready)
            for name, file in files.items()}  # fmt: skip


def measure_checks(folder, repeat):
    rows = []
    for dtype in ("float32", "bfloat16"):
        family = make_family(folder / dtype, {"w": (5000, 5000)}, dtype, 2)
        tall = folder / f"{dtype}.tall"
        for method, options in (
            ("TALL", {}), ("TALL, int8", {"shared_dtype": "int8"}),
            ("ternary, raw", {"method": "ternary", "density": 0.3, "coding": "raw"}),
        ):  # fmt: skip
            tallcodec.encode(family.base, family.tasks(2), tall, overwrite=True, **options)
            with ExitStack() as stack:
                rows += measure(f"25 M, {dtype}", method, 1, checks(tall, stack), repeat, UNCHECKED)
    return rows


def measure(file, what, threads, runs, repeat, reference=SAFETENSORS):
    """Rows of contenders, each in proportion to the reference's with the same purpose."""
    medians = median_of(runs, repeat=repeat, warmup=2)
    return [{
        "file": file, "what": what, "reader": reader, "into": into, "threads": threads,
        "milliseconds": 1000 * elapsed, "ratio": elapsed / medians[reference, into],
    } for (reader, into), elapsed in medians.items()]  # fmt: skip


def measure_tensors(file, original, tall, task, repeat):
    """Rows of the largest and the smallest tensor."""
    rows = []
    shapes = {k: v.shape for k, v in load_file(original).items()}
    for choose in (max, min):
        name = choose(shapes, key=lambda name: math.prod(shapes[name]))
        what = f"a tensor of {math.prod(shapes[name]):,}"
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with ExitStack() as stack:
                runs = one_tensor(original, tall, task, name, threads, stack)
                rows += measure(file, what, threads, runs, repeat)
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--family", type=Path, default=FAMILY)
    ap.add_argument("--repeat", type=int, default=15)
    args = ap.parse_args()
    minilm = Family(args.family)
    task = minilm.tasks[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tall = folder / "minilm.tall"
        tallcodec.encode(minilm.base_path, minilm.paths, tall, threshold=0.4)
        file, original = "MiniLM, 8 tasks", minilm.paths[task]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs = contenders(original, tall, task, threads)
            rows += measure(file, "a task", threads, runs, args.repeat)
        rows += measure_tensors(file, original, tall, task, args.repeat)
        rows += measure_checks(folder, args.repeat)

        llamas = make_family(folder / "llama", llama(1024, 8, 9830), "bfloat16", 4)
        names = llamas.tasks(64)
        tall = folder / "llama.tall"
        tallcodec.encode(llamas.base, names, tall, threshold=0.4)
        file, task = "Llama of 100 M, 64 tasks", "task64"
        rows += measure_tensors(file, names[task], tall, task, args.repeat)

        original, tall, task = make_many_planes(folder)
        runs = opening(original, tall, task, "layer1000.weight")
        rows += measure("100,000 planes", "opening it", 1, runs, args.repeat)
    print_table(rows)
    write_csv(RESULTS / "load_time.csv", rows)


if __name__ == "__main__":
    main()
