"""The kernels in CUDA C++ (csrc/kernels_cuda.cu), on torch tensors."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import _core, numbers
from .backends import LANES, UNIT, Block, Encoded, table_of

_DTYPES = {
    torch.float32: numbers.DTYPES["F32"],
    torch.float16: numbers.DTYPES["F16"],
    torch.bfloat16: numbers.DTYPES["BF16"],
    torch.int8: numbers.DTYPES["I8"],
    torch.uint8: numbers.DTYPES["BOOL"],  # signs
}
_RULES = {"published": 0, "magnitude": 1, "adapted": 2}
_VECTOR = 16  # bytes that are loaded at once


class CudaBackend:
    """As :class:`tallcodec.backends.Backend` says. ``name`` "cuda-host" runs the same programs on
    the CPU's tensors, lane by lane."""

    def __init__(self, name: str = "cuda"):
        self.name = name

    def decode(self, blocks: Sequence[Block]) -> None:
        if blocks:
            with self._queue(blocks[0].out) as queue:
                queue.decode([_block(b) for b in blocks])

    def encode(
        self, base: Any, tasks: Sequence[Any], thresholds: Sequence[float], shared_dtype: Any,
        rule: str = "published", merged: Any = None,
    ) -> Encoded:  # fmt: skip
        n, count = base.numel(), len(tasks)
        shared = torch.empty(n, dtype=shared_dtype, device=base.device)
        scales = None
        if shared_dtype == torch.int8:
            scales = torch.empty(-(-n // 128), dtype=torch.float32, device=base.device)
        masks = [torch.empty(-(-n // 8), dtype=torch.uint8, device=base.device) for _ in tasks]
        counts = torch.zeros(3 * count + 1, dtype=torch.int64, device=base.device)
        nonfinite = torch.zeros(count + 1, dtype=torch.int32, device=base.device)
        set_bits, published_bits, agreement = counts.split([count, count, count + 1])
        loaded = [base, *tasks, *([] if merged is None else [merged])]
        aligned = all(t.dtype == base.dtype for t in tasks) and all(
            t.data_ptr() % _VECTOR == 0 for t in loaded
        )
        listed = [
            (task.data_ptr(), mask.data_ptr(), threshold, _DTYPES[task.dtype])
            for task, mask, threshold in zip(tasks, masks, thresholds)
        ]
        table = None  # the first tasks are arguments
        if count > _core.gpu.HELD:
            table = table_of(_core.gpu.task_table(listed), base.device)
        with self._queue(base) as queue:
            queue.encode(
                n, base.data_ptr(), _DTYPES[base.dtype], _DTYPES[shared_dtype], _RULES[rule],
                aligned, listed, _address(table), _address(merged), shared.data_ptr(),
                _address(scales), set_bits.data_ptr(), published_bits.data_ptr(),
                agreement.data_ptr(), nonfinite.data_ptr(),
            )  # fmt: skip
        return Encoded(shared, scales, masks, set_bits, published_bits, agreement, nonfinite)

    def sums(self, block: Block, task: Any) -> Any:
        units = -(-block.n // UNIT)
        to = torch.empty(units, 3, LANES, dtype=torch.float64, device=task.device)
        dtype = _DTYPES[task.dtype]
        with self._queue(task) as queue:
            queue.sums(_block(block), task.data_ptr(), dtype, to.data_ptr())
        return to

    def agreement(self, masks: Sequence[Any], n: int) -> Any:
        counts = torch.zeros(len(masks) + 1, dtype=torch.int64, device=masks[0].device)
        table = _addresses(masks)
        with self._queue(counts) as queue:
            queue.agreement(n, len(masks), table.data_ptr(), counts.data_ptr())
        return counts

    def overlap(self, masks: Sequence[Any], n: int) -> Any:
        pairs = torch.zeros(len(masks), len(masks), dtype=torch.int64, device=masks[0].device)
        table = _addresses(masks)
        with self._queue(pairs) as queue:
            queue.overlap(n, len(masks), table.data_ptr(), pairs.data_ptr())
        return pairs + pairs.triu(1).T

    def consensus(self, masks: Sequence[Any], n: int, least: int) -> Any:
        out = torch.empty_like(masks[0])
        table = _addresses(masks)
        with self._queue(out) as queue:
            queue.consensus(n, len(masks), table.data_ptr(), least, out.data_ptr())
        return out

    def unpack_ternary(
        self, plane: Any, head: int, slots: Any, n: int, mask: Any, signs: Any, status: Any
    ) -> None:
        with self._queue(mask) as queue:
            queue.unpack_ternary(
                plane.data_ptr(), plane.numel(), n, status.data_ptr(), head, slots.data_ptr(),
                mask.data_ptr(), signs.data_ptr(),
            )  # fmt: skip

    def unpack_mask(
        self, plane: Any, n: int, shared: Any, scales: Any, mask: Any, status: Any
    ) -> None:
        with self._queue(mask) as queue:
            queue.unpack_mask(
                plane.data_ptr(), plane.numel(), n, status.data_ptr(), shared.data_ptr(),
                _DTYPES[shared.dtype], _address(scales), mask.data_ptr(),
            )  # fmt: skip

    @contextlib.contextmanager
    def _queue(self, tensor: Any) -> Iterator[Any]:
        """Where work on a tensor is queued: the current stream of its device, which is PyTorch's
        current one meanwhile, so that nothing has to change it."""
        if tensor.device.type != "cuda":
            yield _core.gpu.Queue(self.name, 0, 0)
            return
        with torch.cuda.device(tensor.device):
            stream = torch.cuda.current_stream()
            yield _core.gpu.Queue(self.name, tensor.device.index, stream.cuda_stream)


def _addresses(masks: Sequence[Any]) -> Any:
    """Their table on the device. What is queued may use it until it is let go of."""
    return table_of([mask.data_ptr() for mask in masks], masks[0].device)


def _address(tensor: Any) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _block(block: Block) -> tuple[Any, ...]:
    shared = block.base if block.shared is None else block.shared
    out = block.base if block.out is None else block.out
    return (
        block.n, block.phase, block.base.data_ptr(), _DTYPES[block.base.dtype], _address(shared),
        _DTYPES[shared.dtype], _address(block.scales), _address(block.mask), block.scale,
        _address(block.row_scales), block.row_length, out.data_ptr(), _DTYPES[out.dtype],
    )  # fmt: skip
