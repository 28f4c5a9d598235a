"""Damaged files, repaired from another copy or from a checkpoint: never made worse."""

import os
import random

import numpy as np
import pytest

import tallcodec
from helpers import normal, write_safetensors
from tallcodec import _core, cli, repair
from tallcodec.errors import ArgumentError, ChecksumError, FormatError, TallcodecError, WriteError

BLOCK = 65536


@pytest.fixture
def checkpoints(tmp_path):
    """A base of some blocks and a task with a tensor of its own, as files."""
    base = {"a": normal((300, 200), 1), "b": normal((70, 90), 2)}
    task = {name: (array + normal(array.shape, 3) * 0.1).astype(np.float32)
            for name, array in base.items()}  # fmt: skip
    random_bytes = np.random.default_rng(4).bytes(30 * 900 * 4)  # not worth compressing
    task["head"] = np.frombuffer(random_bytes, np.int32).reshape(30, 900)
    return (write_safetensors(tmp_path / "base.safetensors", base),
            write_safetensors(tmp_path / "task.safetensors", task))  # fmt: skip


@pytest.fixture
def paths(tmp_path, checkpoints):
    """A file and a copy of it."""
    base, task = checkpoints
    path, copy = tmp_path / "file.tall", tmp_path / "copy.tall"
    tallcodec.encode(base, {"t": task}, path, coding="raw")
    copy.write_bytes(path.read_bytes())
    return path, copy


