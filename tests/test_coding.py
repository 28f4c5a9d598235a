"""Planes raw or entropy coded: the reference's bytes, the same values, unsound planes."""

import numpy as np
import pytest

import tallcodec
from helpers import (
    assert_same,
    awkward,
    encoded,
    normal,
    reference_file,
    seal,
    small_family,
    unseal,
)
from tallcodec import _core, numbers, reference
from tallcodec.errors import ArgumentError, ChecksumError, FormatError
from tallcodec.reference import conditional, ternary

MASK, TERNARY = numbers.PLANES["mask"], numbers.PLANES["ternary"]

WAYS = [
    {},
    {"scale": "unit-gain-row", "shared_dtype": "int8", "base_storage": "reference"},
    {"threshold": 0.4, "shared_dtype": "float16", "scale": "unit-gain"},
    {"threshold": 0.4, "shared_dtype": "bfloat16", "merge": "ties"},
    {"method": {"cars": "ternary", "dtd": "tall", "aircraft": "tall"}},
]


def reference_of(base, tasks, *, threshold=None, method="tall", **options):
    """The reference's file for options of encode."""
    rule = "adapted" if threshold is None else "tall"
    methods = method if isinstance(method, dict) else dict.fromkeys(tasks, method)
    methods = {task: rule if m == "tall" else m for task, m in methods.items()}
    options = {"scale": "unit-gain" if threshold is None else "none"} | options
    return reference_file(base, tasks, method=methods, bits={"cars": 0.6}, least_bits=True,
                          thresholds=dict.fromkeys(tasks, threshold), **options)


def tuned(base, names):
    """A task of each name, all tensors changed a little."""
    return {name: {n: a + normal(a.shape, 100 + k, spread=0.01) for n, a in base.items()}
            for k, name in enumerate(names)}  # fmt: skip


def codings(path):
    with tallcodec.open(path, "np") as file:
        planes = file._file.planes()
    return {(kind, coding) for kind, coding, *_ in planes if kind in (MASK, TERNARY)}


@pytest.mark.parametrize("coding", ["raw", "entropy"])
@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_file_is_the_references(tmp_path, options, coding):
    base, tasks, _ = awkward(5)
    path = tmp_path / "a.tall"
    file = encoded(path, base, tasks, coding=coding, **options)
    assert file == reference_of(base, tasks, coding=coding, **options)
    read = reference.read(file, base)
    read.verify()
    tallcodec.verify(path, base if "base_storage" in options else None)
    encoded(tmp_path / "b.tall", base, tasks, **options)
    with tallcodec.open(path, "np", base) as this:
        with tallcodec.open(tmp_path / "b.tall", "np", base) as auto:
            for task in tasks:
                assert_same(this.decode(task), read.task_state(task))
                assert_same(this.decode(task), auto.decode(task))


@pytest.mark.parametrize("options", WAYS[:2], ids=["", "row-int8"])
def test_threads_and_kernels_make_one_file(tmp_path, monkeypatch, options):
    base, tasks, _ = awkward(5, big=True)
    expected = reference_of(base, tasks, coding="entropy", **options)
    state = reference.read(expected, base).task_state("dtd")
    for kernels in _core.kernels.available():
        monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
        for threads in (1, 3):
            path = tmp_path / "a.tall"
            file = encoded(path, base, tasks, coding="entropy", threads=threads, **options)
            assert file == expected, (kernels, threads)
            with tallcodec.open(path, "np", base, threads=threads) as opened:
                assert_same(opened.decode("dtd"), state)


def test_what_coding_means(tmp_path):
    base = {"w": normal((200, 300), 1), "v": normal(50_000, 2)}  # every mask is worth coding
    tasks = tuned(base, "abcd")
    methods, found, sizes = dict.fromkeys("abc", "tall") | {"d": "ternary"}, {}, {}
    for coding in ("auto", "raw", "entropy"):
        path = tmp_path / f"{coding}.tall"
        file = encoded(path, base, tasks, coding=coding, method=methods, density=0.02)
        sizes[coding] = len(file)
        found[coding] = codings(path)
    assert found["auto"] == {(MASK, 0), (TERNARY, 3)}
    assert found["raw"] == {(MASK, 0), (TERNARY, 0)}
    assert found["entropy"] == {(MASK, 4), (TERNARY, 3)}
    assert sizes["entropy"] < sizes["auto"] < sizes["raw"]


def test_a_mask_that_would_not_shrink_is_raw(tmp_path):
    path = tmp_path / "a.tall"
    encoded(path, *small_family(), coding="entropy")  # of some hundred elements
    assert codings(path) == {(MASK, 0)}


