"""Every formula of docs/format.md on NumPy arrays: hash, shared vector, masks, statistics."""


import ml_dtypes
import numpy as np

SUM_BLOCK = 65536  # stored bytes per checksum
UNIT = 524288  # elements per statistics unit
SCALE_BLOCK = 128  # elements per scale of an int8 shared vector
LANES = 16  # float64 partial sums per statistic
MOST = 9  # unit gain, in least-squares scales
NEAR = 0.85  # share of the best cosine that adapted masks must have
SAMPLE_BLOCK, SAMPLE_SIZE, FEW = 4096, 65536, 1024  # elements
RATIOS = ((np.arange(96, dtype=np.uint32) + np.uint32(4 * 107) << 21) - (1 << 20)).view(np.float32)

DTYPES = {number: np.dtype(dtype) for number, dtype in {
    1: np.float32, 2: np.float16, 3: ml_dtypes.bfloat16,
    16: np.int8, 17: np.uint8, 18: np.int16, 19: np.uint16, 20: np.int32, 21: np.uint32,
    22: np.int64, 23: np.uint64, 24: np.bool_, 32: np.float64,
    33: ml_dtypes.float8_e4m3fn, 34: ml_dtypes.float8_e5m2, 35: ml_dtypes.float8_e4m3fnuz,
    36: ml_dtypes.float8_e5m2fnuz, 37: ml_dtypes.float8_e8m0fnu, 38: np.complex64,
}.items()}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
FLOAT32, FLOAT16, BFLOAT16, INT8 = DTYPES[1], DTYPES[2], DTYPES[3], DTYPES[16]
ARITHMETIC = (FLOAT32, FLOAT16, BFLOAT16)


# The hash: XXH3-64 of inputs longer than 240 bytes, seed 0, default secret.

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e")
P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
BITS64 = 0xFFFFFFFFFFFFFFFF


def _secret(offset):
    return np.frombuffer(SECRET, "<u8", 8, offset)


STRIPE_SECRETS = np.stack([_secret(8 * i) for i in range(16)])


def _accumulate(words, secrets):
    """What stripes of 8 words add to the 8 accumulators: both 32-bit halves of word ^ secret
    multiplied, and the neighbour's word itself."""
    keyed = words ^ secrets
    product = (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))
    return (product + words[:, [1, 0, 3, 2, 5, 4, 7, 6]]).sum(axis=0, dtype=np.uint64)


def hash64(data: bytes) -> int:
    """XXH3-64 (seed 0, default secret) of data, extended by zero bytes to 256 where shorter."""
    data = bytes(data).ljust(256, b"\0")
    acc = np.array([P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1], np.uint64)
    blocks, rest = divmod(len(data) - 1, 1024)
    words = np.frombuffer(data, "<u8", 128 * blocks).reshape(blocks, 16, 8)
    for block in words:
        acc += _accumulate(block, STRIPE_SECRETS)
        acc = (acc ^ (acc >> np.uint64(47)) ^ _secret(128)) * np.uint64(P32_1)
    stripes = rest // 64
    words = np.frombuffer(data, "<u8", 8 * stripes, 1024 * blocks).reshape(stripes, 8)
    acc += _accumulate(words, STRIPE_SECRETS[:stripes])
    last = np.frombuffer(data, "<u8", 8, len(data) - 64).reshape(1, 8)
    acc += _accumulate(last, _secret(121))

    keyed = [int(x) for x in acc ^ _secret(11)]
    h = len(data) * P64_1
    for low, high in zip(keyed[0::2], keyed[1::2]):
        product = low * high
        h += (product & BITS64) ^ (product >> 64)
    h &= BITS64
    h ^= h >> 37
    h = h * 0x165667919E3779F9 & BITS64
    return h ^ h >> 32


# The formulas. All float32, one rounding per operation; the callers silence overflow warnings.


def to_float32(array):
    """The values as float32: exact for every arithmetic type."""
    return np.asarray(array).astype(np.float32)


def round_to(x, dtype):
    """Float32 to an arithmetic type: to nearest, ties to even; what is too large is an infinity."""
    return x.astype(dtype)


def add_up(vectors):
    """acc = +0, then acc + v for each in order."""
    acc = np.float32(0)
    for vector in vectors:
        acc = acc + vector
    return acc


def finite_or_zero(acc):
    """The multi-task vector as it is to be stored: what is not finite becomes +0."""
    return np.where(np.isfinite(acc), acc, np.float32(0))


def trim(tau, cut):
    return np.where(np.abs(tau) >= cut, tau, np.float32(0))


def largest_cut(magnitudes, density):
    """The smallest of the density * d largest of d magnitudes, as the code of TIES finds it: the
    element of rank d - floor(density * d), from 1."""
    kept = int(magnitudes.size * density)
    if kept >= magnitudes.size:
        return np.float32(0)
    return np.sort(magnitudes)[magnitudes.size - kept - 1]


def ties(vectors, cuts, majority):
    """The trimmed vectors, summed where they have the sign of their sum; a sum of zero, and
    nothing else, has the sign of the majority."""
    trimmed = [trim(tau, cut) for tau, cut in zip(vectors, cuts)]
    votes = add_up(trimmed)
    positive = (votes > 0) | ((votes == 0) & majority)
    return add_up(np.where(np.where(positive, v > 0, v < 0), v, np.float32(0)) for v in trimmed)