def blocks_of(data):
    """(plane, block, offset) of all."""
    return [
        (plane, block, offset + block * BLOCK)
        for plane, (_, _, offset, size, _) in enumerate(_core.File("", data).planes())
        for block in range(-(-size // BLOCK))
    ]


def flip(path, *offsets):
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 0x10
    path.write_bytes(data)


def damage_of(path):
    """What is wrong, as something that can be compared: less is better."""
    try:
        return set(_core.File("", path.read_bytes()).verify(1))
    except FormatError:
        return {"header or index", *[(p, b) for p in range(99) for b in range(99)]}


def test_two_copies_damaged_in_different_places(paths):
    path, copy = paths
    whole = path.read_bytes()
    chance = random.Random(1)
    offsets = [at + chance.randrange(64) for _, _, at in blocks_of(whole)]
    flip(path, *offsets[::2])
    flip(copy, *offsets[1::2])
    result = tallcodec.verify(path, repair_from=copy)
    assert result.planes and path.read_bytes() == whole
    assert tallcodec.verify(copy, repair_from=path) and copy.read_bytes() == whole


def test_what_is_damaged_in_both_is_named_and_the_rest_repaired(paths):
    path, copy = paths
    whole = path.read_bytes()
    (_, _, first), (plane, block, second), *_ = blocks_of(whole)
    flip(path, first, second)
    flip(copy, second + 1)
    with pytest.raises(ChecksumError, match="base plane of tensor 'a'"):
        tallcodec.verify(path, repair_from=copy)
    assert damage_of(path) == {(plane, block)}
    assert path.read_bytes()[: first + BLOCK] == whole[: first + BLOCK]


def places(whole):
    index = int.from_bytes(whole[72:80], "little")
    return {"magic": 1, "header": 20, "slot": 64 + 10, "slot's hash": 64 + 60, "index": index + 200,
            "end of the index": len(whole) - 70}  # fmt: skip


@pytest.mark.parametrize("where", ["magic", "header", "slot", "slot's hash", "index",
                                   "end of the index"])  # fmt: skip
def test_header_or_index(paths, where):
    path, copy = paths
    whole = path.read_bytes()
    flip(path, places(whole)[where], blocks_of(whole)[2][2])
    with pytest.raises(FormatError):
        tallcodec.open(path, "np")
    tallcodec.verify(path, repair_from=copy)
    assert path.read_bytes() == whole


def test_header_and_index_is_too_much(paths):
    path, copy = paths
    whole = path.read_bytes()
    flip(path, places(whole)["slot"], places(whole)["index"])
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="nothing that is left of header and index"):
        tallcodec.verify(path, repair_from=copy)
    assert path.read_bytes() == before


def test_of_another_file_nothing_is_taken(paths, tmp_path, checkpoints):
    path, _ = paths
    other = tmp_path / "other.tall"
    tasks = {"t": {"a": normal((300, 200), 9)}}
    tallcodec.encode({"a": normal((300, 200), 8)}, tasks, other)
    assert tallcodec.verify(path, repair_from=other).repaired == 0
    whole = path.read_bytes()
    for where, error, match in (
        (blocks_of(whole)[0][2], ChecksumError, "base plane of tensor 'a'"),
        (places(whole)["slot"], ArgumentError, "it is another file"),
        (places(whole)["index"], ArgumentError, "it is another file"),
    ):
        path.write_bytes(whole)
        flip(path, where)
        before = path.read_bytes()
        with pytest.raises(error, match=match):
            tallcodec.verify(path, repair_from=other)
        assert path.read_bytes() == before


def test_a_file_that_is_cut_short_gets_its_end_back(paths):
    path, copy = paths
    whole = path.read_bytes()
    first, *_, last = [at for _, _, at in blocks_of(whole)]
    for length in (len(whole) - 64, last + 5, first + 5, 192):
        path.write_bytes(whole[:length])
        if length > first + 5:
            flip(path, first)
        assert tallcodec.verify(path, repair_from=copy).repaired == (2 if length > first + 5 else 1)
        assert path.read_bytes() == whole
    os.truncate(path, 100)
    with pytest.raises(ArgumentError, match="it is another file"):
        tallcodec.verify(path, repair_from=copy)


def change(path, checkpoints):
    """Add a task: what the file is then, and a copy of it."""
    tallcodec.add(path, {"new": checkpoints[1]})
    after = path.with_name("after.tall")
    after.write_bytes(path.read_bytes())
    return path.read_bytes(), after


def test_a_copy_from_before_a_change_and_one_from_after(paths, checkpoints):
    path, before = paths
    whole, after = change(path, checkpoints)
    planes = blocks_of(whole)
    old = [at for _, _, at in planes if at < before.stat().st_size]
    flip(path, old[0], old[-1])
    assert tallcodec.verify(path, repair_from=before).repaired == 2
    assert path.read_bytes() == whole
    flip(path, max(at for _, _, at in planes))
    with pytest.raises(ChecksumError, match="task 'new'"):
        tallcodec.verify(path, repair_from=before)
    assert tallcodec.verify(path, repair_from=after).repaired == 1
    flip(before, old[1])
    assert tallcodec.verify(before, repair_from=after).repaired == 1
    assert tallcodec.open(before, "np").tasks == ["t"]  # the change is not brought to it


@pytest.mark.parametrize("slot", [0, 1])
def test_a_slot_that_is_damaged_is_told_and_repaired(paths, checkpoints, slot, capsys):
    """Without the latest one, a file is what it was before the change."""
    path, copy = paths
    assert not tallcodec.verify(path).damaged_slot
    tallcodec.add(path, {"new": checkpoints[1]})
    whole = path.read_bytes()
    copy.write_bytes(whole)
    flip(path, 64 + 64 * slot + 20)
    assert tallcodec.open(path, "np").tasks == (["t", "new"] if slot == 0 else ["t"])
    assert tallcodec.verify(path).damaged_slot
    assert cli.main(["verify", str(path)]) == 0
    assert "a slot of its header is damaged" in capsys.readouterr().out
    found = tallcodec.verify(path, repair_from=copy)
    assert (found.repaired, found.damaged_slot) == (1, False) and path.read_bytes() == whole


def test_a_copy_does_not_take_a_change_back(paths, checkpoints):
    """Its slot is the one before; that it is damaged in the file does not matter."""
    path, before = paths
    tallcodec.add(path, {"new": checkpoints[1]})
    flip(path, 64 + 20)
    damaged = path.read_bytes()
    assert tallcodec.verify(path, repair_from=before).repaired == 0
    assert path.read_bytes() == damaged and tallcodec.open(path, "np").tasks == ["t", "new"]


def test_an_index_that_only_a_later_copy_has(paths, checkpoints):
    path, before = paths
    whole, after = change(path, checkpoints)
    flip(path, len(whole) - 70)
    damaged = path.read_bytes()
    with pytest.raises(ArgumentError, match="its last change wrote is damaged .*from before that"):
        tallcodec.verify(path, repair_from=before)
    assert path.read_bytes() == damaged
    assert tallcodec.verify(path, repair_from=after).repaired == 1
    assert path.read_bytes() == whole


def test_from_a_state_dict(paths, checkpoints):
    path, _ = paths
    whole = path.read_bytes()
    flip(path, blocks_of(whole)[0][2])
    state = {"a": normal((300, 200), 1), "b": normal((70, 90), 2)}
    assert tallcodec.verify(path, repair_from=state).repaired == 1
    assert path.read_bytes() == whole


def test_from_the_checkpoints_it_was_encoded_from(paths, checkpoints):
    """What is stored as it is: planes of the base, and what is verbatim."""
    path, _ = paths
    whole = path.read_bytes()
    kinds = [kind for kind, *_ in _core.File("", whole).planes()]
    base, verbatim, mask = kinds.index(1), kinds.index(6), kinds.index(3)
    at = {plane: offset for plane, _, offset in reversed(blocks_of(whole))}
    flip(path, at[base] + BLOCK + 5, at[verbatim] + 7, at[mask])
    with pytest.raises(ChecksumError, match="verbatim plane of tensor 'head', task 't'"):
        tallcodec.verify(path, repair_from=checkpoints[0])
    assert damage_of(path) == {(verbatim, 0), (mask, 0)}
    with pytest.raises(ChecksumError, match="in: mask of tensor 'a', task 't' "):
        tallcodec.verify(path, repair_from=checkpoints[1])
    assert damage_of(path) == {(mask, 0)}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["planes", "slot", "index"])
