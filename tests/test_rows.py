"""Rows of a tensor, decoded alone."""

import numpy as np
import pytest

import tallcodec
from helpers import awkward, same, small_family
from tallcodec import errors

WAYS = [
    {},
    {"scale": "unit-gain-row", "shared_dtype": "int8", "base_storage": "reference"},
    {"method": "ternary", "shared_dtype": "bfloat16"},
]


def ranges(rows, random):
    """None, all, one at either end, and some in the middle."""
    a, b = sorted(random.integers(0, rows + 1, 2))
    return {(0, 0), (0, rows), (rows, rows), (0, min(1, rows)), (max(0, rows - 1), rows), (a, b)}


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("big", [False, True])
def test_rows_are_those_of_the_whole_tensor(encode, options, big):
    random = np.random.default_rng(0)
    base, tasks, _ = awkward(1, big=big)
    path = encode(base, tasks, **options)
    given = base if "base_storage" in options else None
    with tallcodec.open(path, "np", given, threads=2) as file:
        for task in (None, *file.tasks):
            for name, whole in file.decode(task).items():
                if not whole.ndim:
                    continue
                for start, stop in ranges(len(whole), random):
                    part = file.decode_rows(task, name, start, stop)
                    assert same(part, whole[start:stop]), (task, name, start, stop)


def test_rows_go_into_the_callers_memory(small_file):
    memory = np.full((4, 40), 7, np.float32)
    with tallcodec.open(small_file, "np") as file:
        whole = file.decode("cars")["a.weight"]
        assert file.decode_rows("cars", "a.weight", 3, 5, memory[1:3]).base is memory
        assert same(memory[1:3], whole[3:5])
        assert (memory[[0, 3]] == 7).all()
        with pytest.raises(errors.TensorMismatchError, match=r"F32 \(3, 40\)"):
            file.decode_rows("cars", "a.weight", 3, 5, memory[:3])
    assert (memory[[0, 3]] == 7).all()


def test_only_what_the_rows_need_is_checked(tmp_path):
    base = {"w": np.zeros((4, 400_000), np.float32)}
    tasks = {"t": {"w": np.ones((4, 400_000), np.float32)}}
    path = tmp_path / "x.tall"
    tallcodec.encode(base, tasks, path)
    data = bytearray(path.read_bytes())
    data[192 + 4 * 400_000 * 3] ^= 1  # where the base's last row begins
    path.write_bytes(data)
    with tallcodec.open(path, "np") as file:
        assert (file.decode_rows("t", "w", 0, 2) == 1).all()
        with pytest.raises(errors.ChecksumError, match="base plane of tensor 'w'"):
            file.decode_rows("t", "w", 2, 4)


@pytest.mark.parametrize("start, stop", [(-1, 2), (0, 7), (3, 2), (7, 7)])
def test_rows_that_are_not_there_are_refused(small_file, start, stop):
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.ArgumentError, match="rows 0 to 6"):
            file.decode_rows("cars", "a.weight", start, stop)


@pytest.mark.parametrize("rows", [(0.0, 2), (0, None), ("0", 2)])
def test_rows_are_whole_numbers(small_file, rows):
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.ArgumentError, match="rows are whole numbers"):
            file.decode_rows("cars", "a.weight", *rows)


def test_a_scalar_has_no_rows(encode):
    base, tasks = small_family()
    for state in (base, *tasks.values()):
        state["step"] = np.array(3)
    with tallcodec.open(encode(base, tasks), "np") as file:
        with pytest.raises(errors.ArgumentError, match="'step' is a scalar"):
            file.decode_rows("cars", "step", 0, 1)
