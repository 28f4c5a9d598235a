"""Checkpoints to bytes."""

import struct
from collections import namedtuple
from functools import partial

import numpy as np
import zstandard

from ..errors import ArgumentError, CheckpointError
from . import conditional, ternary
from .formulas import (
    ARITHMETIC,
    NEAR,
    NUMBERS,
    adapted_factor,
    add_up,
    finite_or_zero,
    follows,
    hash64,
    is_active,
    is_large,
    largest_cut,
    load_shared,
    row_count,
    row_sums,
    store_shared,
    ties,
    to_float32,
    trim,
    unit_gain,
)
from .records import (
    ABSENT,
    ADAPTED,
    AS_BASE,
    AS_IS,
    BASE,
    CONDITIONAL,
    EMBEDDED,
    ENTRY,
    EXTERNAL,
    FILE,
    FILE_RECORD,
    FREE,
    GAPS,
    HEADER,
    HEADER_SIZE,
    INDEX,
    MAGIC,
    MAGNITUDE,
    MASK,
    MASKED,
    MAX_RANK,
    MERGES,
    META,
    METHODS,
    NONE,
    NONFINITE_BASE,
    NONFINITE_TASK,
    NOT_ARITHMETIC,
    NOT_IN_BASE,
    OTHER_SHAPE,
    PLANE,
    RAW,
    REFERENCED,
    SCALE_MODES,
    SCALES,
    SCOPE_BASE,
    SCOPE_FILE,
    SHARED,
    SLOT,
    SPARSE,
    TASK,
    TENSOR,
    TERNARY_PLANE,
    VERBATIM,
    VERSION,
    ZSTD,
    align64,
    plane_sums,
)


