"""y = x · Wᵀ with the weight of the task that each row of x belongs to, decoded on the fly.

    weight = TaskWeight.load(file, "layers.0.mlp.up.weight")
    y = matmul(x, weight, task_of_row)

Many fine-tuned tasks are served from one resident base: no task's weight is ever in memory.
What is multiplied has the bits that decoding the task gives; products are summed in float32.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _core, numbers
from .errors import ArgumentError, TensorMismatchError
from .file import File
from .kernels_triton import bf16_to_f32, f32_to_bf16
from .tensors import torch_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW_ROWS = 32  # so many rows share one tile of the weight, whatever their tasks
SCALE_BLOCK = 128  # elements that share a scale of an int8 shared vector
NO_TASK = tl.constexpr(2**31 - 1)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class TaskPlanes(NamedTuple):
    """A task's planes of one weight. Bits are packed over the flattened weight: element
    i = n · K + k is bit i mod 8 of byte i div 8. Without a mask the task equals the base; with
    signs it is a ternary plane, without them it follows the shared vector."""

    mask: torch.Tensor | None = None  # (⌈N · K / 8⌉,) uint8
    signs: torch.Tensor | None = None  # likewise; a set bit is −1
    scale: float = 1.0
    row_scales: torch.Tensor | None = None  # (N,) float32, in place of the scale


@dataclass(eq=False)
class TaskWeight:
    """A weight W0 and what makes it the weight of each task; all tensors on one device. Tables with
    the planes' addresses are made once, here: the tensors must stay where they are.

    Raises ArgumentError for planes that do not make a task, TensorMismatchError for a tensor of
    another dtype, shape, layout or device.
    """

    base: torch.Tensor  # (N, K) float32, float16 or bfloat16
    tasks: Sequence[TaskPlanes]
    shared: torch.Tensor | None = None  # N · K values, or int8
    scales: torch.Tensor | None = None  # (⌈N · K / 128⌉,) float32, of an int8 shared vector

    @classmethod
    def load(cls, file: File, name: str, tasks: Sequence[str] | None = None, device="cuda"):
        """The weight ``name`` of an open file, and what makes it that of ``tasks`` (all of them, in
        the file's order), on a device, packed.

        Raises ArgumentError for a task that has another weight altogether, stored as it is, and
        what :meth:`tallcodec.File.load` raises.
        """
        if file._backend(torch.device(device)) is None:
            raise ArgumentError(f"products are for GPUs, not for planes on {device}")
        tasks = file.tasks if tasks is None else tasks
        tensor = file._file.original(file._tensor(name))
        dtype, shape, _ = file._info(_core.NONE, tensor)
        kept = {task: file._load(task, [name], device)._planes for task in (None, *tasks)}
        base = kept[None].recipe(tensor).copied.view(torch_dtype(dtype)).view(shape)
        planes, shared, scales = [], None, None
        for task in tasks:
            coding = file._file.entries(file._number(task))[tensor]["coding"]
            if coding == numbers.BASE:
                planes.append(TaskPlanes())
                continue
            if coding not in (numbers.MASK, numbers.TERNARY):
                raise ArgumentError(f"task {task!r} has a {name!r} of its own, stored as it is")
            (block,) = kept[task].recipe(tensor).blocks
            signs = block.shared if coding == numbers.TERNARY else None
            if signs is None:
                shared, scales = block.shared, block.scales
            planes.append(TaskPlanes(block.mask, signs, block.scale, block.row_scales))
        return cls(base, planes, shared, scales)

    def __post_init__(self):
        self._check()
        device, tasks = self.base.device, [*self.tasks, TaskPlanes()]  # the last is the base
        self._masks = _addresses([task.mask for task in tasks], device)
        self._signs = None
        if any(task.signs is not None for task in tasks):
            self._signs = _addresses([task.signs for task in tasks], device)
        self._gains = torch.tensor(
            [task.scale for task in tasks], dtype=torch.float32, device=device)
        self._by_row = any(task.row_scales is not None for task in tasks)
        if self._by_row:
            self._gains = self._gains[:, None].repeat(1, len(self.base))
            for gains, task in zip(self._gains, tasks):
                if task.row_scales is not None:
                    gains.copy_(task.row_scales)

    def _check(self) -> None:
        base, shared, scales = self.base, self.shared, self.scales
        if base.dim() != 2 or base.dtype not in DTYPES or not (
                base.is_contiguous() and base.numel()):
            raise TensorMismatchError(
                f"base: expected a contiguous float32, float16 or bfloat16 matrix that is not "
                f"empty, found {_described(base)}")
        n, device = base.numel(), base.device
        if device.type != "cuda" and not INTERPRETED:
            raise ArgumentError(f"base: expected on a GPU, found on {device} (which Triton's "
                                "interpreter alone can use: TRITON_INTERPRET=1)")
        planes = -(-n // 8), torch.uint8, device
        if shared is not None:
            if shared.dtype not in (*DTYPES, torch.int8):
                raise TensorMismatchError(f"shared: no shared vector is {shared.dtype}")
            _expect("shared", shared.view(-1) if shared.shape == base.shape else shared,
                    n, shared.dtype, device)
        if (scales is not None) != (shared is not None and shared.dtype == torch.int8):
            raise ArgumentError("scales belong to an int8 shared vector, and to no other")
        if scales is not None:
            _expect("scales", scales, -(-n // SCALE_BLOCK), torch.float32, device)
        for number, task in enumerate(self.tasks):
            if task.row_scales is not None:
                _expect(f"task {number}: row_scales", task.row_scales, len(base), torch.float32,
                        device)
            if task.mask is None:
                if task.signs is not None:
                    raise ArgumentError(f"task {number}: signs without a mask")
                continue
            _expect(f"task {number}: mask", task.mask, *planes)
            if task.signs is not None:
                _expect(f"task {number}: signs", task.signs, *planes)
            elif shared is None:
                raise ArgumentError(f"task {number}: a mask without signs needs a shared vector")


def matmul(x, weight: TaskWeight, task_of_row, bias=None, out=None):
    """(…, N): the rows of x (…, K), each times the weight of its task, of x's dtype.

    ``task_of_row``: (rows,) int32 or int64 on the device, or an int, for all rows; -1 is the base.
    In a tensor, numbers that are no task's are not noticed, and taken as the base's.
    ``bias``: (N,) of x's dtype. ``out``: (…, N), contiguous.

    For inference: no gradients. Nothing waits for the device; once warmed up for the shapes at
    hand, a call can be captured in a CUDA graph. No row's values have an influence on another's.
    Raises ArgumentError for an int that is no task's number, TensorMismatchError for tensors that
    do not fit.
    """
    base = weight.base
    columns, inner = base.shape
    if x.dim() == 0 or x.shape[-1] != inner or x.dtype != base.dtype or x.device != base.device:
        raise TensorMismatchError(
            f"x: expected (…, {inner}) {base.dtype} on {base.device}, found {_described(x)}")
    rows = x.numel() // inner
    _check_tasks(task_of_row, rows, len(weight.tasks), base.device)
    if bias is not None:
        _expect("bias", bias, columns, base.dtype, base.device)
    shape = (*x.shape[:-1], columns)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif (out.shape, out.dtype, out.device) != (shape, x.dtype, x.device) or (
            not out.is_contiguous()):
        raise TensorMismatchError(
            f"out: expected contiguous {shape} {x.dtype} on {x.device}, found {_described(out)}")
    if rows:
        x = x.reshape(rows, inner)
        if x.stride(1) != 1:
            x = x.contiguous()
        with _current(x.device):
            _launch(x, weight, task_of_row, bias, out, rows)
    return out


class TaskRows:
    """Which task the rows of the batch at hand belong to, for all TaskLinear of a model.

        rows = TaskRows()
        with rows.use(task_of_row):
            model(x)
    """

    def __init__(self):
        self.current = -1

    @contextlib.contextmanager
    def use(self, task_of_row) -> Iterator[None]:
        """``task_of_row``: as in matmul(), or (batch,): the tasks of the first dimension's
        elements."""
        before, self.current = self.current, task_of_row
        try:
            yield
        finally:
            self.current = before


class TaskLinear(torch.nn.Module):
    """An nn.Linear whose weight is that of each row's task. The weight is no parameter: it stays on
    its device, and out of state dicts."""

    def __init__(self, weight: TaskWeight, rows: TaskRows, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.rows = weight, rows
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x):
        """(…, K) -> (…, N)."""
        tasks = self.rows.current
        if torch.is_tensor(tasks) and x.dim() > 2 and len(tasks) == len(x):
            tasks = tasks.repeat_interleave(x[0].numel() // x.shape[-1])
        return matmul(x, self.weight, tasks, self.bias)


def _addresses(planes, device) -> torch.Tensor:
    addresses = [0 if plane is None else plane.data_ptr() for plane in planes]
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _described(tensor) -> str:
    layout = "" if tensor.is_contiguous() else "non-contiguous "
    return f"{layout}{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _expect(name, tensor, n, dtype, device) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != ((n,), dtype, device) or (
            not tensor.is_contiguous()):
        raise TensorMismatchError(
            f"{name}: expected contiguous ({n},) {dtype} on {device}, found {_described(tensor)}")


def _check_tasks(task_of_row, rows, tasks, device) -> None:
    if not torch.is_tensor(task_of_row):
        if not isinstance(task_of_row, int) or not -1 <= task_of_row < tasks:
            raise ArgumentError(f"task {task_of_row}: there are {tasks} tasks, and -1, the base")
        return
    dtype = task_of_row.dtype
    if dtype not in (torch.int32, torch.int64):
        raise TensorMismatchError(f"task_of_row: expected int32 or int64, found {dtype}")
    _expect("task_of_row", task_of_row, rows, dtype, device)


def _current(device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _processors(device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


class Tiles(NamedTuple):
    """How a product is cut up: rows of x, rows and columns of the weight, of a program; its warps
    and stages; and how many programs a multiprocessor runs at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int


def tiles_for(rows: int, tasks: int, dtype, group: int, mixed: bool) -> Tiles:
    """``tasks``: to how many the rows may belong; ``group``: see matmul_kernel(); ``mixed``: some
    are ternary and some have scales by row, which takes registers."""
    full = dtype == torch.float32  # no tensor cores
    m = max(16, triton.next_power_of_2(rows))
    if rows > FEW_ROWS:
        m = min(max(triton.next_power_of_2(rows // tasks), 32), 64 if full else 128)
        warps = 8 if mixed else 4
        tiles = Tiles(m, 64, 32, warps, 2, 2) if full else Tiles(m, 64, 64, warps, 3, 2)
    elif full:
        tiles = Tiles(m, 32, 64, 4, 2, 4)
    elif tasks == 1:
        tiles = Tiles(m, 64, 64, 4, 3, 4)
    else:
        tiles = Tiles(m, 64, 64, 8, 1, 2)
    if group == 1:  # every element has an address of its own, in registers
        return tiles._replace(m=min(m, 64), k=32, warps=8)
    return tiles


def _launch(x, weight, task_of_row, bias, out, rows) -> None:
    base, tasks = weight.base, len(weight.tasks)
    columns, inner = base.shape
    task, order, bounds = tasks, None, None
    many = torch.is_tensor(task_of_row)
    group = 8 if inner % 8 == 0 else 1
    mixed = weight._by_row and weight._signs is not None
    tiles = tiles_for(rows, tasks + 1 if many else 1, base.dtype, group, mixed)
    row_tiles = triton.cdiv(rows, tiles.m)
    if not many:
        task, task_of_row = task_of_row % (tasks + 1), None
    elif rows > FEW_ROWS:
        order = torch.empty(rows, dtype=torch.int32, device=x.device)
        bounds = torch.empty(tasks + 1, 2, dtype=torch.int32, device=x.device)
        group_kernel[(tasks + 1,)](task_of_row, order, bounds, rows, tasks, BLOCK=1024)
        row_tiles += min(tasks, rows)  # each task's last may be partly filled

    column_tiles, steps = triton.cdiv(columns, tiles.n), triton.cdiv(inner, tiles.k)
    splits = tiles.programs * _processors(x.device) // (triton.cdiv(rows, tiles.m) * column_tiles)
    steps_each = triton.cdiv(steps, max(1, min(splits, steps)))
    splits = max(1, triton.cdiv(steps, steps_each))
    parts = out if splits == 1 else torch.empty(
        splits, rows, columns, dtype=torch.float32, device=x.device)

    matmul_kernel[(row_tiles, column_tiles, splits)](
        x, base, weight.shared, weight.scales, weight._masks, weight._signs, weight._gains,
        bias if splits == 1 else None, parts, task, task_of_row, order, bounds, rows, columns,
        inner // group, tasks, x.stride(0), steps_each,
        BY_ROW=weight._by_row, TASKS=triton.next_power_of_2(tasks + 1), GROUP=group,
        BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False)
    if splits > 1:
        sum_kernel[(rows, triton.cdiv(columns, 512))](
            parts, bias, out, columns, splits, BLOCK=512)


# The interpreter's own conversions from and to bfloat16 are inexact; compiled code rounds.

@triton.jit
def to_f32(x):
    if x.dtype == tl.bfloat16:
        return bf16_to_f32(x.to(tl.uint16, bitcast=True))
    return x.to(tl.float32)


@triton.jit
def f32_to(x, dtype: tl.constexpr):
    if INTERPRETED:
        if dtype == tl.bfloat16:
            return f32_to_bf16(x).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def spread(x, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """(N, K / GROUP) -> (N, K): each value GROUP times."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (N, K // GROUP, GROUP)), (N, K))


@triton.jit
def plane_bytes(planes, task, tasks, group, inside):
    """The byte of a task's plane in which each group's bits begin; 0 where the task has none."""
    address = tl.load(planes + task, mask=task <= tasks, other=0)
    plane = address.to(tl.pointer_type(tl.uint8))
    return tl.load(plane + (group >> 3), mask=inside & (address != 0), other=0)


@triton.jit
def decoded(base, s, mask, sign, signs, gains, task, n, columns, bit,
            BY_ROW: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """(N, K): a tile of a task's weight, of the base's dtype. mask, sign: bytes of its planes;
    bit: where in its byte each element has its bit."""
    if signs is not None:
        negative = (spread(sign.to(tl.int32), N, K, GROUP) >> bit) & 1 != 0
        one = tl.where(negative, -1.0, 1.0)
        if s is None:
            s = one
        else:
            s = tl.where(tl.load(signs + task) != 0, one, s)
    if s is None:
        return base
    if BY_ROW:
        gain = tl.load(gains + task.to(tl.int64) * columns + n, mask=n < columns, other=0)[:, None]
    else:
        gain = tl.load(gains + task)
    active = (spread(mask.to(tl.int32), N, K, GROUP) >> bit) & 1 != 0
    b = to_f32(base)
    return f32_to(tl.where(active, b + gain * s, b), base.dtype)


@triton.jit
def multiply(w, x, acc):
    """acc (N, M) + w (N, K) · xᵀ (K, M)."""
    if INTERPRETED:  # where tl.dot multiplies the bits of bfloat16 as integers
        w, x = to_f32(w), to_f32(x)
    return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


@triton.jit
def tasks_at(task_of_row, row, rows, tasks):
    """The tasks of rows, int32: the base is number ``tasks``, and what is no row NO_TASK."""
    task = tl.load(task_of_row + row, mask=row < rows, other=0)
    task = tl.where((task < 0) | (task >= tasks), tasks, task).to(tl.int32)
    return tl.where(row < rows, task, NO_TASK)


@triton.jit
def group_kernel(task_of_row, order, bounds, rows, tasks, BLOCK: tl.constexpr):
    """``order``: the rows sorted by task; ``bounds`` (tasks + 1, 2): where each task's begin and
    end."""
    task = tl.program_id(0)
    first = 0
    for start in range(0, rows, BLOCK):
        other = tasks_at(task_of_row, start + tl.arange(0, BLOCK), rows, tasks)
        first += tl.sum((other < task).to(tl.int32))
    end = first
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = (tasks_at(task_of_row, row, rows, tasks) == task).to(tl.int32)
        tl.store(order + end + tl.cumsum(mine) - 1, row, mask=mine != 0)
        end += tl.sum(mine)
    tl.store(bounds + 2 * task, first)
    tl.store(bounds + 2 * task + 1, end)


@triton.jit
def find_tile(bounds, tile, tasks, TASKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Task, begin and end, in the order, of a tile's rows; nothing where there are no more."""
    task = tl.arange(0, TASKS)
    first = tl.load(bounds + 2 * task, mask=task <= tasks, other=0)
    end = tl.load(bounds + 2 * task + 1, mask=task <= tasks, other=0)
    tiles = (end - first + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles)
    found = tl.sum((tiles_end <= tile).to(tl.int32))
    begin = first + (tile - tiles_end + tiles) * BLOCK_M
    mine = task == found
    return found, tl.sum(tl.where(mine, begin, 0)), tl.sum(tl.where(mine, end, 0))


@triton.jit(do_not_specialize=["task", "rows", "tasks", "steps"])
def matmul_kernel(
    x, base, shared, scales, masks, signs, gains, bias, out, task, task_of_row, order, bounds,
    rows, columns, groups, tasks, x_stride, steps,
    BY_ROW: tl.constexpr, TASKS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Some columns of y of a tile of rows, over a part of K: with ``order`` each tile's rows are of
    one task, with only ``task_of_row`` they are all rows, else all are of ``task``. A row of W is
    ``groups`` groups of GROUP elements, each in one byte of a mask and under one scale."""
    mixed: tl.constexpr = task_of_row is not None and order is None
    inner = groups * GROUP
    index, end = tl.program_id(0) * BLOCK_M, rows
    if order is not None:
        task, index, end = find_tile(bounds, tl.program_id(0), tasks, TASKS, BLOCK_M)
        if index >= end:
            return
    row = index + tl.arange(0, BLOCK_M)
    present = row < end
    if order is not None:
        row = tl.load(order + row, mask=present, other=0)
    elif mixed:
        task_of = tasks_at(task_of_row, row, rows, tasks)

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += row[:, None].to(tl.int64) * x_stride
    first = n[:, None].to(tl.int64) * inner
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = tl.program_id(2) * steps
    for step in range(begin, min(begin + steps, tl.cdiv(inner, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        k_group = step * BLOCK_K + tl.arange(0, BLOCK_K // GROUP) * GROUP
        x_tile = tl.load(x + k[None, :], mask=present[:, None] & (k < inner)[None, :], other=0)
        inside = (n < columns)[:, None] & (k < inner)[None, :]
        b = tl.load(base + first + k[None, :], mask=inside, other=0)
        group = first + k_group[None, :]
        inside_group = (n < columns)[:, None] & (k_group < inner)[None, :]
        bit = k[None, :] & 7 if GROUP == 8 else (group & 7).to(tl.int32)
        s = None
        if shared is not None:
            s = to_f32(tl.load(shared + first + k[None, :], mask=inside, other=0))
            if scales is not None:
                scale = tl.load(scales + (group >> 7), mask=inside_group, other=0)
                s *= spread(scale, BLOCK_N, BLOCK_K, GROUP)
        if mixed:
            task = tl.min(task_of)
        mask = plane_bytes(masks, task, tasks, group, inside_group)
        sign = mask
        if signs is not None:
            sign = plane_bytes(signs, task, tasks, group, inside_group)
        if not mixed:
            w = decoded(b, s, mask, sign, signs, gains, task, n, columns, bit,
                        BY_ROW, BLOCK_N, BLOCK_K, GROUP)
            acc = multiply(w, x_tile, acc)
        else:
            while task <= tasks:
                # The next task's planes are on their way while this one's are used.
                next_task = tl.min(tl.where(task_of > task, task_of, NO_TASK))
                next_mask = plane_bytes(masks, next_task, tasks, group, inside_group)
                next_sign = next_mask
                if signs is not None:
                    next_sign = plane_bytes(signs, next_task, tasks, group, inside_group)
                w = decoded(b, s, mask, sign, signs, gains, task, n, columns, bit,
                            BY_ROW, BLOCK_N, BLOCK_K, GROUP)
                # A select: a row's infinity never meets another's zero.
                mine = (task_of == task)[None, :]
                acc = tl.where(mine, multiply(w, x_tile, acc), acc)
                task, mask, sign = next_task, next_mask, next_sign

    inside = (n < columns)[:, None] & present[None, :]
    if bias is not None:
        acc += to_f32(tl.load(bias + n, mask=n < columns, other=0))[:, None]
    out += tl.program_id(2).to(tl.int64) * rows * columns
    to = out + row[None, :].to(tl.int64) * columns + n[:, None]
    tl.store(to, f32_to(acc, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(parts, bias, out, columns, splits, BLOCK: tl.constexpr):
    """Adds the parts of y, (splits, rows, columns) float32, in order."""
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * columns + n
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts + at, mask=n < columns, other=0)
        parts += tl.num_programs(0).to(tl.int64) * columns
    if bias is not None:
        acc += to_f32(tl.load(bias + n, mask=n < columns, other=0))
    tl.store(out + at, f32_to(acc, out.dtype.element_ty), mask=n < columns)
