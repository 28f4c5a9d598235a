"""Open files: what they say, what they decode, into what, and when they are closed."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import tallcodec
from helpers import (
    BF16,
    assert_same,
    awkward,
    normal,
    numpy_state,
    same,
    small_family,
    to_numpy,
    torch_state,
    write_safetensors,
)
from tallcodec import errors
from tallcodec import reference as ref

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


# What a file says.


def test_tasks_are_in_their_order_and_tensors_sorted(encode):
    base, tasks = small_family(("zebra", "ant", "cow"))
    tasks["ant"]["extra"] = normal(3)
    with tallcodec.open(encode(base, tasks)) as file:
        assert file.tasks == ["zebra", "ant", "cow"]
        assert file.tensors == ["a.bias", "a.weight", "b.weight", "extra"]
        assert "zebra" in repr(file)


def test_encode_returns_the_info_of_the_file(tmp_path):
    path = tmp_path / "x.tall"
    info = tallcodec.encode(*small_family(), path, metadata={"by": "me"})
    with tallcodec.open(path) as file:
        assert file.info == info
    assert info.path == str(path) and info.metadata == {"by": "me"}
    assert info.writer == f"tallcodec {tallcodec.__version__}"


def test_info_counts_bytes(encode):
    path = encode(*small_family(), scale="unit-gain-row", shared_dtype="bfloat16")
    with tallcodec.open(path) as file:
        info = file.info
    n, masks, rows = 240 + 40 + 645, 30 + 5 + 81, 6 + 1 + 5
    assert info.bytes == path.stat().st_size == sum(info.planes.values()) + info.overhead
    assert info.planes == {"base": 4 * n, "shared": 2 * n, "mask": 2 * masks, "scales": 8 * rows}
    assert (info.base_parameters, info.base_bytes, info.tensors) == (n, 4 * n, 3)
    assert info.models == info.bytes / (4 * n)
    for task in info.tasks:
        assert task.bytes == masks + 4 * rows
        assert task.bits == 8 * task.bytes / n
        assert task.parameters == task.coded_parameters == n


@pytest.mark.parametrize("scale", ["none", "unit-gain", "unit-gain-row"])
def test_info_measures_the_task_vectors(encode, scale):
    base, tasks = small_family(("cars", "dtd", "mnist"))
    path = encode(base, tasks, scale=scale, threshold=0.7)
    reference = ref.read(path.read_bytes())
    with tallcodec.open(path, "np") as file:
        for info in file.info.tasks:
            task, decoded = tasks[info.name], file.decode(info.name)
            tau = np.concatenate([(task[n] - base[n]).ravel() for n in base]).astype(float)
            approx = np.concatenate([(decoded[n] - base[n]).ravel() for n in base]).astype(float)
            assert info.gain == pytest.approx(approx @ tau / (tau @ tau), abs=1e-5)
            error = np.linalg.norm(approx - tau) / np.linalg.norm(tau)
            assert info.error == pytest.approx(error, abs=1e-5)
            bits = sum(reference.entry(info.name, n)[1].set_bits for n in base)
            assert info.density == bits / tau.size
            assert info.density == pytest.approx(np.count_nonzero(approx) / tau.size, abs=1e-2)
            assert 0 < info.density <= info.published_density < 1
            assert (info.threshold, info.method) == (0.7, "tall")


def test_info_counts_only_what_is_coded(encode):
    base = {"w": normal((8, 8)), "same": normal(10), "ids": np.arange(5)}
    task = {"w": base["w"] + 1, "same": base["same"], "ids": np.arange(5) + 1, "head": normal(7)}
    with tallcodec.open(encode(base, {"a": task})) as file:
        (info,) = file.info.tasks
    assert (info.parameters, info.coded_parameters) == (64 + 10 + 5 + 7, 64)
    assert {kind: n for kind, n in info.tensors.items() if n} == {
        "as the base": 1, "mask": 1, "verbatim": 2}  # fmt: skip
    assert [(v.name, v.dtype, v.shape) for v in info.verbatim] == [
        ("head", "F32", (7,)), ("ids", "I64", (5,))]  # fmt: skip
    assert info.density == 1 and info.gain == pytest.approx(1) and info.error < 1e-6


def test_info_of_a_task_with_nothing_coded(encode):
    base = {"w": normal(5)}
    with tallcodec.open(encode(base, {"a": base, "b": {"w": base["w"] + 1}})) as file:
        info = file.info.tasks[0]
    assert math.isnan(info.gain) and math.isnan(info.density) and info.bits == 0


def test_info_as_text_and_as_dict(small_file):
    with tallcodec.open(small_file) as file:
        info = file.info
    assert "cars" in str(info) and "dtd" in str(info) and str(small_file) in str(info)
    assert json.loads(json.dumps(info.to_dict()))["tasks"][0]["name"] == "cars"


# Decoding.


@pytest.mark.parametrize("framework", ["pt", "torch", "np", "numpy"])
def test_every_tensor_of_an_awkward_family(encode, framework):
    base, tasks, thresholds = awkward(5)
    path = encode(base, tasks, threshold=thresholds)
    reference = ref.read(path.read_bytes())
    with tallcodec.open(path, framework) as file:
        for task in tasks:
            decoded = file.decode(task)
            if framework in ("pt", "torch"):
                assert all(isinstance(t, torch.Tensor) for t in decoded.values())
                decoded = numpy_state(decoded)
            assert_same(decoded, reference.task_state(task))


def test_decoding_a_task_alone_reads_no_other_tasks_planes(small_file):
    """Every plane of dtd is destroyed: cars is not affected."""
    with tallcodec.open(small_file, "np") as file:
        expected = file.decode("cars")
        core = file._core
        mine = {r for i in range(3) for r in core.ranges(0, i)}
        others = {r for i in range(3) for r in core.ranges(1, i)} - mine
    assert others
    data = bytearray(small_file.read_bytes())
    for offset, size in others:
        data[offset : offset + size] = bytes(size)
    small_file.write_bytes(data)
    with tallcodec.open(small_file, "np") as file:
        assert_same(file.decode("cars"), expected)
        with pytest.raises(errors.ChecksumError):
            file.decode("dtd")


def test_decode_a_subset(small_file):
    with tallcodec.open(small_file, "np") as file:
        whole = file.decode("cars")
        part = file.decode("cars", tensors=["b.weight", "a.bias"])
        assert list(part) == ["b.weight", "a.bias"]
        assert_same(part, {name: whole[name] for name in part})
        assert file.decode("cars", tensors=iter(["a.bias", "a.bias"])).keys() == {"a.bias"}
        assert file.decode("cars", tensors=[]) == {}


def test_task_none_is_the_base(encode):
    base, tasks = small_family()
    with tallcodec.open(encode(base, tasks), "np") as file:
        assert_same(file.decode(None), base)
        assert_same(dict(file.state_dict(None)), base)


def test_decoded_memory_is_the_callers_own(small_file):
    with tallcodec.open(small_file, "np") as file:
        first = file.decode("cars")
        expected = first["a.bias"].copy()
        first["a.bias"][:] = 0
        assert same(file.decode("cars")["a.bias"], expected)
    first["a.weight"][:] = 0  # still there, and writable, after the file was closed


def test_threads_and_verify_change_nothing(small_file):
    states = []
    for options in ({"threads": 1}, {"threads": 3}, {"verify": False}):
        with tallcodec.open(small_file, "np", **options) as file:
            states.append(file.decode("dtd"))
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


# Into the caller's memory.


def test_out_into_torch_and_numpy(small_file):
    with tallcodec.open(small_file, "np") as file:
        expected = file.decode("cars")
        out = {"a.weight": torch.full((6, 40), 7.0), "b.weight": np.full((5, 129), 7, np.float32)}
        result = file.decode("cars", out=out)
    assert result["a.weight"] is out["a.weight"] and result["b.weight"] is out["b.weight"]
    assert same(to_numpy(out["a.weight"]), expected["a.weight"])
    assert same(out["b.weight"], expected["b.weight"])
    assert same(result["a.bias"], expected["a.bias"])


def test_out_into_a_slice_leaves_its_neighbours(small_file):
    memory = torch.full((8, 40), 7.0)
    with tallcodec.open(small_file) as file:
        file.decode("cars", ["a.weight"], out={"a.weight": memory[1:7]})
        assert memory[1:7].equal(file.decode("cars")["a.weight"])
    assert (memory[0] == 7).all() and (memory[7] == 7).all()


def test_out_into_parameters_of_a_model(small_file):
    linear = torch.nn.Linear(40, 6)
    out = {"a.weight": linear.weight}
    with tallcodec.open(small_file) as file:
        file.decode("cars", ["a.weight"], out=out)
        assert linear.weight.detach().equal(file.decode("cars")["a.weight"])


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("wrong", [
    pytest.param(lambda: torch.zeros(6, 40, dtype=torch.bfloat16), id="dtype, torch"),
    pytest.param(lambda: np.zeros((6, 40), np.float64), id="dtype, numpy"),
    pytest.param(lambda: np.zeros((6, 40), np.int32), id="dtype of the same size"),
    pytest.param(lambda: torch.zeros(40, 6), id="shape"),
    pytest.param(lambda: np.zeros(240, np.float32), id="flat"),
    pytest.param(lambda: torch.zeros(40, 6).T, id="not contiguous, torch"),
    pytest.param(lambda: np.zeros((40, 6), np.float32).T, id="not contiguous, numpy"),
    pytest.param(lambda: np.zeros((6, 80), np.float32)[:, ::2], id="strided"),
    pytest.param(lambda: read_only(np.zeros((6, 40), np.float32)), id="read-only"),
    pytest.param(lambda: np.zeros((6, 40), ">f4"), id="big endian"),
    pytest.param(lambda: torch.zeros(6, 40, device="meta"), id="meta"),
    pytest.param(lambda: torch.zeros(6, 40).to_sparse(), id="sparse"),
    pytest.param(lambda: [[0.0] * 40] * 6, id="list"),
])  # fmt: skip
def test_out_that_does_not_fit_is_refused_before_anything_is_written(small_file, wrong):
    good = np.full(40, 7, np.float32)
    out = {"a.bias": good, "a.weight": wrong()}
    with tallcodec.open(small_file) as file:
        with pytest.raises(errors.TensorMismatchError, match="a.weight"):
            file.decode("cars", ["a.bias", "a.weight"], out)
    assert (good == 7).all()


def test_out_of_an_unknown_name_is_refused(small_file):
    good = np.full(40, 7, np.float32)
    with tallcodec.open(small_file) as file:
        with pytest.raises(errors.TensorNotFoundError, match="nonsense"):
            file.decode("cars", out={"a.bias": good, "nonsense": np.zeros(3)})
        with pytest.raises(errors.TensorNotFoundError, match="a.weight"):
            file.decode("cars", ["a.bias"], out={"a.bias": good, "a.weight": np.zeros((6, 40))})
    assert (good == 7).all()


def test_out_for_tied_tensors(encode):
    w = normal((3, 5))
    path = encode({"x": w, "y": w}, {"a": {"x": w + 1, "y": w + 1}})
    out = {"x": np.zeros((3, 5), np.float32), "y": np.zeros((3, 5), np.float32)}
    with tallcodec.open(path, "np") as file:
        file.decode("a", out=out)
        assert same(out["x"], out["y"]) and same(out["x"], file.decode("a")["y"])
        mixed = file.decode("a", out={"y": out["y"]})
        assert mixed["y"] is out["y"] and same(mixed["x"], out["y"])


# Lazily, and into models.


def test_state_dict_is_lazy(small_file, monkeypatch):
    with tallcodec.open(small_file) as file:
        decoded = []
        original = file._decode
        monkeypatch.setattr(
            file, "_decode", lambda k, r, loaded: (decoded.append(len(r)), original(k, r, loaded))
        )
        state = file.state_dict("cars")
        assert isinstance(state, Mapping)
        assert list(state) == list(state.keys()) == ["a.bias", "a.weight", "b.weight"]
        assert len(state) == 3 and "a.bias" in state and "nonsense" not in state
        assert decoded == []
        assert state["a.bias"].equal(file.decode("cars", ["a.bias"])["a.bias"])
        assert decoded == [1, 1]
        with pytest.raises(KeyError, match="nonsense"):
            state["nonsense"]
        assert state.get("nonsense") is None


def test_state_dict_lacks_what_the_task_lacks(encode):
    base, tasks = small_family()
    del tasks["cars"]["a.bias"]
    with tallcodec.open(encode(base, tasks)) as file:
        state = file.state_dict("cars")
        assert list(state) == ["a.weight", "b.weight"]
        with pytest.raises(errors.TensorNotFoundError, match="a.bias"):
            state["a.bias"]


class Model(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm = torch.nn.Linear(9, 9), torch.nn.BatchNorm1d(9)
        self.head = torch.nn.Linear(9, 9, bias=False)
        self.head.weight = self.layer.weight


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_strict(encode, assign):
    base, task, model = Model(1), Model(2), Model(3)
    task.norm.num_batches_tracked += 7
    with tallcodec.open(encode(base.state_dict(), {"a": task.state_dict()})) as file:
        model.load_state_dict(file.state_dict("a"), strict=True, assign=assign)
        for name, tensor in file.decode("a").items():
            assert model.state_dict()[name].equal(tensor), name
    assert model.norm.num_batches_tracked == 7


@pytest.fixture(scope="module")
def bert():
    """(config, base, task): a tiny BERT with two different heads."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config)
    task = transformers.BertForSequenceClassification(config)
    return config, base, task


