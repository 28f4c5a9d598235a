"""Files of strangers: the attacks that docs/security.md lists, one test for each that no other test
file has."""

import contextlib
import functools
import os
import struct

import numpy as np
import pytest
import zstandard
from safetensors.numpy import save_file

import tallcodec
from editor import F32, Editor, same_state, sample, sample_file
from hostile import agree, bounded, changed, outcome, use, use_reference
from make import build
from tallcodec import _core, cli
from tallcodec import reference as ref
from tallcodec.errors import (
    ArgumentError,
    ChecksumError,
    FormatError,
    ReadError,
    TallcodecError,
    VersionError,
    WriteError,
)
from tallcodec.reference import records

ONE = {"a": np.arange(6, dtype=F32).reshape(2, 3)}


def written(tmp_path, data, name="hostile.tall"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def refused(data, match):
    """By both readers, as a file of no valid format."""
    with pytest.raises(FormatError, match=match):
        _core.File("file", data)
    with pytest.raises(FormatError):
        ref.read(data)


@functools.cache
def raw_file(tensors=1, tasks=0, files=(), metas=(), planes=(), strings=b"", sums=(), counts=0):
    """A file from records: tensors of no shape that no task has, tasks, and bytes of planes."""
    names = [f"{i:08x}".encode() for i in range(tensors)], [f"t{i}".encode() for i in range(tasks)]
    text = b"".join(names[0]) + b"".join(names[1]) + strings
    ends = iter(np.cumsum([0] + [len(n) for n in (*names[0], *names[1])]).tolist())

    def string(name):
        return struct.pack("<II", next(ends), len(name))

    none = records.NONE
    index = records.INDEX.pack(
        tensors=tensors, tasks=tasks, planes=len(planes), files=len(files), metas=len(metas),
        strings=len(text), sums=len(sums), counts=counts, base_storage=1, merge=1, writer=bytes(8),
    )  # fmt: skip
    for name in names[0]:
        index += records.TENSOR.pack(name=string(name), in_base=0, base_plane=none, alias=none,
                                     shared_plane=none, scales_plane=none,
                                     counts=counts, first_count=0)  # fmt: skip
    for name in names[1]:
        index += records.TASK.pack(name=string(name), method=1)
    index += records.ABSENT_ENTRY * (tensors * tasks)
    index += b"".join((*planes, *files, *metas))
    index += struct.pack(f"<{len(sums)}Q", *sums) + bytes(8 * counts) + text
    return index.ljust(records.align64(len(index)), b"\0"), len(text)


def sealed(index, planes=b""):
    from helpers import seal

    return seal(planes, index)


# Sizes that are claimed.


def zstd_file(frame, raw_size, names=1):
    """A file whose small files, of the base, all are one zstd frame."""
    padded = frame.ljust(records.align64(len(frame)), b"\0")
    plane = records.PLANE.pack(kind=records.FILE, coding=records.ZSTD, offset=192, size=len(frame),
                               raw_size=raw_size)  # fmt: skip
    text = b"".join(f"{i:05}.json".encode() for i in range(names))
    files = tuple(
        records.FILE_RECORD.pack(scope=records.SCOPE_BASE, plane=0,
                                 name=struct.pack("<II", 10 * i, 10)) for i in range(names)
    )  # fmt: skip
    index, _ = raw_file(0, 0, files, planes=(plane,), strings=text,
                        sums=tuple(records.plane_sums(frame)))  # fmt: skip
    return sealed(index, padded)


def test_a_zstd_frame_that_claims_more_than_64_mib_is_refused_when_the_file_is_opened(tmp_path):
    frame = zstandard.ZstdCompressor().compress(b"x" * 100).ljust(1 << 20, b"\0")
    data = zstd_file(frame, (1 << 20) * 32768)
    refused(data, "claims more bytes")
    path = written(tmp_path, data)
    said = bounded("attempt(lambda: tallcodec.verify(path, threads=1))", path)
    assert said.startswith("FormatError")


@pytest.mark.parametrize("frame", ["no size", "another size", "a window of 2 GiB", "cut short"])
def test_a_zstd_frame_takes_no_more_memory_than_the_file_says(tmp_path, frame):
    """The window is the frame's own claim of what decompressing it takes."""
    raw = bytes(1 << 20)
    if frame in ("no size", "a window of 2 GiB"):
        parameters = zstandard.ZstdCompressionParameters(
            window_log=27, write_content_size=frame != "no size", compression_level=1
        )
        data = bytearray(zstandard.ZstdCompressor(compression_params=parameters).compress(raw))
        if frame == "a window of 2 GiB":  # header: magic, descriptor, window, size
            data[4:5] = bytes([(data[4] & 0xDF)])
            data[5:5] = bytes([(31 - 10) << 3])
    else:
        data = bytearray(zstandard.ZstdCompressor().compress(raw))
    if frame == "cut short":
        del data[-3:]
    size = len(raw) - 1 if frame == "another size" else len(raw)
    path = written(tmp_path, zstd_file(bytes(data), size))
    said = bounded(
        """
        with tallcodec.open(path, "np", threads=1) as file:
            attempt(lambda: len(file.files()["00000.json"]))
        """,
        path,
        mebibytes=24,
    )
    assert said.startswith("FormatError") or said == f"{size}\n", said
    assert "file '00000.json'" in said or said == f"{size}\n"


def test_small_files_that_all_are_one_large_frame(tmp_path):
    """2 KiB that are 64 MiB, once in memory however many names it has, and not above 1 GiB."""
    frame = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    assert len(frame) < 1 << 14
    few, many = (written(tmp_path, zstd_file(frame, 64 << 20, n), f"{n}.tall") for n in (15, 17))
    script = """
        with tallcodec.open(path, "np", threads=1) as file:
            attempt(lambda: sum(map(len, file.files().values())))
        """
    assert bounded(script, few, mebibytes=300) == f"{15 * (64 << 20)}\n"
    script += """
            attempt(lambda: file.save(None, arguments[0]))
        """
    said = bounded(script, many, tmp_path / "out/")
    assert said.count("FormatError") == 2 and "small files of the base are 1,140,850,688" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["tensors", "tasks", "planes", "free", "files", "metas"])
