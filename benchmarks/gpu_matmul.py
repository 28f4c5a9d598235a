"""Products with the weights of many tasks, decoded on the fly, against dense ones. Needs a GPU.

    python benchmarks/gpu_matmul.py [--docs]   # two minutes; writes results/gpu_matmul.csv
    python benchmarks/gpu_matmul.py --quick    # one shape, few repeats: a look, nothing written

Weights of a 7B model in bfloat16. Ten products, each with a weight of its own, are one CUDA graph,
timed by events and divided by ten: what a product reads is not in the L2 cache. `dense ms` is
torch.nn.functional.linear with one dense weight for all rows, `8 dense ms` with a dense weight per
task; GB/s are bytes that must be read or written once: base, shared vector, planes of the tasks, x
and y.
"""

import argparse
import statistics

import torch

from common import DOCS, RESULTS, markdown, write_csv, write_part
from tallcodec.matmul_triton import TaskPlanes, TaskWeight, matmul

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
ROWS = [1, 8, 32, 512]
KINDS = ["TALL bf16", "TALL int8", "ternary"]
TASKS = 8
PRODUCTS = 10  # per graph; their weights are some times as large as the L2 cache


def random_weight(columns, inner, kind, device) -> TaskWeight:
    """A weight with TASKS tasks, (columns, inner)."""
    n = columns * inner

    def plane():
        return torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, device=device)

    base = torch.randn(columns, inner, device=device).mul_(0.02).bfloat16()
    if kind == "ternary":
        planes = [TaskPlanes(plane(), plane(), 0.001) for _ in range(TASKS)]
        return TaskWeight(base, planes)
    planes = [TaskPlanes(plane(), scale=1.0 + task / 8) for task in range(TASKS)]
    if kind == "TALL int8":
        shared = torch.randint(-127, 128, (n,), dtype=torch.int8, device=device)
        return TaskWeight(base, planes, shared, torch.full((-(-n // 128),), 2e-5, device=device))
    return TaskWeight(base, planes, torch.randn(n, device=device).mul_(0.002).bfloat16())


def bytes_moved(weight: TaskWeight, x, tasks: int) -> int:
    """Bytes that a product of so many tasks' weights reads and writes at least."""
    planes = [weight.base, weight.shared, weight.scales]
    for task in weight.tasks[:tasks]:
        planes += [task.mask, task.signs]
    size = sum(plane.numel() * plane.element_size() for plane in planes if plane is not None)
    return size + (x.numel() + len(x) * len(weight.base)) * x.element_size()


def contenders(weights: list[TaskWeight], rows: int, tasks: int) -> tuple[torch.Tensor, dict]:
    """x, and the products by name, of a number from 0 on. With one task it is an int, as for a
    batch of one user's."""
    device, inner = weights[0].base.device, weights[0].base.shape[1]
    x = torch.randn(rows, inner, device=device).bfloat16()
    task_of_row = torch.arange(rows, device=device) % tasks if tasks > 1 else 0
    linear = torch.nn.functional.linear
    products = {"ours": lambda k: matmul(x, weights[k], task_of_row),
                "dense": lambda k: linear(x, weights[k].base)}
    if tasks > 1:  # a weight comes again when seven others have been read
        dense = [weight.base for weight in weights * 2]
        products["8 dense"] = lambda k: [
            linear(part, w) for part, w in zip(x.chunk(tasks), dense[k:])]
    return x, products


def graph_of(product) -> torch.cuda.CUDAGraph:
    """Of PRODUCTS of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(2):
            product(k)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(PRODUCTS):
            product(k)
    return graph


def median_ms(products: dict, repeat: int) -> dict:
    """Median milliseconds of each product; they take turns. What is read before each fills the
    cache, with nothing to be written back, and gives the CPU time to have the launch ready."""
    other = torch.zeros(1 << 26, device="cuda")
    graphs = {name: graph_of(product) for name, product in products.items()}
    times = {name: [] for name in products}
    for _ in range(repeat):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.sum()
            start.record()
            graph.replay()
            end.record()
            times[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) / PRODUCTS
            for name, pairs in times.items()}


def measure(columns: int, inner: int, kind: str, repeat: int) -> list[dict]:
    weights = [random_weight(columns, inner, kind, "cuda") for _ in range(PRODUCTS)]
    results = []
    for rows in ROWS:
        for tasks in (1, TASKS):
            if tasks > rows:
                continue
            x, products = contenders(weights, rows, tasks)
            ms = median_ms(products, repeat)
            results.append({
                "kind": kind, "weight": f"{columns} × {inner}", "rows": rows, "tasks": tasks,
                "ms": round(ms["ours"], 4), "dense ms": round(ms["dense"], 4),
                "8 dense ms": round(ms["8 dense"], 4) if tasks > 1 else "",
                "ours ÷ dense": round(ms["ours"] / ms["dense"], 2),
                "ours ÷ 8 dense": round(ms["ours"] / ms["8 dense"], 2) if tasks > 1 else "",
                "GB/s": round(bytes_moved(weights[0], x, tasks) / ms["ours"] / 1e6),
            })
    return results


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/gpu.md")
    arguments = parser.parse_args()
    quick = arguments.quick
    if not torch.cuda.is_available():
        raise SystemExit("gpu_matmul.py measures on a GPU, and there is none here")
    gpu, results = torch.cuda.get_device_name(), []
    for columns, inner in SHAPES[:1] if quick else SHAPES:
        for kind in KINDS:
            results += measure(columns, inner, kind, 5 if quick else 20)
    print(f"{gpu}\n\n{markdown(results, text=2)}")
    if not quick:
        write_csv(RESULTS / "gpu_matmul.csv", [{**row, "gpu": gpu} for row in results])
    if arguments.docs:
        write_part(DOCS / "gpu.md", "products", f"{gpu}.\n\n{markdown(results, text=2)}")
    return results


if __name__ == "__main__":
    main()
