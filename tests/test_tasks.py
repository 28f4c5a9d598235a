"""add, remove and compact: against the NumPy reference, byte for byte, and against encode. What
becomes of a file when they are killed or fail is in test_faults.py."""

import json
import os
import pickle
import shutil
import threading

import numpy as np
import pytest

import tallcodec
from helpers import (
    assert_same,
    awkward,
    names_in,
    normal,
    same,
    seal,
    small_family,
    unseal,
    write_safetensors,
)
from tallcodec import _core, cli, output, reference
from tallcodec.errors import (
    ArgumentError,
    BaseMismatchError,
    CheckpointError,
    ChecksumError,
    FormatError,
    ReadError,
    TaskMismatchError,
    TaskNotFoundError,
    WriteError,
)

WRITER = {"writer": f"tallcodec {tallcodec.__version__}"}


def some(tasks, *names):
    return {name: tasks[name] for name in names}


def decoded(path, base=None):
    """All that a file holds, by owner, each tensor's bits."""
    with tallcodec.open(path, "np", base) as file:
        owners = ([] if base else [None]) + file.tasks
        states = {owner: file.decode(owner) for owner in owners}
        sides = {owner: (file.files(owner), file.metadata(owner)) for owner in [None, *file.tasks]}
    return states, sides


def assert_kept(path, before, tasks, base=None):
    """What was there of these tasks, and of the base, is as it was."""
    states, sides = decoded(path, base)
    for owner in {None, *tasks} & before[0].keys():
        assert_same(states[owner], before[0][owner])
    for owner in (None, *tasks):
        assert sides[owner] == before[1][owner]


