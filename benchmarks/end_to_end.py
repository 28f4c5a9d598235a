"""tallcodec beside the published method and the packages one could install, end to end.

    make bench-end-to-end

Each stores the MiniLM family (a base, eight tasks), packages the way their documentation says a
family of checkpoints is stored, once in float32 and once cast to bfloat16. Measured are the seconds
and the memory of encoding the family and of decoding one task, from opening what is stored to
tensors in memory, the bytes, and how what comes back differs from the original. Every encode and
every decode of a contender is a process of its own; contenders take turns. Prints tables and
writes results/end_to_end.csv; with --docs also the tables in docs/benchmarks.md.
"""

import argparse
import importlib
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from common import (
    DOCS,
    RESULTS,
    around,
    clean_up_when_terminated,
    markdown,
    write_csv,
    write_part,
)
from minilm import FAMILY, Family

PAGE = DOCS / "benchmarks.md"
BASE = "0-base"  # sorts before every task: lmzip refers to files that came earlier
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16}  # names in safetensors headers
TIMEOUT = 900  # seconds for one encode or decode of the family
SLOW = 15  # seconds from which on an encode is timed once, not in every round

COLUMNS = {  # of the tables, and how they format them
    "bytes": ",", "models": ".2f", "ratio": ".2f", "exact": "", "error": ".3f", "gain": ".2f",
    "encode_s": ".2f", "encode_gbps": ".2f", "decode_s": ".3f", "encode_mb": ",.0f",
    "decode_mb": ",.0f", "threads": "",
}


class Job(NamedTuple):
    """A family on disk as FOLDER/NAME/model.safetensors, and where a contender may write."""

    folder: Path
    store: Path
    threads: int

    @property
    def base(self):
        return self.checkpoint(BASE)

    @property
    def tasks(self):
        return sorted(path.name for path in self.folder.iterdir() if path.name != BASE)

    def checkpoint(self, name):
        return self.folder / name / "model.safetensors"


class Contender:
    """A package and how it stores a family; made in the child process, so it imports there.

    encode() writes all tasks, and the base where decoding needs it in another form than the
    checkpoint. decode() opens what is stored and returns the tensors of one task: in memory, read.
    """

    package = ""
    module = ""  # that is imported before the clock starts: self.lib
    needs_base = False  # the base's checkpoint, as it is, belongs to what is stored
    threads = (1, 1)  # most that encode and decode use

    def __init__(self):
        self.lib = importlib.import_module(self.module or self.package)

    def encode(self, job):
        raise NotImplementedError

    def decode(self, job, task):
        raise NotImplementedError


class Safetensors(Contender):
    """Separate files, the measure of all others."""

    package = "safetensors"

    def encode(self, job):
        for task in job.tasks:
            save_file(load_file(job.checkpoint(task)), job.store / task)

    def decode(self, job, task):  # load_file alone has mapped the file and read nothing
        return {k: v.clone() for k, v in load_file(job.store / task).items()}


class Published(Contender):
    """The published method by its formulas, whole checkpoints as flat float32 vectors.

    Its code stores the packed masks and nothing else, so nothing could be decoded from its files:
    here they are stored with the base and the multi-task vector. It makes matrices of all tasks'
    vectors, too, where this takes one task after the other, which needs less memory.
    """

    package = "torch"
    threads = (2, 2)
    threshold = 0.4

    def encode(self, job):
        state = load_file(job.base)
        base = flat(state)
        tuned = {task: flat(load_file(job.checkpoint(task))) for task in job.tasks}
        merged = sum(vector - base for vector in tuned.values())
        multi_task, masks = base + merged, {}
        for task, vector in tuned.items():
            mask = (base - vector).abs() > self.threshold * (multi_task - vector).abs()
            masks[task] = torch.from_numpy(np.packbits(mask.numpy()))
        torch.save({"base": state, "merged": merged, "masks": masks}, job.store / "family.pt")

    def decode(self, job, task):
        stored = torch.load(job.store / "family.pt", mmap=True)  # reads one task's mask alone
        base, merged, bits = stored["base"], stored["merged"], stored["masks"][task].numpy()
        mask = torch.from_numpy(np.unpackbits(bits, count=merged.numel()))
        added = split(mask * merged, base)
        return {key: (value + added[key]).to(value.dtype) for key, value in base.items()}


