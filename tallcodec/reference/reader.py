"""Bytes to checkpoints."""

import itertools
import math
import struct

import numpy as np
import zstandard

from ..errors import (
    BaseMismatchError,
    ChecksumError,
    FormatError,
    TaskNotFoundError,
    TensorNotFoundError,
    VersionError,
)
from . import conditional, ternary
from .formulas import (
    ARITHMETIC,
    DTYPES,
    FLOAT32,
    INT8,
    NUMBERS,
    SCALE_BLOCK,
    SUM_BLOCK,
    decode_mask,
    hash64,
    load_shared,
    round_to,
    row_count,
    to_float32,
)
from .records import (
    ABSENT,
    ABSENT_ENTRY,
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
    KINDS,
    MAGIC,
    MASK,
    MASKED,
    MAX_RANK,
    META,
    METHODS,
    NONE,
    PLANE,
    RAW,
    REFERENCED,
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
    sum_count,
)


def read(data: bytes, base: dict | None = None) -> "Reference":
    """A file, parsed and validated. `base` (name -> array) is for one that references its base."""
    return Reference(bytes(data), base)


def _check(condition, message, error=FormatError):
    if not condition:
        raise error(message)


def _check_name(name, what, forbidden=()):
    _check(name not in forbidden, f"{what} is {name!r}")
    _check(not any(c < " " or c == "\x7f" for c in name), f"{what} has control characters")


