"""Checkpoints to a `.tall` file: what every tensor becomes is decided here, its bits in C++."""

import contextlib
import hashlib
import importlib.util
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, BinaryIO, NamedTuple

import zstandard

from . import _core, numbers
from .backends import forced
from .checkpoint import Checkpoint, open_checkpoint, refuse_input_as_output
from .errors import ArgumentError, CheckpointError, WriteError, label
from .file import open as open_file
from .info import MERGED, SCORES, FileInfo, read_info
from .machine import check_threads, memory
from .output import Partial, atomic_file, check_output, replaced_file, resumable_file
from .progress import Progress, check_progress
from .tensors import Tensor
from .thresholds import (
    BITS_GRID,
    GRID,
    Score,
    best,
    check_grid,
    check_threshold,
    score_trials,
    trial_name,
)
from .version import __version__

METHODS = ("tall", "magnitude", "ternary")
BITS = 0.6  # per parameter and task, of ternary planes: docs/benchmarks.md says what that keeps
DENSITY = 0.2  # of TIES, and of magnitude masks as published
SCALES = ("auto", *numbers.SCALES)
_COMPRESSED = 64 << 20  # bytes at most of a verbatim tensor that is compressed, in memory
# Whether masks, and ternary planes, are entropy coded.
CODINGS = {"auto": (False, True), "raw": (False, False), "entropy": (True, True)}


