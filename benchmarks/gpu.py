"""The kernels on a GPU against a device copy in the same run, and what they could reach on others.

    python benchmarks/gpu.py [--docs]       # on a GPU, two minutes; writes results/gpu.csv
    python benchmarks/gpu.py --roofline     # anywhere: bytes per parameter, and what they take

--docs writes the tables into docs/gpu.md. Bytes are those that must be read or written once.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import DOCS, RESULTS, markdown, write_csv, write_part
from shapes import LLAMA_2_7B

# Memory bandwidth in bytes/s, from the data sheets (SXM, 80, 80 and 141 GB).
GPUS = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}
PARAMETERS_7B = sum(map(math.prod, LLAMA_2_7B.values()))
TASKS = 8
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 128, "signs": 1 / 8}


def decode_bytes(dtype: str, shared: str) -> float:
    """Per parameter: base, shared vector, mask, output."""
    return BYTES[dtype] + BYTES[shared] + 1 / 8 + BYTES[dtype]


def encode_bytes(dtype: str, shared: str, tasks: int = TASKS) -> float:
    """Base, tasks, shared vector, masks."""
    return BYTES[dtype] * (1 + tasks) + BYTES[shared] + tasks / 8


KERNELS = {
    ("decode, switch", "float32", "float32"): (decode_bytes, 0.9),
    ("decode, switch", "bfloat16", "bfloat16"): (decode_bytes, 0.9),
    ("decode, switch", "bfloat16", "int8"): (decode_bytes, 0.9),
    ("decode, switch", "bfloat16", "signs"): (decode_bytes, 0.9),
    (f"encode {TASKS} tasks", "float32", "float32"): (encode_bytes, 0.8),
    (f"encode {TASKS} tasks", "bfloat16", "bfloat16"): (encode_bytes, 0.8),
    (f"encode {TASKS} tasks", "bfloat16", "int8"): (encode_bytes, 0.8),
}


def roofline() -> list[dict]:
    rows = []
    for (kernel, dtype, shared), (size, _) in KERNELS.items():
        bytes_each = size(dtype, shared)
        times = {f"{gpu}, 7B, ms": round(1e3 * bytes_each * PARAMETERS_7B / bandwidth, 1)
                 for gpu, bandwidth in GPUS.items()}  # fmt: skip
        rows.append({"kernel": kernel, "dtype": dtype, "shared vector": named(shared),
                     "bytes per parameter": f"{bytes_each:.3f}", **times})  # fmt: skip
    return rows


def named(shared: str) -> str:
    return "none: ternary" if shared == "signs" else shared


def seconds(work: Callable[[], object], repeat: int = 20) -> float:
    """Median on the device. What is worked on is larger than any cache."""
    import torch

    work()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3


def copy_rate() -> float:
    """Bytes read and written per second by a device copy."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def tensors(n: int, dtype: str, count: int) -> list:
    import torch

    return [torch.randn(n, device="cuda").mul_(0.02).to(getattr(torch, dtype))
            for _ in range(count)]  # fmt: skip


def packed(n: int):
    import torch

    return torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, device="cuda")