def test_transformers_from_pretrained_takes_the_state_dict(encode, bert):
    config, base, task = bert
    with tallcodec.open(encode(base.state_dict(), {"a": task.state_dict()})) as file:
        model = type(base).from_pretrained(None, config=config, state_dict=file.state_dict("a"))
        for name, tensor in file.decode("a").items():
            assert model.state_dict()[name].equal(tensor), name


@pytest.mark.parametrize("max_shard_size", [None, "10kB"])
def test_a_decoded_folder_loads_with_from_pretrained(tmp_path, bert, max_shard_size):
    _, base, task = bert
    base.save_pretrained(tmp_path / "base")
    task.save_pretrained(tmp_path / "task")
    tallcodec.encode(tmp_path / "base", {"a": tmp_path / "task"}, tmp_path / "x.tall")
    with tallcodec.open(tmp_path / "x.tall") as file:
        written = file.save("a", tmp_path / "decoded", max_shard_size=max_shard_size)
        model = type(base).from_pretrained(tmp_path / "decoded")
        for name, tensor in file.decode("a").items():
            assert model.state_dict()[name].equal(tensor), name
    assert sorted(map(Path, written)) == sorted((tmp_path / "decoded").iterdir())
    assert (len(list((tmp_path / "decoded").glob("*.safetensors"))) > 1) == bool(max_shard_size)
    config = (tmp_path / "task" / "config.json").read_bytes()
    assert (tmp_path / "decoded" / "config.json").read_bytes() == config


