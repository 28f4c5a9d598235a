"""The rivals' rules in benchmarks/ against their defining equations, entry by entry."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import methods
import rivals

SHARES = (0.05, 0.2, 0.5, 1.0)


def vectors(tasks, size=211, seed=0):
    """Task vectors with zeros, ties, entries that cancel, and one entry that all tasks agree on."""
    rng = np.random.default_rng(seed)
    taus = rng.normal(size=(tasks, size)).astype(np.float32)
    taus[:, ::5] = rng.choice(np.float32([-0.5, 0, 0.5]), (tasks, len(taus[0, ::5])))
    taus[:, 1::7] = 0
    taus[0, 2::9] = 0
    if tasks > 1:
        taus[1, 3::11] = -taus[0, 3::11]
    taus[:, 4] = 3
    return taus


def torch_of(taus):
    return [torch.from_numpy(tau.copy()) for tau in taus]


def sign(x):
    return int(x > 0) - int(x < 0)


def trimmed(tau, share):
    """TIES: the k-th smallest magnitude, k = d − ⌊share·d⌋, and what is not below it."""
    k = len(tau) - math.floor(share * len(tau))
    limit = sorted(abs(x) for x in tau)[k - 1] if k else 0
    return [x if abs(x) >= limit else 0 for x in tau]


@pytest.mark.parametrize("share", SHARES)
def test_largest_keeps_what_ties_counts_and_all_ties(share):
    tau = vectors(1)[0]
    expected = [abs(x) >= y for x, y in zip(tau, np.abs(trimmed(tau, share)))]
    mask = rivals.largest(torch.from_numpy(tau), share).numpy()
    assert [x if m else 0 for x, m in zip(tau, mask)] == trimmed(tau, share)
    assert mask.sum() >= sum(map(bool, expected)) * share
    distinct = torch.arange(1000.0)[torch.randperm(1000)]
    assert rivals.largest(distinct, 0.2).sum() == 201  # as published


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("mean", [False, True])
def test_ties_trims_elects_and_merges_what_agrees(tasks, share, mean):
    taus = vectors(tasks, seed=tasks)
    rows = [trimmed(tau, share) for tau in taus]
    elected = [sign(sum(np.float32(row[i]) for row in rows)) for i in range(len(taus[0]))]
    majority = sign(sum(elected))
    result = rivals.ties(torch_of(taus), share, mean).numpy()
    for i, elect in enumerate(elected):
        elect = elect or majority
        agree = [row[i] for row in rows if row[i] and sign(row[i]) == (elect or -1)]
        expected = sum(agree) / (len(agree) if mean and agree else 1)
        assert result[i] == pytest.approx(expected, rel=1e-6), i


def test_task_arithmetic_is_the_sum_in_task_order():
    taus = vectors(4)
    total = rivals.task_arithmetic(torch_of(taus)).tolist()
    assert total == (((taus[0] + taus[1]) + taus[2]) + taus[3]).tolist()


@pytest.mark.parametrize("share", SHARES)
def test_pruning_keeps_values_as_they_are(share):
    tau = vectors(1)[0]
    assert rivals.pruned(torch.from_numpy(tau), share).tolist() == trimmed(tau, share)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_emr_elects_masks_and_rescales(tasks):
    taus = vectors(tasks, seed=tasks)
    merged = rivals.emr(torch_of(taus))
    for i in range(len(taus[0])):
        gamma = sign(sum(tau[i] for tau in taus))
        epsilon = max((abs(tau[i]) for tau in taus if tau[i] * gamma > 0), default=0)
        assert merged.unified[i] == gamma * epsilon
        for tau, mask in zip(taus, merged.masks):
            assert bool(mask[i]) == (tau[i] * gamma * epsilon > 0)
    for tau, mask, rescaler in zip(taus, merged.masks, merged.rescalers):
        rebuilt = rescaler * (mask * merged.unified).double().numpy()
        assert np.abs(rebuilt).sum() == pytest.approx(np.abs(tau, dtype=np.float64).sum())


def test_emr_of_a_task_without_any_agreement_does_not_divide_by_zero():
    taus = [torch.tensor([3.0, 3.0]), torch.tensor([-1.0, -1.0]), torch.zeros(2)]
    merged = rivals.emr(taus)
    assert merged.unified.tolist() == [3, 3]
    assert [mask.tolist() for mask in merged.masks] == [[True] * 2, [False] * 2, [False] * 2]
    assert merged.rescalers == [1, 1, 1]


def test_bitdelta_is_the_mean_magnitude_with_the_sign():
    tau = vectors(1)[0].reshape(1, -1)
    scale = sum(abs(float(x)) for x in tau.flat) / tau.size
    expected = [[-scale if x < 0 else scale for x in tau[0]]]
    result = rivals.bitdelta(torch.from_numpy(tau))
    assert result.numpy() == pytest.approx(np.array(expected), rel=1e-6)


@pytest.mark.parametrize("drop", [0.0, 0.6, 0.95, 0.999])
def test_t_switch_keeps_the_largest_of_each_sign_and_their_norm(drop):
    tau = vectors(1)[0]
    result = rivals.t_switch(torch.from_numpy(tau), drop).numpy()
    kept = set()
    for way in (1, -1):
        group = sorted((way * x for x in tau if way * x > 0), reverse=True)
        keep = int(len(group) * (1 - drop)) or len(group)
        kept |= {i for i, x in enumerate(tau) if way * x >= group[keep - 1]}
    scale = math.sqrt(sum(float(tau[i]) ** 2 for i in kept) / len(kept))
    expected = [sign(x) * scale if i in kept else 0 for i, x in enumerate(tau)]
    assert result == pytest.approx(np.array(expected), rel=1e-6)
    assert np.linalg.norm(result) == pytest.approx(np.linalg.norm(tau[sorted(kept)]), rel=1e-5)


def test_t_switch_of_nothing_is_nothing():
    assert rivals.t_switch(torch.zeros(3, 2), 0.6).tolist() == torch.zeros(3, 2).tolist()


def test_positions_cost_their_entropy_and_never_more_than_a_bitmap():
    assert rivals.position_bits(0, 100) == 0 == rivals.position_bits(0, 0)
    assert rivals.position_bits(50, 100) == 100
    p = 0.2
    assert rivals.position_bits(20, 100) == pytest.approx(
        -100 * (p * math.log2(p) + (1 - p) * math.log2(1 - p)))
    assert all(rivals.position_bits(k, 37) <= 37 for k in range(38))


class SmallFamily:
    """Three checkpoints of three tensors, as files."""

    name = "small"

    def __init__(self, folder):
        self.paths = {}
        start = torch.Generator().manual_seed(0)
        shapes = {"layer": (20, 30), "norm": (30,), "embedding": (40, 10)}
        base = {k: torch.randn(shape, generator=start) for k, shape in shapes.items()}
        self.base_path = folder / "base.safetensors"
        save_file(base, self.base_path)
        for task in "abc":
            self.paths[task] = folder / f"{task}.safetensors"
            tuned = {k: v + 0.01 * torch.randn(v.shape, generator=start) for k, v in base.items()}
            tuned["embedding"][::2] = base["embedding"][::2]
            save_file(tuned, self.paths[task])

    def base(self):
        return load_file(self.base_path)

    def checkpoint(self, task):
        return load_file(self.paths[task])


class Accuracy:
    """A score: the nearer to the fine-tuned checkpoint, the better."""

    def __init__(self, family, task, state):
        tuned = family.checkpoint(task)
        self.accuracy = 1 / (1 + sum(float((state[k] - v).norm()) for k, v in tuned.items()))


@pytest.fixture
def problem(tmp_path):
    family = SmallFamily(tmp_path)
    score = lambda task, state, split, limit=None: Accuracy(family, task, state)  # noqa: E731
    return methods.Problem(family, ["a", "b", "c"], score, tmp_path, threads=1)


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_every_method_gives_every_task_a_checkpoint(problem, method):
    encoded = method.encode(problem, **method.options)
    for task in problem.tasks:
        state = encoded.decode(task)
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in problem.base.items()}
        assert all(v.isfinite().all() for v in state.values())
    tuned = sum(path.stat().st_size for path in problem.paths.values())
    assert encoded.bytes >= problem.base_bytes and 0 <= encoded.task_bytes <= tuned / 3


def test_computed_bytes_are_those_of_the_parts(problem):
    parameters, base = 20 * 30 + 30 + 40 * 10, problem.base_bytes
    emr = methods.emr(problem)
    assert emr.bytes == round(base + (32 * parameters + 3 * (parameters + 32)) / 8)
    assert emr.task_bytes == (parameters + 32) / 8
    sign_bits = 20 * 30 + 32 + 40 * 10 + 32 + 32 * 30
    assert methods.bitdelta(problem).task_bytes == sign_bits / 8
    bits = 0
    for task in problem.tasks:
        for name, tensor in methods.t_switch(problem, drop=0.6).decode(task).items():
            kept, total = int((tensor != problem.base[name]).sum()), tensor.numel()
            p = kept / total
            bits += kept + 32 - total * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert methods.t_switch(problem, drop=0.6).task_bytes == pytest.approx(bits / 3 / 8)


def test_a_merged_model_takes_the_best_alpha(problem):
    encoded = methods.task_arithmetic(problem, grid=(0.0, 0.5, 1.0))
    total = sum(tau for tau in problem.taus)
    by_alpha = {a: problem.normalised(problem.state(a * total)) for a in (0.0, 0.5, 1.0)}
    best = max(by_alpha, key=by_alpha.get)
    assert encoded.settings == f"α {best:g}" and encoded.bytes == problem.base_bytes
    for name, tensor in problem.state(best * total).items():
        assert torch.equal(encoded.decode("a")[name], tensor)
