"""Random families, held to the reference: encoded as it does, and decoded to its values.

HYPOTHESIS_PROFILE=long takes many more, ever new ones, in some ten minutes: make test-properties.
"""

import math
import os
import shutil
from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

import tallcodec
from families import ARITHMETIC, OTHERS
from helpers import assert_same, reference_file, same, write_safetensors
from tallcodec import _core, reference
from tallcodec.errors import ArgumentError
from tallcodec.reference import records

# Around what is special: bytes and groups of masks, blocks of scales, the least sample of a factor.
LENGTHS = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 530, 1100, 4097])
SHAPES = st.one_of(
    st.just(()),
    LENGTHS.map(lambda n: (n,)),
    st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple),
    st.tuples(st.integers(1, 5), LENGTHS),
    st.tuples(LENGTHS, st.integers(1, 5)),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6)
TASKS = st.text(st.sampled_from("abcé 中/.\\\U0001d6fe"), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


def values(random, shape, dtype, kind):
    """An array of a kind of values."""
    n = math.prod(shape)
    if kind == "bits":
        array = random.integers(0, 256, n * dtype.itemsize, np.uint8)
        array = (array & 1 if dtype == np.bool_ else array).view(dtype)
    else:
        array = random.standard_normal(n)
        if kind == "few":
            array = np.round(array * 2) / 4
        elif kind == "wide":
            array *= 10.0 ** random.integers(-46, 39, n)
        elif kind == "zeros":
            array *= random.integers(-1, 2, n) * (random.random(n) < 0.1)
        with np.errstate(all="ignore"):
            array = (array if dtype.kind in "fV" else array.astype(np.int64) & 1).astype(dtype)
    return array.reshape(shape)


def tuned(random, array, kind):
    """A fine-tuned version of an array of the same type."""
    if array.dtype not in ARITHMETIC:
        return np.roll(array, 1) if kind != "sparse" or not array.size else array.copy()
    change = random.standard_normal(array.shape) * 0.01
    if kind == "few":
        change = np.round(change * 100) / 64
    elif kind == "wide":
        change *= 10.0 ** random.integers(-30, 39, array.shape)
    elif kind == "sparse":
        change *= random.random(array.shape) < 0.05
    elif kind == "sign":
        return -array
    with np.errstate(all="ignore"):
        array = np.asarray(array.astype(np.float32) + change.astype(np.float32)).astype(array.dtype)
    if kind == "not finite" and array.size:
        array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -np.inf])
    return array


KINDS = ["normal", "normal", "few", "wide", "zeros", "bits"]
CHANGES = ["normal", "normal", "normal", "few", "wide", "sparse", "sign", "not finite"]
BECOMES = ["tuned", "tuned", "tuned", "tuned", "equal", "cast", "reshaped", "absent"]


@st.composite
def families(draw):
    """(base, tasks): every mixture of what a tensor can become."""
    dtypes = st.one_of(st.sampled_from(ARITHMETIC), st.sampled_from(ARITHMETIC + OTHERS))
    names = draw(st.lists(TASKS, min_size=1, max_size=4, unique=True))
    base, tasks = {}, {name: {} for name in names}
    for name in draw(st.lists(NAMES, min_size=1, max_size=6, unique=True)):
        random = np.random.default_rng(draw(SEEDS))
        if base and draw(st.integers(0, 5)) == 0:  # tied, or nearly so
            other = draw(st.sampled_from(sorted(base)))
            for state in (base, *tasks.values()):
                if other in state and draw(st.integers(0, 9)) < 9:
                    state[name] = state[other].copy()
            continue
        array = values(random, draw(SHAPES), draw(dtypes), draw(st.sampled_from(KINDS)))
        if draw(st.integers(0, 9)):
            base[name] = array
        for state in tasks.values():
            become = draw(st.sampled_from(BECOMES))
            task = tuned(random, array, draw(st.sampled_from(CHANGES)))
            if become == "equal":
                task = array.copy()
            elif become == "cast" and array.dtype in ARITHMETIC:
                with np.errstate(all="ignore"):
                    task = task.astype(draw(st.sampled_from(ARITHMETIC)))
            elif become == "reshaped":
                task = values(random, draw(SHAPES), draw(dtypes), "bits")
            if become != "absent":
                state[name] = task
    # What no checkpoint may be: without tensors, or without one of the base's.
    common = np.float32(draw(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=3)))
    for state in (base, *tasks.values()):
        state["common"] = common
    return base, tasks


