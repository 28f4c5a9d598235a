"""Which rule chooses the masks best without any data? Rules × families, in plain PyTorch.

    python benchmarks/thresholds.py [FAMILY ...]

Every rule spends the same: one shared vector s, one bit per parameter and task, a scale g per
tensor and task. Decoded is θ₀ + g·(m∘s). A rule is a shared vector, a mask rule and a scale:

  shared   sum         s = Σ_t τ_t, the published one
           model       s = Σ_t w_t τ_t, w_t = a / ‖τ_t‖ over the whole model, a the mean ‖τ_t‖
           normalised  the same in each tensor
           refit N     as normalised; then, given masks and least-squares scales, the s that is
                       nearest to the weighted task vectors, and the masks again; N times
           refit sum N the same from the sum, w_t = 1
  mask     λ           |w_t τ_t| > λ·|s − w_t τ_t| (w_t = 1 for the sum)
           cos, task   the λ of GRID with the greatest cos(m∘s, τ), one for a task
           cos, tensor the same, one for each tensor and task
           sign        w_t τ_t·s > 0
           fit × F     w_t τ_t·s > F·c·s², c = ½ Σ m w_t τ_t s / Σ m s² in turns (with F = 1):
                       at F = 1 what brings a least-squares-scaled m∘s nearest to τ
           near ρ      w_t τ_t·s > c·s², c the greatest of CS with cos(m∘s, τ) ≥ ρ × the best;
                       encode's adapted masks are "sum, near 0.85, unit gain per tensor"
  scale    none        1
           tensor      unit gain, g = Σ τ² / Σ τ·(m∘s), per tensor, at most 9 times the
                       least-squares scale
           task        the same, one for all of the task's tensors
           least squares, middle   g·cos² and g·|cos|, per tensor, g the unit gain

Prints a line per family, split of its texts and rule, and writes them to --out
(results/thresholds.csv).
"""

import argparse
import itertools
import time
from typing import NamedTuple

import torch

from common import RESULTS, write_csv
from families import FAMILIES, load
from tallcodec.reference.formulas import MOST, RATIOS

GRID = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
PUBLISHED = ("0.2", "0.3", "0.4", "0.5", "0.6")
CS = torch.from_numpy(RATIOS)  # c tried by "near"
TINY = 1e-30  # keeps quotients of sums finite where a task or a mask is empty


class Rule(NamedTuple):
    shared: str
    mask: str  # a number is λ
    scale: str

    def __str__(self):
        mask = f"λ {self.mask}" if self.mask[0].isdigit() else self.mask
        scale = {"none": "", "tensor": ", unit gain per tensor", "task": ", unit gain per task"}
        return f"{self.shared}, {mask}{scale.get(self.scale, f', {self.scale}')}"


RULES = [
    *(Rule("sum", lam, "none") for lam in PUBLISHED),
    *(Rule("sum", lam, "tensor") for lam in ("0.4", "0.6", "1.0")),
    Rule("sum", "cos, task", "tensor"),
    Rule("sum", "cos, tensor", "tensor"),
    Rule("sum", "sign", "tensor"),
    Rule("sum", "fit", "none"),
    *(Rule("sum", "fit", scale) for scale in ("least squares", "middle", "tensor", "task")),
    *(Rule("sum", f"fit × {factor}", "tensor") for factor in ("1.25", "1.5", "2")),
    *(Rule("model", mask, "tensor") for mask in ("1.0", "fit")),
    *(Rule("normalised", mask, "tensor") for mask in ("1.0", "cos, tensor", "fit", "fit × 1.5")),
    *(Rule("refit 1", mask, "tensor") for mask in ("1.0", "fit", "fit × 1.5")),
    Rule("refit 1", "fit", "middle"),
    Rule("refit sum 1", "fit", "tensor"),
    Rule("refit sum 1", "fit × 1.5", "tensor"),
    Rule("refit 3", "fit", "tensor"),
    *(Rule("sum", f"near {rho}", "tensor")
      for rho in ("0.98", "0.95", "0.9", "0.85", "0.8", "0.7")),
    *(Rule("refit sum 1", f"near {rho}", "tensor") for rho in ("0.95", "0.9", "0.85", "0.8")),
    *(Rule("normalised", f"near {rho}", "tensor") for rho in ("0.95", "0.9", "0.85", "0.8")),
]


