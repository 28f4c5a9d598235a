"""Seconds from a file in the page cache to the tensors of one checkpoint.

    python benchmarks/load_time.py

Decodes one MiniLM task out of a .tall file of eight, file opened included, against safetensors
reading the original. safetensors' load_file maps the file and has read nothing when it returns,
so each of its tensors is cloned, or copied where tallcodec decodes into the caller's tensors.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import tallcodec
from common import RESULTS, median_of, print_table, write_csv
from minilm import FAMILY, Family


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
        ("safetensors", "new tensors"): clone,
        ("tallcodec", "new tensors"): decode,
        ("safetensors", "caller's tensors"): copy,
        ("tallcodec", "caller's tensors"): lambda: decode(ready),
        ("tallcodec, verify=False", "caller's tensors"): lambda: decode(ready, verify=False),
    }


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--family", type=Path, default=FAMILY)
    ap.add_argument("--repeat", type=int, default=15)
    args = ap.parse_args()
    family = Family(args.family)
    task = family.tasks[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tall = Path(folder) / "minilm.tall"
        tallcodec.encode(family.base_path, family.paths, tall, threshold=0.4)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs = contenders(family.paths[task], tall, task, threads)
            medians = median_of(runs, repeat=args.repeat, warmup=2)
            for (reader, into), elapsed in medians.items():
                ratio = elapsed / medians["safetensors", into]
                rows.append({"reader": reader, "into": into, "threads": threads,
                             "milliseconds": 1000 * elapsed, "ratio": ratio})
    print_table(rows)
    write_csv(RESULTS / "load_time.csv", rows)


if __name__ == "__main__":
    main()
