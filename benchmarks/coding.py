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
from tallcodec import numbers
from tallcodec._core import kernels

DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
THRESHOLDS = ("auto", 0.4)
TASKS = 8  # behind a mask
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def family(dtype, n, tasks):
    random = np.random.default_rng(0)
    base = (random.standard_normal(n, np.float32) * np.float32(0.02)).astype(dtype)

    def tuned():
        tau = random.standard_normal(n, np.float32) * np.float32(0.002)
        return {"w": (base.astype(np.float32) + tau).astype(dtype)}

    return {"w": base}, {f"t{k}": tuned() for k in range(tasks)}


def ternary_entropy(p):
    """Bits per element of positions and signs."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p


def mask_entropy(path, dtype):
    """Bits per element of the first mask of a file of one tensor, its planes raw, given |s|."""
    data = np.memmap(path, np.uint8)
    with tallcodec.open(path, "np") as file:
        planes = file._file.planes()

    def plane(kind, dtype):
        offset, size = next(p[2:4] for p in planes if p[0] == numbers.PLANES[kind])
        return data[offset : offset + size].view(dtype)

    s = np.abs(plane("shared", dtype).astype(np.float32)).view(np.uint32)
    mask = np.unpackbits(plane("mask", np.uint8), bitorder="little", count=s.size)
    context = np.where(s, (s >> 20) + 1, 0)
    counts, ones = np.bincount(context), np.bincount(context, mask)
    p = ones[counts > 0] / counts[counts > 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.nan_to_num(-p * np.log2(p)) + np.nan_to_num(-(1 - p) * np.log2(1 - p))
    return float(counts[counts > 0] @ bits / s.size)


def measure(what, dtype, n, repeat, folder, entropy, **options):
    """One row: the first task of a family, entropy coded and raw."""
    base, tasks = family(dtype, n, TASKS if what == "mask" else 1)
    paths = {coding: folder / f"{coding}.tall" for coding in ("entropy", "raw")}

    def encode(coding="entropy"):
        return tallcodec.encode(base, tasks, paths[coding], coding=coding, threads=1,
                                overwrite=True, **options)

    info = encode().tasks[0]
    encode("raw")
    out = np.zeros(base["w"].nbytes, np.uint8)
    source, target = np.ones_like(out), np.zeros_like(out)
    request = [(0, 0, out.ctypes.data, None)]
    with tallcodec.open(paths["entropy"], "np", threads=1) as file:
        core, loaded = file._file, file.load("t0")._core
        seconds = median_of({
            "copy": lambda: kernels.copy(target, source, threads=1),
            "memcpy": lambda: np.copyto(target, source),
            "of copy": lambda: core.decode(request, 1, False, None),
            "of copy, checked": lambda: core.decode(request, 1, True, None),
            "of copy, loaded": lambda: core.decode(request, 1, False, None, loaded),
        }, repeat)
    seconds |= median_of({"encode": encode}, 3)
    names = ("of copy", "of copy, checked", "of copy, loaded", "memcpy")
    return {
        "plane": what, "dtype": dtype.name, "parameter": next(iter(options.values())),
        "bits": round(info.bits, 4),
        "over entropy": round(info.bits / entropy(info, paths["raw"]) - 1, 4),
        **{name: round(seconds["copy"] / seconds[name], 3) for name in names},
        "copy GB/s": round(2 * out.nbytes / seconds["copy"] / 1e9, 1),
        "encode GB/s": round(len(tasks) * out.nbytes / seconds["encode"] / 1e9, 3),
        "elements": n, "variant": kernels.available()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    n, repeat = (1 << 22, 3) if quick else (1 << 25, 9)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for dtype in DTYPES.values():
            for density in DENSITIES:
                rows.append(measure("ternary", dtype, n, repeat, folder,
                                    lambda info, _: ternary_entropy(info.density),
                                    density=density, method="ternary"))
            for threshold in THRESHOLDS:
                rows.append(measure("mask", dtype, n // 4, repeat, folder,
                                    lambda _, raw, dtype=dtype: mask_entropy(raw, dtype),
                                    threshold=threshold))
    print_table(rows)
    if not quick:
        write_csv(RESULTS / "coding.csv", rows)


if __name__ == "__main__":
    main()