@pytest.mark.parametrize("options", [
    {},
    {"scale": "unit-gain-row", "shared_dtype": "int8", "coding": "entropy"},
    {"scale": "unit-gain-row", "shared_dtype": "float16"},
    {"shared_dtype": "bfloat16", "base_storage": "reference"},
    {"merge": "ties", "coding": "entropy"},
    {"merge": "average", "threshold": 0.4},
    {"method": "magnitude"},
    {"method": "ternary"},
    {"method": {"cars": "ternary", "dtd": "tall"}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("big", [False, True], ids=["small", "big"])
def test_as_the_reference_does(encode, options, big):
    base, tasks, _ = awkward(3, tasks=4, big=big)
    path = encode(base, some(tasks, "cars", "dtd"), **options)
    given = base if "base_storage" in options else None
    made, before = path.read_bytes(), decoded(path, given)
    masked = options.get("method") != "ternary"
    method = {"aircraft": "tall" if masked else "ternary", "sun397": "ternary"}
    new = some(tasks, *method)
    info = tallcodec.add(path, new, base=given, method=method, threads=3)
    expected = reference.add(
        made, new, base=given, least_bits=True, bits=dict.fromkeys(new, 0.6),
        method={t: "adapted" if m == "tall" else m for t, m in method.items()}, **WRITER,
    )  # fmt: skip
    assert path.read_bytes() == expected
    assert [task.name for task in info.tasks] == ["cars", "dtd", "aircraft", "sun397"]
    tallcodec.verify(path, given)
    assert_kept(path, before, ["cars", "dtd"], given)
    found = reference.read(expected, base)
    with tallcodec.open(path, "np", given) as file:
        for task in file.tasks:
            assert_same(file.decode(task), found.task_state(task))

    tallcodec.remove(path, ["dtd", "sun397"])
    expected = reference.remove(expected, ["dtd", "sun397"], **WRITER)
    assert path.read_bytes() == expected
    tallcodec.verify(path, given)
    assert_kept(path, before, ["cars"], given)

    info = tallcodec.compact(path, threads=2)
    expected = reference.compact(expected, **WRITER)
    assert path.read_bytes() == expected
    assert info.reclaimable == 0 and info.bytes == len(expected)
    tallcodec.verify(path, given)
    assert_kept(path, before, ["cars"], given)


@pytest.mark.parametrize("threads, kernels", [(1, "scalar"), (4, "scalar"), (3, None)])
def test_one_file_for_any_threads_and_kernels(encode, monkeypatch, threads, kernels):
    base, tasks, _ = awkward(4, big=True)
    path = encode(base, some(tasks, "cars", "dtd"), shared_dtype="int8")
    other = path.with_name("other.tall")
    shutil.copy(path, other)
    tallcodec.add(path, some(tasks, "aircraft"), method="tall", threads=2)
    if kernels:
        monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    tallcodec.add(other, some(tasks, "aircraft"), method="tall", threads=threads)
    assert path.read_bytes() == other.read_bytes()


def test_lambda(encode):
    base, tasks, thresholds = awkward(5)
    path = encode(base, some(tasks, "cars", "dtd"), threshold=some(thresholds, "cars", "dtd"))
    made = path.read_bytes()
    tallcodec.add(path, some(tasks, "aircraft"), threshold=0.6, method="tall")
    expected = reference.add(made, some(tasks, "aircraft"), method="tall",
                             thresholds=thresholds, **WRITER)  # fmt: skip
    assert path.read_bytes() == expected


def test_a_ternary_task_is_as_encode_makes_it(encode):
    base, tasks, _ = awkward(6)
    whole = encode(base, tasks, method="ternary", bits=0.8)
    path = encode(base, some(tasks, "cars", "dtd"), method="ternary", bits=0.8)
    made = path.read_bytes()
    tallcodec.add(path, some(tasks, "aircraft"), bits=0.8, method="ternary")
    assert_same(decoded(path)[0]["aircraft"], decoded(whole)[0]["aircraft"])
    tallcodec.remove(path, ["aircraft"])
    tallcodec.compact(path)
    assert same_but_for_ties(path.read_bytes(), made)


def same_but_for_ties(after, before):
    """A file to which a task came, and from which it went, is what it was; but what the task untied
    stays so."""
    a, b = reference.read(after), reference.read(before)
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    for task in b.tasks:
        assert_same(a.task_state(task.name), b.task_state(task.name))
    return len(after) <= len(before) + 64 * len(a.tensors) * len(a.tasks)


def test_come_and_gone(encode):
    """Nothing is left of it, not a byte, once the file is compact."""
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, some(tasks, "cars", "dtd"), metadata={"who": "tests"})
    made = path.read_bytes()
    tallcodec.add(path, {"sun397": {**tasks["sun397"], "head": normal(7)}}, method="ternary")
    assert "head" in tallcodec.open(path, "np").tensors
    info = tallcodec.remove(path, ["sun397"])
    assert info.reclaimable > 1000 and "to reclaim" in str(info)
    assert "head" not in tallcodec.open(path, "np").tensors
    tallcodec.compact(path)
    assert path.read_bytes() == made
    tallcodec.compact(path)
    assert path.read_bytes() == made


def test_all_tasks_may_go(encode):
    base, tasks = small_family()
    path = encode(base, tasks)
    info = tallcodec.remove(path, ["dtd", "cars", "cars"])
    assert info.tasks == [] and "shared" not in info.planes and "0 tasks" in str(info)
    assert_same(decoded(path)[0][None], base)
    assert reference.read(path.read_bytes()).tasks == []
    tallcodec.compact(path)
    with pytest.raises(ArgumentError, match="no shared vector"):
        tallcodec.add(path, tasks, method="tall")
    info = tallcodec.add(path, tasks)
    assert [task.method for task in info.tasks] == ["ternary", "ternary"]
    whole = encode(base, tasks, method="ternary")
    assert_same(decoded(path)[0]["dtd"], decoded(whole)[0]["dtd"])


def test_auto_takes_what_is_nearer_at_equal_bits(encode):
    """A copy of a task that is there follows the shared vector; a task of its own does not."""
    base = {"a": normal((300, 500), 1), "b": normal((100, 400), 2)}

    def tuned(seed, scale=0.1):
        return {n: a + normal(a.shape, seed + i, spread=scale)
                for i, (n, a) in enumerate(base.items())}  # fmt: skip

    tasks = {"one": tuned(10)}
    path = encode(base, tasks)
    new = {"again": {n: a + normal(a.shape, 77, spread=1e-4) for n, a in tasks["one"].items()},
           "other": tuned(30)}  # fmt: skip
    info = tallcodec.add(path, new)
    found = {task.name: task for task in info.tasks}
    assert found["again"].method == "adapted" and found["other"].method == "ternary"
    forced = encode(base, tasks)
    info = tallcodec.add(forced, new, method="tall")
    masks = {task.name: task for task in info.tasks}
    assert masks["other"].error > found["other"].error
    assert abs(masks["other"].bits / found["other"].bits - 1) < 0.02
    assert_same(decoded(path)[0]["again"], decoded(forced)[0]["again"])
    one = encode(base, tasks)
    tallcodec.add(one, some(new, "other"))
    assert_same(decoded(path)[0]["other"], decoded(one)[0]["other"])
    mixed = encode(base, tasks)
    info = tallcodec.add(mixed, new, method={"again": "ternary", "other": "auto"})
    assert [task.method for task in info.tasks[1:]] == ["ternary", "ternary"]


def test_auto_where_nothing_is_to_be_coded(encode):
    base, tasks = small_family()
    path = encode(base, tasks)
    info = tallcodec.add(path, {"same": dict(base), "cut": {"a.bias": base["a.bias"][:7]}})
    assert [task.tensors["verbatim"] for task in info.tasks] == [0, 0, 0, 1]
    states, _ = decoded(path)
    assert_same(states["same"], base)
    assert_same(states["cut"], {"a.bias": base["a.bias"][:7]})


def test_tied_tensors_stay_tied_or_part(encode):
    base, tasks = small_family(("cars", "dtd", "sun397", "mnist"))
    for state in (base, *tasks.values()):
        state["tied"], state["tied too"] = state["a.weight"].copy(), state["a.weight"].copy()
    for options in ({}, {"method": "ternary"}, {"scale": "unit-gain-row", "coding": "entropy"}):
        path = encode(base, some(tasks, "cars", "dtd"), **options)
        before = decoded(path)
        tallcodec.add(path, some(tasks, "sun397"))
        assert tallcodec.open(path, "np").info.tasks[2].tensors["tied"] == 2
        made = path.read_bytes()
        parted = {**tasks["mnist"], "tied": tasks["mnist"]["tied"] + 1}
        info = tallcodec.add(path, {"mnist": parted}, method="ternary", bits=4)
        assert info.tasks[2].tensors["tied"] == info.tasks[3].tensors["tied"] == 1
        expected = reference.add(made, {"mnist": parted}, method="ternary", bits={"mnist": 4},
                                 **WRITER)  # fmt: skip
        assert path.read_bytes() == expected
        assert_kept(path, before, ["cars", "dtd"])
        state = decoded(path)[0]["mnist"]
        assert not same(state["tied"], state["a.weight"]) and same(state["tied too"],
                                                                   state["a.weight"])  # fmt: skip
        tallcodec.remove(path, ["mnist", "dtd"])
        tallcodec.compact(path)
        tallcodec.verify(path)
        assert_kept(path, before, ["cars"])
        tallcodec.add(path, {"lacks": {"tied": base["tied"]}})
        assert list(decoded(path)[0]["lacks"]) == ["tied"]
        assert_kept(path, before, ["cars"])


def test_folders_and_metadata_come_along(checkpoints, tmp_path):
    path = tmp_path / "a.tall"
    dtd = checkpoints / "dtd"
    tallcodec.encode(checkpoints / "base.safetensors", {"dtd": dtd}, path)
    info = tallcodec.add(path, {"cars": checkpoints / "cars.safetensors", "again": dtd})
    _, sides = decoded(path)
    assert sides["cars"] == ({}, {"made by": "a test"})
    assert sides["again"] == sides["dtd"] and sides["dtd"][0].keys() == {"config.json", "vocab.txt"}
    before = info.planes["file"]
    other = tmp_path / "other"
    shutil.copytree(dtd, other)
    (other / "config.json").write_text('{"hidden_size": 41}')
    info = tallcodec.add(path, {"other": other})
    assert 0 < info.planes["file"] - before < 40  # the vocabulary is there already
    info = tallcodec.remove(path, ["dtd", "other"])
    assert info.planes["file"] == before
    _, sides = decoded(path)
    assert sides["again"][0]["config.json"] == b'{"hidden_size": 40}'
    with tallcodec.open(path, "np") as file:
        file.save("again", tmp_path / "saved")
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == (dtd / "vocab.txt").read_bytes()


def test_scores_of_a_task_go_with_it(encode):
    base, tasks = small_family()
    path = encode(base, tasks, threshold="search", score=lambda *_: 1.0)
    assert tallcodec.open(path, "np").info.scores.keys() == {"cars", "dtd"}
    info = tallcodec.remove(path, ["cars"])
    assert info.scores.keys() == {"dtd"}
    info = tallcodec.add(path, some(tasks, "cars"))
    assert info.scores.keys() == {"dtd"} and len(info.scores["dtd"]) == 5


def test_a_referenced_base(encode):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, some(tasks, "cars", "dtd"), base_storage="reference")
    made, new = path.read_bytes(), some(tasks, "sun397")
    with pytest.raises(ArgumentError, match="give it"):
        tallcodec.add(path, new)
    wrong = base | {"a.bias": base["a.bias"] + 1}
    with pytest.raises(BaseMismatchError, match="tensor 'a.bias'"):
        tallcodec.add(path, new, base=wrong)
    with pytest.raises(BaseMismatchError, match="lacks it"):
        tallcodec.add(path, new, base={"a.bias": base["a.bias"]})
    assert path.read_bytes() == made
    tallcodec.add(path, new, base=base)
    tallcodec.verify(path, base)
    tallcodec.remove(path, ["dtd"])
    tallcodec.compact(path)
    assert tallcodec.verify(path, base).base_checked


def test_a_base_that_is_there_is_checked_too(encode):
    base, tasks = small_family(("cars", "dtd"))
    path, other = encode(base, some(tasks, "cars")), encode(base, some(tasks, "cars"))
    with pytest.raises(BaseMismatchError, match="tensor 'b.weight'"):
        tallcodec.add(path, some(tasks, "dtd"), base=base | {"b.weight": base["b.weight"] * 2})
    tallcodec.add(path, some(tasks, "dtd"), base=base)
    tallcodec.add(other, some(tasks, "dtd"))
    assert path.read_bytes() == other.read_bytes()


def test_what_is_refused_leaves_the_file_alone(encode, tmp_path):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, some(tasks, "cars", "dtd"))
    made, stat = path.read_bytes(), path.stat()
    new = some(tasks, "sun397")

    def interrupt(*_):
        raise KeyboardInterrupt

    for error, message, call in [
        (ArgumentError, "a task 'cars' already: remove it", lambda: tallcodec.add(path, tasks)),
        (ArgumentError, "no tasks", lambda: tallcodec.add(path, {})),
        (ArgumentError, "method must be", lambda: tallcodec.add(path, new, method="magnitude")),
        (ArgumentError, "method must name", lambda: tallcodec.add(path, new, method={"x": "tall"})),
        (ArgumentError, "bits is for", lambda: tallcodec.add(path, new, bits=1)),
        (ArgumentError, "threshold must be", lambda: tallcodec.add(path, new, threshold="search")),
        (ArgumentError, "threshold is for masks",
         lambda: tallcodec.add(path, new, method="ternary", threshold=0.4)),
        (ArgumentError, "coding must be", lambda: tallcodec.add(path, new, coding="zip")),
        (ArgumentError, "cannot be met",
         lambda: tallcodec.add(path, new, method="ternary", bits=1e-6)),
        (ArgumentError, "name at least one", lambda: tallcodec.remove(path, [])),
        (ArgumentError, "a list of names", lambda: tallcodec.remove(path, "cars")),
        (TaskNotFoundError, "no task 'x'; it has 'cars', 'dtd'",
         lambda: tallcodec.remove(path, ["cars", "x"])),
        (CheckpointError, "is that its base",
         lambda: tallcodec.add(path, {"x": {"other": normal(3)}})),
        (KeyboardInterrupt, None, lambda: tallcodec.add(path, new, progress=interrupt)),
        (WriteError, "there is no", lambda: tallcodec.remove(tmp_path / "none", ["cars"])),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
        assert path.read_bytes() == made, message
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert names_in(tmp_path) == [path.name]
    path.write_bytes(b"")
    with pytest.raises(FormatError):
        tallcodec.add(path, new)
    path.write_bytes(made[:-64])
    with pytest.raises(FormatError, match="truncated"):
        tallcodec.remove(path, ["cars"])


def test_damage_is_not_carried_on(encode):
    base, tasks = small_family(("cars", "dtd"))
    path = encode(base, some(tasks, "cars"))
    made = path.read_bytes()
    for at in (200, reference.read(made).planes[3].offset):  # the base; a shared vector
        damaged = bytearray(made)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ChecksumError, match="wrong checksum in the base or the shared"):
            tallcodec.add(path, some(tasks, "dtd"))
        assert path.read_bytes() == damaged
    path.write_bytes(made)
    tallcodec.add(path, some(tasks, "dtd"))
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ChecksumError):
        tallcodec.compact(path)
    assert path.read_bytes() == damaged and names_in(path.parent) == [path.name]