# Files again.


def test_metadata_and_files_are_restored(checkpoints, tmp_path):
    tasks = {"cars": checkpoints / "cars.safetensors", "dtd": checkpoints / "dtd"}
    path = tmp_path / "x.tall"
    tallcodec.encode(checkpoints / "base.safetensors", tasks, path, metadata={"k": "v\n✓"})
    with tallcodec.open(path) as file:
        assert file.info.metadata == {"k": "v\n✓"}
        assert file.metadata("cars") == {"made by": "a test"}
        assert file.metadata(None) == {} and file.files(None) == {} and file.files("cars") == {}
        assert file.files("dtd") == {
            n: (checkpoints / "dtd" / n).read_bytes() for n in ("config.json", "vocab.txt")}
        file.save("dtd", tmp_path / "dtd")
        file.save("cars", tmp_path / "cars.safetensors")
    assert {p.name for p in (tmp_path / "dtd").iterdir()} == {
        "model.safetensors", "config.json", "vocab.txt"}  # fmt: skip
    with pytest.importorskip("safetensors").safe_open(tmp_path / "cars.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "a test"}


def test_an_empty_side_file(tmp_path, checkpoints):
    (checkpoints / "dtd" / "merges.txt").touch()
    path = tmp_path / "x.tall"
    tallcodec.encode(checkpoints / "base.safetensors", {"dtd": checkpoints / "dtd"}, path)
    with tallcodec.open(path) as file:
        assert file.files("dtd")["merges.txt"] == b""


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin"])
def test_save_to_a_file(encode, tmp_path, name):
    base, tasks, thresholds = awkward(6)
    with tallcodec.open(encode(base, tasks, threshold=thresholds)) as file:
        assert file.save("cars", tmp_path / name) == [str(tmp_path / name)]
        expected = numpy_state(file.decode("cars"))
    if name.endswith(".safetensors"):
        found = pytest.importorskip("safetensors.torch").load_file(tmp_path / name)
    else:
        found = torch.load(tmp_path / name, weights_only=True)
    assert_same(numpy_state(found), expected)


def test_save_does_not_replace_unasked(small_file, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"mine")
    with tallcodec.open(small_file) as file:
        with pytest.raises(errors.OutputExistsError, match="x.safetensors"):
            file.save("cars", path)
        assert path.read_bytes() == b"mine"
        file.save("cars", path, overwrite=True)
    assert path.read_bytes() != b"mine"


def test_save_of_a_damaged_file_leaves_nothing(small_file, tmp_path):
    with tallcodec.open(small_file) as file:
        offset = file._core.ranges(0, 1)[-1][0]
    data = bytearray(small_file.read_bytes())
    data[offset] ^= 1
    small_file.write_bytes(data)
    for name in ("x.safetensors", "x.pt", "folder"):
        with tallcodec.open(small_file) as file, pytest.raises(errors.ChecksumError):
            file.save("cars", tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {small_file.name}


# A base that is only referenced.


@pytest.fixture
def referenced(encode):
    base, tasks = small_family()
    return encode(base, tasks, base_storage="reference"), base, tasks


def test_referenced_base_of_every_kind(referenced, encode, tmp_path):
    path, base, tasks = referenced
    write_safetensors(tmp_path / "base.safetensors", base)
    torch.save(torch_state(base), tmp_path / "base.pt")
    with tallcodec.open(encode(base, tasks), "np") as file:
        expected = file.decode("cars")
    for source in (base, torch_state(base), tmp_path / "base.safetensors", tmp_path / "base.pt"):
        with tallcodec.open(path, "np", source) as file:
            assert_same(file.decode("cars"), expected)
            assert_same(file.decode(None), base)
        assert tallcodec.verify(path, source).base_checked
    assert not tallcodec.verify(path).base_checked


def test_referenced_base_costs_no_bytes(referenced, encode):
    path, base, tasks = referenced
    with tallcodec.open(path) as file:
        info = file.info
    assert "base" not in info.planes and info.base_bytes == sum(a.nbytes for a in base.values())
    assert info.bytes < encode(base, tasks).stat().st_size
    assert info.models == (info.bytes + info.base_bytes) / info.base_bytes


def test_missing_base_is_asked_for(referenced):
    path, _, _ = referenced
    with tallcodec.open(path, "np") as file:
        with pytest.raises(errors.BaseMismatchError, match="only references its base"):
            file.decode("cars")


@pytest.mark.parametrize("wrong", [
    pytest.param(lambda w: w + 1, id="other values"),
    pytest.param(lambda w: np.concatenate([w[:-1], w[-1:] + 1]), id="another last row"),
    pytest.param(lambda w: w.astype(np.float16), id="another dtype"),
    pytest.param(lambda w: w.reshape(-1), id="another shape"),
    pytest.param(lambda w: None, id="lacks it"),
])  # fmt: skip
def test_wrong_base_is_refused_by_name(referenced, wrong):
    path, base, _ = referenced
    bad = {**base, "b.weight": wrong(base["b.weight"])}
    bad = {name: array for name, array in bad.items() if array is not None}
    with tallcodec.open(path, "np", bad) as file:
        with pytest.raises(errors.BaseMismatchError, match="b.weight"):
            file.decode("cars")
        file.decode("cars", ["a.weight"])  # what does not need it is decoded
    with pytest.raises(errors.BaseMismatchError, match="b.weight"):
        tallcodec.verify(path, bad)


def test_verbatim_tensors_need_no_base(encode):
    path = encode({"ids": np.arange(4)}, {"a": {"ids": np.arange(4) + 1}}, base_storage="reference")
    with tallcodec.open(path, "np") as file:
        assert file.decode("a")["ids"].tolist() == [1, 2, 3, 4]


# Closing, pickling, threads, no torch.


def test_closed_files_say_so(small_file):
    file = tallcodec.open(small_file)
    state = file.state_dict("cars")
    file.close()
    file.close()
    assert "closed" in repr(file)
    for use in (
        lambda: file.decode("cars"), lambda: file.info, lambda: file.tensors,
        lambda: file.files("cars"), lambda: file.metadata(), lambda: file.state_dict("cars"),
        lambda: state["a.bias"], lambda: file.save("cars", "x.safetensors"),
        lambda: pickle.dumps(file),
    ):  # fmt: skip
        with pytest.raises(errors.ClosedError, match=small_file.name):
            use()


def test_with_closes(small_file):
    with tallcodec.open(small_file) as file:
        pass
    with pytest.raises(errors.ClosedError):
        file.decode("cars")


def test_pickled(small_file):
    with tallcodec.open(small_file, "np", threads=1) as file:
        again = pickle.loads(pickle.dumps(file))
        with again:
            assert again.tasks == file.tasks
            assert_same(again.decode("cars"), file.decode("cars"))
        state = pickle.loads(pickle.dumps(file.state_dict("dtd")))
        assert_same(dict(state), file.decode("dtd"))


def test_pickled_by_an_absolute_path(small_file, monkeypatch):
    monkeypatch.chdir(small_file.parent)
    with tallcodec.open(small_file.name, "np") as file:
        pickled = pickle.dumps(file)
    monkeypatch.chdir("/")
    with pickle.loads(pickled) as file:
        assert file.tasks == ["cars", "dtd"]


def test_pickled_and_replaced(small_file, encode):
    with tallcodec.open(small_file) as file:
        pickled = pickle.dumps(file)
    os.replace(encode(*small_family(("other",))), small_file)
    with pytest.raises(errors.FormatError, match="replaced"):
        pickle.loads(pickled)


def test_many_threads_decode_one_file(encode):
    base, tasks, thresholds = awkward(7)
    path = encode(base, tasks, threshold=thresholds, base_storage="reference")
    expected = {task: ref.read(path.read_bytes(), base).task_state(task) for task in tasks}
    failures = []

    def work(file, task):
        try:
            for _ in range(3):
                assert_same(file.decode(task), expected[task])
        except BaseException as error:
            failures.append(error)

    with tallcodec.open(path, "np", base, threads=2) as file:
        threads = [threading.Thread(target=work, args=(file, t)) for t in (*tasks, *tasks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_closing_while_decoding_lets_that_finish(referenced, tmp_path):
    """The base is a file, which must stay open until the decoding that uses it has ended."""
    path, base, _ = referenced
    write_safetensors(tmp_path / "base.safetensors", base)
    file = tallcodec.open(path, "np", tmp_path / "base.safetensors")
    expected = file.decode("cars")
    core, original = file._core, file._base_tensor

    def find_then_close(number, tensor, base):
        found = original(number, tensor, base)
        if tensor == len(expected) - 1:  # all are found: the next step is the core's
            threading.Thread(target=file.close).start()
            while file._core is core:
                pass
        return found

    file._base_tensor = find_then_close
    assert_same(file.decode("cars"), expected)


NO_TORCH = """
import sys
sys.modules["torch"] = None
import tallcodec
tallcodec.encode("base.safetensors", {"cars": "cars.safetensors", "dtd": "dtd"}, "x.tall")
with tallcodec.open("x.tall", framework="np") as file:
    print(sorted((n, a.dtype.name) for n, a in file.decode("cars").items()))
    file.save("dtd", "again")
tallcodec.verify("x.tall")
try:
    tallcodec.open("x.tall")
except tallcodec.errors.ArgumentError as error:
    print(error)
assert sys.modules["torch"] is None
"""


def test_without_torch(checkpoints):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True,
                          cwd=checkpoints, env=env, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "('a.bias', 'float32')" in done.stdout and "PyTorch" in done.stdout
    assert (checkpoints / "again" / "config.json").exists()


def test_importing_does_not_import_torch():
    code = "import sys, tallcodec, tallcodec.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_bfloat16_without_and_with_torch(encode):
    base, tasks = small_family(dtype=BF16)
    path = encode(base, tasks)
    with tallcodec.open(path, "np") as file:
        arrays = file.decode("cars")
        assert all(a.dtype == BF16 for a in arrays.values())
    with tallcodec.open(path) as file:
        assert_same(numpy_state(file.decode("cars")), arrays)


def test_path_kinds(small_file):
    for path in (str(small_file), small_file):
        with tallcodec.open(path) as file:
            assert file.tasks == ["cars", "dtd"]


def test_file_names_that_are_no_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tall")
    tallcodec.encode(*small_family(), path)
    with tallcodec.open(path) as file:
        assert file.tasks == ["cars", "dtd"]
        with pytest.raises(errors.TaskNotFoundError, match="caf"):
            file.decode("nonsense")


def test_decoded_tensors_are_what_torch_saves(small_file):
    with tallcodec.open(small_file) as file:
        torch.save(file.decode("cars"), io.BytesIO())
