"""What encode makes of every kind of tensor, held against plain PyTorch and the NumPy reference."""

import functools
import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest

import tallcodec
from families import BIG, OTHERS, reference_options
from helpers import (
    BF16,
    assert_same,
    awkward,
    normal,
    same,
    seal,
    small_family,
    to_torch,
    torch_state,
)
from tallcodec import _core
from tallcodec import reference as ref
from tallcodec.checkpoint import open_checkpoint
from tallcodec.reference import records

torch = pytest.importorskip("torch")

KERNELS = _core.kernels.available()
SHARED_DTYPES = ["auto", "float32", "bfloat16", "float16", "int8"]
SCALES = ["none", "unit-gain", "unit-gain-row"]


@functools.cache
def family(seed, **options):
    return awkward(seed, **options)


def label(options):
    return "-".join(map(str, options.values()))


# Conformance: an independent plain PyTorch expression.


def shared_vector(base, tasks, dtype):
    """The sum of the task vectors as it is read back from how it is stored."""
    s = torch.zeros_like(base)
    for task in tasks:
        s = s + (task - base)
    s = torch.where(s.isfinite(), s, torch.zeros(()))
    if dtype != torch.int8:
        top = torch.finfo(dtype).max
        return s.clamp(-top, top).to(dtype).float()
    flat = torch.nn.functional.pad(s.flatten(), (0, -s.numel() % 128)).view(-1, 128)
    scale = flat.abs().amax(dim=1, keepdim=True) / 127
    q = torch.where(scale == 0, 0, (flat / scale).round().clamp(-127, 127)).to(torch.int8)
    return (q.float() * scale).flatten()[: s.numel()].view(s.shape)


def published_mask(base, task, s, threshold):
    return (base - task).abs() > threshold * ((base + s) - task).abs()


def coded(file, tensor):
    """The tasks that have a mask for a tensor."""
    return [task.name for task, row in zip(file.tasks, file.entries)
            if row[tensor] and row[tensor].coding == records.MASKED]


def stored_mask(file, entry, shape):
    packed = np.frombuffer(file._bytes(entry.plane), np.uint8)
    bits = np.unpackbits(packed, count=int(np.prod(shape)), bitorder="little")
    return torch.from_numpy(bits.astype(bool)).view(shape)


def stored_scale(file, entry, shape):
    """The scale of the tensor, or those of its rows in a shape that broadcasts."""
    if entry.scales_plane == records.NONE:
        return torch.tensor(entry.scale)
    rows = torch.from_numpy(np.frombuffer(file._bytes(entry.scales_plane), "<f4").copy())
    return rows.view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else rows.view(())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shared_dtype", SHARED_DTYPES)
