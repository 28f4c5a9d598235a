"""Multi-task vectors and magnitude masks against independent PyTorch, and the reference's bytes."""

import itertools
import math

import numpy as np
import pytest
import torch

import tallcodec
from helpers import awkward, encoded, normal, reference_file, torch_state
from tallcodec import _core
from tallcodec.errors import ArgumentError

MERGES = ("task-arithmetic", "average", "ties")


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["tall", "magnitude"])
@pytest.mark.parametrize("merge", MERGES)
def test_the_file_is_the_references(tmp_path, merge, method, tasks):
    base, states, thresholds = awkward(tasks, tasks=tasks)
    for density, shared in itertools.product((0.2, 0.001, 1.0), ("auto", "int8")):
        options = {"merge": merge, "method": method}
        if merge == "ties" or method == "magnitude":
            options["density"] = density
        options |= {"scale": "unit-gain-row" if shared == "int8" else "none"}
        threshold = thresholds if method == "tall" else "auto"
        found = encoded(tmp_path / "a.tall", base, states, threshold=threshold,
                        shared_dtype=shared, **options)  # fmt: skip
        assert found == reference_file(
            base, states, thresholds=thresholds, shared_dtype=shared, **options
        ), (density, shared)


@pytest.mark.parametrize("kernels", _core.kernels.available())
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_depend_on_neither_kernel_nor_threads(tmp_path, monkeypatch, kernels, threads):
    base, states, _ = awkward(7, tasks=3, big=True)
    options = {"merge": "ties", "method": "magnitude"}
    expected = encoded(tmp_path / "a.tall", base, states, threads=2, **options)
    monkeypatch.setenv("TALLCODEC_KERNELS", kernels)
    assert encoded(tmp_path / "b.tall", base, states, threads=threads, **options) == expected


# The published rules on whole flat vectors, as obvious as they can be.


def flat(state):
    return torch.cat([state[name].float().flatten() for name in sorted(state)])


def kept(tau, share):
    """Elements at least as large as the k-th smallest magnitude, k = d - floor(share * d)."""
    k = tau.numel() - int(tau.numel() * share)
    return torch.ones_like(tau).bool() if k == 0 else tau.abs() >= tau.abs().kthvalue(k).values


def ties(taus, share):
    trimmed = [torch.where(kept(tau, share), tau, 0) for tau in taus]
    sign = torch.zeros_like(taus[0])
    for tau in trimmed:
        sign = sign + tau
    sign = sign.sign()
    sign[sign == 0] = sign.sum().sign()
    merged = torch.zeros_like(taus[0])
    for tau in trimmed:
        merged = merged + torch.where(torch.where(sign > 0, tau > 0, tau < 0), tau, 0)
    return merged


def shared_vector(path):
    """The stored float32 shared vector of a file, zero where a tensor has none."""
    data = path.read_bytes()
    file = _core.File(str(path), data)
    planes, parts = file.planes(), []
    coded = {e["plane"] for task in range(len(file.tasks())) for e in file.entries(task)}
    shared = iter([p for p in planes if p[0] == 2])
    for tensor in file.tensors():
        count = math.prod(tensor["shape"])
        if tensor["shared_dtype"]:
            _, _, offset, size, _ = next(shared)
            parts.append(np.frombuffer(data, np.float32, count, offset))
            assert size == 4 * count and coded
        else:
            parts.append(np.zeros(count, np.float32))
    return torch.from_numpy(np.concatenate(parts))


def families():
    """(base, tasks) of a few awkward kinds; all values are finite and nothing is tied."""
    rng = np.random.default_rng(3)
    base = {"a": normal((40, 33), 1), "b": normal(700, 2), "frozen": normal(501, 3)}

    def tuned(seed, change):
        return {n: x + (0 if n == "frozen" else change(seed, x)).astype(np.float32)
                if n != "frozen" else x for n, x in base.items()}  # fmt: skip

    def steps(seed, x):  # few values: ties in magnitude, sums that cancel to zero
        return rng.integers(-3, 4, x.shape) * 0.25

    def whole(state):
        return {n: np.round(x * 4) / 4 for n, x in state.items()}

    def smooth(seed, x):
        return normal(x.shape, seed, spread=0.1 * seed)

    yield "smooth", base, {f"t{k}": tuned(k, smooth) for k in range(1, 4)}
    base = whole(base)
    yield "steps", base, {f"t{k}": tuned(k, steps) for k in range(1, 6)}
    yield "one task", base, {"t1": tuned(1, steps)}
    two = tuned(1, steps)
    opposite = {n: base[n] - (x - base[n]) for n, x in two.items()}
    yield "opposites", base, {"t1": two, "t2": opposite}


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["smooth", "steps", "one task", "opposites"])
def test_ties_is_the_published_rule(tmp_path, kind, share):
    _, base, tasks = next(f for f in families() if f[0] == kind)
    path = tmp_path / "a.tall"
    tallcodec.encode(base, tasks, path, merge="ties", density=share)
    taus = [flat(torch_state(t)) - flat(torch_state(base)) for t in tasks.values()]
    assert torch.equal(shared_vector(path), ties(taus, share))


def test_a_sum_of_zero_takes_the_sign_of_most(tmp_path):
    for sign in (1, -1):
        base = {"a": np.zeros(5, np.float32)}
        tasks = {"x": {"a": np.float32([1, 2, 2, 2, 0]) * sign},
                 "y": {"a": np.float32([-1, 2, 2, 2, 0]) * sign}}  # fmt: skip
        tallcodec.encode(base, tasks, tmp_path / "a.tall", merge="ties", density=1, overwrite=True)
        expected = np.float32([1, 4, 4, 4, 0]) * sign
        assert shared_vector(tmp_path / "a.tall").tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["smooth", "steps", "one task", "opposites"])
def test_average_is_the_mean_over_all_tasks(tmp_path, kind):
    _, base, tasks = next(f for f in families() if f[0] == kind)
    tasks["as the base"] = {name: array.copy() for name, array in base.items()}
    tallcodec.encode(base, tasks, tmp_path / "a.tall", merge="average")
    total = sum(flat(torch_state(t)) - flat(torch_state(base)) for t in tasks.values())
    assert torch.equal(shared_vector(tmp_path / "a.tall"), total / len(tasks))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["smooth", "steps", "one task", "opposites"])
def test_magnitude_masks_are_of_the_largest(tmp_path, kind, share):
    _, base, tasks = next(f for f in families() if f[0] == kind)
    path = tmp_path / "a.tall"
    tallcodec.encode(base, tasks, path, method="magnitude", density=share)
    before, s = flat(torch_state(base)), shared_vector(path)
    with tallcodec.open(path) as file:
        for name, task in tasks.items():
            mask = kept(flat(torch_state(task)) - before, share)
            assert torch.equal(flat(file.decode(name)), torch.where(mask, before + s, before))


@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan, math.inf, "0.2", True])
def test_a_density_is_a_share(tmp_path, density):
    base, states, thresholds = awkward(1, tasks=1)
    with pytest.raises(ArgumentError, match="density"):
        tallcodec.encode(base, states, tmp_path / "a.tall", merge="ties", density=density)
    assert not list(tmp_path.iterdir())
