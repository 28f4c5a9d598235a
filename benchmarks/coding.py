"""Coded planes: bits against their entropy, decoding against a streaming copy, speed of encoding.

    python benchmarks/coding.py            # three minutes; writes results/coding.csv
    python benchmarks/coding.py --quick    # small arrays, few repeats: a look, nothing written

One tensor of independent normal values, one thread: ternary planes of several densities, and masks
of one of eight such tasks. `of copy` is the bytes of base and decoded tensor per second against a
copy with non-temporal stores in the same run (of which memcpy reaches what `memcpy` says): decoding
the coded plane, without (and with) checksums, and from planes in memory (`loaded`, File.load).
`encode` is in GB of checkpoints per second, from memory into a file of the page cache. The entropy
is that of position and sign at this density; of masks, that given |s| in steps of an eighth octave.
"""

import argparse
import math
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

import tallcodec
from common import RESULTS, median_of, print_table, write_csv
from tallcodec._core import kernels

DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def entropy(p):
    """Bits per element of positions and signs."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p


def measure(dtype, density, n, repeat, folder):
    random = np.random.default_rng(0)
    base = (random.standard_normal(n, np.float32) * np.float32(0.02)).astype(dtype)
    tau = random.standard_normal(n, np.float32) * np.float32(0.002)
    task = (base.astype(np.float32) + tau).astype(dtype)
    ternary, mask = folder / "ternary.tall", folder / "mask.tall"

    def encode():
        return tallcodec.encode({"w": base}, {"t": {"w": task}}, ternary, method="ternary",
                                density=density, threads=1, overwrite=True)

    (info,) = encode().tasks
    tallcodec.encode({"w": base}, {"t": {"w": task}}, mask, threads=1, overwrite=True)
    out = np.zeros(base.nbytes, np.uint8)
    source, target = np.ones(base.nbytes, np.uint8), np.zeros(base.nbytes, np.uint8)
    request = [(0, 0, out.ctypes.data, None)]
    with tallcodec.open(ternary, "np") as a, tallcodec.open(mask, "np") as b:
        seconds = median_of({
            "copy": lambda: kernels.copy(target, source, threads=1),
            "decode": lambda: a._file.decode(request, 1, False, None),
            "checked": lambda: a._file.decode(request, 1, True, None),
            "mask": lambda: b._file.decode(request, 1, False, None),
        }, repeat)
    seconds |= median_of({"encode": encode}, 3)
    return {
        "dtype": dtype.name, "density": density, "bits": round(info.bits, 4),
        "over entropy": round(info.bits / entropy(info.density) - 1, 4),
        "of copy": round(seconds["copy"] / seconds["decode"], 3),
        "of copy, checked": round(seconds["copy"] / seconds["checked"], 3),
        "raw mask of copy": round(seconds["copy"] / seconds["mask"], 3),
        "copy GB/s": round(2 * base.nbytes / seconds["copy"] / 1e9, 1),
        "ns per kept": round(1e9 * (seconds["decode"] - seconds["copy"]) / (n * density), 2),
        "encode GB/s": round(base.nbytes / seconds["encode"] / 1e9, 3),
        "elements": n, "variant": kernels.available()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    n, repeat = (1 << 22, 3) if quick else (1 << 25, 9)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(dtype, density, n, repeat, Path(folder))
                for dtype in DTYPES.values() for density in DENSITIES]
    print_table(rows)
    if not quick:
        write_csv(RESULTS / "ternary.csv", rows)


if __name__ == "__main__":
    main()
