"""The NumPy reference against docs/format.md: what it writes and what it decodes."""

import itertools
import math
import struct

import ml_dtypes
import numpy as np
import pytest
import xxhash

from editor import F32, same_state, sample, sample_file
from families import ARITHMETIC, BIG, THRESHOLDS, family, reference_options
from helpers import same
from tallcodec import reference as ref
from tallcodec.errors import BaseMismatchError, TaskNotFoundError, TensorNotFoundError
from tallcodec.reference import formulas, records

pytestmark = pytest.mark.filterwarnings("error")


# Below 256 the zero bytes, at multiples of 64 the last stripe, at those of 1024 the scrambling.
SIZES = [0, 1, 120, 255, 256, 257, 320, 1023, 1024, 1025, 1088, 2048, 65600]


@pytest.mark.parametrize("size", SIZES)
def test_hash_is_xxh3(size):
    data = np.random.default_rng(size).bytes(size)
    assert ref.hash64(data) == xxhash.xxh3_64_intdigest(data.ljust(256, b"\0"))


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def round16(x, dtype):
    """Float32 to 16 bits and back, one value at a time, without NumPy's conversions."""
    if dtype == np.float16:
        try:
            return F32(struct.unpack("<e", struct.pack("<e", x))[0])
        except OverflowError:
            return F32(math.copysign(math.inf, x))
    u = bits(x)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000
    return F32(struct.unpack("<f", struct.pack("<I", rounded))[0])


@pytest.mark.parametrize("dtype", ARITHMETIC[1:], ids=str)
def test_rounding(dtype):
    x = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint32).view(F32)
    edges = F32([0.0, -0.0, 65504, 65519, 65520, 1e-45, 6e-8, 3e38])
    x = np.concatenate([x[np.isfinite(x)], edges])
    with np.errstate(over="ignore"):
        rounded = formulas.to_float32(formulas.round_to(x, dtype))
    assert [bits(r) for r in rounded] == [bits(round16(v, dtype)) for v in x]


def test_shared_vector_saturates():
    stored, _ = formulas.store_shared(F32([1e5, -3e38, 1]), np.dtype(np.float16))
    assert stored.tolist() == [65504, -65504, 1]
    stored, _ = formulas.store_shared(F32([np.finfo(F32).max]), np.dtype(ml_dtypes.bfloat16))
    assert np.isfinite(formulas.to_float32(stored)).all()
    stored, scales = formulas.store_shared(F32([0] * 128 + [254, 1, 3, -254, 5]), np.dtype(np.int8))
    assert scales.tolist() == [0, 2] and stored[128:].tolist() == [127, 0, 2, -127, 2]


def shared_value_by_value(b, tasks, dtype):
    """The formulas of "Encoding" in docs/format.md, one element at a time."""
    acc = []
    for i, x in enumerate(b):
        total = F32(0)
        for t in tasks:
            total = total + (t[i] - x)
        acc.append(total if math.isfinite(total) else F32(0))
    if dtype == F32:
        return acc
    if dtype != np.int8:
        top = F32(65504) if dtype == np.float16 else F32((2 - 2**-7) * 2**127)
        return [round16(min(max(a, -top), top), dtype) for a in acc]
    s = []
    for at in range(0, len(acc), 128):
        block = acc[at : at + 128]
        scale = max(abs(a) for a in block) / F32(127)
        for a in block:
            q = 0 if scale == 0 else min(max(round(float(a / scale)), -127), 127)
            s.append(F32(q) * scale)
    return s


def lanes_summed(terms):
    lanes = [0.0] * 16
    for j, term in enumerate(terms):
        lanes[j % 16] += term
    for half in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]


