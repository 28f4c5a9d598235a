"""Checkpoints to a `.tall` file: what every tensor becomes is decided here, its bits in C++."""

import contextlib
import math
import mmap
import os
from collections.abc import Mapping
from typing import Any

import zstandard

from . import _core, numbers
from .checkpoint import Checkpoint, Tensor, open_checkpoint, refuse_input_as_output
from .checkpoint_write import atomic_file
from .errors import ArgumentError, CheckpointError
from .file import label
from .info import FileInfo, read_info
from .threads import check_threads
from .version import __version__


def encode(
    base: str | os.PathLike | Mapping[str, Any],
    tasks: Mapping[str, str | os.PathLike | Mapping[str, Any]],
    output: str | os.PathLike,
    *,
    merge: str = "task-arithmetic",
    threshold: float | Mapping[str, float] = 0.4,
    method: str = "tall",
    scale: str = "none",
    shared_dtype: str = "auto",
    base_storage: str = "embed",
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> FileInfo:
    """Encode fine-tuned checkpoints of one base into one `.tall` file.

    ``base`` and the values of ``tasks`` are checkpoints: a `.safetensors` file, a Hugging Face
    folder, a torch file, or a mapping of names to torch tensors or NumPy arrays.

    - ``merge``: how the multi-task vector is made: "task-arithmetic", the sum of the task vectors.
    - ``threshold``: λ of the TALL masks, one number or one per task: a parameter follows the
      multi-task vector s where |θ₀ − θ_t| > λ·|(θ₀ + s) − θ_t| (arXiv 2405.07813).
    - ``method``: "tall", one mask bit per parameter and task.
    - ``scale``: "none", the published rule; "unit-gain" multiplies each tensor's masked vector by
      g = Σ τ² / Σ τ·(m∘s), so that ⟨τ̂,τ⟩ = ⟨τ,τ⟩; "unit-gain-row" has one g per row.
    - ``shared_dtype``: how s is stored: "float32", "bfloat16", "float16", "int8" (in blocks
      of 128), or "auto", each base tensor's own. Masks are computed against s as it is stored.
    - ``base_storage``: "embed" the base, or "reference" it by the checksums of its tensors; it is
      then needed, and checked, when decoding.
    - ``metadata``: strings of your own, kept in the file.
    - ``threads``: default, one per CPU. The file is the same for any number.

    Nothing appears at ``output`` before the file is complete, and an existing file is replaced
    only with ``overwrite``. Values are read once, but for tensors that equal the base's (read to
    find that out, and not stored) and those with NaN or infinity (read again, stored verbatim).

    Returns what :attr:`tallcodec.File.info` returns. Raises ArgumentError, CheckpointError,
    ReadError, OutputExistsError or WriteError.
    """
    _choose("merge", merge, numbers.MERGES)
    _choose("method", method, numbers.METHODS)
    _choose("scale", scale, numbers.SCALES)
    _choose("shared_dtype", shared_dtype, numbers.SHARED_DTYPES)
    _choose("base_storage", base_storage, numbers.BASE_STORAGES)
    thresholds = _thresholds(threshold, tasks)
    metadata = _metadata(metadata)
    threads = check_threads(threads)

    refuse_input_as_output(output, (base, *tasks.values()))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_file(output, overwrite))
        base_checkpoint = stack.enter_context(open_checkpoint(base))
        checkpoints = [stack.enter_context(open_checkpoint(task)) for task in tasks.values()]
        encoder = _core.Encoder(
            file.fileno(),
            label(output),
            f"tallcodec {__version__}",
            numbers.SCALES[scale],
            numbers.BASE_STORAGES[base_storage],
        )
        for name, value in thresholds.items():
            encoder.add_task(name, value)
        names = _names(base_checkpoint, checkpoints)
        _plan(encoder, names, base_checkpoint, checkpoints, numbers.SHARED_DTYPES[shared_dtype])
        encoder.run(threads)
        _append_verbatim(encoder, names, checkpoints)
        _add_side_data(encoder, base_checkpoint, checkpoints, metadata)
        encoder.finish()
        # What a reader would refuse is not to appear under the name.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return read_info(label(output), len(data), _core.File(label(output), data))


def _choose(name: str, value: str, choices: Mapping[str, Any]) -> None:
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{name} must be one of {known}, not {value!r}")


def _thresholds(threshold: float | Mapping[str, float], tasks: Mapping) -> dict[str, float]:
    """λ of every task, by name in task order."""
    if not isinstance(tasks, Mapping):
        raise ArgumentError(f"tasks must map names to checkpoints, not be a {type(tasks).__name__}")
    if not tasks:
        raise ArgumentError("no tasks: give at least one fine-tuned checkpoint")
    for name in tasks:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ArgumentError(f"a task's name must be printable text, not {name!r}")
    if isinstance(threshold, Mapping):
        if set(threshold) != set(tasks):
            odd = sorted(set(threshold) ^ set(tasks))
            raise ArgumentError(f"threshold must name each task once; these do not match: {odd}")
        thresholds = {name: threshold[name] for name in tasks}
    else:
        thresholds = dict.fromkeys(tasks, threshold)
    return {name: _number(value) for name, value in thresholds.items()}


