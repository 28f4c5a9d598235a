"""tallcodec.gpu: the operations on tensors, with every back-end that can be had here."""

import os

import numpy as np
import pytest

from tallcodec.errors import ArgumentError, TensorMismatchError

torch = pytest.importorskip("torch")

from tallcodec import gpu  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cuda" if DEVICE == "cuda" else "cuda-host"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
        if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton is not interpreted")
    monkeypatch.setenv("TALLCODEC_BACKEND", request.param)


@pytest.fixture
def family():
    random = torch.Generator().manual_seed(0)
    base = torch.randn(24, 40, generator=random)
    tasks = [base + 0.1 * torch.randn(24, 40, generator=random) for _ in range(3)]
    return base.to(DEVICE), [task.to(DEVICE) for task in tasks]


def bits(mask, n):
    return torch.from_numpy(np.unpackbits(mask.cpu().numpy(), bitorder="little")[:n]).bool()


def test_encode_follows_the_published_rule_and_decode_gives_it_back(family):
    base, tasks = family
    made = gpu.encode(base, tasks, [0.2, 0.4, 0.6])
    s = sum(task - base for task in tasks)
    assert torch.equal(made.shared.view_as(base), s)
    for task, threshold, mask in zip(tasks, [0.2, 0.4, 0.6], made.masks):
        active = (base - task).abs() > threshold * ((base + s) - task).abs()
        assert torch.equal(bits(mask, base.numel()), active.cpu().view(-1))
        decoded = gpu.decode(base, made.shared, mask)
        assert torch.equal(decoded, torch.where(active, base + s, base))


def test_switching_in_place_leaves_no_trace(family):
    base, tasks = family
    made = gpu.encode(base, tasks, [0.4] * 3, shared_dtype=torch.int8)
    model = base.clone()
    for k in (0, 2, 1, 0):
        gpu.decode(base, made.shared, made.masks[k], scales=made.scales, out=model)
    expected = gpu.decode(base, made.shared, made.masks[0], scales=made.scales)
    assert torch.equal(model, expected) and not torch.equal(model, base)


def test_scales_of_rows_and_signs(family):
    base, _ = family
    random = np.random.default_rng(0)
    mask, signs = (torch.from_numpy(random.integers(0, 256, 120).astype(np.uint8)).to(DEVICE)
                   for _ in range(2))  # fmt: skip
    scale = torch.rand(24).to(DEVICE)
    decoded = gpu.decode(base, None, mask, signs=signs, scale=scale)
    s = 1 - 2 * bits(signs, 960).float().view(24, 40).to(DEVICE)
    active = bits(mask, 960).view(24, 40).to(DEVICE)
    assert torch.equal(decoded, torch.where(active, base + scale[:, None] * s, base))


def test_sums_give_the_scale_of_unit_gain(family):
    base, tasks = family
    made = gpu.encode(base, tasks, [1.0] * 3)
    tau_sq, dot, _ = gpu.sums(base, made.shared, made.masks[1], tasks[1])
    scale = (tau_sq / dot).item()
    tau = (tasks[1] - base).double()
    found = gpu.decode(base, made.shared, made.masks[1], scale=scale) - base
    assert ((found.double() * tau).sum() / (tau * tau).sum()).item() == pytest.approx(1, abs=1e-4)


def test_masks(family):
    base, tasks = family
    n, masks = base.numel(), gpu.encode(base, tasks, [0.4] * 3).masks
    each = torch.stack([bits(mask, n) for mask in masks])
    assert [gpu.popcount(mask, n).item() for mask in masks] == each.sum(1).tolist()
    assert gpu.agreement(masks, n).tolist() == each.sum(0).bincount(minlength=4).tolist()
    assert gpu.overlap(masks, n).tolist() == (each.int() @ each.int().T).tolist()
    assert torch.equal(bits(gpu.consensus(masks, n, 2), n), each.sum(0) >= 2)


