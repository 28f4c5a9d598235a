"""Counting over masks: the kernels, and what `stats` says of a file, against plain NumPy."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

import tallcodec
from helpers import awkward, normal, seal, small_family, unseal
from tallcodec import _core, errors
from tallcodec.cli import main
from tallcodec.reference import formulas, read
from tallcodec.reference.records import MASKED, NONE

kernels = _core.kernels


@pytest.fixture(params=kernels.available())
def variant(request):
    return request.param


def packed_masks(tasks, n, seed=0):
    """Masks of different densities as booleans and as packed planes."""
    rng = np.random.default_rng(seed)
    masks = rng.random((tasks, n)) < rng.random((tasks, 1))
    return masks, [np.packbits(mask, bitorder="little") for mask in masks]


@pytest.mark.parametrize("n", [0, 1, 13, 8191, 8192, 20000, 524288 + 12345])
@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 8, 9, 20, 33, 64])
def test_kernels_count_as_numpy_does(variant, tasks, n):
    if n > 500_000 and (variant == "scalar" or tasks not in (8, 20)):
        n = 30_001
    masks, planes = packed_masks(tasks, n)
    found = kernels.agreement(planes, n, kernels=variant, threads=2)
    assert found == formulas.agreement(masks).tolist()
    for least in {1, 2, (tasks + 1) // 2, tasks, tasks + 1}:
        expected = np.packbits(formulas.consensus(masks, least), bitorder="little")
        out = kernels.consensus(planes, n, least, kernels=variant)
        np.testing.assert_array_equal(out, expected)
    pairs = np.reshape(kernels.overlap(planes, n, kernels=variant), (tasks, tasks))
    np.testing.assert_array_equal(pairs, np.triu(formulas.overlap(masks)))


def test_spare_bits_do_not_count(variant):
    planes = [np.array([0xFF, 0xFF], np.uint8)] * 3
    assert kernels.agreement(planes, 9, kernels=variant) == [0, 0, 0, 9]
    assert kernels.overlap(planes[:1], 9, kernels=variant) == [9]
    assert kernels.consensus(planes, 9, 2, kernels=variant).tolist() == [0xFF, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_zeros(variant, dtype):
    values = np.random.default_rng(1).choice(np.float32([0, -0.0, 1, -2, 1e-7]), 1003).astype(dtype)
    scales = np.float32([1, 0, 1e-45, -1, 1, 1, 0, 1]) if dtype == np.int8 else None
    expected = np.count_nonzero(formulas.load_shared(values, scales) == 0)
    name = np.dtype(dtype).name
    raw = values.view(np.uint16) if values.itemsize == 2 else values
    assert kernels.zeros(raw, name, scales=scales, kernels=variant) == expected


def expected_stats(path):
    """By tensor: elements, don't-cares, published and stored agreement, set bits by task; and the
    overlap of the masks, all from the reference reader."""
    file = read(path.read_bytes())
    names = [task.name for task in file.tasks]
    tensors, overlap = {}, np.zeros((len(names), len(names)), int)
    for i, tensor in enumerate(file.tensors):
        coded = [k for k in range(len(names))
                 if tensor.alias == NONE and file.entries[k][i].coding == MASKED]
        if not coded:
            continue
        s = file.shared(tensor)
        masks = np.zeros((len(names), s.size), bool)
        for k in coded:
            plane = np.frombuffer(file._bytes(file.entries[k][i].plane), np.uint8)
            masks[k] = np.unpackbits(plane, count=s.size, bitorder="little")
        published = file.agreement(tensor)
        published += [0] * (len(names) + 1 - len(published))
        stored = formulas.agreement(masks[:, s != 0]).tolist()
        bits = {names[k]: int(masks[k].sum()) for k in coded}
        tensors[tensor.name] = s.size, int((s == 0).sum()), published, stored, bits
        overlap += formulas.overlap(masks)
    return tensors, overlap


@pytest.mark.parametrize("options", [
    {}, {"shared_dtype": "int8"}, {"shared_dtype": "bfloat16", "scale": "unit-gain-row"},
    {"merge": "ties"}, {"method": "magnitude"},
], ids=lambda options: "-".join(options.values()) or "plain")  # fmt: skip
@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_stats_of_an_awkward_family(encode, tasks, options):
    base, states, thresholds = awkward(tasks=tasks, big=tasks == 3)
    if options.get("method") != "magnitude":
        options = options | {"threshold": thresholds}
    path = encode(base, states, **options)
    found = tallcodec.stats(path, threads=2)
    tensors, overlap = expected_stats(path)
    assert {t.name: (t.elements, t.dont_cares, list(t.published.counts), list(t.stored.counts),
                     t.set_bits) for t in found.tensors} == tensors
    assert found.overlap == overlap.tolist()
    total = found.trained
    assert total.elements == sum(t[0] for t in tensors.values())
    assert sum(total.published.counts) == total.elements
    assert sum(total.stored.counts) == total.elements - total.dont_cares

    with tallcodec.open(path, "np") as file:
        assert found.parameters == file.info.base_parameters
        for task in file.info.tasks:
            assert total.density[task.name] == pytest.approx(task.density, rel=1e-15)
    assert sum(found.over_all(total.published).counts) == found.parameters
    assert sum(layer.elements for layer in found.layers) == total.elements


def test_shares_of_a_family_known_by_heart(encode):
    base = {"layer.0.w": np.zeros(8, np.float32), "layer.0.b": np.zeros(2, np.float32),
            "frozen": np.zeros(10, np.float32)}  # fmt: skip
    a = base | {"layer.0.w": np.float32([1, 1, 0, 0, 1, -1, 0, 2]),
                "layer.0.b": np.float32([3, 0])}  # fmt: skip
    b = base | {"layer.0.w": np.float32([1, 0, 1, 0, 1, 1, 0, 2])}
    # Active: both, a, b, none, both, both (they cancel: s = 0), none, both; and a, none.
    found = tallcodec.stats(encode(base, {"a": a, "b": b}, threshold=0.4))
    assert found.trained.published.shares == [0.3, 0.3, 0.4]
    assert found.trained.stored.shares == [0, 0.5, 0.5]
    assert found.over_all(found.trained.published).shares == [0.65, 0.15, 0.2]
    assert found.trained.dont_cares == 4
    published = found.trained.published
    assert (published.selfish, published.catastrophic, published.universal) == (0.3, 0.3, 0.4)
    assert found.overlap == [[5, 3], [3, 4]] and found.jaccard == [[1, 0.5], [0.5, 1]]
    assert found.trained.density == {"a": 0.5, "b": 0.5}
    assert [layer.name for layer in found.layers] == ["layer.0"]
    tensors = {t.name: t for t in found.tensors}
    assert tensors["layer.0.b"].density == {"a": 0.5}


def test_a_file_without_masks_has_no_shares(encode):
    base = {"step": np.array(1), "w": np.ones(3, np.float32)}
    found = tallcodec.stats(encode(base, {"a": base | {"step": np.array(2)}}))
    assert found.tensors == [] and math.isnan(found.trained.published.universal)
    assert found.over_all(found.trained.published).shares == [1, 0]
    assert str(found).endswith("1 task, none of them has masks")


def test_the_command(capsys, small_file):
    assert main(["stats", str(small_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("agreement", "agreement_without_dont_cares", "agreement_all"):
        assert len(found[name]) == 3 and sum(found[name]) == pytest.approx(1)
        assert found["countings"][name]["universal"] == found[name][-1]
    assert found["density"].keys() == {"cars", "dtd"}
    assert main(["stats", str(small_file)]) == 0
    printed = capsys.readouterr().out
    assert "selfish" in printed and "a.weight" in printed and "overlap" in printed


def test_many_tensors_are_shown_by_block(encode):
    names = [f"encoder.layer.{i}.{part}.weight" for i in range(9) for part in "qkv"]
    base = {name: normal(9, seed) for seed, name in enumerate(names)}
    tuned = {name: array + np.float32(1) for name, array in base.items()}
    printed = str(tallcodec.stats(encode(base, {"a": tuned})))
    assert "encoder.layer.8 " in printed and "encoder.layer.8.q" not in printed


def test_damage_and_unknown_codings_are_errors(encode):
    path = encode(*small_family())
    data = bytearray(path.read_bytes())
    with tallcodec.open(path, "np") as file:
        mask = next(p for p in file._file.planes() if p[0] == 3)
    data[mask[2]] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.ChecksumError, match="mask of tensor 'a.bias', task 'cars'"):
        tallcodec.stats(path)

    data[mask[2]] ^= 1
    planes, index = unseal(bytes(data))
    index = bytearray(index)
    index[128 + 3 * 64 + 2 * 64] = 9  # the coding of the first task's first entry
    path.write_bytes(seal(planes, bytes(index)))
    with pytest.raises(errors.VersionError, match="'a.bias' of task 'cars' has coding 9"):
        tallcodec.stats(path)
    with pytest.raises(errors.VersionError, match="coding 9"):
        tallcodec.merge(path)


def test_a_file_without_tasks(small_file, capsys):
    tallcodec.remove(small_file, tallcodec.open(small_file, "np").tasks)
    found = tallcodec.stats(small_file)
    assert "0 tasks, none of them has masks" in str(found) and found.to_dict()["tasks"] == []
    assert main(["stats", str(small_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == []
