"""The kernels against expressions that share nothing with them: PyTorch, ml_dtypes, xxhash."""

import ml_dtypes
import numpy as np
import pytest

from tallcodec import _core

torch = pytest.importorskip("torch")
xxhash = pytest.importorskip("xxhash")

kernels = _core.kernels

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FLOATS = list(TORCH)
# An odd number of elements: over one work unit of the threads, and no multiple of anything.
LENGTH = 524288 + 12345


@pytest.fixture(params=kernels.available())
def variant(request):
    return request.param


def raw(tensor):
    """A tensor's elements as the kernels take them: bfloat16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def view(array, dtype):
    return torch.from_numpy(array.view(np.uint16 if dtype == "bfloat16" else NUMPY[dtype])).view(
        TORCH[dtype])


def family(dtype, tasks, n=LENGTH, seed=0):
    """A base and its fine-tunes; a third of each is unchanged, a few elements cancel to s = 0."""
    random = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=random) * 0.02).to(TORCH[dtype])
    taus = torch.randn(tasks, n, generator=random) * 0.002
    taus[:, torch.rand(n, generator=random) < 1 / 3] = 0
    if tasks == 2:
        taus[1, :1000] = -taus[0, :1000]
    return base, [(base.float() + tau).to(TORCH[dtype]) for tau in taus]


def published_sum(base, tasks):
    total = torch.zeros(base.shape, dtype=torch.float32)
    for task in tasks:
        total = total + (task.float() - base.float())
    return torch.where(total.isfinite(), total, 0)


def published_mask(base, task, s, threshold):
    base, task = base.float(), task.float()
    return (base - task).abs() > threshold * ((base + s) - task).abs()


def bits(mask, n):
    return torch.from_numpy(np.unpackbits(mask, bitorder="little")[:n].astype(bool))


def dequantised(result, dtype, n):
    """The stored shared vector as float32."""
    if dtype != "int8":
        return view(result["shared"], dtype).float()
    scales = np.repeat(result["scales"], 128)[:n]
    return torch.from_numpy(result["shared"].view(np.int8).astype(np.float32) * scales)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shared_dtype", FLOATS + ["int8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_encode_and_decode_follow_the_published_rule(variant, dtype, shared_dtype, threads):
    thresholds = [0.4, 0.2, 1.0]
    base, tasks = family(dtype, len(thresholds))
    result = kernels.encode(raw(base), [raw(t) for t in tasks], dtype, thresholds, shared_dtype,
                            kernels=variant, threads=threads)
    s = dequantised(result, shared_dtype, LENGTH)
    if shared_dtype != "int8":
        expected = published_sum(base, tasks).to(TORCH[shared_dtype]).float()
        assert torch.equal(s, expected)

    active = torch.zeros(LENGTH, dtype=torch.int64)
    for task, threshold, mask, stats in zip(tasks, thresholds, result["masks"], result["stats"]):
        published = published_mask(base, task, s, threshold)
        stored = bits(mask, LENGTH)
        assert torch.equal(stored, published & (s != 0))
        assert stats["set_bits"] == stored.sum()
        assert stats["published_bits"] == published.sum()
        assert not stats["nonfinite"]
        active += published

        tau = (task.float() - base.float()).double()
        approx = (stored * s).double()
        exact = {"tau_sq": tau * tau, "dot": tau * approx, "approx_sq": approx * approx}
        for name, products in exact.items():
            assert stats[name].sum() == pytest.approx(products.sum().item(), rel=1e-12)

        decoded = kernels.decode(raw(base), result["shared"], mask, dtype, shared_dtype, dtype,
                                 scales=result["scales"], kernels=variant, threads=threads)
        expected = torch.where(published, base.float() + s, base.float()).to(TORCH[dtype])
        assert torch.equal(view(decoded, dtype), expected)
    assert result["agreement"] == torch.bincount(active, minlength=len(tasks) + 1).tolist()
    assert not result["base_nonfinite"]


@pytest.mark.parametrize("shared_dtype", ["float32", "int8"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ["magnitude", "adapted"])
def test_the_other_rules(variant, rule, dtype, shared_dtype):
    thresholds = [0.001, 0.003] if rule == "magnitude" else [0.4, 1.875]
    base, tasks = family(dtype, 2)
    base[7], tasks[0][7], tasks[1][9] = 0, float("inf"), float("nan")
    result = kernels.encode(raw(base), [raw(t) for t in tasks], dtype, thresholds, shared_dtype,
                            kernels=variant, threads=2, rule=rule)
    s = dequantised(result, shared_dtype, LENGTH)
    for task, threshold, mask, stats in zip(tasks, thresholds, result["masks"], result["stats"]):
        tau = task.float() - base.float()
        left = torch.tensor(threshold)
        active = tau.abs() > (left if rule == "magnitude" else (left * s - tau).abs())
        assert torch.equal(bits(mask, LENGTH), active & (s != 0))
        assert 0 < stats["set_bits"] <= stats["published_bits"]
        assert stats["published_bits"] == active.sum() and stats["nonfinite"]


def test_int8_is_block_wise_round_to_nearest(variant):
    base, tasks = family("float32", 2)
    result = kernels.encode(raw(base), [raw(t) for t in tasks], "float32", [0.4, 0.4], "int8",
                            kernels=variant)
    blocks = np.zeros((-(-LENGTH // 128), 128), np.float32)
    blocks.reshape(-1)[:LENGTH] = published_sum(base, tasks).numpy()
    scales = np.abs(blocks).max(axis=1) / np.float32(127)
    divisor = np.where(scales == 0, np.float32(1), scales)[:, None]
    q = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
    np.testing.assert_array_equal(result["scales"], scales)
    np.testing.assert_array_equal(result["shared"].view(np.int8), q.reshape(-1)[:LENGTH])


def test_zero_shared_vector_clears_the_bit(variant):
    base, tasks = family("float32", 2)
    result = kernels.encode(raw(base), [raw(t) for t in tasks], "float32", [0.4, 0.4], "float32",
                            kernels=variant)
    zero = view(result["shared"], "float32") == 0
    assert zero.any()
    for task, mask, stats in zip(tasks, result["masks"], result["stats"]):
        assert not bits(mask, LENGTH)[zero].any()
        assert stats["published_bits"] >= stats["set_bits"]


def test_nonfinite_values_are_left_out_of_the_shared_vector_and_reported(variant):
    base = np.array([0, 0, 0, np.inf, 1, 0], np.float32)
    task = np.array([1, np.nan, np.inf, 0, 1, 3.4e38], np.float32)
    other = np.array([1, 0, 0, 0, 1, 3.4e38], np.float32)
    result = kernels.encode(base, [task, other], "float32", [0.4, 0.4], "float32", kernels=variant)
    assert view(result["shared"], "float32").tolist() == [2, 0, 0, 0, 0, 0]
    assert result["base_nonfinite"]
    assert [stats["nonfinite"] for stats in result["stats"]] == [True, False]


def test_16_bit_shared_vectors_saturate(variant):
    base = np.zeros(4, np.float32)
    task = np.array([1e5, -1e5, 3.4e38, -3.4e38], np.float32)
    for dtype in ("float16", "bfloat16"):
        largest = float(ml_dtypes.finfo(dtype).max)
        result = kernels.encode(base, [task], "float32", [0.4], dtype, kernels=variant)
        assert view(result["shared"], dtype).float().abs()[2:].tolist() == [largest] * 2


def test_no_tasks_make_a_zero_shared_vector(variant):
    base = np.ones(1000, np.float32)
    result = kernels.encode(base, [], "float32", [], "float32", kernels=variant)
    assert not result["shared"].any() and result["agreement"] == [1000]


def test_more_tasks_than_a_machine_word_has_bits(variant):
    base, tasks = family("float32", 100, n=1000)
    result = kernels.encode(raw(base), [raw(t) for t in tasks], "float32", [0.4] * 100, "float32",
                            kernels=variant)
    s = published_sum(base, tasks)
    active = sum(published_mask(base, task, s, 0.4).long() for task in tasks)
    assert result["agreement"] == torch.bincount(active, minlength=101).tolist()


@pytest.mark.parametrize("task_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_tasks_of_another_dtype(variant, dtype, task_dtype):
    base, tasks = family("float32", 2)
    base, tasks = base.to(TORCH[dtype]), [tasks[0].to(TORCH[task_dtype]), tasks[1]]
    result = kernels.encode(raw(base), [raw(t) for t in tasks], dtype, [0.4, 0.4], "float32",
                            kernels=variant, task_dtypes=[task_dtype, "float32"])
    s = published_sum(base, tasks)
    assert torch.equal(view(result["shared"], "float32"), s)
    for task, mask in zip(tasks, result["masks"]):
        assert torch.equal(bits(mask, LENGTH), published_mask(base, task, s, 0.4) & (s != 0))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_with_gain_from_the_middle_of_a_tensor(variant, dtype, out_dtype):
    base, tasks = family(dtype, 3, n=3000)
    encoded = kernels.encode(raw(base), [raw(t) for t in tasks], dtype, [0.4] * 3, "int8",
                             kernels=variant)
    s, mask = dequantised(encoded, "int8", 3000), encoded["masks"][1]
    active, gain = bits(mask, 3000), np.float32(1.7)
    expected = torch.where(active, base.float() + gain * s, base.float()).to(TORCH[out_dtype])
    for first in [0, 1, 13, 127, 128, 777]:
        block = first // 128
        out = kernels.decode(raw(base)[first:], encoded["shared"][first:], mask[block * 16:], dtype,
                             "int8", out_dtype, scales=encoded["scales"][block:], gain=gain,
                             phase=first % 128, kernels=variant)
        assert torch.equal(view(out, out_dtype), expected[first:])


def test_decode_is_a_select(variant):
    base = np.array([-0.0, np.nan, np.inf, -0.0] * 5, np.float32)
    mask = np.array([0b00000000, 0b10001000, 0b1000], np.uint8)
    out = kernels.decode(base, np.zeros(20, np.float32), mask, "float32", "float32", "float32",
                         kernels=variant).view(np.float32)
    selected = np.unpackbits(mask, bitorder="little")[:20].astype(bool)
    assert np.signbit(out[~selected & (base == 0)]).all()
    assert not np.signbit(out[selected]).any()
    np.testing.assert_array_equal(out, base)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_conversion_rounds_like_numpy(variant, dtype, to):
    if dtype == "float32":
        # Every exponent, and around every middle between two bfloat16 or two float16 values.
        low = np.array([0, 1, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001], np.uint32)
        values = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low).reshape(-1)
    else:
        values = np.arange(65536, dtype=np.uint16)
    values = values.view(NUMPY[dtype])
    out = kernels.decode(values.view(np.uint16 if dtype != "float32" else np.float32), None, None,
                         dtype, "float32", to, kernels=variant).view(NUMPY[to])
    with np.errstate(over="ignore", invalid="ignore"):
        out, expected = out.astype(np.float32), values.astype(NUMPY[to]).astype(np.float32)
    np.testing.assert_array_equal(out, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(out)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("phase", [0, 5, 127])
def test_sums_of_a_stored_mask(variant, phase):
    base, tasks = family("bfloat16", 3, n=3000)
    encoded = kernels.encode(raw(base), [raw(t) for t in tasks], "bfloat16", [0.4] * 3, "int8",
                             kernels=variant)
    sums = kernels.sums(raw(base)[phase:], encoded["shared"][phase:], encoded["masks"][0],
                        raw(tasks[0])[phase:], "bfloat16", "int8", "bfloat16",
                        scales=encoded["scales"], phase=phase, kernels=variant)
    if phase == 0:
        for name, lanes in sums.items():
            np.testing.assert_array_equal(lanes, encoded["stats"][0][name])
    tau = (tasks[0].float() - base.float())[phase:].double().numpy()
    s = dequantised(encoded, "int8", 3000).double().numpy()
    approx = (bits(encoded["masks"][0], 3000).numpy() * s)[phase:]
    exact = {"tau_sq": tau * tau, "dot": tau * approx, "approx_sq": approx * approx}
    for name, products in exact.items():
        lanes = [products[lane::16].sum() for lane in range(16)]
        np.testing.assert_allclose(sums[name], lanes, rtol=1e-12)


@pytest.mark.parametrize("size", [256, 320, 1024, 1088, 2048, 65536, 65536 - 64, 1 << 20])
def test_hash_is_xxh3(variant, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert kernels.hash(data, kernels=variant) == xxhash.xxh3_64_intdigest(data)


@pytest.mark.parametrize("size", [0, 64, 128, 192])
def test_hash_of_short_data_is_extended_by_zeros(variant, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    extended = data.tobytes().ljust(256, b"\0")
    assert kernels.hash(data, kernels=variant) == xxhash.xxh3_64_intdigest(extended)


def test_the_environment_forces_a_variant(variant, monkeypatch):
    monkeypatch.setenv("TALLCODEC_KERNELS", variant)
    kernels.hash(b"")
    monkeypatch.setenv("TALLCODEC_KERNELS", "no-such-kernels")
    with pytest.raises(ValueError, match="not available"):
        kernels.hash(b"")


def test_copy():
    source = np.arange(1 << 21, dtype=np.uint8)[3:]
    target = np.zeros_like(source)
    kernels.copy(target, source, threads=2)
    np.testing.assert_array_equal(target, source)