def test_what_a_newer_version_wrote_is_left_to_it(encode):
    base, tasks = small_family(("cars", "dtd"))
    made = reference.write(base, tasks, method="adapted")
    path = encode(base, tasks)
    record = reference.read(made).slot.index_offset + 128 + 3 * 64 + 12  # a task's method
    planes, index = unseal(made)
    at = record - 192 - len(planes)
    index = index[:at] + b"\x09" + index[at + 1 :]
    path.write_bytes(seal(planes, index))
    assert tallcodec.open(path, "np").tasks == ["cars", "dtd"]
    for call in (lambda: tallcodec.remove(path, ["cars"]),
                 lambda: tallcodec.add(path, {"x": tasks["cars"]})):  # fmt: skip
        with pytest.raises(FormatError, match="only a newer tallcodec knows"):
            call()


def test_bytes_behind_the_end_are_coped_with(encode):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path, other = encode(base, some(tasks, "cars")), encode(base, some(tasks, "cars"))
    for task in ("dtd", "sun397"):
        with open(path, "ab") as file:
            file.write(os.urandom(5000))
        assert tallcodec.verify(path).ignored == 5000
        assert tallcodec.open(path, "np").info.reclaimable >= 5000
        tallcodec.add(path, some(tasks, task), method="tall")
        tallcodec.add(other, some(tasks, task), method="tall")
        assert path.read_bytes() == other.read_bytes()
    with open(path, "ab") as file:
        file.write(os.urandom(5000))
    with open(other, "ab") as file:
        file.write(bytes(100))
    tallcodec.remove(path, ["dtd"])
    tallcodec.remove(other, ["dtd"])
    assert path.read_bytes() == other.read_bytes()
    with open(path, "ab") as file:
        file.write(os.urandom(50))
    tallcodec.compact(path)
    tallcodec.compact(other)
    assert path.read_bytes() == other.read_bytes()


