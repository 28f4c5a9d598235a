"""The codec's operations on tensors that are on a GPU, one tensor of a base and of its tasks at a
time.

    made = gpu.encode(base, [cars, dtd], [0.4, 0.4])
    again = gpu.decode(base, made.shared, made.masks[0])  # cars again, but for what is lost

Tensors are torch's, contiguous, all on one device; packed bits are uint8, element i being bit i mod
8 of byte i div 8. Work is queued on the device's current stream, nothing waits for it. Back-ends
(see :func:`tallcodec.backends`) give the same bits as each other and as the CPU; which one computes
is for TALLCODEC_BACKEND alone to say. Files are decoded to a GPU by :meth:`tallcodec.File.decode`;
products with many tasks' weights are in :mod:`tallcodec.matmul_triton`.
"""

import math
import struct
from collections.abc import Sequence

import torch

from .backends import Backend, Block, Encoded, choose
from .errors import ArgumentError, TensorMismatchError

__all__ = [
    "Encoded", "agreement", "consensus", "decode", "encode", "overlap", "popcount", "sums",
]  # fmt: skip

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_RULES = ("published", "magnitude", "adapted")
_SCALE_BLOCK = 128  # elements per scale of an int8 shared vector


def encode(
    base: torch.Tensor, tasks: Sequence[torch.Tensor], thresholds: Sequence[float], *,
    shared_dtype: torch.dtype | None = None, rule: str = "published",
    merged: torch.Tensor | None = None,
) -> Encoded:  # fmt: skip
    """The shared vector and all masks of one tensor, in one pass over it.

    ``tasks``: the fine-tuned tensors, of the base's shape, in float32, float16 or bfloat16.
    ``thresholds``: one per task; of rule "published" λ in |θ₀ − θ_t| > λ·|(θ₀ + s) − θ_t| (arXiv
    2405.07813), of "magnitude" what |τ| must exceed, of "adapted" the factor f in
    |τ| > |f·s − τ|; finite in float32. ``shared_dtype``: float32, float16, bfloat16 or int8, else
    the base's. ``merged``: a multi-task vector, float32, in place of the sum of the task vectors.

    Raises TensorMismatchError for tensors that do not go together, ArgumentError for another rule,
    thresholds that do not fit it, or where nothing here computes on their device.
    """
    backend, base = _start("base", base)
    shared_dtype = shared_dtype or base.dtype
    if rule not in _RULES:
        raise ArgumentError(f"rule must be one of {', '.join(_RULES)}, not {rule!r}")
    if shared_dtype not in (*_FLOATS, torch.int8):
        raise ArgumentError(f"shared_dtype must be a float or int8, not {shared_dtype}")
    if len(thresholds) != len(tasks):
        raise ArgumentError(f"{len(thresholds)} thresholds for {len(tasks)} tasks")
    thresholds = [_number(f"thresholds[{k}]", value) for k, value in enumerate(thresholds)]
    if rule == "published" and any(threshold < 0 for threshold in thresholds):
        raise ArgumentError(f"λ is 0 or more, not {min(thresholds)}")  # back-ends would differ
    tasks = [_same(f"tasks[{k}]", task, base, *_FLOATS) for k, task in enumerate(tasks)]
    if merged is not None:
        merged = _same("merged", merged, base, torch.float32)
    return backend.encode(base, tasks, thresholds, shared_dtype, rule, merged)


