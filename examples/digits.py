"""Eight fine-tuned networks in one file: tallcodec on real data, in about a minute.

A small encoder learns scikit-learn's handwritten digits (8×8 pixels). Each task shows it the
digits in a way it has never seen, and asks another question about them. Per task a linear head
is fitted on the features of the untouched encoder and then frozen, and the whole encoder is
fine-tuned under it. So "base" is the linear probe, the best the base does without fine-tuning.

The checkpoints hold encoder and head. Heads are of different shapes and unknown to the base:
the codec stores them verbatim, and the encoder's tensors as shared vector and masks, or as ternary
planes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import tallcodec

WIDTH, FEATURES, TEST = 640, 16, 597
SHUFFLE = torch.randperm(64, generator=torch.Generator().manual_seed(0))
LOOPS = torch.tensor([1, 0, 0, 0, 1, 0, 1, 0, 2, 1])
PRIME = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0, 0])


def orientation(x, y):
    turns = torch.arange(len(x)) % 4
    return torch.stack([torch.rot90(a, int(k)) for a, k in zip(x, turns)]), turns


# Each maps images in [0, 1] and the digits they show to the task's images and labels.
TASKS = {
    "inverted digits": lambda x, y: (1 - x, y),
    "turned digits": lambda x, y: (x.rot90(1, (1, 2)), y),
    "shuffled pixels": lambda x, y: (x.flatten(1)[:, SHUFFLE].view_as(x), y),
    "left half": lambda x, y: (x * (torch.arange(8) < 4), y),
    "orientation": orientation,
    "even, upside down": lambda x, y: (x.flip(1), y % 2),
    "prime, shifted": lambda x, y: (x.roll((3, 3), (1, 2)), PRIME[y]),
    "loops, mirrored": lambda x, y: (x.flip(2), LOOPS[y]),
}


def encoder(w, x):
    for i in (1, 2):
        x = F.layer_norm(F.gelu(F.linear(x, w[f"{i}.weight"], w[f"{i}.bias"])), (WIDTH,))
    return F.linear(x, w["3.weight"], w["3.bias"])


def logits(w, x):
    return F.linear(encoder(w, x), w["head.weight"], w["head.bias"])


def accuracy(w, data):
    x, y = data
    return float((logits(w, x).argmax(1) == y).double().mean())


def new_encoder():
    sizes = {"1": (WIDTH, 64), "2": (WIDTH, WIDTH), "3": (FEATURES, WIDTH)}
    w = {f"{i}.weight": torch.randn(n, k) / k**0.5 for i, (n, k) in sizes.items()}
    return w | {f"{i}.bias": torch.zeros(n) for i, (n, _) in sizes.items()}


def new_head(classes):
    return {"head.weight": torch.zeros(classes, FEATURES), "head.bias": torch.zeros(classes)}


def train(fixed, w, data, epochs, lr):
    """The tensors `w`, trained on `data` together with the tensors `fixed`."""
    x, y = data
    w = {k: v.clone().requires_grad_() for k, v in w.items()}
    steps = epochs * (len(x) // 64)
    opt = torch.optim.Adam(w.values(), lr=lr, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            opt.zero_grad()
            F.cross_entropy(logits(fixed | w, x[i]), y[i]).backward()
            opt.step()
            rate.step()
    return {k: v.detach() for k, v in w.items()}


def make_family(folder):
    """Trains and saves base and tasks; returns each task's test data."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]

    def split(images, labels):
        images = (images.flatten(1) - 0.3) / 0.4
        return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])

    pretrained = train({}, new_encoder() | new_head(10), split(x, y)[0], 20, 1e-3)
    base = {k: v for k, v in pretrained.items() if not k.startswith("head")}
    save_file(base, folder / "base.safetensors")
    tests = {}
    for task, change in TASKS.items():
        data, tests[task] = split(*change(x, y))
        head = train(base, new_head(int(y.max()) + 1), data, 100, 1e-2)
        save_file(train(head, base, data, 20, 3e-4) | head, folder / f"{task}.safetensors")
    return tests


def report(folder, tests, name, **options):
    """Encodes the family, decodes and scores every task, and returns the mean gap recovered."""
    base = load_file(folder / "base.safetensors")
    paths = {task: folder / f"{task}.safetensors" for task in tests}
    tall = folder / name
    tallcodec.encode(folder / "base.safetensors", paths, tall, overwrite=True, **options)

    print(f"\n{name}: {', '.join(f'{k}={v}' for k, v in options.items())}\n")
    print(f"{'task':20}{'base':>8}{'fine-tuned':>12}{'decoded':>10}{'gap recovered':>15}")
    gaps = []
    with tallcodec.open(tall, framework="pt") as f:
        for task, test in tests.items():
            tuned = load_file(paths[task])
            models = tuned | base, tuned, f.decode(task)
            probe, best, decoded = (accuracy(w, test) for w in models)
            gaps.append((decoded - probe) / (best - probe))
            print(f"{task:20}{probe:8.3f}{best:12.3f}{decoded:10.3f}{gaps[-1]:15.2f}")
    mean = sum(gaps) / len(gaps)
    separate, together = sum(p.stat().st_size for p in paths.values()), tall.stat().st_size
    print(f"{'mean':20}{'':30}{mean:15.2f}")
    print(f"\n{len(paths)} separate files  {separate:12,} bytes")
    print(f"one .tall file    {together:12,} bytes with the base (ratio {separate / together:.2f})")
    return mean


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the checkpoints and .tall files here")
    out = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Training a base network and fine-tuning it on {len(TASKS)} tasks ...", flush=True)
        tests = make_family(folder)
        published = report(folder, tests, "published.tall", threshold=0.4, scale="none")
        report(folder, tests, "adapted.tall", threshold="auto")  # the default
        report(folder, tests, "ternary.tall", method="ternary")
    if published < 0.5:
        sys.exit("digits: less than half of the gap was recovered")


if __name__ == "__main__":
    main()
