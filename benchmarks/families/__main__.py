"""Make the small families and show how their checkpoints score."""

import argparse

import torch

from . import FAMILIES, load


def norm(base, checkpoint):
    return sum(float((checkpoint[k] - v).double().square().sum()) for k, v in base.items()) ** 0.5


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("families", nargs="*", default=list(FAMILIES))
    args = ap.parse_args()
    torch.set_num_threads(1)
    for name in args.families:
        family, scorer_of = load(name)
        scorer, base = scorer_of(family), family.base()
        print(f"\n{name}: {sum(v.numel() for v in base.values()):,} parameters")
        print(f"{'task':18}{'base':>8}{'tuned':>8}{'KL':>9}{'|τ|':>9}")
        for task in family.tasks:
            before = scorer.score(task, scorer.base)
            after = scorer.compare(task, scorer.tuned[task])
            size = norm(base, family.checkpoint(task))
            print(f"{task:18}{before.accuracy:8.3f}{after.accuracy:8.3f}{before.kl:9.4f}{size:9.3f}")
        a, b = scorer.base_score, scorer.tuned_score
        print(f"{'mean':18}{a.accuracy:8.3f}{b.accuracy:8.3f}{a.kl:9.4f}")


if __name__ == "__main__":
    main()
