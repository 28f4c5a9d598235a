"""The NumPy reference against docs/format.md: what it writes, what it decodes, what it refuses."""

import functools
import itertools
import math
import struct

import ml_dtypes
import numpy as np
import pytest
import xxhash
import zstandard

from families import ARITHMETIC, BIG, THRESHOLDS, family, reference_options
from tallcodec import _core
from tallcodec import reference as ref
from tallcodec.errors import (
    BaseMismatchError,
    CheckpointError,
    ChecksumError,
    FormatError,
    TallcodecError,
    TaskNotFoundError,
    TensorNotFoundError,
    VersionError,
)
from tallcodec.file import _inflate
from tallcodec.reference import formulas, records

F32 = np.float32
pytestmark = pytest.mark.filterwarnings("error")


def same(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def same_state(a, b):
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


# Below 256 the zero bytes, at multiples of 64 the last stripe, at those of 1024 the scrambling.
SIZES = [0, 1, 120, 255, 256, 257, 320, 1023, 1024, 1025, 1088, 2048, 65600]


@pytest.mark.parametrize("size", SIZES)
def test_hash_is_xxh3(size):
    data = np.random.default_rng(size).bytes(size)
    assert ref.hash64(data) == xxhash.xxh3_64_intdigest(data.ljust(256, b"\0"))


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def round16(x, dtype):
    """Float32 to 16 bits and back, one value at a time, without NumPy's conversions."""
    if dtype == np.float16:
        try:
            return F32(struct.unpack("<e", struct.pack("<e", x))[0])
        except OverflowError:
            return F32(math.copysign(math.inf, x))
    u = bits(x)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000
    return F32(struct.unpack("<f", struct.pack("<I", rounded))[0])


@pytest.mark.parametrize("dtype", ARITHMETIC[1:], ids=str)
def test_rounding(dtype):
    x = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint32).view(F32)
    edges = F32([0.0, -0.0, 65504, 65519, 65520, 1e-45, 6e-8, 3e38])
    x = np.concatenate([x[np.isfinite(x)], edges])
    with np.errstate(over="ignore"):
        rounded = formulas.to_float32(formulas.round_to(x, dtype))
    assert [bits(r) for r in rounded] == [bits(round16(v, dtype)) for v in x]


def test_shared_vector_saturates():
    stored, _ = formulas.store_shared(F32([1e5, -3e38, 1]), np.dtype(np.float16))
    assert stored.tolist() == [65504, -65504, 1]
    stored, _ = formulas.store_shared(F32([np.finfo(F32).max]), np.dtype(ml_dtypes.bfloat16))
    assert np.isfinite(formulas.to_float32(stored)).all()
    stored, scales = formulas.store_shared(F32([0] * 128 + [254, 1, 3, -254, 5]), np.dtype(np.int8))
    assert scales.tolist() == [0, 2] and stored[128:].tolist() == [127, 0, 2, -127, 2]


def shared_value_by_value(b, tasks, dtype):
    """The formulas of "Encoding" in docs/format.md, one element at a time."""
    acc = []
    for i, x in enumerate(b):
        total = F32(0)
        for t in tasks:
            total = total + (t[i] - x)
        acc.append(total if math.isfinite(total) else F32(0))
    if dtype == F32:
        return acc
    if dtype != np.int8:
        top = F32(65504) if dtype == np.float16 else F32((2 - 2**-7) * 2**127)
        return [round16(min(max(a, -top), top), dtype) for a in acc]
    s = []
    for at in range(0, len(acc), 128):
        block = acc[at : at + 128]
        scale = max(abs(a) for a in block) / F32(127)
        for a in block:
            q = 0 if scale == 0 else min(max(round(float(a / scale)), -127), 127)
            s.append(F32(q) * scale)
    return s


def lanes_summed(terms):
    lanes = [0.0] * 16
    for j, term in enumerate(terms):
        lanes[j % 16] += term
    for half in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]


def entry_value_by_value(b, t, s, threshold, rows, mode):
    """(mask, published bits, g per row, statistics) of one task; for tensors of one unit."""
    active = [abs(x - y) > threshold * abs((x + v) - y) for x, y, v in zip(b, t, s)]
    mask = [bool(a and v != 0) for a, v in zip(active, s)]
    tau = [float(y - x) for x, y in zip(b, t)]
    approx = [float(v) if m else 0.0 for m, v in zip(mask, s)]
    length, gains, totals = len(b) // rows, [], [0.0, 0.0, 0.0]
    for start in range(0, len(b), length):
        part = slice(start, start + length)
        tau_sq, dot, approx_sq = (
            lanes_summed([x * y if y else 0.0 for x, y in zip(p[part], q[part])])
            for p, q in ((tau, tau), (tau, approx), (approx, approx))
        )
        g = F32(1)
        if mode and dot and 2**-126 <= (quotient := F32(tau_sq / dot)) < math.inf:
            g = quotient
        gains.append(g)
        for i, term in enumerate((tau_sq, float(g) * dot, float(g) * approx_sq * float(g))):
            totals[i] += term
    return mask, sum(map(bool, active)), gains, totals


