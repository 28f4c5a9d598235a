"""A small causal Transformer that predicts the next character of Python source.

The texts are parts of packages that requirements-dev.txt pins. The base has read twelve of them,
and each task is another one. All weights are shared and fine-tuned; there are no heads. A
checkpoint is scored at every character of files that it has not been trained on.
"""

import random
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn

from .scoring import SmallScorer, runner, save, train

BASE = (
    "numpy.lib numpy._core setuptools.command sklearn.ensemble sklearn.preprocessing sklearn.utils "
    "torch._dynamo torch.ao torch.export torch.utils transformers.generation transformers.utils"
).split()
TASKS = (
    "_pytest hypothesis numpy.f2py numpy.polynomial numpy.typing setuptools._distutils "
    "sklearn.datasets sklearn.linear_model torch._inductor torch.distributed torch.distributions "
    "torch.nn torch.onnx torch.testing transformers.models transformers.quantizers"
).split()
WIDTH, HEADS, LAYERS, CONTEXT = 128, 4, 3, 64
PART = 4000  # the most characters of a file
PRETRAIN, TRAIN, VAL, TEST = 50, 30, 2, 4  # the most files of a package
CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))  # a tab is an indent of four spaces


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), WIDTH)
        angles = torch.outer(torch.arange(CONTEXT), 1e4 ** -torch.linspace(0, 1, WIDTH // 2))
        self.position = nn.Parameter(torch.cat([angles.sin(), angles.cos()], 1))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True,
                                       norm_first=True) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, len(CHARACTERS))
        self.mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)

    def forward(self, inputs):
        """Logits (n, characters) of what follows each character of (windows, CONTEXT)."""
        x = self.embedding(inputs) + self.position
        for layer in self.layers:
            x = layer(x, self.mask, is_causal=True)
        return self.output(self.norm(x)).flatten(0, 1)


class Scorer(SmallScorer):
    def __init__(self, family, split="test", limit=None):
        self.run = runner(Network())
        super().__init__(family, split, limit)


def texts(package):
    """The middle of each file of a package that is not short, in an order by chance but fixed."""
    top, *below = package.split(".")
    folder = Path(find_spec(top).origin).parent.joinpath(*below)
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".pyi"))
    random.Random(package).shuffle(paths)
    for path in paths:
        text = path.read_text("utf-8").replace(" " * 4, "\t")
        text = "".join(c for c in text if c in CHARACTERS)
        start = max(0, len(text) - PART) // 2
        if len(text) >= PART // 2:
            yield text[start:start + PART]


def split(package):
    """Training, validation and test texts: no file is in two of them."""
    rows = list(islice(texts(package), TEST + VAL + TRAIN))
    return rows[TEST + VAL:], rows[TEST:TEST + VAL], rows[:TEST]


def tensors(rows):
    """Inputs and labels, (windows, CONTEXT) uint8, of texts laid end to end."""
    ids = torch.tensor([CHARACTERS.index(c) for c in "".join(rows)], dtype=torch.uint8)
    n = (len(ids) - 1) // CONTEXT
    return ids[:n * CONTEXT].view(n, CONTEXT), ids[1:n * CONTEXT + 1].view(n, CONTEXT)


def make(name, folder):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = Network()
    run = runner(network)
    begin = {k: v.detach() for k, v in network.state_dict().items()}
    start = [text for package in BASE for text in islice(texts(package), PRETRAIN)]
    base = train(run, {}, begin, tensors(start), 1, 8, 3e-3)
    print(f"{name}: base trained on {len(start)} files", flush=True)
    checkpoints, data = {}, {}
    for i, task in enumerate(TASKS):
        rows = split(task)
        data[task] = [tensors(part) for part in rows]
        epochs, lr = 1 + i % 3, (5e-4, 1e-3)[i % 2]
        checkpoints[task] = train(run, {}, base, data[task][0], epochs, 8, lr)
        print(f"{name}: {task} trained on {len(rows[0])} files", flush=True)
    save(folder, base, checkpoints, {}, data, {"characters": CHARACTERS})
