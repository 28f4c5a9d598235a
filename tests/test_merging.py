"""Merged models against what anyone would write in PyTorch."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

import tallcodec
from helpers import (
    awkward,
    normal,
    numpy_state,
    small_family,
    torch_bytes,
    torch_state,
    write_safetensors,
)
from tallcodec import errors, merging
from tallcodec.cli import main

torch = pytest.importorskip("torch")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def coded(base, task):
    """Whether a task's tensor is merged: floats, finite, of the base's shape, not equal to it."""
    if task is None or task.shape != base.shape or not base.numel():
        return False
    if base.dtype not in FLOATS or task.dtype not in FLOATS:
        return False
    if not base.float().isfinite().all() or not task.float().isfinite().all():
        return False
    return base.dtype != task.dtype or torch_bytes(base) != torch_bytes(task)


def plain_merge(base, tasks, thresholds, min_tasks, scale):
    """θ₀ + α·s where at least `min_tasks` masks are set (0: everywhere), s the sum in float32."""
    merged = {}
    for name, b in base.items():
        there = {task: state[name].float() for task, state in tasks.items()
                 if coded(b, state.get(name))}
        merged[name] = b
        if not there:
            continue
        s = torch.zeros(b.shape)
        for t in there.values():
            s = s + (t - b.float())
        s = torch.where(s.isfinite(), s, 0)
        active = torch.zeros(b.shape, dtype=torch.int64)
        for task, t in there.items():
            rule = (b.float() - t).abs() > np.float32(thresholds[task]) * (b.float() + s - t).abs()
            active += rule & (s != 0)
        change = b.float() + torch.tensor(scale, dtype=torch.float32) * s
        merged[name] = torch.where(active >= min_tasks, change, b.float()).to(b.dtype)
    return merged


def assert_equal(found, expected):
    found, expected = numpy_state(found), numpy_state(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("storage", ["embed", "reference"])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_consensus_and_task_arithmetic_of_an_awkward_family(encode, tasks, storage):
    base, states, thresholds = awkward(tasks=tasks, big=tasks == 2)
    path = encode(base, states, threshold=thresholds, base_storage=storage, shared_dtype="float32")
    given = base if storage == "reference" else None
    base, states = torch_state(base), {name: torch_state(s) for name, s in states.items()}
    for min_tasks, scale in {(1, 1.0), (tasks, 0.3), ((tasks + 1) // 2, -0.7)}:
        found = tallcodec.merge(path, min_tasks=min_tasks, scale=scale, base=given)
        assert_equal(found, plain_merge(base, states, thresholds, min_tasks, scale))
        assert found.info.vector == "task-arithmetic" and found.info.min_tasks == min_tasks
    found = tallcodec.merge(path, method="task-arithmetic", scale=0.3, base=given, threads=2)
    assert_equal(found, plain_merge(base, states, thresholds, 0, 0.3))
    if storage == "reference":
        with pytest.raises(errors.BaseMismatchError):
            tallcodec.merge(path, min_tasks=1)


@pytest.mark.parametrize("shared_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_vector_that_is_stored_is_the_one_that_is_used(encode, dtype, shared_dtype):
    base, tasks = small_family(("a", "b", "c"), dtype=dtype)
    path = encode(base, tasks, shared_dtype=shared_dtype, scale="unit-gain")
    merged = tallcodec.merge(path, min_tasks=2, scale=0.6, framework="np")
    file = tallcodec.reference.read(path.read_bytes())
    for tensor in file.tensors:
        planes = [np.frombuffer(file._bytes(file.entry(task, tensor.name)[1].plane), np.uint8)
                  for task in tasks]
        s, b = file.shared(tensor), base[tensor.name].astype(np.float32).ravel()
        masks = [np.unpackbits(p, count=s.size, bitorder="little").astype(bool) for p in planes]
        active = tallcodec.reference.formulas.consensus(masks, 2)
        expected = np.where(active, b + np.float32(0.6) * s, b).astype(dtype)
        assert merged[tensor.name].tobytes() == expected.tobytes()


def test_a_task_that_is_verbatim_somewhere_is_left_out_there_and_reported(encode):
    base, tasks = small_family(("a", "b"))
    base["head"] = normal(3)
    tasks["a"]["a.weight"][0, 0] = np.nan
    tasks["a"]["head"], tasks["b"]["head"] = normal(4), normal(5)
    tasks["b"]["extra"] = normal(2)
    merged = tallcodec.merge(encode(base, tasks), method="task-arithmetic", framework="np")
    info = merged.info
    assert (info.kept, info.partly, info.dropped) == (["head"], {"a.weight": ["a"]}, ["extra"])
    assert merged["head"].tobytes() == base["head"].tobytes() and "extra" not in merged
    expected = base["a.weight"] + (tasks["b"]["a.weight"] - base["a.weight"])
    assert merged["a.weight"].tobytes() == expected.tobytes()


def test_outputs_are_those_of_save(encode, tmp_path, checkpoints):
    from safetensors.numpy import load_file

    path = tmp_path / "vision.tall"
    (checkpoints / "folder").mkdir()
    (checkpoints / "folder" / "config.json").write_text("{}")
    base, _ = small_family()
    write_safetensors(checkpoints / "folder" / "model.safetensors", base, {"made by": "a test"})
    tasks = {"cars": checkpoints / "cars.safetensors", "dtd": checkpoints / "dtd"}
    tallcodec.encode(checkpoints / "folder", tasks, path)
    expected = tallcodec.merge(path, framework="np", scale=0.3)
    info = tallcodec.merge(path, tmp_path / "merged", scale=0.3)
    assert info.scale == 0.3 and len(info.written) == 2
    assert (tmp_path / "merged" / "config.json").read_text() == "{}"
    for output in ("merged/model.safetensors", "one.safetensors", "one.pt"):
        if output.startswith("one"):
            tallcodec.merge(path, tmp_path / output, scale=0.3)
        found = torch.load(tmp_path / output) if output == "one.pt" else load_file(
            tmp_path / output)
        for name, array in expected.items():
            assert np.asarray(found[name]).tobytes() == array.tobytes()
    with pytest.raises(errors.OutputExistsError):
        tallcodec.merge(path, tmp_path / "one.pt")
    with pytest.raises(errors.ArgumentError):
        tallcodec.merge(path, path, overwrite=True)
    tallcodec.merge(path, tmp_path / "one.pt", overwrite=True)


def test_score_chooses_the_scale_in_one_state_dict(small_file, tmp_path):
    seen = []

    def score(state):
        seen.append((id(state), {name: t.data_ptr() for name, t in state.items()},
                     {name: t.clone() for name, t in state.items()}))
        return [0, 1, 5, 3, 5, 5, 0, 0, 0, 0][len(seen) - 1]

    merged = tallcodec.merge(small_file, score=score, min_tasks=1)
    assert merged.info.scale == 0.3
    assert list(merged.info.scores) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert len({(s[0], tuple(s[1].values())) for s in seen}) == 1
    for (_, _, state), scale in zip(seen, merged.info.scores):
        assert_equal(state, tallcodec.merge(small_file, min_tasks=1, scale=scale))
    assert_equal(merged, seen[2][2])

    def smallest(state):
        return -float(state["a.bias"].norm())

    info = tallcodec.merge(small_file, tmp_path / "m.safetensors", score=smallest, grid=[2, 1e-9])
    assert info.scale == min(info.scores, key=lambda scale: -info.scores[scale])


def test_out_is_filled_in_place(small_file, tmp_path):
    model = torch_state(small_family()[0]) | {"head": torch.zeros(3)}
    del model["a.bias"]

    def score(state):
        assert all(state[name] is model[name] for name in ("a.weight", "b.weight"))
        return -float(state["a.weight"].norm())

    expected = tallcodec.merge(small_file, scale=0.2)
    merged = tallcodec.merge(small_file, score=score, grid=[0.2, 0.3], out=model)
    assert_equal(merged, tallcodec.merge(small_file, scale=merged.info.scale))
    assert merged["a.weight"] is model["a.weight"] and not model["head"].any()
    tallcodec.merge(small_file, tmp_path / "m.pt", score=score, out=model)
    merged = tallcodec.merge(small_file, scale=0.2, out=model)
    assert merged["b.weight"] is model["b.weight"]
    assert_equal(merged, expected)
    with pytest.raises(errors.TensorMismatchError, match="a.weight"):
        tallcodec.merge(small_file, out={"a.weight": torch.zeros(2)})


@pytest.mark.parametrize("value", [float("nan"), "good", None])
def test_scores_that_are_no_numbers(small_file, tmp_path, value):
    with pytest.raises(errors.ArgumentError, match=r"scale 0\.1 gave"):
        tallcodec.merge(small_file, tmp_path / "m.safetensors", score=lambda state: value)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_score_that_raises_leaves_nothing(small_file, tmp_path):
    def score(state):
        raise ZeroDivisionError("of the user's own")

    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ZeroDivisionError):
        tallcodec.merge(small_file, tmp_path / "m.safetensors", score=score)
    with pytest.raises(ZeroDivisionError):
        merging.consensus(*small_family(), tmp_path / "m.safetensors", score=score)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("arguments, message", [
    ({"method": "fisher"}, "method must be one of 'consensus', 'task-arithmetic'"),
    ({"method": "ties"}, "of 'task-arithmetic'; use that, or 'consensus'"),
    ({"method": "average"}, "cannot be merged by 'average'"),
    ({"min_tasks": 0}, "at least 1"), ({"min_tasks": 1.5}, "whole number"),
    ({"min_tasks": 3}, "has 2 tasks"), ({"min_tasks": True}, "whole number"),
    ({"scale": float("nan")}, "finite"), ({"scale": 1e39}, "finite"), ({"scale": "1"}, "finite"),
    ({"score": 3}, "function"), ({"score": len, "scale": 1.0}, "exclude"),
    ({"out": {}}, "out is for a score"), ({"score": len, "out": [1]}, "out must map"),
    ({"score": len, "grid": []}, "empty"), ({"score": len, "grid": [float("inf")]}, "finite"),
])  # fmt: skip
def test_bad_arguments(small_file, tmp_path, arguments, message):
    with pytest.raises(errors.ArgumentError, match=message):
        tallcodec.merge(small_file, tmp_path / "m.safetensors", **arguments)
    assert not (tmp_path / "m.safetensors").exists()


def test_damage_is_found(small_file):
    data = bytearray(small_file.read_bytes())
    with tallcodec.open(small_file) as file:
        offset = next(p[2] for p in file._file.planes() if p[0] == 3)
    data[offset] ^= 1
    small_file.write_bytes(data)
    with pytest.raises(errors.ChecksumError, match="mask of tensor"):
        tallcodec.merge(small_file)


def test_ties_and_average_files_say_what_they_hold(encode):
    base, tasks = small_family(("a", "b", "c"))
    for vector in ("ties", "average"):
        path = encode(base, tasks, merge=vector)
        assert tallcodec.merge(path, method="consensus").info.vector == vector
        assert tallcodec.merge(path, method=vector).info.min_tasks is None
        with pytest.raises(errors.ArgumentError, match=f"of '{vector}'"):
            tallcodec.merge(path, method="task-arithmetic")


def plain_ties(base, tasks, density, scale):
    """As the paper's code has it, over the flat vectors of all tensors, with a disjoint sum."""
    flat = torch.cat([base[name].reshape(-1) for name in sorted(base)])
    taus = torch.stack([torch.cat([t[n].reshape(-1) for n in sorted(base)]) - flat for t in tasks])
    kept = int(flat.numel() * density)
    if kept < flat.numel():
        cut = taus.abs().kthvalue(flat.numel() - kept, dim=1, keepdim=True).values
        taus = torch.where(taus.abs() >= cut, taus, 0)
    total = torch.zeros_like(flat)
    for tau in taus:
        total = total + tau
    sign = total.sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = torch.zeros_like(flat)
    for tau in taus:
        agreeing = agreeing + torch.where(torch.where(sign > 0, tau > 0, tau < 0), tau, 0)
    merged, first = {}, 0
    for name in sorted(base):
        part = agreeing[first : first + base[name].numel()].view(base[name].shape)
        merged[name] = base[name] + torch.tensor(scale, dtype=torch.float32) * part
        first += base[name].numel()
    return merged


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_merging_checkpoints(tmp_path, tasks):
    base, states = small_family("abcd"[:tasks])
    base, states = torch_state(base), {name: torch_state(s) for name, s in states.items()}
    thresholds = dict.fromkeys(states, 0.4)
    least = min(tasks, 2)
    found = merging.consensus(base, states, min_tasks=least, scale=0.4)
    assert_equal(found, plain_merge(base, states, thresholds, least, 0.4))
    found = merging.task_arithmetic(base, states, scale=0.4)
    assert_equal(found, plain_merge(base, states, thresholds, 0, 0.4))
    mean = {name: b + torch.tensor(0.5) * (sum(s[name] - b for s in states.values()) / tasks)
            for name, b in base.items()}  # fmt: skip
    assert_equal(merging.average(base, states, scale=0.5), mean)
    assert_equal(merging.ties(base, states, scale=0.7), plain_ties(base, states.values(), 0.2, 0.7))
    found = merging.consensus(base, states, merge="ties", density=0.5, min_tasks=1)
    assert found.info.vector == "ties"

    info = merging.task_arithmetic(base, states, tmp_path / "m.safetensors", scale=0.4)
    assert os.listdir(tmp_path) == ["m.safetensors"] and info.vector == "task-arithmetic"
    with pytest.raises(errors.OutputExistsError):
        merging.average(base, states, tmp_path / "m.safetensors")
    with pytest.raises(errors.WriteError):
        merging.average(base, states, tmp_path / "missing" / "m.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_the_command(capsys, small_file, tmp_path):
    output = str(tmp_path / "m.safetensors")
    arguments = ["merge", str(small_file), "-o", output, "--method", "consensus"]
    assert main([*arguments, "--min-tasks", "1", "--scale", "0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == [output]
    assert (found["vector"], found["scale"]) == ("task-arithmetic", 0.3)
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--method", "ties"]) == 1
    assert "task-arithmetic" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert capsys.readouterr().out.startswith(output)
