"""Ternary planes: the reference's bytes, the bits and the gain that were asked for, bad input."""

import math

import ml_dtypes
import numpy as np
import pytest

import tallcodec
from families import ARITHMETIC
from helpers import BF16, assert_same, awkward, encoded, normal, reference_file, same, small_family
from tallcodec import _core, reference
from tallcodec.errors import ArgumentError, ChecksumError, FormatError
from tallcodec.reference import ternary

METHODS = [
    {"method": "ternary"},
    {"method": "ternary", "bits": 0.5, "base_storage": "reference"},
    {"method": "ternary", "density": 0.1},
    {"method": "ternary", "bits": {"cars": 0.4, "dtd": 1, "aircraft": 8}},
    {"method": {"cars": "ternary", "dtd": "tall", "aircraft": "tall"}},
    {"method": {"cars": "tall", "dtd": "ternary", "aircraft": "ternary"}, "merge": "average"},
    {"method": {"cars": "tall", "dtd": "ternary", "aircraft": "tall"}, "merge": "ties"},
    {"method": {"cars": "magnitude", "dtd": "ternary", "aircraft": "magnitude"}, "density": 0.3},
    {"method": {"cars": "tall", "dtd": "tall", "aircraft": "ternary"}, "threshold": 0.4},
]


def reference_of(base, tasks, *, threshold=None, **options):
    """The reference's file for options of encode."""
    methods = options["method"]
    methods = methods if isinstance(methods, dict) else dict.fromkeys(tasks, methods)
    if threshold is None:
        methods = {t: "adapted" if m == "tall" else m for t, m in methods.items()}
    adapted = "adapted" in methods.values()
    bits = options.pop("bits", None)
    if bits is None and "density" not in options:
        bits = 0.6
    if not isinstance(bits, dict):
        bits = dict.fromkeys(tasks, bits or 0)
    options |= {"method": methods, "bits": bits, "scale": "unit-gain" if adapted else "none"}
    return reference_file(base, tasks, thresholds=dict.fromkeys(tasks, threshold), **options)


def id_of(options):
    return "-".join(str(v) for v in options.values())


@pytest.mark.parametrize("options", METHODS, ids=id_of)
def test_the_file_is_the_references(tmp_path, options):
    base, tasks, _ = awkward(12)
    file = encoded(tmp_path / "a.tall", base, tasks, **options)
    assert file == reference_of(base, tasks, **options)
    read = reference.read(file, base)
    read.verify()
    with tallcodec.open(tmp_path / "a.tall", "np", base=base) as opened:
        for task in tasks:
            assert_same(opened.decode(task), read.task_state(task))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernels", _core.kernels.available())
def test_large_tensors_by_every_kernel(tmp_path, monkeypatch, kernels, threads):
    base, tasks, _ = awkward(8, tasks=2, big=True)
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    path = tmp_path / "a.tall"
    file = encoded(path, base, tasks, method="ternary", density=0.02, threads=threads)
    read = reference.read(file)
    with tallcodec.open(path, "np", threads=threads) as opened:
        for name in ("big.flat", "big.rows", "big.many rows", "big.nonfinite"):
            array = opened.decode("cars", tensors=[name])[name]
            assert array.tobytes() == read.decode("cars", name).tobytes()
    if kernels == "scalar" and threads == 1:  # all files are equal; the reference takes a while
        assert file == reference_of(base, tasks, method="ternary", density=0.02)
    else:
        monkeypatch.setenv("TALLCODEC_KERNELS", "scalar")
        assert file == encoded(path, base, tasks, method="ternary", density=0.02, threads=1)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
def test_ties_and_scales_of_several_units(tmp_path, dtype, density):
    """What units of a large tensor share: the cut, its ties, and a scale from a sample."""
    base = {"w": normal((1200, 1000), 1, dtype)}
    tuned = base["w"].astype(np.float32) + normal((1200, 1000), 2, spread=0.02)
    task = {"w": tuned.astype(dtype)}
    options = {"method": "ternary", "density": density, "coding": "raw"}
    file = encoded(tmp_path / "a.tall", base, {"t": task}, threads=3, **options)
    assert file == reference_of(base, {"t": task}, **options)
    assert reference.read(file).entries[0][0].set_bits == pytest.approx(density * 1.2e6, abs=3)


