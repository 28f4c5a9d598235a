"""Adapted masks, the default: the reference's bytes, and what the rule promises."""

import numpy as np
import pytest

import tallcodec
from families import reference_options
from helpers import awkward, encoded, normal, reference_file, small_family
from tallcodec import _core
from tallcodec.errors import ArgumentError

NEAR = 0.85


def reference(base, tasks, **options):
    options = {"scale": "unit-gain", "method": "adapted"} | options
    return reference_file(base, tasks, **options)


@pytest.mark.parametrize("options", list(reference_options()), ids=lambda o: "-".join(o.values()))
def test_the_file_is_the_references(tmp_path, options):
    base, tasks, _ = awkward(11)
    assert encoded(tmp_path / "a.tall", base, tasks, **options) == reference(base, tasks, **options)


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("merge", ["task-arithmetic", "average", "ties"])
def test_every_merge_and_number_of_tasks(tmp_path, merge, tasks):
    base, states, _ = awkward(tasks, tasks=tasks)
    expected = reference(base, states, merge=merge)
    assert encoded(tmp_path / "a.tall", base, states, merge=merge) == expected


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernels", _core.kernels.available())
def test_large_tensors_are_sampled_alike(tmp_path, monkeypatch, kernels, threads):
    base, states, _ = awkward(7, tasks=2, big=True)
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    found = encoded(tmp_path / "a.tall", base, states, threads=threads)
    assert found == reference(base, states)


def cosine(mask, tau, s):
    kept = np.where(mask, s, 0).astype(np.float64)
    return kept @ tau / (np.linalg.norm(kept) or 1)


def best_cosine(tau, s):
    """Of all masks that keep where tau / s is at least some c > 0."""
    order = np.argsort(-tau / s)
    tau, s = tau[order].astype(np.float64), s[order].astype(np.float64)
    positive = tau / s > 0
    return (np.cumsum(tau * s) / np.sqrt(np.cumsum(s * s)))[positive].max()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 0.25), (1, 1, 1e-3)])
def test_masks_are_sparse_but_near_the_best(tmp_path, sizes):
    """Of tasks alike and of very different size; a step more in c would leave less than NEAR."""
    base = {"w": normal((200, 300), 1)}
    tasks = {f"t{k}": {"w": base["w"] + normal((200, 300), 2 + k, spread=0.1 * size)}
             for k, size in enumerate(sizes)}
    info = tallcodec.encode(base, tasks, tmp_path / "a.tall")
    taus = {task: (state["w"] - base["w"]).ravel() for task, state in tasks.items()}
    s = np.float32(0)
    for tau in taus.values():
        s = s + tau
    with tallcodec.open(tmp_path / "a.tall", "np") as file:
        for k, task in enumerate(info.tasks):
            tau, best = taus[task.name], best_cosine(taus[task.name], s)
            factor = file._core.entries(k)[0]["factor"]
            mask = np.abs(tau) > np.abs(np.float32(factor) * s - tau)
            assert cosine(mask, tau, s) > (NEAR - 1e-3) * best
            assert cosine(tau / s > 1.26 * factor / 2, tau, s) < (NEAR + 1e-3) * best
            changed = file.decode(task.name)["w"] != base["w"]
            assert np.mean(changed.ravel() == mask) > 0.999  # τ̂ may vanish in θ₀ + τ̂
            assert (task.method, task.gain) == ("adapted", pytest.approx(1, abs=1e-6))


def test_a_sample_that_misses_the_changes_is_not_trusted(tmp_path):
    """Only rows between the first two blocks of the sample are trained, as rare words' may be."""
    base = {"w": np.zeros((2000, 1500), np.float32)}
    tasks = {name: {"w": base["w"].copy()} for name in ("large", "small")}
    for k, (state, size) in enumerate(zip(tasks.values(), (0.3, 0.003))):
        state["w"][4:20] = normal((16, 1500), k, spread=size)
    assert encoded(tmp_path / "a.tall", base, tasks) == reference(base, tasks)
    file = _core.File("a.tall", (tmp_path / "a.tall").read_bytes())
    assert file.entries(1)[0]["factor"] < 0.1