def test_masks_and_values_are_those_of_the_published_expression(encode, shared_dtype, scale):
    base, tasks, thresholds = family(3)
    path = encode(base, tasks, threshold=thresholds, shared_dtype=shared_dtype, scale=scale)
    file = ref.read(path.read_bytes())
    compared = set_bits = 0
    with tallcodec.open(path) as decoded:
        for i, record in enumerate(file.tensors):
            names = coded(file, i)
            if not names:
                continue
            name, b = record.name, to_torch(base[record.name]).float()
            t = {task: to_torch(tasks[task][name]).float() for task in names}
            kind = base[name].dtype.name if shared_dtype == "auto" else shared_dtype
            s = shared_vector(b, t.values(), getattr(torch, kind))
            assert torch.equal(torch.from_numpy(file.shared(record).copy()).view(b.shape), s), name
            for task in names:
                _, entry = file.entry(task, name)
                mask = published_mask(b, t[task], s, thresholds[task])
                stored = stored_mask(file, entry, b.shape)
                assert torch.equal(stored, mask & (s != 0)), (task, name)
                g = stored_scale(file, entry, b.shape)
                expected = torch.where(mask, b + g * s, b).to(to_torch(tasks[task][name]).dtype)
                found = decoded.decode(task, [name])[name]
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), (task, name)  # here -0 = +0
                compared += 1
                set_bits += int(stored.sum())
    assert compared > 200 and set_bits > 10000


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=lambda d: np.dtype(d).name)
def test_published_expression_over_several_units(encode, dtype):
    base = {"w": normal((3, BIG // 3), 0, dtype)}
    tasks = {t: {"w": (base["w"].astype(np.float32) + normal(base["w"].shape, k, spread=0.1))
                 .astype(dtype)} for k, t in enumerate(("cars", "dtd", "mnist"), 1)}
    path = encode(base, tasks, threshold=0.4)
    b, t = to_torch(base["w"]).float(), {k: to_torch(v["w"]).float() for k, v in tasks.items()}
    s = shared_vector(b, t.values(), to_torch(base["w"]).dtype)
    with tallcodec.open(path) as file:
        for info in file.info.tasks:
            mask = published_mask(b, t[info.name], s, 0.4)
            assert info.published_density == pytest.approx(mask.double().mean().item(), abs=1e-12)
            expected = (b + mask * s).to(to_torch(base["w"]).dtype)
            assert torch.equal(file.decode(info.name)["w"], expected)


def test_a_bit_is_zero_where_the_shared_vector_is(encode):
    base = {"w": np.zeros(4, np.float32)}
    tasks = {"up": {"w": np.float32([1, 1, 0, 2])}, "down": {"w": np.float32([-1, 1, 0, 2])}}
    path = encode(base, tasks, threshold=0.4)
    file = ref.read(path.read_bytes())
    _, entry = file.entry("up", "w")  # by the rule, where s = 0: 1 > 0.4 * |0 - 1|
    assert stored_mask(file, entry, (4,)).tolist() == [False, True, False, True]
    assert (entry.set_bits, entry.published_bits) == (2, 3)
    assert file.agreement(file.tensors[0]) == [1, 0, 3]


def test_negative_zero_of_the_base_stays(encode):
    base = {"w": np.float32([-0.0, -0.0, 1])}
    tasks = {"a": {"w": np.float32([0.0, -0.0, 2])}, "b": {"w": np.float32([-0.0, -0.0, 3])}}
    with tallcodec.open(encode(base, tasks), "np") as file:
        assert np.signbit(file.decode("a")["w"]).tolist() == [True, True, False]


@pytest.mark.parametrize("shared_dtype", SHARED_DTYPES)
@pytest.mark.parametrize("scale", SCALES[1:])
def test_unit_gain(encode, scale, shared_dtype):
    base, tasks = small_family(("cars", "dtd", "mnist"))
    path = encode(base, tasks, scale=scale, shared_dtype=shared_dtype)
    with tallcodec.open(path, "np") as file:
        for info in file.info.tasks:
            assert info.gain == pytest.approx(1, abs=1e-6)
            assert info.tensors["mask"] == len(base)
            decoded = file.decode(info.name)
            for name, b in base.items():
                tau = (tasks[info.name][name] - b).astype(np.float64)
                approx = (decoded[name] - b).astype(np.float64)
                rows = len(b) if scale == "unit-gain-row" and b.ndim > 1 else 1
                dot, tau_sq = ((x.reshape(rows, -1) * tau.reshape(rows, -1)).sum(1)
                               for x in (approx, tau))
                np.testing.assert_allclose(dot / tau_sq, 1, atol=1e-5)


def test_scale_none_is_no_scale(encode):
    file = ref.read(encode(*small_family(), scale="none").read_bytes())
    assert {e.scale for row in file.entries for e in row} == {1.0}
    assert {e.scales_plane for row in file.entries for e in row} == {records.NONE}


def test_thresholds_are_each_tasks_own(encode):
    base, tasks = small_family(("a", "b", "c"))
    path = encode(base, tasks, threshold={"c": 5.0, "a": 0.0, "b": 0.4})
    with tallcodec.open(path) as file:
        a, b, c = file.info.tasks
    assert [t.threshold for t in (a, b, c)] == [0.0, 0.4, 5.0]
    assert a.density > b.density > c.density > 0


# One file, whatever makes it.

OPTIONS = list(reference_options())


def assert_equal_bytes(found, expected):
    """Without pytest's account of how megabytes differ."""
    assert len(found) == len(expected)
    differing = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8))
    assert differing.size == 0, f"{differing.size} bytes differ, the first at {differing[0]}"


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda n: label(OPTIONS[n]))
def test_the_file_is_the_references(encode, number):
    options = OPTIONS[number]
    base, tasks, thresholds = family(number % 4, tasks=1 + number % 5)
    expected = ref.write(base, tasks, thresholds=thresholds, metadata={"k": "v"}, **options)
    path = encode(base, tasks, threshold=thresholds, metadata={"k": "v"}, **options)
    assert_equal_bytes(path.read_bytes(), expected)


