"""What each method costs and what it keeps, on real families: tables and plots.

    PYTHONPATH=benchmarks python benchmarks/quality.py [--families minilm] [--methods TIES,EMR]

Every method of methods.py turns the tasks of a family, and of MiniLM the first 4 and 2 of them
(but for what searches), into what it stores; every task is decoded and scored on test texts. A
score depends on the decoded checkpoint alone, so it is kept in the cache under a hash of that; a
row is kept under a hash of the code. An interrupted run goes on where it stopped, and measuring
seconds again (--force) scores nothing again.

A run of all methods and subsets writes results/quality.csv and, with --docs, docs/quality-*.svg and
what is between the markers quality:begin and quality:end in docs/quality.md.
"""

import argparse
import copy
import functools
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash

import families
import tallcodec
from common import DOCS, RESULTS, around, write_csv, write_part
from methods import METHODS, Method, Problem
from minilm import CACHE
from minilm.evaluate import Score
from tallcodec import _core

CSV = RESULTS / "quality.csv"
PAGE = DOCS / "quality.md"
SUBSETS = {"minilm": (4, 2)}  # how many of the first tasks, besides all of them
MAX_SETTINGS = 45  # characters in a table: λ of eight tasks, not of forty

COLUMNS = {  # of the tables: heading and format
    "method": ("method", ""), "bytes": ("bytes", ","), "models": ("models", ".2f"),
    "ratio": ("ratio", ".2f"), "bits": ("bits", ".2f"), "task_bits": ("task bits", ".2f"),
    "accuracy": ("accuracy", ".4f"), "normalised": ("normalised", ".4f"),
    "gap_recovered": ("gap recovered", ".3f"), "worst": ("worst task", ".3f"),
    "agreement": ("agreement", ".3f"), "kl_left": ("KL left", ".2%"), "gain": ("gain", ".2f"),
    "error": ("error", ".2f"), "encode_s": ("encode s", ".2f"), "decode_s": ("decode s", ".3f"),
}

LEGEND = """
    *models*: bytes ÷ one checkpoint's; *ratio*: separate checkpoints' bytes ÷ bytes; *bits*: all
    bytes, base included, per parameter and task; *task bits*: what a further task adds, per
    parameter. *normalised*: mean over the tasks of decoded ÷ fine-tuned accuracy; *worst task*: the
    lowest of these. The other columns are those of the [real family](benchmarks.md). A searched λ
    or α is the best on validation texts, α on 100 of each task; encode seconds leave the scoring
    out. ᶜ: no file, bytes computed from the parts, seconds of a PyTorch prototype in memory, where
    base and merged models are as well. **Bold**: nothing else is at once smaller and closer
    (bytes, KL left)."""