def test_counts_take_no_memory(tmp_path, field):
    editor = Editor(sample_file())
    editor.index(**{field: 0xFFFFFFFF})
    path = written(tmp_path, editor.finish())
    said = bounded("""
        attempt(lambda: tallcodec.open(path, 'np'))
        attempt(lambda: reference.read(open(path, "rb").read()))
        """, path, mebibytes=16)  # fmt: skip
    assert said.count("FormatError") == 2 and "too short for its" in said


def test_names_that_share_their_bytes(tmp_path):
    """20,000 values, each all of 100,000 bytes: 2 GB of text in a file of 600 KB."""
    n, size = 20000, 100000
    keys = b"".join(f"{i:08}".encode() for i in range(n))
    metas = tuple(
        records.META.pack(scope=records.SCOPE_FILE, key=struct.pack("<II", 8 * i, 8),
                          value=struct.pack("<II", 0, size)) for i in range(n)
    )  # fmt: skip
    index, _ = raw_file(0, metas=metas, strings=keys)
    data = sealed(index)
    refused(data, "longer than all strings")
    path = written(tmp_path, data)
    said = bounded("attempt(lambda: tallcodec.open(path, 'np').info)", path, mebibytes=32)
    assert said.startswith("FormatError")


def test_counts_that_share_their_bytes():
    """Every tensor could name all counts of the file, and who lists them would hold the product."""
    refused(sealed(raw_file(2, 1, counts=3)[0]), "counts of more tasks than there are")
    assert _core.File("file", sealed(raw_file(2, 1, counts=2)[0])).tensors()[1]["agreement"]


