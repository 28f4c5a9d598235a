"""benchmarks/reproduction.py and shapes.py: the paper's figures, the closed form of a file's size,
and the mask statistics of Gaussian task vectors by plain NumPy."""

import math

import numpy as np
import pytest

import reproduction
import tallcodec
from helpers import normal
from reproduction import (
    PUBLISHED_AGREEMENT,
    PUBLISHED_GB,
    PUBLISHED_METHOD,
    SHARED_BITS,
    TASKS,
    elements,
    file_size,
    paper_storage,
    task_names,
)
from shapes import ARCHITECTURES, Architecture

# Names of several lengths and alphabets, sizes around a byte of mask, a block of 128 scales, a
# plane of 65,536 bytes and its checksums, ranks 0 to 4.
SMALL = Architecture(
    {
        "scalar": (),
        "b": (7,),
        "größe": (8, 1),
        "conv": (3, 2, 5, 5),
        "w": (16, 129),
        "blocks.0.long": (128, 128),
        "blocks.1.long": (129, 257),
        "large": (700_001,),
    },
    {"logit_scale": (), "embedding": (64, 257), "edge": (16384,)},
)


def gaussian_agreement(tasks, threshold, samples, seed):
    """Shares of samples in which |τ_t| > λ·|Σ τ − τ_t| holds for 0, 1, … T of the tasks."""
    tau = np.random.default_rng(seed).standard_normal((tasks, samples))
    active = np.abs(tau) > threshold * np.abs(tau.sum(0) - tau)
    return np.bincount(active.sum(0), minlength=tasks + 1) / samples


def published(name, tasks):
    return paper_storage(*map(elements, ARCHITECTURES[name]), tasks)


@pytest.mark.parametrize("name, trained, frozen", [
    ("ViT-B-32", 87_849_216, 25_599_489),
    ("ViT-B-16", 86_192_640, 25_599_489),
    ("ViT-L-14", 303_966_208, 38_595_841),
    ("T5-large", 750_251_008, 32_899_072),
])  # fmt: skip
def test_shapes_add_up_to_the_papers_parameters(name, trained, frozen):
    architecture = ARCHITECTURES[name]
    assert tuple(map(elements, architecture)) == (trained, frozen)
    assert not architecture.trained.keys() & architecture.frozen.keys()


@pytest.mark.parametrize("name, tasks", PUBLISHED_GB)
def test_storage_as_the_paper_counts_equals_its_tables(name, tasks):
    assert tuple(round(gb, 1) for gb in published(name, tasks)) == PUBLISHED_GB[name, tasks]


def test_storage_of_20_tasks_in_the_papers_abstract():
    paper = published("ViT-B-32", 20)
    assert (round(paper.fine_tuned, 2), round(paper.tall, 2)) == (57.04, 8.20)