def entry_value_by_value(b, t, s, threshold, rows, mode):
    """(mask, published bits, g per row, statistics) of one task; for tensors of one unit."""
    active = [abs(x - y) > threshold * abs((x + v) - y) for x, y, v in zip(b, t, s)]
    mask = [bool(a and v != 0) for a, v in zip(active, s)]
    tau = [float(y - x) for x, y in zip(b, t)]
    approx = [float(v) if m else 0.0 for m, v in zip(mask, s)]
    length, gains, totals = len(b) // rows, [], [0.0, 0.0, 0.0]
    for start in range(0, len(b), length):
        part = slice(start, start + length)
        tau_sq, dot, approx_sq = (
            lanes_summed([x * y if y else 0.0 for x, y in zip(p[part], q[part])])
            for p, q in ((tau, tau), (tau, approx), (approx, approx))
        )
        g = F32(1)
        if mode and approx_sq and dot <= 0:
            g = F32(0)
        elif mode and dot:
            quotient = F32(min(tau_sq / dot, 9 * (dot / approx_sq)))
            g = quotient if 2**-126 <= quotient < math.inf else g
        gains.append(g)
        for i, term in enumerate((tau_sq, float(g) * dot, float(g) * approx_sq * float(g))):
            totals[i] += term
    return mask, sum(map(bool, active)), gains, totals


OPTIONS = list(reference_options())


