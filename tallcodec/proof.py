"""Whether tasks are what was encoded: what is decoded of them, against their checkpoints."""

import math
from typing import Any

import numpy as np

from . import numbers
from .checkpoint import Checkpoint
from .errors import TaskMismatchError
from .tensors import DTYPES

_CHUNK = 1 << 22  # elements
_SLACK = 1e-9  # of float64 sums in another order


def prove(file: Any, task: str, checkpoint: Checkpoint) -> None:
    """Check a task of a file opened with framework "np" against the checkpoint it was encoded from:
    that the names are the same; that what is stored as it is, is the checkpoint's, bit for bit; and
    that every other tensor decodes to what its statistics say, gain and error, but for rounding.

    Raises TaskMismatchError, which names the tensor, and what decoding does.
    """
    names = file._names(file._number(task))
    for name in sorted(set(names) ^ checkpoint.tensors.keys()):
        where = "the file" if name in names else checkpoint.label
        _fail(file, task, name, f"only {where} has it")
    entries = file._file.entries(file._number(task))
    for name in names:
        flaw = _flaw(file, task, name, checkpoint, entries[file._file.original(file._tensor(name))])
        if flaw:
            _fail(file, task, name, flaw)


def _fail(file: Any, task: str, name: str, flaw: str) -> None:
    raise TaskMismatchError(f"{file._label}, task {task!r}, tensor {name!r}: {flaw}")


def _flaw(file: Any, task: str, name: str, checkpoint: Checkpoint, entry: dict) -> str:
    decoded, given = file.decode(task, [name])[name], checkpoint.tensors[name]
    found = given.dtype, given.shape
    if (DTYPES[given.dtype].numpy, given.shape) != (decoded.dtype, decoded.shape):
        return f"it is {decoded.dtype} {decoded.shape}, {checkpoint.label} has {found}"
    task_values = given.read().reshape(-1).view(decoded.dtype)
    if entry["coding"] not in (numbers.MASK, numbers.TERNARY):
        same = decoded.tobytes() == task_values.tobytes()
        return "" if same else f"it is stored as it was, and {checkpoint.label} has other values"
    base = file.decode(None, [name])[name].reshape(-1)
    return _difference(entry, base, decoded.reshape(-1), task_values, checkpoint.label)


def _difference(entry: dict, base: Any, decoded: Any, task: Any, label: str) -> str:
    """What the statistics of an entry say otherwise than these elements do.

    Decoding rounds base + g·s, once per operation and once to the task's dtype; no further than so,
    by the triangle inequality, may the lengths of the error and of what is decoded be apart.
    """
    tau_sq = dot = error_sq = size_sq = approx_sq = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, base.size, _CHUNK):
            here = slice(at, at + _CHUNK)
            b, x, t = (a[here].astype(np.float32) for a in (base, decoded, task))
            tau, approx = (t - b).astype(np.float64), x.astype(np.float64) - b
            tau_sq += tau @ tau
            dot += tau @ approx
            approx_sq += approx @ approx
            error_sq += (approx - tau) @ (approx - tau)
            size_sq += x.astype(np.float64) @ x
    said = [entry[key] for key in ("tau_sq", "dot", "approx_sq")]
    said_tau_sq, said_dot, said_approx_sq = said
    if not math.isclose(tau_sq, said_tau_sq, rel_tol=_SLACK):
        return (
            f"it was not encoded from {label}: by the file, Σ τ² is {said_tau_sq:.9g}, by that one "
            f"{tau_sq:.9g}"
        )
    if not math.isfinite(size_sq):
        return f"it decodes to values that {decoded.dtype} has no number for"
    if any(map(math.isnan, said)) or said_approx_sq < 0:
        return f"the file's statistics of it mean nothing: Σ τ², Σ τ·τ̂, Σ τ̂² are {said}"
    rounding = float(np.finfo(np.float32).eps) * (math.sqrt(size_sq) + math.sqrt(approx_sq))
    rounding += _half_ulp(decoded.dtype) * math.sqrt(size_sq)
    rounding += math.sqrt(base.size) * float(_info(decoded.dtype).smallest_subnormal)
    if not abs(math.sqrt(approx_sq) - math.sqrt(said_approx_sq)) <= rounding:
        return _wrong("‖τ̂‖", math.sqrt(approx_sq), math.sqrt(said_approx_sq))
    if math.isinf(tau_sq):  # τ has no float32: there is no more to tell of it
        return ""
    said_sq = max(0.0, said_approx_sq - 2 * said_dot + said_tau_sq)
    rounding += 1e-6 * math.sqrt(max(tau_sq, said_sq))  # what cancels out in said_sq
    if not abs(math.sqrt(error_sq) - math.sqrt(said_sq)) <= rounding:
        return _wrong("‖τ̂ − τ‖", math.sqrt(error_sq), math.sqrt(said_sq))
    if not abs(dot - said_dot) <= rounding * math.sqrt(tau_sq):
        return _wrong("Σ τ·τ̂", dot, said_dot)
    return ""


def _wrong(what: str, found: float, said: float) -> str:
    return f"it decodes with {what} of {found:.6g}, and the file says {said:.6g}"


def _info(dtype: Any) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def _half_ulp(dtype: Any) -> float:
    """Of a value, as a share of it."""
    return 0.0 if dtype == np.float32 else float(_info(dtype).eps) / 2