class Tall(Contender):
    package = "tallcodec"
    threads = (2, 2)
    options = {}

    def encode(self, job):
        tasks = {task: job.checkpoint(task) for task in job.tasks}
        self.lib.encode(job.base, tasks, job.store / "family.tall", threads=job.threads,
                        **self.options)

    def decode(self, job, task):
        path = job.store / "family.tall"
        with self.lib.open(path, framework="pt", threads=job.threads) as file:
            return file.decode(task)


class TallEntropy(Tall):
    options = {"coding": "entropy"}


class TallInt8(Tall):
    options = {"shared_dtype": "int8"}


class TallPublished(Tall):
    options = {"threshold": Published.threshold}


class TallTernary(Tall):
    options = {"method": "ternary"}


class TallTernaryFifth(Tall):
    options = {"method": "ternary", "bits": 0.2}


class Zstandard(Contender):
    """Every file for itself."""

    package = "zstandard"
    threads = (2, 1)

    def encode(self, job):
        compressor = self.lib.ZstdCompressor(level=3, threads=job.threads)
        for task in job.tasks:
            packed = compressor.compress(job.checkpoint(task).read_bytes())
            (job.store / task).write_bytes(packed)

    def decode(self, job, task):
        packed = (job.store / task).read_bytes()
        return tensors_in(self.lib.ZstdDecompressor().decompress(packed))


class ZstandardPrefix(Contender):
    """Every file with the base as dictionary: what zstd --patch-from does."""

    package = "zstandard"
    threads = (2, 1)

    def encode(self, job):
        base = job.base.read_bytes()
        window = (2 * len(base)).bit_length()
        parameters = self.lib.ZstdCompressionParameters.from_level(
            3, window_log=window, enable_ldm=True, threads=job.threads)
        plain = self.lib.ZstdCompressor(level=3, threads=job.threads)
        (job.store / BASE).write_bytes(plain.compress(base))
        compressor = self.lib.ZstdCompressor(
            dict_data=self.lib.ZstdCompressionDict(base, self.lib.DICT_TYPE_RAWCONTENT),
            compression_params=parameters)
        for task in job.tasks:
            packed = compressor.compress(job.checkpoint(task).read_bytes())
            (job.store / task).write_bytes(packed)

    def decode(self, job, task):
        base = self.lib.ZstdDecompressor().decompress((job.store / BASE).read_bytes())
        decompressor = self.lib.ZstdDecompressor(
            dict_data=self.lib.ZstdCompressionDict(base, self.lib.DICT_TYPE_RAWCONTENT),
            max_window_size=1 << (2 * len(base)).bit_length())
        return tensors_in(decompressor.decompress((job.store / task).read_bytes()))


class Zipnn(Contender):
    """Every file for itself."""

    package = "zipnn"
    threads = (2, 2)

    def codec(self, job, **options):
        return self.lib.ZipNN(bytearray_dtype=dtype_of(job), threads=job.threads, **options)

    def encode(self, job):
        codec = self.codec(job)
        for task in job.tasks:
            packed = codec.compress(job.checkpoint(task).read_bytes())
            (job.store / task).write_bytes(packed)

    def decode(self, job, task):
        return tensors_in(self.codec(job).decompress((job.store / task).read_bytes()))


class ZipnnDelta(Zipnn):
    """Its delta mode: every file's bytes XOR the base's."""

    def encode(self, job):
        (job.store / BASE).write_bytes(self.codec(job).compress(job.base.read_bytes()))
        base = job.base.read_bytes()  # again: compress() has overwritten the bytes it was given
        codec = self.codec(job, delta_compressed_type="byte")
        for task in job.tasks:
            packed = codec.compress(job.checkpoint(task).read_bytes(), delta_second_data=base)
            (job.store / task).write_bytes(packed)

    def decode(self, job, task):
        base = bytes(self.codec(job).decompress((job.store / BASE).read_bytes()))
        codec = self.codec(job, delta_compressed_type="byte")
        packed = (job.store / task).read_bytes()
        return tensors_in(codec.decompress(packed, delta_second_data=base))


