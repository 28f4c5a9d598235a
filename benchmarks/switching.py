"""How long a live model takes from one task to the next.

    python benchmarks/switching.py            # ten minutes; writes results/switching.csv
    python benchmarks/switching.py --quick    # MiniLM alone, few repeats: a look, nothing written

Two models, two tasks each, one thread and two: MiniLM in float32 (22.6 M parameters) and a Llama of
1.1 B parameters in bfloat16, both by their shapes alone: weights are random, and all of them
change. `switch` is Switcher.switch with the task's planes in memory; `first` the same when they
have to be loaded from the file (in the page cache) and checked. Beside them, in the same run, what
one would do without: `load`, safetensors' load_file and load_state_dict of a fine-tuned checkpoint,
and `copy`, torch's copy_ of all parameters from memory that has them decoded. Seconds are medians;
`resident` is what a further task takes in memory, as a share of the checkpoint.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tallcodec
from common import RESULTS, median_of, print_table, write_csv
from tallcodec._core import kernels

WAYS = {
    "TALL": {},
    "TALL, int8 shared": {"shared_dtype": "int8"},
    "ternary, p = .02": {"method": "ternary", "density": 0.02},
    "ternary, p = .1": {"method": "ternary", "density": 0.1},
}


def minilm():
    """The shapes of MiniLM's 103 tensors."""
    shapes = {"words": (30522, 384), "positions": (512, 384), "types": (2, 384), "scale": (384,),
              "shift": (384,), "pooler": (384, 384), "pooler_bias": (384,)}  # fmt: skip
    for k in range(6):
        for name in ("query", "key", "value", "output"):
            shapes |= {f"{name}_{k}": (384, 384), f"{name}_bias_{k}": (384,)}
        shapes |= {f"up_{k}": (1536, 384), f"up_bias_{k}": (1536,),
                   f"down_{k}": (384, 1536), f"down_bias_{k}": (384,)}  # fmt: skip
        shapes |= {f"{part}_{norm}_{k}": (384,) for norm in (1, 2) for part in ("scale", "shift")}
    return shapes, torch.float32


def llama():
    """The shapes of TinyLlama-1.1B's 201 tensors."""
    shapes = {"embed": (32000, 2048), "norm": (2048,), "head": (32000, 2048)}
    for k in range(22):
        shapes |= {f"q_{k}": (2048, 2048), f"k_{k}": (256, 2048), f"v_{k}": (256, 2048),
                   f"o_{k}": (2048, 2048), f"gate_{k}": (5632, 2048), f"up_{k}": (5632, 2048),
                   f"down_{k}": (2048, 5632), f"norm1_{k}": (2048,), f"norm2_{k}": (2048,)}
    return shapes, torch.bfloat16


class Model(nn.Module):
    """Parameters of some shapes, and no computation."""

    def __init__(self, shapes, dtype):
        super().__init__()
        for name, shape in shapes.items():
            values = torch.zeros(shape, dtype=dtype)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))


def family(shapes, dtype):
    random = torch.Generator().manual_seed(0)

    def normal(shape, spread):
        return torch.empty(shape, dtype=dtype).normal_(0, spread, generator=random)

    base = {name: normal(shape, 0.02) for name, shape in shapes.items()}
    return base, {t: {n: w + normal(w.shape, 0.002) for n, w in base.items()} for t in ("a", "b")}


def measure(label, shapes, dtype, folder, repeat):
    base, tasks = family(shapes, dtype)
    model = Model(shapes, dtype)
    save_file(tasks["b"], folder / "b.safetensors")
    size = sum(w.nbytes for w in base.values())
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    paths = {}
    for way, options in WAYS.items():
        paths[way] = folder / f"{len(paths)}.tall"
        tallcodec.encode(base, tasks, paths[way], overwrite=True, **options)
    decoded = tasks["a"]
    del base
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for way, path in paths.items():
            with tallcodec.open(path, threads=threads) as file:
                switcher = tallcodec.Switcher(model, file)
                others = {"a": "b", "b": "a", None: "a"}
                for task in others:
                    switcher.prefetch(task).result()

                def switch():
                    switcher.switch(others[switcher.current])

                def first():
                    switcher._cache.clear()
                    switch()

                def copy():
                    for name, tensor in model.state_dict().items():
                        tensor.copy_(decoded[name])

                switch()
                seconds = median_of({
                    "switch": switch,
                    "copy": copy,
                    "streaming": lambda: kernels.copy(
                        target.numpy(), source.numpy(), threads=threads),
                    "load": lambda: model.load_state_dict(load_file(folder / "b.safetensors")),
                }, repeat)  # fmt: skip
                seconds |= median_of({"first": first}, repeat)
                resident = file.load("a").nbytes
                switcher.close()
            rows.append({
                "model": label, "dtype": str(dtype).removeprefix("torch."), "file": way,
                "threads": threads, "switch ms": round(1e3 * seconds["switch"], 2),
                "first ms": round(1e3 * seconds["first"], 2),
                "load ÷ switch": round(seconds["load"] / seconds["switch"], 2),
                "switch ÷ copy": round(seconds["switch"] / seconds["copy"], 2),
                "switch ÷ streaming copy": round(seconds["switch"] / seconds["streaming"], 2),
                "resident": round(resident / size, 4),
                "copy GB/s": round(2 * size / seconds["copy"] / 1e9, 1),
                "bytes": size, "variant": kernels.available()[0],
            })  # fmt: skip
            print_table(rows[-1:])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = []
    for label, shapes in {"MiniLM": minilm, "Llama 1.1B": llama}.items():
        if quick and label != "MiniLM":
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(label, *shapes(), Path(folder), 3 if quick else 9)
    print_table(rows)
    if not quick:
        write_csv(RESULTS / "switching.csv", rows)


if __name__ == "__main__":
    main()
