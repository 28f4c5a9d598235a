"""The kernels in Triton. They restate csrc/mask_math.h and give the scalar kernels' bits."""

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .backends import LANES, UNIT, Block, Encoded, table_of

BLOCK = 1024  # elements per program of what reads tensors, a multiple of 128
AGREEMENT_BLOCK = 4096  # of what counts how masks agree
OVERLAP_BYTES = 2048  # of a mask per program that compares masks
TERNARY_BLOCK, MASK_BLOCK = 262144, 524288  # elements of coded planes that decode alone

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TRITON_DTYPES = dict(zip(DTYPES, [tl.float32, tl.float16, tl.bfloat16]))
MAX_F16, MAX_BF16 = tl.constexpr(65504.0), tl.constexpr(float.fromhex("0x1.fep127"))
TO_INTEGER = tl.constexpr(float.fromhex("0x1.8p23"))  # pushes the fraction out

# Loads and stores. An ``inside`` of None is a whole tile, which needs no asking: the compiler then
# moves 16 bytes at a time.


@triton.jit
def load(pointers, inside):
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def to_f32(x):
    if x.dtype == tl.bfloat16:
        return bf16_to_f32(x.to(tl.uint16, bitcast=True))
    elif x.dtype == tl.float16:
        return f16_to_f32(x.to(tl.uint16, bitcast=True))
    else:
        return x


