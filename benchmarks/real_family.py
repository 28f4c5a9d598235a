"""The MiniLM family through the codec: sizes, quality, seconds, and conformance on the way.

    python benchmarks/real_family.py

Every variant encodes the eight checkpoints, decodes each, compares every mask bit and every
decoded value with its rule in plain PyTorch, and runs the decoded models on the test texts.
Prints a markdown table and writes results/real_family.csv.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import tallcodec
from common import RESULTS, write_csv
from minilm import FAMILY, Family
from minilm.evaluate import Scorer
from tallcodec import _core

VARIANTS = {
    "TALL, adapted masks": {},
    "TALL, adapted masks, bfloat16 shared": {"shared_dtype": "bfloat16"},
    "TALL, adapted masks, int8 shared": {"shared_dtype": "int8"},
    "TALL, λ = .4": {"threshold": 0.4},
    "TALL, λ = 1, unit gain": {"threshold": 1.0, "scale": "unit-gain"},
    "TALL, λ = .6, unit gain": {"threshold": 0.6, "scale": "unit-gain"},
    "TALL, λ = .4, bfloat16 shared": {"threshold": 0.4, "shared_dtype": "bfloat16"},
    "TALL, λ = .4, int8 shared": {"threshold": 0.4, "shared_dtype": "int8"},
}

COLUMNS = {  # of the results, and how the table formats them
    "bytes": ",", "models": ".2f", "task_bits": ".3f", "shared_bits": ".2f",
    "accuracy": ".4f", "gap_recovered": ".3f", "agreement": ".3f", "kl_left": ".2%",
    "gain": ".2f", "error": ".2f", "encode_s": ".2f", "decode_s": ".3f",
}


class Stored(NamedTuple):
    """What one task has for one tensor in the file."""

    mask: torch.Tensor
    scale: float
    factor: float  # a of an adapted mask, |τ| > |a·s − τ|


def read_masks(path, task):
    """{tensor: Stored} of the tensors of the task that have a mask, as they lie in the file."""
    data = np.memmap(path, np.uint8, "r")
    file = _core.File(str(path), data)
    planes, out = file.planes(), {}
    for tensor, entry in zip(file.tensors(), file.entries(file.find_task(task))):
        if entry["coding"] == 1:
            _, _, offset, size, _ = planes[entry["plane"]]
            count = math.prod(tensor["shape"])
            bits = np.unpackbits(data[offset : offset + size], count=count, bitorder="little")
            mask = torch.from_numpy(bits.astype(bool)).view(tensor["shape"])
            out[tensor["name"]] = Stored(mask, entry["scale"], entry["factor"])
    return out


def stored_as(s, dtype):
    """The shared vector as it comes back from the file."""
    if dtype != "int8":
        return s.to(getattr(torch, dtype)).float()
    blocks = torch.nn.functional.pad(s.flatten(), (0, -s.numel() % 128)).view(-1, 128)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    q = torch.where(scale == 0, 0, (blocks / scale).round().clamp(-127, 127))
    return (q * scale).flatten()[: s.numel()].view(s.shape)


def shared_vector(base, checkpoints, dtype):
    shared = {}
    for k, b in base.items():
        s = torch.zeros_like(b)
        for tuned in checkpoints:
            s = s + (tuned[k] - b)
        shared[k] = stored_as(s, dtype)
    return shared


class Distance(NamedTuple):
    gain: float
    error: float


def compare(base, tuned, decoded, shared, stored, threshold):
    """Distance of a decoded checkpoint, once it is found to be what its rule gives: the published
    one, or with no threshold that of adapted masks."""
    tau_sq = dot = error_sq = 0.0
    if decoded.keys() != tuned.keys():
        raise SystemExit("decoded and original have different tensors")
    for k, b in base.items():
        t, s = tuned[k], shared[k]
        mask, scale, factor = stored.get(k, Stored(torch.zeros_like(b).bool(), 1.0, 1.0))
        if threshold is None:
            m = (t - b).abs() > (factor * s - (t - b)).abs()
        else:
            m = (b - t).abs() > threshold * ((b + s) - t).abs()
        if not torch.equal(mask, m & (s != 0)):
            raise SystemExit(f"{k}: the mask is not the rule's")
        if not torch.equal(decoded[k], torch.where(m, b + scale * s, b)):
            raise SystemExit(f"{k}: the decoded values are not the rule's")
        tau, approx = t - b, decoded[k] - b
        tau_sq += float((tau * tau).sum(dtype=torch.float64))
        dot += float((tau * approx).sum(dtype=torch.float64))
        error_sq += float(((approx - tau) ** 2).sum(dtype=torch.float64))
    return Distance(dot / tau_sq, (error_sq / tau_sq) ** 0.5)


def seconds(repeat, function, *arguments, **options):
    """Median seconds of a call, and what the last call returned."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = function(*arguments, **options)
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def row(method, scorer, score, **columns):
    """A row of the results; what it has no figure for stays empty."""
    columns |= score._asdict()
    columns |= {"gap_recovered": scorer.gap_recovered(score), "kl_left": scorer.kl_left(score)}
    return {"method": method} | {key: columns.get(key, "") for key in COLUMNS}