class Lmzip(Contender):
    """One archive of the family's folder; it finds out by itself that files resemble the first."""

    package = "lmzip"
    module = "lmz"
    threads = (2, 2)

    def __init__(self):
        super().__init__()
        self.lib.backends()  # compiles its native kernel, the first time

    def encode(self, job):
        self.lib.compress(str(job.folder), str(job.store / "family.lmz"), workers=job.threads)

    def decode(self, job, task):
        path = str(job.store / "family.lmz")
        with self.lib.MappedArchive(path, workers=job.threads) as archive:
            return tensors_in(archive.read_member(f"{task}/model.safetensors"))


class Reminis(Contender):
    """Its registry: one SQLite database, the tasks as verified deltas of the base."""

    package = "reminis"
    threads = (2, 1)  # its own choice

    def encode(self, job):
        with self.lib.Registry(job.store / "family.db") as registry:
            registry.add_base(str(job.base), BASE, verbose=False)
            for task in job.tasks:
                source = str(job.checkpoint(task))
                registry.add_derived(source, task, parent=BASE, verbose=False)

    def decode(self, job, task):
        with self.lib.Registry(job.store / "family.db", create=False) as registry:
            return {  # shapes are stored last dimension first
                name: torch.frombuffer(blob, dtype=TORCH[dtype]).view(json.loads(shape)[::-1])
                for name, shape, dtype, _, _, blob in registry.tensors(task)
            }


class Deltatensors(Contender):
    package = "deltatensors"
    needs_base = True
    threads = (2, 1)  # its own choice: one reads, one computes, one writes
    strategy = "int4"

    def encode(self, job):
        for task in job.tasks:
            self.lib.save_delta_from_paths(
                job.store / task, job.folder / task, job.folder / BASE, strategy=self.strategy)

    def decode(self, job, task):
        dtype = DTYPES[dtype_of(job)]
        arrays = self.lib.load_delta_from_paths(job.store / task, job.folder / BASE)
        return {k: torch.from_numpy(v).to(dtype) for k, v in arrays.items()}


class DeltatensorsSign(Deltatensors):
    strategy = "quantized"


class DeltatensorsSparse(Deltatensors):
    strategy = "sparse"


class Fireworks(Contender):
    package = "fireworks-delta-compression"
    module = "fireworks_delta_compression"
    needs_base = True
    threads = (2, 2)
    coding = "arc_v3"

    def encode(self, job):
        with ThreadPoolExecutor(job.threads) as pool:
            for task in job.tasks:
                self.lib.delta_compress_files_to_file(
                    src=str(job.base), dst=str(job.checkpoint(task)),
                    diff_file=str(job.store / task), compression_format=self.coding,
                    executor=pool)

    def decode(self, job, task):
        with ThreadPoolExecutor(job.threads) as pool:
            return self.lib.delta_decompress_dict_from_file(
                src=load_file(job.base), diff_file=str(job.store / task),
                compression_format=self.coding, executor=pool)


class FireworksXor(Fireworks):
    coding = "arc_v2"


CONTENDERS = {
    "safetensors, separate files": Safetensors,
    "the published method in PyTorch": Published,
    "tallcodec, λ = .4": TallPublished,
    "tallcodec, default": Tall,
    "tallcodec, int8 shared": TallInt8,
    "tallcodec, entropy coded": TallEntropy,
    "tallcodec, ternary": TallTernary,
    "tallcodec, ternary, .2 bits": TallTernaryFifth,
    "zstandard −3, each file": Zstandard,
    "zstandard −3, base as prefix": ZstandardPrefix,
    "zipnn, each file": Zipnn,
    "zipnn, XOR with the base": ZipnnDelta,
    "lmzip": Lmzip,
    "reminis, registry": Reminis,
    "fireworks-delta-compression, arc_v3": Fireworks,
    "fireworks-delta-compression, arc_v2": FireworksXor,
    "deltatensors, int4": Deltatensors,
    "deltatensors, quantized (sign)": DeltatensorsSign,
    "deltatensors, sparse": DeltatensorsSparse,
}


def flat(state):
    """A state dict as one float32 vector, its keys sorted."""
    return torch.cat([state[key].flatten().float() for key in sorted(state)])


def split(vector, like):
    """Such a vector as a state dict again, names and shapes those of another one."""
    keys = sorted(like)
    parts = vector.split([like[key].numel() for key in keys])
    return {key: part.view_as(like[key]) for key, part in zip(keys, parts)}


def header(buffer):
    """The JSON header of a safetensors file, and where its data begins."""
    size = int.from_bytes(buffer[:8], "little")
    return json.loads(bytes(buffer[8 : 8 + size])), 8 + size