def test_what_follows_the_masks_is_untouched(tmp_path):
    """Verbatim planes, small files and padding lie where longer raw masks were."""
    base = {"w": normal((200, 300), 1), "v": normal((40, 300), 2)}
    tasks = tuned(base, "abc")
    tasks["a"]["v"][3, 3] = np.nan  # verbatim, which is found when its mask has a place already
    tasks["b"] |= {"head": normal((7, 11), 6), "steps": np.arange(1000)}
    file = encoded(tmp_path / "a.tall", base, tasks, coding="entropy", scale="unit-gain-row")
    assert file == reference_of(base, tasks, coding="entropy", scale="unit-gain-row")
    tallcodec.verify(tmp_path / "a.tall")
    with tallcodec.open(tmp_path / "a.tall", "np") as opened:
        assert_same({"v": opened.decode("a")["v"]}, {"v": tasks["a"]["v"]})


def test_a_search_leaves_coding_to_the_file(tmp_path):
    base = {"w": normal((200, 300), 1)}
    tasks = tuned(base, "abc")
    options = {"threshold": "search", "grid": [0.2, 0.4], "score": lambda task, state: 0.0}
    file = encoded(tmp_path / "a.tall", base, tasks, coding="entropy", **options)
    assert codings(tmp_path / "a.tall") == {(MASK, 4)}
    assert len(file) < len(encoded(tmp_path / "b.tall", base, tasks, **options))


def test_merging_and_statistics_read_coded_masks(tmp_path):
    base, tasks, _ = awkward(7, big=True)
    results = []
    for coding in ("raw", "entropy"):
        path = tmp_path / f"{coding}.tall"
        tallcodec.encode(base, tasks, path, coding=coding)
        tallcodec.merge(path, tmp_path / coding, min_tasks=2)
        stats = tallcodec.stats(path)
        stats = vars(stats) if hasattr(stats, "__dict__") else stats._asdict()
        results.append({k: v for k, v in stats.items() if k != "path"})
    a, b = ((tmp_path / c / "model.safetensors").read_bytes() for c in ("raw", "entropy"))
    assert a == b and results[0] == results[1]


def test_unknown_coding(tmp_path):
    with pytest.raises(ArgumentError, match="coding must be one of 'auto', 'raw', 'entropy'"):
        tallcodec.encode(*small_family(), tmp_path / "a.tall", coding="zip")


@pytest.mark.parametrize("n", [1, 16, 63, 64, 65, 1000])
def test_reference_codes_are_undone(n):
    random = np.random.default_rng(n)
    s = (random.standard_normal(n) * random.integers(0, 2, n)).astype(np.float32)
    mask = (s != 0) & (random.random(n) < 0.3)
    assert np.array_equal(conditional.decode(conditional.code(mask, s), s), mask)
    signs = np.where(mask, random.choice([-1, 1], n), 0).astype(np.int8)
    assert np.array_equal(ternary.raw_signs(ternary.raw(signs), n), signs)


BASE = {"w": normal(50_000, 1)}
TASKS = tuned(BASE, "abc")


def with_plane(monkeypatch, plane):
    """The reference's file of TASKS whose coded masks are this plane."""
    with monkeypatch.context() as patch:
        patch.setattr(conditional, "code", lambda mask, s: plane)
        return reference_of(BASE, TASKS, coding="entropy")


def test_a_plane_that_is_not_sound_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.tall"
    read = reference.read(encoded(path, BASE, TASKS, coding="entropy"))
    (t,), (e,) = read.tensors, read.entries[0]
    plane = bytearray(conditional.code(read.mask(t, e), read.shared(t)))
    plane[-1] ^= 1  # of the last word: the states do not come out even
    path.write_bytes(with_plane(monkeypatch, bytes(plane)))
    with pytest.raises(FormatError):
        reference.read(path.read_bytes()).task_state("a")
    with tallcodec.open(path, "np") as file, pytest.raises(FormatError, match="mask of tensor 'w'"):
        file.decode("a")
    with pytest.raises(FormatError, match="mask of tensor 'w'"):
        tallcodec.verify(path)


def test_a_plane_of_another_mask_is_found_by_verify(tmp_path, monkeypatch):
    path = tmp_path / "a.tall"
    path.write_bytes(with_plane(monkeypatch, bytes(8)))  # sound, of no bits at all
    with pytest.raises(FormatError, match="0 bits are set, its entry says"):
        tallcodec.verify(path)


