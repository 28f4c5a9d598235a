"""The small file that test_reference.py reads, and what edits it."""

import functools
import struct

import numpy as np

from families import THRESHOLDS
from helpers import same
from tallcodec import reference as ref
from tallcodec.reference import records

F32 = np.float32


def same_state(a, b):
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def sample():
    """One tensor of each kind, as small as can be."""
    rng = np.random.default_rng(0)

    def values(*shape):
        return rng.standard_normal(shape).astype(F32)

    base = {
        "empty": values(0, 3),
        "equal": values(2),
        "head": values(2, 2),
        "inf": values(5),
        "mask": values(3, 50),
        "nan": values(130),
        "scalar": np.array(F32(5)),
        "verbatim": np.arange(3),
    }
    base["tied"] = base["mask"].copy()
    tasks = {
        name: {n: a + a.dtype.type(k) for n, a in base.items()} | {"equal": base["equal"]}
        for k, name in ((1, "cars"), (2, "dtd"))
    }
    tasks["cars"]["nan"][7] = np.nan
    tasks["cars"]["inf"][0] = tasks["dtd"]["inf"][0] = np.inf
    tasks["cars"]["head"] = values(1, 2)
    tasks["dtd"]["extra"] = np.zeros(600, F32)
    del tasks["dtd"]["verbatim"]
    return base, tasks


@functools.cache
def sample_file(**options):
    options = {
        "scale": "unit-gain-row",
        "shared_dtype": "int8",
        "thresholds": THRESHOLDS,
        "metadata": {"odd": "é \x07 a/b c\\d ..", "k": "v"},
        "base_files": {"config.json": b"{}" * 9, "vocab": b""},
    } | options
    return ref.write(*sample(), **options)


class Editor:
    """Changes records of a valid file and makes its hashes right again."""

    def __init__(self, data):
        self.file, self.data = ref.read(data), bytearray(data)
        self.start = at = self.file.slot.index_offset
        head = records.INDEX.unpack(data, at)
        at += records.INDEX.size
        self.at = {}
        for kind, count in (
            (records.TENSOR, head.tensors),
            (records.TASK, head.tasks),
            (records.ENTRY, head.tensors * head.tasks),
            (records.PLANE, head.planes),
            (records.FREE, head.free),
            (records.FILE_RECORD, head.files),
            (records.META, head.metas),
        ):
            self.at[kind] = at
            at += kind.size * count
        self.dims = at

    def edit(self, kind, at, fields):
        record = kind.type(*kind.struct.unpack_from(self.data, at))._asdict()
        changed = {f: v(record[f]) if callable(v) else v for f, v in fields.items()}
        kind.struct.pack_into(self.data, at, *(record | changed).values())

    def header(self, **fields):
        self.edit(records.HEADER, 0, fields)

    def slot(self, **fields):
        self.edit(records.SLOT, 64, fields)

    def index(self, **fields):
        self.edit(records.INDEX, self.start, fields)

    def record(self, kind, number, /, **fields):
        self.edit(kind, self.at[kind] + number * kind.size, fields)

    def tensor(self, name, /, **fields):
        self.record(records.TENSOR, self.file.tensor_numbers[name], **fields)

    def entry(self, task, name, /, **fields):
        k, i = self.file.task_numbers[task], self.file.tensor_numbers[name]
        self.record(records.ENTRY, k * len(self.file.tensors) + i, **fields)

    def plane(self, kind, /, **fields):
        """The first plane of a kind."""
        self.record(records.PLANE, self.number(kind), **fields)

    def number(self, kind):
        return next(i for i, p in enumerate(self.file.planes) if p.kind == kind)

    def text(self, text):
        """The string field of bytes that are anywhere among the strings."""
        text = text if isinstance(text, bytes) else text.encode()
        assert text in self.file.strings
        return struct.pack("<II", self.file.strings.index(text), len(text))

    def swap(self, kind):
        """The first two records of a kind."""
        a = self.at[kind]
        b, c = a + kind.size, a + 2 * kind.size
        self.data[a:c] = self.data[b:c] + self.data[a:b]

    def sum_planes(self):
        """Makes the checksums of the planes right, whatever is in them."""
        sums = self.dims + 8 * len(self.file.dims)
        for p in self.file.planes:
            if p.coding != records.EXTERNAL:
                right = records.plane_sums(bytes(self.data[p.offset : p.offset + p.size]))
                struct.pack_into(f"<{len(right)}Q", self.data, sums + 8 * p.first_sum, *right)

    def finish(self):
        """The file, its hashes right."""
        slot = records.SLOT.type(*records.SLOT.struct.unpack_from(self.data, 64))
        index = self.data[slot.index_offset :][: slot.index_size]
        records.SLOT.struct.pack_into(self.data, 64, *slot._replace(index_hash=ref.hash64(index)))
        right = ref.hash64(self.data[:64] + self.data[64:120])
        self.data[120:128] = struct.pack("<Q", right)
        return bytes(self.data)