class Bench:
    """One family: the cache, and its scorers, each made when a score is not in the cache."""

    def __init__(self, name: str, limit: int | None, threads: int, cache: Path):
        self.family, self._scorer_of = families.load(name)
        self.name, self.limit, self.threads = name, limit, threads
        self._scorers = {}
        self._cache = cache
        parts = ("base", "heads", "data")
        self._identity = _hash((self.family.folder / f"{part}.safetensors").read_bytes()
                               for part in parts)
        self._tuned = {}  # by task: a digest of the fine-tuned checkpoint

    def score(self, task: str, state: dict, split: str, limit: int | None = None) -> Score:
        """How a checkpoint does a task, on so many texts, from the cache or measured."""
        data = task, split, min((n for n in (limit, self.limit) if n), default=None)
        path = self._path(state, *data)
        if not path.exists() and data not in self._scorers:
            self._make_scorer(*data)  # which scores the base and the fine-tuned model
        if not path.exists():
            _write_json(path, self._scorers[data].score(task, state)._asdict())
        return Score(**json.loads(path.read_text()))

    def _make_scorer(self, task: str, split: str, limit: int | None) -> None:
        family = copy.copy(self.family)
        family.tasks = [task]
        scorer = self._scorers[task, split, limit] = self._scorer_of(family, split, limit)
        for state, score in ((family.base(), scorer.base_score),
                             (family.checkpoint(task), scorer.tuned_score)):
            _write_json(self._path(state, task, split, limit), score._asdict())

    def _path(self, state: dict, task: str, split: str, limit: int | None) -> Path:
        """Where a score is kept: by family, fine-tuned model, split and decoded checkpoint."""
        if task not in self._tuned:
            self._tuned[task] = _digest(self.family.checkpoint(task))
        key = _hash(map(str.encode, (self._identity, self._tuned[task], _digest(state))))
        texts = split if limit is None else f"{split}-{limit}"
        return self._cache / "scores" / self.name / texts / task / f"{key}.json"

    def row_path(self, method: Method, tasks: list[str]) -> Path:
        """Where a row of the results is kept."""
        key = _hash(repr(part).encode() for part in (
            self.name, self._identity, tasks, method.name, method.options, self.limit, _code()))
        return self._cache / "rows" / f"{key}.json"

    def row(self, method: Method, tasks: list[str], repeat: int, force: bool) -> dict:
        """A row of the results, from the cache unless forced."""
        path = self.row_path(method, tasks)
        if force or not path.exists():
            _write_json(path, self._measure(method, tasks, repeat))
        return json.loads(path.read_text())

    def _measure(self, method: Method, tasks: list[str], repeat: int) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            problem = Problem(self.family, tasks, self.score, Path(folder), self.threads)
            problem.taus, problem.base  # loaded before the clock starts
            if method.searches:
                method.encode(problem, **method.options)  # so that scores are in the cache
            times = []
            for _ in range(repeat):
                elapsed, encoded = _seconds(lambda: method.encode(problem, **method.options))
                times.append(elapsed)
            decode_s, distances, scores = [], [], {}
            for task in tasks:
                took = [_seconds(lambda: encoded.decode(task)) for _ in range(repeat)]
                decode_s.append(statistics.median(elapsed for elapsed, _ in took))
                state = took[-1][1]
                distances.append(_distance(problem, task, state))
                scores[task] = self.score(task, state, "test")
                print(".", end="", flush=True)
        separate = sum(path.stat().st_size for path in problem.paths.values())
        gain, error = (statistics.mean(column) for column in zip(*distances))
        per_parameter = problem.parameters * len(tasks)
        return {
            "family": self.name, "tasks": len(tasks), "method": method.name, "kind": method.kind,
            "size": "file" if method.measured else "computed", "settings": encoded.settings,
            "bytes": encoded.bytes, "models": encoded.bytes / problem.base_bytes,
            "ratio": separate / encoded.bytes, "bits": 8 * encoded.bytes / per_parameter,
            "task_bits": 8 * encoded.task_bytes / problem.parameters,
            **self._quality(tasks, problem, scores), "gain": gain, "error": error,
            "encode_s": statistics.median(times), "decode_s": statistics.mean(decode_s),
        }

    def _quality(self, tasks: list[str], problem: Problem, scores: dict[str, Score]) -> dict:
        """Means over the tasks, against the base's and the fine-tuned models'."""
        base = {task: self.score(task, problem.base, "test") for task in tasks}
        tuned = {task: self.score(task, self.family.checkpoint(task), "test") for task in tasks}
        normalised = {t: scores[t].accuracy / tuned[t].accuracy for t in tasks}
        start, end = _mean(base).accuracy, _mean(tuned).accuracy
        mean, worst = _mean(scores), min(normalised, key=normalised.get)
        return {
            "accuracy": mean.accuracy, "normalised": statistics.mean(normalised.values()),
            "gap_recovered": (mean.accuracy - start) / (end - start),
            "worst": normalised[worst], "worst_task": worst, "agreement": mean.agreement,
            "kl_left": mean.kl / _mean(base).kl,
        }


def _distance(problem: Problem, task: str, state: dict) -> tuple[float, float]:
    """Gain ⟨τ̂,τ⟩ ÷ ⟨τ,τ⟩ and error ‖τ̂ − τ‖ ÷ ‖τ‖ of a decoded checkpoint."""
    tau_sq = dot = error_sq = 0.0
    flat = problem.taus[problem.tasks.index(task)]
    for name, tau in problem.split(flat):
        approx = state[name].float() - problem.base[name].float()
        tau_sq += float((tau * tau).sum(dtype=torch.float64))
        dot += float((tau * approx).sum(dtype=torch.float64))
        error_sq += float(((approx - tau) ** 2).sum(dtype=torch.float64))
    return dot / tau_sq, (error_sq / tau_sq) ** 0.5


def _mean(scores: dict[str, Score]) -> Score:
    return Score(*(statistics.mean(column) for column in zip(*scores.values())))


