"""How close counting over packed masks comes to reading them.

    python benchmarks/mask_statistics.py           # half a minute; writes mask_statistics.csv
    python benchmarks/mask_statistics.py --quick   # small masks, few repeats: nothing written

`of read` is the speed against a loop that reads the same bytes and does next to nothing with them,
in the same run, on the same number of threads. The masks are larger than the cache, 256 MiB in all.
"""

import argparse

import numpy as np

from common import RESULTS, median_of, print_table, write_csv
from tallcodec._core import kernels


def measure(tasks, threads, total, repeat):
    size = total // tasks // 64 * 64
    # They begin at multiples of 64 bytes, as in a file, anywhere in a page.
    random = np.random.default_rng(0)
    pool = random.integers(0, 256, total + 8192 * tasks, np.uint8)
    first = -pool.ctypes.data % 64
    starts = [first + k * (size + 4096) + 64 * int(random.integers(64)) for k in range(tasks)]
    masks = [pool[start : start + size] for start in starts]
    n = 8 * size

    contenders = {"read": lambda: kernels.read(masks, threads=threads)}
    for name in kernels.available():
        if name != "scalar":
            contenders[f"agreement, {name}"] = lambda name=name: kernels.agreement(
                masks, n, kernels=name, threads=threads
            )
    seconds = median_of(contenders, repeat)
    return [
        {
            "tasks": tasks,
            "threads": threads,
            "what": what,
            "GB/s": round(size * tasks / seconds[what] / 1e9, 2),
            "of read": round(seconds["read"] / seconds[what], 3),
            "bytes": size * tasks,
        }
        for what in contenders
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = []
    for tasks in (8, 20):
        for threads in (1, 2):
            rows += measure(tasks, threads, *((1 << 24, 3) if quick else (1 << 28, 15)))
    print_table(rows)
    if not quick:
        write_csv(RESULTS / "mask_statistics.csv", rows)


if __name__ == "__main__":
    main()
