"""Tasks whose planes are in memory: the same bits whatever the coding, and what they take."""

import pickle
import threading

import numpy as np
import pytest

import tallcodec
from helpers import assert_same, awkward, encoded, normal, same
from tallcodec import _core, errors

WAYS = [
    {"coding": "entropy"},
    {"coding": "raw", "scale": "unit-gain-row", "shared_dtype": "int8"},
    {"coding": "entropy", "scale": "unit-gain-row", "shared_dtype": "int8",
     "base_storage": "reference"},
    {"method": "ternary"},
    {"method": {"cars": "ternary", "dtd": "tall", "aircraft": "ternary"}, "coding": "raw"},
]  # fmt: skip


@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("big", [False, True])
def test_the_same_is_decoded(encode, options, big):
    base, tasks, _ = awkward(3, big=big)
    for k, state in enumerate((base, *tasks.values())):  # worth a zstd frame
        state["table"] = np.full(3000, k)
    with tallcodec.open(encode(base, tasks, **options), "np", base, threads=2) as file:
        for task in file.tasks:
            loaded = file.load(task)
            assert_same(loaded.decode(), file.decode(task))
            assert_same(loaded.decode(["layer.float32.7x33"]),
                        file.decode(task, ["layer.float32.7x33"]))  # fmt: skip


@pytest.mark.parametrize("kernels", _core.kernels.available())
def test_every_kernel_decodes_alike(encode, monkeypatch, kernels):
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    base, tasks, _ = awkward(4)
    with tallcodec.open(encode(base, tasks, method="ternary"), "np") as file:
        assert_same(file.load("cars").decode(), file.decode("cars"))


def test_what_it_takes(encode):
    base = {"w": normal((1000, 80), 1), "frozen": normal(500, 2)}
    base["tied"] = base["w"]
    tasks = {}
    for name in ("mask", "sparse"):
        w = base["w"] + normal((1000, 80), 3, spread=0.01)
        tasks[name] = {"w": w, "tied": w, "frozen": base["frozen"]}
    path = encode(base, tasks, method={"mask": "tall", "sparse": "ternary"}, coding="entropy")
    with tallcodec.open(path, "np") as file:
        assert file.load("mask").nbytes == 10_000
        assert file.load("sparse").nbytes == 20_000
        assert repr(file.load("mask")).startswith("<tallcodec.Loaded 'mask', 10,000 bytes, of <")


def test_into_the_callers_memory(small_file):
    with tallcodec.open(small_file, "np") as file:
        loaded, out = file.load("cars"), np.zeros((6, 40), np.float32)
        assert loaded.decode(["a.weight"], {"a.weight": out})["a.weight"] is out
        assert same(out, file.decode("cars")["a.weight"])
        with pytest.raises(errors.TensorNotFoundError):
            loaded.decode(["none"])


@pytest.mark.parametrize("kind", [1, 2, 3, 5])
def test_everything_is_checked_at_once(tmp_path, kind):
    base, tasks, _ = awkward(3)
    path = tmp_path / "x.tall"
    data = bytearray(encoded(path, base, tasks, shared_dtype="int8"))
    with tallcodec.open(path, "np") as file:
        offset = next(p[2] for p in file._file.planes() if p[0] == kind and p[3] > 30)
        file.load("cars")
    data[offset + 9] ^= 1
    path.write_bytes(data)
    with tallcodec.open(path, "np", verify=False) as file:
        with pytest.raises(errors.ChecksumError):
            file.load("cars")


def test_what_is_as_the_base_is_checked_too(tmp_path):
    base = {"frozen": normal(500, 1), "w": normal(500, 2)}
    path = tmp_path / "x.tall"
    data = bytearray(encoded(path, base, {"t": base | {"w": normal(500, 3)}}))
    data[192] ^= 1  # the base begins with "frozen"
    path.write_bytes(data)
    with tallcodec.open(path, "np") as file:
        for task in ("t", None):
            with pytest.raises(errors.ChecksumError, match="base plane of tensor 'frozen'"):
                file.load(task)


def test_the_base_has_nothing_of_its_own(small_file):
    with tallcodec.open(small_file, "np") as file:
        loaded = file.load(None)
        assert loaded.nbytes == 0
        assert_same(loaded.decode(), file.decode(None))


def test_it_is_pickled_by_its_file(small_file):
    with tallcodec.open(small_file, "np") as file:
        loaded = pickle.loads(pickle.dumps(file.load("cars")))
        assert_same(loaded.decode(), file.decode("cars"))


def test_another_base_is_refused(encode):
    base, tasks, _ = awkward(3)
    path = encode(base, tasks, base_storage="reference")
    other = base | {"layer.float32.7x33": base["layer.float32.7x33"] + 1}
    with tallcodec.open(path, "np", other) as file:
        with pytest.raises(errors.BaseMismatchError, match="layer.float32.7x33"):
            file.load("cars")
    with tallcodec.open(path, "np") as file, pytest.raises(errors.BaseMismatchError):
        file.load("cars")


def test_a_closed_file_is_closed_for_it_too(small_file):
    with tallcodec.open(small_file, "np") as file:
        loaded = file.load("cars")
        with pytest.raises(errors.TaskNotFoundError):
            file.load("sun397")
    with pytest.raises(errors.ClosedError):
        loaded.decode()


def test_many_threads_use_one(encode):
    base, tasks, _ = awkward(3)
    with tallcodec.open(encode(base, tasks, coding="entropy"), "np", threads=1) as file:
        loaded, expected, failures = file.load("dtd"), file.decode("dtd"), []

        def use():
            try:
                assert_same(loaded.decode(), expected)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