def dots(a, b):
    """Σ a·b of each row, (tasks, n) → (tasks, 1)."""
    return torch.linalg.vecdot(a, b)[..., None].double()


def lambda_mask(tau, s, lam):
    return tau.abs() > lam * (s - tau).abs()


def cosines(tau, s, lams):
    """⟨m∘s, τ⟩ and ‖m∘s‖² of the masks at each λ, two tensors (λ, tasks, 1)."""
    sums = []
    for lam in lams:
        kept = lambda_mask(tau, s, lam) * s
        sums.append(torch.stack([dots(kept, tau), dots(kept, kept)]))
    return torch.stack(sums).unbind(1)


def best_lambda(dot, square):
    """The λ of GRID with the greatest cosine, from `cosines`, (tasks, 1)."""
    cos = dot / (square + TINY).sqrt()
    return torch.tensor(GRID)[cos.argmax(0)]


def fit_mask(tau, s, factor=1.0, rounds=8):
    """Masks w τ·s > c·s², c refitted in turns with them from ½‖w τ‖ / ‖s‖, at last c·factor."""
    product, square = tau * s, (s * s).expand_as(tau)
    c = 0.5 * (dots(tau, tau) / (dots(s, s) + TINY)).sqrt()
    for _ in range(rounds):
        mask = (product > c.float() * square).float()
        c = 0.5 * dots(mask, product) / (dots(mask, square) + TINY)
    return product > factor * c.float() * square


def near_mask(tau, s, rho):
    """Masks τ·s > c·s² with the greatest c of CS whose cos(m∘s, τ) is ≥ ρ × the greatest of CS."""
    out = torch.empty(tau.shape, dtype=torch.bool)
    for i, row in enumerate(tau):
        ratio = torch.where(s != 0, row / s, 0)
        bins = torch.bucketize(ratio, CS)  # how many of CS are below the ratio
        sums = [torch.bincount(bins, x, len(CS) + 1)[1:].double().flip(0).cumsum(0).flip(0)
                for x in (row * s, s * s)]
        cos = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=TINY).sqrt(), 0)
        best = (cos >= rho * cos.max()).nonzero().max()
        out[i] = ratio > CS[best]
    return out


def unit_gain(tau, kept):
    """Σ τ² / Σ τ·kept, at most MOST times the least-squares scale; 0 where that is negative."""
    dot = dots(tau, kept).clamp(min=0)
    most = MOST * dot / dots(kept, kept).clamp(min=TINY)
    return torch.minimum(dots(tau, tau) / dot.clamp(min=TINY), most).float()


def weights(rule, vectors):
    """w_t of each tensor: a list of (tasks, 1)."""
    norms = [dots(tau, tau).sqrt() for tau in vectors]
    if "sum" in rule.shared:
        return [torch.ones_like(norm).float() for norm in norms]
    if rule.shared == "model":
        whole = torch.stack(norms).square().sum(0).sqrt()
        norms = [whole] * len(norms)
    return [torch.where(norm > 0, norm.mean() / norm.clamp(min=TINY), 0.0).float()
            for norm in norms]


def masks_of(rule, taus, shared):
    """The masks of every tensor, from weighted task vectors (tasks, n) and shared vectors (n)."""
    if rule.mask == "sign":
        return [tau * s > 0 for tau, s in zip(taus, shared)]
    if rule.mask.startswith("near"):
        rho = float(rule.mask.split()[1])
        return [near_mask(tau, s, rho) for tau, s in zip(taus, shared)]
    if rule.mask.startswith("fit"):
        factor = float(rule.mask.partition("× ")[2] or 1)
        return [fit_mask(tau, s, factor) for tau, s in zip(taus, shared)]
    if rule.mask == "cos, tensor":
        lams = [best_lambda(*cosines(tau, s, GRID)) for tau, s in zip(taus, shared)]
    elif rule.mask == "cos, task":
        sums = [torch.stack(cosines(tau, s, GRID)) for tau, s in zip(taus, shared)]
        lams = [best_lambda(*torch.stack(sums).sum(0))] * len(taus)
    else:
        lams = [float(rule.mask)] * len(taus)
    return [lambda_mask(tau, s, lam) for tau, s, lam in zip(taus, shared, lams)]