BIG_OPTIONS = [
    {"scale": "none", "shared_dtype": "auto", "base_storage": "embed"},
    {"scale": "unit-gain", "shared_dtype": "float16", "base_storage": "embed"},
    {"scale": "unit-gain-row", "shared_dtype": "int8", "base_storage": "reference"},
]


@functools.cache
def big_reference(number):
    base, tasks, thresholds = family(4, big=True)
    return ref.write(base, tasks, thresholds=thresholds, **BIG_OPTIONS[number])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("number", range(len(BIG_OPTIONS)), ids=lambda n: label(BIG_OPTIONS[n]))
def test_kernels_and_threads_make_one_file(encode, monkeypatch, number, kernels, threads):
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    base, tasks, thresholds = family(4, big=True)
    path = encode(base, tasks, threshold=thresholds, threads=threads, **BIG_OPTIONS[number])
    assert_equal_bytes(path.read_bytes(), big_reference(number))


@functools.cache
def big_decoded(number, task):
    base, _, _ = family(4, big=True)
    return ref.read(big_reference(number), base).task_state(task)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("number", range(len(BIG_OPTIONS)), ids=lambda n: label(BIG_OPTIONS[n]))
def test_kernels_and_threads_decode_alike(tmp_path, monkeypatch, number, kernels, threads):
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    base, _, _ = family(4, big=True)
    path = tmp_path / "big.tall"
    path.write_bytes(big_reference(number))
    with tallcodec.open(path, "np", base, threads=threads) as file:
        for task in ("cars", "aircraft"):
            assert_same(file.decode(task), big_decoded(number, task))


def test_the_source_makes_no_difference(tmp_path, encode):
    """Files, folders and state dicts of torch or NumPy: one file, but for what they have beside."""
    base, tasks, thresholds = family(1)
    paths = {}
    for name, state in {"base": base, **tasks}.items():
        paths[name] = tmp_path / f"{name}.pt"
        torch.save(torch_state(state), paths[name])
    torch_tasks = {name: torch_state(state) for name, state in tasks.items()}
    files = [
        encode(base, tasks, threshold=thresholds),
        encode(torch_state(base), torch_tasks, threshold=thresholds),
        encode(paths["base"], {name: paths[name] for name in tasks}, threshold=thresholds),
        encode(str(paths["base"]), {**tasks, "dtd": torch_tasks["dtd"]}, threshold=thresholds),
    ]
    assert len({file.read_bytes() for file in files}) == 1


# What each tensor becomes: the table of docs/design.md, row by row.


def round_trip(encode, base, tasks, **options):
    """(file's info by task, decoded by task) of states given as arrays or lists."""
    path = encode(base, tasks, **options)
    with tallcodec.open(path, "np") as file:
        info = {t.name: t for t in file.info.tasks}
        return info, {task: file.decode(task) for task in file.tasks}


def verbatim(info):
    return {v.name: v.reason for v in info.verbatim}