def test_interrupted_at_every_write_it_is_never_worse(paths, monkeypatch, where):
    path, copy = paths
    whole = path.read_bytes()
    flip(path, *[at for _, _, at in blocks_of(whole)[::2]])
    if where != "planes":
        flip(path, places(whole)[where])
    broken = path.read_bytes()
    real = os.pwrite
    for left in range(50):
        path.write_bytes(broken)
        writes = [left]

        def pwrite(fd, data, offset):
            if not writes[0]:
                real(fd, data[: len(data) // 2], offset)  # torn
                raise Killed
            writes[0] -= 1
            return real(fd, data, offset)

        before = damage_of(path)
        monkeypatch.setattr(os, "pwrite", pwrite)
        try:
            tallcodec.verify(path, repair_from=copy)
        except Killed:
            finished = False
        else:
            finished = True
        monkeypatch.setattr(os, "pwrite", real)
        assert damage_of(path) <= before
        tallcodec.verify(path, repair_from=copy)
        assert path.read_bytes() == whole
        if finished:
            assert left > 1
            return
    pytest.fail("it wrote more than there was to repair")


def test_a_sound_file_is_not_written(paths, monkeypatch):
    path, copy = paths
    monkeypatch.setattr(repair, "_write", lambda *_: pytest.fail("written"))
    tallcodec.verify(path, repair_from=copy)
    tallcodec.verify(path, repair_from=path)


def test_files_that_cannot_be_written(paths, tmp_path):
    path, copy = paths
    with pytest.raises(WriteError):
        tallcodec.verify(tmp_path / "none.tall", repair_from=copy)
    with pytest.raises(TallcodecError):
        tallcodec.verify(path, repair_from=tmp_path / "none.tall")


def test_by_the_command(paths, capsys):
    path, copy = paths
    whole = path.read_bytes()
    flip(path, blocks_of(whole)[0][2])
    assert cli.main(["verify", str(path)]) == 1
    assert "base plane of tensor 'a'" in capsys.readouterr().err
    assert cli.main(["verify", str(path), "--repair-from", str(copy)]) == 0
    assert path.read_bytes() == whole