def tensors_in(buffer):
    """The tensors of a safetensors file in memory, without copying them."""
    entries, start = header(buffer)
    out = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = TORCH[entry["dtype"]]
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin)
            out[name] = flat.view(entry["shape"])
    return out


def dtype_of(job):
    """The family's dtype by name: that of its first tensor."""
    tensor = next(iter(load_file(job.base).values()))
    return str(tensor.dtype).removeprefix("torch.")


def memory(field):
    """A line of /proc/self/status in bytes: VmRSS, resident now; VmHWM, at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}")


def measured(function):
    """Seconds of a call, and the most memory in MB that it added to the process."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    start = time.perf_counter()
    _kept = function()  # freed when the clock has stopped
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mb": (memory("VmHWM") - before) / 1e6}


def encode(contender, job):
    with redirect_stdout(sys.stderr):  # some of them talk
        result = measured(lambda: contender.encode(job))
    size = sum(path.stat().st_size for path in job.store.rglob("*") if path.is_file())
    size += job.base.stat().st_size if contender.needs_base else 0
    return result | {"bytes": size, "version": importlib.metadata.version(contender.package)}


def decode(contender, job):
    """One task, from opening what is stored: the median of all in turn, the most memory of any."""
    with redirect_stdout(sys.stderr):
        runs = [measured(lambda: contender.decode(job, task)) for task in job.tasks]
    return {"seconds": statistics.median(run["seconds"] for run in runs),
            "mb": max(run["mb"] for run in runs)}


class Fidelity(NamedTuple):
    """How what comes back differs from a fine-tuned checkpoint; see docs/benchmarks.md."""

    exact: bool
    error: float
    gain: float


def fidelity(base, tuned, decoded):
    """{name: tensor} three times; exact means the same names, types, shapes and bits."""
    if decoded.keys() != tuned.keys():
        raise SystemExit("other tensors come back than went in")
    exact, tau_sq, dot, error_sq = True, 0.0, 0.0, 0.0
    for k, t in tuned.items():
        d = decoded[k]
        if d.shape != t.shape or d.dtype != t.dtype:
            raise SystemExit(f"{k}: {d.dtype} {list(d.shape)} for {t.dtype} {list(t.shape)}")
        exact &= torch.equal(d.contiguous().view(torch.uint8), t.view(torch.uint8))
        b = base[k].double()
        tau, approx = t.double() - b, d.double() - b
        tau_sq += float(tau.square().sum())
        dot += float((tau * approx).sum())
        error_sq += float((approx - tau).square().sum())
    return Fidelity(exact, (error_sq / tau_sq) ** 0.5, dot / tau_sq)


def verify(contender, job):
    """Mean fidelity over the tasks; exact if every task is."""
    base = load_file(job.base)
    with redirect_stdout(sys.stderr):
        found = [fidelity(base, load_file(job.checkpoint(task)), contender.decode(job, task))
                 for task in job.tasks]
    exact, error, gain = zip(*found)
    return Fidelity(all(exact), statistics.mean(error), statistics.mean(gain))._asdict()


PHASES = {"encode": encode, "decode": decode, "verify": verify}


def child(name, phase, job):
    """One phase of one contender, in a process of its own; prints its figures as JSON."""
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    torch.set_num_threads(job.threads)
    print(json.dumps(PHASES[phase](CONTENDERS[name](), job)))