@pytest.mark.parametrize("options", OPTIONS[::7], ids=lambda o: "-".join(o.values()))
def test_values_are_those_of_the_formulas(options):
    base, tasks = family(seed=2)
    file = ref.read(ref.write(base, tasks, thresholds=THRESHOLDS, **options), base)
    mode, compared = records.SCALE_MODES[options["scale"]], 0
    for i, t in enumerate(file.tensors):
        coded = [
            k for k, row in enumerate(file.entries) if row[i] and row[i].coding == records.MASKED
        ]
        if not coded:
            assert t.shared_plane == records.NONE and t.counts == 0
            continue
        name, rows = t.name, formulas.row_count(file.shape(t)) if mode == 2 else 1
        b = list(base[name].astype(F32).ravel())
        values = {k: list(tasks[file.tasks[k].name][name].astype(F32).ravel()) for k in coded}
        with np.errstate(all="ignore"):
            s = shared_value_by_value(b, values.values(), formulas.DTYPES[t.shared_dtype])
            assert [bits(x) for x in s] == [bits(x) for x in file.shared(t)]
            counts = [0] * len(b)
            for k in coded:
                e, task = file.entries[k][i], file.tasks[k]
                threshold = F32(THRESHOLDS[task.name])
                mask, published, g, totals = entry_value_by_value(
                    b, values[k], s, threshold, rows, mode
                )
                assert (e.set_bits, e.published_bits) == (sum(mask), published)
                assert [e.tau_sq, e.dot, e.approx_sq] == totals
                length = len(b) // rows
                x = [
                    p + g[j // length] * v if m else p
                    for j, (p, v, m) in enumerate(zip(b, s, mask))
                ]
                dtype = tasks[task.name][name].dtype
                decoded = file.decode(task.name, name)
                assert (decoded.dtype, decoded.shape) == (dtype, base[name].shape)
                if dtype != F32:
                    x = [round16(v, dtype) for v in x]
                assert [bits(v) for v in x] == [bits(v) for v in decoded.astype(F32).ravel()]
                for j, (p, q, v) in enumerate(zip(b, values[k], s)):
                    counts[j] += abs(p - q) > threshold * abs((p + v) - q)
                compared += 1
        assert file.agreement(t) == [counts.count(c) for c in range(len(coded) + 1)]
    assert compared > 100


def test_differences_that_overflow():
    base, tasks = {"a": F32([3e38, 1])}, {"t": {"a": F32([-3e38, 2])}}
    file = ref.read(ref.write(base, tasks, thresholds={"t": 0.4}))
    _, e = file.entry("t", "a")
    assert (e.tau_sq, e.dot, e.approx_sq) == (math.inf, 1, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("zstd", [None, True, False])
def test_round_trip(options, zstd):
    base, tasks = family(seed=3)
    data = ref.write(base, tasks, thresholds=THRESHOLDS, force_zstd=zstd, **options)
    file = ref.read(data, base)
    file.verify()
    assert same_state(file.base_state(), base)
    for k, (task, state) in enumerate(tasks.items()):
        decoded = file.task_state(task)
        assert decoded.keys() == state.keys()
        for i, t in enumerate(file.tensors):
            entry = file.entries[k][i]
            if t.alias == records.NONE and t.name in state and entry.coding != records.MASKED:
                assert same(decoded[t.name], state[t.name])
            elif t.name in state:
                assert (decoded[t.name].dtype, decoded[t.name].shape) == (
                    state[t.name].dtype,
                    state[t.name].shape,
                )


def test_more_than_a_unit():
    base, tasks = family(big=True)
    for scale, shared_dtype in (("unit-gain", "int8"), ("unit-gain-row", "auto")):
        data = ref.write(base, tasks, thresholds=THRESHOLDS, scale=scale, shared_dtype=shared_dtype)
        file = ref.read(data)
        file.verify()
        for name in ("big.flat", "big.rows", "big.many rows"):
            t, e = file.entry("dtd", name)
            assert BIG <= math.prod(file.shape(t)) + 1000
            assert records.sum_count(file.planes[e.plane].size) == 2
            exact = tasks["dtd"][name].astype(F32) - base[name].astype(F32)
            assert math.isclose(e.tau_sq, np.sum(exact.astype(np.float64) ** 2), rel_tol=1e-9)
            assert math.isclose(e.dot, e.tau_sq, rel_tol=1e-6)  # what unit gain means
            decoded = file.decode("dtd", name).astype(F32)
            assert np.linalg.norm(decoded - tasks["dtd"][name].astype(F32)) < 2 * e.tau_sq**0.5
        assert same(file.decode("cars", "big.nonfinite"), tasks["cars"]["big.nonfinite"])


def test_the_table():
    """Every row of design.md's "What each tensor becomes"."""
    base, tasks = family(seed=4)
    file = ref.read(ref.write(base, tasks, thresholds=THRESHOLDS))
    A, M, V, X = records.AS_BASE, records.MASKED, records.AS_IS, records.ABSENT

    def codings(name):
        i = file.tensor_numbers[name]
        return [row[i] and (row[i].coding, row[i].reason) for row in file.entries]

    assert codings("layer.float32.7x33") == [(M, 0)] * 3
    assert codings("layer.float16.0") == [(A, 0)] * 3
    assert codings("mixed.float32.one") == [(M, 0)] * 3
    assert codings("mixed.float16.equal") == [(M, 0), (A, 0), (A, 0)]
    assert codings("mixed.empty") == [(V, records.NOT_ARITHMETIC), (A, 0), (A, 0)]
    assert codings("mixed.verbatim") == [(V, records.NOT_ARITHMETIC), (A, 0), (A, 0)]
    assert codings("equal.all") == [(A, 0)] * 3
    assert codings("equal.some") == [(M, 0), (A, 0), (A, 0)]
    assert codings("verbatim.step") == [(A, 0)] + [(V, records.NOT_ARITHMETIC)] * 2
    assert codings("head.weight") == [(V, records.OTHER_SHAPE)] * 3
    assert codings("head.scalar") == [(V, records.OTHER_SHAPE), (A, 0), (A, 0)]
    assert codings("extra.cars") == [(V, records.NOT_IN_BASE), (X, 0), (X, 0)]
    assert codings("missing.one") == [(X, 0), (M, 0), (M, 0)]
    assert codings("missing.all") == [(X, 0)] * 3
    assert codings("tied.a") == [(M, 0)] * 3
    assert codings("tied.b") == codings("tied.c") == codings("tied.gap 2") == [None] * 3
    assert codings("tied.lone 2") == [(M, 0)] * 3
    assert codings("nonfinite.float32.one") == [(V, records.NONFINITE_TASK), (M, 0), (M, 0)]
    assert codings("nonfinite.float16.all") == [(V, records.NONFINITE_TASK)] * 3
    assert codings("nonfinite.bfloat16.base") == [(V, records.NONFINITE_BASE)] * 3
    assert codings("nonfinite.equal") == [(A, 0)] * 3
    assert codings("edge.float32.zeros")[0] == (M, 0)  # -0 is not +0

    assert file.decode("dtd", "verbatim.step") == 16777218
    assert same(file.decode("cars", "tied.c"), file.decode("cars", "tied.a"))
    with pytest.raises(TensorNotFoundError):
        file.decode("cars", "tied.gap 2")
    number = file.tensor_numbers
    assert [file.tensors[number[f"tied.{x}"]].alias for x in "abc"] == [
        records.NONE,
        number["tied.a"],
        number["tied.a"],
    ]
    compressed = file.planes[file.entry("dtd", "verbatim.compressible")[1].plane]
    assert compressed.coding == records.ZSTD and compressed.size < compressed.raw_size

    # What NaN and infinity left: the free ranges hold what was reserved, neighbours as one.
    assert all(a.offset + a.size < b.offset for a, b in itertools.pairwise(file.free))
    assert len(file.free) > 3
    for f in file.free:
        assert not any(file.data[f.offset : f.offset + f.size])


def test_one_tasks_masks_lie_together():
    base, tasks = family(seed=5)
    file = ref.read(ref.write(base, tasks, thresholds=THRESHOLDS, scale="unit-gain-row"))
    ranges = [
        [
            file.planes[p].offset
            for e in row
            if e and e.coding == records.MASKED
            for p in (e.plane, e.scales_plane)
        ]
        for row in file.entries
    ]
    assert all(r == sorted(r) for r in ranges)
    assert all(max(a) < min(b) for a, b in itertools.pairwise(ranges))


def test_metadata_and_files():
    files = {"config.json": b"{}" * 400, "empty": b"", "a": b"\xff\xfe\xfd"}
    data = ref.write(
        {"w": F32([1])},
        {"b": {"w": F32([2])}, "a": {}},
        thresholds={"a": 0, "b": 1},
        metadata={"k": "v\n", "": ""},
        base_metadata={"format": "pt"},
        task_metadata={"a": {"ü": "€"}},
        base_files=files,
        task_files={"a": {"config.json": files["config.json"]}, "b": {"x": b"x"}},
        writer="someone 1",
    )
    file = ref.read(data)
    file.verify()
    assert file.metadata == {
        records.SCOPE_FILE: {"": "", "k": "v\n"},
        records.SCOPE_BASE: {"format": "pt"},
        0: {},
        1: {"ü": "€"},
    }
    assert {name: file.file(records.SCOPE_BASE, name) for name in files} == files
    assert file.files[1]["config.json"] == file.files[records.SCOPE_BASE]["config.json"]
    assert file.writer == "someone 1"
    assert [(t.name, t.threshold) for t in file.tasks] == [("b", 1), ("a", 0)]


def test_referenced_base_is_checked():
    base, tasks = sample()
    data = ref.write(base, tasks, thresholds=THRESHOLDS, base_storage="reference")
    assert same_state(ref.read(data, base).base_state(), base)
    assert ref.read(data).decode("cars", "verbatim") is not None
    for wrong in (
        {},
        {**base, "mask": base["mask"] + F32(1)},
        {**base, "mask": base["mask"][:2]},
        {**base, "mask": base["mask"].astype(np.float16)},
    ):
        file = ref.read(data, wrong)
        with pytest.raises(BaseMismatchError, match="mask"):
            file.decode("dtd", "mask")
        with pytest.raises(BaseMismatchError):
            file.base_state()
    with pytest.raises(BaseMismatchError):
        ref.read(data, {**base, "mask": -base["mask"]}).verify()


def test_what_is_not_there():
    file = ref.read(sample_file())
    with pytest.raises(TaskNotFoundError, match="nothing"):
        file.decode("nothing", "mask")
    with pytest.raises(TaskNotFoundError, match="nothing"):
        file.task_state("nothing")
    with pytest.raises(TensorNotFoundError, match="nothing"):
        file.decode("cars", "nothing")
    with pytest.raises(TensorNotFoundError, match="extra"):
        file.decode("cars", "extra")


def test_same_input_same_file():
    base, tasks = family(seed=6)
    again = family(seed=6)
    assert ref.write(base, tasks, thresholds=THRESHOLDS) == ref.write(*again, thresholds=THRESHOLDS)