W = normal((4, 33), 7)
TUNED = W + normal((4, 33), 8, spread=0.1)
OTHER = W + normal((4, 33), 9, spread=0.1)


def test_differing_float_tensor_has_a_mask_per_task(encode):
    path = encode({"w": W}, {"a": {"w": TUNED}, "b": {"w": OTHER}})
    with tallcodec.open(path) as file:
        info = file.info
    assert info.planes == {"base": W.nbytes, "shared": W.nbytes, "mask": 2 * 17}
    assert [t.tensors["mask"] for t in info.tasks] == [1, 1]
    assert [t.bytes for t in info.tasks] == [17, 17]


@pytest.mark.parametrize("theirs", [np.float16, BF16])
def test_task_of_another_dtype_keeps_it(encode, theirs):
    tuned, other = TUNED.astype(theirs), OTHER
    tasks = {"a": {"w": tuned}, "b": {"w": other}}
    info, decoded = round_trip(encode, {"w": W}, tasks, threshold=0.4)
    assert decoded["a"]["w"].dtype == theirs and decoded["b"]["w"].dtype == np.float32
    assert info["a"].tensors["mask"] == 1
    s = torch.from_numpy((tuned.astype(np.float32) - W) + (other - W))
    mask = published_mask(torch.from_numpy(W), to_torch(tuned).float(), s, 0.4)
    expected = (torch.from_numpy(W) + mask * s).to(to_torch(tuned).dtype)
    assert torch.equal(to_torch(decoded["a"]["w"]), expected)


def test_bfloat16_base_with_float32_task(encode):
    base = W.astype(BF16)
    info, decoded = round_trip(encode, {"w": base}, {"a": {"w": TUNED}}, shared_dtype="float32")
    assert decoded["a"]["w"].dtype == np.float32 and info["a"].tensors["mask"] == 1
    assert info["a"].error < 0.05  # one task: s is its own task vector


def test_equal_everywhere_has_no_plane_but_the_bases(encode):
    path = encode({"w": W, "x": W[0]}, {"a": {"w": W.copy(), "x": W[0]}, "b": {"w": W, "x": W[0]}})
    with tallcodec.open(path, "np") as file:
        assert file.info.planes == {"base": W.nbytes + W[0].nbytes}
        assert [t.tensors["as the base"] for t in file.info.tasks] == [2, 2]
        assert same(file.decode("a")["w"], W)


def test_equal_in_some_tasks_has_no_plane_for_those(encode):
    info, decoded = round_trip(encode, {"w": W}, {"same": {"w": W.copy()}, "tuned": {"w": TUNED}})
    assert info["same"].bytes == 0 and info["same"].tensors["as the base"] == 1
    assert info["tuned"].bytes == 17
    assert same(decoded["same"]["w"], W)


def test_integer_buffer_survives(encode):
    base = {"w": W, "step": np.array(16777217), "same": np.arange(9)}
    task = {"w": TUNED, "step": np.array(16777219), "same": np.arange(9)}
    info, decoded = round_trip(encode, base, {"a": task, "b": {**task, "step": base["step"]}})
    assert decoded["a"]["step"] == 16777219 and decoded["b"]["step"] == 16777217
    assert verbatim(info["a"]) == {"step": "not an arithmetic type"}
    assert verbatim(info["b"]) == {}


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_are_verbatim_where_they_differ(encode, dtype):
    values = np.random.default_rng(0).integers(0, 2, (2, 50, dtype.itemsize), np.uint8)
    base, task = values.view(dtype)[..., 0]
    info, decoded = round_trip(encode, {"x": base, "same": base[:7], "w": W},
                               {"a": {"x": task, "same": base[:7], "w": TUNED}})
    assert same(decoded["a"]["x"], task) and same(decoded["a"]["same"], base[:7])
    assert verbatim(info["a"]) == {"x": "not an arithmetic type"}


