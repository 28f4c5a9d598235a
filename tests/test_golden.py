"""The golden files: read by both readers as when they were written, and never read wrongly.

Written by tests/golden/make.py, once; every version ever released stays readable.
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

import tallcodec
from hostile import agree, outcome, use, use_reference
from make import build
from tallcodec import _core, reference
from tallcodec.errors import ChecksumError, FormatError, TallcodecError
from tallcodec.file import inflate

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
FILES = sorted(GOLDEN.glob("*.tall"))
BASES = {name: base for name, _, base in build()}


def digests(state):
    return {
        name: [array.dtype.name, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        for name, array in state.items()
    }


def decode_all(path, base):
    """What the C++ reader makes of a file: "base" and "task NAME" -> tensors; side files."""
    with tallcodec.open(path, "np", base) as file:
        owners = {f"task {task}": task for task in file.tasks}
        if base is None:
            owners["base"] = None
        tensors = {owner: file.decode(task) for owner, task in owners.items()}
        return tensors, [file.files(task) for task in (None, *file.tasks)]


def test_all_golden_files_are_expected():
    assert {path.stem for path in FILES} == EXPECTED.keys()
    assert all(path.stat().st_size < 4096 for path in FILES)


@pytest.mark.parametrize("kernels", _core.kernels.available())
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_decodes_as_when_written(path, kernels, monkeypatch):
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    tensors, _ = decode_all(path, BASES[path.stem])
    found = {owner: digests(state) for owner, state in tensors.items()}
    assert found == EXPECTED[path.stem]["decoded"]
    tallcodec.verify(path, BASES[path.stem])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_numpy_reader_agrees(path):
    base = BASES[path.stem]
    file = reference.read(path.read_bytes(), base)
    state = {} if base else {"base": file.base_state()}
    state |= {f"task {task.name}": file.task_state(task.name) for task in file.tasks}
    assert {owner: digests(s) for owner, s in state.items()} == EXPECTED[path.stem]["decoded"]


def decode_each(file, base):
    """Everything that an open file decodes to, or the error: (task, tensor) or plane -> bytes."""
    found = {}
    for task in [*range(len(file.tasks()))] + [_core.NONE] * (base is None):
        for name in file.names(task):
            tensor = file.find_tensor(name)
            array = np.empty(file.info(task, tensor)[2], np.uint8)
            source = None
            if file.needs_base(task, tensor):
                source = (-1, base[file.name(file.original(tensor))].ctypes.data)
            request = (task, tensor, array.ctypes.data, source)
            try:
                file.decode([request], 1, True, inflate)
                found[task, tensor] = array.tobytes()
            except TallcodecError as error:
                found[task, tensor] = error
    for _, _, plane in file.files():
        try:
            found[plane] = b"" if plane is None else file.read_plane(plane, inflate)
        except TallcodecError as error:
            found[plane] = error
    return found


def before_the_change(path):
    """Where the slot lies that a changed file was given last, and the file without it, as it was
    before; None for a file that was not changed."""
    data = path.read_bytes()
    slot = reference.read(data).slot
    at = 64 if slot.sequence == int.from_bytes(data[64:72], "little") else 128
    other = data[:at] + bytes(64) + data[at + 64 :]
    return (at, other) if slot.sequence > 1 else (None, None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_bit_flip_is_found_and_named_or_harmless(path):
    """In header or index: the file is not opened, but for where nothing is read. In a plane: what
    needs it is refused, by its name; all else decodes as ever; verify finds just that block."""
    data, base = path.read_bytes(), BASES[path.stem]
    sound = _core.File("sound", data)
    expected = decode_each(sound, base)
    assert not any(isinstance(found, Exception) for found in expected.values())
    slot, before = before_the_change(path)
    if before:
        before = decode_each(_core.File("before", before), base)
        assert before != expected
    planes = {
        position: number
        for number, (_, coding, offset, size, _) in enumerate(sound.planes())
        if coding != 2
        for position in range(offset, offset + -(-size // 64) * 64)
    }
    users = {number: {number} for number in planes.values()}
    for task, tensor in (key for key in expected if isinstance(key, tuple)):
        for offset, _ in sound.ranges(task, tensor):
            users[planes[offset]].add((task, tensor))
    free = {
        position
        for f in reference.read(data, base).free
        for position in range(f.offset, f.offset + f.size)
    }
    for at in range(len(data)):
        number = planes.get(at)
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            try:
                file = _core.File("damaged", bytes(damaged))
            except FormatError:
                assert number is None, (at, bit)
                continue
            found = decode_each(file, base)
            if before and slot <= at < slot + 64:
                assert found == before
                continue
            if number is None:
                assert at in free or 64 <= at < 192, "neither free nor the other slot"
                assert found == expected and file.verify(1) == []
                continue
            assert file.verify(1) == [(number, 0)]
            name = sound.describe(number)
            for key, value in found.items():
                if key in users[number]:
                    assert isinstance(value, ChecksumError) and name in str(value), (at, bit, key)
                else:
                    assert value == expected[key], (at, bit, key)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for size in range(len(data)):
        with pytest.raises(TallcodecError):
            _core.File("truncated", data[:size])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_numpy_reader_refuses_damage_too(path, tmp_path):
    """A sample: what the C++ reader refuses of a damaged file, and nothing else."""
    data, base = path.read_bytes(), BASES[path.stem]
    sample = random.Random(path.stem)
    for _ in range(60):
        damaged = bytearray(data)
        damaged[sample.randrange(len(data))] ^= 1 << sample.randrange(8)
        (tmp_path / "damaged.tall").write_bytes(damaged)
        fast = outcome(use, tmp_path / "damaged.tall", base)
        assert agree(fast, outcome(use_reference, bytes(damaged), base))
        with pytest.raises(TallcodecError):
            reference.read(data[: sample.randrange(len(data))], base)