def test_published_bars_are_whole_histograms():
    for tasks, bars in PUBLISHED_AGREEMENT.items():
        assert len(bars) == tasks + 1 and sum(bars) == pytest.approx(100, abs=0.05)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Checkpoints of SMALL, made as the benchmark makes the large ones: a base and three tasks."""
    folder = tmp_path_factory.mktemp("family")
    reproduction.write_base(folder / "base.safetensors", SMALL)
    for seed in (1, 2, 3):
        path = folder / f"task{seed}.safetensors"
        reproduction.write_task(path, SMALL, folder / "base.safetensors", seed)
    return folder


@pytest.fixture
def encode(family, tmp_path):
    """encode(files, shared_dtype): a .tall file of tasks named as the benchmark names them."""
    def encode(files, shared_dtype="float32"):
        tasks = dict(zip(task_names(len(files)), (family / f for f in files)))
        path = tmp_path / "small.tall"
        tallcodec.encode(family / "base.safetensors", tasks, path, overwrite=True, threshold=0.4,
                         shared_dtype=shared_dtype, **PUBLISHED_METHOD)  # fmt: skip
        return path

    return encode


def test_checkpoints_are_what_they_claim(family):
    from safetensors.numpy import load_file

    base, first, second = (load_file(family / f"{name}.safetensors")
                           for name in ("base", "task1", "task2"))  # fmt: skip
    shapes = SMALL.trained | SMALL.frozen
    assert {name: array.shape for name, array in base.items()} == shapes
    assert all(np.array_equal(base[name], first[name]) for name in SMALL.frozen)
    taus = [(state["large"] - base["large"]).astype(np.float64) for state in (first, second)]
    for tau in taus:  # Gaussian: standard deviation, kurtosis 3
        assert tau.std() == pytest.approx(reproduction.TASK_SPREAD, rel=0.01)
        assert (tau**4).mean() / tau.var() ** 2 == pytest.approx(3, abs=0.05)
    assert abs(np.corrcoef(taus)[0, 1]) < 0.01


@pytest.mark.parametrize("dtype", SHARED_BITS)
@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_closed_form_is_the_size_of_the_file(encode, tasks, dtype):
    files = [f"task{i % 3 + 1}.safetensors" for i in range(tasks)]
    path = encode(files, shared_dtype=dtype)
    assert path.stat().st_size == file_size(SMALL, task_names(tasks), dtype)


def test_repeated_checkpoints_take_what_distinct_ones_take(encode):
    first, second, third = (f"task{i}.safetensors" for i in (1, 2, 3))
    size = encode([first, second, third]).stat().st_size
    assert encode([first, second, first]).stat().st_size == size


def test_closed_form_of_the_large_ones_is_little_more_than_the_papers_count():
    for name, architecture in ARCHITECTURES.items():
        for tasks in TASKS[name]:
            counted = published(name, tasks).tall * 1e9 / 8
            assert 1 < file_size(architecture, task_names(tasks)) / counted < 1.001


@pytest.mark.parametrize("tasks, threshold", [(1, 0.4), (2, 0.4), (8, 0.5), (14, 0.4), (20, 0.4)])
def test_agreement_is_what_gaussian_task_vectors_give(tmp_path, tasks, threshold):
    size, path = 200_000, tmp_path / "gaussian.tall"
    base = {"w": normal(size, 99, spread=0.02), "frozen": normal(50, 98)}
    states = {
        name: {"w": base["w"] + normal(size, i, spread=3e-4), "frozen": base["frozen"]}
        for i, name in enumerate(task_names(tasks))
    }
    tallcodec.encode(base, states, path, threshold=threshold, **PUBLISHED_METHOD)
    counts = reproduction.agreement(path, tasks)
    assert counts.sum() == size  # what is frozen is not counted
    expected = gaussian_agreement(tasks, threshold, size, seed=7)
    shares = counts / size
    deviation = np.sqrt((expected * (1 - expected) + 1e-5) * 2 / size)  # both are samples
    assert np.all(np.abs(shares - expected) < 5 * deviation)


@pytest.mark.parametrize("tasks", PUBLISHED_AGREEMENT)
def test_gaussian_agreement_is_within_six_points_of_the_figure(tasks):
    threshold = reproduction.THRESHOLDS[tasks]
    shares = 100 * gaussian_agreement(tasks, threshold, 200_000, seed=11)
    assert reproduction.distance(shares, PUBLISHED_AGREEMENT[tasks]) < 6
    others = [100 * gaussian_agreement(tasks, x, 50_000, seed=12)
              for x in reproduction.GRID if x != threshold]  # fmt: skip
    assert all(reproduction.distance(o, PUBLISHED_AGREEMENT[tasks]) > 12 for o in others)


def test_distance_is_the_sum_of_differences():
    assert reproduction.distance([50, 50, 0], [40, 50, 10]) == 20


def test_a_size_that_is_not_the_predicted_one_ends_the_run(family, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduction.ARCHITECTURES, "small", SMALL)
    made = reproduction.Family("small", tmp_path, 2)
    assert made.encode(made.tasks(3, 2), 1, shared_dtype="int8") > 0
    monkeypatch.setattr(reproduction, "file_size", lambda *a: 64)
    with pytest.raises(SystemExit, match="where 64 were predicted"):
        made.encode(made.tasks(3, 2), 1, shared_dtype="int8")


def test_a_row_counts_as_the_paper_does():
    row = reproduction.storage_row("ViT-B-32", 8, "float32", 893_356_160)
    bits = (64 + 8) * row["trained"] + 32 * row["frozen"]
    assert row["counted_bytes"] == math.ceil(bits / 8) == 893_040_900
    assert row["overhead_bytes"] == 893_356_160 - 893_040_900
    assert row["published_tall_gb"] == 7.1 and row["paper_tall_gb"] == 7.1443
