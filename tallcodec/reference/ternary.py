"""Ternary planes: which elements of a task vector are kept, with what scale, and their coding."""

import math
import struct

import numpy as np

from ..errors import ArgumentError, FormatError
from .formulas import FLOAT32, MOST, UNIT, round_to, row_sums, segment_sums

BLOCK = 262144  # elements
SLOTS = 2048  # what a plane's frequencies add up to
SYMBOLS, BITMAP = 68, 9  # of gaps; bytes that say which a plane has
LEAST = 1 << 16  # a state between symbols
BIN_SHIFT = 19  # of the bits of a magnitude: four bits of its fraction are left
OCTAVES, STEPS = 2 << 23, 16  # of the search for a scale
SAMPLE, CHUNK = 1 << 15, 16384  # elements it is made on, and how many are read together
SCATTER = 2654435761  # the golden section of 2^32: chunks by no pattern that a tensor may have
MOST_KEPT, EQUAL = 0.9, 0.95  # a share of a tensor; the squared cosine of nearly equal magnitudes


# The coding of gaps.


def split(gap):
    """(symbol, extra bits, their value) of a gap: the symbol is what gap + 4 begins with."""
    extra = (gap + 4).bit_length() - 3
    return 4 * extra + (gap + 4 >> extra) % 4, extra, (gap + 4) % (1 << extra)


def pack_bits(fields):
    """(value, bits) pairs, the first in the least significant bits of the first byte."""
    bits = [value >> i & 1 for value, count in fields for i in range(count)]
    return np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()