def run_child(python, name, phase, job):
    """The figures of one phase; RuntimeError says what went wrong."""
    command = [python, __file__, "--contender", name, "--phase", phase, "--family", job.folder,
               "--store", job.store, "--threads", str(job.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{phase}: not finished after {TIMEOUT} s") from None
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{phase}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def python_of(contender, peers):
    """The interpreter that has the package: this one for tallcodec, else the peers' own."""
    return sys.executable if contender.package == "tallcodec" else peers


def prepare(checkpoints, folder, dtype):
    """Write {name: path} as FOLDER/NAME/model.safetensors in the given dtype."""
    for name, path in checkpoints.items():
        target = folder / name / "model.safetensors"
        target.parent.mkdir(parents=True)
        save_file({k: v.to(dtype) for k, v in load_file(path).items()}, target)


def measure(names, job, python, rounds):
    """{contender: {phase: [figures of each round], "failed": why}}, the contenders taking turns."""
    results = {name: {phase: [] for phase in PHASES} for name in names}
    for turn in range(rounds):
        for name, found in results.items():
            if "failed" in found:
                continue
            own = job._replace(store=job.store / str(list(CONTENDERS).index(name)))
            interpreter = python_of(CONTENDERS[name], python)
            phases = ["encode", "decode", "verify"] if turn == 0 else ["encode", "decode"]
            if any(run["seconds"] > SLOW for run in found["encode"]):
                phases = ["decode"]
            else:
                shutil.rmtree(own.store, ignore_errors=True)
                own.store.mkdir(parents=True)
            try:
                for phase in phases:
                    found[phase].append(run_child(interpreter, name, phase, own))
            except RuntimeError as error:
                found["failed"] = str(error)
            print(f"round {turn + 1}: {name}: {found.get('failed', 'done')}", flush=True)
    return results


def row(name, dtype, found, job):
    """A row of the results; sizes and speeds refer to the bytes of the tasks' checkpoints."""
    contender = CONTENDERS[name]
    columns = {"dtype": dtype, "method": name, "version": "", **dict.fromkeys(COLUMNS, "")}
    columns["failed"] = found.get("failed", "")
    if not found["verify"] or columns["failed"]:
        return columns
    one = job.base.stat().st_size
    every = sum(job.checkpoint(task).stat().st_size for task in job.tasks)
    size = found["encode"][0]["bytes"]
    for phase in ("encode", "decode"):
        for figure, key in {"seconds": "s", "mb": "mb"}.items():
            columns[f"{phase}_{key}"] = statistics.median(run[figure] for run in found[phase])
    threads = "/".join(str(min(most, job.threads)) for most in contender.threads)
    return columns | found["verify"][0] | {
        "version": found["encode"][0]["version"], "bytes": size, "models": size / one,
        "ratio": every / size, "encode_gbps": every / columns["encode_s"] / 1e9,
        "threads": threads,
    }


def table(rows):
    """A table of docs/benchmarks.md."""
    lines = []
    for r in rows:
        cells = {key.replace("_", " "): cell(r[key], spec) for key, spec in COLUMNS.items()}
        lines.append({"method": f"{r['method']} {r['version']}".strip(), **cells})
    return markdown(lines)


def cell(value, spec):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, spec) if value != "" else ""


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--family", type=Path, default=FAMILY)
    ap.add_argument("--python", help="the interpreter of the environment with the peers")
    ap.add_argument("--only", help="contenders whose names contain this (no results are written)")
    ap.add_argument("--dtype", choices=DTYPES, help="only this one (no results are written)")
    ap.add_argument("--small", action="store_true",
                    help="to try it: two tasks, one round (no results are written)")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--docs", action="store_true", help="write the tables into docs/benchmarks.md")
    ap.add_argument("--contender", help=argparse.SUPPRESS)
    ap.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    ap.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.phase:
        child(args.contender, args.phase, Job(args.family, args.store, args.threads))
        return
    complete = not (args.only or args.dtype or args.small)
    if args.docs:
        if not complete:
            ap.error("--docs is for complete runs: without --only, --dtype and --small")
        around(PAGE, "end_to_end")  # not after twenty minutes
    clean_up_when_terminated()
    family, rows, tables = Family(args.family), [], []
    tasks, rounds = (family.tasks[:2], 1) if args.small else (family.tasks, args.rounds)
    names = [name for name in CONTENDERS if not args.only or args.only in name]
    checkpoints = {BASE: family.base_path, **{task: family.paths[task] for task in tasks}}
    for dtype in [args.dtype] if args.dtype else DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder) / "family", Path(folder) / "stores", args.threads)
            prepare(checkpoints, job.folder, DTYPES[dtype])
            found = measure(names, job, args.python or sys.executable, rounds)
            rows += [row(name, dtype, figures, job) for name, figures in found.items()]
        tables += [f"{dtype}:", table([r for r in rows if r["dtype"] == dtype])]
        print("", *tables[-2:], "", sep="\n")
    for r in rows:
        if r["failed"]:
            print(f"{r['dtype']}, {r['method']}: {r['failed']}")
    if complete:
        write_csv(RESULTS / "end_to_end.csv", rows)
    if args.docs:
        write_part(PAGE, "end_to_end", "\n\n".join(tables))


if __name__ == "__main__":
    main()