def test_a_million_metadata_entries(tmp_path):
    """Memory and time in proportion to the file: 200,000 of them in 9 MB."""
    n = 200_000
    keys = b"".join(f"{i:08}".encode() for i in range(n))
    metas = tuple(
        records.META.pack(scope=records.SCOPE_FILE, key=struct.pack("<II", 8 * i, 8),
                          value=bytes(8)) for i in range(n)
    )  # fmt: skip
    path = written(tmp_path, sealed(raw_file(0, metas=metas, strings=keys)[0]))
    said = bounded('print(len(tallcodec.open(path, "np").info.metadata))', path, mebibytes=300)
    assert said == f"{n}\n"


def test_a_table_of_many_tensors_and_tasks():
    """Each entry is 64 bytes of the file; a table that is claimed but not there is refused."""
    index, _ = raw_file(300, 300)
    names = _core.File("file", sealed(index))
    assert names.names(299) == [] and len(names.tensors()) == len(names.tasks()) == 300
    editor = Editor(sample_file())
    editor.index(tensors=1 << 16, tasks=1 << 16)
    refused(editor.finish(), "too short for its")


def test_overlaps_of_too_many_tasks_are_not_counted(tmp_path):
    path = written(tmp_path, sealed(raw_file(1, 5000)[0]))
    said = bounded("attempt(lambda: tallcodec.stats(path))", path)
    assert said.startswith("ArgumentError") and "25,000,000 numbers" in said


def test_damage_everywhere_is_listed_in_one_pass(tmp_path):
    """Naming each of 20,000 planes took a search of its own."""
    n = 20000
    text = b"".join(f"{i:08}".encode() for i in range(n))
    planes = tuple(
        records.PLANE.pack(kind=records.FILE, offset=192 + 64 * i, size=64, raw_size=64)
        for i in range(n)
    )
    files = tuple(
        records.FILE_RECORD.pack(scope=records.SCOPE_BASE, plane=i,
                                 name=struct.pack("<II", 8 * i, 8)) for i in range(n)
    )  # fmt: skip
    index, _ = raw_file(0, files=files, planes=planes, strings=text, sums=(1,))
    path = written(tmp_path, sealed(index, bytes(64 * n)))
    with pytest.raises(ChecksumError) as caught:
        tallcodec.verify(path)
    assert str(caught.value).count("file '") == n


def test_a_folder_that_comes_to_many_large_small_files(tmp_path):
    """Of those, only what has the size of one of its own is looked at, and not kept."""
    base = {name: array.astype(F32) for name, array in ONE.items()}
    folder = tmp_path / "task"
    folder.mkdir()
    save_file({"a": base["a"] + F32(1)}, folder / "model.safetensors")
    for k in range(20):
        (folder / f"{k}.txt").write_bytes(b"%d" % (k % 10) + bytes(8 << 20))
    tallcodec.encode(base, {"t": folder}, tmp_path / "a.tall")
    for k in range(1, 20):
        (folder / f"{k}.txt").unlink()
    said = bounded("""
        attempt(lambda: tallcodec.add(path, {"new": arguments[0]}, threads=1).tasks[1].name)
    """, tmp_path / "a.tall", folder, mebibytes=120)  # fmt: skip
    assert said == "new\n"
    with tallcodec.open(tmp_path / "a.tall", "np") as file:
        assert file.files("new")["0.txt"] == file.files("t")["10.txt"]


# Where things lie.


@pytest.mark.parametrize("where", ["in the header", "over the index", "over a free range"])
def test_planes_where_none_can_be(where):
    editor = Editor(sample_file())
    place = {"in the header": 64, "over the index": editor.start,
             "over a free range": editor.file.free[0].offset}[where]  # fmt: skip
    editor.record(records.PLANE, 0, offset=place)
    refused(editor.finish(), "invalid index")


def test_free_ranges_over_planes():
    editor = Editor(sample_file())
    p = editor.file.planes[1]
    editor.record(records.FREE, 0, offset=p.offset, size=records.align64(p.size))
    refused(editor.finish(), "overlap")


