"""The kernels in Triton. They restate csrc/mask_math.h and give the scalar kernels' bits."""

import contextlib
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .backends import Block

BLOCK = 1024  # elements per program of what reads tensors

# Loads and stores. An ``inside`` of None is a whole tile, which needs no asking: the compiler then
# moves 16 bytes at a time.


@triton.jit
def load(pointers, inside):
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def load_f32(pointers, inside):
    x = load(pointers, inside)
    if x.dtype == tl.bfloat16:
        return bf16_to_f32(x.to(tl.uint16, bitcast=True))
    elif x.dtype == tl.float16:
        return f16_to_f32(x.to(tl.uint16, bitcast=True))
    else:
        return x


@triton.jit
def round_to(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return f32_to_bf16(x).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        return f32_to_f16(x).to(tl.float16, bitcast=True)
    else:
        return x


# Formulas, by their names in mask_math.h. The hardware converts all of float16 but NaN as they do.


@triton.jit
def bf16_to_f32(h):
    return (h.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def f32_to_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (tl.where(x != x, bits | 0x400000, rounded) >> 16).to(tl.uint16)


@triton.jit
def f16_to_f32(h):
    wide = h.to(tl.uint32)
    nan = (wide & 0x8000) << 16 | 0x7FC00000 | (wide & 0x3FF) << 13
    number = h.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((wide & 0x7FFF) > 0x7C00, nan.to(tl.float32, bitcast=True), number)


@triton.jit
def f32_to_f16(x):
    bits = x.to(tl.uint32, bitcast=True)
    nan = (bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x3FF).to(tl.uint16)
    return tl.where(x != x, nan, x.to(tl.float16).to(tl.uint16, bitcast=True))


@triton.jit
def dequantise(q, scale):
    return q.to(tl.float32) * scale


@triton.jit
def decoded(base, s, scale, active):
    return tl.where(active, base + scale * s, base)


# Tiles are (BLOCK / 8, 8): a row is what a byte of a mask stands for. The first element of what is
# decoded is bit ``lead`` of byte ``first`` of what is packed.


@triton.jit
def bits_of(packed, group, inside):
    """The bits of bytes, a row for each."""
    octet = load(packed + group, inside).to(tl.int32)
    return (octet[:, None] >> tl.arange(0, 8)[None, :] & 1) != 0


@triton.jit
def load_shared(shared, scales, i, inside, group, group_inside):
    dtype: tl.constexpr = shared.dtype.element_ty
    if dtype == tl.uint8:
        return tl.where(bits_of(shared, group, group_inside), -1.0, 1.0)
    elif dtype == tl.int8:
        scale = load(scales + group // 16, group_inside)
        return dequantise(load(shared + i, inside), scale[:, None])
    else:
        return load_f32(shared + i, inside)


@triton.jit
def row_of(i, first, length, BLOCK: tl.constexpr):
    """i // length, of elements less than BLOCK behind the first, divided in 32 bits."""
    row = first // length
    left = tl.minimum((row + 1) * length - first, BLOCK).to(tl.int32)
    ahead = (i - first).to(tl.int32) - left
    rows = 1 + ahead // tl.minimum(length, BLOCK).to(tl.int32)
    return row + tl.where(ahead < 0, 0, rows)


@triton.jit
def decode_tile(
    base, out, mask, shared, scales, scale, row_scales, row_length, n, first, lead,
    BLOCK: tl.constexpr, ALIGNED_ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (BLOCK // 8)
    group = start + tl.arange(0, BLOCK // 8)
    begin = 8 * group - lead
    i = begin[:, None] + tl.arange(0, 8)[None, :]
    if WHOLE:
        inside = None
        group_inside = None
    else:
        inside = (i >= 0) & (i < n)
        group_inside = begin < n
    x = load_f32(base + i, inside)
    if mask is not None:
        s = load_shared(shared, scales, i, inside, first + group, group_inside)
        if row_scales is None:
            g = scale.to(tl.float32, bitcast=True)
        else:
            from_element = tl.maximum(8 * start - lead, 0)
            if ALIGNED_ROWS:
                row = row_of(begin, from_element, row_length, BLOCK)
                g = load(row_scales + row, group_inside)[:, None]
            else:
                g = load(row_scales + row_of(i, from_element, row_length, BLOCK), inside)
        x = decoded(x, s, g, bits_of(mask, first + group, group_inside))
    tl.store(out + i, round_to(x, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "first", "scale", "row_length"])
def decode_kernel(
    base, out, mask, shared, scales, scale, row_scales, row_length, n, first, lead,
    BLOCK: tl.constexpr, ALIGNED_ROWS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * BLOCK - lead
    if (begin >= 0) & (begin + BLOCK <= n):
        decode_tile(base, out, mask, shared, scales, scale, row_scales, row_length, n, first, lead,
                    BLOCK, ALIGNED_ROWS, True)  # fmt: skip
    else:
        decode_tile(base, out, mask, shared, scales, scale, row_scales, row_length, n, first, lead,
                    BLOCK, ALIGNED_ROWS, False)  # fmt: skip


def on(tensor):
    """The context to launch kernels on the device of a tensor in."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def float_bits(x):
    """A float32 value as kernels take it: the interpreter makes float64 of what is denormal, and
    +0 of −0."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


class TritonBackend:
    """backends.Backend. Every formula has one rounding per operation: nothing is fused."""

    name = "triton"

    def decode(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if not block.n:
                continue
            first, lead = divmod(block.phase, 8)
            aligned_rows = lead == 0 and block.row_length % 8 == 0
            with on(block.base):
                decode_kernel[(triton.cdiv(lead + block.n, BLOCK),)](
                    block.base, block.out, block.mask, block.shared, block.scales,
                    float_bits(block.scale), block.row_scales, block.row_length, block.n,
                    first, lead, BLOCK, aligned_rows, enable_fp_fusion=False,
                )  # fmt: skip