def test_who_has_it_open_keeps_it(encode):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, some(tasks, "cars", "dtd"))
    before, _ = decoded(path)
    with tallcodec.open(path, "np") as file, tallcodec.open(path, "np") as second:
        loaded = file.load("cars")

        def check():
            for opened in (file, second):
                assert opened.tasks == ["cars", "dtd"]
                for task in (None, "cars", "dtd"):
                    assert_same(opened.decode(task), before[task])
                opened.check_unchanged()
            assert_same(loaded.decode(), before["cars"])

        tallcodec.add(path, some(tasks, "sun397"), progress=lambda *_: check())
        check()
        tallcodec.remove(path, ["cars"])
        check()
        tallcodec.add(path, some(tasks, "cars"))
        check()
        with pytest.raises(FormatError, match="replaced since"):
            pickle.loads(pickle.dumps(file))
        tallcodec.compact(path)
        check()
    with tallcodec.open(path, "np") as file:
        assert file.tasks == ["dtd", "sun397", "cars"]
        with open(path, "r+b") as other:  # but what is written over is noticed
            other.seek(300)
            other.write(b"x")
        os.utime(path)
        with pytest.raises(ReadError, match="written to"):
            file.check_unchanged()


def test_readers_meanwhile(encode):
    """Whoever opens the file while it changes, some thousand times, finds one state or another."""
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, some(tasks, "cars", "dtd"), method="ternary")
    expected = reference.read(path.read_bytes()).task_state("cars")
    done, failures, opened = threading.Event(), [], 0

    def read():
        nonlocal opened
        while not done.is_set():
            try:
                with tallcodec.open(path, "np") as file:
                    assert file.tasks in (["cars", "dtd"], ["cars", "dtd", "sun397"])
                    assert_same(file.decode("cars"), expected)
                    if "sun397" in file.tasks:
                        file.decode("sun397")
                    file.check_unchanged()
                opened += 1
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(25):
        tallcodec.add(path, some(tasks, "sun397"))
        tallcodec.remove(path, ["sun397"])
        if turn % 8 == 7:
            tallcodec.compact(path)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    print(f"opened {opened} times")
    assert opened > 20


