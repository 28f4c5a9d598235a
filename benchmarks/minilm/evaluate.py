"""How well do rebuilt encoders do the tasks of the fine-tuned ones?

    PYTHONPATH=benchmarks python -m minilm.evaluate FOLDER

FOLDER holds one encoder per task as TASK.safetensors; a file in place of it is tried on every
task. Tensors that a file lacks are taken from the base. Sixteen-bit encoders are run in float32.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from . import FAMILY, Family
from .model import accuracy, logits


class Score(NamedTuple):
    accuracy: float
    agreement: float  # share of texts with the same prediction as the fine-tuned model's
    kl: float  # mean KL(fine-tuned ‖ this) of the class distributions, in nats


class Scorer:
    """Scores encoders on one split of a family; runs base and fine-tuned models once."""

    def __init__(self, family, split="test", limit=None):
        self.data, self.heads, self.tuned = {}, {}, {}
        heads = load_file(family.folder / "heads.safetensors")
        data = load_file(family.folder / "data.safetensors")
        self.base = family.base()
        for task in family.tasks:
            keys = "ids", "lengths", "labels"
            self.data[task] = {k: data[f"{task}.{split}.{k}"].long()[:limit] for k in keys}
            self.heads[task] = {k: heads[f"{task}.{k}"] for k in ("weight", "bias")}
            self.tuned[task] = self.logits(task, family.checkpoint(task))
        tuned = {task: self.compare(task, x) for task, x in self.tuned.items()}
        base = {task: self.score(task, self.base) for task in family.tasks}
        self.tuned_score, self.base_score = self.mean(tuned), self.mean(base)

    def logits(self, task, encoder):
        unknown = [k for k in encoder if encoder[k].shape != self.base.get(k, torch.empty(0)).shape]
        if unknown:
            raise SystemExit(f"{task}: {unknown[0]} is not one of the base encoder's tensors")
        encoder = {k: encoder.get(k, v).float() for k, v in self.base.items()}
        return logits(encoder, self.heads[task], self.data[task])

    def compare(self, task, x):
        tuned, labels = self.tuned[task], self.data[task]["labels"]
        p, q = (a.double().log_softmax(1) for a in (tuned, x))
        kl = float((p.exp() * (p - q)).sum(1).mean())
        return Score(accuracy(x, labels), accuracy(x, tuned.argmax(1)), kl)

    def score(self, task, encoder):
        return self.compare(task, self.logits(task, encoder))

    @staticmethod
    def mean(scores):
        return Score(*(sum(column) / len(scores) for column in zip(*scores.values())))

    def gap_recovered(self, score):
        base = self.base_score.accuracy
        return (score.accuracy - base) / (self.tuned_score.accuracy - base)

    def kl_left(self, score):
        return score.kl / self.base_score.kl


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("encoders", type=Path)
    ap.add_argument("--family", type=Path, default=FAMILY)
    ap.add_argument("--split", choices=("val", "test"), default="test")
    ap.add_argument("--limit", type=int, help="texts per task")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    family = Family(args.family)
    scorer = Scorer(family, args.split, args.limit)
    scores = {}
    for task in family.tasks:
        path = args.encoders
        path = path if path.is_file() else path / f"{task}.safetensors"
        scores[task] = scorer.score(task, load_file(path))
        print(f"{task:<12} accuracy {scores[task].accuracy:.4f} "
              f"agreement {scores[task].agreement:.4f} KL {scores[task].kl:.5f}", flush=True)
    mean = scorer.mean(scores)
    print(f"{'mean':<12} accuracy {mean.accuracy:.4f} agreement {mean.agreement:.4f} "
          f"KL {mean.kl:.5f} KL left {scorer.kl_left(mean):.2%} "
          f"gap recovered {scorer.gap_recovered(mean):.3f}")


if __name__ == "__main__":
    main()
