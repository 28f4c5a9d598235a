"""The rules of other methods in plain PyTorch, written from their papers' formulas.

Rules over whole models take task vectors τ = θ_t − θ₀ as float32 tensors (P,), all tensors of a
checkpoint end to end, and sum in the order of the tasks. Rules per tensor take one tensor of τ.
What a rule's result would cost in a file is counted beside it, in bits.
"""

import math
from typing import NamedTuple

import torch


class Merged(NamedTuple):
    """EMR-Merging's parts: τ̂_t = rescalers[t] · masks[t] ∘ unified."""

    unified: torch.Tensor  # (P,) float32
    masks: list[torch.Tensor]  # each (P,) bool
    rescalers: list[float]


def largest(tau: torch.Tensor, share: float) -> torch.Tensor:
    """Mask of the entries with |τ| ≥ the k-th smallest, k = d − ⌊share·d⌋, as TIES counts.

    So ⌊share·d⌋ + 1 of them without ties, all of them where k < 1, and entries that tie are kept.
    """
    magnitude = tau.abs().flatten()
    k = magnitude.numel() - int(share * magnitude.numel())
    if k < 1:
        return torch.ones_like(tau, dtype=torch.bool)
    return tau.abs() >= magnitude.kthvalue(k).values


def task_arithmetic(taus: list[torch.Tensor]) -> torch.Tensor:
    """Σ_t τ_t (arXiv 2212.04089), to be scaled by α."""
    total = torch.zeros_like(taus[0])
    for tau in taus:
        total += tau
    return total


def ties(taus: list[torch.Tensor], share: float = 0.2, mean: bool = True) -> torch.Tensor:
    """TIES-Merging (arXiv 2306.01708): trim, elect a sign, then the disjoint mean, or sum.

    The sign is that of the sum of the trimmed vectors; where that is 0, that of the sum of all
    signs. The entries that have it are summed, and divided by their number.
    """
    trimmed = [torch.where(largest(tau, share), tau, 0) for tau in taus]
    sign = task_arithmetic(trimmed).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for tau in trimmed:
        agrees = torch.where(sign > 0, tau > 0, tau < 0)
        total += torch.where(agrees, tau, 0)
        count += agrees
    return total / count.clamp(min=1) if mean else total


def pruned(tau: torch.Tensor, share: float) -> torch.Tensor:
    """Magnitude pruning: the largest entries of τ_t itself, the others 0."""
    return torch.where(largest(tau, share), tau, 0)


def emr(taus: list[torch.Tensor]) -> Merged:
    """EMR-Merging (arXiv 2405.17461): elect, mask, rescale.

    Unified: the sign of Σ τ_t times the largest |τ_t| among the entries of that sign. Masks: where
    τ_t and the unified vector agree in sign. Rescalers: Σ|τ_t| ÷ Σ|m_t ∘ unified|, over the
    whole model as in the paper (its code averages the means of the tensors).
    """
    sign = task_arithmetic(taus).sign()
    magnitude = torch.zeros_like(sign)
    masks, rescalers = [], []
    for tau in taus:
        agrees = tau * sign > 0
        masks.append(agrees)
        magnitude = torch.maximum(magnitude, torch.where(agrees, tau.abs(), 0))
    for tau, mask in zip(taus, masks):
        kept = float(magnitude[mask].sum(dtype=torch.float64))
        rescalers.append(float(tau.abs().sum(dtype=torch.float64)) / kept if kept else 1.0)
    return Merged(magnitude * sign, masks, rescalers)


def bitdelta(tau: torch.Tensor) -> torch.Tensor:
    """BitDelta (arXiv 2402.10193) of one tensor: mean|τ| · sign(τ), where 0 counts as positive.

    That is its first stage. The second, which distils the scales on calibration texts, is left out.
    """
    return torch.where(tau < 0, -1.0, 1.0) * tau.abs().mean()


def t_switch(tau: torch.Tensor, drop: float) -> torch.Tensor:
    """T-Switch (arXiv 2412.00054) of one tensor: a scale · signs of the largest entries.

    Of the positive and of the negative entries apart, the largest 1 − drop are kept (with ties; all
    where that is less than one). The scale keeps the L2 norm of what is kept, as in its code.
    """
    kept = _largest_of(tau, drop) | _largest_of(-tau, drop)
    count = int(kept.sum())
    if not count:
        return torch.zeros_like(tau)
    norm = float((tau[kept].double() ** 2).sum()) ** 0.5
    return torch.where(kept, tau.sign() * (norm / count**0.5), 0)


def _largest_of(tau: torch.Tensor, drop: float) -> torch.Tensor:
    """Mask of the largest 1 − drop of the positive entries."""
    positive = tau[tau > 0]
    keep = int(positive.numel() * (1 - drop))
    if not keep:
        return tau > 0
    return tau >= positive.kthvalue(positive.numel() - keep + 1).values


def position_bits(kept: int, total: int) -> float:
    """Bits that say which `kept` of `total` entries are meant: a bitmap, or its entropy coded."""
    p = kept / total if total else 0.0
    entropy = -sum(x * math.log2(x) for x in (p, 1 - p) if x)
    return total * entropy  # at most one bit each: never more than the bitmap