def test_a_second_writer_is_refused_at_once(encode):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, some(tasks, "cars", "dtd"))
    tried = []

    def try_others(*_):
        if tried:
            return
        for call in (
            lambda: tallcodec.add(path, {"x": tasks["cars"]}),
            lambda: tallcodec.remove(path, ["cars"]),
            lambda: tallcodec.compact(path),
            lambda: tallcodec.encode(base, tasks, path, overwrite=True),
        ):
            with pytest.raises(WriteError, match="another process is writing it"):
                call()
            tried.append(call)
        tallcodec.verify(path)

    tallcodec.add(path, some(tasks, "sun397"), progress=try_others)
    assert len(tried) == 4
    tried.clear()
    tallcodec.remove(path, ["dtd"])
    tallcodec.compact(path, progress=try_others)
    assert len(tried) == 4
    tried.clear()

    def try_to_add(*_):
        with pytest.raises(WriteError, match="another process is writing it"):
            tallcodec.add(path, {"x": tasks["cars"]})

    tallcodec.encode(base, tasks, path, overwrite=True, progress=try_to_add)
    tallcodec.add(path, tasks, base=base, rebuild=True, progress=try_to_add)


def test_who_has_the_file_open_is_told_to_open_it_again(encode):
    base, tasks = small_family()
    path = encode(base, tasks)
    with tallcodec.open(path, "np") as file:
        with pytest.raises(TaskNotFoundError, match="it has 'cars', 'dtd'$"):
            file.decode("new")
        tallcodec.add(path, {"new": tasks["cars"]})
        with pytest.raises(TaskNotFoundError, match="it was changed or replaced .*open it again"):
            file.decode("new")
        with pytest.raises(FormatError, match="it was changed or replaced since"):
            pickle.loads(pickle.dumps(file))


