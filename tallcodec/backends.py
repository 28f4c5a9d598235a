"""What decodes on a device: CUDA C++ or Triton, which do the same and give the same bits."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

UNIT = 524288  # elements of a tensor for which statistics are summed in one go, lane by lane
LANES = 16


class Block(NamedTuple):
    """Elements of one tensor, on a device. As csrc/kernels.h has it: ``base`` and ``out`` begin with
    the first of ``n`` elements, as ``shared`` does where it has one value per element; what is
    packed, and ``scales``, begin ``phase`` < 128 elements before.

    All are one-dimensional, contiguous torch tensors of one device: values in float32, float16 or
    bfloat16, of whatever alignment.
    """

    n: int
    base: Any  # (n,)
    out: Any  # (n,); None where nothing is decoded
    mask: Any = None  # (⌈(phase + n) / 8⌉,) uint8; None: the base is only converted
    shared: Any = None  # (n,) values or int8; or uint8: signs, packed as the mask
    scales: Any = None  # (⌈(phase + n) / 128⌉,) float32, of an int8 shared vector
    scale: float = 1.0  # g, a float32 value; ignored where there are
    row_scales: Any = None  # float32: g of element i is row_scales[i // row_length]
    row_length: int = 0
    phase: int = 0


class Encoded(NamedTuple):
    """What comes of n elements of a base and its tasks. Bits are packed as in a mask: element i is
    bit i mod 8 of byte i div 8, spare bits 0."""

    shared: Any  # (n,) of the shared vector's dtype
    scales: Any  # (⌈n / 128⌉,) float32 of an int8 shared vector, else None
    masks: list[Any]  # per task (⌈n / 8⌉,) uint8
    set_bits: Any  # (tasks,) int64: bits of the mask
    published_bits: Any  # (tasks,) int64: elements that the rule sets, those where s = 0 too
    agreement: Any  # (tasks + 1,) int64: elements that the rule sets for exactly k tasks
    nonfinite: Any  # (tasks + 1,) int32, not 0 where a task, or last the base, has NaN or infinity


def table_of(numbers: Sequence[Any], device: Any) -> Any:
    """64-bit numbers on a device, without waiting for it."""
    import torch

    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


class Backend(Protocol):
    """The operations. They trust their arguments (tallcodec.gpu checks them), run on the current
    stream of the tensors' device, and wait for nothing."""

    name: str

    def decode(self, blocks: Sequence[Block]) -> None:
        """``out`` = mask ? base + scale · s : base."""

    def encode(
        self, base: Any, tasks: Sequence[Any], thresholds: Sequence[float], shared_dtype: Any,
        rule: str = "published", merged: Any = None,
    ) -> Encoded:
        """The shared vector and all masks in one pass. ``shared_dtype`` is a torch dtype; ``rule``
        "published", "magnitude" or "adapted" (MaskRule in csrc/kernels.h); ``merged`` (n,) float32
        is a multi-task vector to use in place of the sum of task vectors. Tasks may be of dtypes
        other than the base's."""

    def sums(self, block: Block, task: Any) -> Any:
        """(⌈n / UNIT⌉, 3, LANES) float64: Σ τ², Σ τ·m·s, Σ (m·s)² of each unit's elements of a lane,
        added in order; ``scale`` does not count. As csrc/kernels.h's Sums."""

    def agreement(self, masks: Sequence[Any], n: int) -> Any:
        """(masks + 1,) int64: on how many of n elements exactly k masks are set."""

    def overlap(self, masks: Sequence[Any], n: int) -> Any:
        """(masks, masks) int64, symmetric: on how many elements both are set; the diagonal is the
        masks' popcounts."""

    def consensus(self, masks: Sequence[Any], n: int, least: int) -> Any:
        """The mask of the elements on which ``least`` ≥ 1 masks or more are set."""

    def unpack_ternary(
        self, plane: Any, head: int, slots: Any, n: int, mask: Any, signs: Any, status: Any
    ) -> None:
        """A coded ternary plane (docs/format.md, "Ternary planes") into raw bits.

        ``plane``: all of its bytes, uint8; ``head``: how many of them are before its blocks;
        ``slots``: (2048,) int64, what each slot stands for: frequency, then slot − start, 16 bits
        each from the lowest, then the symbol's smallest gap, 27 bits, and its extra bits, 5.
        ``mask`` and ``signs``: (⌈n / 8⌉,) uint8, aligned to 4 bytes. ``status``: (1,) int32, set to
        1 where a block is not sound; whatever the bytes are, nothing outside the arrays is
        touched."""

    def unpack_mask(
        self, plane: Any, n: int, shared: Any, scales: Any, mask: Any, status: Any
    ) -> None:
        """A mask coded given the shared vector (docs/format.md, "Conditional masks"), likewise;
        ``shared`` is (n,) values or int8, with ``scales``."""