def store_shared(acc, dtype):
    """(stored, scales or None): saturated to the type; int8 with scale = max|acc| / 127 per block
    and q = clamp(round(acc / scale), -127, 127), 0 where the scale is 0."""
    if dtype != INT8:
        largest = np.float32(ml_dtypes.finfo(dtype).max)
        return round_to(np.clip(acc, -largest, largest), dtype), None
    blocks = np.zeros((-(-acc.size // SCALE_BLOCK), SCALE_BLOCK), np.float32)
    blocks.reshape(-1)[: acc.size] = acc
    scales = np.abs(blocks).max(axis=1) / np.float32(127)
    divisor = np.where(scales == 0, np.float32(1), scales)[:, None]
    q = np.where(scales[:, None] == 0, 0, np.clip(np.rint(blocks / divisor), -127, 127))
    return q.astype(np.int8).reshape(-1)[: acc.size], scales


def load_shared(stored, scales):
    """s as a decoder sees it: int8 is q * scale of its block."""
    s = to_float32(stored)
    return s if scales is None else s * np.repeat(scales, SCALE_BLOCK)[: s.size]


def is_active(base, task, s, threshold):
    """The published rule: |b - t| > lambda * |(b + s) - t|."""
    return np.abs(base - task) > np.float32(threshold) * np.abs((base + s) - task)


def follows(tau, s, factor):
    """The adapted mask: |tau| > |factor * s - tau|, or but for rounding tau / s > factor / 2."""
    return np.abs(tau) > np.abs(np.float32(factor) * s - tau)


def sampled(n):
    """The indices of a tensor's elements that factors are found from: blocks of SAMPLE_BLOCK, far
    enough apart to be about SAMPLE_SIZE elements."""
    stride = max(1, n // SAMPLE_SIZE) * SAMPLE_BLOCK
    return np.concatenate([np.arange(at, min(at + SAMPLE_BLOCK, n)) for at in range(0, n, stride)])


def adapted_factor(tau, s):
    """The factor from a sample, or from all elements where few of it have a ratio that counts."""
    index = sampled(tau.size)
    counted = (s[index] != 0) & (tau[index] / s[index] >= RATIOS[0])
    return ratio_factor(tau, s) if counted.sum() < FEW else ratio_factor(tau[index], s[index])


def ratio_factor(tau, s):
    """Twice the greatest ratio with which the cosine of m∘s and tau is NEAR the best, m being the
    mask tau / s >= ratio. Ratios lie in the middle of those numbers with two bits of fraction, in
    terms of their bits; the first is below 2^-20."""
    ratio = tau / s
    kept = (ratio >= RATIOS[0]) & (s != 0)
    tau, s, ratio = tau[kept].astype(np.float64), s[kept].astype(np.float64), ratio[kept]
    bins = np.searchsorted(RATIOS, ratio, "right") - 1
    dot, approx_sq = (
        np.add.accumulate(np.bincount(bins, products, len(RATIOS))[::-1])[::-1]
        for products in (tau * s, s * s))
    cosine = np.where(approx_sq > 0, dot / np.sqrt(approx_sq), 0)
    if not cosine.max() > 0:
        return np.float32(1)
    return 2 * RATIOS[np.flatnonzero(cosine >= NEAR * cosine.max())[-1]]


def is_large(base, task, cut):
    """The magnitude mask: |t - b| >= cut."""
    return np.abs(task - base) >= cut


def agreement(masks):
    """The elements on which exactly 0, 1, …, T of T masks are set."""
    return np.bincount(np.sum(masks, axis=0, dtype=np.int64), minlength=len(masks) + 1)


def consensus(masks, least):
    """The mask of the elements on which `least` masks or more are set."""
    return np.sum(masks, axis=0, dtype=np.int64) >= least


def overlap(masks):
    """Mask × mask: the elements on which both are set."""
    return np.array([[np.count_nonzero(a & b) for b in masks] for a in masks])


def decode_mask(base, s, mask, scale):
    """m ? b + g * s : b. A select: what is not active keeps the base's own value, -0 included."""
    return np.where(mask, base + scale * s, base)


def segment_sums(tau, approx):
    """The sums of tau², tau·a, a² over a segment, in float64: element j adds to lane j mod 16,
    products exact; then lanes l and l + 8 are added, l and l + 4, l and l + 2, l and l + 1."""
    tau, approx = tau.astype(np.float64), approx.astype(np.float64)
    dots = np.where(approx == 0, 0, tau * approx)  # an infinite tau times 0 counts nothing
    totals = []
    for products in (tau * tau, dots, approx * approx):
        products = np.append(products, np.zeros(-products.size % LANES)).reshape(-1, LANES)
        lanes = np.add.accumulate(products, axis=0)[-1]  # one after the other, never pairwise
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        totals.append(lanes[0])
    return np.array(totals)


def row_sums(tau, approx, rows):
    """The sums of each of `rows` equal parts: of its segments, cut where units begin, in order."""
    size, sums = tau.size // rows, np.zeros((rows, 3))
    for row in range(rows):
        start, end = row * size, (row + 1) * size
        while start < end:
            stop = min(end, (start // UNIT + 1) * UNIT)
            sums[row] += segment_sums(tau[start:stop], approx[start:stop])
            start = stop
    return sums


def unit_gain(sums):
    """g = sum tau² / sum tau·a, at most MOST times the least-squares scale, as float32; 1 where
    that is not finite and normal. 0 where a does not follow tau at all."""
    tau_sq, dot, approx_sq = sums
    if approx_sq > 0 and not dot > 0:
        return np.float32(0)
    g = np.float32(min(tau_sq / dot, MOST * (dot / approx_sq)))
    return g if np.finfo(np.float32).tiny <= g < np.inf else np.float32(1)


def row_count(shape):
    return shape[0] if len(shape) > 1 else 1
