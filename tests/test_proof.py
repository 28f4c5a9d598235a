"""Tasks proved against the checkpoints that they were encoded from."""

import numpy as np
import pytest

import tallcodec
from editor import Editor
from helpers import awkward
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


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def made(request, encode):
    base, tasks, _ = awkward(3)
    path = encode(base, tasks, **request.param)
    return path, base if "base_storage" in request.param else None, tasks


def test_every_task_is_what_was_encoded(made):
    path, base, tasks = made
    found = tallcodec.verify(path, base, tasks=tasks)
    assert found.proved == len(tasks) and f"{len(tasks)} tasks decode to what" in str(found)
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
    base, tasks, _ = awkward(3)
    editor = Editor(encode(base, tasks).read_bytes())
    editor.entry("cars", "layer.float32.7x33", scale=lambda scale: 1.5 * scale)
    (tmp_path / "edited.tall").write_bytes(editor.finish())
    tallcodec.verify(tmp_path / "edited.tall")
    with pytest.raises(TaskMismatchError, match="it decodes with (error|gain)"):
        tallcodec.verify(tmp_path / "edited.tall", tasks={"cars": tasks["cars"]})


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
    assert "2 tasks decode to what it says" in capsys.readouterr().out
    assert cli.main(["verify", str(path), "--task", f"cars={checkpoints / 'dtd'}"]) == 1
    assert "task 'cars'" in capsys.readouterr().err