class Reference:
    """A parsed file. `tensors`, `tasks`, `entries[task][tensor]` (None for an alias), `planes` and
    `free` are its records, their names as str; `metadata` maps a scope (a task's number, SCOPE_BASE
    or SCOPE_FILE) to a dict of strings, `files` one to a dict of names to planes.
    """

    def __init__(self, data, base=None):
        self.data, self.base = data, base
        self.slot = self._read_slot()
        index = data[self.slot.index_offset :][: self.slot.index_size]
        _check(hash64(index) == self.slot.index_hash, "the index is damaged", ChecksumError)
        self._read_records(index)
        _check(self.base_storage in (EMBEDDED, REFERENCED), "unknown base storage", VersionError)
        self._check_planes()
        self._check_tiling()
        self.tensors = [self._tensor(i, t) for i, t in enumerate(self.tensors)]
        names = [t.name for t in self.tensors]
        _check(all(a < b for a, b in itertools.pairwise(names)), "tensor names are not ascending")
        self.tensor_numbers = {name: i for i, name in enumerate(names)}
        self.tasks = [t._replace(name=self._text(t.name)) for t in self.tasks]
        self.task_numbers = {t.name: k for k, t in enumerate(self.tasks)}
        _check(len(self.task_numbers) == len(self.tasks), "two tasks have one name")
        for task in self.tasks:
            _check_name(task.name, "a task's name", forbidden=("",))
        self.entries = [[self._entry(t, raw, task.method) for t, raw in zip(self.tensors, row)]
                        for task, row in zip(self.tasks, self.entries)]
        named = [plane for row in self.entries for e in row if e and e.coding in (MASKED, SPARSE)
                 for plane in (e.plane, e.scales_plane) if plane != NONE]  # fmt: skip
        _check(len(named) == len(set(named)), "two entries name one mask or ternary plane")
        self.metadata = self._metadata()
        self.files = self._files()

    def _read_slot(self):
        data = self.data
        _check(data[:8] == MAGIC, "not a .tall file")
        _check(len(data) >= HEADER_SIZE, "truncated header")
        version, header_size = struct.unpack_from("<II", data, 8)
        _check(version == VERSION, f"format version {version}",
               VersionError if version > VERSION else FormatError)
        slots = []
        for at in (64, 128):
            sequence, *_, slot_hash = SLOT.struct.unpack_from(data, at)
            if sequence and slot_hash == hash64(data[:64] + data[at : at + 56]):
                slots.append((sequence, at))
        _check(slots, "the header is damaged: no slot has a right checksum", ChecksumError)
        _check(header_size == HEADER_SIZE, "unknown header size", VersionError)
        HEADER.unpack(data)
        slot = SLOT.unpack(data, max(slots, key=lambda s: s[0])[1])
        _check(slot.file_size <= len(data), f"truncated: {len(data)} of {slot.file_size} bytes")
        _check(slot.file_size % 64 == slot.index_offset % 64 == slot.index_size % 64 == 0
               and slot.index_offset >= HEADER_SIZE and slot.index_size >= INDEX.size
               and slot.index_offset + slot.index_size <= slot.file_size, "no index in the file")
        return slot

    def _read_records(self, index):
        """Cuts the index into its sections; entries stay bytes until their tensors are known."""
        head = INDEX.unpack(index)
        at = INDEX.size

        def take(count, size):
            nonlocal at
            _check(at + count * size <= len(index), "the index is too short for its counts")
            at += count * size
            return index[at - count * size : at]

        def records(kind, count):
            section = take(count, kind.size)
            return [kind.unpack(section, i * kind.size) for i in range(count)]

        self.tensors = records(TENSOR, head.tensors)
        self.tasks = records(TASK, head.tasks)
        self.entries = []
        for _ in range(head.tasks):
            row = take(head.tensors, ENTRY.size)
            self.entries.append([row[i : i + ENTRY.size] for i in range(0, len(row), ENTRY.size)])
        self.planes = records(PLANE, head.planes)
        self.free = records(FREE, head.free)
        self.file_records = records(FILE_RECORD, head.files)
        self.meta_records = records(META, head.metas)
        self.dims, self.sums, self.counts = (
            np.frombuffer(take(count, 8), "<u8").tolist()
            for count in (head.dims, head.sums, head.counts))
        self.strings, self.named = take(head.strings, 1), 0
        _check(len(index) - at < 64 and not any(index[at:]), "bytes behind the index's strings")
        self.base_storage, self.merge, self.scale = head.base_storage, head.merge, head.scale
        self.writer = self._text(head.writer)
        _check_name(self.writer, "the writer")

    def _text(self, reference):
        offset, length = struct.unpack("<II", reference)
        _check(offset + length <= len(self.strings), "a string lies outside the strings")
        self.named += length
        _check(self.named <= len(self.strings), "names and values are longer than all strings")
        try:
            return self.strings[offset : offset + length].decode()
        except UnicodeDecodeError as e:
            raise FormatError(f"a string is not UTF-8: {e}") from None

    def shape(self, record):
        """The dims of a tensor or an entry. Those that are not 0 multiply to less than 2^59."""
        first, rank = record.dims, record.rank
        _check(first + rank <= len(self.dims) if rank else first == 0, "dims outside the table")
        _check(rank <= MAX_RANK, f"a tensor has rank {rank}")
        shape = tuple(self.dims[first : first + rank])
        _check(math.prod(d or 1 for d in shape) < 2**59, "a shape is absurdly large")
        return shape

    def agreement(self, tensor):
        """Count k: the elements on which k of the coded tasks are active by their rule."""
        return self.counts[tensor.first_count : tensor.first_count + tensor.counts]

    def _check_planes(self):
        for p in self.planes:
            external = p.coding == EXTERNAL
            _check(p.raw_size != 0, "a plane has raw size 0")
            _check(max(p.size, p.raw_size) < 2**63, "a plane is absurdly large")
            if external:
                _check((p.kind == BASE or p.kind not in KINDS) and p.offset == p.size == 0
                       and self.base_storage == REFERENCED, "a plane is wrongly external")
            _check(external or p.size != 0, "a plane is empty")
            if p.kind == BASE:
                _check(external == (self.base_storage == REFERENCED),
                       "a base plane contradicts the base storage")
            _check(p.coding != RAW or p.size == p.raw_size, "a raw plane has two sizes")
            if p.kind in KINDS:
                _check(p.coding != GAPS or p.kind == TERNARY_PLANE, "only ternary planes have gaps")
                _check(p.coding != CONDITIONAL or p.kind == MASK,
                       "only masks are coded given the shared vector")
            if p.coding == ZSTD:
                _check(p.kind in (VERBATIM, FILE) or p.kind not in KINDS,
                       "a plane of this kind is no zstd frame")
                _check(p.raw_size <= min(32768 * p.size, 2**26), "no zstd frame holds that much")
            sums = sum_count(p.raw_size if external else p.size)
            _check(p.first_sum + sums <= len(self.sums), "checksums outside the table")
        keys = [(p.coding == EXTERNAL, p.offset) for p in self.planes]
        _check(keys == sorted(keys), "planes are out of order")

    def _check_tiling(self):
        """Planes, free ranges and the index cover the file behind the header, each byte once."""
        for f in self.free:
            _check(f.size != 0 and f.size % 64 == 0, "a free range has a bad size")
        _check(self.free == sorted(self.free), "free ranges are out of order")
        ranges = [(p.offset, align64(p.size)) for p in self.planes if p.coding != EXTERNAL]
        ranges += [*self.free, (self.slot.index_offset, self.slot.index_size)]
        end = HEADER_SIZE
        for offset, size in sorted(ranges):
            _check(offset == end, f"an overlap or a hole at {min(offset, end)}")
            end += size
        _check(end == self.slot.file_size, "planes, free ranges and index do not tile the file")

    def _check_plane(self, number, kind, raw_size, what):
        """A plane that a record names: there exactly where it has bytes, of that kind and size.
        One of an unknown kind or coding is looked at when it is needed."""
        if raw_size == 0:
            return _check(number == NONE, f"{what} names a plane it has no bytes for")
        _check(number < len(self.planes), f"{what} names no plane of the file")
        plane = self.planes[number]
        if plane.kind in KINDS:
            _check(plane.kind == kind, f"{what} names a plane of another kind")
            _check(raw_size in (plane.raw_size, None), f"{what}: the plane's size is wrong")

    def _tensor(self, i, t):
        name = self._text(t.name)
        _check_name(name, "a tensor's name")
        what = f"tensor {name!r}"
        t, shape = t._replace(name=name), self.shape(t)
        _check(t.in_base in (0, 1), f"{what}: in the base or not?")
        _check(t.first_count + t.counts <= len(self.counts) and (t.counts or not t.first_count),
               f"{what}: counts outside the table")
        _check(t.counts <= len(self.tasks) + 1, f"{what}: counts of more tasks than there are")
        if t.alias != NONE:
            _check(t.alias < i, f"{what} is tied to no earlier tensor")
            target = self.tensors[t.alias]
            _check(target.alias == NONE, f"{what} is tied to an alias")
            _check(t.in_base and target.in_base
                   and (t.dtype, shape) == (target.dtype, self.shape(target)),
                   f"{what} is tied to a tensor unlike it")
            _check((t.base_plane, t.shared_plane, t.scales_plane) == (NONE, NONE, NONE)
                   and t.shared_dtype == t.counts == 0, f"{what} is an alias with planes")
            return t
        _check(t.in_base or (t.dtype, t.rank) == (0, 0), f"{what} is not in the base but typed")
        _check(t.dtype in DTYPES or not t.in_base, f"{what}: unknown element type", VersionError)
        n = math.prod(shape)
        size = n * DTYPES[t.dtype].itemsize if t.in_base else 0
        self._check_plane(t.base_plane, BASE, size, what)
        shared = DTYPES.get(t.shared_dtype)
        _check(not t.shared_dtype or shared in (*ARITHMETIC, INT8),
               f"{what}: unknown type of the shared vector", VersionError)
        _check(not shared or t.in_base and DTYPES[t.dtype] in ARITHMETIC,
               f"{what}: shared vector without an arithmetic base")
        self._check_plane(t.shared_plane, SHARED, n * shared.itemsize if shared else 0, what)
        blocks = -(-n // SCALE_BLOCK) if shared == INT8 else 0
        self._check_plane(t.scales_plane, SCALES, 4 * blocks, what)
        return t

    def _entry(self, t, raw, method):
        what = f"a task's tensor {t.name!r}"
        if t.alias != NONE:
            _check(raw == bytes(ENTRY.size), f"{what} is an alias with an entry of its own")
            return None
        if raw[0] > SPARSE:  # an unknown coding: refused when it is asked for
            return ENTRY.type(*ENTRY.struct.unpack(raw))
        e = ENTRY.unpack(raw)
        if e.coding == ABSENT:
            _check(raw == ABSENT_ENTRY, f"{what} is absent but has properties")
            return e
        n = math.prod(self.shape(e))
        _check(e.dtype in DTYPES, f"{what}: unknown element type", VersionError)
        dtype = DTYPES[e.dtype]
        _check((e.reason != 0) == (e.coding == AS_IS),
               f"{what}: a reason where there is none")
        if e.coding not in (MASKED, SPARSE):
            statistics = e.factor, e.set_bits, e.published_bits, e.tau_sq, e.dot, e.approx_sq
            _check(e.scale == 1 and e.scales_plane == NONE and not any(statistics),
                   f"{what} has no mask but its factor, scales or statistics")
        if e.coding == AS_IS:
            self._check_plane(e.plane, VERBATIM, n * dtype.itemsize, what)
            return e
        _check(t.in_base and (e.rank, e.dims) == (t.rank, t.dims), f"{what}: another shape")
        if e.coding == AS_BASE:
            _check(e.dtype == t.dtype and e.plane == NONE, f"{what} is as the base but differs")
            return e
        if e.coding == SPARSE:
            _check(dtype in ARITHMETIC and DTYPES[t.dtype] in ARITHMETIC and n > 0,
                   f"{what}: a ternary plane of no arithmetic type")
            _check(e.set_bits == e.published_bits <= n and e.factor == 0
                   and e.scales_plane == NONE and math.isfinite(e.scale),
                   f"{what}: a ternary plane like a mask")
            self._check_plane(e.plane, TERNARY_PLANE, 2 * -(-n // 8), what)
            return e
        _check(dtype in ARITHMETIC and t.shared_plane != NONE, f"{what}: a mask of nothing")
        _check(e.set_bits <= e.published_bits <= n, f"{what}: impossible numbers of bits")
        if method == ADAPTED:
            _check(np.finfo(np.float32).tiny <= e.factor < np.inf, f"{what} has no factor")
        elif method in METHODS.values():
            _check(e.factor == 0, f"{what} has a factor but no adapted mask")
        self._check_plane(e.plane, MASK, -(-n // 8), what)
        if e.scales_plane != NONE:
            _check(e.scale == 1, f"{what} has scales per row and another one")
            self._check_plane(e.scales_plane, SCALES, 4 * row_count(self.shape(t)), what)
        return e

    def _metadata(self):
        found = {scope: {} for scope in (SCOPE_FILE, SCOPE_BASE, *range(len(self.tasks)))}
        for m in self.meta_records:
            key, value = self._text(m.key), self._text(m.value)
            _check(m.scope in found, f"metadata {key!r} belongs to no task")
            _check(key not in found[m.scope], f"metadata {key!r} is there twice")
            found[m.scope][key] = value
        return found

    def _files(self):
        found = {scope: {} for scope in (SCOPE_BASE, *range(len(self.tasks)))}
        for f in self.file_records:
            name = self._text(f.name)
            _check_name(name, "a file's name", forbidden=("", ".", ".."))
            _check("/" not in name and "\\" not in name, f"file name {name!r} is a path")
            _check(f.scope in found, f"file {name!r} belongs to no task")
            _check(name not in found[f.scope], f"file {name!r} is there twice")
            if f.plane != NONE:
                self._check_plane(f.plane, FILE, None, f"file {name!r}")
            found[f.scope][name] = f.plane
        return found

    def entry(self, task, name):
        """(tensor, entry) of a task's tensor, an alias followed."""
        if task not in self.task_numbers:
            raise TaskNotFoundError(f"no task {task!r}")
        k, i = self.task_numbers[task], self.tensor_numbers.get(name)
        tensor = None if i is None else self.tensors[i]
        if tensor and tensor.alias != NONE:
            i, tensor = tensor.alias, self.tensors[tensor.alias]
        if tensor is None or self.entries[k][i].coding == ABSENT:
            raise TensorNotFoundError(f"task {task!r} has no tensor {name!r}")
        return tensor, self.entries[k][i]

    def decode(self, task, name):
        """A tensor of a task."""
        t, e = self.entry(task, name)
        _check(e.coding <= SPARSE, f"{name!r} of {task!r}: unknown coding {e.coding}", VersionError)
        if e.coding == AS_BASE:
            return self._base_tensor(t)
        if e.coding == AS_IS:
            return self._array(e.plane, e.dtype).reshape(self.shape(e))
        b = to_float32(self._base_tensor(t)).ravel()
        if e.coding == SPARSE:
            signs = self.signs(e, b.size)
            with np.errstate(all="ignore"):
                x = decode_mask(b, signs.astype(np.float32), signs != 0, np.float32(e.scale))
                return round_to(x, DTYPES[e.dtype]).reshape(self.shape(t))
        mask = self.mask(t, e)
        scale = np.float32(e.scale)
        if e.scales_plane != NONE:
            scales = self._array(e.scales_plane, NUMBERS[FLOAT32])
            scale = np.repeat(scales, b.size // scales.size)
        with np.errstate(all="ignore"):
            x = decode_mask(b, self.shared(t), mask, scale)
            return round_to(x, DTYPES[e.dtype]).reshape(self.shape(t))

    def shared(self, tensor):
        """The shared vector of a tensor, flat, in float32."""
        stored = self._array(tensor.shared_plane, tensor.shared_dtype)
        scales = None
        if tensor.scales_plane != NONE:
            scales = self._array(tensor.scales_plane, NUMBERS[FLOAT32])
        with np.errstate(all="ignore"):
            return load_shared(stored, scales)

    def mask(self, tensor, entry):
        """The mask of an entry of a tensor, flat, as bools."""
        if self._known(entry.plane).coding == CONDITIONAL:
            return conditional.decode(self._stored(entry.plane), self.shared(tensor))
        packed, n = np.frombuffer(self._bytes(entry.plane), np.uint8), math.prod(self.shape(tensor))
        return np.unpackbits(packed, count=n, bitorder="little").astype(bool)

    def signs(self, entry, n):
        """The vector of −1, 0, 1 of a ternary entry of n elements."""
        if self._known(entry.plane).coding == GAPS:
            return ternary.decode(self._stored(entry.plane), n)
        return ternary.raw_signs(self._bytes(entry.plane), n)

    def task_state(self, task):
        """name -> array: all that the task has."""
        state = {}
        for name in self.tensor_numbers:
            try:
                state[name] = self.decode(task, name)
            except TensorNotFoundError:
                pass
        return state

    def base_state(self):
        """name -> array: the base."""
        targets = {t.name: t if t.alias == NONE else self.tensors[t.alias] for t in self.tensors}
        return {name: self._base_tensor(t) for name, t in targets.items() if t.in_base}

    def file(self, scope, name):
        """The bytes of a file of a scope."""
        plane = self.files[scope][name]
        return b"" if plane == NONE else self._bytes(plane)

    def verify(self):
        """Checks every checksum and that every zstd frame is sound; of an external base, where one
        was given, that it is the file's."""
        for number, plane in enumerate(self.planes):
            if plane.coding != EXTERNAL:
                self._stored(number)
            if plane.coding == ZSTD:
                self._bytes(number)
        if self.base_storage == REFERENCED and self.base is not None:
            self.base_state()

    def _base_tensor(self, t):
        dtype, shape = DTYPES[t.dtype], self.shape(t)
        if t.base_plane == NONE:
            return np.empty(shape, dtype)
        self._known(t.base_plane)
        if self.base_storage == EMBEDDED:
            return self._array(t.base_plane, t.dtype).reshape(shape)
        given = (self.base or {}).get(t.name)
        _check(given is not None, f"tensor {t.name!r} is needed from the base", BaseMismatchError)
        _check((given.dtype, given.shape) == (dtype, shape),
               f"the base's tensor {t.name!r} is {given.dtype} {given.shape}, not {dtype} {shape}",
               BaseMismatchError)
        first = self.planes[t.base_plane].first_sum
        sums = plane_sums(given.tobytes())
        _check(sums == self.sums[first : first + len(sums)],
               f"the base's tensor {t.name!r} has other values", BaseMismatchError)
        return given

    def _array(self, plane, dtype):
        return np.frombuffer(b"" if plane == NONE else self._bytes(plane), DTYPES[dtype])

    def _bytes(self, number):
        """What a plane decodes to."""
        p = self._known(number)
        stored = self._stored(number)
        if p.coding == RAW:
            return stored
        try:  # the size first: a frame decides how much memory its decoder takes
            _check(zstandard.frame_content_size(stored) == p.raw_size, "a zstd frame of other size")
            return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as e:
            raise FormatError(f"plane {number} is no zstd frame: {e}") from None

    def _known(self, number):
        """A plane that can be decoded."""
        p = self.planes[number]
        _check(p.kind in KINDS and p.coding <= CONDITIONAL,
               f"plane {number} has unknown kind {p.kind} or coding {p.coding}", VersionError)
        return p

    def _stored(self, number):
        """The stored bytes of a plane, their checksums right."""
        p = self.planes[number]
        stored = self.data[p.offset : p.offset + align64(p.size)]
        sums = [hash64(stored[at : at + SUM_BLOCK]) for at in range(0, len(stored), SUM_BLOCK)]
        _check(sums == self.sums[p.first_sum : p.first_sum + len(sums)],
               f"plane {number} is damaged", ChecksumError)
        return stored[: p.size]