def test_aliases_form_no_chain():
    base = {c: F32([1]) for c in "abc"}
    data = ref.write(base, {"t": {c: F32([2]) for c in "abc"}}, thresholds={"t": 0.4})
    for target in (1, 2, records.NONE - 1):
        editor = Editor(data)
        editor.tensor("c", alias=target)
        refused(editor.finish(), "alias of nothing")


def test_two_slots_that_disagree():
    """The one with the higher number counts, the first where they are equal, as in format.md."""
    data = ref.write(ONE, {}, thresholds={}, writer="old")
    old = ref.read(data)
    editor = Editor(data)
    index = bytearray(editor.data[old.slot.index_offset :])
    at = index.index(b"old")
    index[at : at + 3] = b"new"
    # Both indexes in one file, each with the other's place as a free range.
    head = records.INDEX.unpack(bytes(index))

    def with_free(raw, offset, size):
        cut = records.INDEX.size + 64 * head.tensors + 40 * head.planes
        body = records.INDEX.pack(**(head._asdict() | {"free": 1})) + bytes(
            raw[records.INDEX.size : cut]
        ) + records.FREE.pack(offset=offset, size=size) + bytes(raw[cut:])  # fmt: skip
        body = body.rstrip(b"\0")
        return body.ljust(records.align64(len(body)), b"\0")

    start, planes = old.slot.index_offset, data[192 : old.slot.index_offset]
    size = len(with_free(index, 0, 0))
    first = with_free(editor.data[start:], start + size, size)
    second = with_free(index, start, size)
    assert len(first) == len(second) == size
    for sequences, expected in (((1, 2), "new"), ((2, 1), "old"), ((7, 7), "old")):
        head_bytes = records.HEADER.pack(magic=records.MAGIC, version=1, header_size=192)
        slots = b""
        for sequence, body, offset in zip(sequences, (first, second), (start, start + size)):
            slot = records.SLOT.pack(
                sequence=sequence, index_offset=offset, index_size=size,
                index_hash=ref.hash64(body), file_size=start + 2 * size,
            )[:56]  # fmt: skip
            slots += slot + struct.pack("<Q", ref.hash64(head_bytes + slot))
        both = head_bytes + slots + planes + first + second
        assert _core.File("file", both).header()["writer"] == expected
        assert ref.read(both).writer == expected


# Names.


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[2J", "\x7f", b"\xff\xfe", b"\xc0\xae",
                                  b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])  # fmt: skip
@pytest.mark.parametrize("kind", [records.TENSOR, records.TASK, records.FILE_RECORD])
def test_names_with_control_characters_or_no_utf8(name, kind):
    raw = name if isinstance(name, bytes) else name.encode()
    data = ref.write(ONE, {"tas": ONE}, thresholds={"tas": 0.4}, writer="x" * 16,
                     base_files={"fil": b"x"})  # fmt: skip
    editor = Editor(data)
    at = bytes(editor.data).index(b"x" * 16)
    editor.data[at : at + len(raw)] = raw
    editor.index(writer=bytes(8))
    editor.record(kind, 0, name=struct.pack("<II", 0, len(raw)))  # the writer's is the first string
    refused(editor.finish(), "name")


def test_very_long_names(tmp_path):
    """Are names like others; where the file system has no room for one, nothing is left."""
    name = "n" * 100_000
    data = ref.write({name: ONE["a"]}, {name: ONE}, thresholds={name: 0.4})
    with tallcodec.open(written(tmp_path, data), "np") as file:
        assert file.tasks == [name] and same_state(file.decode(None), {name: ONE["a"]})
    data = ref.write(ONE, {}, thresholds={}, base_files={name + ".json": b"{}"})
    with tallcodec.open(written(tmp_path, data), "np") as file:
        with pytest.raises(WriteError, match="File name too long"):
            file.save(None, tmp_path / "out/")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "modeling.py",
                                  ".bashrc", "run.sh", "a.pkl", "a.index.json"])  # fmt: skip