OPTIONS = list(reference_options())


@pytest.mark.parametrize("options", OPTIONS[::7], ids=lambda o: "-".join(o.values()))
def test_values_are_those_of_the_formulas(options):
    base, tasks = family(seed=2)
    file = ref.read(ref.write(base, tasks, thresholds=THRESHOLDS, **options), base)
    mode, compared = records.SCALE_MODES[options["scale"]], 0
    for i, t in enumerate(file.tensors):
        coded = [
            k for k, row in enumerate(file.entries) if row[i] and row[i].coding == records.MASKED
        ]
        if not coded:
            assert t.shared_plane == records.NONE and t.counts == 0
            continue
        name, rows = t.name, formulas.row_count(file.shape(t)) if mode == 2 else 1
        b = list(base[name].astype(F32).ravel())
        values = {k: list(tasks[file.tasks[k].name][name].astype(F32).ravel()) for k in coded}
        with np.errstate(all="ignore"):
            s = shared_value_by_value(b, values.values(), formulas.DTYPES[t.shared_dtype])
            assert [bits(x) for x in s] == [bits(x) for x in file.shared(t)]
            counts = [0] * len(b)
            for k in coded:
                e, task = file.entries[k][i], file.tasks[k]
                threshold = F32(THRESHOLDS[task.name])
                mask, published, g, totals = entry_value_by_value(
                    b, values[k], s, threshold, rows, mode
                )
                assert (e.set_bits, e.published_bits) == (sum(mask), published)
                assert [e.tau_sq, e.dot, e.approx_sq] == totals
                length = len(b) // rows
                x = [
                    p + g[j // length] * v if m else p
                    for j, (p, v, m) in enumerate(zip(b, s, mask))
                ]
                dtype = tasks[task.name][name].dtype
                decoded = file.decode(task.name, name)
                assert (decoded.dtype, decoded.shape) == (dtype, base[name].shape)
                if dtype != F32:
                    x = [round16(v, dtype) for v in x]
                assert [bits(v) for v in x] == [bits(v) for v in decoded.astype(F32).ravel()]
                for j, (p, q, v) in enumerate(zip(b, values[k], s)):
                    counts[j] += abs(p - q) > threshold * abs((p + v) - q)
                compared += 1
        assert file.agreement(t) == [counts.count(c) for c in range(len(coded) + 1)]
    assert compared > 100


def test_differences_that_overflow():
    base, tasks = {"a": F32([3e38, 1])}, {"t": {"a": F32([-3e38, 2])}}
    file = ref.read(ref.write(base, tasks, thresholds={"t": 0.4}))
    _, e = file.entry("t", "a")
    assert (e.tau_sq, e.dot, e.approx_sq) == (math.inf, 1, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("zstd", [None, True, False])
def test_round_trip(options, zstd):
    base, tasks = family(seed=3)
    data = ref.write(base, tasks, thresholds=THRESHOLDS, force_zstd=zstd, **options)
    file = ref.read(data, base)
    file.verify()
    assert same_state(file.base_state(), base)
    for k, (task, state) in enumerate(tasks.items()):
        decoded = file.task_state(task)
        assert decoded.keys() == state.keys()
        for i, t in enumerate(file.tensors):
            entry = file.entries[k][i]
            if t.alias == records.NONE and t.name in state and entry.coding != records.MASKED:
                assert same(decoded[t.name], state[t.name])
            elif t.name in state:
                assert (decoded[t.name].dtype, decoded[t.name].shape) == (
                    state[t.name].dtype,
                    state[t.name].shape,
                )


def test_more_than_a_unit():
    base, tasks = family(big=True)
    for scale, shared_dtype in (("unit-gain", "int8"), ("unit-gain-row", "auto")):
        data = ref.write(base, tasks, thresholds=THRESHOLDS, scale=scale, shared_dtype=shared_dtype)
        file = ref.read(data)
        file.verify()
        for name in ("big.flat", "big.rows", "big.many rows"):
            t, e = file.entry("dtd", name)
            assert BIG <= math.prod(file.shape(t)) + 1000
            assert records.sum_count(file.planes[e.plane].size) == 2
            exact = tasks["dtd"][name].astype(F32) - base[name].astype(F32)
            assert math.isclose(e.tau_sq, np.sum(exact.astype(np.float64) ** 2), rel_tol=1e-9)
            assert math.isclose(e.dot, e.tau_sq, rel_tol=1e-6)  # what unit gain means
            decoded = file.decode("dtd", name).astype(F32)
            assert np.linalg.norm(decoded - tasks["dtd"][name].astype(F32)) < 2 * e.tau_sq**0.5
        assert same(file.decode("cars", "big.nonfinite"), tasks["cars"]["big.nonfinite"])


def test_the_table():
    """Every row of design.md's "What each tensor becomes"."""
    base, tasks = family(seed=4)
    file = ref.read(ref.write(base, tasks, thresholds=THRESHOLDS))
    A, M, V, X = records.AS_BASE, records.MASKED, records.AS_IS, records.ABSENT

    def codings(name):
        i = file.tensor_numbers[name]
        return [row[i] and (row[i].coding, row[i].reason) for row in file.entries]

    assert codings("layer.float32.7x33") == [(M, 0)] * 3
    assert codings("layer.float16.0") == [(A, 0)] * 3
    assert codings("mixed.float32.one") == [(M, 0)] * 3
    assert codings("mixed.float16.equal") == [(M, 0), (A, 0), (A, 0)]
    assert codings("mixed.empty") == [(V, records.NOT_ARITHMETIC), (A, 0), (A, 0)]
    assert codings("mixed.verbatim") == [(V, records.NOT_ARITHMETIC), (A, 0), (A, 0)]
    assert codings("equal.all") == [(A, 0)] * 3
    assert codings("equal.some") == [(M, 0), (A, 0), (A, 0)]
    assert codings("verbatim.step") == [(A, 0)] + [(V, records.NOT_ARITHMETIC)] * 2
    assert codings("head.weight") == [(V, records.OTHER_SHAPE)] * 3
    assert codings("head.scalar") == [(V, records.OTHER_SHAPE), (A, 0), (A, 0)]
    assert codings("extra.cars") == [(V, records.NOT_IN_BASE), (X, 0), (X, 0)]
    assert codings("missing.one") == [(X, 0), (M, 0), (M, 0)]
    assert codings("missing.all") == [(X, 0)] * 3
    assert codings("tied.a") == [(M, 0)] * 3
    assert codings("tied.b") == codings("tied.c") == codings("tied.gap 2") == [None] * 3
    assert codings("tied.lone 2") == [(M, 0)] * 3
    assert codings("nonfinite.float32.one") == [(V, records.NONFINITE_TASK), (M, 0), (M, 0)]
    assert codings("nonfinite.float16.all") == [(V, records.NONFINITE_TASK)] * 3
    assert codings("nonfinite.bfloat16.base") == [(V, records.NONFINITE_BASE)] * 3
    assert codings("nonfinite.equal") == [(A, 0)] * 3
    assert codings("edge.float32.zeros")[0] == (M, 0)  # -0 is not +0

    assert file.decode("dtd", "verbatim.step") == 16777218
    assert same(file.decode("cars", "tied.c"), file.decode("cars", "tied.a"))
    with pytest.raises(TensorNotFoundError):
        file.decode("cars", "tied.gap 2")
    number = file.tensor_numbers
    assert [file.tensors[number[f"tied.{x}"]].alias for x in "abc"] == [
        records.NONE,
        number["tied.a"],
        number["tied.a"],
    ]
    compressed = file.planes[file.entry("dtd", "verbatim.compressible")[1].plane]
    assert compressed.coding == records.ZSTD and compressed.size < compressed.raw_size

    # What NaN and infinity left: the free ranges hold what was reserved, neighbours as one.
    assert all(a.offset + a.size < b.offset for a, b in itertools.pairwise(file.free))
    assert len(file.free) > 3
    for f in file.free:
        assert not any(file.data[f.offset : f.offset + f.size])


def test_one_tasks_masks_lie_together():
    base, tasks = family(seed=5)
    file = ref.read(ref.write(base, tasks, thresholds=THRESHOLDS, scale="unit-gain-row"))
    ranges = [
        [
            file.planes[p].offset
            for e in row
            if e and e.coding == records.MASKED
            for p in (e.plane, e.scales_plane)
        ]
        for row in file.entries
    ]
    assert all(r == sorted(r) for r in ranges)
    assert all(max(a) < min(b) for a, b in itertools.pairwise(ranges))


def test_metadata_and_files():
    files = {"config.json": b"{}" * 400, "empty": b"", "a": b"\xff\xfe\xfd"}
    data = ref.write(
        {"w": F32([1])},
        {"b": {"w": F32([2])}, "a": {}},
        thresholds={"a": 0, "b": 1},
        metadata={"k": "v\n", "": ""},
        base_metadata={"format": "pt"},
        task_metadata={"a": {"ü": "€"}},
        base_files=files,
        task_files={"a": {"config.json": files["config.json"]}, "b": {"x": b"x"}},
        writer="someone 1",
    )
    file = ref.read(data)
    file.verify()
    assert file.metadata == {
        records.SCOPE_FILE: {"": "", "k": "v\n"},
        records.SCOPE_BASE: {"format": "pt"},
        0: {},
        1: {"ü": "€"},
    }
    assert {name: file.file(records.SCOPE_BASE, name) for name in files} == files
    assert file.files[1]["config.json"] == file.files[records.SCOPE_BASE]["config.json"]
    assert file.writer == "someone 1"
    assert [(t.name, t.threshold) for t in file.tasks] == [("b", 1), ("a", 0)]


def test_referenced_base_is_checked():
    base, tasks = sample()
    data = ref.write(base, tasks, thresholds=THRESHOLDS, base_storage="reference")
    assert same_state(ref.read(data, base).base_state(), base)
    assert ref.read(data).decode("cars", "verbatim") is not None
    for wrong in (
        {},
        {**base, "mask": base["mask"] + F32(1)},
        {**base, "mask": base["mask"][:2]},
        {**base, "mask": base["mask"].astype(np.float16)},
    ):
        file = ref.read(data, wrong)
        with pytest.raises(BaseMismatchError, match="mask"):
            file.decode("dtd", "mask")
        with pytest.raises(BaseMismatchError):
            file.base_state()
    with pytest.raises(BaseMismatchError):
        ref.read(data, {**base, "mask": -base["mask"]}).verify()


def test_what_is_not_there():
    file = ref.read(sample_file())
    with pytest.raises(TaskNotFoundError, match="nothing"):
        file.decode("nothing", "mask")
    with pytest.raises(TaskNotFoundError, match="nothing"):
        file.task_state("nothing")
    with pytest.raises(TensorNotFoundError, match="nothing"):
        file.decode("cars", "nothing")
    with pytest.raises(TensorNotFoundError, match="extra"):
        file.decode("cars", "extra")


# Bad files.


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

    def finish(self):
        """The file, its hashes right."""
        slot = records.SLOT.type(*records.SLOT.struct.unpack_from(self.data, 64))
        index = self.data[slot.index_offset :][: slot.index_size]
        records.SLOT.struct.pack_into(self.data, 64, *slot._replace(index_hash=ref.hash64(index)))
        right = ref.hash64(self.data[:64] + self.data[64:120])
        self.data[120:128] = struct.pack("<Q", right)
        return bytes(self.data)


def test_editor_changes_nothing_by_itself():
    assert Editor(sample_file()).finish() == sample_file()


HUGE = 0xFFFFFFFF
OUTSIDE = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)


def one_more(x):
    return x + 1


# What the validator must refuse although every hash is right: description -> edit.
INVALID = {
    "magic": lambda e: e.header(magic=b"\x89TALL\n\x1a\0"),
    "version 0": lambda e: e.header(version=0),
    "slot: no index": lambda e: e.slot(index_size=0),
    "slot: index behind the end": lambda e: e.slot(index_offset=2**63),
    "slot: index wraps around": lambda e: e.slot(index_offset=2**64 - 64),
    "slot: index unaligned": lambda e: e.slot(index_offset=lambda x: x - 32),
    "slot: index in the header": lambda e: e.slot(index_offset=128),
    "slot: index too short": lambda e: e.slot(index_size=lambda x: x - 64),
    "slot: file longer": lambda e: e.slot(file_size=lambda x: x + 64),
    "slot: file shorter": lambda e: e.slot(file_size=lambda x: x - 64),
    "slot: nothing behind the index": lambda e: (
        e.slot(file_size=lambda x: x + 64),
        e.data.extend(bytes(64)),
    ),
    "slot: file unaligned": lambda e: e.slot(file_size=lambda x: x - 1),
    "index: planes without end": lambda e: e.index(planes=HUGE),
    "index: tensors and tasks without end": lambda e: e.index(tensors=HUGE, tasks=HUGE),
    "index: dims wrap around": lambda e: e.index(dims=2**61),
    "index: sums wrap around": lambda e: e.index(sums=2**64 - 1),
    "index: counts without end": lambda e: e.index(counts=2**63),
    "index: strings without end": lambda e: e.index(strings=2**64 - 1),
    "index: strings too short": lambda e: e.index(strings=lambda x: x - 1),
    "index: bytes behind the strings": lambda e: e.data.__setitem__(-1, 1),
    "index: referenced base with planes": lambda e: e.index(base_storage=2),
    "writer outside": lambda e: e.index(writer=OUTSIDE),
    "writer with control characters": lambda e: e.index(writer=e.text("\x07")),
    "tensor: name outside": lambda e: e.tensor("mask", name=OUTSIDE),
    "tensor: name not UTF-8": lambda e: e.tensor("tied", name=e.text("é".encode()[:1])),
    "tensor: name with control characters": lambda e: e.tensor("verbatim", name=e.text("\x07")),
    "tensor: names alike": lambda e: e.tensor("tied", name=e.text("scalar")),
    "tensor: names out of order": lambda e: e.tensor("scalar", name=e.text("verbatim")),
    "tensor: dims outside": lambda e: e.tensor("mask", dims=HUGE),
    "tensor: rank outside": lambda e: e.tensor("mask", rank=32),
    "tensor: dims of rank 0": lambda e: e.tensor("scalar", dims=1),
    "tensor: absurd shape": lambda e: struct.pack_into(
        "<Q", e.data, e.dims + 8 * e.file.tensors[e.file.tensor_numbers["equal"]].dims, 2**62
    ),
    "tensor: shape that wraps around": lambda e: struct.pack_into(
        "<QQ", e.data, e.dims + 8 * e.file.tensors[e.file.tensor_numbers["head"]].dims, 2**32, 2**32
    ),
    "tensor: absurd empty shape": lambda e: struct.pack_into(
        "<Q", e.data, e.dims + 8 * e.file.tensors[e.file.tensor_numbers["empty"]].dims + 8, 2**62
    ),
    "tensor: other element size": lambda e: e.tensor("verbatim", dtype=1),
    "tensor: half in the base": lambda e: e.tensor("mask", in_base=2),
    "tensor: typed outside the base": lambda e: e.tensor("extra", dtype=1),
    "tensor: ranked outside the base": lambda e: e.tensor("extra", rank=1, dims=1),
    "tensor: base plane outside the base": lambda e: e.tensor("extra", base_plane=0),
    "tensor: no base plane": lambda e: e.tensor("mask", base_plane=records.NONE),
    "tensor: no such base plane": lambda e: e.tensor("mask", base_plane=len(e.file.planes)),
    "tensor: base plane of another kind": lambda e: e.tensor(
        "mask", base_plane=e.number(records.MASK)
    ),
    "tensor: base plane of another size": lambda e: e.tensor("mask", base_plane=one_more),
    "tensor: empty with a plane": lambda e: e.tensor("empty", base_plane=0),
    "tensor: plane of no shared vector": lambda e: e.tensor("mask", shared_dtype=0),
    "tensor: shared vector without a plane": lambda e: e.tensor("mask", shared_plane=records.NONE),
    "tensor: shared vector of another size": lambda e: e.tensor("mask", shared_dtype=1),
    "tensor: shared vector of an integer": lambda e: e.tensor("verbatim", shared_dtype=1),
    "tensor: shared vector outside the base": lambda e: e.tensor("extra", shared_dtype=1),
    "tensor: no scales": lambda e: e.tensor("mask", scales_plane=records.NONE),
    "tensor: shared plane for scales": lambda e: e.tensor(
        "mask", scales_plane=e.number(records.SHARED)
    ),
    "tensor: scales of nothing": lambda e: e.tensor("equal", scales_plane=e.number(records.SCALES)),
    "tensor: alias of itself": lambda e: e.tensor("tied", alias=e.file.tensor_numbers["tied"]),
    "tensor: alias of a later one": lambda e: e.tensor("tied", alias=one_more),
    "tensor: alias of another shape": lambda e: e.tensor("tied", alias=0),
    "tensor: alias of another type": lambda e: e.tensor("tied", dtype=2),
    "tensor: alias with a base plane": lambda e: e.tensor("tied", base_plane=0),
    "tensor: alias with a shared plane": lambda e: e.tensor("tied", shared_plane=0),
    "tensor: alias with scales": lambda e: e.tensor("tied", scales_plane=0),
    "tensor: alias with a shared type": lambda e: e.tensor("tied", shared_dtype=1),
    "tensor: alias with counts": lambda e: e.tensor("tied", counts=1),
    "tensor: counts outside": lambda e: e.tensor("mask", first_count=HUGE),
    "tensor: first of no counts": lambda e: e.tensor("equal", first_count=1),
    "task: nameless": lambda e: e.record(records.TASK, 0, name=bytes(8)),
    "task: names alike": lambda e: e.record(records.TASK, 0, name=e.text("dtd")),
    "task: name with control characters": lambda e: e.record(records.TASK, 0, name=e.text("\x07")),
    "entry: of an alias": lambda e: e.entry("cars", "tied", plane=records.NONE),
    "entry: absent but typed": lambda e: e.entry("cars", "extra", dtype=1),
    "entry: absent but scaled": lambda e: e.entry("cars", "extra", scale=1.0),
    "entry: absent but a plane": lambda e: e.entry("cars", "extra", plane=0),
    "entry: absent for a reason": lambda e: e.entry("cars", "extra", reason=3),
    "entry: reason of a mask": lambda e: e.entry("cars", "mask", reason=1),
    "entry: verbatim for no reason": lambda e: e.entry("cars", "head", reason=0),
    "entry: verbatim without a plane": lambda e: e.entry("cars", "head", plane=records.NONE),
    "entry: verbatim in a mask's plane": lambda e: e.entry(
        "cars", "head", plane=e.number(records.MASK)
    ),
    "entry: verbatim of another size": lambda e: e.entry("cars", "head", dtype=2),
    "entry: verbatim with a scale": lambda e: e.entry("cars", "head", scale=2.0),
    "entry: verbatim with statistics": lambda e: e.entry("cars", "head", tau_sq=1.0),
    "entry: verbatim with NaN statistics": lambda e: e.entry("cars", "head", dot=math.nan),
    "entry: verbatim with bits": lambda e: e.entry("cars", "head", set_bits=1),
    "entry: verbatim with scales per row": lambda e: e.entry(
        "cars", "head", scales_plane=e.number(records.SCALES)
    ),
    "entry: dims outside": lambda e: e.entry("cars", "head", dims=HUGE),
    "entry: as a base of another type": lambda e: e.entry("cars", "equal", dtype=2),
    "entry: as a base of another shape": lambda e: e.entry("cars", "equal", dims=one_more),
    "entry: as the base with a plane": lambda e: e.entry("cars", "equal", plane=0),
    "entry: as a base that is not there": lambda e: e.entry(
        "dtd", "extra", coding=0, reason=0, plane=records.NONE, rank=0, dims=0
    ),
    "entry: mask of another shape": lambda e: e.entry("cars", "mask", rank=1),
    "entry: mask of an integer": lambda e: e.entry("cars", "mask", dtype=20),
    "entry: mask without a plane": lambda e: e.entry("cars", "mask", plane=records.NONE),
    "entry: no such plane": lambda e: e.entry("cars", "mask", plane=len(e.file.planes)),
    "entry: mask in a shared plane": lambda e: e.entry(
        "cars", "mask", plane=e.number(records.SHARED)
    ),
    "entry: mask of another size": lambda e: e.entry(
        "cars", "mask", plane=e.file.entry("dtd", "nan")[1].plane
    ),
    "entry: mask without a shared vector": lambda e: e.entry(
        "cars", "equal", coding=1, plane=e.number(records.MASK)
    ),
    "entry: scales of other rows": lambda e: e.entry(
        "cars", "mask", scales_plane=e.file.entry("dtd", "nan")[1].scales_plane
    ),
    "entry: scales in a mask's plane": lambda e: e.entry(
        "cars", "mask", scales_plane=e.number(records.MASK)
    ),
    "entry: two scales": lambda e: e.entry("cars", "mask", scale=2.0),
    "entry: more bits than published": lambda e: e.entry(
        "cars", "mask", set_bits=150, published_bits=149
    ),
    "entry: more bits than elements": lambda e: e.entry("cars", "mask", published_bits=151),
    "plane: empty": lambda e: e.plane(records.BASE, size=0),
    "plane: raw size 0": lambda e: e.plane(records.BASE, raw_size=0),
    "plane: two sizes": lambda e: e.plane(records.FILE, raw_size=one_more),
    "plane: another size": lambda e: e.plane(records.BASE, size=one_more, raw_size=one_more),
    "plane: unaligned": lambda e: e.plane(records.BASE, offset=lambda x: x + 1),
    "plane: elsewhere": lambda e: e.plane(records.BASE, offset=lambda x: x + 64),
    "plane: overlap": lambda e: e.plane(
        records.FILE, size=lambda x: x + 64, raw_size=lambda x: x + 64
    ),
    "plane: wraps around": lambda e: e.plane(records.FILE, size=2**64 - 1, raw_size=2**64 - 1),
    "plane: out of order": lambda e: e.swap(records.PLANE),
    "plane: sums outside": lambda e: e.plane(records.FILE, first_sum=2**64 - 1),
    "plane: zstd mask": lambda e: e.plane(records.MASK, coding=1),
    "plane: external mask": lambda e: e.plane(records.MASK, coding=2),
    "plane: external in an embedded base": lambda e: e.plane(
        records.BASE, coding=2, offset=0, size=0
    ),
    "plane: impossible ratio": lambda e: e.plane(records.FILE, coding=1, raw_size=2**40),
    "free: empty": lambda e: e.record(records.FREE, 0, size=0),
    "free: unaligned": lambda e: e.record(records.FREE, 0, size=lambda x: x - 1),
    "free: elsewhere": lambda e: e.record(records.FREE, 0, offset=lambda x: x + 64),
    "free: overlap": lambda e: e.record(records.FREE, 0, size=lambda x: x + 64),
    "free: out of order": lambda e: e.swap(records.FREE),
    "free: wraps around": lambda e: e.record(records.FREE, 0, size=2**64 - 64),
    "file: of no task": lambda e: e.record(records.FILE_RECORD, 0, scope=2),
    "file: of the file": lambda e: e.record(records.FILE_RECORD, 0, scope=records.SCOPE_FILE),
    "file: nameless": lambda e: e.record(records.FILE_RECORD, 0, name=bytes(8)),
    "file: named .": lambda e: e.record(records.FILE_RECORD, 0, name=e.text(".")),
    "file: named ..": lambda e: e.record(records.FILE_RECORD, 0, name=e.text("..")),
    "file: a path": lambda e: e.record(records.FILE_RECORD, 0, name=e.text("a/b")),
    "file: a Windows path": lambda e: e.record(records.FILE_RECORD, 0, name=e.text("c\\d")),
    "file: name with control characters": lambda e: e.record(
        records.FILE_RECORD, 0, name=e.text("\x07")
    ),
    "file: names alike": lambda e: e.record(records.FILE_RECORD, 0, name=e.text("vocab")),
    "file: no such plane": lambda e: e.record(records.FILE_RECORD, 0, plane=len(e.file.planes)),
    "file: plane of another kind": lambda e: e.record(records.FILE_RECORD, 0, plane=0),
    "metadata: of no task": lambda e: e.record(records.META, 0, scope=2),
    "metadata: keys alike": lambda e: e.record(records.META, 0, key=e.text("odd")),
    "metadata: not UTF-8": lambda e: e.record(records.META, 0, value=e.text("é".encode()[1:])),
    "metadata: outside": lambda e: e.record(records.META, 0, value=OUTSIDE),
}

# Wrong counts: the records behind are read askew, and the first check that they meet decides.
MISCOUNTED = {
    "a tensor more": lambda e: e.index(tensors=one_more),
    "a task more": lambda e: e.index(tasks=one_more),
    "a task less": lambda e: e.index(tasks=lambda x: x - 1),
    "a plane more": lambda e: e.index(planes=one_more),
    "no free range": lambda e: e.index(free=0),
}

# What needs a newer reader.
NEWER = {
    "version 2": lambda e: e.header(version=2),
    "header size": lambda e: e.header(header_size=256),
    "header reserved": lambda e: e.header(reserved=b"\1"),
    "slot reserved": lambda e: e.slot(reserved=b"\1"),
    "index reserved": lambda e: e.index(reserved=bytes(60) + b"\1"),
    "base storage": lambda e: e.index(base_storage=3),
    "tensor reserved": lambda e: e.tensor("mask", reserved=b"\1"),
    "tensor type": lambda e: e.tensor("mask", dtype=99),
    "shared type": lambda e: e.tensor("mask", shared_dtype=17),
    "task reserved": lambda e: e.record(records.TASK, 0, reserved=b"\1"),
    "entry type": lambda e: e.entry("cars", "head", dtype=99),
    "entry reserved": lambda e: e.entry("cars", "mask", reserved=b"\1"),
    "plane reserved": lambda e: e.plane(records.BASE, reserved=b"\1"),
    "metadata reserved": lambda e: e.record(records.META, 0, reserved=b"\1"),
}

INVALID_REFERENCED = {
    "external with an offset": lambda e: e.plane(records.BASE, offset=192),
    "external with bytes": lambda e: e.plane(records.BASE, size=64),
    "external without raw size": lambda e: e.plane(records.BASE, raw_size=0),
    "external, its sums outside": lambda e: e.plane(records.BASE, first_sum=HUGE),
    "external, larger than its sums": lambda e: e.plane(records.BASE, raw_size=2**62),
    "external mask": lambda e: e.plane(records.MASK, coding=2, offset=0, size=0),
    "external not last": lambda e: e.record(
        records.PLANE, 0, kind=records.BASE, coding=2, offset=0, size=0
    ),
    "embedded after all": lambda e: e.index(base_storage=1),
    "raw base plane": lambda e: e.record(records.PLANE, 0, kind=records.BASE),
}


def refuse(edit, *errors, **options):
    editor = Editor(sample_file(**options))
    edit(editor)
    assert bytes(editor.data) != sample_file(**options)
    for read in ref.read, functools.partial(_core.File, "file"):
        with pytest.raises(FormatError) as caught:
            read(editor.finish())
        assert caught.type in errors


@pytest.mark.parametrize("what", INVALID)
def test_invalid(what):
    refuse(INVALID[what], FormatError)


@pytest.mark.parametrize("what", MISCOUNTED)
def test_miscounted(what):
    refuse(MISCOUNTED[what], FormatError, VersionError)


@pytest.mark.parametrize("what", NEWER)
def test_newer(what):
    refuse(NEWER[what], VersionError)


@pytest.mark.parametrize("what", INVALID_REFERENCED)
def test_invalid_referenced(what):
    refuse(INVALID_REFERENCED[what], FormatError, base_storage="reference")


def test_rank_above_32():
    state = {"a": np.zeros((1,) * 32, F32), "b": np.zeros(1, F32)}
    editor = Editor(ref.write(state, {}, thresholds={}))
    editor.tensor("a", rank=33)
    with pytest.raises(FormatError, match="rank 33"):
        ref.read(editor.finish())
    with pytest.raises(CheckpointError):
        ref.write({"a": np.zeros((1,) * 33, F32)}, {}, thresholds={})


def test_alias_of_an_alias():
    base, tasks = {c: F32([1]) for c in "abc"}, {"t": {c: F32([2]) for c in "abc"}}
    editor = Editor(ref.write(base, tasks, thresholds={"t": 0.4}))
    editor.tensor("c", alias=1)
    with pytest.raises(FormatError, match="alias"):
        ref.read(editor.finish())


# Unknown numbers are refused by what needs them, and by nothing else.
UNKNOWN = {
    "plane kind": (lambda e: e.plane(records.MASK, kind=4), ("cars", "mask")),
    "plane coding": (lambda e: e.plane(records.MASK, coding=9), ("cars", "mask")),
    "coding": (lambda e: e.entry("cars", "mask", coding=9, reserved=b"any"), ("cars", "mask")),
    "merge": (lambda e: e.index(merge=2), None),
    "scale": (lambda e: e.index(scale=9), None),
    "why verbatim": (lambda e: e.entry("cars", "head", reason=6), None),
}


def fast_decode(file, task, name):
    """A tensor's bytes, by the C++ reader."""
    tensor = file.find_tensor(name)
    out = np.empty(file.info(task, tensor)[2], np.uint8)
    file.decode([(task, tensor, out.ctypes.data, None)], 1, True, _inflate)
    return out.tobytes()


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_numbers(what):
    edit, needed = UNKNOWN[what]
    editor = Editor(sample_file())
    edit(editor)
    file = ref.read(editor.finish())
    assert same_state(file.task_state("dtd"), ref.read(sample_file()).task_state("dtd"))
    fast = _core.File("file", editor.finish())
    assert fast.verify(1) == []
    broken = {needed, (needed[0], "tied")} if needed else set()  # the latter is an alias of it
    for task in (0, 1):
        for name in fast.names(task):
            if (file.tasks[task].name, name) not in broken:
                decoded = fast_decode(fast, task, name)
                assert decoded == file.decode(file.tasks[task].name, name).tobytes()
    if needed:
        with pytest.raises(VersionError):
            file.decode(*needed)
        with pytest.raises(VersionError):
            fast_decode(fast, file.task_numbers[needed[0]], needed[1])
    else:
        file.verify()


def test_bad_zstd_frames():
    """Frames of the right checksum that are none, of another size, or two."""
    data = sample_file(force_zstd=True)
    _, e = ref.read(data).entry("dtd", "extra")
    plane = ref.read(data).planes[e.plane]
    compress = zstandard.ZstdCompressor(level=3).compress
    for frame in (
        bytes(plane.size),
        compress(bytes(2401)),
        compress(bytes(2399)),
        compress(bytes(1200)) * 2,
        compress(bytes(2400)) + b"x",
        compress(bytes(2400))[:-1],
    ):
        editor = Editor(data)
        stored = frame.ljust(64, b"\0")
        editor.data[plane.offset : plane.offset + 64] = stored
        editor.record(records.PLANE, e.plane, size=len(frame), raw_size=2400)
        sums = editor.dims + 8 * len(editor.file.dims)
        struct.pack_into("<Q", editor.data, sums + 8 * plane.first_sum, ref.hash64(stored))
        file = ref.read(editor.finish())
        with pytest.raises(FormatError) as verified:
            file.verify()
        with pytest.raises(FormatError) as decoded:
            file.decode("dtd", "extra")
        assert verified.type is decoded.type is FormatError


def test_every_truncation_is_refused():
    data = sample_file()
    for size in range(len(data)):
        with pytest.raises(FormatError):
            ref.read(data[:size])


def test_every_flipped_byte_is_refused_or_harmless():
    base, tasks = {"a": F32([[1, 2, 3]]), "b": F32([4])}, {"t": {"a": F32([[1, 3, 3]])}}
    tasks["t"]["b"] = F32([np.nan])  # leaves a free range
    data = ref.write(
        base, tasks, thresholds={"t": 0.4}, metadata={"k": "v"}, base_files={"f": b"x"}
    )
    original, harmless = ref.read(data).task_state("t"), set()
    for at, flip in itertools.product(range(len(data)), (1, 0x80, 0xFF)):
        changed = bytearray(data)
        changed[at] ^= flip
        try:
            file = ref.read(changed)
            file.verify()
        except TallcodecError:
            continue
        assert same_state(file.task_state("t"), original)
        harmless.add(at)
    free = [i for f in ref.read(data).free for i in range(f.offset, f.offset + f.size)]
    assert harmless == {*range(128, 192), *free}  # the empty slot


def test_damage_is_found_by_what_reads_it():
    data = bytearray(sample_file())
    file = ref.read(data)
    _, e = file.entry("cars", "mask")
    data[file.planes[e.plane].offset] ^= 1
    file = ref.read(data)
    for use in (file.verify, lambda: file.decode("cars", "mask"), lambda: file.task_state("cars")):
        with pytest.raises(ChecksumError):
            use()
    file.task_state("dtd")


def test_slots():
    old = sample_file()
    index = old[ref.read(old).slot.index_offset :]
    head, slot = old[:64], records.SLOT.unpack(old, 64)

    def second(**fields):
        raw = records.SLOT.pack(**(slot._asdict() | fields))[:56]
        return raw + struct.pack("<Q", ref.hash64(head + raw))

    # An append that was interrupted: bytes behind the end, half a slot.
    torn = second(sequence=2)[:40] + bytes(24)
    assert ref.read(old[:128] + torn + old[192:] + b"behind").slot == slot
    # One that was not: a new index behind the old one, whose place is free now.
    editor = Editor(old)
    editor.index(writer=editor.text("cars"))
    index = editor.data[slot.index_offset :]
    free = records.FREE.pack(offset=slot.index_offset, size=slot.index_size)
    end = editor.at[records.FILE_RECORD] - slot.index_offset
    head_record = records.INDEX.unpack(index)
    index = records.INDEX.pack(**(head_record._asdict() | {"free": head_record.free + 1})) + (
        index[records.INDEX.size : end] + free + index[end:]
    ).rstrip(b"\0")
    size = records.align64(len(index))
    index = index.ljust(size, b"\0")
    new = second(
        sequence=2,
        index_offset=slot.file_size,
        index_size=size,
        index_hash=ref.hash64(index),
        file_size=slot.file_size + size,
    )
    assert ref.read(old[:128] + new + old[192:] + index).writer == "cars"
    older = second(sequence=1, file_size=0)
    assert ref.read(old[:128] + older + old[192:]).slot == slot
    with pytest.raises(ChecksumError):
        ref.read(old[:64] + bytes(128) + old[192:])


def test_same_input_same_file():
    base, tasks = family(seed=6)
    again = family(seed=6)
    assert ref.write(base, tasks, thresholds=THRESHOLDS) == ref.write(*again, thresholds=THRESHOLDS)
