"""Masks coded given the shared vector."""

import struct

import numpy as np

from ..errors import FormatError
from .ternary import LEAST

BLOCK, GROUP, STATES = 524288, 64, 16  # elements, elements that share a flag, states
SLOTS = 4096  # a one's frequency and a zero's add up to
CONTEXTS = 512


def contexts(s):
    """Of each element: 0 where s is 0, else 1 + what |s| begins with; CONTEXTS of a NaN."""
    bits = np.abs(s).view(np.uint32)
    return np.where(bits == 0, 0, np.minimum(1 + (bits >> 22), CONTEXTS)).astype(int).tolist()


def frequency(ones, count):
    """Of a one, among so many bits."""
    if ones in (0, count):
        return SLOTS if ones else 0
    return min(max((ones * SLOTS + count // 2) // count, 1), SLOTS - 1)


def code(mask, s):
    """The coded plane of a mask, an array of bools, whose shared vector is s in float32."""
    blocks = [_code_block(mask[at : at + BLOCK], contexts(s[at : at + BLOCK]))
              for at in range(0, mask.size, BLOCK)]
    return np.cumsum([len(b) for b in blocks], dtype=np.uint64).tobytes() + b"".join(blocks)


def _code_block(mask, context):
    if not mask.any():
        return b""
    mask = mask.tolist()
    groups = [range(at, min(at + GROUP, len(mask))) for at in range(0, len(mask), GROUP)]
    flags = [any(mask[i] for i in group) for group in groups]
    coded = [i for group, flag in zip(groups, flags) if flag for i in group]
    before = [True, *flags]
    ones, counts = np.zeros(CONTEXTS, int), np.zeros(CONTEXTS, int)
    np.add.at(counts, [context[i] for i in coded], 1)
    np.add.at(ones, [context[i] for i in coded if mask[i]], 1)
    table = [frequency(*pair) for pair in zip(ones.tolist(), counts.tolist())]
    flag_table = [frequency(sum(f for f, b in zip(flags, before) if b == value),
                            before[:-1].count(value)) for value in (False, True)]
    states, words = [LEAST] * STATES, []

    def put(state, share, bit):
        x = states[state]
        width, start = (share, 0) if bit else (SLOTS - share, share)
        if x >= width << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        states[state] = (x // width << 12) + x % width + start

    for g in reversed(range(len(groups))):
        for i in reversed(groups[g] if flags[g] else ()):
            put(i % STATES, table[context[i]], mask[i])
        put(0, flag_table[before[g]], flags[g])
    used = [c for c in np.flatnonzero(counts).tolist() if c]
    first, end = used[0], used[-1] + 1
    return struct.pack(f"<I4H{end - first}H{STATES}I{len(words)}H", len(words), first, end - first,
                       *flag_table, *table[first:end], *states, *reversed(words))


def decode(plane, s):
    """The mask, an array of bools, that a plane holds."""
    count = -(-s.size // BLOCK)
    _check(len(plane) >= 8 * count)
    ends = [8 * count, *(8 * count + end for end in struct.unpack_from(f"<{count}Q", plane))]
    _check(ends[-1] == len(plane) and ends == sorted(ends))
    mask = np.zeros(s.size, bool)
    for b in range(count):
        if ends[b] < ends[b + 1]:
            part = slice(b * BLOCK, (b + 1) * BLOCK)
            _decode_block(plane[ends[b] : ends[b + 1]], contexts(s[part]), mask[part])
    return mask


def _decode_block(block, context, out):
    _check(len(block) >= 12)
    word_count, first, used, *flag_table = struct.unpack_from("<I4H", block)
    _check(0 < first <= first + used <= CONTEXTS)
    _check(len(block) == 12 + 2 * used + 4 * STATES + 2 * word_count)
    values = struct.unpack_from(f"<{used}H{STATES}I{word_count}H", block, 12)
    table = [0] * first + [*values[:used]] + [0] * (CONTEXTS + 1 - first - used)
    states, words = [*values[used : used + STATES]], iter(values[used + STATES :])
    _check(max(*table, *flag_table) <= SLOTS and min(states) >= LEAST)

    def take(state, share):
        x = states[state]
        slot = x % SLOTS
        bit = slot < share
        width, start = (share, 0) if bit else (SLOTS - share, share)
        x = width * (x // SLOTS) + slot - start
        if x < LEAST:
            word = next(words, None)
            _check(word is not None)
            x = x << 16 | word
        states[state] = x
        return bit

    flag = True
    for at in range(0, len(context), GROUP):
        flag = take(0, flag_table[flag])
        for i in range(at, min(at + GROUP, len(context)) if flag else at):
            out[i] = take(i % STATES, table[context[i]])
    _check(states == [LEAST] * STATES and next(words, None) is None)


def _check(ok):
    if not ok:
        raise FormatError("no soundly coded mask")