def shared_of(n: int, dtype: str) -> tuple:
    """(shared vector, scales)"""
    import torch

    if dtype == "signs":
        return packed(n), None
    if dtype == "int8":
        q = torch.randint(-127, 128, (n,), dtype=torch.int8, device="cuda")
        return q, torch.full((-(-n // 128),), 1e-4, device="cuda")
    return tensors(n, dtype, 1)[0], None


def measure_kernels(backend, copy: float) -> list[dict]:
    import torch

    from tallcodec.backends import Block

    rows = []
    for (kernel, dtype, shared), (size, goal) in KERNELS.items():
        if kernel.startswith("decode"):
            n = 1 << 28
            base, out = tensors(n, dtype, 2)
            stored, scales = shared_of(n, shared)
            block = Block(n, base, out, packed(n), stored, scales, scale=1.5)
            took = seconds(lambda: backend.decode([block]))
            del base, out, stored, scales, block
        else:
            n = 1 << 26
            base, *tasks = tensors(n, dtype, 1 + TASKS)
            took = seconds(lambda: backend.encode(base, tasks, [0.4] * TASKS,
                                                  getattr(torch, shared)))  # fmt: skip
            del base, tasks
        rate = n * size(dtype, shared) / took
        rows.append({"kernel": kernel, "back-end": backend.name, "dtype": dtype,
                     "shared vector": named(shared), "GB/s": round(rate / 1e9),
                     "of a copy": round(rate / copy, 3), "goal": goal})  # fmt: skip
    return rows


def measure_others(backend, copy: float) -> list[dict]:
    """What has no goal: of packed masks, and the float64 sums."""
    from tallcodec.backends import Block

    rows = []

    def add(kernel: str, dtype: str, size: float, work: Callable[[], object]) -> None:
        rate = size / seconds(work)
        rows.append({"kernel": kernel, "back-end": backend.name, "dtype": dtype,
                     "shared vector": "", "GB/s": round(rate / 1e9),
                     "of a copy": round(rate / copy, 3), "goal": ""})  # fmt: skip

    n = 1 << 30
    masks = [packed(n) for _ in range(TASKS)]
    size = TASKS * n / 8
    add(f"agreement of {TASKS} masks", "", size, lambda: backend.agreement(masks, n))
    add(f"overlap of {TASKS} masks", "", size, lambda: backend.overlap(masks, n))
    add(f"consensus of {TASKS} masks", "", size + n / 8, lambda: backend.consensus(masks, n, 2))
    n = 1 << 28
    base, shared, task = tensors(n, "bfloat16", 3)
    block = Block(n, base, None, masks[0], shared)
    add("sums", "bfloat16", n * 6.125, lambda: backend.sums(block, task))
    return rows


def measure_switch(backend, shared: str) -> dict:
    """Llama-2-7B, all of its tensors, from task to task: base and shared vector on the device."""
    import torch

    from tallcodec.backends import Block

    blocks = []
    for n in map(math.prod, LLAMA_2_7B.values()):
        base, out = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        blocks.append(Block(n, base, out, packed(n), *shared_of(n, shared)))
    took = seconds(lambda: backend.decode(blocks), 5)
    start = time.perf_counter()
    backend.decode(blocks)
    queued = time.perf_counter() - start
    rate = PARAMETERS_7B * decode_bytes("bfloat16", shared) / took
    return {"switch of Llama-2-7B": named(shared), "back-end": backend.name,
            "tensors": len(blocks), "parameters": f"{PARAMETERS_7B:,}", "ms": round(1e3 * took, 2),
            "GB/s": round(rate / 1e9), "ms on the host": round(1e3 * queued, 2)}  # fmt: skip


def measure_unpacking() -> list[dict]:
    """A task's coded planes of 100 M parameters, brought to the device and unpacked there, where
    base and shared vector are already. Loading on the CPU checks these each time."""
    import numpy as np
    import torch

    import tallcodec
    from tallcodec.backends import choose

    random = np.random.default_rng(0)
    base = {f"layer{k}": random.standard_normal((4096, 3072), np.float32) * 0.02 for k in range(8)}
    task = {key: value + random.standard_normal(value.shape, np.float32) * 2e-3
            for key, value in base.items()}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in ("tall", "ternary"):
            path = Path(folder) / f"{method}.tall"
            tallcodec.encode(base, {"task": task}, path, method=method, coding="entropy")
            with tallcodec.open(path) as file:
                kept = file.load("task", device="cuda")  # and so what tasks share
                ms = {}
                for device in ("cuda", "cpu"):
                    times = []
                    for _ in range(4):
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        file.load("task", device)
                        torch.cuda.synchronize()
                        times.append(time.perf_counter() - start)
                    ms[device] = round(1e3 * statistics.median(times[1:]), 1)
                del kept
            rows.append({"load of 100 M parameters": f"{method}, coded",
                         "back-end": choose(torch.device("cuda")).name,
                         "ms": ms["cuda"], "ms on the CPU, base checked": ms["cpu"]})  # fmt: skip
    return rows


def measure() -> dict[str, list[dict]]:
    """Tables by the name of their part of docs/gpu.md."""
    from tallcodec.kernels_cuda import CudaBackend
    from tallcodec.kernels_triton import TritonBackend

    copy = copy_rate()
    kernels = [{"kernel": "copy", "back-end": "torch", "dtype": "", "shared vector": "",
                "GB/s": round(copy / 1e9), "of a copy": 1.0, "goal": ""}]  # fmt: skip
    switches = []
    for backend in (CudaBackend(), TritonBackend()):
        kernels += measure_kernels(backend, copy)
        kernels += measure_others(backend, copy)
        switches += [measure_switch(backend, s) for s in ("bfloat16", "int8", "signs")]
    return {"kernels": kernels, "switch": switches, "unpack": measure_unpacking()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/gpu.md")
    parser.add_argument("--roofline", action="store_true", help="only what follows from the bytes")
    arguments = parser.parse_args()
    if arguments.roofline:
        table = markdown(roofline(), text=3)
        print(table)
        if arguments.docs:
            write_part(DOCS / "gpu.md", "roofline", table)
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu.py measures on a GPU, and there is none here (--roofline needs none)")
    gpu, tables = torch.cuda.get_device_name(), measure()
    text = "\n\n".join(markdown(rows, text=2) for rows in tables.values())
    print(f"{gpu}\n\n{text}")
    write_csv(RESULTS / "gpu.csv", [{**row, "gpu": gpu} for row in tables["kernels"]])
    if arguments.docs:
        write_part(DOCS / "gpu.md", "measured", f"{gpu}.\n\n{text}")


if __name__ == "__main__":
    main()