def apply(rule, vectors):
    """g·(m∘s) for the task vectors of every tensor, (tasks, n) each, and the masks' density."""
    w = weights(rule, vectors)
    taus = [a * tau for a, tau in zip(w, vectors)]
    shared = [tau.sum(0) for tau in taus]
    masks = masks_of(rule, taus, shared)
    for _ in range(int(rule.shared.split()[-1]) if rule.shared.startswith("refit ") else 0):
        for i, (tau, s, mask) in enumerate(zip(taus, shared, masks)):
            g = (dots(mask * s, tau) / (dots(mask * s, mask * s) + TINY)).float() * mask
            fitted = (g * tau).sum(0) / g.square().sum(0).clamp(min=TINY)
            shared[i] = torch.where(mask.any(0), fitted, s)
        masks = masks_of(rule, taus, shared)
    kept = [mask * s for mask, s in zip(masks, shared)]
    if rule.scale == "tensor":
        kept = [unit_gain(tau, k) * k for tau, k in zip(vectors, kept)]
    elif rule.scale in ("least squares", "middle"):
        power = 1.0 if rule.scale == "least squares" else 0.5
        for i, (tau, k) in enumerate(zip(vectors, kept)):
            unit, cos2 = unit_gain(tau, k), dots(tau, k) ** 2 / (dots(tau, tau) * dots(k, k) + TINY)
            kept[i] = unit * (cos2 ** power).float() * k
    elif rule.scale == "task":
        square = sum(dots(tau, tau) for tau in vectors)
        dot = sum(dots(tau, k) for tau, k in zip(vectors, kept))
        kept = [(square / dot).float() * k for k in kept]
    density = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    return kept, density


class Experiment:
    """One family with its task vectors stacked: per tensor (tasks, n)."""

    def __init__(self, name, split, limit=None):
        self.family, scorer_of = load(name)
        self.split = split
        self.scorer = scorer_of(self.family, split, limit)
        self.base = self.family.base()
        stacks = {k: [] for k in self.base}
        for task in self.family.tasks:
            checkpoint = self.family.checkpoint(task)
            for k, b in self.base.items():
                stacks[k].append((checkpoint[k] - b).flatten())
        stacks = {k: torch.stack(v) for k, v in stacks.items()}
        self.names = [k for k, v in stacks.items() if v.any()]
        self.vectors = [stacks[k] for k in self.names]

    def score(self, rule):
        """{task: Score} of the rule, and its density."""
        decoded, density = apply(rule, self.vectors)
        scores = {}
        for i, task in enumerate(self.family.tasks):
            w = dict(self.base)
            for k, tau in zip(self.names, decoded):
                w[k] = w[k] + tau[i].view(w[k].shape)
            scores[task] = self.scorer.score(task, w)
        return scores, density

    def row(self, method, scores, density):
        scorer = self.scorer
        bases = {task: scorer.score(task, self.base) for task in scores} \
            if not hasattr(self, "bases") else self.bases
        self.bases = bases
        left = [scores[task].kl / bases[task].kl for task in scores]
        mean = scorer.mean(scores)
        return {
            "family": self.family.folder.name, "split": self.split, "rule": method,
            "kl_left": scorer.kl_left(mean),
            "kl_left_tasks": sum(left) / len(left), "kl_left_worst": max(left),
            "agreement": mean.agreement,
            "agreement_worst": min(score.agreement for score in scores.values()),
            "accuracy": mean.accuracy, "gap_recovered": scorer.gap_recovered(mean),
            "density": density,
        }


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("families", nargs="*", default=[*FAMILIES, "minilm"])
    ap.add_argument("--splits", nargs="*", choices=("val", "test"), default=["val", "test"])
    ap.add_argument("--rules", type=int, nargs="*", help="which, by number")
    ap.add_argument("--limit", type=int, help="test texts per task")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--out", default=RESULTS / "thresholds.csv")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, split in itertools.product(args.families, args.splits):
        experiment = Experiment(name, split, args.limit)
        for rule in [RULES[i] for i in args.rules or range(len(RULES))]:
            start = time.perf_counter()
            rows.append(experiment.row(str(rule), *experiment.score(rule)))
            cells = [f"{v:.4f}" for v in list(rows[-1].values())[3:]]
            seconds = time.perf_counter() - start
            print(f"{name:7} {split:5} {rule!s:48}", *cells, f"{seconds:.1f}s", flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
