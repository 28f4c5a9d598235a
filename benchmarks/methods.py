"""The methods that quality.py compares: checkpoints in, decoded checkpoints and bytes out.

Ours write a file, and its bytes count. The rivals of rivals.py have none: their bytes are added
up from the base and their parts, as a file without any overhead would hold them.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import zstandard
from safetensors.torch import load

import rivals
import tallcodec

GRID = tuple(i / 10 for i in range(1, 11))  # α of arXiv 2405.07813
TIES_GRID = (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)  # means want more than sums
SCALE_TEXTS = 100  # validation texts per task that choose α: it is one number for all tasks
FLOAT = 32  # bits of a value or a scale that a rival stores


@dataclass
class Encoded:
    """What a method makes of a problem."""

    decode: Callable[[str], dict]
    bytes: int
    """Of all that decoding every task needs, the base included."""
    task_bytes: float
    """What a further task adds, mean over the tasks."""
    settings: str = ""
    """What was chosen on validation data."""


@dataclass(frozen=True)
class Method:
    """A name, what makes it, and with which options. ``kind`` groups methods in plots."""

    name: str
    kind: str
    encode: Callable[..., Encoded]
    options: dict = field(default_factory=dict)
    measured: bool = True
    """Whether its bytes are a file's, or computed."""
    searches: bool = False
    """Whether it scores models on validation data, which takes minutes."""