def test_the_sample_follows_no_pattern(tmp_path):
    """A scale is found where every second chunk is all there is, as in half of a fused matrix."""
    shape = 64, 32768
    base = {"w": normal(shape, 1, BF16)}
    change = normal(shape, 2, spread=0.1)
    change[:, : shape[1] // 2] = 0
    task = {"w": (base["w"].astype(np.float32) + change).astype(BF16)}
    for density in (0.3, 0.45):
        info = tallcodec.encode(base, {"t": task}, tmp_path / "a.tall", method="ternary",
                                density=density, coding="raw", overwrite=True)
        assert info.tasks[0].gain == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("n", [1, 5, 64, 1000, 262_144, 262_145])
@pytest.mark.parametrize("density", [0, 0.01, 0.4, 1])
def test_reference_coding(n, density):
    random = np.random.default_rng(n)
    signs = (random.choice([-1, 1], n) * (random.random(n) < density)).astype(np.int8)
    assert np.array_equal(ternary.decode(ternary.code(signs), n), signs)


def test_log2():
    x = np.concatenate([np.geomspace(1, 1e15, 999), [1, 2, 3, 2**40]])
    assert np.allclose([ternary.log2(v) for v in x], np.log2(x), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_largest_elements_with_unit_gain(tmp_path, dtype, density):
    """By independent arithmetic: one tensor keeps its ⌊p·n⌋ largest elements, of equals every
    n-th, and once rounded the decoded checkpoint has gain 1."""
    base = {"w": normal((300, 200), 1, dtype, spread=0.05)}
    tuned = base["w"].astype(np.float32) + normal((300, 200), 2, spread=0.002)
    task = {"w": tuned.astype(dtype)}
    path = tmp_path / "a.tall"
    info = tallcodec.encode(base, {"t": task}, path, method="ternary", density=density)
    tau = (task["w"].astype(np.float32) - base["w"].astype(np.float32)).ravel()
    with tallcodec.open(path, "np") as file:
        decoded = file.decode("t")["w"].astype(np.float32)
    found = (decoded - base["w"].astype(np.float32)).ravel()
    count = math.floor(density * tau.size)
    cut = np.sort(np.abs(tau))[-count]
    kept, equal = np.abs(tau) > cut, np.flatnonzero(np.abs(tau) == cut)
    ties = count - kept.sum()
    assert dtype == np.float32 or 0 < ties < equal.size
    due = [r * ties // equal.size for r in range(equal.size + 1)]
    kept[equal[np.diff(due) > 0]] = True
    kept = np.flatnonzero(kept)
    assert kept.size == count
    read = reference.read(path.read_bytes())
    stored = read.signs(read.entries[0][0], tau.size)
    assert np.array_equal(np.flatnonzero(stored), kept)
    assert np.array_equal(stored[kept], np.sign(tau[kept]))
    gain = found.astype(np.float64) @ tau / (tau.astype(np.float64) @ tau)
    bound = 9 * np.abs(tau[kept], dtype=np.float64).sum() ** 2 / kept.size / (tau @ tau)
    assert gain == pytest.approx(min(1, bound), abs=0.01)
    assert info.tasks[0].gain == pytest.approx(gain, abs=1e-3)
    assert info.tasks[0].density == pytest.approx(kept.size / tau.size)


def test_bits_are_kept_to(tmp_path):
    random = np.random.default_rng(1)
    base = {f"w{i}": normal((400, 300), i) for i in range(6)}
    tasks = {t: {name: w + normal(w.shape, random.integers(1 << 30), spread=0.1 * 3.0 ** i)
                 for i, (name, w) in enumerate(base.items())} for t in ("a", "b")}
    previous = math.inf
    for bits in (0.05, 0.1, 0.3, 0.6, 1.0):
        info = tallcodec.encode(base, tasks, tmp_path / "a.tall", method="ternary", bits=bits,
                                overwrite=True)
        for task in info.tasks:
            heads = 8 * 100 * len(base) / 720_000  # a table and offsets per plane
            assert 0.95 * bits < task.bits < 1.01 * bits + heads
            assert task.gain == pytest.approx(1, abs=1e-4) or task.error < 3
        assert info.tasks[0].error < previous
        previous = info.tasks[0].error


def test_tasks_are_independent(tmp_path):
    """What one task decodes to does not depend on the others."""
    base, tasks = small_family(("a", "b", "c"))
    alone = encoded(tmp_path / "a.tall", base, {"b": tasks["b"]}, method="ternary")
    together = encoded(tmp_path / "b.tall", base, tasks, method="ternary")
    assert_same(reference.read(together).task_state("b"), reference.read(alone).task_state("b"))


def test_negative_zeros_alone(tmp_path):
    """A tensor that differs from the base in nothing but signs of zeros keeps nothing."""
    base = {"z": np.zeros(10, np.float32), "w": normal(100, 1)}
    task = {"z": -base["z"], "w": base["w"] + 1}
    file = encoded(tmp_path / "a.tall", base, {"t": task}, method="ternary", bits=2)
    assert file == reference_of(base, {"t": task}, method="ternary", bits=2)
    assert not reference.read(file).decode("t", "z").any()


@pytest.mark.parametrize("options, message", [
    ({"bits": 0}, "bits must be"), ({"bits": math.nan}, "bits must be"), ({"bits": "1"}, "bits"),
    ({"bits": True}, "bits must be"), ({"bits": 1e-5}, "cannot be met: the least"),
    ({"density": 0}, "density"), ({"density": math.nan}, "density"), ({"density": 1.5}, "density"),
    ({"density": 1e-5}, "cannot be met: the least"), ({"bits": 1, "density": 0.1}, "not both"),
    ({"bits": {"cars": 1}}, "missing: .'dtd'"), ({"bits": 1, "method": "tall"}, "bits is for"),
    ({"method": "tall", "density": 0.1}, 'density is for merge "ties", method "magnitude"'),
    ({"method": {"cars": "ternary"}}, "missing: .'dtd'"), ({"method": "Ternary"}, "method must"),
    ({"method": {"cars": "tall", "dtd": "magnitude"}}, "not of both"),
    ({"threshold": "search", "score": lambda *a: 0}, "search"), ({"target": 1}, "needs score"),
    ({"threshold": 0.4}, "threshold is for"),
    ({"target": math.nan, "score": lambda *a: 0}, "target must"),
    ({"target": 1, "score": lambda *a: 0, "bits": 1}, "target finds the bits"),
    ({"target": 1, "score": lambda *a: 0, "method": "tall"}, "target is for"),
    ({"target": 1, "score": lambda *a: math.nan}, "NaN"),
    ({"target": 1, "score": lambda *a: 1, "grid": [0]}, "bits must be"),
])  # fmt: skip
def test_bad_options_leave_the_old_file(tmp_path, options, message):
    base, tasks = small_family()
    path = tmp_path / "a.tall"
    path.write_bytes(b"old")
    with pytest.raises(ArgumentError, match=message):
        tallcodec.encode(base, tasks, path, overwrite=True, **({"method": "ternary"} | options))
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("size, coding", [(10, 0), (10_000, 3)])
def test_damage_is_found(tmp_path, size, coding):
    """In planes that are raw, for coded ones would be larger, and in coded ones."""
    base, tasks = {"w": normal(size, 1)}, {"cars": {"w": normal(size, 2)}}
    path = tmp_path / "a.tall"
    file = encoded(path, base, tasks, method="ternary")
    plane = reference.read(file).planes[reference.read(file).entries[0][0].plane]
    assert plane.coding == coding
    for at in (plane.offset, plane.offset + plane.size - 1):
        path.write_bytes(file[:at] + bytes([file[at] ^ 255]) + file[at + 1 :])
        with tallcodec.open(path, "np") as opened, pytest.raises(ChecksumError, match="ternary"):
            opened.decode("cars")
        with pytest.raises(ChecksumError):
            tallcodec.verify(path)


def test_a_search_leaves_ternary_tasks_alone(tmp_path):
    base, tasks = small_family(("a", "b", "c"))
    seen = set()

    def score(task, state):
        seen.add(task)
        return 1.0

    method = {"a": "tall", "b": "ternary", "c": "tall"}
    info = tallcodec.encode(base, tasks, tmp_path / "a.tall", method=method, threshold="search",
                            score=score)
    assert seen == {"a", "c"} and sorted(info.scores) == ["a", "c"]
    assert [t.method for t in info.tasks] == ["tall", "ternary", "tall"]
    assert [t.tensors["ternary"] for t in info.tasks] == [0, 3, 0]


def test_a_target_takes_the_fewest_bits(tmp_path):
    base, tasks = small_family(("a", "b", "c"))
    needed = {"a": 0.3, "b": 0.8}

    def score(task, state):
        found = {name: np.asarray(tensor) for name, tensor in state.items()}
        return -float(sum(np.square(found[n] - t).sum() for n, t in tasks[task].items()))

    def errors(bits):
        path = tmp_path / "trial.tall"
        tallcodec.encode(base, tasks, path, method="ternary", bits=bits, overwrite=True)
        with tallcodec.open(path, "np") as file:
            return {t: score(t, file.decode(t)) for t in tasks}

    target = {task: errors(bits)[task] for task, bits in needed.items()}
    method = {"a": "ternary", "b": "ternary", "c": "tall"}
    options = {"method": method, "score": score, "grid": [0.8, 0.3, 2]}
    info = tallcodec.encode(base, tasks, tmp_path / "a.tall", target=target, **options)
    assert [t.threshold for t in info.tasks[:2]] == pytest.approx([0.3, 0.8])
    assert sorted(info.scores) == ["a", "b"] and info.tasks[2].method == "adapted"
    with pytest.raises(ArgumentError, match="no bits of the grid reach the target 1"):
        tallcodec.encode(base, tasks, tmp_path / "b.tall", target=1, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tall", "trial.tall"]


def test_merging_refuses_what_is_in_no_shared_vector(tmp_path):
    base, tasks = small_family()
    tallcodec.encode(base, tasks, tmp_path / "a.tall", method="ternary")
    with pytest.raises(ArgumentError, match="ternary planes"):
        tallcodec.merge(tmp_path / "a.tall", tmp_path / "m.safetensors", framework="np")
    assert "none of them has masks" in str(tallcodec.stats(tmp_path / "a.tall"))


@pytest.mark.parametrize("change", ["count", "word", "end", "symbols"])
def test_unsound_planes_are_refused(tmp_path, change):
    """By both readers and by verify, with all checksums right."""
    random = np.random.default_rng(0)
    signs = (random.choice([-1, 1], 500) * (random.random(500) < 0.3)).astype(np.int8)
    plane = bytearray(ternary.code(signs))
    count = plane.index(int(np.count_nonzero(signs)).to_bytes(4, "little"))
    plane[{"count": count, "word": count + 20, "end": 0, "symbols": 8}[change]] ^= 0x11
    with pytest.raises(FormatError):
        ternary.decode(bytes(plane), 500)

    base, task = {"w": normal(500, 1)}, {"w": normal(500, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary, "code", lambda _: bytes(plane))
        file = reference_of(base, {"t": task}, method="ternary")
    path = tmp_path / "a.tall"
    path.write_bytes(file)
    with tallcodec.open(path, "np") as opened, pytest.raises(FormatError, match="ternary plane of"):
        opened.decode("t")
    with pytest.raises(FormatError, match="ternary plane of"):
        tallcodec.verify(path)


@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
def test_denormal_task_vectors(tmp_path, dtype):
    """They keep their size, and do not become ±1."""
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    base = {"b": np.zeros(50, dtype), "w": normal(50, 1, dtype)}
    task = {"b": np.zeros(50, dtype), "w": (base["w"].astype(np.float32) + 0.1).astype(dtype)}
    task["b"][::3] = 3 * np.float32(tiny)
    file = encoded(tmp_path / "a.tall", base, {"t": task}, method="ternary", bits=4)
    assert file == reference_of(base, {"t": task}, method="ternary", bits=4)
    found = reference.read(file).decode("t", "b").astype(np.float32)
    assert 0 < found.max() <= 9 * np.float32(tiny)


@pytest.mark.parametrize("density", [0.3, 0.65, 0.9, 1])
def test_equal_magnitudes_keep_what_was_asked(tmp_path, density):
    base = {"w": normal((40, 25), 1)}
    change = np.random.default_rng(2).choice(np.float32([-0.5, 0.5]), (40, 25))
    base["w"] = np.round(base["w"] * 8) / 8  # so that the difference is exact
    task = {"w": base["w"] + change}
    file = encoded(tmp_path / "a.tall", base, {"t": task}, method="ternary", density=density)
    assert file == reference_of(base, {"t": task}, method="ternary", density=density)
    entry = reference.read(file).entries[0][0]
    assert entry.set_bits == math.floor(1000 * density)
    if density == 1:
        assert same(reference.read(file).decode("t", "w"), task["w"])


def test_a_small_model_has_the_least_bits(tmp_path):
    base = {f"w{i}": normal(8, i) for i in range(4)}
    tasks = {"t": {name: w + normal(8, 9, spread=0.1) for name, w in base.items()}}
    info = tallcodec.encode(base, tasks, tmp_path / "a.tall", method="ternary")
    assert info.tasks[0].density == 4 / 32
    info = tallcodec.encode(base, tasks, tmp_path / "b.tall", method="ternary", target=0.5,
                            score=lambda task, state: 1)
    assert info.tasks[0].threshold == pytest.approx(0.05)


def test_mappings_may_name_tasks_of_other_methods(tmp_path):
    base, tasks = small_family()
    both = {"method": {"cars": "tall", "dtd": "ternary"}, "threshold": {"cars": 0.4, "dtd": 0.4},
            "bits": {"cars": 1, "dtd": np.float32(2)}}  # fmt: skip
    info = tallcodec.encode(base, tasks, tmp_path / "a.tall", **both)
    assert [t.threshold for t in info.tasks] == [0.4, 2]