def test_small_files_that_no_checkpoint_has_are_not_written(tmp_path, name):
    """No code, no pickle, no hidden file, nothing in the weights' place."""
    data = ref.write(ONE, {}, thresholds={}, base_files={name: b"x"})
    with tallcodec.open(written(tmp_path, data), "np") as file:
        with pytest.raises(ArgumentError, match="not the name of a side file"):
            file.save(None, tmp_path / "out/")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "a/b", "a\\b", ""])
def test_small_files_stay_in_their_folder(name):
    data = ref.write(ONE, {}, thresholds={}, base_files={"x" * max(1, len(name)): b"x"})
    editor = Editor(data)
    at = bytes(editor.data).index(b"x" * len(name), editor.dims) if name else 0
    editor.data[at : at + len(name)] = name.encode()
    if not name:
        editor.record(records.FILE_RECORD, 0, name=bytes(8))
    refused(editor.finish(), "no plain name")


def test_links_in_the_output_folder_are_replaced_not_followed(tmp_path):
    data = ref.write(ONE, {}, thresholds={}, base_files={"config.json": b"{}"})
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.write_bytes(b"mine")
    out.mkdir()
    (out / "config.json").symlink_to(outside)
    (out / "model.safetensors").symlink_to(outside)
    with tallcodec.open(written(tmp_path, data), "np") as file:
        file.save(None, out, overwrite=True)
    assert outside.read_bytes() == b"mine"
    assert not (out / "config.json").is_symlink() and (out / "config.json").read_bytes() == b"{}"


def test_what_the_command_prints_is_shown_and_not_obeyed(tmp_path, capsys):
    title = "\x1b]0;owned\x07 \x9b2J \u202egpj.exe"
    data = ref.write(ONE, {}, thresholds={}, metadata={"note": title})
    path = written(tmp_path, data)
    for options in ([], ["--json"]):
        assert cli.main(["inspect", str(path), *options]) == 0
        shown = capsys.readouterr().out
        assert "\\u001b]0;owned\\u0007" in shown and "\\u009b2J \\u202egpj" in shown
        assert not set(title) & set(shown) - set("owned 2Jgpj.exe]0;")


def test_a_tensor_named_as_safetensors_own_key(tmp_path):
    data = ref.write({"__metadata__": ONE["a"]}, {}, thresholds={})
    with tallcodec.open(written(tmp_path, data), "np") as file:
        with pytest.raises(ArgumentError, match="__metadata__"):
            file.save(None, tmp_path / "out.safetensors")


# Values.


@pytest.mark.parametrize("shape", [(0, 2**58), (2**58, 0), (0, 2**29, 2**29), (0,) * 32])
def test_no_elements_of_a_huge_shape(tmp_path, shape):
    data = ref.write({"a": np.empty((0,) * len(shape), F32)}, {}, thresholds={})
    editor = Editor(data)
    struct.pack_into(f"<{len(shape)}Q", editor.data, editor.dims, *shape)
    path = written(tmp_path, editor.finish())
    with tallcodec.open(path, "np") as file:
        assert file.decode(None)["a"].shape == shape
        assert file.load(None).nbytes == 0
    assert ref.read(editor.finish()).base_state()["a"].shape == shape
    tallcodec.verify(path)
    tallcodec.stats(path)


def test_a_huge_tensor_of_an_unknown_kind(tmp_path):
    """Only its claimed shape says how large it is, and what needs an unknown number is refused."""
    editor = Editor(ref.write(ONE, {}, thresholds={}))
    editor.plane(records.BASE, kind=9)
    struct.pack_into("<QQ", editor.data, editor.dims, 2**28, 2**28)
    path = written(tmp_path, editor.finish())
    with tallcodec.open(path, "np") as file:
        for action in (
            lambda: file.decode(None),
            lambda: file.decode_rows(None, "a", 0, 2**28),
            lambda: file.save(None, tmp_path / "out.safetensors"),
        ):
            with pytest.raises(VersionError, match="base plane of tensor 'a' has kind 9"):
                action()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 3e38, 1e-45])