@pytest.mark.parametrize("theirs", [np.float64, np.int32, ml_dtypes.float8_e4m3fn])
def test_task_dtype_without_arithmetic_is_verbatim(encode, theirs):
    task = TUNED.astype(theirs)
    info, decoded = round_trip(encode, {"w": W}, {"a": {"w": task}, "b": {"w": OTHER}})
    assert same(decoded["a"]["w"], task)
    assert verbatim(info["a"]) == {"w": "not an arithmetic type"}
    assert info["b"].gain == pytest.approx(1, abs=1e-6)  # s is that of the one task coded


def test_heads_of_another_shape_are_verbatim(encode):
    heads = {"a": normal((196, 4)), "b": normal((47, 4)), "c": normal((10, 4), 1)}
    base = {"w": W, "head": normal((10, 4))}
    info, decoded = round_trip(encode, base, {
        task: {"w": TUNED, "head": head} for task, head in heads.items()})
    for task in "ab":
        assert same(decoded[task]["head"], heads[task])
        assert verbatim(info[task]) == {"head": "another shape than in the base"}
    assert verbatim(info["c"]) == {}


def test_resized_embedding(encode):
    embedding = normal((30, 8))
    resized = np.concatenate([embedding, normal((2, 8), 1)])
    info, decoded = round_trip(encode, {"e": embedding}, {"a": {"e": resized}})
    assert same(decoded["a"]["e"], resized)
    assert verbatim(info["a"]) == {"e": "another shape than in the base"}


def test_same_elements_in_another_shape_are_verbatim(encode):
    info, decoded = round_trip(encode, {"w": W}, {"a": {"w": W.reshape(33, 4)}})
    assert same(decoded["a"]["w"], W.reshape(33, 4))
    assert verbatim(info["a"]) == {"w": "another shape than in the base"}


def test_absent_in_a_task(encode):
    base = {"w": W, "pooler": normal(5)}
    tasks = {"a": {"w": TUNED}, "b": {"w": OTHER, "pooler": normal(5, 1)}}
    info, decoded = round_trip(encode, base, tasks)
    assert list(decoded["a"]) == ["w"] and sorted(decoded["b"]) == ["pooler", "w"]
    assert info["a"].tensors["absent"] == 1


def test_absent_in_every_task(encode):
    path = encode({"w": W, "gone": normal(5)}, {"a": {"w": TUNED}})
    with tallcodec.open(path, "np") as file:
        assert "gone" in file.tensors and "gone" not in file.decode("a")
        assert same(file.decode(None)["gone"], normal(5))


def test_extra_in_a_task(encode):
    tasks = {"a": {"w": TUNED, "head": normal((3, 3))}, "b": {"w": OTHER}}
    info, decoded = round_trip(encode, {"w": W}, tasks)
    assert same(decoded["a"]["head"], normal((3, 3))) and "head" not in decoded["b"]
    assert verbatim(info["a"]) == {"head": "not in the base"}


@pytest.mark.parametrize("copied", [False, True], ids=["same storage", "equal bytes"])
def test_tied_is_stored_once_and_decoded_apart(encode, copied):
    def state(array):
        w = torch.from_numpy(array.copy())
        return {"embed": w, "head": w.clone() if copied else w, "other": w[1:].clone()}

    path = encode(state(W), {"a": state(TUNED), "b": state(OTHER)})
    with tallcodec.open(path) as file:
        decoded, info = file.decode("a"), file.info
        assert decoded["embed"].equal(decoded["head"])
        assert decoded["embed"].data_ptr() != decoded["head"].data_ptr()
        assert file.decode("a", ["head"])["head"].equal(decoded["embed"])
    assert info.planes["base"] == W.nbytes + W[1:].nbytes
    assert info.tasks[0].tensors["tied"] == 1


def test_tied_in_the_base_alone_is_not_tied(encode):
    task = {"embed": TUNED, "head": OTHER}
    info, decoded = round_trip(encode, {"embed": W, "head": W.copy()}, {"a": task})
    assert info["a"].tensors["tied"] == 0 and info["a"].tensors["mask"] == 2
    assert decoded["a"]["embed"] is not decoded["a"]["head"]