def measure(name, options, family, scorer, path, threads, repeat):
    base = family.base()
    checkpoints = {task: family.checkpoint(task) for task in family.tasks}
    encode_s, info = seconds(
        repeat, tallcodec.encode, family.base_path, family.paths, path,
        overwrite=True, threads=threads, **options,
    )
    shared = shared_vector(base, checkpoints.values(), options.get("shared_dtype", "float32"))
    decode_s, distances, scores = [], [], {}
    with tallcodec.open(path, framework="pt", threads=threads) as f:
        for task, tuned in checkpoints.items():
            elapsed, decoded = seconds(repeat, f.decode, task)
            decode_s.append(elapsed)
            stored = read_masks(path, task)
            threshold = options.get("threshold")
            distances.append(compare(base, tuned, decoded, shared, stored, threshold))
            scores[task] = scorer.score(task, decoded)
    gain, error = (sum(column) / len(distances) for column in zip(*distances))
    shared_bytes = info.planes["shared"] + info.planes.get("scales", 0)
    return row(
        name, scorer, scorer.mean(scores),
        bytes=info.bytes, models=info.bytes / family.base_path.stat().st_size,
        task_bits=statistics.mean(task.bits for task in info.tasks),
        shared_bits=8 * shared_bytes / info.base_parameters,
        gain=gain, error=error, encode_s=encode_s, decode_s=statistics.mean(decode_s),
    )


def markdown(rows):
    """The table of docs/benchmarks.md."""
    lines = [["method", *(key.replace("_", " ") for key in COLUMNS)]]
    lines.append(["---"] + ["---:"] * len(COLUMNS))
    for r in rows:
        cells = ("" if r[key] == "" else format(r[key], spec) for key, spec in COLUMNS.items())
        lines.append([r["method"], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--family", type=Path, default=FAMILY)
    ap.add_argument("--limit", type=int, help="test texts per task (no results are written)")
    ap.add_argument("--variants", default=",".join(str(i) for i in range(len(VARIANTS))),
                    help="which rows, by number")
    ap.add_argument("--repeat", type=int, default=3, help="timed runs of every encode and decode")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    family = Family(args.family)
    scorer = Scorer(family, limit=args.limit)
    one = family.base_path.stat().st_size
    every = sum(path.stat().st_size for path in family.paths.values())
    base = {"bytes": one, "models": 1.0, "gain": 0.0, "error": 1.0}
    tuned = {"bytes": every, "models": every / one, "gain": 1.0, "error": 0.0}
    rows = [
        row("base", scorer, scorer.base_score, **base),
        row("fine-tuned", scorer, scorer.tuned_score, **tuned),
    ]
    chosen = [list(VARIANTS)[int(i)] for i in args.variants.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.tall"
        for name in chosen:
            rows.append(
                measure(name, VARIANTS[name], family, scorer, path, args.threads, args.repeat)
            )
            print(f"{name}: conforms, accuracy {rows[-1]['accuracy']:.4f}", flush=True)
    print("\n" + markdown(rows))
    if args.limit is None and chosen == list(VARIANTS):
        write_csv(RESULTS / "real_family.csv", rows)


if __name__ == "__main__":
    main()