def _number(threshold: Any) -> float:
    try:
        value = math.nan if isinstance(threshold, str) else float(threshold)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < 2.0**127:  # a float32 in the file
        raise ArgumentError(f"threshold must be a number of at least 0, not {threshold!r}")
    return value


def _metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ArgumentError(
            f"metadata must map strings to strings, not be a {type(metadata).__name__}"
        )
    metadata = dict(metadata or {})
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
    base: Checkpoint,
    tasks: list[Checkpoint],
    shared_dtype: str | None,
) -> None:
    """Tell the encoder every tensor, and what each task's becomes."""
    for checkpoint in (base, *tasks):
        _check_names_and_shapes(checkpoint)
    for task in tasks:
        if not base.tensors.keys() & task.tensors.keys():
            raise CheckpointError(
                f"{task.label}: none of its tensors is in the base {base.label}: is that its base?"
            )
    aliases = _aliases(base, tasks)
    number = {name: i for i, name in enumerate(names)}
    for name in names:
        ours = base.tensors.get(name)
        alias = aliases.get(name)
        if ours is None:
            tensor = encoder.add_tensor(name, False, 0, (), 0, None, _core.NONE)
        else:
            shared = shared_dtype or ours.dtype
            tensor = encoder.add_tensor(
                name,
                True,
                numbers.DTYPES[ours.dtype],
                ours.shape,
                numbers.DTYPES[shared],
                _source(ours),
                _core.NONE if alias is None else number[alias],
            )
        if alias is not None:
            continue
        for i, task in enumerate(tasks):
            theirs = task.tensors.get(name)
            if theirs is not None:
                coding, reason = _classify(ours, theirs)
                encoder.set_entry(
                    i,
                    tensor,
                    coding,
                    numbers.DTYPES[theirs.dtype],
                    theirs.shape,
                    numbers.REASONS[reason],
                    _source(theirs),
                )


def _check_names_and_shapes(checkpoint: Checkpoint) -> None:
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


def _classify(base: Tensor | None, task: Tensor) -> tuple[int, str]:
    """The coding of a task's tensor, and why where it is verbatim."""
    if base is None:
        return numbers.VERBATIM, "not in the base"
    if base.shape != task.shape:
        return numbers.VERBATIM, "another shape than in the base"
    if base.dtype == task.dtype and _same_bytes(base, task):
        return numbers.BASE, ""
    arithmetic = base.dtype in numbers.ARITHMETIC and task.dtype in numbers.ARITHMETIC
    if not arithmetic or not base.nbytes:
        return numbers.VERBATIM, "not an arithmetic type"
    return numbers.MASK, ""


def _aliases(base: Checkpoint, tasks: list[Checkpoint]) -> dict[str, str]:
    """Tied tensors: those equal to an earlier one in the base and in every task, and which."""

    def tied(a: str, b: str) -> bool:
        for checkpoint in (base, *tasks):
            x, y = checkpoint.tensors.get(a), checkpoint.tensors.get(b)
            if x is None or y is None:
                if x is not y:
                    return False
            elif (x.dtype, x.shape) != (y.dtype, y.shape) or not _same_bytes(x, y):
                return False
        return True

    aliases: dict[str, str] = {}
    candidates: dict[tuple, list[str]] = {}  # by what equal tensors surely share
    for name, tensor in base.tensors.items():
        if not tensor.nbytes:
            continue
        beginning = _core.read_source(_source(tensor), min(tensor.nbytes, 4096))
        earlier = candidates.setdefault((tensor.dtype, tensor.shape, beginning), [])
        original = next((other for other in earlier if tied(other, name)), None)
        if original is None:
            earlier.append(name)
        else:
            aliases[name] = original
    return aliases


def _append_verbatim(
    encoder: _core.Encoder, names: list[str], tasks: list[Checkpoint]
) -> None:
    for task, tensor in encoder.verbatim():
        raw = tasks[task].tensors[names[tensor]].read().data
        zstd, stored = _compress(raw)
        encoder.append_verbatim(task, tensor, zstd, stored, len(raw))


def _add_side_data(
    encoder: _core.Encoder, base: Checkpoint, tasks: list[Checkpoint], metadata: dict[str, str]
) -> None:
    for key, value in metadata.items():
        encoder.add_metadata(_core.SCOPE_FILE, key, value)
    planes: dict[bytes, int] = {}  # files of equal content share one
    for scope, checkpoint in ((_core.SCOPE_BASE, base), *enumerate(tasks)):
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


def _source(tensor: Tensor) -> tuple[int, int]:
    return tensor.fd, tensor.offset


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return _core.same_bytes(_source(a), _source(b), a.nbytes)