def decode(
    base: torch.Tensor, shared: torch.Tensor | None, mask: torch.Tensor, *,
    signs: torch.Tensor | None = None, scales: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """mask ? base + scale · s : base, rounded to the dtype of ``out`` (the base's, where it is not
    given); a tensor of the base's shape. ``out`` may be the memory of a running model, or ``base``.

    ``mask``: (⌈n / 8⌉,) uint8. ``shared``: n elements in float32, float16, bfloat16, or int8 with
    ``scales``, (⌈n / 128⌉,) float32; None for a ternary plane, whose s is ±1, −1 where a bit of
    ``signs``, as large as the mask, is set. ``scale``: g, a number that is finite in float32,
    or float32, one for each index of dimension 0.

    Raises TensorMismatchError for tensors that do not go together, before anything is written, and
    ArgumentError where nothing here computes on their device.
    """
    backend, _ = _start("base", base)
    if out is None:
        out = torch.empty_like(base)
    _same("out", out, base, *_FLOATS)
    if out.shape != base.shape:
        raise TensorMismatchError(f"out is {tuple(out.shape)}, base {tuple(base.shape)}")
    block = _block(base, shared, mask, signs, scales)._replace(out=out.view(-1))
    if isinstance(scale, torch.Tensor):
        rows = base.shape[0] if base.ndim > 1 else 1
        _check("scale", scale, base.device, rows, torch.float32)
        length = max(1, base.numel() // max(1, rows))
        block = block._replace(row_scales=scale.view(-1), row_length=length)
    else:
        block = block._replace(scale=_number("scale", scale))
    backend.decode([block])
    return out


def sums(
    base: torch.Tensor, shared: torch.Tensor | None, mask: torch.Tensor, task: torch.Tensor, *,
    signs: torch.Tensor | None = None, scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Σ τ², ⟨τ, m∘s⟩ and Σ (m∘s)² of a task as (3,) float64: gain at scale 1 is the second by the
    first, and the first by the second the scale of unit gain. Arguments as :func:`decode`'s."""
    backend, _ = _start("base", base)
    block = _block(base, shared, mask, signs, scales)
    return backend.sums(block, _same("task", task, base, *_FLOATS)).sum((0, 2))


def popcount(mask: torch.Tensor, n: int) -> torch.Tensor:
    """How many of a mask's n bits are set, (1,) int64. Bits behind them do not count."""
    return agreement([mask], n)[1:]


def agreement(masks: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """On how many of n elements exactly 0, 1, … all masks are set, (masks + 1,) int64."""
    backend, masks = _masks(masks, n)
    return backend.agreement(masks, n)


def overlap(masks: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """On how many of n elements both of two masks are set, (masks, masks) int64."""
    backend, masks = _masks(masks, n)
    return backend.overlap(masks, n)


def consensus(masks: Sequence[torch.Tensor], n: int, least: int) -> torch.Tensor:
    """The mask of the elements on which ``least`` masks or more are set, (⌈n / 8⌉,) uint8."""
    if least < 1:
        raise ArgumentError(f"least must be 1 or more, not {least}")
    backend, masks = _masks(masks, n)
    return backend.consensus(masks, n, least)


def _block(
    base: torch.Tensor, shared: torch.Tensor | None, mask: torch.Tensor,
    signs: torch.Tensor | None, scales: torch.Tensor | None,
) -> Block:  # fmt: skip
    n, device = base.numel(), base.device
    _check("mask", mask, device, -(-n // 8), torch.uint8)
    if (shared is None) == (signs is None):
        raise ArgumentError("pass either a shared vector or the signs of a ternary plane")
    if shared is None:
        _check("signs", signs, device, -(-n // 8), torch.uint8)
    else:
        _check("shared", shared, device, n, *_FLOATS, torch.int8)
    if (shared is not None and shared.dtype == torch.int8) != (scales is not None):
        raise ArgumentError("scales belong to an int8 shared vector, and to no other")
    if scales is not None:
        _check("scales", scales, device, -(-n // _SCALE_BLOCK), torch.float32)
    stored = signs if shared is None else shared
    return Block(n, base.view(-1), None, mask.view(-1), stored.view(-1), scales)


def _start(name: str, tensor: torch.Tensor) -> tuple[Backend, torch.Tensor]:
    """What computes on a tensor's device, and the tensor as one row."""
    backend = _backend(name, tensor)
    _check(name, tensor, tensor.device, tensor.numel(), *_FLOATS)
    return backend, tensor.view(-1)


def _same(
    name: str, tensor: torch.Tensor, base: torch.Tensor, *dtypes: torch.dtype
) -> torch.Tensor:
    _check(name, tensor, base.device, base.numel(), *dtypes)
    return tensor.view(-1)


def _masks(masks: Sequence[torch.Tensor], n: int) -> tuple[Backend, list[torch.Tensor]]:
    """What computes on masks' device, and each as one row."""
    if not masks:
        raise ArgumentError("there are no masks")
    backend = _backend("masks[0]", masks[0])
    for k, mask in enumerate(masks):
        _check(f"masks[{k}]", mask, masks[0].device, -(-n // 8), torch.uint8)
    return backend, [mask.view(-1) for mask in masks]


def _backend(name: str, tensor: torch.Tensor) -> Backend:
    _require_tensor(name, tensor)
    backend = choose(tensor.device)
    if backend is None:
        raise ArgumentError(f"{name} is on {tensor.device}: tallcodec.gpu computes on GPUs")
    return backend


def _number(name: str, value: float) -> float:
    try:
        if math.isfinite(value):
            struct.pack("<f", value)  # raises beyond it
            return float(value)
    except (OverflowError, TypeError, ValueError):
        pass
    raise ArgumentError(f"{name} must be a number that is finite in float32, not {value!r}")


def _require_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TensorMismatchError(f"{name} is a {type(tensor).__name__}, not a torch tensor")


def _check(
    name: str, tensor: torch.Tensor, device: torch.device, n: int, *dtypes: torch.dtype
) -> None:
    _require_tensor(name, tensor)
    if tensor.device != device:
        raise TensorMismatchError(f"{name} is on {tensor.device}, not on {device}")
    if tensor.dtype not in dtypes:
        known = " or ".join(str(d) for d in dtypes)
        raise TensorMismatchError(f"{name} is {tensor.dtype}; it must be {known}")
    if tensor.numel() != n:
        raise TensorMismatchError(f"{name} has {tensor.numel()} elements; it must have {n}")
    if not tensor.is_contiguous():
        raise TensorMismatchError(f"{name} is not contiguous")