class Problem:
    """Tasks of one family, and their task vectors end to end as float32 (P,)."""

    def __init__(self, family, tasks: list[str], score: Callable, folder: Path, threads: int):
        self.family, self.tasks, self.folder, self.threads = family, tasks, folder, threads
        self.paths = {task: family.paths[task] for task in tasks}
        self.base_bytes = family.base_path.stat().st_size
        self._score = score

    @functools.cached_property
    def base(self) -> dict:
        return self.family.base()

    @functools.cached_property
    def taus(self) -> list[torch.Tensor]:
        """τ_t of every task, tensors in the order of the base's."""
        return [self._flat(self.family.checkpoint(task)) - self._start for task in self.tasks]

    @functools.cached_property
    def _start(self) -> torch.Tensor:
        return self._flat(self.base)

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.base.values())

    def accuracy(self, task: str, state: dict) -> float:
        """On validation texts."""
        return self._score(task, state, "val").accuracy

    def normalised(self, state: dict) -> float:
        """Mean of one model's accuracies over the fine-tuned ones', on some validation texts."""
        def accuracy(task, checkpoint):
            return self._score(task, checkpoint, "val", SCALE_TEXTS).accuracy

        return statistics.mean(
            accuracy(task, state) / accuracy(task, self.family.checkpoint(task))
            for task in self.tasks
        )

    def state(self, tau: torch.Tensor) -> dict:
        """The checkpoint θ₀ + τ, in the base's dtypes."""
        flat = self._start + tau
        return {name: part.to(self.base[name].dtype) for name, part in self.split(flat)}

    def split(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A vector (P,) as the base's tensors, by name."""
        parts = flat.split([tensor.numel() for tensor in self.base.values()])
        for (name, tensor), part in zip(self.base.items(), parts):
            yield name, part.view(tensor.shape)

    def _flat(self, state: dict) -> torch.Tensor:
        strange = [k for k, v in self.base.items()
                   if not v.is_floating_point() or k not in state or state[k].shape != v.shape]
        if strange or len(state) != len(self.base):
            raise SystemExit(f"{self.family.name}: rivals need the same float tensors everywhere")
        return torch.cat([state[name].flatten().float() for name in self.base])


def base(problem: Problem) -> Encoded:
    return Encoded(lambda task: problem.base, problem.base_bytes, 0)


def separate(problem: Problem) -> Encoded:
    """The fine-tuned checkpoints as they are; the base is not needed."""
    def read(task):  # safetensors maps files: nothing is read before it is copied
        return {name: tensor.clone() for name, tensor in problem.family.checkpoint(task).items()}

    sizes = [path.stat().st_size for path in problem.paths.values()]
    return Encoded(read, sum(sizes), statistics.mean(sizes))


def zstd(problem: Problem, level: int) -> Encoded:
    """Every checkpoint's file through zstd."""
    compressor = zstandard.ZstdCompressor(level=level)
    frames = {t: compressor.compress(path.read_bytes()) for t, path in problem.paths.items()}
    sizes = [len(frame) for frame in frames.values()]
    return Encoded(lambda task: load(zstandard.decompress(frames[task])),
                   sum(sizes), statistics.mean(sizes))


def tall(problem: Problem, **options) -> Encoded:
    """tallcodec.encode with these options, into a file in the problem's folder."""
    if options.get("threshold") == "search":
        options["score"] = problem.accuracy
    path = problem.folder / "family.tall"
    info = tallcodec.encode(problem.family.base_path, problem.paths, path, overwrite=True,
                            threads=problem.threads, **options)
    file = tallcodec.open(path, threads=problem.threads)
    chosen = [task.threshold for task in info.tasks]
    settings = "λ " + " ".join(f"{x:g}" for x in chosen) if "score" in options else ""
    return Encoded(file.decode, info.bytes, statistics.mean(t.bytes for t in info.tasks), settings)


def merged(problem: Problem, vector: torch.Tensor, grid: tuple[float, ...]) -> Encoded:
    """One model θ₀ + α·vector for all tasks; α by validation accuracy, ties to the smallest."""
    alpha = grid[0]
    if len(grid) > 1:
        alpha = max(grid, key=lambda a: problem.normalised(problem.state(a * vector)))
    state = problem.state(alpha * vector)
    settings = f"α {alpha:g}" if len(grid) > 1 else ""
    return Encoded(lambda task: state, problem.base_bytes, 0, settings)


def task_arithmetic(problem: Problem, grid: tuple[float, ...]) -> Encoded:
    return merged(problem, rivals.task_arithmetic(problem.taus), grid)


def ties(problem: Problem, grid: tuple[float, ...], share: float = 0.2) -> Encoded:
    return merged(problem, rivals.ties(problem.taus, share), grid)


def consensus(problem: Problem, merge: str, min_tasks: int, grid: tuple[float, ...]) -> Encoded:
    """Consensus Merging, out of a file with searched λ."""
    path = problem.folder / "consensus.tall"
    tallcodec.encode(problem.family.base_path, problem.paths, path, merge=merge, overwrite=True,
                     threshold="search", score=problem.accuracy, threads=problem.threads)
    state = tallcodec.merge(path, min_tasks=min_tasks, score=problem.normalised, grid=grid,
                            threads=problem.threads)
    return Encoded(lambda task: state, problem.base_bytes, 0, f"α {state.info.scale:g}")


def in_parts(problem: Problem, taus: Callable[[int], torch.Tensor], task_bits: list[float],
             shared_bits: float = 0) -> Encoded:
    """A rival that keeps the base and parts: τ̂ of the t-th task, and the parts' bits."""
    numbers = {task: t for t, task in enumerate(problem.tasks)}
    total = problem.base_bytes + (shared_bits + sum(task_bits)) / 8
    return Encoded(lambda task: problem.state(taus(numbers[task])), round(total),
                   statistics.mean(task_bits) / 8)


def pruning(problem: Problem, share: float) -> Encoded:
    """Positions at their entropy, values as float32."""
    kept = [rivals.pruned(tau, share) for tau in problem.taus]
    bits = [_positions(problem, tau) + FLOAT * int((tau != 0).sum()) for tau in kept]
    return in_parts(problem, kept.__getitem__, bits)


def emr(problem: Problem) -> Encoded:
    """One float32 vector for all; a mask bit per parameter and a rescaler per task."""
    unified, masks, rescalers = rivals.emr(problem.taus)
    bits = problem.parameters + FLOAT
    return in_parts(problem, lambda t: torch.where(masks[t], unified * rescalers[t], 0),
                    [bits] * len(problem.tasks), FLOAT * problem.parameters)


def bitdelta(problem: Problem) -> Encoded:
    """A sign bit per weight and a scale per matrix; biases and norms as they are.

    Embeddings count as matrices here. The paper leaves them as they are, too, which would cost
    half of this model again per task.
    """
    def rule(tensor):
        return rivals.bitdelta(tensor) if tensor.ndim > 1 else tensor

    coded = [_per_tensor(problem, tau, rule) for tau in problem.taus]
    bits = sum(v.numel() + FLOAT if v.ndim > 1 else FLOAT * v.numel()
               for v in problem.base.values())
    return in_parts(problem, coded.__getitem__, [bits] * len(problem.tasks))


def t_switch(problem: Problem, drop: float) -> Encoded:
    """Positions at their entropy, a sign bit each, a scale per tensor."""
    coded = [_per_tensor(problem, tau, lambda tensor: rivals.t_switch(tensor, drop))
             for tau in problem.taus]
    bits = [_positions(problem, tau) + int((tau != 0).sum()) + FLOAT * len(problem.base)
            for tau in coded]
    return in_parts(problem, coded.__getitem__, bits)


def _per_tensor(problem: Problem, tau: torch.Tensor, rule: Callable) -> torch.Tensor:
    return torch.cat([rule(tensor).flatten() for _, tensor in problem.split(tau)])


def _positions(problem: Problem, tau: torch.Tensor) -> float:
    """Bits that say where a task vector is not 0, coded per tensor."""
    return sum(rivals.position_bits(int((tensor != 0).sum()), tensor.numel())
               for _, tensor in problem.split(tau))


def _ours(name: str, **options) -> Method:
    return Method(name, "TALL", tall, options, searches=options.get("threshold") == "search")


def _merging(name: str, encode: Callable, **options) -> Method:
    searches = encode is consensus or len(options["grid"]) > 1
    return Method(name, "merged", encode, options, searches=searches)


def _rival(name: str, encode: Callable, **options) -> Method:
    return Method(name, "rival", encode, options, measured=False)


METHODS = (
    Method("base", "reference", base),
    Method("fine-tuned", "reference", separate),
    Method("zstd −3 of each", "reference", zstd, {"level": 3}),
    _merging("task arithmetic, α = 1", task_arithmetic, grid=(1.0,)),
    _merging("task arithmetic, best α", task_arithmetic, grid=GRID),
    _merging("TIES, α = 1", ties, grid=(1.0,)),
    _merging("TIES, best α", ties, grid=TIES_GRID),
    _merging("Consensus TA", consensus, merge="task-arithmetic", min_tasks=2, grid=GRID),
    _merging("Consensus TIES", consensus, merge="ties", min_tasks=2, grid=GRID),
    _ours("TALL + TA, adapted"),
    _ours("TALL + TA, adapted, bfloat16", shared_dtype="bfloat16"),
    _ours("TALL + TA, adapted, int8", shared_dtype="int8"),
    _ours("TALL + TA, λ = .4", threshold=0.4),
    _ours("TALL + TA, λ = .4, bfloat16", threshold=0.4, shared_dtype="bfloat16"),
    _ours("TALL + TA, λ = .4, int8", threshold=0.4, shared_dtype="int8"),
    _ours("TALL + TA, searched λ", threshold="search"),
    _ours("TALL + TA, λ = 1, unit gain", threshold=1.0, scale="unit-gain"),
    _ours("TALL + TA, λ = 1, unit gain, int8", threshold=1.0, scale="unit-gain",
          shared_dtype="int8"),
    _ours("TALL + TIES, adapted", merge="ties"),
    _ours("TALL + TIES, λ = .4", merge="ties", threshold=0.4),
    _ours("TALL + TIES, searched λ", merge="ties", threshold="search"),
    _ours("magnitude masks, 20 %", method="magnitude", density=0.2),
    _ours("ternary, .1 bits", method="ternary", bits=0.1),
    _ours("ternary, .3 bits", method="ternary", bits=0.3),
    _ours("ternary, .6 bits", method="ternary"),
    _ours("ternary, 1 bit", method="ternary", bits=1.0),
    _rival("magnitude pruning, 20 %", pruning, share=0.2),
    _rival("magnitude pruning, 5 %", pruning, share=0.05),
    _rival("EMR-Merging", emr),
    _rival("BitDelta", bitdelta),
    _rival("T-Switch, 40 %", t_switch, drop=0.6),
    _rival("T-Switch, 10 %", t_switch, drop=0.9),
)