def test_whose_sum_the_shared_vector_is(encode):
    """What changes leave as it is, merging and inspecting tell."""
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, tasks)

    def told():
        info, merged = tallcodec.open(path, "np").info, tallcodec.merge(path, None, framework="np")
        assert info.merged == merged.info.merged and "tallcodec.merged" not in info.metadata
        assert ("the shared vector is of" in str(info)) == bool(
            merged.info.removed or merged.info.added
        )
        return info.merged, merged.info.removed, merged.info.added

    everyone = ["cars", "dtd", "sun397"]
    assert told() == (everyone, [], [])
    sum_of_all = tallcodec.merge(path, None, method="task-arithmetic", framework="np")
    tallcodec.remove(path, ["dtd"])
    assert told() == (everyone, ["dtd"], [])
    tallcodec.add(path, {"new": tasks["dtd"]}, method="tall")
    tallcodec.compact(path)
    assert told() == (everyone, ["dtd"], ["new"])
    assert "removed from the file, and still in the vector: 'dtd'" in str(
        tallcodec.merge(path, None, framework="np").info
    )
    found = tallcodec.merge(path, None, method="task-arithmetic", framework="np")
    assert all(np.array_equal(found[name], array) for name, array in sum_of_all.items())
    tallcodec.add(path, {"sparse": tasks["dtd"]}, method="ternary")
    tallcodec.remove(path, ["sparse"])
    assert told() == (everyone, ["dtd"], ["new"])
    with pytest.raises(ArgumentError, match="'tallcodec.merged' is the library's own"):
        encode(base, tasks, metadata={"tallcodec.merged": "[]"})


def test_a_file_that_is_compacted_before_it_is_locked(encode, monkeypatch):
    """What is locked then is no longer under the name."""
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, tasks)
    lock, tried = output._lock, []

    def compact_first(*arguments):
        if not tried:
            tried.append(None)
            tallcodec.compact(path)
        lock(*arguments)

    def try_to_add(*_):
        with pytest.raises(WriteError, match="another process is writing it"):
            tallcodec.add(path, {"x": tasks["cars"]})

    monkeypatch.setattr(output, "_lock", compact_first)
    for call in (
        lambda: tallcodec.encode(base, tasks, path, overwrite=True, progress=try_to_add),
        lambda: tallcodec.add(path, {"new": tasks["cars"]}),
    ):
        tallcodec.remove(path, ["dtd"])
        tried.clear()
        call()
        assert tried
    assert tallcodec.open(path, "np").tasks == ["cars", "sun397", "new"]