def encode(
    base: str | os.PathLike | Mapping[str, Any],
    tasks: Mapping[str, str | os.PathLike | Mapping[str, Any]],
    output: str | os.PathLike,
    *,
    merge: str = "task-arithmetic",
    threshold: float | Mapping[str, float] | str = "auto",
    score: Score | None = None,
    grid: Iterable[float] | None = None,
    out: Mapping[str, Any] | None = None,
    method: str | Mapping[str, str] = "tall",
    bits: float | Mapping[str, float] | None = None,
    target: float | Mapping[str, float] | None = None,
    density: float | None = None,
    scale: str = "auto",
    shared_dtype: str = "auto",
    base_storage: str = "embed",
    coding: str = "auto",
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> FileInfo:
    """Encode fine-tuned checkpoints of one base into one `.tall` file.

    ``base`` and the values of ``tasks`` are checkpoints: a `.safetensors` file, a Hugging Face
    folder, a torch file, or a mapping of names to torch tensors or NumPy arrays.

    - ``merge``: how the multi-task vector is made: "task-arithmetic", the sum of the task vectors;
      "average", their mean; "ties", what is left of them when all but the largest ``density`` of
      each is trimmed and a sign is elected, summed where it has that sign (arXiv 2306.01708, with
      the sum that arXiv 2405.07813 takes).
    - ``threshold``: λ of the TALL masks, one number or one per task: a parameter follows the
      multi-task vector s where |θ₀ − θ_t| > λ·|(θ₀ + s) − θ_t| (arXiv 2405.07813; its λ without
      validation data is 0.4). "search" chooses λ by a score. "auto" adapts the masks to every task
      and tensor, from the weights alone: a parameter follows s where τ/s > c, with the greatest c
      that leaves the cosine of m∘s and τ at least .85 of the best one (docs/benchmarks.md says what
      that keeps). c is found from a sample of the values, which are read in a pass before.
    - ``score``, ``grid``, ``out``: for "search". Every task is decoded with every λ of the grid
      (default the paper's, .2 to .6), into the same tensors each time (of ``out``, say
      ``model.state_dict()``, where they are named there), and ``score(task, state_dict)`` says how
      good that is: the λ with the highest score is taken, the smallest of equals. The scores are
      kept in the file. Tensors are torch's where it is installed, else NumPy's. All masks come
      from one pass over the checkpoints, and the file from a second one.
    - ``method``: "tall", one mask bit per parameter and task; "magnitude", masks of the largest
      ``density`` of each task vector instead, with no λ; "ternary", no shared vector at all: the
      signs of the largest elements of each task vector and one scale per tensor, entropy coded.
      Or one of them per task, of "tall" and "magnitude" only one.
    - ``bits``: of "ternary", bits per parameter and task, one number or one per task; default 0.6,
      or the least there is. They are shared among a task's tensors so that the error grows least
      (docs/format.md, "Ternary planes"). What the container adds, some 180 bytes per tensor and
      task, is not in it.
    - ``target``: in place of ``bits``, the score that "ternary" tasks have to reach, one number or
      one per task: of the bits in ``grid`` (default .05 to 1.3) the fewest whose decoded task has
      it by ``score``, which is called as in a search for λ.
    - ``density``: share of each task vector, over all tensors, that "ties" and "magnitude" keep,
      default 0.2; and where it is given in place of ``bits``, the most that "ternary" does.
    - ``scale``: "none", the published rule; "unit-gain" multiplies each tensor's masked vector by
      g = Σ τ² / Σ τ·(m∘s), so that ⟨τ̂,τ⟩ = ⟨τ,τ⟩; but where m∘s follows τ so little that τ̂ would be
      more than 3 times as long as τ (a cosine under 1/3), by 9 times the least-squares factor,
      which is less; "unit-gain-row" has one g per row. "auto" is "unit-gain" where the masks are
      adapted, else "none". Ternary planes always have the unit gain of the tensor, in 16-bit types
      that of the rounded checkpoint.
    - ``shared_dtype``: how s is stored: "float32", "bfloat16", "float16", "int8" (in blocks
      of 128), or "auto", each base tensor's own. Masks are computed against s as it is stored.
    - ``base_storage``: "embed" the base, or "reference" it by the checksums of its tensors; it is
      then needed, and checked, when decoding.
    - ``coding``: of masks and ternary planes. "raw": they are used in place, at the speed of
      memory. "entropy": the file is smallest (a mask costs its entropy given |s|, in place of one
      bit per parameter) and tasks are unpacked as they are decoded. "auto": masks are raw, ternary
      planes entropy coded. What is decoded is the same.
    - ``metadata``: strings of your own, kept in the file.
    - ``threads``: default, one per CPU. The file is the same for any number.
    - ``progress``: called as ``progress(step, done, total)`` now and then; what it raises ends the
      encoding, and nothing is left of it.
    - ``resume``: if the encoding is interrupted, by an error, Ctrl-C or a kill, what is done stays
      beside the output, as `OUTPUT.partial` and `OUTPUT.partial.journal`; and where such are there,
      from the same checkpoints (which have to be files) and options, it goes on with them, after it
      has checked them: tensors, coded masks and, whole, the planes of ternary tasks. The file is
      the same as without interruption.

    Nothing appears at ``output`` before the file is complete, and an existing file is replaced
    only with ``overwrite``. Values are read once, but for those of ternary tasks (two or three
    times), tensors that equal the base's (read to find that out, and not stored) and those with
    NaN or infinity (read again, stored verbatim).

    Returns what :attr:`tallcodec.File.info` returns. Raises ArgumentError, CheckpointError,
    ReadError (also where a checkpoint's file was written to meanwhile), OutputExistsError or
    WriteError.
    """
    choose("merge", merge, numbers.MERGES)
    check_tasks(tasks)
    methods = _methods(method, tasks)
    mask_method = next((m for m in methods.values() if m != "ternary"), "ternary")
    choose("scale", scale, SCALES)
    choose("shared_dtype", shared_dtype, numbers.SHARED_DTYPES)
    choose("base_storage", base_storage, numbers.BASE_STORAGES)
    choose("coding", coding, CODINGS)
    if mask_method != "tall" and threshold != "auto" and threshold != "search":
        raise ArgumentError(f'threshold is for method "tall", not {mask_method!r}')
    grid_ = _check_search(threshold, target, score, grid, out, mask_method)
    adapted = mask_method == "tall" and isinstance(threshold, str) and threshold == "auto"
    masked = [task for task, m in methods.items() if m != "ternary"]
    sparse = [task for task in tasks if task not in masked]
    targets = _targets(target, bits, sparse, tasks)
    searched = sparse if targets else masked if grid_ else []
    thresholds = {} if searched == masked else thresholds_of(threshold, masked, tasks)
    shares_density = merge == "ties" or mask_method == "magnitude"
    thresholds |= {} if targets else bits_of(bits, density, sparse, tasks, shares_density)
    if density is not None and not (shares_density or sparse):
        raise ArgumentError('density is for merge "ties", method "magnitude" and "ternary"')
    density = DENSITY if density is None else density
    if not _is_number(density) or not 0 < density <= 1:
        raise ArgumentError(f"density must be more than 0 and at most 1, not {density!r}")
    metadata = _metadata(metadata)
    threads = check_threads(threads)
    forced()  # refuses what is not there
    check_progress(progress)

    refuse_input_as_output(output, (base, *tasks.values()))
    check_output(output, overwrite)
    with contextlib.ExitStack() as stack:
        if overwrite:
            stack.enter_context(replaced_file(output))
        base_checkpoint = stack.enter_context(open_checkpoint(base))
        checkpoints = [stack.enter_context(open_checkpoint(task)) for task in tasks.values()]
        ternary = [task in sparse for task in tasks]
        family = _Family(
            base_checkpoint,
            checkpoints,
            ternary,
            numbers.SHARED_DTYPES[shared_dtype],
            threads,
            progress,
        )
        inputs = [c.identity for c in (base_checkpoint, *checkpoints)] if resume else []
        recipe = {
            "merge": numbers.MERGES[merge],
            "method": numbers.METHODS["adapted" if adapted else mask_method],
            "density": float(density),
            "scale": numbers.SCALES[_scale(scale, adapted)],
            "least_bits": bits is None,
        }
        if grid_:
            part = family._replace(
                tasks=[c for c, task in zip(checkpoints, tasks) if task in searched],
                ternary=[bool(targets)] * len(searched),
            )
            scores = _search(part, base, searched, output, grid_, score, out or {}, recipe)
            for task, found in scores.items():
                thresholds[task] = (
                    _fewest(task, grid_, found, targets[task]) if targets else best(grid_, found)
                )
            metadata[SCORES] = json.dumps({"grid": grid_, "scores": scores})

        recipe["base_storage"] = numbers.BASE_STORAGES[base_storage]
        recipe["code_masks"], recipe["code_ternary"] = CODINGS[coding]
        thresholds_ = [(task, thresholds[task]) for task in tasks]
        if resume:
            maker = family.identity(inputs, thresholds_, recipe)
            partial = stack.enter_context(resumable_file(output, overwrite))
            _check_maker(label(output), partial.journal, maker)
        else:
            maker = ""
            partial = Partial(stack.enter_context(atomic_file(output, overwrite)))
        file = partial.file
        encoder = family.encode(partial, label(output), thresholds_, recipe, maker)
        for key, value in metadata.items():
            encoder.add_metadata(_core.SCOPE_FILE, key, value)
        scopes = (_core.SCOPE_BASE, base_checkpoint), *enumerate(checkpoints)
        add_side_data(encoder, scopes, {})
        encoder.finish()
        # What a reader would refuse is not to appear under the name.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return read_info(label(output), len(data), _core.File(label(output), data))


class _Family(NamedTuple):
    """Open checkpoints, and what holds for every file that is made of them."""

    base: Checkpoint
    tasks: list[Checkpoint]
    ternary: list[bool]  # whether a task is coded so, and not by masks
    shared_dtype: str | None
    threads: int
    progress: Progress | None

    @property
    def drop_cache(self) -> bool:
        """Whether what has been read is to leave the page cache, where it would not stay anyway."""
        return sum(c.nbytes for c in (self.base, *self.tasks)) > memory() // 2

    def identity(self, inputs: list, thresholds: list[tuple[str, float]], recipe: dict) -> str:
        """What stands for all that a file depends on: a line of JSON. ``inputs`` are the identities
        of the checkpoints."""
        what = {"version of tallcodec": __version__, "the base": inputs[0]}
        what |= {"the tasks or their order": [task for task, _ in thresholds]}
        what |= {f"task {task!r}": found for (task, _), found in zip(thresholds, inputs[1:])}
        options = self.ternary, self.shared_dtype, thresholds, recipe
        what |= {"the options": hashlib.sha256(repr(options).encode()).hexdigest()}
        return json.dumps(what) + "\n"

    def encode(
        self,
        partial: Partial,
        name: str,
        thresholds: list[tuple[str, float]],
        recipe: dict,
        maker: str = "",
    ) -> _core.Encoder:
        """All planes of a file; what is left is side data and the index. ``thresholds`` are the
        file's tasks: those of the family, once or several times over. ``maker`` is for a journal.
        """
        file, journal = partial
        trials = len(thresholds) // len(self.tasks)
        writer = f"tallcodec {__version__}"
        encoder = _core.Encoder(file.fileno(), name, writer, trials=trials, **recipe)
        if journal is not None:
            encoder.keep_journal(journal.fileno(), f"{name}.partial", maker)
        for (task, threshold), ternary in zip(thresholds, self.ternary * trials):
            encoder.add_task(task, threshold, ternary)
        names = _names(self.base, self.tasks)
        _plan(encoder, names, self, trials)
        encoder.run(self.threads, self.progress, self.drop_cache)
        append_verbatim(encoder, names, self.tasks)
        for checkpoint in (self.base, *self.tasks):
            checkpoint.check_unchanged()
        return encoder


def _check_maker(name: str, journal: BinaryIO, maker: str) -> None:
    """Refuse to go on with what was made of something else, and say of what."""
    lines = os.pread(journal.fileno(), 1 << 24, 0).split(b"\n", 2)
    if len(lines) < 3:
        return
    try:
        then, now = json.loads(lines[1]), json.loads(maker)
        differs = [key for key in then | now if then.get(key) != now.get(key)]
    except (ValueError, TypeError):
        differs = ["what its journal says"]
    if differs:
        raise ArgumentError(
            f"{name}.partial is of an encoding of other checkpoints, or with other options; what "
            f"differs: {', '.join(differs)}. To start anew, remove it"
        )


def _search(
    family: _Family,
    base: Any,
    tasks: list[str],
    output: str | os.PathLike,
    grid: list[float],
    score: Score,
    out: Mapping[str, Any],
    recipe: dict,
) -> dict[str, list[float]]:
    """The scores of every task with every value of the grid, from a file beside the output that is
    then removed."""
    folder, name = os.path.split(os.path.realpath(output))
    recipe = recipe | {"base_storage": numbers.BASE_STORAGES["reference"]}
    thresholds = [(trial_name(task, value), value) for value in grid for task in tasks]
    try:
        trial = tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".tmp")
    except OSError as error:
        raise WriteError(error.errno, f"{label(output)}: {error.strerror}") from error
    with trial:
        family.encode(Partial(trial), label(output), thresholds, recipe).finish()
        framework = "pt" if importlib.util.find_spec("torch") else "np"
        with open_file(trial.name, framework, base, threads=family.threads) as file:
            return score_trials(file, tasks, grid, score, out)