@triton.jit
def load_f32(pointers, inside):
    return to_f32(load(pointers, inside))


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
def is_finite(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def shared_value(sum):
    return tl.where(is_finite(sum), sum, 0.0)


@triton.jit
def clamp_to(x, limit: tl.constexpr):
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@triton.jit
def int8_scale(absmax):
    return tl.div_rn(absmax, 127.0)


@triton.jit
def quantise(s, scale):
    q = tl.div_rn(s, tl.where(scale == 0, 1.0, scale))
    q = clamp_to((q + TO_INTEGER) - TO_INTEGER, 127.0)
    return tl.where(scale == 0, 0.0, q).to(tl.int8)


@triton.jit
def dequantise(q, scale):
    return q.to(tl.float32) * scale


@triton.jit
def is_active(base, task, s, threshold):
    return tl.abs(base - task) > threshold * tl.abs((base + s) - task)


@triton.jit
def follows(tau, s, factor):
    return tl.abs(tau) > tl.abs(factor * s - tau)


@triton.jit
def is_large(base, task, threshold):
    return tl.abs(task - base) > threshold


@triton.jit
def decoded(base, s, scale, active):
    return tl.where(active, base + scale * s, base)


# Tiles are (BLOCK / 8, 8): a row is what a byte of a mask stands for. The first element of what is
# decoded is bit ``lead`` of byte ``first`` of what is packed.


@triton.jit
def bits_of(packed, byte, bit, inside):
    return (load(packed + byte, inside).to(tl.int32) >> bit & 1) != 0


@triton.jit
def pack(active):
    return tl.sum(active.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def load_shared(shared, scales, i, inside, byte, bit, byte_inside):
    """s of elements i, whose bits are these of these bytes of what is packed."""
    dtype: tl.constexpr = shared.dtype.element_ty
    if dtype == tl.uint8:
        return tl.where(bits_of(shared, byte, bit, byte_inside), -1.0, 1.0)
    elif dtype == tl.int8:
        return dequantise(load(shared + i, inside), load(scales + byte // 16, byte_inside))
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
    row = start + tl.arange(0, BLOCK // 8)[:, None]
    bit = tl.arange(0, 8)[None, :]
    begin = 8 * row - lead
    i = begin + bit
    if WHOLE:
        inside = None
        row_inside = None
    else:
        inside = (i >= 0) & (i < n)
        row_inside = begin < n
    x = load_f32(base + i, inside)
    if mask is not None:
        s = load_shared(shared, scales, i, inside, first + row, bit, row_inside)
        if row_scales is None:
            g = scale.to(tl.float32, bitcast=True)
        else:
            from_element = tl.maximum(8 * start - lead, 0)
            if ALIGNED_ROWS:
                at = row_of(begin, from_element, row_length, BLOCK)
                g = load(row_scales + at, row_inside)
            else:
                g = load(row_scales + row_of(i, from_element, row_length, BLOCK), inside)
        x = decoded(x, s, g, bits_of(mask, first + row, bit, row_inside))
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


@triton.jit
def store_shared(shared, scales, s, i, inside, n, BLOCK: tl.constexpr):
    """Stores a tile of sums as the shared vector's type: what a decoder will see."""
    dtype: tl.constexpr = shared.dtype.element_ty
    if dtype == tl.int8:
        absmax = tl.reshape(tl.max(tl.abs(s), axis=1), (BLOCK // 128, 16))
        scale = int8_scale(tl.max(absmax, axis=1))
        at = tl.program_id(0).to(tl.int64) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
        tl.store(scales + at, scale, mask=128 * at < n)
        scale = tl.broadcast_to(scale[:, None], (BLOCK // 128, 16))
        scale = tl.reshape(scale, (BLOCK // 8,))[:, None]
        q = quantise(s, scale)
        tl.store(shared + i, q, mask=inside)
        return dequantise(q, scale)
    else:
        if dtype == tl.float16:
            s = clamp_to(s, MAX_F16)
        elif dtype == tl.bfloat16:
            s = clamp_to(s, MAX_BF16)
        stored = round_to(s, dtype)
        tl.store(shared + i, stored, mask=inside)
        return to_f32(stored)


# What programs count, each stores in a row of its own, which are added up afterwards: thousands of
# programs would wait for each other at the same few counters.
#
# Tasks are a table, a line of three numbers for each: the address, the number of the dtype, the
# bits of the threshold.


@triton.jit
def load_at(address, i, inside, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return load_f32(pointer + i, inside)


@triton.jit
def load_task(tasks, k, i, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(tasks + 3 * k)
    if DTYPE is not None:
        return load_at(address, i, inside, DTYPE, ALIGNED)
    else:
        dtype = tl.load(tasks + 3 * k + 1)
        if dtype == 0:
            t = load_at(address, i, inside, tl.float32, ALIGNED)
        elif dtype == 1:
            t = load_at(address, i, inside, tl.float16, ALIGNED)
        else:
            t = load_at(address, i, inside, tl.bfloat16, ALIGNED)
        return t


@triton.jit
def obeys(RULE: tl.constexpr, b, t, s, threshold):
    if RULE == "published":
        return is_active(b, t, s, threshold)
    elif RULE == "magnitude":
        return is_large(b, t, threshold)
    else:
        return follows(t - b, s, threshold)


@triton.jit
def store_agreement(agreement, active_tasks, inside, tasks, BINS: tl.constexpr):
    """Counts the elements by how many tasks are active; what is outside is beyond all tasks."""
    if inside is not None:
        active_tasks = tl.where(inside, active_tasks, tasks + 1)
    counts = tl.histogram(tl.reshape(active_tasks, (active_tasks.numel,)), BINS)
    k = tl.arange(0, BINS)
    tl.store(agreement + k, counts, mask=k <= tasks)


@triton.jit
def encode_tile(
    base, tasks, count, merged, shared, scales, masks, stride, counts, nonfinite, n,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, RULE: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    i = 8 * row[:, None] + tl.arange(0, 8)[None, :]
    if WHOLE:
        inside = None
        row_inside = None
    else:
        inside = i < n
        row_inside = 8 * row < n
    b = load_f32(base + i, inside)
    tl.store(nonfinite + count, 1, mask=tl.sum((is_finite(b) == 0).to(tl.int32)) > 0)
    if merged is not None:
        s = load(merged + i, inside)
    else:
        s = tl.zeros((BLOCK // 8, 8), tl.float32)
        for k in range(count):
            s += load_task(tasks, k, i, inside, DTYPE, ALIGNED) - b
    s = store_shared(shared, scales, shared_value(s), i, inside, n, BLOCK)

    active_tasks = tl.zeros((BLOCK // 8, 8), tl.int32)
    mask = masks + row
    counts += tl.program_id(0).to(tl.int64) * (3 * count + 1)
    for k in range(count):
        t = load_task(tasks, k, i, inside, DTYPE, ALIGNED)
        threshold = tl.load(tasks + 3 * k + 2).to(tl.int32).to(tl.float32, bitcast=True)
        published = obeys(RULE, b, t, s, threshold)
        if inside is not None:
            published &= inside
        active = published & (s != 0)
        tl.store(mask, pack(active), mask=row_inside)
        mask += stride
        active_tasks += published.to(tl.int32)
        # Three sums, 20 bits each.
        sums = active.to(tl.int64) | published.to(tl.int64) << 20
        sums = tl.sum(sums | (is_finite(t) == 0).to(tl.int64) << 40)
        tl.store(counts + k, (sums & 0xFFFFF).to(tl.int32))
        tl.store(counts + count + k, (sums >> 20 & 0xFFFFF).to(tl.int32))
        tl.store(nonfinite + k, 1, mask=sums >> 40 > 0)
    store_agreement(counts + 2 * count, active_tasks, inside, count, BINS)


@triton.jit(do_not_specialize=["count", "n"])
def encode_kernel(
    base, tasks, count, merged, shared, scales, masks, stride, counts, nonfinite, n,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, RULE: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= n:
        encode_tile(base, tasks, count, merged, shared, scales, masks, stride, counts, nonfinite,
                    n, DTYPE, ALIGNED, RULE, BINS, BLOCK, True)  # fmt: skip
    else:
        encode_tile(base, tasks, count, merged, shared, scales, masks, stride, counts, nonfinite,
                    n, DTYPE, ALIGNED, RULE, BINS, BLOCK, False)  # fmt: skip


@triton.jit(do_not_specialize=["n", "phase"])
def sums_kernel(base, task, mask, shared, scales, sums, n, phase, UNIT: tl.constexpr):
    """A program for each unit, whose lanes add their elements in order."""
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 16)
    tau_sq = tl.zeros((16,), tl.float64)
    dot = tau_sq
    approx_sq = tau_sq
    for step in tl.range(0, tl.cdiv(tl.minimum(n - unit * UNIT, UNIT), 16), loop_unroll_factor=8):
        i = unit * UNIT + 16 * step + lane
        inside = i < n
        tau = (load_f32(task + i, inside) - load_f32(base + i, inside)).to(tl.float64)
        tau_sq = tl.where(inside, tau_sq + tau * tau, tau_sq)
        if mask is not None:
            byte = (phase + i) // 8
            bit = ((phase + i) % 8).to(tl.int32)
            s = load_shared(shared, scales, i, inside, byte, bit, inside).to(tl.float64)
            active = bits_of(mask, byte, bit, inside)
            dot = tl.where(active, dot + tau * s, dot)
            approx_sq = tl.where(active, approx_sq + s * s, approx_sq)
    tl.store(sums + unit * 48 + lane, tau_sq)
    tl.store(sums + unit * 48 + 16 + lane, dot)
    tl.store(sums + unit * 48 + 32 + lane, approx_sq)


# Masks are a table of addresses.


@triton.jit
def mask_at(masks, k):
    return tl.load(masks + k).to(tl.pointer_type(tl.uint8))


@triton.jit
def count_masks(masks, count, n, BLOCK: tl.constexpr):
    """(how many masks are set on each element of a tile, which are inside, the tile's bytes)."""
    row = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    byte = row[:, None]
    bit = tl.arange(0, 8)[None, :]
    set_masks = tl.zeros((BLOCK // 8, 8), tl.int32)
    for k in range(count):
        set_masks += bits_of(mask_at(masks, k), byte, bit, 8 * byte < n).to(tl.int32)
    return set_masks, 8 * byte + bit < n, row


@triton.jit(do_not_specialize=["count", "n"])
def agreement_kernel(masks, count, n, agreement, BINS: tl.constexpr, BLOCK: tl.constexpr):
    set_masks, inside, _ = count_masks(masks, count, n, BLOCK)
    agreement += tl.program_id(0).to(tl.int64) * (count + 1)
    store_agreement(agreement, set_masks, inside, count, BINS)


@triton.jit(do_not_specialize=["count", "n", "least"])
def consensus_kernel(masks, count, n, least, out, BLOCK: tl.constexpr):
    set_masks, inside, row = count_masks(masks, count, n, BLOCK)
    tl.store(out + row, pack((set_masks >= least) & inside), mask=8 * row < n)


@triton.jit(do_not_specialize=["count", "n"])
def overlap_kernel(masks, count, n, pairs, BYTES: tl.constexpr):
    """A program for some bytes of a mask, which it compares with all behind it and itself."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 8 * byte < n
    x = tl.program_id(1)
    here = load(mask_at(masks, x) + byte, inside).to(tl.int32)
    here &= (1 << tl.minimum(n - 8 * byte, 8).to(tl.int32)) - 1  # without the spare bits
    for y in range(x, count):
        both = tl.sum(popcount16(here & load(mask_at(masks, y) + byte, inside))).to(tl.int64)
        tl.atomic_add(pairs + x * count + y, both, sem="relaxed")
        tl.atomic_add(pairs + y * count + x, both, mask=x != y, sem="relaxed")


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


@triton.jit(do_not_specialize=["size", "head", "blocks", "n"])
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
    state as it is. Behind the 16 states there are 16 that have none: a whole warp adds up in one
    instruction."""
    lane = tl.arange(0, 32) % 16
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
        frequencies = read(table + 2 * context, context < tl.where(sound, used, 0), 2)
        sound &= tl.max(frequencies, axis=0) <= 4096

        lane = tl.arange(0, 32)
        states = table + 2 * used + 4 * lane
        state = read(states, lane < tl.where(sound, 16, 0), 4).to(tl.uint32)
        state = tl.where(lane < 16, state, 65536)
        sound &= tl.min(state, axis=0) >= 65536
        data += 12 + 2 * used + 64
        word = tl.full((), 0, tl.int64)
        flag = tl.full((), 1, tl.uint32)
        groups = tl.where(sound, (n + 63) // 64, 0)
        step = tl.arange(0, 4)[:, None]
        place = tl.where(lane[None, :] < 16, 16 * step + lane[None, :], n)
        ahead = load(shared + place, place < n)
        for group in range(0, groups):
            if scales is None:
                s = to_f32(ahead)
            else:
                s = dequantise(ahead, tl.load(scales + group // 2))
            place += 64
            ahead = load(shared + place, place < n)  # arrives while this group is decoded
            f = tl.where(lane == 0, tl.where(flag != 0, after_some, after_none), 0)
            state, flag, word = take_bits(state, f, data, word, words)
            if flag != 0:
                rank = mask_context(s) - first
                known = (rank >= 0) & (rank < used)
                frequency = read(table + 2 * rank, known, 2).to(tl.uint32)
                octets = tl.full((), 0, tl.int64)
                for k in tl.static_range(4):
                    f = tl.sum(tl.where(step == k, frequency, 0), axis=0)
                    state, ones, word = take_bits(state, f, data, word, words)
                    octets |= ones.to(tl.int64) << 16 * k
                byte = 8 * group + tl.arange(0, 8)
                octet = (octets >> 8 * tl.arange(0, 8)).to(tl.uint8)
                tl.store(mask + byte, octet, mask=8 * byte < n)
        sound &= (word == words) & (tl.max((state != 65536).to(tl.int32), axis=0) == 0)
    return sound


@triton.jit(do_not_specialize=["size", "blocks", "n"])
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


def launch(kernel, programs, device, *arguments, **options):
    """On the current stream of the device, and one rounding per operation: nothing is fused."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[programs](*arguments, enable_fp_fusion=False, **options)


def addresses(masks):
    return table_of([mask.data_ptr() for mask in masks], masks[0].device)


def float_bits(x):
    """A float32 value as kernels take it: the interpreter makes float64 of what is denormal, and
    +0 of −0."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


class TritonBackend:
    """backends.Backend."""

    name = "triton"

    def decode(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if not block.n:
                continue
            first, lead = divmod(block.phase, 8)
            aligned_rows = lead == 0 and block.row_length % 8 == 0
            launch(
                decode_kernel, (triton.cdiv(lead + block.n, BLOCK),), block.base.device,
                block.base, block.out, block.mask, block.shared, block.scales,
                float_bits(block.scale), block.row_scales, block.row_length, block.n, first, lead,
                BLOCK=BLOCK, ALIGNED_ROWS=aligned_rows,
                num_warps=4 if aligned_rows else 8,  # a scale of each element's own takes registers
            )  # fmt: skip

    def encode(
        self, base: Any, tasks: Sequence[Any], thresholds: Sequence[float], shared_dtype: Any,
        rule: str = "published", merged: Any = None,
    ) -> Encoded:  # fmt: skip
        n, count, device = base.numel(), len(tasks), base.device
        shared = torch.empty(n, dtype=shared_dtype, device=device)
        scales = None
        if shared_dtype == torch.int8:
            scales = torch.empty(triton.cdiv(n, 128), dtype=torch.float32, device=device)
        size = triton.cdiv(n, 8)
        stride = triton.cdiv(size, 16) * 16  # each mask is aligned
        masks = torch.empty((count, stride), dtype=torch.uint8, device=device)
        programs = triton.cdiv(n, BLOCK)
        counts = torch.empty((programs, 3 * count + 1), dtype=torch.int32, device=device)
        nonfinite = torch.zeros(count + 1, dtype=torch.int32, device=device)
        if n:
            dtypes = {task.dtype for task in tasks}
            dtype = TRITON_DTYPES[dtypes.pop()] if len(dtypes) == 1 else None
            table = table_of([(task.data_ptr(), DTYPES.index(task.dtype), float_bits(threshold))
                              for task, threshold in zip(tasks, thresholds)], device)  # fmt: skip
            launch(
                encode_kernel, (programs,), device,
                base, table, count, merged, shared, scales, masks, stride, counts, nonfinite, n,
                DTYPE=dtype, ALIGNED=all(task.data_ptr() % 16 == 0 for task in tasks),
                RULE=rule, BINS=triton.next_power_of_2(count + 2), BLOCK=BLOCK,
                num_warps=4 if dtype else 8,  # loads of any type take registers
            )  # fmt: skip
        set_bits, published_bits, agreement = counts.sum(0).split([count, count, count + 1])
        return Encoded(shared, scales, [mask[:size] for mask in masks], set_bits, published_bits,
                       agreement, nonfinite)  # fmt: skip

    def sums(self, block: Block, task: Any) -> Any:
        device, units = block.base.device, triton.cdiv(block.n, UNIT)
        sums = torch.empty((units, 3, LANES), dtype=torch.float64, device=device)
        if units:
            launch(
                sums_kernel, (units,), device, block.base, task, block.mask, block.shared,
                block.scales, sums, block.n, block.phase, UNIT=UNIT, num_warps=1,
            )  # fmt: skip
        return sums

    def agreement(self, masks: Sequence[Any], n: int) -> Any:
        device, count, programs = masks[0].device, len(masks), triton.cdiv(n, AGREEMENT_BLOCK)
        agreement = torch.empty((programs, count + 1), dtype=torch.int32, device=device)
        if n:
            launch(
                agreement_kernel, (programs,), device, addresses(masks), count, n, agreement,
                BINS=triton.next_power_of_2(count + 2), BLOCK=AGREEMENT_BLOCK,
            )  # fmt: skip
        return agreement.sum(0)

    def overlap(self, masks: Sequence[Any], n: int) -> Any:
        device, count = masks[0].device, len(masks)
        pairs = torch.zeros((count, count), dtype=torch.int64, device=device)
        if n:
            programs = triton.cdiv(n, 8 * OVERLAP_BYTES), count
            launch(
                overlap_kernel, programs, device, addresses(masks), count, n, pairs,
                BYTES=OVERLAP_BYTES,
            )  # fmt: skip
        return pairs

    def consensus(self, masks: Sequence[Any], n: int, least: int) -> Any:
        device = masks[0].device
        out = torch.empty(triton.cdiv(n, 8), dtype=torch.uint8, device=device)
        if n:
            launch(
                consensus_kernel, (triton.cdiv(n, BLOCK),), device, addresses(masks), len(masks),
                n, least, out, BLOCK=BLOCK,
            )  # fmt: skip
        return out

    def unpack_ternary(
        self, plane: Any, head: int, slots: Any, n: int, mask: Any, signs: Any, status: Any
    ) -> None:
        mask.zero_()
        signs.zero_()
        blocks = triton.cdiv(n, TERNARY_BLOCK)
        if blocks:
            launch(
                unpack_ternary_kernel, (blocks,), plane.device, plane, plane.numel(), head, blocks,
                slots, n, mask, signs, status, BLOCK=TERNARY_BLOCK, num_warps=1,
            )  # fmt: skip

    def unpack_mask(
        self, plane: Any, n: int, shared: Any, scales: Any, mask: Any, status: Any
    ) -> None:
        mask.zero_()
        blocks = triton.cdiv(n, MASK_BLOCK)
        if plane.numel() < 8 * blocks:
            status.fill_(1)
        elif blocks:
            launch(
                unpack_mask_kernel, (blocks,), plane.device, plane, plane.numel(), blocks, shared,
                scales, n, mask, status, BLOCK=MASK_BLOCK, num_warps=1,
            )  # fmt: skip