def test_compact_keeps_link_and_permissions(encode, tmp_path):
    base, tasks = small_family()
    path = encode(base, tasks)
    link = tmp_path / "link.tall"
    link.symlink_to(path.name)
    path.chmod(0o640)
    if os.geteuid() == 0:  # nobody else may
        os.chown(path, 12345, 12346)
    then = path.stat()
    tallcodec.remove(link, ["cars"])
    size = path.stat().st_size
    tallcodec.compact(link)
    assert link.is_symlink() and path.stat().st_size < size
    now = path.stat()
    assert (now.st_mode, now.st_uid, now.st_gid) == (then.st_mode, then.st_uid, then.st_gid)


def test_statistics_and_merges_of_a_changed_file(encode):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    path = encode(base, tasks)
    full = tallcodec.stats(path)
    tallcodec.remove(path, ["sun397"])
    found = tallcodec.stats(path)
    assert sum(found.trained.published.counts) == full.trained.elements
    assert found.trained.published == found.trained.stored or full.trained.dont_cares
    merged = tallcodec.merge(path, path.with_name("m.safetensors"), min_tasks=1)
    assert merged.parameters == full.trained.elements and merged.active > 0
    tallcodec.add(path, some(tasks, "sun397"), method="tall")
    assert tallcodec.stats(path).to_dict()["tasks"] == ["cars", "dtd", "sun397"]
    odd = {"a.bias": base["a.bias"] + 1, "b.weight": base["b.weight"]}
    lone = encode(base, {"cars": odd})
    tallcodec.add(lone, some(tasks, "dtd"), method="tall")
    with pytest.raises(ArgumentError, match="ternary planes and in no shared vector"):
        tallcodec.merge(lone, lone.with_name("n.safetensors"))


def test_rebuild(encode):
    base, tasks = small_family(("cars", "dtd", "sun397"))
    for options, more in (
        ({}, {}),
        ({"scale": "unit-gain-row", "shared_dtype": "int8", "coding": "entropy"}, {}),
        ({"threshold": 0.5}, {"threshold": 0.5}),
        ({"threshold": {"cars": 0.5, "dtd": 0.25}},
         {"threshold": {"cars": 0.5, "dtd": 0.25, "sun397": 0.125}}),
        ({"method": {"cars": "ternary", "dtd": "tall"}, "metadata": {"a": "b"}}, {}),
        ({"base_storage": "reference", "merge": "average"}, {}),
        ({"method": "ternary", "bits": 0.3}, {"bits": {"cars": 0.3, "dtd": 0.3, "sun397": 0.6}}),
        ({"method": "ternary", "coding": "raw"}, {"method": "ternary"}),
    ):  # fmt: skip
        path = encode(base, some(tasks, "cars", "dtd"), **options)
        tallcodec.add(path, tasks, base=base, rebuild=True, **more)
        if isinstance(options.get("method"), dict):
            options = options | {"method": {**options["method"], "sun397": "tall"}, "bits": None}
        expected = encode(base, tasks, **(options | more))
        assert path.read_bytes() == expected.read_bytes(), options
    made = path.read_bytes()
    for message, call in [
        ("that of the base too", lambda: tallcodec.add(path, tasks, rebuild=True)),
        (r"missing: \['cars', 'sun397'\]", lambda: tallcodec.add(
            path, some(tasks, "dtd"), base=base, rebuild=True)),
    ]:  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            call()
    with pytest.raises(TaskMismatchError, match="task 'dtd', tensor 'a.bias': it was not encoded"):
        tallcodec.add(path, tasks | {"dtd": tasks["cars"]}, base=base, rebuild=True)
    other = {name: 2 * array for name, array in base.items()}
    embedded = encode(base, some(tasks, "cars", "dtd"))
    for file in (path, embedded):
        with pytest.raises(BaseMismatchError):
            tallcodec.add(file, tasks, base=other, rebuild=True)
    assert tallcodec.verify(embedded, base, tasks=some(tasks, "cars", "dtd")).proved == 2
    for options in ({"merge": "ties"}, {"method": "ternary", "density": 0.02}):
        dense = encode(base, some(tasks, "cars", "dtd"), **options)
        with pytest.raises(ArgumentError, match="does not tell the density"):
            tallcodec.add(dense, tasks, base=base, rebuild=True)
    tallcodec.add(dense, tasks, base=base, rebuild=True, bits=0.3)
    assert dense.read_bytes() == encode(base, tasks, method="ternary", bits=0.3).read_bytes()
    assert path.read_bytes() == made