def test_a_shared_vector_with_a_nan_is_read_alike(tmp_path, monkeypatch):
    """No writer stores one: both readers take its elements for zeros of the mask."""
    path = tmp_path / "a.tall"
    data = bytearray(encoded(path, BASE, TASKS, coding="entropy"))
    with tallcodec.open(path, "np") as file:
        offset = next(p[2] for p in file._file.planes() if p[0] == numbers.PLANES["shared"])
    data[offset : offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    read = reference.read(bytes(data))
    planes = read.planes
    monkeypatch.setattr(
        read, "_stored", lambda n: bytes(data[planes[n].offset :][: planes[n].size])
    )
    with tallcodec.open(path, "np", verify=False) as file:
        for task in TASKS:
            try:
                found = file.decode(task)
            except FormatError:
                found = None
            try:
                expected = read.task_state(task)
            except FormatError:
                expected = None
            assert (found is None) == (expected is None)
            if found is not None:
                assert_same(found, expected)


def test_denormals_whatever_the_process_does_with_them(tmp_path):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    base = {"w": np.zeros(50_000, np.float32)}
    values = random.integers(-90, 90, (2, 50_000)) * (random.random((2, 50_000)) < 0.7)
    tasks = {t: {"w": (v * 1e-45).astype(np.float32)} for t, v in zip("ab", values)}
    options = {"coding": "entropy", "shared_dtype": "int8", "threads": 1}
    file = encoded(tmp_path / "a.tall", base, tasks, **options)
    state = reference.read(file).task_state("a")
    try:
        assert torch.set_flush_denormal(True)
        assert encoded(tmp_path / "b.tall", base, tasks, **options) == file
        with tallcodec.open(tmp_path / "a.tall", "np", threads=1) as opened:
            assert_same(opened.decode("a"), state)
            assert_same(opened.load("a").decode(), state)
    finally:
        torch.set_flush_denormal(False)


def test_damage_to_the_head_of_a_mask_of_several_blocks(tmp_path):
    base = {"w": np.zeros(1_200_000, np.float32)}
    tasks = {t: {"w": normal(1_200_000, k)} for k, t in enumerate("ab")}
    path = tmp_path / "a.tall"
    data = bytearray(encoded(path, base, tasks, coding="entropy"))
    with tallcodec.open(path, "np") as opened:
        offset = next(p[2] for p in opened._file.planes() if p[:2] == (MASK, 4))
    for at in (0, 3, 8, 16):
        damaged = bytearray(data)
        damaged[offset + at] ^= 1
        path.write_bytes(damaged)
        with tallcodec.open(path, "np") as opened:
            for read in (opened.decode, opened.load):
                with pytest.raises(ChecksumError, match="mask of tensor 'w', task 'a'"):
                    read("a")


def test_verify_names_what_is_damaged_before_what_is_unsound(tmp_path, monkeypatch):
    path = tmp_path / "a.tall"
    file = bytearray(with_plane(monkeypatch, bytes(8)))  # every mask is of another
    offset = max(p.offset for p in reference.read(bytes(file)).planes if p.kind == MASK)
    file[offset] ^= 1
    path.write_bytes(file)
    with pytest.raises(ChecksumError, match="mask of tensor 'w', task 'c'"):
        tallcodec.verify(path)


def test_two_entries_with_one_mask_are_refused(tmp_path):
    data = bytearray(encoded(tmp_path / "a.tall", BASE, TASKS))
    read = reference.read(bytes(data))
    index = read.slot.index_offset + 128 + 64 + 3 * 64  # the header, a tensor, three tasks
    data[index + 64 + 8 : index + 64 + 12] = data[index + 8 : index + 12]  # b's is a's
    planes, found = unseal(bytes(data))
    (tmp_path / "b.tall").write_bytes(seal(planes, found))
    for read in (tallcodec.open, lambda path: reference.read(path.read_bytes())):
        with pytest.raises(FormatError, match="which another entry has|two entries name one"):
            read(tmp_path / "b.tall")


@pytest.mark.parametrize("kind", ["mask", "shared"])
def test_damage_is_called_damage(tmp_path, kind):
    path = tmp_path / "a.tall"
    file = encoded(path, BASE, TASKS, coding="entropy")
    with tallcodec.open(path, "np") as opened:
        offset = next(p[2] for p in opened._file.planes() if p[0] == numbers.PLANES[kind])
    for at in (0, 7, 50, 300):
        damaged = bytearray(file)
        damaged[offset + at] ^= 4
        path.write_bytes(damaged)
        with tallcodec.open(path, "np") as opened, pytest.raises(ChecksumError, match=kind):
            opened.decode("a")
        with pytest.raises(ChecksumError, match=kind):
            tallcodec.verify(path)