def test_scales_of_any_value(tmp_path, value):
    """Decode to what the formula makes of them, in both readers; inspect shows them."""
    data = ref.write(*sample(), thresholds={"cars": 0.4, "dtd": 0.5})
    editor = Editor(data)
    for task in ("cars", "dtd"):
        editor.entry(task, "mask", scale=value)
    data = editor.finish()
    path = written(tmp_path, data)
    assert agree(use(path), use_reference(data))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e308])
@pytest.mark.parametrize("field", ["tau_sq", "dot", "approx_sq"])
def test_statistics_of_any_value(tmp_path, capsys, field, value):
    editor = Editor(sample_file())
    editor.entry("cars", "mask", **{field: value})
    path = str(written(tmp_path, editor.finish()))
    assert cli.main(["inspect", path]) == cli.main(["inspect", path, "--json"]) == 0


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_changed_is_refused_or_read_alike(tmp_path, part):
    """Golden files with records and planes changed and all checksums right: nothing but this
    library's errors, and the NumPy reader refuses the same or makes the same of it."""
    golden = [(data, base) for _, data, base in build()]
    for seed in range(part, 400, 4):
        original, base = golden[seed % len(golden)]
        data = changed(original, seed)
        path = written(tmp_path, data)
        fast = outcome(use, path, base, tmp_path / "out/")
        assert agree(fast, outcome(use_reference, data, base)), seed


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_changed_can_be_changed_or_is_refused(tmp_path, part):
    """Tasks go from such files, and come to them, and free ranges go: a sound file is left, or what
    was there."""
    golden = [(data, base) for _, data, base in build()]
    changes = (
        lambda path, tasks, base: tallcodec.remove(path, tasks[:1]),
        lambda path, tasks, base: tallcodec.compact(path, threads=1),
        lambda path, tasks, base: tallcodec.add(path, {"new": base}, base=base, threads=1),
    )
    made = 0
    for seed in range(part, 400, 4):
        original, base = golden[seed % len(golden)]
        data = changed(original, seed)
        path = written(tmp_path, data)
        with contextlib.suppress(TallcodecError):
            with tallcodec.open(path, "np", base) as file:
                tasks, state = file.tasks, base or file.decode(None)
            for change in changes:
                path.write_bytes(data)
                try:
                    change(path, tasks, state)
                    made += 1
                except TallcodecError:
                    assert path.read_bytes() == data, seed
                tallcodec.open(path, "np").close()
    assert made > 20


# Files that change.


def test_a_file_that_is_cut_short_while_open(tmp_path):
    path = written(tmp_path, sample_file())
    with tallcodec.open(path, "np") as file:
        os.truncate(path, 4096)
        for action in (
            lambda: file.decode("cars"),
            lambda: file.load("cars"),
            lambda: file.files(),
            lambda: file.save("cars", tmp_path / "out/"),
            lambda: file.info,
        ):
            with pytest.raises(ReadError, match="cut short since it was opened"):
                action()
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_written_to_while_open(tmp_path):
    """What was checked when it was opened is not read again; the rest is checked when it is."""
    data = sample_file()
    path = written(tmp_path, data)
    with tallcodec.open(path, "np") as file:
        with open(path, "r+b") as other:
            other.write(os.urandom(len(data)))
        assert file.tasks == ["cars", "dtd"]
        with pytest.raises(ChecksumError, match="tensor 'mask'"):
            file.decode("cars", ["mask"])


def test_huge_headers_of_safetensors(tmp_path):
    """Their length is 8 bytes, believed up to what the file has."""
    path = tmp_path / "a.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    said = bounded("attempt(lambda: tallcodec.encode(path, {'t': path}, path + '.tall'))", path)
    assert said.startswith("CheckpointError")


def test_errors_are_of_one_class():
    for error in (ArgumentError, ChecksumError, FormatError, ReadError, WriteError):
        assert issubclass(error, TallcodecError)