@pytest.mark.parametrize("scale", ["unit-gain", "unit-gain-row"])
def test_unit_gain_is_bounded_where_a_mask_follows_little(tmp_path, scale):
    """Of 10 elements that a small task keeps, 6 have the sign of a large one: the cosine is .2, the
    gain of the least-squares scale .04, and 9 times that is less than 1."""
    base = {"w": np.zeros(100, np.float32)}
    small = np.float32([0.01] * 6 + [-0.01] * 4 + [0] * 90)
    tasks = {"large": {"w": np.ones(100, np.float32)}, "small": {"w": small}}
    info = tallcodec.encode(base, tasks, tmp_path / "a.tall", method="magnitude", density=0.09,
                            scale=scale)  # fmt: skip
    assert info.tasks[1].gain == pytest.approx(0.36, abs=0.05)
    with tallcodec.open(tmp_path / "a.tall", "np") as file:
        assert np.linalg.norm(file.decode("small")["w"]) < 3 * np.linalg.norm(small)


@pytest.mark.parametrize("scale", ["unit-gain", "unit-gain-row"])
@pytest.mark.parametrize("second", [-2 / 64, -1 / 64])
def test_a_masked_vector_that_points_away_decodes_to_nothing(tmp_path, scale, second):
    base = {"w": np.zeros(4, np.float32)}
    tasks = {"large": {"w": np.float32([1 - 1 / 64, 1 - second, 1, 1])},
             "small": {"w": np.float32([1 / 64, second, 0, 0])}}  # fmt: skip
    tallcodec.encode(base, tasks, tmp_path / "a.tall", method="magnitude", density=0.3, scale=scale)
    with tallcodec.open(tmp_path / "a.tall", "np") as file:
        assert np.array_equal(file.decode("small")["w"], base["w"])


def test_opposed_tasks_make_no_spike(tmp_path):
    """Two tasks cancel but in one element: it may not stand for all of the task vector."""
    base = {"w": np.round(normal(10000, 1) * 64) / 64}
    change = np.round(normal(10000, 2) * 64) / 64
    tasks = {"a": {"w": base["w"] + change}, "b": {"w": base["w"] - change}}
    tasks["a"]["w"][7] += 1
    tallcodec.encode(base, tasks, tmp_path / "a.tall")
    with tallcodec.open(tmp_path / "a.tall", "np") as file:
        assert np.abs(file.decode("a")["w"] - base["w"]).max() < 10 * np.abs(change).max()


def test_it_is_the_default_and_the_published_rule_one_argument_away(tmp_path):
    base, tasks = small_family()
    path = tmp_path / "a.tall"
    default = encoded(path, base, tasks)
    assert default == encoded(path, base, tasks, threshold="auto", scale="unit-gain")
    assert default != encoded(path, base, tasks, scale="none")
    published = encoded(path, base, tasks, threshold=0.4)
    assert published == encoded(path, base, tasks, threshold=0.4, scale="none")
    with tallcodec.open(path) as file:
        assert [(t.method, t.threshold) for t in file.info.tasks] == [("tall", 0.4)] * 2


def test_vectors_that_cancel_or_oppose_are_coded(tmp_path):
    """No element of task b follows the sum, and in c the sum is zero: no mask bit is set."""
    base = {"b": normal(40, 1), "c": normal(40, 2)}
    step = np.float32(0.5)
    tasks = {"a": {"b": base["b"] + 2 * step, "c": np.round(base["c"]) + step},
             "b": {"b": base["b"] - step, "c": np.round(base["c"]) - step}}
    base["c"] = np.round(base["c"])
    assert encoded(tmp_path / "a.tall", base, tasks) == reference(base, tasks)
    with tallcodec.open(tmp_path / "a.tall", "np") as file:
        assert np.array_equal(file.decode("b")["b"], base["b"])
        assert np.array_equal(file.decode("a")["c"], base["c"])


@pytest.mark.parametrize("threshold", ["Auto", "", "0.4", b"auto"])
def test_other_words_are_refused(tmp_path, threshold):
    with pytest.raises(ArgumentError, match="threshold must be a number"):
        tallcodec.encode(*small_family(), tmp_path / "a.tall", threshold=threshold)
    with pytest.raises(ArgumentError, match="threshold must be a number"):
        tallcodec.encode(*small_family(), tmp_path / "a.tall", threshold={"cars": 1, "dtd": "auto"})
    assert not list(tmp_path.iterdir())
