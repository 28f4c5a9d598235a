"""What the reference and the core refuse: records that break docs/format.md, and damage."""

import functools
import itertools
import math
import struct

import numpy as np
import pytest
import zstandard

from editor import F32, Editor, same_state, sample_file
from tallcodec import _core
from tallcodec import reference as ref
from tallcodec.errors import (
    CheckpointError,
    ChecksumError,
    FormatError,
    TallcodecError,
    VersionError,
)
from tallcodec.file import inflate
from tallcodec.reference import records

pytestmark = pytest.mark.filterwarnings("error")


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
    "entry: a factor without an adapted mask": lambda e: e.entry("cars", "mask", factor=0.5),
    "entry: a factor without a mask": lambda e: e.entry("cars", "head", factor=0.5),
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


INVALID_TERNARY = {
    "raw but smaller": lambda e: e.plane(records.TERNARY_PLANE, size=lambda x: x - 1),
    "a zstd frame": lambda e: e.plane(records.TERNARY_PLANE, coding=1),
    "of another size": lambda e: e.plane(records.TERNARY_PLANE, raw_size=lambda x: x + 1),
    "another plane by gaps": lambda e: e.plane(records.BASE, coding=3),
    "coded as a mask": lambda e: e.plane(records.TERNARY_PLANE, coding=4),
    "another plane as a mask": lambda e: e.plane(records.BASE, coding=4),
    "of another kind": lambda e: e.plane(records.TERNARY_PLANE, kind=6, coding=0),
    "with a factor": lambda e: e.entry("cars", "mask", factor=1.0),
    "with scales per row": lambda e: e.entry("cars", "mask", scales_plane=0),
    "with more than all": lambda e: e.entry("cars", "mask", set_bits=151, published_bits=151),
    "with two counts": lambda e: e.entry("cars", "mask", published_bits=lambda x: x + 1),
    "without a plane": lambda e: e.entry("cars", "mask", plane=records.NONE),
    "of another shape": lambda e: e.entry("cars", "mask", rank=1),
}


@pytest.mark.parametrize("what", INVALID_TERNARY)
def test_invalid_ternary(what):
    refuse(INVALID_TERNARY[what], FormatError, method="ternary", scale="none")


@pytest.mark.parametrize("factor", [0, -0.5, math.inf, math.nan, 1e-40])
def test_factor_of_an_adapted_mask(factor):
    refuse(lambda e: e.entry("cars", "mask", factor=factor), FormatError, method="adapted")


def test_rank_above_32():
    state = {"a": np.zeros((1,) * 32, F32), "b": np.zeros(1, F32)}
    editor = Editor(ref.write(state, {}, thresholds={}))
    editor.tensor("a", rank=33)
    with pytest.raises(FormatError, match="rank 33"):
        ref.read(editor.finish())
    with pytest.raises((CheckpointError, ValueError)):  # NumPy 1 makes no such array
        ref.write({"a": np.zeros((1,) * 33, F32)}, {}, thresholds={})


def test_alias_of_an_alias():
    base, tasks = {c: F32([1]) for c in "abc"}, {"t": {c: F32([2]) for c in "abc"}}
    editor = Editor(ref.write(base, tasks, thresholds={"t": 0.4}))
    editor.tensor("c", alias=1)
    with pytest.raises(FormatError, match="alias"):
        ref.read(editor.finish())


# Unknown numbers are refused by what needs them, and by nothing else.
UNKNOWN = {
    "plane kind": (lambda e: e.plane(records.MASK, kind=8), ("cars", "mask")),
    "plane coding": (lambda e: e.plane(records.MASK, coding=9), ("cars", "mask")),
    "coding": (lambda e: e.entry("cars", "mask", coding=9, factor=0.5), ("cars", "mask")),
    "method": (lambda e: (e.record(records.TASK, 0, method=9), e.entry("cars", "mask", factor=-1)),
               None),
    "merge": (lambda e: e.index(merge=9), None),
    "scale": (lambda e: e.index(scale=9), None),
    "why verbatim": (lambda e: e.entry("cars", "head", reason=6), None),
}


def fast_decode(file, task, name):
    """A tensor's bytes, by the C++ reader."""
    tensor = file.find_tensor(name)
    out = np.empty(file.info(task, tensor)[2], np.uint8)
    file.decode([(task, tensor, out.ctypes.data, None)], 1, True, inflate)
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