def write(base, tasks, *, thresholds=None, merge="task-arithmetic", method="tall", density=0.2,
          bits=None, least_bits=False,
          scale="none", shared_dtype="auto", base_storage="embed", coding="auto",
          metadata=None, base_metadata=None, task_metadata=None, base_files=None, task_files=None,
          writer="tallcodec 0.1.0", force_zstd=None) -> bytes:
    """A file of `tasks` (name -> checkpoint) coded against `base`; a checkpoint is name -> array.

    method: one, or one by task name. thresholds: lambda by task name, for method "tall". density:
    the share of each task vector that merge "ties" and method "magnitude" keep, and "ternary"
    where there are no bits: bits per parameter by task name, too few being the least with
    least_bits. metadata, base_metadata: str -> str;
    base_files: name -> bytes; task_metadata, task_files: such dicts by task name.
    coding: "raw", "entropy", or "auto": masks raw, ternary planes not.
    force_zstd: True compresses every verbatim and file plane, False none, None those that gain.
    """
    if scale not in SCALE_MODES or base_storage not in ("embed", "reference"):
        raise ArgumentError(f"unknown scale {scale!r} or base storage {base_storage!r}")
    for array in (a for state in (base, *tasks.values()) for a in state.values()):
        if array.dtype not in NUMBERS or array.ndim > MAX_RANK:
            raise CheckpointError(f"an array of {array.dtype} {array.shape} has no place in a file")

    out, states, mode = _Writer(force_zstd), list(tasks.values()), SCALE_MODES[scale]
    names = sorted({*base, *(name for state in states for name in state)})
    aliases = _aliases(names, base, states)
    numbers = [i for i in range(len(names)) if i not in aliases]
    methods = method if isinstance(method, dict) else dict.fromkeys(tasks, method)
    method = next((m for m in methods.values() if m != "ternary"), "ternary")
    codings = {(k, i): _classify(base, state, names[i])
               for k, state in enumerate(states) for i in numbers}
    for k, task in enumerate(tasks):
        codings |= {(k, i): (SPARSE, 0) for i in numbers
                    if methods[task] == "ternary" and codings[k, i][0] == MASKED}

    # Who of the candidates for a mask gets one.
    candidates, coded = {}, {}
    for i in numbers:
        candidates[i] = [k for k in range(len(states)) if codings[k, i][0] == MASKED]
        if not candidates[i]:
            continue
        b = base[names[i]]
        finite = {k: _is_finite(b) and _is_finite(states[k][names[i]]) for k in candidates[i]}
        reason = NONFINITE_TASK if _is_finite(b) else NONFINITE_BASE
        codings |= {(k, i): (AS_IS, reason) for k in candidates[i] if not finite[k]}
        coded[i] = {k: states[k][names[i]] for k in candidates[i] if finite[k]}

    # The values.
    cuts, majority = None, False
    if merge == "ties" or method == "magnitude":
        with np.errstate(all="ignore"):
            cuts, majority = _survey(base, names, numbers, coded, codings, len(states), density)
    bits = bits or {}
    thresholds = [
        bits.get(task, 0) if methods[task] == "ternary" else
        thresholds[task] if method == "tall" else cuts[k] if method == "magnitude" else NEAR
        for k, task in enumerate(tasks)]
    sparse = {}
    for k, task in enumerate(tasks):
        if methods[task] == "ternary":
            with np.errstate(all="ignore"):
                sparse |= _sparsify(k, base, states[k], names, codings, bits.get(task, 0), density,
                                    least_bits)
    encoded, masks = {}, {}
    for i in coded:
        b = base[names[i]]
        dtype = b.dtype if shared_dtype == "auto" else np.dtype(shared_dtype)
        averaged = sum(codings[k, i][0] in (AS_BASE, MASKED) for k, task in enumerate(tasks)
                       if methods[task] != "ternary")
        merged = partial(_merge, merge, averaged=averaged, cuts=cuts, majority=majority)
        encoded[i] = _encode(b, coded[i], thresholds, dtype, mode, merged, METHODS[method])
        unused = bytes(-(-b.size // 8)), bytes(4 * row_count(b.shape) * (mode == 2)), {}
        masks |= {(k, i): encoded[i].masks.get(k, unused) for k in candidates[i]
                  if coding != "entropy" or k in encoded[i].masks}

    # The planes, in the order of the file.
    no_planes = {"base_plane": NONE, "shared_plane": NONE, "scales_plane": NONE}
    tensors = [{"alias": aliases.get(i, NONE), **no_planes} for i in range(len(names))]
    entries = {key: {"coding": kind, "reason": reason, "plane": NONE, "scales_plane": NONE}
               for key, (kind, reason) in codings.items()}
    in_base = [i for i in numbers if names[i] in base]
    if base_storage == "embed":
        for i in in_base:
            tensors[i]["base_plane"] = out.plane(BASE, base[names[i]].tobytes())
    for i, e in encoded.items():
        tensors[i]["shared_plane"] = out.plane(SHARED, e.shared, bool(e.masks))
        tensors[i]["scales_plane"] = out.plane(SCALES, e.scales, bool(e.masks))
    for (k, i), (mask, row_scales, statistics) in sorted(masks.items()):
        used = codings[k, i][0] == MASKED
        entries[k, i]["plane"] = out.mask(mask, encoded[i].s, used, coding == "entropy")
        entries[k, i]["scales_plane"] = out.plane(SCALES, row_scales, used)
        entries[k, i] |= statistics
    for (k, i), (signs, fields) in sparse.items():
        entries[k, i] |= {**fields, "plane": out.ternary(signs, coding != "raw")}
    for (k, i), (kind, _) in codings.items():
        if kind == AS_IS:
            entries[k, i]["plane"] = out.compressed(VERBATIM, states[k][names[i]].tobytes())
    scopes = [SCOPE_BASE, *range(len(tasks))]
    files, file_planes = [], {b"": NONE}
    for scope, found in zip(scopes, [base_files or {}, *_by_task(task_files, tasks)]):
        for name, data in sorted(found.items()):
            if data not in file_planes:
                file_planes[data] = out.compressed(FILE, data)
            files.append((scope, file_planes[data], name))
    if base_storage == "reference":
        for i in in_base:
            tensors[i]["base_plane"] = out.external(base[names[i]].tobytes())

    # The index. Strings, dims and counts are numbered as the records that name them are made.
    head = {"writer": out.string(writer), "merge": MERGES[merge], "scale": mode,
            "base_storage": EMBEDDED if base_storage == "embed" else REFERENCED}
    index = []
    for i, t in enumerate(tensors):
        t["name"] = out.string(names[i])
        if names[i] in base:
            b = base[names[i]]
            t |= {"in_base": 1, "dtype": NUMBERS[b.dtype], "rank": b.ndim, "dims": out.dims_of(b)}
        if i in encoded and encoded[i].masks:
            counts = encoded[i].agreement
            t |= {"shared_dtype": encoded[i].dtype, "first_count": len(out.counts),
                  "counts": len(counts)}
            out.counts += counts
        index.append(TENSOR.pack(**t))
    for task, threshold in zip(tasks, thresholds):
        index.append(TASK.pack(name=out.string(task), threshold=threshold,
                               method=METHODS[methods[task]]))
    for k, state in enumerate(states):
        for i, name in enumerate(names):
            e = entries.get((k, i), {})  # an alias has an entry of zeros
            if e and e["coding"] != ABSENT:
                array = state[name]
                e = {"scale": 1, "dtype": NUMBERS[array.dtype], "rank": array.ndim, **e}
                e["dims"] = out.dims_of(array) if e["coding"] == AS_IS else tensors[i]["dims"]
            index.append(ENTRY.pack(**e))
    index += [*out.planes, *(FREE.pack(offset=o, size=n) for o, n in out.free)]
    index += [FILE_RECORD.pack(scope=scope, plane=plane, name=out.string(name))
              for scope, plane, name in files]
    metas = [metadata or {}, base_metadata or {}, *_by_task(task_metadata, tasks)]
    metas = [(scope, key, value) for scope, found in zip([SCOPE_FILE, *scopes], metas)
             for key, value in sorted(found.items())]
    index += [META.pack(scope=scope, key=out.string(key), value=out.string(value))
              for scope, key, value in metas]
    index += [struct.pack(f"<{len(a)}Q", *a) for a in (out.dims, out.sums, out.counts)]
    head = INDEX.pack(
        tensors=len(names), tasks=len(tasks), planes=len(out.planes), free=len(out.free),
        files=len(files), metas=len(metas), dims=len(out.dims), sums=len(out.sums),
        counts=len(out.counts), strings=len(out.strings), **head)
    return out.finish(b"".join([head, *index, out.strings]))


def _by_task(found, tasks):
    return [(found or {}).get(task, {}) for task in tasks]


def _is_finite(array):
    return bool(np.isfinite(to_float32(array)).all())


def _aliases(names, base, states):
    """Tied tensors, number -> the earliest one's: equal in type, shape and bytes in the base and in
    every task, or absent there."""
    def identity(state, name):
        return (a := state.get(name)) is not None and (a.dtype, a.shape, a.tobytes())

    first, aliases = {}, {}
    for i, name in enumerate(names):
        if name in base and base[name].size:
            target = first.setdefault(tuple(identity(s, name) for s in (base, *states)), i)
            if target != i:
                aliases[i] = target
    return aliases


def _classify(base, task, name):
    """(coding, why verbatim) of a task's tensor; what is MASKED is so if its values are finite."""
    if name not in task:
        return ABSENT, 0
    if name not in base:
        return AS_IS, NOT_IN_BASE
    b, t = base[name], task[name]
    if b.shape != t.shape:
        return AS_IS, OTHER_SHAPE
    if b.dtype == t.dtype and b.tobytes() == t.tobytes():
        return AS_BASE, 0
    if b.size == 0 or b.dtype not in ARITHMETIC or t.dtype not in ARITHMETIC:
        return AS_IS, NOT_ARITHMETIC
    return MASKED, 0


# A tensor's shared vector: its bytes, its scales', the number of its element type, the agreement
# counts, what a decoder reads from it, and masks: task number -> (mask bytes, bytes of the scales
# per row, fields of its entry).
_Encoded = namedtuple("_Encoded", "shared scales dtype agreement s masks")


def _survey(base, names, numbers, coded, codings, tasks, density):
    """Each task's cut, and whether most of the trimmed vectors' nonzero sums are positive.
    A task vector is that of all tensors in arithmetic; where a task equals the base it is zero."""
    vectors = {}
    for i, states in coded.items():
        b = to_float32(base[names[i]]).ravel()
        vectors |= {(k, i): to_float32(t).ravel() - b for k, t in states.items()}
    cuts = []
    for k in range(tasks):
        zeros = sum(base[names[i]].size for i in numbers if codings[k, i][0] == AS_BASE
                    and base[names[i]].dtype in ARITHMETIC)
        parts = [np.abs(tau) for (task, _), tau in vectors.items() if task == k]
        cuts.append(largest_cut(np.concatenate([np.zeros(zeros, np.float32), *parts]), density))
    votes = 0
    for i in coded:
        total = add_up(trim(vectors[k, i], cuts[k]) for k in coded[i])
        votes += int(np.sum(np.sign(np.nan_to_num(total))))
    return cuts, votes > 0


def _sparsify(k, base, state, names, codings, bits, density, least_bits, alone=True):
    """(signs, fields) of a task's ternary entries, by (task, tensor). What is not finite is found
    here, and becomes verbatim. Where they are not alone, the task has masks, too."""
    elements, found = 0, {}
    for (task, i), (coding, _) in codings.items():
        if task != k or names[i] not in base or names[i] not in state:
            continue
        b = base[names[i]]
        if alone and coding == AS_BASE and b.dtype in ARITHMETIC:
            elements += b.size
        elif coding == SPARSE:
            tau = to_float32(state[names[i]]).ravel() - to_float32(b).ravel()
            if np.isfinite(tau).all():
                found[i] = tau
            else:
                codings[k, i] = AS_IS, NONFINITE_TASK if _is_finite(b) else NONFINITE_BASE
    elements += sum(tau.size for tau in found.values())
    hulls = [ternary.hull(tau) for tau in found.values()]
    sizes = [tau.size for tau in found.values()]
    kept = ternary.share(hulls, sizes, elements, float(np.float32(bits)), density, least_bits)
    return {(k, i): ternary.encode(base[names[i]], state[names[i]], count)
            for i, count in zip(found, kept)}


def _merge(rule, vectors, *, averaged, cuts, majority):
    """The multi-task vector of a tensor: vectors are its task vectors, by task number."""
    if rule == "ties":
        return ties(vectors.values(), [cuts[k] for k in vectors], majority)
    merged = add_up(vectors.values())
    return merged / np.float32(averaged) if rule == "average" else merged


def _encode(base, tasks, thresholds, dtype, mode, merge, method):
    b = to_float32(base).ravel()
    with np.errstate(all="ignore"):
        merged = finite_or_zero(merge({k: to_float32(t).ravel() - b for k, t in tasks.items()}))
        stored, scales = store_shared(np.broadcast_to(merged, b.shape), dtype)
        s = load_shared(stored, scales)
    masks, agreement = _masks(base, tasks, s, thresholds, mode, method)
    counts = np.bincount(agreement, minlength=len(tasks) + 1).tolist()
    return _Encoded(stored.tobytes(), b"" if scales is None else scales.tobytes(), NUMBERS[dtype],
                    counts, s, masks)


def _masks(base, tasks, s, thresholds, mode, method):
    """(masks as _Encoded has them, on how many tasks' each element is active)."""
    rows = row_count(base.shape)
    b = to_float32(base).ravel()
    tasks = {k: to_float32(t).ravel() for k, t in tasks.items()}
    masks, agreement = {}, np.zeros(b.size, np.int64)
    with np.errstate(all="ignore"):
        for k, t in tasks.items():
            factor = 0
            if method == ADAPTED:
                factor = adapted_factor(t - b, s)
                active = follows(t - b, s, factor)
            elif method == MAGNITUDE:
                active = is_large(b, t, thresholds[k])
            else:
                active = is_active(b, t, s, thresholds[k])
            mask = active & (s != 0)
            agreement += active
            approx = np.where(mask, s, np.float32(0))
            sums = row_sums(t - b, approx, rows if mode == 2 else 1)
            gains = np.array([unit_gain(row) if mode else 1 for row in sums], np.float32)
            total = np.zeros(3)
            for g, (tau_sq, dot, approx_sq) in zip(gains.astype(np.float64), sums):
                total += tau_sq, g * dot, (g * approx_sq) * g
            entry = {"scale": 1 if mode == 2 else gains[0], "factor": factor,
                     "set_bits": mask.sum(), "published_bits": active.sum(),
                     **dict(zip(("tau_sq", "dot", "approx_sq"), total))}
            masks[k] = (np.packbits(mask, bitorder="little").tobytes(),
                        gains.tobytes() if mode == 2 else b"", entry)
    return masks, agreement


class _Writer:
    """A file being made: the bytes of its planes, and the tables of its index."""

    def __init__(self, force_zstd):
        self.force_zstd = force_zstd
        self.body, self.strings = bytearray(HEADER_SIZE), b""
        self.planes, self.free, self.dims, self.sums, self.counts = [], [], [], [], []

    def plane(self, kind, stored, used=True, coding=RAW, raw_size=None):
        """Appends a plane and gives its number; one not used leaves a free range, of zeros."""
        size = align64(len(stored))
        if not stored:
            return NONE
        if not used:
            before, length = self.free[-1] if self.free else (0, 0)
            if before + length == len(self.body):
                self.free[-1] = before, length + size
            else:
                self.free.append((len(self.body), size))
            self.body += bytes(size)
            return NONE
        self._record(kind, stored, coding=coding, offset=len(self.body), size=len(stored),
                     raw_size=raw_size or len(stored))
        self.body += stored.ljust(size, b"\0")
        return len(self.planes) - 1

    def mask(self, packed, s, used, coded):
        """A mask's plane, raw or coded, where that is smaller."""
        if coded:
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=s.size,
                                 bitorder="little").astype(bool)
            plane = conditional.code(bits, s)
            if len(plane) < len(packed):
                return self.plane(MASK, plane, coding=CONDITIONAL, raw_size=len(packed))
        return self.plane(MASK, packed, used)

    def ternary(self, signs, coded):
        """A ternary plane, raw or coded, where that is smaller."""
        raw = ternary.raw(signs)
        if coded and len(plane := ternary.code(signs)) < len(raw):
            return self.plane(TERNARY_PLANE, plane, coding=GAPS, raw_size=len(raw))
        return self.plane(TERNARY_PLANE, raw)

    def compressed(self, kind, raw):
        """A plane that is a zstd frame where that saves a sixteenth."""
        frame = zstandard.ZstdCompressor(level=3).compress(raw)
        gains = 16 * len(frame) <= 15 * len(raw)
        if raw and (gains if self.force_zstd is None else self.force_zstd):
            return self.plane(kind, frame, coding=ZSTD, raw_size=len(raw))
        return self.plane(kind, raw)

    def external(self, raw):
        """A plane of a referenced base: checksums, and no bytes."""
        if not raw:
            return NONE
        self._record(BASE, raw, coding=EXTERNAL, raw_size=len(raw))
        return len(self.planes) - 1

    def _record(self, kind, stored, **fields):
        self.planes.append(PLANE.pack(kind=kind, first_sum=len(self.sums), **fields))
        self.sums += plane_sums(stored)

    def string(self, text):
        offset, data = len(self.strings), text.encode()
        self.strings += data
        return struct.pack("<II", offset, len(data))

    def dims_of(self, array):
        first = len(self.dims) if array.ndim else 0
        self.dims += array.shape
        return first

    def finish(self, index):
        index = index.ljust(align64(len(index)), b"\0")
        head = HEADER.pack(magic=MAGIC, version=VERSION, header_size=HEADER_SIZE)
        slot = pack_slot(head, 1, len(self.body), index)
        self.body[: HEADER_SIZE] = head + slot + bytes(SLOT.size)
        return bytes(self.body + index)


def pack_slot(head, sequence, offset, index):
    """The slot of a header that names an index, which ends the file."""
    slot = SLOT.pack(sequence=sequence, index_offset=offset, index_size=len(index),
                     index_hash=hash64(index), file_size=offset + len(index))[:56]
    return slot + struct.pack("<Q", hash64(head + slot))
