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
from make import build
from tallcodec import _core, reference
from tallcodec.errors import TallcodecError
from tallcodec.file import _inflate

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


def is_refused_or_harmless(data, base, expected):
    """Whether the C++ reader refuses a damaged file, or reads it as if it were whole."""
    try:
        file = _core.File("damaged", data)
        found = {}
        for number, task in enumerate(file.tasks()):
            for name in file.names(number):
                tensor = file.find_tensor(name)
                array = np.empty(file.info(number, tensor)[2], np.uint8)
                source = None
                if file.needs_base(number, tensor):
                    memory = base[file.name(file.original(tensor))]
                    source = (-1, memory.ctypes.data)
                file.decode([(number, tensor, array.ctypes.data, source)], 1, True, _inflate)
                found[task["name"], name] = array.tobytes()
        side = [file.read_plane(p, _inflate) for _, _, p in file.files() if p is not None]
    except TallcodecError:
        return True
    return (found, side) == expected


def sound(path, base):
    tensors, files = decode_all(path, base)
    found = {
        (owner.removeprefix("task "), name): array.tobytes()
        for owner, state in tensors.items()
        if owner != "base"
        for name, array in state.items()
    }
    return found, [data for scope in files for _, data in sorted(scope.items()) if data]


def before_the_change(path):
    """Where the slot lies that a changed file was given last, and the file without it, as it was
    before; None for a file that was not changed."""
    data = path.read_bytes()
    slot = reference.read(data).slot
    at = 64 if slot.sequence == int.from_bytes(data[64:72], "little") else 128
    other = data[:at] + bytes(64) + data[at + 64 :]
    return (at, other) if slot.sequence > 1 else (None, None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_bit_flip_is_refused_or_harmless(path, tmp_path):
    data, base = path.read_bytes(), BASES[path.stem]
    expected = sound(path, base)
    slot, before = before_the_change(path)
    if before:
        (tmp_path / "before.tall").write_bytes(before)
        before = sound(tmp_path / "before.tall", base)
        assert before != expected
    assert is_refused_or_harmless(data, base, expected)
    file = _core.File("sound", data)
    assert not is_refused_or_harmless(data, base, None), "the comparison cannot fail"
    planes = [(offset, size) for _, coding, offset, size, _ in file.planes() if coding != 2]
    for at in range(len(data)):
        damaged = bytearray(data)
        for bit in range(8):
            damaged[at] = data[at] ^ 1 << bit
            found = before if before and slot <= at < slot + 64 else expected
            assert is_refused_or_harmless(bytes(damaged), base, found), (at, bit)
        if any(offset <= at < offset + size for offset, size in planes):
            assert _core.File("damaged", bytes(damaged)).verify(1), at


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for size in range(len(data)):
        with pytest.raises(TallcodecError):
            _core.File("truncated", data[:size])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_numpy_reader_refuses_damage_too(path):
    data, base = path.read_bytes(), BASES[path.stem]
    expected = EXPECTED[path.stem]["decoded"]
    sample = random.Random(path.stem)
    slot, _ = before_the_change(path)
    for _ in range(60):
        damaged = bytearray(data)
        at = sample.randrange(len(data))
        damaged[at] ^= 1 << sample.randrange(8)
        if slot and slot <= at < slot + 64:
            continue  # the file as it was before
        cut = sample.randrange(len(data))
        try:
            file = reference.read(bytes(damaged), base)
            tasks = {f"task {t.name}": digests(file.task_state(t.name)) for t in file.tasks}
        except TallcodecError:
            pass
        else:
            assert tasks == {k: v for k, v in expected.items() if k != "base"}
        with pytest.raises(TallcodecError):
            reference.read(data[:cut], base)