def _scale(scale: str, adapted: bool) -> str:
    if scale != "auto":
        return scale
    return "unit-gain" if adapted else "none"


def choose(name: str, value: str, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{name} must be one of {known}, not {value!r}")


def check_tasks(tasks: Mapping) -> None:
    if not isinstance(tasks, Mapping):
        raise ArgumentError(f"tasks must map names to checkpoints, not be a {type(tasks).__name__}")
    if not tasks:
        raise ArgumentError("no tasks: give at least one fine-tuned checkpoint")
    for name in tasks:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ArgumentError(f"a task's name must be printable text, not {name!r}")


def _methods(method: str | Mapping[str, str], tasks: Mapping) -> dict[str, str]:
    """The method of every task, by name in task order."""
    if isinstance(method, Mapping):
        check_names("method", method, tasks)
        methods = {task: method[task] for task in tasks}
    else:
        methods = dict.fromkeys(tasks, method)
    for value in methods.values():
        choose("method", value, METHODS)
    if {"tall", "magnitude"} <= set(methods.values()):
        raise ArgumentError('method: one file has masks of "tall" or of "magnitude", not of both')
    return methods


def bits_of(
    bits: float | Mapping[str, float] | None,
    density: float | None,
    ternary: list[str],
    all_tasks: Iterable[str],
    shares_density: bool,
) -> dict[str, float]:
    """Bits per parameter of the tasks that are ternary, by name; 0 where a density decides, which
    may be there for TIES or magnitude masks alone."""
    if bits is None:
        return dict.fromkeys(ternary, BITS if density is None else 0.0)
    if not ternary:
        raise ArgumentError('bits is for method "ternary"')
    if density is not None and not shares_density:
        raise ArgumentError("give bits or density, not both")
    if isinstance(bits, Mapping):
        check_names("bits", bits, ternary, all_tasks)
    return {
        task: _check_bits(bits[task] if isinstance(bits, Mapping) else bits) for task in ternary
    }


def _targets(
    target: float | Mapping[str, float] | None,
    bits: Any,
    ternary: list[str],
    all_tasks: Iterable[str],
) -> dict[str, float]:
    """The score that each ternary task has to reach, or none where bits are given."""
    if target is None:
        return {}
    if not ternary:
        raise ArgumentError('target is for method "ternary"')
    if bits is not None:
        raise ArgumentError("target finds the bits: give none")
    if isinstance(target, Mapping):
        check_names("target", target, ternary, all_tasks)
    found = {task: target[task] if isinstance(target, Mapping) else target for task in ternary}
    for value in found.values():
        if not _is_number(value) or not math.isfinite(value):
            raise ArgumentError(f"target must be a finite number, not {value!r}")
    return found


def _fewest(task: str, grid: list[float], scores: list[float], target: float) -> float:
    """The fewest bits whose score is the target or more."""
    for bits, score in zip(grid, scores):
        if score >= target:
            return bits
    raise ArgumentError(
        f"task {task!r}: no bits of the grid reach the target {target:g}: the best score is "
        f"{max(scores):g}, at {best(grid, scores):g} bits"
    )


def check_has_base(task: Checkpoint, base: Checkpoint, what: str) -> None:
    """Refuse a checkpoint of another model, as far as that can be told by names."""
    if not base.tensors.keys() & task.tensors.keys():
        raise CheckpointError(f"{task.label}: none of its tensors is in {what}: is that its base?")


def check_names(
    argument: str, given: Mapping, tasks: Iterable[str], all_tasks: Iterable[str] | None = None
) -> None:
    """Refuse a mapping that does not name the tasks it is for, or names what is no task."""
    missing = [task for task in tasks if task not in given]
    unknown = sorted(set(given) - set(tasks if all_tasks is None else all_tasks))
    if missing or unknown:
        raise ArgumentError(
            f"{argument} must name each task once; missing: {missing}, unknown: {unknown}"
        )


def thresholds_of(
    threshold: float | Mapping[str, float] | str, tasks: list[str], all_tasks: Iterable[str]
) -> dict[str, float]:
    """λ of every task that has masks, by name; anything where they are adapted."""
    if isinstance(threshold, str):
        if threshold != "auto":
            raise ArgumentError(
                'threshold must be a number of at least 0, one per task, "auto" or "search", '
                f"not {threshold!r}"
            )
        return dict.fromkeys(tasks, 0.0)
    if isinstance(threshold, Mapping):
        check_names("threshold", threshold, tasks, all_tasks)
        return {name: check_threshold(threshold[name]) for name in tasks}
    return dict.fromkeys(tasks, check_threshold(threshold))


def _check_search(
    threshold: Any, target: Any, score: Any, grid: Any, out: Any, method: str
) -> list[float]:
    """The grid of a search for λ or bits, or none where there is to be no search."""
    by_score = isinstance(threshold, str) and threshold == "search"
    if not by_score and target is None:
        if score is not None or out is not None:
            raise ArgumentError('score and out are for threshold="search" and for target')
        return []
    if by_score and target is not None:
        raise ArgumentError('threshold="search" and target search for λ and for bits: give one')
    what = 'threshold="search"' if by_score else "target"
    if by_score and method != "tall":
        raise ArgumentError(f'threshold="search" is for method "tall", not {method!r}')
    if not callable(score):
        raise ArgumentError(f"{what} needs score, a function, not {score!r}")
    if out is not None and not isinstance(out, Mapping):
        raise ArgumentError(f"out must map names to tensors, not be a {type(out).__name__}")
    if by_score:
        return check_grid(GRID if grid is None else grid)
    values = check_grid(BITS_GRID if grid is None else grid)
    return [_check_bits(value) for value in values]


def _check_bits(value: Any) -> float:
    if not _is_number(value) or not 1e-6 <= value <= 32:
        raise ArgumentError(f"bits must be a number from 1e-6 to 32, not {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ArgumentError(
            f"metadata must map strings to strings, not be a {type(metadata).__name__}"
        )
    metadata = dict(metadata or {})
    for key in (SCORES, MERGED):
        if key in metadata:
            raise ArgumentError(f"metadata {key!r} is the library's own")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ArgumentError(f"metadata must map strings to strings, not {key!r} to {value!r}")
        try:
            (key + value).encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"metadata {key!r} has no UTF-8: {error}") from error
    return metadata


