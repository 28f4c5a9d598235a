"""How close the kernels come to a streaming copy, and how far they are ahead of plain PyTorch.

    python benchmarks/kernels.py            # about three minutes; writes results/kernels.csv
    python benchmarks/kernels.py --quick    # small arrays, few repeats: a look, nothing written

GB/s are bytes that must move: every input read and every output written once. `of copy` is that
speed against a copy with non-temporal stores in the same run, on the same number of threads;
`x torch` is time against the plain PyTorch expression, on as many threads, masks packed.
"""

import argparse

import numpy as np
import torch

from common import RESULTS, median_of, print_table, write_csv
from tallcodec._core import kernels

TASKS = 8
THRESHOLD = 0.4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def raw(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def family(dtype, n):
    """A base and its fine-tunes, about a third of each unchanged."""
    random = torch.Generator().manual_seed(0)
    base = (torch.randn(n, generator=random) * 0.02).to(DTYPES[dtype])
    tasks = []
    for _ in range(TASKS):
        tau = torch.randn(n, generator=random).mul_(0.002)
        tau[torch.randint(3, (n,), generator=random) == 0] = 0
        tasks.append((base.float() + tau).to(DTYPES[dtype]))
    return base, tasks


def torch_encode(base, tasks):
    base = base.float()
    s = torch.zeros_like(base)
    for task in tasks:
        s = s + (task.float() - base)
    masks = [(base - task.float()).abs() > THRESHOLD * ((base + s) - task.float()).abs()
             for task in tasks]
    return s, [np.packbits(mask.numpy(), bitorder="little") for mask in masks]


def torch_decode(base, shared, mask):
    active = torch.from_numpy(np.unpackbits(mask, bitorder="little")).bool()
    return (base.float() + active * shared.float()).to(base.dtype)


def measure(dtype, threads, decode_n, encode_n, repeat):
    torch.set_num_threads(threads)
    size = DTYPES[dtype].itemsize

    base, tasks = family(dtype, encode_n)
    task_arrays = [raw(task) for task in tasks]
    encoded = kernels.encode(raw(base), task_arrays, dtype, [THRESHOLD] * TASKS, dtype)

    def tile(array):
        return np.resize(array, array.size * decode_n // encode_n)

    one = {"base": tile(raw(base)), "shared": tile(encoded["shared"]),
           "mask": tile(encoded["masks"][0])}
    out = np.zeros(decode_n * size, np.uint8)
    source, target = np.ones(decode_n * 4, np.uint8), np.zeros(decode_n * 4, np.uint8)
    cached = np.ones(1 << 16, np.uint8)

    def encode():
        kernels.encode(raw(base), task_arrays, dtype, [THRESHOLD] * TASKS, dtype, threads=threads,
                       out=encoded)

    def decode():
        kernels.decode(one["base"], one["shared"], one["mask"], dtype, dtype, dtype,
                       threads=threads, out=out)

    copied, coded = 2 * source.nbytes, encode_n * ((TASKS + 2) * size + TASKS / 8)
    decoded = decode_n * (3 * size + 1 / 8)
    hashes = 4000
    contenders = {
        "copy": (copied, lambda: kernels.copy(target, source, threads=threads)),
        "decode": (decoded, decode),
        "encode": (coded, encode),
    }
    if threads == 1:
        contenders["hash"] = (source.nbytes, lambda: kernels.hash(source))
        contenders["hash, in cache"] = (cached.nbytes * hashes,
                                        lambda: kernels.hash(cached, repeat=hashes))
    seconds = median_of({name: run for name, (_, run) in contenders.items()}, repeat)

    base_part = torch.from_numpy(one["base"]).view(DTYPES[dtype])
    shared_part = torch.from_numpy(one["shared"]).view(DTYPES[dtype])
    plain = median_of({
        "decode": lambda: torch_decode(base_part, shared_part, one["mask"]),
        "encode": lambda: torch_encode(base, tasks),
    }, repeat=3)

    speed = {name: contenders[name][0] / seconds[name] for name in contenders}
    return [{
        "dtype": dtype,
        "threads": threads,
        "kernel": name,
        "GB/s": round(speed[name] / 1e9, 2),
        "of copy": round(speed[name] / speed["copy"], 3),
        "x torch": round(plain[name] / seconds[name], 1) if name in plain else "",
        "variant": kernels.available()[0],
        "elements": decode_n if name == "decode" else encode_n if name == "encode" else "",
    } for name in contenders]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    decode_n, encode_n, repeat = (1 << 23, 1 << 21, 3) if quick else (1 << 26, 1 << 24, 9)
    rows = []
    for dtype in DTYPES:
        for threads in (1, 2):
            rows += measure(dtype, threads, decode_n, encode_n, repeat)
    print_table(rows)
    if not quick:
        write_csv(RESULTS / "kernels.csv", rows)


if __name__ == "__main__":
    main()
