"""Which elements of a task vector are worth their bits? Rules × families at equal bits.

    python benchmarks/sparsity.py [FAMILY ...]

Every rule keeps the signs of some elements and as many scales as it says, at BITS per parameter
and task: positions and signs at their entropy, 16 bits a scale (docs/format.md, "Ternary planes").

  which    share     the same share of every tensor
           whole     the largest elements of the whole task vector
           error     shared among tensors to lower Σ τ²·(1 / cos² − 1), what unit gain leaves
           relative  the same, each tensor's part ÷ ‖τ‖²
           root      the same, ÷ ‖τ‖: what encode does
  scale    1         unit gain per tensor
           0.9, 1.1  a gain of that
           rows      the rows' own unit gains, and the tensor's brought to 1
           columns   the same for the last dimension
           levels    two: the mean magnitudes of the larger and the smaller half of what is kept
                     (one bit more per element), the tensor's gain brought to 1

Prints a line per family and rule, and writes them to --out (results/sparsity.csv).
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
import torch

from common import RESULTS, write_csv
from families import FAMILIES
from tallcodec.errors import ArgumentError
from tallcodec.reference import ternary
from tallcodec.reference.formulas import MOST
from thresholds import Experiment

BITS = (0.1, 0.3, 0.6, 1.0)
POWERS = {"error": 0.5, "root": 0.0, "relative": -0.5}  # of Σ τ², over what encode weighs by
SCALE_BITS = 16
TINY = 1e-30


class Rule(NamedTuple):
    which: str
    scale: str

    def __str__(self):
        return f"{self.which}, {self.scale}"


RULES = [*(Rule(which, "1") for which in ("share", "whole", "error", "relative", "root")),
         *(Rule("root", scale) for scale in ("0.9", "1.1", "rows", "columns", "levels"))]


def counts(which, tensors, hulls, bits):
    """How many elements each tensor keeps, for these bits in all."""
    if which in POWERS:
        weighted = [[(k, b, e * float((t.double() ** 2).sum()) ** POWERS[which])
                     for k, b, e in points] for t, points in zip(tensors, hulls)]
        return ternary.share(weighted, [t.numel() for t in tensors], 1, bits, 0)
    magnitudes = [t.abs().flatten().sort(descending=True).values for t in tensors]
    if which == "whole":
        order = torch.cat(magnitudes).sort(descending=True).values

    def kept(share):
        if which == "share":
            return [max(1, int(share * t.numel())) for t in tensors]
        cut = order[max(0, int(share * order.numel()) - 1)]
        return [max(1, int((m >= cut).sum())) for m in magnitudes]

    low, high = 0.0, 0.5
    for _ in range(30):
        share = (low + high) / 2
        cost = sum(ternary.entropy(t.numel(), k) for t, k in zip(tensors, kept(share)))
        low, high = (share, high) if cost < bits else (low, share)
    return kept(low)


def approximation(tau, kept, scale):
    """τ̂ of a tensor that keeps so many elements."""
    order = tau.abs().flatten().argsort(descending=True, stable=True)[:kept]
    a = torch.zeros(tau.numel())
    a[order] = tau.flatten()[order].sign()
    a = a.view(tau.shape)
    if scale == "levels":
        half = order[: kept // 2]
        magnitude = tau.abs().flatten()
        levels = torch.full((tau.numel(),), float(magnitude[order[kept // 2 :]].mean()))
        levels[half] = float(magnitude[half].mean()) if kept > 1 else 0.0
        a = a * levels.view(tau.shape)
    if scale in ("rows", "columns") and tau.dim() > 1:
        lines = tau.flatten(1), a.flatten(1)
        axis = 1 if scale == "rows" else 0
        square, dot = (lines[0] ** 2).sum(axis, True), (lines[0] * lines[1]).sum(axis, True)
        a = (lines[1] * torch.where(dot > 0, square / (dot + TINY), 0)).view(tau.shape)
    square, dot, own = ((x.double() * y.double()).sum() for x, y in ((tau, tau), (tau, a), (a, a)))
    gain = float(scale) if scale[0].isdigit() else 1.0
    return a * float(gain * min(square / (dot + TINY), MOST * dot / (own + TINY)))


def extra_bits(scale, tensors, kept):
    """What scales and levels take."""
    lines = {"rows": lambda t: t.shape[0], "columns": lambda t: t[0].numel()}.get(scale)
    scales = sum(lines(t) if lines and t.dim() > 1 else 1 for t in tensors)
    return SCALE_BITS * scales + (sum(kept) if scale == "levels" else 0)


class Sparsity(Experiment):
    """A family's task vectors as tensors, and their hulls, by task."""

    def __init__(self, name, split, limit=None):
        super().__init__(name, split, limit)
        self.parameters = sum(b.numel() for b in self.base.values())
        self.tensors, self.hulls = {}, {}
        for i, task in enumerate(self.family.tasks):
            named = [(k, v[i].view(self.base[k].shape)) for k, v in zip(self.names, self.vectors)]
            self.tensors[task] = dict((k, t) for k, t in named if t.any())
            self.hulls[task] = [ternary.hull(np.ascontiguousarray(t.flatten().numpy()))
                                for t in self.tensors[task].values()]

    def sparse(self, rule, bits):
        """{task: Score} of the rule, and the density."""
        scores, total = {}, 0
        for task, tensors in self.tensors.items():
            values, budget = list(tensors.values()), bits * self.parameters
            kept = [0]
            for _ in range(4):  # what is beside the planes depends on what is kept
                left = max(budget / 4, budget - extra_bits(rule.scale, values, kept))
                kept = counts(rule.which, values, self.hulls[task], left)
            state = dict(self.base)
            for (name, tau), k in zip(tensors.items(), kept):
                state[name] = state[name] + approximation(tau, k, rule.scale)
            scores[task] = self.scorer.score(task, state)
            total += sum(kept) / self.parameters
        return scores, total / len(self.tensors)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("families", nargs="*", default=[*FAMILIES, "minilm"])
    ap.add_argument("--split", choices=("val", "test"), default="val")
    ap.add_argument("--limit", type=int, help="texts per task")
    ap.add_argument("--bits", type=float, nargs="*", default=BITS)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--out", default=RESULTS / "sparsity.csv")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.families:
        experiment = Sparsity(name, args.split, args.limit)
        for bits in args.bits:
            for rule in RULES:
                start = time.perf_counter()
                try:
                    scores = experiment.sparse(rule, bits)
                except ArgumentError as error:
                    print(f"{name:7} {bits:4} {rule!s:16} {error}")
                    continue
                rows.append({"bits": bits, **experiment.row(str(rule), *scores)})
                row = rows[-1]
                print(f"{name:7} {bits:4} {rule!s:16} KL left {row['kl_left']:8.2%} worst "
                      f"{row['kl_left_worst']:8.2%} agreement {row['agreement']:.4f} "
                      f"{time.perf_counter() - start:.0f}s", flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