def _plan(
    encoder: _core.Encoder,
    names: list[str],
    family: _Family,
    trials: int,
) -> None:
    """Tell the encoder every tensor, and what each task's becomes."""
    base, tasks = family.base, family.tasks
    for checkpoint in (base, *tasks):
        check_names_and_shapes(checkpoint)
    for task in tasks:
        check_has_base(task, base, f"the base {base.label}")
    aliases = _aliases(base, tasks)
    number = {name: i for i, name in enumerate(names)}
    for name in names:
        ours = base.tensors.get(name)
        alias = aliases.get(name)
        if ours is None:
            tensor = encoder.add_tensor(name, False, 0, (), 0, None, _core.NONE)
        else:
            shared = family.shared_dtype or ours.dtype
            tensor = encoder.add_tensor(
                name,
                True,
                numbers.DTYPES[ours.dtype],
                ours.shape,
                numbers.DTYPES[shared],
                source_of(ours),
                _core.NONE if alias is None else number[alias],
            )
        if alias is not None:
            continue
        for i, task in enumerate(tasks):
            theirs = task.tensors.get(name)
            if theirs is not None:
                coding, reason = classify(ours, theirs)
                if coding == numbers.MASK and family.ternary[i]:
                    coding = numbers.TERNARY
                for trial in range(trials):
                    encoder.set_entry(
                        i + trial * len(tasks),
                        tensor,
                        coding,
                        numbers.DTYPES[theirs.dtype],
                        theirs.shape,
                        numbers.REASONS[reason],
                        source_of(theirs),
                    )


