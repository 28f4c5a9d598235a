"""What the small families have in common: how they are trained, saved and scored."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from minilm.evaluate import Scorer as MiniLMScorer

SPLITS = ("train", "val", "test")


class SmallScorer(MiniLMScorer):
    """Scores checkpoints on one split of a family; a family's module says how to run them."""

    def __init__(self, family, split="test", limit=None):
        self.family, self.base = family, family.base()
        heads = load_file(family.folder / "heads.safetensors")
        data = load_file(family.folder / "data.safetensors")
        self.heads, self.data, self.tuned = {}, {}, {}
        for task in family.tasks:
            inputs = data[f"{task}.{split}.inputs"][:limit]
            labels = data[f"{task}.{split}.labels"][:limit].long()
            self.data[task] = {"inputs": inputs, "labels": labels[labels >= 0]}
            self.heads[task] = {k.split("/")[1]: v for k, v in heads.items()
                                if k.split("/")[0] == task}
            self.tuned[task] = self.logits(task, family.checkpoint(task))
        tuned = {task: self.compare(task, x) for task, x in self.tuned.items()}
        base = {task: self.score(task, self.base) for task in family.tasks}
        self.tuned_score, self.base_score = self.mean(tuned), self.mean(base)

    def logits(self, task, checkpoint):
        with torch.no_grad():
            w = {k: checkpoint.get(k, v).float() for k, v in self.base.items()}
            return self.run(w | self.heads[task], self.data[task]["inputs"])


def runner(network):
    """A function of weights and inputs that gives a module's logits."""
    return lambda w, inputs: functional_call(network, w, (inputs.long(),))


def train(run, fixed, w, data, epochs, batch, lr):
    """The tensors `w`, trained with Adam on inputs and labels together with the tensors `fixed`.

    A batch's inputs and labels go to `run`, which gives logits for the labels that are not −1.
    """
    inputs, labels = data[0], data[1].long()
    w = {k: v.clone().requires_grad_() for k, v in w.items()}
    steps = epochs * -(-len(inputs) // batch)
    opt = torch.optim.Adam(w.values(), lr=lr, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(epochs):
        for i in torch.randperm(len(inputs)).split(batch):
            opt.zero_grad()
            y = labels[i]
            F.cross_entropy(run(fixed | w, inputs[i]), y[y >= 0]).backward()
            opt.step()
            rate.step()
    return {k: v.detach() for k, v in w.items()}


def save(folder, base, checkpoints, heads, data, settings):
    """Writes a family: base, checkpoints, heads by "TASK/tensor", data by "TASK.split.inputs"."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(base, folder / "base.safetensors")
    for task, w in checkpoints.items():
        save_file(w, folder / "checkpoints" / f"{task}.safetensors")
    heads = {f"{task}/{k}": v for task, head in heads.items() for k, v in head.items()}
    save_file(heads, folder / "heads.safetensors")
    flat = {f"{task}.{split}.{kind}": tensor.clone(memory_format=torch.contiguous_format)
            for task, splits in data.items() for split, pair in zip(SPLITS, splits)
            for kind, tensor in zip(("inputs", "labels"), pair)}
    save_file(flat, folder / "data.safetensors")
    meta = {"tasks": {t: {"train": len(data[t][0][0])} for t in checkpoints}, "settings": settings}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
