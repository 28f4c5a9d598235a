"""The kernels in Triton. They restate csrc/mask_math.h and give the scalar kernels' bits."""

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .backends import Block

BLOCK = 1024  # elements per program of what reads tensors
TERNARY_BLOCK, MASK_BLOCK = 262144, 524288  # elements of coded planes that decode alone

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


# Coded planes: a program for each block, which is decoded one gap, or sixteen elements, at a time.


@triton.jit
def read(data, inside, SIZE: tl.constexpr):
    """Numbers of so many bytes, at any address; 0 outside."""
    value = load(data, inside).to(tl.int64)
    for byte in tl.static_range(1, SIZE):
        value |= load(data + byte, inside).to(tl.int64) << 8 * byte
    return value


@triton.jit
def coded_block(plane, size, head, block, blocks):
    """(where a block begins, how long it is, whether it lies in its plane)."""
    begin = tl.where(block > 0, read(plane + 8 * tl.maximum(block - 1, 0), None, 8), 0)
    end = read(plane + 8 * block, None, 8)
    sound = (begin >= 0) & (begin <= end) & (end <= size - head)
    sound &= (block < blocks - 1) | (end == size - head)
    return head + begin, end - begin, sound


@triton.jit
def ternary_block(data, size, slots, n, mask, signs):
    """Sets the bits of a block, and says whether it is sound."""
    sound = size >= 16
    if sound:
        count = read(data, None, 4)
        words = read(data + 4, None, 4)
        state = read(data + 8, None, 4)
        other = read(data + 12, None, 4)  # the two take turns
        extras = data + 16 + 2 * words
        sign_bytes = (count + 7) // 8
        extra_bits = 8 * (size - 16 - 2 * words - sign_bytes)
        negative = data + size - sign_bytes
        sound = (count > 0) & (count <= n) & (extra_bits >= 0)
        sound &= (state >= 65536) & (other >= 65536)

        i = tl.full((), 0, tl.int64)
        word = i
        bit = i  # of the extras
        next = i  # the element behind the last one found
        last = i  # the byte that it is in, whose bits so far are
        kept = i
        minus = i
        while sound & (i < count):
            slot = tl.load(slots + (state & 2047))
            x = (slot & 0xFFFF) * (state >> 11) + (slot >> 16 & 0xFFFF)
            low = x < 65536
            sound = (low == 0) | (word < words)
            filling = read(data + 16 + 2 * word, low & sound, 2)
            state = other
            other = tl.where(low, x << 16 | filling, x)
            word += low.to(tl.int64)

            extra = slot >> 59 & 31
            sound &= extra <= extra_bits - bit
            at = bit % 8
            behind = extras + bit // 8
            held = read(behind, sound & (at + extra > 0), 1)
            held |= read(behind + 1, sound & (at + extra > 8), 1) << 8
            held |= read(behind + 2, sound & (at + extra > 16), 1) << 16
            bit += extra

            element = next + (slot >> 32 & 0x7FFFFFF) + (held >> at & (1 << extra) - 1)
            sound &= element < n
            byte = element // 8
            same = byte == last
            sign = read(negative + i // 8, None, 1) >> i % 8 & 1
            kept = tl.where(same, kept, 0) | 1 << element % 8
            minus = tl.where(same, minus, 0) | sign << element % 8
            tl.store(mask + byte, kept.to(tl.uint8), mask=sound)
            tl.store(signs + byte, minus.to(tl.uint8), mask=sound)
            last = byte
            next = element + 1
            i += 1
        sound &= (state == 65536) & (other == 65536) & (word == words) & (extra_bits - bit < 8)
    return sound


@triton.jit
def unpack_ternary_kernel(
    plane, size, head, blocks, slots, n, mask, signs, status, BLOCK: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    begin, length, sound = coded_block(plane, size, head, block, blocks)
    if sound & (length > 0):
        at = block * (BLOCK // 8)
        sound = ternary_block(plane + begin, length, slots, tl.minimum(n - block * BLOCK, BLOCK),
                              mask + at, signs + at)  # fmt: skip
    tl.store(status, 1, mask=sound == 0)


@triton.jit
def mask_context(s):
    bits = s.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits != 0, 1 + (bits >> 22), 0).to(tl.int32)


@triton.jit
def popcount16(x):
    x -= x >> 1 & 0x5555
    x = (x & 0x3333) + (x >> 2 & 0x3333)
    x = x + (x >> 4) & 0x0F0F
    return x + (x >> 8) & 31


@triton.jit
def take_bits(state, f, data, word, words):
    """(states, bits, next word): takes a bit off every state, in order. A frequency of 0 leaves a
    state as it is."""
    lane = tl.arange(0, 16)
    slot = state & 4095
    one = slot < f
    x = tl.where(one, f * (state >> 12) + slot, (4096 - f) * (state >> 12) + slot - f)
    low = x < 65536
    both = tl.sum(one.to(tl.uint32) << lane | low.to(tl.uint32) << lane + 16, axis=0)
    lows = both >> 16
    at = word + popcount16(lows & (1 << lane) - 1)
    filling = read(data + 2 * at, low & (at < words), 2).to(tl.uint32)
    return tl.where(low, x << 16 | filling, x), both & 0xFFFF, word + popcount16(lows)


@triton.jit
def mask_block(data, size, shared, scales, n, mask):
    """Sets the bits of a block, and says whether it is sound."""
    sound = size >= 12
    if sound:
        words = read(data, None, 4)
        first = read(data + 4, None, 2).to(tl.int32)
        used = read(data + 6, None, 2).to(tl.int32)
        after_none = read(data + 8, None, 2).to(tl.uint32)
        after_some = read(data + 10, None, 2).to(tl.uint32)
        table = data + 12
        sound = (first > 0) & (first + used <= 512)
        sound &= size == 12 + 2 * used + 64 + 2 * words
        sound &= (after_none <= 4096) & (after_some <= 4096)
        context = tl.arange(0, 512)
        sound &= tl.max(read(table + 2 * context, sound & (context < used), 2), axis=0) <= 4096

        lane = tl.arange(0, 16)
        state = read(table + 2 * used + 4 * lane, sound & (lane >= 0), 4).to(tl.uint32)
        sound &= tl.min(state, axis=0) >= 65536
        data += 12 + 2 * used + 64
        word = tl.full((), 0, tl.int64)
        flag = tl.full((), 1, tl.uint32)
        groups = tl.where(sound, (n + 63) // 64, 0)
        for group in range(0, groups):
            f = tl.where(lane == 0, tl.where(flag != 0, after_some, after_none), 0)
            state, flag, word = take_bits(state, f, data, word, words)
            if flag != 0:
                octets = tl.full((), 0, tl.int64)
                for step in tl.static_range(4):
                    i = 64 * group + 16 * step + lane
                    if scales is None:
                        s = load_f32(shared + i, i < n)
                    else:
                        s = dequantise(load(shared + i, i < n), tl.load(scales + group // 2))
                    rank = mask_context(s) - first
                    f = read(table + 2 * rank, (rank >= 0) & (rank < used), 2).to(tl.uint32)
                    state, ones, word = take_bits(state, f, data, word, words)
                    octets |= ones.to(tl.int64) << 16 * step
                byte = 8 * group + tl.arange(0, 8)
                octet = (octets >> 8 * tl.arange(0, 8)).to(tl.uint8)
                tl.store(mask + byte, octet, mask=8 * byte < n)
        sound &= (word == words) & (tl.max((state != 65536).to(tl.int32), axis=0) == 0)
    return sound


@triton.jit
def unpack_mask_kernel(
    plane, size, blocks, shared, scales, n, mask, status, BLOCK: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    begin, length, sound = coded_block(plane, size, 8 * blocks, block, blocks)
    if sound & (length > 0):
        first = block * BLOCK
        if scales is not None:
            scales += first // 128
        sound = mask_block(plane + begin, length, shared + first, scales,
                           tl.minimum(n - first, BLOCK), mask + first // 8)  # fmt: skip
    tl.store(status, 1, mask=sound == 0)


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

    def unpack_ternary(
        self, plane: Any, head: int, slots: Any, n: int, mask: Any, signs: Any, status: Any
    ) -> None:
        mask.zero_()
        signs.zero_()
        if not n:
            return
        blocks = triton.cdiv(n, TERNARY_BLOCK)
        with on(plane):
            unpack_ternary_kernel[(blocks,)](
                plane, plane.numel(), head, blocks, slots, n, mask, signs, status, TERNARY_BLOCK,
                num_warps=1,
            )  # fmt: skip

    def unpack_mask(
        self, plane: Any, n: int, shared: Any, scales: Any, mask: Any, status: Any
    ) -> None:
        mask.zero_()
        if not n:
            return
        blocks = triton.cdiv(n, MASK_BLOCK)
        if plane.numel() < 8 * blocks:
            status.fill_(1)
            return
        with on(plane):
            unpack_mask_kernel[(blocks,)](
                plane, plane.numel(), blocks, shared, scales, n, mask, status, MASK_BLOCK,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