def check_names_and_shapes(checkpoint: Checkpoint) -> None:
    """Refuse what docs/format.md has no room for."""
    for name, tensor in checkpoint.tensors.items():
        where = f"{checkpoint.label}: tensor {name!r}"
        if any(c < " " or c == "\x7f" for c in name):
            raise CheckpointError(f"{where}: the name has control characters: rename it")
        if len(tensor.shape) > 32:
            raise CheckpointError(f"{where}: {len(tensor.shape)} dimensions, at most 32 are stored")
        if math.prod(n or 1 for n in tensor.shape) >= 1 << 59:
            raise CheckpointError(f"{where}: the shape {tensor.shape} is absurdly large")


def _names(base: Checkpoint, tasks: list[Checkpoint]) -> list[str]:
    """Every tensor's name, in the file's order, which is that of their UTF-8 bytes."""
    return sorted(base.tensors.keys() | {name for task in tasks for name in task.tensors})


def classify(base: Tensor | None, task: Tensor) -> tuple[int, str]:
    """The coding of a task's tensor, and why where it is verbatim."""
    if base is None:
        return numbers.VERBATIM, "not in the base"
    if base.shape != task.shape:
        return numbers.VERBATIM, "another shape than in the base"
    if base.dtype == task.dtype and same_bytes(base, task):
        return numbers.BASE, ""
    arithmetic = base.dtype in numbers.ARITHMETIC and task.dtype in numbers.ARITHMETIC
    if not arithmetic or not base.nbytes:
        return numbers.VERBATIM, "not an arithmetic type"
    return numbers.MASK, ""