def test_tied_in_bytes_but_not_in_dtype_or_shape_is_not_tied(encode):
    zeros = {"f": np.zeros(8, np.float32), "i": np.zeros(8, np.int32), "s": np.zeros((2, 4), "f4")}
    info, decoded = round_trip(encode, zeros, {"a": zeros})
    assert info["a"].tensors["tied"] == 0
    assert_same(decoded["a"], zeros)


def late(array, value, at=-1):
    array = array.copy()
    array.reshape(-1)[at] = value
    return array


@pytest.mark.parametrize("shape", [(50,), (3, BIG // 3)], ids=["small", "several units"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=lambda d: np.dtype(d).name)
def test_nan_or_infinity_in_a_task(encode, dtype, value, shape):
    base = normal(shape, 0, dtype)
    bad = late(normal(shape, 1, dtype), value)
    good = (base.astype(np.float32) + normal(shape, 2, spread=0.1)).astype(dtype)
    info, decoded = round_trip(encode, {"w": base}, {"bad": {"w": bad}, "good": {"w": good}})
    alone, expected = round_trip(encode, {"w": base}, {"good": {"w": good}})
    assert same(decoded["bad"]["w"], bad)
    assert verbatim(info["bad"]) == {"w": "NaN or infinity in the task"}
    assert same(decoded["good"]["w"], expected["good"]["w"])  # s is without the bad task
    assert info["good"] == alone["good"]


@pytest.mark.parametrize("shape", [(50,), (3, BIG // 3)], ids=["small", "several units"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_infinity_in_the_base(encode, value, shape):
    base = late(normal(shape), value)
    tasks = {"a": {"w": normal(shape, 1)}, "b": {"w": late(normal(shape, 2), np.nan)},
             "same": {"w": base.copy()}}
    info, decoded = round_trip(encode, {"w": base}, tasks)
    for task in tasks:
        assert same(decoded[task]["w"], tasks[task]["w"])
    assert verbatim(info["a"]) == verbatim(info["b"]) == {"w": "NaN or infinity in the base"}
    assert verbatim(info["same"]) == {}


def test_nan_everywhere_leaves_no_shared_vector(encode):
    nan = {"w": np.full(9, np.nan, np.float32)}
    path = encode({"w": np.zeros(9, np.float32)}, {"a": nan, "b": nan})
    with tallcodec.open(path, "np") as file:
        assert file.info.planes.keys() == {"base", "verbatim"}
        assert np.isnan(file.decode("b")["w"]).all()
    tallcodec.verify(path)


def test_difference_that_overflows_is_decoded_to_the_base(encode):
    base, task = np.full(3, 3e38, np.float32), np.full(3, -3e38, np.float32)
    info, decoded = round_trip(encode, {"w": base}, {"a": {"w": task}})
    assert same(decoded["a"]["w"], base)
    assert info["a"].density == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_empty_tensors(encode, shape, dtype):
    empty = np.zeros(shape, dtype)
    tasks = {"a": {"w": TUNED, "empty": empty}, "b": {"w": OTHER, "empty": empty.astype(BF16)},
             "c": {"w": W}}
    info, decoded = round_trip(encode, {"w": W, "empty": empty}, tasks)
    for task in "ab":
        assert same(decoded[task]["empty"], tasks[task]["empty"])
    assert "empty" not in decoded["c"]
    assert info["a"].tensors["as the base"] == 1


def test_a_family_of_empty_tensors(encode):
    info, decoded = round_trip(encode, {"e": np.zeros(0, "f4")}, {"a": {"e": np.zeros(0, "f4")}})
    assert decoded["a"]["e"].shape == (0,)
    assert np.isnan(info["a"].gain)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=lambda d: np.dtype(d).name)
def test_0d_tensors(encode, dtype):
    base, tasks = {"scale": np.array(1, dtype)}, {"a": {"scale": np.array(1.5, dtype)}}
    for scale in SCALES:
        info, decoded = round_trip(encode, base, tasks, scale=scale)
        assert decoded["a"]["scale"].shape == () and decoded["a"]["scale"] == 1.5
        assert info["a"].tensors["mask"] == 1


# More than 2^31 elements, by arithmetic: nothing of that size is allocated, on disk or in memory.

HUGE = 2**31 + 2**20 + 1


def huge_file(path, shape, raw_size):
    """A file whose one int8 tensor has that shape, in a referenced base and equal in its task."""
    name, task, writer = (struct.pack("<II", *at) for at in ((0, 4), (4, 1), (5, 9)))
    sums = records.sum_count(raw_size)
    common = {"dtype": 16, "rank": len(shape), "scales_plane": records.NONE}
    index = [
        records.INDEX.pack(tensors=1, tasks=1, planes=1, dims=len(shape), sums=sums, strings=14,
                       writer=writer, base_storage=records.REFERENCED, merge=1),
        records.TENSOR.pack(name=name, in_base=1, base_plane=0, shared_plane=records.NONE,
                        alias=records.NONE, **common),
        records.TASK.pack(name=task, threshold=0.5, method=records.TALL),
        records.ENTRY.pack(coding=records.AS_BASE, plane=records.NONE, scale=1, **common),
        records.PLANE.pack(kind=records.BASE, coding=records.EXTERNAL, raw_size=raw_size),
        struct.pack(f"<{len(shape)}Q", *shape),
        bytes(8 * sums),
        b"hugeatall test",
    ]
    index = b"".join(index)
    path.write_bytes(seal(b"", index + bytes(-len(index) % 64)))


@pytest.mark.parametrize("shape", [(HUGE,), (2**16, 2**15 + 16)])
def test_more_than_2_to_31_elements_are_counted(tmp_path, shape):
    path, elements = tmp_path / "huge.tall", math.prod(shape)
    huge_file(path, shape, elements)
    with tallcodec.open(path, "np") as file:
        assert file._info(0, 0) == ("I8", shape, elements)
        assert file.info.base_parameters == file.info.tasks[0].parameters == elements


@pytest.mark.parametrize("shape", [
    (5,), (2**32 + 4,), (2**33 + 5,), (2**32, 2**32 + 5), (2**63, 2), (2**62, 0)])
def test_more_than_2_to_31_elements_that_do_not_fit_are_refused(tmp_path, shape):
    """Where numbers of 32 or 64 bits that wrap would see what fits, or nothing."""
    huge_file(tmp_path / "huge.tall", shape, raw_size=2**32 + 5)
    with pytest.raises(tallcodec.errors.FormatError, match="tensor 'huge'"):
        tallcodec.open(tmp_path / "huge.tall", "np")


def test_more_than_2_to_31_elements_of_a_checkpoint_are_planned(tmp_path):
    """A sparse file: its tensors are placed, and the one behind the huge one is read."""
    entry = {"dtype": "I8", "shape": [HUGE], "data_offsets": [0, HUGE]}
    small = {"dtype": "I8", "shape": [3], "data_offsets": [HUGE, HUGE + 3]}
    header = json.dumps({"huge": entry, "small": small}).encode()
    path = tmp_path / "huge.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(HUGE, 1)
        file.write(b"abc")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["huge"].nbytes == HUGE
        small = checkpoint.tensors["small"]
        assert small.read().tobytes() == b"abc"
        assert _core.read_source((small.fd, small.offset), 3) == b"abc"


def test_arrays_of_families_have_every_dtype():
    """Guards the tests above: the family really has what they are about."""
    base, _, _ = family(1)
    assert {a.dtype for a in base.values()} >= set(OTHERS)
    assert any(0 in a.shape for a in base.values()) and any(a.ndim == 0 for a in base.values())