def frequencies(counts):
    """Counts by symbol as shares of SLOTS: rounded, not to 0; the commonest takes what is left."""
    total = sum(counts)
    shares = [max(1, (c * SLOTS + total // 2) // total) if c else 0 for c in counts]
    if total:
        shares[shares.index(max(shares))] += SLOTS - sum(shares)
    return shares


def code(signs):
    """The coded plane of a vector of −1, 0, 1."""
    blocks = []
    for at in range(0, signs.size, BLOCK):
        block = signs[at : at + BLOCK]
        kept = np.flatnonzero(block)
        gaps = np.diff(kept, prepend=-1) - 1
        blocks.append(([split(int(gap)) for gap in gaps], (block[kept] < 0).tolist()))
    counts = [0] * SYMBOLS
    for symbols, _ in blocks:
        for symbol, _, _ in symbols:
            counts[symbol] += 1
    shares = frequencies(counts)
    bodies = [_code_block(symbols, negative, shares) for symbols, negative in blocks]
    ends = np.cumsum([len(body) for body in bodies], dtype=np.uint64).tobytes()
    bitmap = pack_bits([(share > 0, 1) for share in shares]).ljust(BITMAP, b"\0")
    table = pack_bits([(share - 1, 11) for share in shares if share])
    return ends + bitmap + table + b"".join(bodies)


def raw(signs):
    """The same vector as it is used: where it is not 0, and where it is −1."""
    planes = signs != 0, signs < 0
    return b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in planes)


def raw_signs(plane, n):
    """The vector that a raw plane holds."""
    bits = np.frombuffer(plane, np.uint8).reshape(2, -1)
    kept, negative = np.unpackbits(bits, axis=1, count=n, bitorder="little").astype(np.int8)
    return kept * (1 - 2 * negative)


def _code_block(symbols, negative, shares):
    if not symbols:
        return b""
    starts = np.cumsum([0, *shares]).tolist()
    states, words = [LEAST, LEAST], []
    for i in reversed(range(len(symbols))):
        symbol, x = symbols[i][0], states[i % 2]
        if x >= shares[symbol] << 21:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % 2] = (x // shares[symbol] << 11) + x % shares[symbol] + starts[symbol]
    head = struct.pack("<4I", len(symbols), len(words), *states)
    extras = pack_bits([(value, extra) for _, extra, value in symbols])
    return (head + struct.pack(f"<{len(words)}H", *reversed(words)) + extras
            + pack_bits([(bit, 1) for bit in negative]))


def decode(plane, n):
    """The vector of −1, 0, 1 that a plane holds."""
    blocks = -(-n // BLOCK)
    _check(len(plane) >= 8 * blocks + BITMAP)
    ends = struct.unpack_from(f"<{blocks}Q", plane)
    present = [s for s in range(8 * BITMAP) if plane[8 * blocks + s // 8] >> s % 8 & 1]
    head = 8 * blocks + BITMAP + -(-11 * len(present) // 8)
    _check(len(plane) >= head and max(present, default=0) < SYMBOLS)
    table = int.from_bytes(plane[8 * blocks + BITMAP : head], "little")
    shares = {s: (table >> 11 * i & 2047) + 1 for i, s in enumerate(present)}
    slots = [(s, i) for s, share in shares.items() for i in range(share)]
    _check(len(slots) == SLOTS if present else len(plane) == head)
    ends = [head, *(head + end for end in ends)]
    _check(ends[-1] == len(plane) and ends == sorted(ends))
    signs = np.zeros(n, np.int8)
    for b in range(blocks):
        if ends[b] < ends[b + 1]:
            _decode_block(plane[ends[b] : ends[b + 1]], slots, shares,
                          signs[b * BLOCK : (b + 1) * BLOCK])
    return signs


def _decode_block(block, slots, shares, out):
    _check(len(block) >= 16)
    count, word_count, *states = struct.unpack_from("<4I", block)
    extras_at, signs_at = 16 + 2 * word_count, len(block) - -(-count // 8)
    _check(0 < count <= out.size and extras_at <= signs_at and min(states) >= LEAST)
    words = iter(struct.unpack_from(f"<{word_count}H", block, 16))
    extras = int.from_bytes(block[extras_at:signs_at], "little")
    used, position = 0, -1
    for i in range(count):
        x = states[i % 2]
        symbol, rank = slots[x % SLOTS]
        x = shares[symbol] * (x // SLOTS) + rank
        if x < LEAST:
            word = next(words, None)
            _check(word is not None)
            x = x << 16 | word
        states[i % 2] = x
        extra = symbol // 4
        position += 1 + ((4 + symbol % 4) << extra) - 4 + (extras >> used) % (1 << extra)
        used += extra
        _check(position < out.size)
        out[position] = -1 if block[signs_at + i // 8] >> i % 8 & 1 else 1
    left = 8 * (signs_at - extras_at) - used
    _check(states == [LEAST, LEAST] and next(words, None) is None and 0 <= left < 8)
    _check(0 <= 8 * (signs_at - extras_at) - used < 8)


def _check(ok):
    if not ok:
        raise FormatError("no sound ternary plane")


# What is kept.


def log2(x):
    """From additions and multiplications alone, as docs/format.md has it."""
    m, exponent = math.frexp(x)
    if m < 0.70710678118654752:
        m, exponent = 2 * m, exponent - 1
    t = (m - 1) / (m + 1)
    total = 0.0
    for k in range(21, 0, -2):
        total = total * (t * t) + 1.0 / k
    return exponent + t * total * 2.8853900817779268


def entropy(n, kept):
    """Bits of a plane of n elements of which `kept` are not 0."""
    n, kept = float(n), float(kept)
    bits = kept + kept * log2(n / kept)
    return bits + (n - kept) * log2(n / (n - kept)) if kept < n else bits


def bins_of(tau):
    """(bits, count, Σ |τ|) of the bins of the magnitudes that are not 0, the largest first."""
    bits = np.abs(tau).view(np.uint32)
    bins = bits[bits > 0] >> BIN_SHIFT
    counts = np.bincount(bins)
    return [(int(b), int(counts[b]), _exact_sum(bits[bits >> BIN_SHIFT == b]))
            for b in np.flatnonzero(counts)[::-1]]


def _exact_sum(bits):
    """The sum of magnitudes of one bin, by their bits: of whole numbers, then rounded once."""
    if not bits.size:
        return 0.0
    exponent = int(bits[0] >> 23)
    significands = (bits & 0x7FFFFF) | (0x800000 if exponent else 0)
    return math.ldexp(float(int(significands.sum(dtype=np.uint64))), max(exponent, 1) - 150)


def hull(tau):
    """(kept, bits, error) on the lower convex hull: for every bin of the magnitudes, the largest
    first, where one more than doubles what is kept for every doubling in it, and for the most
    that is kept."""
    tau_sq = row_sums(tau, np.zeros_like(tau), 1)[0][0]
    candidates, kept, total, most = [], 0, 0.0, int(MOST_KEPT * tau.size)
    for _, count, bin_sum in bins_of(tau):
        mean, k = bin_sum / float(count), max(1, 2 * kept)
        while k < kept + count and k < most:
            candidates.append((k, total + float(k - kept) * mean))
            k *= 2
        if kept < most < kept + count:
            candidates.append((most, total + float(most - kept) * mean))
        kept, total = kept + count, total + bin_sum
        candidates.append((kept, total))
    points = []
    for kept, total in candidates:
        inverse = float(tau_sq) * float(kept) / (total * total)
        error = math.sqrt(tau_sq) * (inverse - 1)
        point = kept, entropy(tau.size, kept), error
        if points and (not error < points[-1][2]
                       or (kept > MOST_KEPT * tau.size and not EQUAL * inverse < 1)):
            continue
        while points and points[-1][1] >= point[1]:
            points.pop()
        while len(points) > 1 and not (
                (points[-1][2] - points[-2][2]) * (point[1] - points[-2][1])
                < (point[2] - points[-2][2]) * (points[-1][1] - points[-2][1])):
            points.pop()
        points.append(point)
    return points


def share(hulls, sizes, elements, bits, density, least_bits=False):
    """How many elements each tensor, of these sizes, keeps: steps along the hulls in order of what
    they gain."""
    price_of = (lambda p: p[1]) if bits else (lambda p: float(p[0]))
    budget = bits * elements if bits else math.floor(density * elements)
    kept = [points[0][0] if points else 0 for points in hulls]
    spent = 0.0
    for points in hulls:
        spent += price_of(points[0]) if points else 0.0
    if spent > budget and not (bits and least_bits):
        raise ArgumentError(f"{bits} bits, or a density of {density}, cannot be met")
    steps = [((a[2] - b[2]) / (b[1] - a[1]), i, a, b)
             for i, points in enumerate(hulls) for a, b in zip(points, points[1:])]
    for _, i, a, b in sorted(steps, key=lambda step: -step[0]):
        price = price_of(b) - price_of(a)
        if spent + price > budget:
            if spent > budget or (bits and 3 * b[0] > 2 * sizes[i]):
                break
            kept[i] = a[0] + int(float(b[0] - a[0]) * ((budget - spent) / price))
            break
        spent, kept[i] = spent + price, b[0]
    return kept


def cut_of(tau, kept):
    """(bits, ties, equal, A): kept are the magnitudes of more than these bits and so many of those
    that equal them; A is the sum of the former."""
    total, left = 0.0, kept
    for number, count, bin_sum in bins_of(tau):
        if count == left:
            return max(number << BIN_SHIFT, 1) - 1, 0, 1, total + bin_sum
        if count > left:
            bits = np.abs(tau).view(np.uint32)
            bits = np.sort(bits[(bits >> BIN_SHIFT == number) & (bits > 0)])[::-1]
            cut = bits[left - 1]
            above = bits[bits > cut]
            ties, equal = left - above.size, int((bits == cut).sum())
            return int(cut), ties, equal, total + _exact_sum(above)
        total, left = total + bin_sum, left - count
    return 0x7F800000, 0, 1, 0.0


def select(tau, cut, ties, equal, part=UNIT):
    """Which elements are kept: of those that equal the cut, evenly spread, `ties` of `equal` in
    every part of the tensor, rounded down."""
    bits = np.abs(tau).view(np.uint32)
    kept = bits > cut
    for at in range(0, tau.size, part):
        same = at + np.flatnonzero(bits[at : at + part] == cut)
        due = np.arange(same.size + 1) * ties // equal
        kept[same[due[1:] > due[:-1]]] = True
    return kept


def encode(base, task, kept):
    """(vector of −1, 0, 1; fields of the entry) of one tensor that keeps so many elements."""
    b = base.ravel().astype(np.float32)
    tau = task.ravel().astype(np.float32) - b
    tau_sq = row_sums(tau, np.zeros_like(tau), 1)[0][0]
    cut, ties, equal, above = cut_of(tau, kept)
    chosen = select(tau, cut, ties, equal)
    signs = np.where(chosen, np.where(tau < 0, -1, 1), 0).astype(np.int8)

    def sums(elements, scale, dtype=FLOAT32):
        """Σ τ·τ̂ and Σ τ̂² over elements, by number."""
        step = np.where(tau[elements] < 0, -np.float32(scale), np.float32(scale))
        if dtype != FLOAT32:
            step = round_to(b[elements] + step, dtype).astype(np.float32) - b[elements]
        return segment_sums(tau[elements], step)[1:] if elements.size else np.zeros(2)

    scale = np.float32(1)
    dot = above + ties * float(_float(cut)) if ties else above
    if kept:
        largest = float(np.finfo(np.float32).max)
        scale = np.float32(min(tau_sq / dot, MOST * (dot / float(kept)), largest))
    count = int(chosen.sum())
    spread = count - int((np.abs(tau).view(np.uint32) > cut).sum())
    dot = above + spread * float(_float(cut)) if ties else above
    g = float(scale)
    total = g * dot, (g * float(count)) * g
    if task.dtype != FLOAT32 and kept:
        near = select(tau, cut, ties, equal, CHUNK)
        share = (1 << 32) // max(1, kept // SAMPLE)
        sample = np.concatenate([at + np.flatnonzero(near[at : at + CHUNK])
                                 for at in range(0, tau.size, CHUNK)
                                 if at // CHUNK * SCATTER % (1 << 32) < share])
        if sample.size:
            wanted = g * sums(sample, 1)[0]
            scale = corrected(lambda g: sums(sample, g, task.dtype)[0], scale, wanted)
    if task.dtype != FLOAT32:
        total = np.zeros(2)
        for at in range(0, tau.size, UNIT):
            total += sums(at + np.flatnonzero(chosen[at : at + UNIT]), scale, task.dtype)
    fields = {"scale": scale, "set_bits": count, "published_bits": count,
              "tau_sq": tau_sq, "dot": total[0], "approx_sq": total[1]}
    return signs, fields


def corrected(dot, scale, wanted):
    """The scale whose rounded checkpoint has this Σ τ·τ̂, or comes near it."""
    middle = int(np.float32(scale).view(np.uint32))
    low, high = max(0, middle - OCTAVES), min(middle + OCTAVES, 0x7F7FFFFF)
    below, above = dot(_float(low)), dot(_float(high))
    for _ in range(STEPS):
        half = low + (high - low) // 2
        found = dot(_float(half))
        if found < wanted:
            low, below = half, found
        else:
            high, above = half, found
    return _float(low if wanted - below < above - wanted else high)


def _float(bits):
    return np.uint32(bits).view(np.float32)