def are_tied(checkpoints: Iterable[Checkpoint], a: str, b: str) -> bool:
    """Whether each checkpoint has the same, or nothing, under two names."""
    for checkpoint in checkpoints:
        x, y = checkpoint.tensors.get(a), checkpoint.tensors.get(b)
        if x is None or y is None:
            if x is not y:
                return False
        elif (x.dtype, x.shape) != (y.dtype, y.shape) or not same_bytes(x, y):
            return False
    return True


def _aliases(base: Checkpoint, tasks: list[Checkpoint]) -> dict[str, str]:
    """Tied tensors: those equal to an earlier one in the base and in every task, and which."""
    checkpoints = [base, *tasks]
    aliases: dict[str, str] = {}
    candidates: dict[tuple, list[str]] = {}  # by what equal tensors surely share
    for name, tensor in base.tensors.items():
        if not tensor.nbytes:
            continue
        beginning = _core.read_source(source_of(tensor), min(tensor.nbytes, 4096))
        earlier = candidates.setdefault((tensor.dtype, tensor.shape, beginning), [])
        original = next((other for other in earlier if are_tied(checkpoints, other, name)), None)
        if original is None:
            earlier.append(name)
        else:
            aliases[name] = original
    return aliases


def append_verbatim(
    encoder: _core.Encoder, names: list[str], tasks: list[Checkpoint]
) -> None:
    for task, tensor in encoder.verbatim():
        found = tasks[task % len(tasks)].tensors[names[tensor]]
        if found.nbytes > _COMPRESSED:
            encoder.copy_verbatim(task, tensor)
            continue
        raw = found.read().data
        zstd, stored = _compress(raw)
        encoder.append_verbatim(task, tensor, zstd, stored, len(raw))


def add_side_data(
    encoder: _core.Encoder, scopes: Iterable[tuple[int, Checkpoint]], planes: dict[bytes, int]
) -> None:
    """Metadata and small files of the base, or of tasks. Files of equal content share a plane:
    ``planes`` are those there are."""
    for scope, checkpoint in scopes:
        for key, value in checkpoint.metadata.items():
            encoder.add_metadata(scope, key, value)
        for name, content in sorted(checkpoint.files.items()):
            if content not in planes:
                zstd, stored = _compress(content)
                planes[content] = encoder.append_file_plane(zstd, bytes(stored), len(content))
            encoder.add_file(scope, name, planes[content])


def _compress(raw) -> tuple[bool, Any]:
    """Whether a zstd frame saves at least a sixteenth, and the frame or the bytes themselves."""
    if not len(raw):
        return False, raw
    frame = zstandard.ZstdCompressor(level=3).compress(raw)
    return (True, frame) if 16 * len(frame) <= 15 * len(raw) else (False, raw)


def source_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.fd, tensor.offset


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return _core.same_bytes(source_of(a), source_of(b), a.nbytes)