def test_the_commands(checkpoints, tmp_path, capsys):
    path = tmp_path / "a.tall"
    tallcodec.encode(checkpoints / "base.safetensors", {"dtd": checkpoints / "dtd"}, path)
    made = path.read_bytes()

    def run(*arguments):
        status = cli.main([str(a) for a in arguments])
        return status, capsys.readouterr()

    cars = f"cars={checkpoints / 'cars.safetensors'}"
    status, out = run("add", path, "--task", cars, "--method", "ternary", "--bits", "0.9", "--json")
    assert status == 0
    assert [t["threshold"] for t in json.loads(out.out)["tasks"] if t["name"] == "cars"] == [0.9]
    assert run("add", path, "--task", cars)[0] == 1
    status, out = run("inspect", path)
    assert "to reclaim" in out.out
    assert run("verify", path)[0] == 0
    assert run("remove", path, "--task", "x")[0] == 1
    status, out = run("remove", path, "--task", "cars")
    assert status == 0 and "1 task, " in out.out
    status, out = run("compact", path)
    assert status == 0 and "to reclaim" not in out.out
    assert path.read_bytes() == made
    status, out = run("add", path, "--task", cars, "--threshold", "0.4", "--method", "tall")
    assert status == 0
    again = ["--task", cars, f"--task=dtd={checkpoints / 'dtd'}", "--threshold", "0.3", "--rebuild"]
    status, out = run("add", path, "--base", checkpoints / "base.safetensors", *again)
    assert status == 0
    expected = tmp_path / "b.tall"
    tallcodec.encode(checkpoints / "base.safetensors", {
        "cars": checkpoints / "cars.safetensors", "dtd": checkpoints / "dtd",
    }, expected, threshold=0.3, scale="unit-gain")  # fmt: skip
    assert path.read_bytes() == expected.read_bytes()
    for command in ("add", "remove", "compact"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "usage" in capsys.readouterr().out


def test_a_checkpoint_that_changes_meanwhile(encode, tmp_path):
    base, tasks = small_family()
    path = encode(base, some(tasks, "cars"))
    made = path.read_bytes()
    write_safetensors(tmp_path / "dtd.safetensors", tasks["dtd"])

    def touch(*_):
        os.utime(tmp_path / "dtd.safetensors", ns=(0, 0))

    with pytest.raises(ReadError, match="written to"):
        tallcodec.add(path, {"dtd": tmp_path / "dtd.safetensors"}, progress=touch)
    assert path.read_bytes() == made


def test_slots_take_turns(encode):
    base, tasks = small_family()
    path = encode(base, tasks, method="ternary")
    for sequence in range(2, 7):
        if sequence % 2:
            tallcodec.remove(path, ["x"])
        else:
            tallcodec.add(path, {"x": tasks["cars"]})
        data = path.read_bytes()
        slot = reference.read(data).slot
        assert slot.sequence == sequence and slot.file_size == len(data)
        other = data[:64] + data[128:192] + data[64:128] + data[192:]  # which is where matters not
        assert _core.File("swapped", other).tasks() == _core.File("as it is", data).tasks()
        torn = bytearray(data)  # and where the newer one is lost, the older one holds
        at = 64 if sequence % 2 else 128
        torn[at + 20] ^= 1
        assert reference.read(bytes(torn)).slot.sequence == sequence - 1
        assert len(_core.File("torn", bytes(torn)).tasks()) == 5 - len(_core.File("", data).tasks())
        np.testing.assert_equal(_core.File("torn", bytes(torn)).verify(1), [])
