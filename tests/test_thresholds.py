"""Choosing λ by a score: every task with every λ, in place, from one pass."""

import math

import numpy as np
import pytest
import torch

import tallcodec
from helpers import awkward, small_family, torch_bytes, torch_state
from tallcodec.errors import ArgumentError, OutputExistsError, TensorMismatchError

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


def distance(original, state):
    return sum(float((original[n].double() - t.double()).square().sum()) for n, t in state.items())


@pytest.fixture
def family():
    base, tasks = small_family(("cars", "dtd", "mnist"))
    return torch_state(base), {name: torch_state(t) for name, t in tasks.items()}


def test_the_highest_score_wins_and_is_kept(tmp_path, family):
    base, tasks = family
    path, seen = tmp_path / "a.tall", {}

    def score(task, state):
        value = -distance(tasks[task], state)
        seen.setdefault(task, []).append(value)
        return value

    info = tallcodec.encode(base, tasks, path, threshold="search", score=score)
    expected = {}
    for task in tasks:
        for value in GRID:
            tallcodec.encode(base, tasks, tmp_path / "b.tall", threshold=value, overwrite=True)
            with tallcodec.open(tmp_path / "b.tall") as file:
                expected.setdefault(task, []).append(-distance(tasks[task], file.decode(task)))
    assert seen == expected
    assert info.scores == {task: dict(zip(GRID, found)) for task, found in expected.items()}
    chosen = {task: GRID[int(np.argmax(found))] for task, found in expected.items()}
    assert {task.name: task.threshold for task in info.tasks} == chosen
    assert [p.name for p in tmp_path.iterdir() if p.name != "b.tall"] == ["a.tall"]

    tallcodec.encode(base, tasks, tmp_path / "b.tall", threshold=chosen, overwrite=True)
    with tallcodec.open(path) as a, tallcodec.open(tmp_path / "b.tall") as b:
        assert a.info.scores == info.scores and not b.info.scores and not a.info.metadata
        assert "scores by λ: cars" in str(a.info)
        for task in tasks:
            x, y = a.decode(task), b.decode(task)
            assert all(torch.equal(x[name], y[name]) for name in y)


def test_ties_go_to_the_smallest(tmp_path, family):
    info = tallcodec.encode(*family, tmp_path / "a.tall", threshold="search",
                            score=lambda task, state: 1, grid=[0.5, 0.3, 0.5])  # fmt: skip
    assert [task.threshold for task in info.tasks] == [0.3] * 3
    assert info.scores["cars"] == {0.3: 1, 0.5: 1}


def test_the_model_is_filled_in_place(tmp_path, family):
    base, tasks = family
    model = {name: torch.full_like(tensor, math.nan) for name, tensor in base.items()}
    model["head"] = torch.zeros(3)
    before = {name: tensor.data_ptr() for name, tensor in model.items()}
    del model["a.bias"]
    addresses = []

    def score(task, state):
        assert all(state[name] is model[name] for name in model if name != "head")
        addresses.append((task, state["a.bias"].data_ptr()))
        return state["a.weight"].sum()  # a 0-d tensor is a number, too

    tallcodec.encode(base, tasks, tmp_path / "a.tall", threshold="search", score=score, out=model)
    assert {name: tensor.data_ptr() for name, tensor in model.items()}.items() <= before.items()
    assert len(addresses) == 15 and len(set(addresses)) == 3
    assert not torch.isnan(model["a.weight"]).any() and not model["head"].any()


@pytest.mark.parametrize("merge", ["task-arithmetic", "average", "ties"])
@pytest.mark.parametrize("scale", ["none", "unit-gain", "unit-gain-row"])
def test_awkward_families_are_scored_as_they_are_decoded(tmp_path, merge, scale):
    base, tasks, _ = awkward(5, tasks=3)
    grid, seen = [0.0, 0.4, 1.0], {}
    options = {"merge": merge, "scale": scale, "shared_dtype": "int8"}

    def contents(state):
        return {name: torch_bytes(tensor) for name, tensor in state.items()}

    def score(task, state):
        seen.setdefault(task, []).append(contents(state))
        return -len(seen[task])

    tallcodec.encode(base, tasks, tmp_path / "a.tall", threshold="search", score=score, grid=grid,
                     **options)  # fmt: skip
    for i, value in enumerate(grid):
        tallcodec.encode(base, tasks, tmp_path / "b.tall", threshold=value, overwrite=True,
                         **options)  # fmt: skip
        with tallcodec.open(tmp_path / "b.tall") as file:
            for task in tasks:
                assert seen[task][i] == contents(file.decode(task))


class Stop(Exception):
    pass


def test_a_failing_score_leaves_nothing(tmp_path, family):
    def stop(task, state):
        raise Stop

    with pytest.raises(Stop):
        tallcodec.encode(*family, tmp_path / "a.tall", threshold="search", score=stop)
    path = tmp_path / "b.tall"
    path.write_bytes(b"the old file")
    with pytest.raises(Stop):
        tallcodec.encode(*family, path, threshold="search", score=stop, overwrite=True)
    with pytest.raises(OutputExistsError):
        tallcodec.encode(*family, path, threshold="search", score=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["b.tall"]
    assert path.read_bytes() == b"the old file"


@pytest.mark.parametrize("value", [math.nan, "high", None, [1], torch.ones(2)], ids=repr)
def test_a_score_is_a_number(tmp_path, family, value):
    with pytest.raises(ArgumentError, match="score\\('cars'.*0.2 gave"):
        tallcodec.encode(*family, tmp_path / "a.tall", threshold="search",
                         score=lambda task, state: value)  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs score"),
        ({"score": "accuracy"}, "needs score"),
        ({"score": max, "grid": []}, "grid is empty"),
        ({"score": max, "grid": 0.4}, "grid must be a list"),
        ({"score": max, "grid": [0.4, math.nan]}, "threshold must be a number"),
        ({"score": max, "grid": [-0.1]}, "threshold must be a number"),
        ({"score": max, "method": "magnitude"}, "method \"tall\""),
        ({"score": max, "out": [1]}, "out must map"),
        ({"score": max, "metadata": {"tallcodec.scores": "x"}}, "tallcodec.scores"),
        ({"score": max, "threshold": 0.4}, "threshold=\"search\""),
    ],
)
def test_bad_searches_are_refused(tmp_path, family, options, message):
    with pytest.raises(ArgumentError, match=message):
        tallcodec.encode(*family, tmp_path / "a.tall", **{"threshold": "search", **options})
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_dtype_is_refused(tmp_path, family):
    with pytest.raises(TensorMismatchError, match="a.weight"):
        tallcodec.encode(*family, tmp_path / "a.tall", threshold="search", score=max,
                         out={"a.weight": torch.zeros(6, 40).half()})  # fmt: skip