def _seconds(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _digest(state: dict) -> str:
    """A hash of a state dict's names, types, shapes and bits."""
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of the code that rows depend on, as it is when this starts."""
    here = Path(__file__).parent
    package = Path(tallcodec.__file__).parent
    sources = [here / "quality.py", here / "methods.py", here / "rivals.py", Path(_core.__file__)]
    return _hash(path.read_bytes() for path in (*sources, *sorted(package.glob("*.py"))))


def _write_json(path: Path, value: dict) -> None:
    """A whole file or none, for runs that are interrupted or share the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(value, file)
    Path(file.name).replace(path)


def front(rows: list[dict]) -> list[dict]:
    """The rows that no other one beats in bytes and KL left at once."""
    def beats(a, b):
        x, y = (a["bytes"], a["kl_left"]), (b["bytes"], b["kl_left"])
        return x != y and x[0] <= y[0] and x[1] <= y[1]
    return [row for row in rows if not any(beats(other, row) for other in rows)]


def markdown(rows: list[dict]) -> str:
    """Tables and plots of all families, for docs/quality.md."""
    parts = [" ".join(LEGEND.split())]
    for (family, count), group in grouped(rows).items():
        best = {row["method"] for row in front(group)}
        lines = [[heading for heading, _ in COLUMNS.values()],
                 ["---"] + ["---:"] * (len(COLUMNS) - 1)]
        for row in group:
            cells = [format(row[key], spec) for key, (_, spec) in COLUMNS.items()]
            if row["settings"] and len(row["settings"]) < MAX_SETTINGS:
                cells[0] += f" ({row['settings']})"
            cells[0] = f"**{cells[0]}**" if row["method"] in best else cells[0]
            cells[1] += "" if row["size"] == "file" else " ᶜ"
            lines.append(cells)
        parts.append(f"### {family}, {count} tasks")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        parts.append(wins(group))
        if (DOCS / plot_name(family, count)).exists():
            parts.append(f"![KL left and gap recovered against size]({plot_name(family, count)})")
    return "\n\n".join(part for part in parts if part)


def wins(rows: list[dict]) -> str:
    """Which rivals are smaller than a row of ours, and closer to the fine-tuned models."""
    found = []
    for rival in (row for row in rows if row["kind"] == "rival"):
        beaten = [row["method"] for row in rows if row["kind"] == "TALL"
                  and row["bytes"] >= rival["bytes"] and row["kl_left"] >= rival["kl_left"]]
        if beaten:
            found.append(f"- {rival['method']} is smaller and has less KL left than "
                         + "; ".join(beaten) + ".")
    return "Where rivals win:\n\n" + "\n".join(found) if found else ""


def grouped(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows by family and number of tasks."""
    groups = {}
    for row in rows:
        groups.setdefault((row["family"], row["tasks"]), []).append(row)
    return groups


def plot_name(family: str, count: int) -> str:
    return f"quality-{family}-{count}.svg"


def write_docs(rows: list[dict]) -> None:
    """Plots, and the part of docs/benchmarks.md between the markers."""
    from plots import plot  # matplotlib is installed for this alone

    for (family, count), group in grouped(rows).items():
        plot(group, DOCS / plot_name(family, count), f"{family}, {count} tasks")
    write_part(PAGE, "quality", markdown(rows))


def chosen_methods(names: str | None) -> list[Method]:
    """Methods whose names contain one of these words, those that search last."""
    words = names.split(",") if names else [""]
    chosen = [m for m in METHODS if any(word.lower() in m.name.lower() for word in words)]
    if not chosen:
        raise SystemExit(f"no such method; there are: {', '.join(m.name for m in METHODS)}")
    return sorted(chosen, key=lambda method: method.searches)


def subsets(family: str, tasks: list[str], only: str | None) -> list[list[str]]:
    """The tasks, and where a family has such subsets the first of them."""
    counts = [len(tasks), *SUBSETS.get(family, ())]
    wanted = [int(n) for n in only.split(",")] if only else counts
    return [tasks[:n] for n in counts if n in wanted]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--families", default=",".join(("minilm", *families.FAMILIES)))
    ap.add_argument("--methods", help="words in the names of those to run, with commas between")
    ap.add_argument("--tasks", help="how many, as 4,2")
    ap.add_argument("--limit", type=int, help="texts per task")
    ap.add_argument("--repeat", type=int, default=3, help="timed runs of every encode and decode")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--force", action="store_true", help="measure rows again")
    ap.add_argument("--cached", action="store_true", help="leave out what the cache does not have")
    ap.add_argument("--docs", action="store_true", help="write plots and tables into docs/")
    ap.add_argument("--cache", type=Path, default=CACHE / "quality")
    args = ap.parse_args()
    _code()
    complete = not (args.limit or args.methods or args.tasks)
    if args.docs and not complete:
        ap.error("--docs is for complete runs: without --limit, --methods and --tasks")
    if args.docs:
        around(PAGE, "quality")  # not after hours
    torch.set_num_threads(args.threads)
    order = {method.name: i for i, method in enumerate(METHODS)}
    methods, rows, failed = chosen_methods(args.methods), [], []
    for name in args.families.split(","):
        bench = Bench(name, args.limit, args.threads, args.cache)
        for tasks in subsets(name, bench.family.tasks, args.tasks):
            done = []
            for method in methods:
                if method.searches and len(tasks) < len(bench.family.tasks):
                    continue
                if args.cached and not bench.row_path(method, tasks).exists():
                    continue
                print(f"{name} {len(tasks)}: {method.name} ", end="", flush=True)
                try:
                    row = bench.row(method, tasks, args.repeat, args.force)
                except tallcodec.TallcodecError as error:
                    failed.append(f"{name} {len(tasks)}, {method.name}: {error}")
                    print(f"failed: {error}", flush=True)
                    continue
                done.append(row)
                print(f" {row['models']:.2f} models, KL left {row['kl_left']:.2%}, "
                      f"gap {row['gap_recovered']:.3f} {row['settings']}", flush=True)
            rows += sorted(done, key=lambda row: order[row["method"]])
            if complete:
                write_csv(CSV, rows)
    print("\n" + markdown(rows))
    if args.docs:
        write_docs(rows)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