@st.composite
def options(draw, tasks):
    """Options of encode, and what the reference calls them."""
    masks = draw(st.sampled_from(["tall", "adapted", "magnitude"]))
    mixture = draw(st.sampled_from(["masks", "masks", "ternary", "both"]))
    methods = {
        task: "ternary" if mixture == "ternary" or mixture == "both" and draw(st.booleans())
        else masks for task in tasks
    }  # fmt: skip
    if set(methods.values()) == {"ternary"}:
        masks = "ternary"
    given = {
        "merge": draw(st.sampled_from(["task-arithmetic", "average", "ties"])),
        "scale": draw(st.sampled_from(["none", "unit-gain", "unit-gain-row"])),
        "shared_dtype": draw(
            st.sampled_from(["auto", "float32", "bfloat16", "float16", "int8"])
        ),
        "base_storage": draw(st.sampled_from(["embed", "reference"])),
        "coding": draw(st.sampled_from(["raw", "entropy", "auto"])),
        "metadata": draw(st.dictionaries(TEXT, TEXT, max_size=2)),
    }
    ours = given | {"method": {t: "tall" if m == "adapted" else m for t, m in methods.items()}}
    theirs = given | {"method": methods}
    if masks == "tall":
        lambdas = st.floats(0, 2, width=32)
        ours["threshold"] = theirs["thresholds"] = {
            task: draw(lambdas) for task, m in methods.items() if m == "tall"
        }
    densities = st.floats(0.01, 1)
    bits = {task: draw(st.floats(0.05, 4)) for task, m in methods.items() if m == "ternary"}
    how = draw(st.sampled_from(["bits", "default", "density"])) if bits else "none"
    if how == "bits":
        ours["bits"] = theirs["bits"] = bits
    elif how == "default":
        theirs |= {"bits": dict.fromkeys(bits, 0.6), "least_bits": True}
    shares = given["merge"] == "ties" or masks == "magnitude"
    if how == "density" or shares and how != "default" and draw(st.booleans()):
        ours["density"] = theirs["density"] = draw(densities)
    return ours, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all examples, which are many: each removes what it leaves."""
    return tmp_path_factory.mktemp("properties")


@given(st.data())
def test_a_family_comes_back(folder, data):
    base, tasks, path = *data.draw(families(), "family"), folder / "a.tall"
    ours, theirs = data.draw(options(list(tasks)), "options")
    kernels = data.draw(st.sampled_from(_core.kernels.available()), "kernels")
    threads = data.draw(st.integers(1, 3), "threads")
    referenced = base if ours["base_storage"] == "reference" else None
    with mock.patch.dict(os.environ, {"TALLCODEC_KERNELS": kernels}):
        try:
            info = tallcodec.encode(base, tasks, path, threads=threads, overwrite=True, **ours)
        except ArgumentError as error:  # too few bits, or too small a density
            event("refused")
            assert "cannot be met" in str(error)
            try:
                reference_file(base, tasks, **theirs)
            except ArgumentError:
                return
            raise
        file = path.read_bytes()
        read = reference.read(file, base)
        read.verify()
        assert file == reference_file(base, tasks, **theirs)
        tallcodec.verify(path, referenced, threads=threads)
        with tallcodec.open(path, "np", referenced, threads=threads) as opened:
            assert str(info.to_dict()) == str(opened.info.to_dict())  # NaN differs from itself
            adds_up(info, read, base, tasks)
            assert_same(opened.decode(None), base)
            for task in tasks:
                decoded = opened.decode(task)
                assert_same(decoded, read.task_state(task))
                assert_same(opened.load(task).decode(), decoded)
                holds(read, task, decoded, tasks[task], base)
            rows(data, opened, task, decoded)
        event(f"{len(tasks)} tasks")


def holds(read, task, decoded, state, base):
    """What was stored verbatim is exact; everything has its own type and shape."""
    number = list(read.task_numbers).index(task)
    assert decoded.keys() == state.keys()
    for i, tensor in enumerate(read.tensors):
        if tensor.name not in state:
            continue
        found, wanted = decoded[tensor.name], state[tensor.name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        entry = read.entries[number][i if tensor.alias == records.NONE else tensor.alias]
        if entry.coding in (records.AS_BASE, records.AS_IS):
            assert same(found, wanted), tensor.name


def adds_up(info, read, base, tasks):
    assert info.bytes == len(read.data) == sum(info.planes.values()) + info.overhead
    assert info.tensors == len({name for state in (base, *tasks.values()) for name in state})
    own = 0
    for task in info.tasks:
        assert sum(task.tensors.values()) == info.tensors
        assert 0 <= task.coded_parameters <= task.parameters
        assert task.parameters <= sum(array.size for array in tasks[task.name].values())
        assert len(task.verbatim) == task.tensors["verbatim"]
        if task.coded_parameters:
            assert 0 <= task.density <= task.published_density <= 1
        own += task.bytes
    shared_scales = sum(read.planes[t.scales_plane].size for t in read.tensors
                        if t.scales_plane != records.NONE)  # fmt: skip
    kinds = ("mask", "ternary", "verbatim", "scales")
    assert own == sum(info.planes.get(kind, 0) for kind in kinds) - shared_scales


def rows(data, opened, task, decoded):
    """Some rows of a tensor are those of the whole."""
    name = data.draw(st.sampled_from(sorted(n for n in decoded if decoded[n].ndim)), "tensor")
    stop = data.draw(st.integers(0, len(decoded[name])), "stop")
    start = data.draw(st.integers(0, stop), "start")
    assert same(opened.decode_rows(task, name, start, stop), decoded[name][start:stop])


SIDE_FILES = st.dictionaries(
    st.sampled_from(["config.json", "vocab.txt", "LICENSE", "merges.model"]),
    st.binary(max_size=40) | st.binary(max_size=9).map(lambda b: 99 * b),
    max_size=3,
)


@given(families(), st.data())
def test_a_folder_comes_back(folder, family, data):
    """As checkpoints in folders: their metadata and small files, too."""
    pytest.importorskip("torch")
    base, tasks = family
    root, paths, metadata, files = folder / "example", {}, {}, {}
    shutil.rmtree(root, ignore_errors=True)
    for number, (name, state) in enumerate([(None, base), *tasks.items()]):
        paths[name] = root / f"folder{number}"
        paths[name].mkdir(parents=True)
        metadata[name] = data.draw(st.dictionaries(TEXT, TEXT, max_size=2), "metadata")
        files[name] = data.draw(SIDE_FILES, "files")
        write_safetensors(paths[name] / "model.safetensors", state, metadata[name])
        for file, content in files[name].items():
            (paths[name] / file).write_bytes(content)
    path = root / "a.tall"
    coding = data.draw(st.sampled_from(["raw", "entropy", "auto"]))
    tallcodec.encode(paths.pop(None), paths, path, coding=coding)
    with tallcodec.open(path, "np") as opened:
        for name, state in [(None, base), *tasks.items()]:
            assert (opened.metadata(name), opened.files(name)) == (metadata[name], files[name])
            opened.save(name, root / "saved", overwrite=True)
            for file, content in files[name].items():
                assert (root / "saved" / file).read_bytes() == content
            with tallcodec.checkpoint.open_checkpoint(root / "saved") as saved:
                decoded = opened.decode(name)
                assert saved.tensors.keys() == state.keys()
                for tensor, found in saved.tensors.items():
                    assert found.read().tobytes() == decoded[tensor].tobytes()