def test_bad_arguments_are_refused_before_anything_is_written(family):
    base, tasks = family
    made = gpu.encode(base, tasks, [0.4] * 3)
    out, mask = base.clone(), made.masks[0]
    for error, message, arguments, options in [
        (TensorMismatchError, "mask has 119", (base, made.shared, mask[1:]), {}),
        (TensorMismatchError, "mask is torch.int8", (base, made.shared, mask.view(torch.int8)), {}),
        (TensorMismatchError, "shared has 959", (base, made.shared[1:], mask), {}),
        (TensorMismatchError, "contiguous", (base.T, made.shared, mask), {}),
        (TensorMismatchError, "base is torch.int32", (base.int(), made.shared, mask), {}),
        (TensorMismatchError, "out has 1920", (base, made.shared, mask),
         {"out": torch.cat([out, out])}),
        (TensorMismatchError, r"out is \(40, 24\)", (base, made.shared, mask),
         {"out": out.view(40, 24)}),
        (TensorMismatchError, "scale has 23", (base, made.shared, mask),
         {"scale": torch.ones(23, device=DEVICE)}),
        (TensorMismatchError, "not a torch tensor", (base.cpu().numpy(), made.shared, mask), {}),
        (ArgumentError, "either", (base, None, mask), {}),
        (ArgumentError, "scales", (base, made.shared, mask), {"scales": made.shared}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            gpu.decode(*arguments, **{"out": out, **options} if "out" not in options else options)
    assert torch.equal(out, base)
    with pytest.raises(ArgumentError, match="2 thresholds for 3 tasks"):
        gpu.encode(base, tasks, [0.4] * 2)
    with pytest.raises(TensorMismatchError, match="base is a list, not a torch tensor"):
        gpu.encode([1.0], tasks, [0.4] * 3)
    with pytest.raises(ArgumentError, match="λ is 0 or more"):  # magnitudes are compared with it
        gpu.encode(base, tasks, [-0.5] * 3)
    with pytest.raises(ArgumentError, match="rule must be"):
        gpu.encode(base, tasks, [0.4] * 3, rule="sign")
    with pytest.raises(TensorMismatchError, match=r"tasks\[1\] has 24"):
        gpu.encode(base, [tasks[0], tasks[1][:, 0].contiguous(), tasks[2]], [0.4] * 3)
    with pytest.raises(TensorMismatchError, match="on meta"):
        gpu.encode(base, [task.to("meta") for task in tasks], [0.4] * 3)


@pytest.mark.parametrize("number", [3.5e38, -1e39, 1e400, float("nan"), 10**400, "1", None])
def test_numbers_beyond_float32_are_refused(family, number):
    base, tasks = family
    made = gpu.encode(base, tasks, [3.4e38, 0.4, 1e-46])
    with pytest.raises(ArgumentError, match=r"thresholds\[1\] must be a number that is finite"):
        gpu.encode(base, tasks, [0.4, number, 0.4], rule="magnitude")
    with pytest.raises(ArgumentError, match="scale must be a number that is finite"):
        gpu.decode(base, made.shared, made.masks[0], scale=number)


def test_masks_of_any_shape_and_what_is_none(family):
    base, tasks = family
    n, masks = base.numel(), gpu.encode(base, tasks, [0.4] * 3).masks
    expected = gpu.consensus(masks, n, 2)
    found = gpu.consensus([mask.view(24, 5) for mask in masks], n, 2)
    assert found.shape == (n // 8,) and torch.equal(found, expected)
    for call in (gpu.agreement, gpu.overlap, lambda masks, n: gpu.consensus(masks, n, 1)):
        for flawed, name in ([3.5, *masks], r"masks\[0\]"), ([*masks, None], r"masks\[3\]"):
            with pytest.raises(TensorMismatchError, match=f"{name} is a .*not a torch tensor"):
                call(flawed, n)


def test_without_a_backend_for_the_device(family, monkeypatch):
    monkeypatch.delenv("TALLCODEC_BACKEND")
    with pytest.raises(ArgumentError, match="computes on GPUs"):
        gpu.decode(torch.zeros(8), torch.zeros(8), torch.zeros(1, dtype=torch.uint8))
