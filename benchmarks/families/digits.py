"""A small convolutional network and twelve views of scikit-learn's handwritten digits.

The base reads digits. A task shows them in a way that the base has not seen, and may ask another
question about them. Per task a linear head is fitted on the features of the untouched base and
then frozen, and the rest is fine-tuned under it; so "base" is the linear probe.
"""

import torch
import torch.nn.functional as F

from .scoring import SmallScorer, save, train

FEATURES, TEST, VAL = 32, 540, 257
SHUFFLE = torch.randperm(64, generator=torch.Generator().manual_seed(0))
LOOPS = torch.tensor([1, 0, 0, 0, 1, 0, 1, 0, 2, 1])
PRIME = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0, 0])


def turned(x, y):
    turns = torch.arange(len(x)) % 4
    return torch.stack([torch.rot90(a, int(k)) for a, k in zip(x, turns)]), turns


TASKS = {  # how the task changes images in [0, 1] and their digits; epochs of training
    "inverted": (lambda x, y: (1 - x, y), 20),
    "quarter-turn": (lambda x, y: (x.rot90(1, (1, 2)), y), 20),
    "shuffled": (lambda x, y: (x.flatten(1)[:, SHUFFLE].view_as(x), y), 40),
    "left-half": (lambda x, y: (x * (torch.arange(8) < 4), y), 10),
    "top-half": (lambda x, y: (x * (torch.arange(8) < 4)[:, None], y), 10),
    "orientation": (turned, 20),
    "even-upside-down": (lambda x, y: (x.flip(1), y % 2), 10),
    "prime-shifted": (lambda x, y: (x.roll((3, 3), (1, 2)), PRIME[y]), 10),
    "loops-mirrored": (lambda x, y: (x.flip(2), LOOPS[y]), 20),
    "faint": (lambda x, y: (x / 4, y), 5),
    "outline": (lambda x, y: ((x > 0.25).float(), y), 5),
    "next-digit": (lambda x, y: ((x + x.roll(1, 0).flip(2)) / 2, y), 40),
}


def logits(w, x):
    for i in (1, 2, 3):
        x = F.gelu(F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1))
        x = F.group_norm(x, 4, w[f"norm{i}.weight"], w[f"norm{i}.bias"])
        if i == 2:
            x = F.max_pool2d(x, 2)
    x = F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])
    return F.linear(x, w["head.weight"], w["head.bias"])


class Scorer(SmallScorer):
    run = staticmethod(logits)


def new_network():
    w, widths = {}, (1, 24, 48, 64)
    for i in (1, 2, 3):
        n, k = widths[i], widths[i - 1]
        w[f"conv{i}.weight"] = torch.randn(n, k, 3, 3) / (9 * k) ** 0.5
        w[f"conv{i}.bias"] = torch.zeros(n)
        w[f"norm{i}.weight"], w[f"norm{i}.bias"] = torch.ones(n), torch.zeros(n)
    w["fc.weight"] = torch.randn(FEATURES, widths[3] * 16) / (widths[3] * 16) ** 0.5
    return w | {"fc.bias": torch.zeros(FEATURES)}


def new_head(classes):
    return {"head.weight": torch.zeros(classes, FEATURES), "head.bias": torch.zeros(classes)}


def make(name, folder):
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]

    def split(images, labels):
        images = (images[:, None] - 0.3) / 0.4
        cuts = slice(TEST + VAL, None), slice(TEST, TEST + VAL), slice(TEST)
        return [(images[cut], labels[cut]) for cut in cuts]

    pretrained = train(logits, {}, new_network() | new_head(10), split(x, y)[0], 15, 64, 1e-3)
    base = {k: v for k, v in pretrained.items() if not k.startswith("head")}
    heads, checkpoints, data = {}, {}, {}
    for task, (change, epochs) in TASKS.items():
        data[task] = split(*change(x, y))
        new = new_head(int(data[task][0][1].max()) + 1)
        heads[task] = train(logits, base, new, data[task][0], 25, 64, 1e-2)
        checkpoints[task] = train(logits, heads[task], base, data[task][0], epochs, 64, 3e-4)
        print(f"digits: {task} trained", flush=True)
    save(folder, base, checkpoints, heads, data, {"features": FEATURES})
