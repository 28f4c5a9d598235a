"""Tasks proved against the checkpoints that they were encoded from."""

import numpy as np
import pytest

import tallcodec
from editor import Editor
from helpers import awkward, small_family
from tallcodec import cli
from tallcodec.errors import BaseMismatchError, TaskMismatchError, TaskNotFoundError

WAYS = {
    "masks": {},
    "published": {"threshold": 0.4, "scale": "none", "shared_dtype": "bfloat16"},
    "int8 by row": {"shared_dtype": "int8", "scale": "unit-gain-row"},
    "ternary": {"method": "ternary", "bits": 0.3},
    "TIES, coded": {"merge": "ties", "coding": "entropy"},
    "magnitude": {"method": "magnitude", "base_storage": "reference"},
}


def provable():
    """An awkward family without what is finite and decodes to infinity."""
    base, tasks, _ = awkward(3)

    def keep(state):
        return {name: a for name, a in state.items() if not name.endswith((".huge", ".narrowed"))}

    return keep(base), {task: keep(state) for task, state in tasks.items()}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def made(request, encode):
    base, tasks = provable()
    path = encode(base, tasks, **request.param)
    return path, base if "base_storage" in request.param else None, tasks


def test_every_task_is_what_was_encoded(made):
    path, base, tasks = made
    found = tallcodec.verify(path, base, tasks=tasks)
    assert found.proved == len(tasks) and f"{len(tasks)} tasks proved by what" in str(found)
    assert tallcodec.verify(path, base).proved == 0


def changed(state, name, by):
    array = state[name].copy()
    array.reshape(-1)[0] += array.dtype.type(by)
    return {**state, name: array}


@pytest.mark.parametrize("change, message", [
    (lambda s: changed(s, "layer.float32.7x33", 0.01), "layer.float32.7x33.*was not encoded from"),
    (lambda s: changed(s, "head.weight", 1), "head.weight.*other values"),
    (lambda s: {k: v for k, v in s.items() if k != "head.weight"}, "head.weight.*only the file"),
    (lambda s: {**s, "new": np.zeros(2, np.float32)}, "'new'.*only state dict has it"),
    (lambda s: {**s, "layer.float32.7x33": s["layer.float32.7x33"].T.copy()}, r"\(7, 33\)"),
])  # fmt: skip
def test_another_checkpoint_is_found_out(made, change, message):
    path, base, tasks = made
    with pytest.raises(TaskMismatchError, match=message):
        tallcodec.verify(path, base, tasks={"cars": change(tasks["cars"])})


def test_what_a_file_says_of_itself_is_not_believed(encode, tmp_path):
    """Another scale, and so another gain, than the statistics tell of; all checksums right."""
    base, tasks = provable()
    editor = Editor(encode(base, tasks).read_bytes())
    editor.entry("cars", "layer.float32.7x33", scale=lambda scale: 1.5 * scale)
    (tmp_path / "edited.tall").write_bytes(editor.finish())
    tallcodec.verify(tmp_path / "edited.tall")
    with pytest.raises(TaskMismatchError, match="it decodes with ‖τ̂‖ of"):
        tallcodec.verify(tmp_path / "edited.tall", tasks={"cars": tasks["cars"]})


@pytest.mark.parametrize("fields, message", [
    ({"scale": np.nan}, "decodes to values that float32 has no number for"),
    ({"scale": np.inf}, "decodes to values that float32 has no number for"),
    ({"scale": 100, "approx_sq": np.inf}, "decodes with ‖τ̂‖ of"),
    ({"scale": lambda scale: -scale}, "decodes with ‖τ̂ − τ‖ of"),
    ({"approx_sq": -1}, "statistics of it mean nothing"), ({"dot": np.nan}, "mean nothing"),
    ({"tau_sq": -1}, "not encoded from"), ({"tau_sq": np.nan}, "not encoded from"),
    ({"tau_sq": 0}, "not encoded from"), ({"dot": 0}, "decodes with ‖τ̂ − τ‖ of"),
])  # fmt: skip
def test_statistics_that_are_no_numbers_prove_nothing(encode, tmp_path, fields, message):
    base, tasks = provable()
    editor = Editor(encode(base, tasks).read_bytes())
    editor.entry("cars", "layer.float32.7x33", **fields)
    (tmp_path / "edited.tall").write_bytes(editor.finish())
    with pytest.raises(TaskMismatchError, match=message):
        tallcodec.verify(tmp_path / "edited.tall", tasks={"cars": tasks["cars"]})


def test_what_decodes_to_infinity_is_not_what_was_encoded(encode):
    base, tasks, _ = awkward(3)
    with pytest.raises(TaskMismatchError, match=r"edge.bfloat16.huge': .* bfloat16 has no number"):
        tallcodec.verify(encode(base, tasks), tasks={"cars": tasks["cars"]})
    base = np.full(4096, 65000, np.float16)
    random = np.random.default_rng(0)
    lower = base - 2000 * random.random(4096)
    higher = (base + 500 * random.random(4096)).clip(None, 65504)
    tasks = {"a": {"w": lower.astype(np.float16)}, "b": {"w": higher.astype(np.float16)}}
    path = encode({"w": base}, tasks)
    with tallcodec.open(path, "np") as file:
        whole = [task for task in tasks if np.isfinite(file.decode(task)["w"]).all()]
        assert len(whole) == 1
    tallcodec.verify(path, tasks={whole[0]: tasks[whole[0]]})
    with pytest.raises(TaskMismatchError, match="float16 has no number for"):
        tallcodec.verify(path, tasks=tasks)


def test_a_task_that_comes_back_whole_has_its_own_gain(encode, tmp_path):
    base, tasks = small_family(("cars",))
    editor = Editor(encode(base, tasks, threshold=0).read_bytes())
    assert tallcodec.verify(encode(base, tasks, threshold=0), tasks=tasks).proved == 1
    editor.entry("cars", "a.weight", dot=lambda dot: 10 * dot)
    (tmp_path / "edited.tall").write_bytes(editor.finish())
    with pytest.raises(TaskMismatchError, match="decodes with Σ τ·τ̂ of"):
        tallcodec.verify(tmp_path / "edited.tall", tasks=tasks)


def test_arguments(encode):
    base, tasks, _ = awkward(3)
    path = encode(base, tasks, base_storage="reference")
    with pytest.raises(TaskNotFoundError):
        tallcodec.verify(path, base, tasks={"boats": tasks["cars"]})
    with pytest.raises(BaseMismatchError, match="none was given"):
        tallcodec.verify(path, tasks={"cars": tasks["cars"]})


def test_the_command(checkpoints, encode, capsys):
    path = encode(checkpoints / "base.safetensors", {"cars": checkpoints / "cars.safetensors",
                                                     "dtd": checkpoints / "dtd"})  # fmt: skip
    right = ["--task", f"cars={checkpoints / 'cars.safetensors'}", "--task",
             f"dtd={checkpoints / 'dtd'}"]  # fmt: skip
    assert cli.main(["verify", str(path), *right]) == 0
    assert "2 tasks proved by what it says" in capsys.readouterr().out
    assert cli.main(["verify", str(path), "--task", f"cars={checkpoints / 'dtd'}"]) == 1
    assert "task 'cars'" in capsys.readouterr().err
