"""Products with tasks' weights, against float64 products with the weights decoded."""

import numpy as np
import pytest

import tallcodec
from tallcodec import _core, errors
from tallcodec.errors import ArgumentError, TensorMismatchError

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
mt = pytest.importorskip("tallcodec.matmul_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
         torch.int8: "int8"}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# NumPy, in the interpreter, warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random_bits(n, share, seed):
    random = np.random.default_rng(seed)
    return torch.from_numpy(np.packbits(random.random(n) < share, bitorder="little"))


def random_weight(columns, inner, dtype, kinds, shared_dtype=torch.bfloat16, seed=0):
    """A weight, and a task for every word of ``kinds``."""
    n = columns * inner
    random = torch.Generator().manual_seed(seed)
    base = (torch.randn(columns, inner, generator=random) * 0.05).to(dtype)
    shared, scales = torch.randn(n, generator=random) * 0.01, None
    if shared_dtype == torch.int8:
        shared = torch.randint(-127, 128, (n,), generator=random, dtype=torch.int8)
        scales = (torch.rand(-(-n // 128), generator=random) * 1e-4).to(DEVICE)
    tasks = []
    for number, kind in enumerate(kinds.split()):
        mask, signs = (random_bits(n, 0.4, [seed, number, i]).to(DEVICE) for i in range(2))
        row_scales = (torch.rand(columns, generator=random) * 0.02).to(DEVICE)
        tasks.append({
            "tall": mt.TaskPlanes(mask, scale=1.0 + 0.37 * number),
            "row": mt.TaskPlanes(mask, row_scales=row_scales * 50),
            "ternary": mt.TaskPlanes(mask, signs, 0.013),
            "ternary-row": mt.TaskPlanes(mask, signs, row_scales=row_scales),
            "empty": mt.TaskPlanes(torch.zeros_like(mask)),
            "base": mt.TaskPlanes(),
        }[kind])
    has_shared = "tall" in kinds or kinds.startswith("row")
    return mt.TaskWeight(base.to(DEVICE), tasks,
                         shared.to(shared_dtype).to(DEVICE) if has_shared else None,
                         scales if has_shared else None)


def raw(tensor):
    tensor = tensor.cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def decoded(weight, task):
    """(N, K): a task's weight, by the scalar kernels."""
    planes = weight.tasks[task] if task >= 0 else mt.TaskPlanes()
    if planes.mask is None:
        return weight.base.cpu()
    dtype = weight.base.dtype
    if planes.signs is not None:
        values, values_dtype = raw(planes.signs), "signs"
    else:
        values, values_dtype = raw(weight.shared), NAMES[weight.shared.dtype]
    scales = raw(weight.scales) if values_dtype == "int8" else None

    def with_gain(gain):
        out = _core.kernels.decode(
            raw(weight.base).reshape(-1), values, raw(planes.mask), NAMES[dtype], values_dtype,
            NAMES[dtype], scales=scales, gain=gain, kernels="scalar")
        return torch.from_numpy(out).view(dtype).view(weight.base.shape)

    if planes.row_scales is None:
        return with_gain(planes.scale)
    return torch.stack([with_gain(gain)[n] for n, gain in enumerate(planes.row_scales.tolist())])


def check(y, x, weight, task_of_row, bias=None):
    """y is as exact as float32 sums and one rounding are."""
    inner, dtype = x.shape[-1], torch.finfo(x.dtype)
    weights = {task: decoded(weight, task).double() for task in set(task_of_row)}
    for row, (task, values) in enumerate(zip(task_of_row, x.cpu().double())):
        offset = 0 if bias is None else bias.cpu().double()
        exact = weights[task] @ values + offset
        size = weights[task].abs() @ values.abs() + abs(offset)
        bound = (inner + 1) * 2.0**-24 * size
        bound += dtype.eps / 2 * (exact.abs() + bound) + dtype.eps * dtype.smallest_normal
        error = (y[row].cpu().double() - exact).abs()
        assert (error <= bound).all(), (row, task, (error / bound).max())


def random_rows(rows, inner, dtype, tasks, seed=1):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=random).to(dtype).to(DEVICE)
    task_of_row = torch.randint(-1, tasks, (rows,), generator=random)
    return x, task_of_row


MIXED = "tall ternary row base ternary-row tall empty tall"


@pytest.mark.parametrize("rows", [1, 3, 17, 40, 150])
@pytest.mark.parametrize("inner", [1, 7, 64, 100, 129, 256])
def test_rows_of_many_tasks(inner, rows):
    dtype = FLOATS[(inner + rows) % 3]
    shared_dtype = [torch.int8, torch.bfloat16, torch.float32][rows % 3]
    weight = random_weight(70, inner, dtype, MIXED, shared_dtype)
    x, task_of_row = random_rows(rows, inner, dtype, 8)
    y = mt.matmul(x, weight, task_of_row.to(DEVICE))
    assert y.shape == (rows, 70) and y.dtype == dtype
    check(y, x, weight, task_of_row.tolist())


@pytest.mark.parametrize("kinds", ["tall", "row", "ternary", "ternary-row", "empty tall", "base"])
@pytest.mark.parametrize("shared_dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_kind_of_task(dtype, shared_dtype, kinds):
    weight = random_weight(33, 136, dtype, kinds, shared_dtype)
    x, _ = random_rows(5, 136, dtype, 1)
    check(mt.matmul(x, weight, 0), x, weight, [0] * 5)
    of_both = torch.tensor([0, -1, 0, -1, -1], dtype=torch.int32)
    check(mt.matmul(x, weight, of_both.to(DEVICE)), x, weight, of_both.tolist())


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("task", [-1, 0, 1])
def test_one_task_for_all_rows(task, rows):
    weight = random_weight(130, 72, torch.bfloat16, "tall ternary")
    x, _ = random_rows(rows, 72, torch.bfloat16, 1)
    check(mt.matmul(x, weight, task), x, weight, [task] * rows)


@pytest.mark.parametrize("inner", [36, 40])
@pytest.mark.parametrize("shared_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_have_the_bits_of_decoding(dtype, shared_dtype, inner):
    weight = random_weight(24, inner, dtype, MIXED, shared_dtype)
    identity = torch.eye(inner, dtype=dtype, device=DEVICE)
    for task in range(-1, 8):
        expected = decoded(weight, task).T
        assert torch.equal(mt.matmul(identity, weight, task).cpu(), expected)
    few, tasks = identity[:27], torch.arange(27) % 9 - 1
    rows = mt.matmul(few, weight, tasks.to(DEVICE)).cpu()
    for row, task in enumerate(tasks.tolist()):
        assert torch.equal(rows[row], decoded(weight, task)[:, row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_round_like_decoding(dtype):
    # Sums halfway between two values, denormals, overflow, and what is next to each.
    halfway = torch.tensor([0x3f808000, 0x3f818000, 0x3f808001, 0x3f801000, 0x3f803000, 0x477fefff,
                            0x477ff000, 0x38000000, 0x33000000, 0x33000001, 0x00008000, 0x00018000,
                            0x7f7f7fff, 0x7f7f8000, 0x807fffff, 0x80000000], dtype=torch.int64)
    shared = halfway.to(torch.int32).view(torch.float32).to(DEVICE)
    mask = torch.full((2,), 255, dtype=torch.uint8, device=DEVICE)
    for zero in (0.0, -0.0):
        base = torch.full((16, 1), zero, dtype=dtype, device=DEVICE)
        weight = mt.TaskWeight(base, [mt.TaskPlanes(mask)], shared)
        y = mt.matmul(torch.ones(1, 1, dtype=dtype, device=DEVICE), weight, 0)
        assert torch.equal(y[0].cpu(), decoded(weight, 0)[:, 0])


@pytest.mark.parametrize("rows", [9, 45])
def test_nonfinite_rows_keep_to_themselves(rows):
    weight = random_weight(40, 64, torch.bfloat16, "tall ternary")
    x, _ = random_rows(rows, 64, torch.bfloat16, 2)
    task_of_row = torch.arange(rows) % 3 - 1
    clean = mt.matmul(x, weight, task_of_row.to(DEVICE))
    x[4], x[5, 3], x[7] = float("nan"), float("inf"), float("-inf")
    y = mt.matmul(x, weight, task_of_row.to(DEVICE))
    others = [row for row in range(rows) if row not in (4, 5, 7)]
    assert torch.equal(y[others], clean[others])
    assert y[4].isnan().all() and not y[5].isfinite().any()


@pytest.mark.parametrize("rows", [4, 40])
def test_infinite_weights_keep_to_their_task(rows):
    base = torch.full((8, 16), 60000, dtype=torch.float16, device=DEVICE)
    mask = torch.full((16,), 255, dtype=torch.uint8, device=DEVICE)
    weight = mt.TaskWeight(base, [mt.TaskPlanes(mask, scale=1e4)], torch.ones(128, device=DEVICE))
    x = torch.zeros(rows, 16, dtype=torch.float16, device=DEVICE)
    task_of_row = torch.arange(rows, device=DEVICE) % 2 - 1
    y = mt.matmul(x, weight, task_of_row)
    assert y[1::2].isnan().all() and (y[::2] == 0).all()


@pytest.mark.parametrize("rows", [6, 48])
def test_leading_dimensions_strides_bias_and_out(rows):
    weight = random_weight(20, 64, torch.float32, "tall ternary")
    wide, task_of_row = random_rows(rows, 200, torch.float32, 2)
    x = wide[:, 10:74]
    bias = torch.linspace(-1, 1, 20, device=DEVICE)
    out = torch.full((2, rows // 2, 20), float("nan"), device=DEVICE)
    y = mt.matmul(x.view(2, rows // 2, 64), weight, task_of_row.to(DEVICE), bias, out)
    assert y is out
    check(y.view(rows, 20), x, weight, task_of_row.tolist(), bias)
    by_columns = x.T.contiguous().T
    assert torch.equal(mt.matmul(by_columns, weight, task_of_row.to(DEVICE), bias), y.view(-1, 20))
    assert mt.matmul(x[:0], weight, 1).shape == (0, 20)
    assert mt.matmul(x[0], weight, 1).shape == (20,)


def test_results_repeat_and_do_not_depend_on_the_order_of_rows():
    weight = random_weight(20, 256, torch.bfloat16, MIXED)
    x, task_of_row = random_rows(40, 256, torch.bfloat16, 8)
    y = mt.matmul(x, weight, task_of_row.to(DEVICE))
    for order in torch.randperm(40), torch.arange(40):
        again = mt.matmul(x[order.to(DEVICE)], weight, task_of_row[order].to(DEVICE))
        assert torch.equal(again, y[order.to(DEVICE)])


def test_numbers_that_are_no_task_are_the_base():
    weight = random_weight(8, 64, torch.float32, "tall")
    for rows in (3, 36):
        x, _ = random_rows(rows, 64, torch.float32, 1)
        strange = torch.tensor([2**40, -7, 1] * (rows // 3), device=DEVICE)
        check(mt.matmul(x, weight, strange), x, weight, [-1] * rows)


def test_linear():
    weight = random_weight(24, 64, torch.bfloat16, "tall ternary")
    rows = mt.TaskRows()
    bias = torch.ones(24, dtype=torch.bfloat16, device=DEVICE)
    layer = mt.TaskLinear(weight, rows, bias)
    x = random_rows(12, 64, torch.bfloat16, 1)[0].view(3, 4, 64)
    base = torch.nn.functional.linear(x, weight.base, bias)
    torch.testing.assert_close(layer(x), base)
    tasks = torch.tensor([1, -1, 0], device=DEVICE)
    with rows.use(tasks):
        y = layer(x)
        with rows.use(0):
            check(layer(x).view(12, 24), x.view(12, 64), weight, [0] * 12, bias)
        assert torch.equal(layer(x), y)
    check(y.view(12, 24), x.view(12, 64), weight, tasks.repeat_interleave(4).tolist(), bias)
    assert rows.current == -1 and not layer.state_dict()


def test_weights_that_do_not_fit():
    base = torch.zeros(4, 6, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    shared, ones = torch.zeros(24, device=DEVICE), torch.ones(3, device=DEVICE)
    planes = mt.TaskPlanes(mask)
    mt.TaskWeight(base, [planes], shared.view(4, 6))
    for arguments in [
        (base.view(-1), []), (base.T, []), (base.long(), []), (base[:0], []),
        (base, [planes], shared[:-1]), (base, [planes], shared.double()),
        (base, [planes], shared.to(torch.int8), ones[:2]),
        (base, [mt.TaskPlanes(mask[:-1])], shared), (base, [mt.TaskPlanes(mask.int())], shared),
        (base, [mt.TaskPlanes(mask, mask[:2])]),
        (base, [mt.TaskPlanes(mask, row_scales=ones)], shared),
        (base, [planes], shared.to("meta")),
    ]:
        with pytest.raises(TensorMismatchError, match="expected|no shared vector"):
            mt.TaskWeight(*arguments)
    for arguments in [(base, [planes]), (base, [mt.TaskPlanes(None, mask)]),
                      (base, [planes], shared.to(torch.int8)),
                      (base, [planes], shared, ones[:1])]:
        with pytest.raises(ArgumentError):
            mt.TaskWeight(*arguments)


def test_arguments_that_do_not_fit():
    weight = random_weight(8, 16, torch.bfloat16, "tall")
    x = torch.zeros(3, 16, dtype=torch.bfloat16, device=DEVICE)
    tasks = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for number in (1, -2, 0.5, [0, 0, 0]):
        with pytest.raises(ArgumentError, match="there are 1 tasks"):
            mt.matmul(x, weight, number)
    for arguments in [
        (x[:, :15], weight, 0), (x.float(), weight, 0), (x.to("meta"), weight, 0),
        (x, weight, tasks[:2]), (x, weight, tasks.float()), (x, weight, tasks.to("meta")),
        (x, weight, 0, x[0]), (x, weight, 0, torch.zeros(8, device=DEVICE)),
        (x, weight, 0, None, x[:, :8]), (x, weight, 0, None, x.new_zeros(2, 8)),
        (x, weight, 0, None, torch.zeros(3, 8, device=DEVICE)),
    ]:
        with pytest.raises(TensorMismatchError, match="expected"):
            mt.matmul(*arguments)


@pytest.mark.parametrize("backend", ["triton", "cuda" if DEVICE == "cuda" else "cuda-host"])
@pytest.mark.parametrize("coding", ["raw", "entropy"])
def test_weights_of_a_file(encode, monkeypatch, backend, coding):
    """Of tasks that follow the shared vector, are ternary, and are the base."""
    if backend == "triton" and coding == "entropy" and DEVICE == "cpu":
        pytest.skip("the interpreter is slow")
    random = np.random.default_rng(0)
    base = random.standard_normal((40, 72)).astype(np.float32)
    tasks = {name: base + random.standard_normal(base.shape).astype(np.float32) * 0.1
             for name in ("cars", "dtd", "svhn")} | {"same": base}
    head = {"head": np.ones(3, np.float32)}  # differs, so that no task is empty
    path = encode({"w": base, **head}, {name: {"w": w, "head": head["head"] * k}
                                        for k, (name, w) in enumerate(tasks.items())},
                  method={"cars": "tall", "dtd": "ternary", "svhn": "tall", "same": "tall"},
                  shared_dtype="int8", scale="unit-gain-row", coding=coding)
    monkeypatch.setenv("TALLCODEC_BACKEND", backend)
    x = torch.from_numpy(random.standard_normal((5, 72)).astype(np.float32)).to(DEVICE)
    with tallcodec.open(path) as file:
        weight = mt.TaskWeight.load(file, "w", device=DEVICE)
        rows = [0, 1, 2, 3, -1]
        y = mt.matmul(x, weight, torch.tensor(rows, device=DEVICE))
        for row, k in enumerate(rows):
            dense = file.decode(None if k < 0 else file.tasks[k], ["w"])["w"]
            expected = dense.double() @ x[row].cpu().double()
            assert torch.allclose(y[row].cpu().double(), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(errors.TaskNotFoundError):
            mt.TaskWeight.load(file, "w", ["boats"], DEVICE)


def test_a_weight_that_is_stored_as_it_is(encode, monkeypatch):
    monkeypatch.setenv("TALLCODEC_BACKEND", "cuda" if DEVICE == "cuda" else "cuda-host")
    base = np.ones((4, 8), np.float32)
    odd = base.copy()
    odd[0, 0] = np.nan
    path = encode({"w": base}, {"cars": {"w": odd}, "dtd": {"w": base * 2}})
    with tallcodec.open(path) as file:
        with pytest.raises(ArgumentError, match="'cars' has a 'w' of its own"):
            mt.TaskWeight.load(file, "w", device=DEVICE)
        monkeypatch.setenv("TALLCODEC_BACKEND", "cpu")
        with pytest.raises(ArgumentError, match="products are for GPUs"):
            mt.TaskWeight.load(file, "w", device="cpu")
