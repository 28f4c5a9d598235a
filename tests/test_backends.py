"""The device back-ends against the scalar kernels and the reference coders, bit for bit."""

import importlib

import numpy as np
import pytest

from tallcodec import _core
from tallcodec.backends import Block
from tallcodec.errors import FormatError
from tallcodec.reference import conditional, ternary

backends = importlib.import_module("tallcodec.backends")  # tallcodec.backends is a function
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
         "int8": torch.int8, "signs": torch.uint8}  # fmt: skip
FLOATS = ["float32", "float16", "bfloat16"]
LENGTHS = [0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 530, 4099]
GUARD = 64  # elements before and behind an output that must stay as they are
POISON = 0x5A


CUDA = "cuda" if torch.cuda.is_available() else "cuda-host"


@pytest.fixture(params=["triton", CUDA])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        from tallcodec.kernels_triton import TritonBackend

        return TritonBackend()
    from tallcodec.kernels_cuda import CudaBackend

    return CudaBackend(request.param)


@pytest.fixture
def short_blocks(backend, monkeypatch):
    """Blocks of coded planes, and units of sums, of 1,024 elements where Triton is interpreted."""
    if backend.name == "triton" and DEVICE == "cpu":
        from tallcodec import kernels_triton

        for name in ("TERNARY_BLOCK", "MASK_BLOCK", "UNIT"):
            monkeypatch.setattr(kernels_triton, name, 1024)
        monkeypatch.setattr(backends, "UNIT", 1024)
        monkeypatch.setattr(ternary, "BLOCK", 1024)
        monkeypatch.setattr(conditional, "BLOCK", 1024)


class Guarded:
    """Outputs in the middle of poisoned memory."""

    def __init__(self):
        self.made = []

    def __call__(self, n, dtype, offset=0):
        size = TORCH.get(dtype, dtype).itemsize
        memory = torch.full(((n + 2 * GUARD + offset) * size,), POISON, dtype=torch.uint8)
        memory = memory.to(DEVICE)
        start = (GUARD + offset) * size
        self.made.append((memory, start, start + n * size))
        return memory[start : start + n * size].view(TORCH.get(dtype, dtype))

    def check(self):
        for memory, start, end in self.made:
            assert (memory[:start] == POISON).all() and (memory[end:] == POISON).all()


@pytest.fixture
def guarded():
    outputs = Guarded()
    yield outputs
    outputs.check()


def raw(tensor):
    """A tensor's elements as the scalar kernels take them: 16-bit floats as uint16."""
    if tensor is None:
        return None
    tensor = tensor.cpu()
    return (tensor.view(torch.uint16) if tensor.dtype.itemsize == 2 else tensor).numpy()


def bits(tensor):
    """Elements by their bits."""
    words = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}
    return tensor.cpu().view(words[tensor.dtype.itemsize]).numpy()


def assert_same(found, expected, but=None):
    """The same bits, but for elements where any NaN will do."""
    found, expected = found.cpu(), expected.cpu()
    different = bits(found) != bits(expected)
    if but is not None:
        different &= ~(but & found.isnan() & expected.isnan()).numpy()
    assert not different.any(), np.flatnonzero(different)[:10]


def at_offset(tensor, offset):
    """The same elements on the device, so many of them behind the beginning of memory."""
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=DEVICE)
    memory[offset:] = tensor
    return memory[offset:]


AWKWARD = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001, 0x7FA12345, 1,
                    0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x477FF000, 0x387FFFFF,
                    0x33000000], np.uint32).view(np.float32)  # fmt: skip


def values(n, dtype, random, spread=0.02):
    """Ordinary numbers, one in eight of them replaced by an awkward one."""
    x = (random.standard_normal(n) * spread).astype(np.float32)
    at = random.random(n) < 1 / 8
    x[at] = random.choice(AWKWARD, int(at.sum()))
    if dtype == "float32":
        return torch.from_numpy(x)
    x = torch.from_numpy(x).to(TORCH[dtype])
    at = torch.from_numpy(random.random(n) < 1 / 16)
    x[at] = torch.from_numpy(random.integers(0, 65536, n).astype(np.uint16)).view(TORCH[dtype])[at]
    return x


def packed(n, random):
    return torch.from_numpy(random.integers(0, 256, -(-n // 8)).astype(np.uint8))


def shared_of(n, phase, dtype, random):
    """(shared, scales) of elements that begin at the phase."""
    if dtype == "signs":
        return packed(phase + n, random), None
    if dtype == "int8":
        q = torch.from_numpy(random.integers(-127, 128, n).astype(np.int8))
        scales = (random.standard_normal(-(-(phase + n) // 128)) * 0.001).astype(np.float32)
        scales[random.random(scales.size) < 1 / 4] = 1e-40
        return q, torch.from_numpy(scales)
    return values(n, dtype, random), None


def block_of(n, base="float32", shared="float32", phase=0, seed=0, **options):
    """A block on the CPU, without an output."""
    random = np.random.default_rng([seed, n, phase])
    stored, scales = shared_of(n, phase, shared, random)
    return Block(n, values(n, base, random), None, packed(phase + n, random), stored, scales,
                 phase=phase, **options)  # fmt: skip


def to_device(block, offset=0):
    fields = ("base", "mask", "shared", "scales", "row_scales")
    return block._replace(**{name: at_offset(getattr(block, name), offset)
                             for name in fields if getattr(block, name) is not None})  # fmt: skip


def name_of(tensor):
    return next((name for name, dtype in TORCH.items() if dtype == tensor.dtype), None)


def behind(phase, tensor):
    """The same elements with so many zeros before them."""
    return torch.cat([torch.zeros(phase, dtype=tensor.dtype), tensor])


def decoded(block, out):
    """What the scalar kernels decode, row by row where there are scales of rows."""
    rows = [(0, block.n, block.scale)]
    if block.row_scales is not None:
        rows = [(r * block.row_length, block.row_length, g)
                for r, g in enumerate(block.row_scales.tolist())]  # fmt: skip
    parts = []
    for at, n, scale in rows:
        first, phase = divmod(block.phase + at, 128)
        n = min(n, block.n - at)
        base = behind(phase, block.base[at : at + n])
        shared, scales, mask, dtype = block.shared, block.scales, block.mask, "float32"
        if mask is not None:
            here = slice(first * 16, first * 16 - -(phase + n) // 8)
            mask, dtype = mask[here], name_of(shared)
            shared = shared[here] if dtype == "signs" else behind(phase, shared[at : at + n])
        if scales is not None:
            scales = scales[first : first - -(phase + n) // 128]
        parts.append(_core.kernels.decode(
            raw(base), raw(shared), raw(mask), name_of(base), dtype, out, scales=raw(scales),
            gain=scale, kernels="scalar").view(raw(torch.empty(0, dtype=TORCH[out])).dtype)[phase:])
    return torch.from_numpy(np.concatenate(parts)).view(TORCH[out])


def selected(block):
    mask = np.unpackbits(block.mask.numpy(), bitorder="little")
    return torch.from_numpy(mask[block.phase : block.phase + block.n].astype(bool))


def check_decode(backend, guarded, block, out, offset=0):
    here = to_device(block, offset)._replace(out=guarded(block.n, out, offset))
    backend.decode([here])
    assert_same(here.out, decoded(block, out), selected(block))


@pytest.mark.parametrize("shared", [*FLOATS, "int8", "signs"])
@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("base", FLOATS)
def test_decode(backend, guarded, base, out, shared):
    for phase in (0, 37):
        check_decode(backend, guarded, block_of(1300, base, shared, phase, scale=1.7), out)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("shared", ["bfloat16", "int8", "signs"])
def test_decode_any_length_phase_and_alignment(backend, guarded, shared, n):
    for phase in (0, 1, 8, 63, 120, 127):
        block = block_of(n, "bfloat16", shared, phase)
        check_decode(backend, guarded, block, "bfloat16", offset=phase % 3)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1.0, -1.0, 1e-40, 3e38])
def test_decode_with_any_scale(backend, guarded, scale):
    scale = float(np.float32(scale))
    check_decode(backend, guarded, block_of(999, scale=scale), "float32")


@pytest.mark.parametrize("length, rows", [(1, 300), (3, 500), (8, 99), (100, 29), (1024, 3),
                                          (1500, 3), (4096, 1)])  # fmt: skip
@pytest.mark.parametrize("phase", [0, 13, 64])
def test_decode_with_scales_of_rows(backend, guarded, length, rows, phase):
    random = np.random.default_rng(rows)
    scales = torch.from_numpy(random.standard_normal(rows).astype(np.float32))
    for shared in ("float32", "int8"):
        block = block_of(length * rows, "bfloat16", shared, phase, row_scales=scales,
                         row_length=length)  # fmt: skip
        check_decode(backend, guarded, block, "bfloat16")


def test_decode_of_several_blocks(backend, guarded):
    blocks = [block_of(n, "float16", shared, 9) for n, shared in
              [(100, "int8"), (0, "float32"), (2000, "signs"), (77, "float16")]]  # fmt: skip
    here = [to_device(b)._replace(out=guarded(b.n, "float16")) for b in blocks]
    backend.decode(here)
    for block, decoding in zip(blocks, here):
        assert_same(decoding.out, decoded(block, "float16"), selected(block))


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("base", FLOATS)
def test_conversion_of_every_value(backend, guarded, base, out):
    if base == "float32":
        # Every exponent, and around every middle between two bfloat16 or two float16 values.
        low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001], np.uint32)
        words = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low).reshape(-1)
    else:
        words = np.arange(65536, dtype=np.uint16)
    block = Block(words.size, torch.from_numpy(words).view(TORCH[base]), None)
    here = to_device(block)._replace(out=guarded(block.n, out))
    backend.decode([here])
    assert_same(here.out, decoded(block, out))


def family(n, base="float32", tasks=("float32",), seed=0):
    """A base and tasks, a third of each as the base, all with awkward values of their own."""
    random = np.random.default_rng([seed, n, len(tasks)])
    b = values(n, base, random)
    made = []
    for dtype in tasks:
        tau = (random.standard_normal(n) * 0.002).astype(np.float32)
        tau[random.random(n) < 1 / 3] = 0
        task = (b.float() + torch.from_numpy(tau)).to(TORCH[dtype])
        odd = torch.from_numpy(random.random(n) < 1 / 50)
        task[odd] = values(n, dtype, random)[odd]
        made.append(task)
    return b, made


def check_encode(backend, base, tasks, thresholds, shared="float32", rule="published", offset=0):
    encoded = backend.encode(at_offset(base, offset), [at_offset(t, offset) for t in tasks],
                             thresholds, TORCH[shared], rule)  # fmt: skip
    expected = _core.kernels.encode(
        raw(base), [raw(t) for t in tasks], name_of(base), thresholds, shared, rule=rule,
        kernels="scalar", task_dtypes=[name_of(t) for t in tasks])  # fmt: skip
    assert encoded.shared.dtype == TORCH[shared]
    assert bits(encoded.shared).tobytes() == expected["shared"].tobytes()
    assert (encoded.scales is not None) == (shared == "int8")
    if shared == "int8":
        assert bits(encoded.scales).tobytes() == expected["scales"].tobytes()
    for mask, other in zip(encoded.masks, expected["masks"], strict=True):
        np.testing.assert_array_equal(mask.cpu().numpy(), other)
    stats = expected["stats"]
    assert encoded.set_bits.tolist() == [s["set_bits"] for s in stats]
    assert encoded.published_bits.tolist() == [s["published_bits"] for s in stats]
    assert encoded.agreement.tolist() == expected["agreement"]
    nonfinite = [s["nonfinite"] for s in stats] + [expected["base_nonfinite"]]
    assert encoded.nonfinite.bool().tolist() == nonfinite
    dtypes = {t.dtype for t in (encoded.set_bits, encoded.published_bits, encoded.agreement)}
    assert dtypes == {torch.int64} and encoded.nonfinite.dtype == torch.int32


@pytest.mark.parametrize("shared", [*FLOATS, "int8"])
@pytest.mark.parametrize("rule", ["published", "magnitude", "adapted"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_encode(backend, dtype, rule, shared):
    thresholds = {"published": [0.4, 0.2, 1.0], "magnitude": [0.001, 0, 0.003],
                  "adapted": [0.4, 1.875, 1e-3]}[rule]  # fmt: skip
    check_encode(backend, *family(2500, dtype, [dtype] * 3), thresholds, shared, rule)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("shared", ["float16", "int8"])
def test_encode_any_length_and_alignment(backend, shared, n):
    for offset in range(2):
        base, tasks = family(n, "bfloat16", ["bfloat16"] * 2)
        check_encode(backend, base, tasks, [0.4, 0.6], shared, offset=offset)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 40, 100])
def test_encode_any_number_of_tasks(backend, count):
    base, tasks = family(700, "float32", ["float32"] * count)
    check_encode(backend, base, tasks, [0.4] * count)


@pytest.mark.parametrize("base", FLOATS)
def test_encode_tasks_of_several_dtypes(backend, base):
    base, tasks = family(1500, base, ["bfloat16", "float32", "float16", "bfloat16"])
    check_encode(backend, base, tasks, [0.4] * 4, "bfloat16")
    check_encode(backend, base, tasks[2:3], [0.4], "bfloat16")


@pytest.mark.parametrize("shared", [*FLOATS, "int8"])
def test_encode_extremes(backend, shared):
    """Sums that overflow, blocks of denormals, blocks without any difference."""
    base = torch.zeros(1024)
    tasks = [torch.zeros(1024) for _ in range(2)]
    for task in tasks:
        task[:128] = torch.linspace(-3.4e38, 3.4e38, 128)
        task[128:256] = torch.arange(128) * 1e-45
        task[256:384] = torch.arange(-64, 64) * 1e-42
        task[512:640] = torch.linspace(-7e4, 7e4, 128)
    tasks[0][640:768], tasks[1][640:768] = 1, -1
    check_encode(backend, base, tasks, [0.4, 0.4], shared)
    check_encode(backend, base, tasks[:1], [-1.0], shared, "magnitude")


def test_encode_with_a_vector_of_its_own(backend):
    base, tasks = family(1300, "bfloat16", ["bfloat16"] * 3)
    merged = sum((t.float() - base.float() for t in tasks[:2]), torch.zeros(1300))
    base, tasks = base.to(DEVICE), [t.to(DEVICE) for t in tasks]
    for shared in ("float32", "int8"):
        expected = backend.encode(base, tasks[:2], [0.4, 0.4], TORCH[shared])
        encoded = backend.encode(base, tasks, [0.4] * 3, TORCH[shared], merged=merged.to(DEVICE))
        assert_same(encoded.shared, expected.shared)
        assert len(encoded.masks) == 3
        for mask, other in zip(encoded.masks, expected.masks):
            assert_same(mask, other)
        assert encoded.published_bits.tolist()[:2] == expected.published_bits.tolist()


def expected_sums(block, task):
    """By unit, from the scalar kernel."""
    sums = []
    for at in range(0, block.n, backends.UNIT):
        n = min(backends.UNIT, block.n - at)
        first = (block.phase + at) // 128
        here = slice(first * 16, first * 16 - -(block.phase % 128 + n) // 8)
        scales, shared = block.scales, block.shared
        if block.mask is not None:
            shared = shared[here] if name_of(shared) == "signs" else shared[at : at + n]
        if scales is not None:
            scales = scales[first : first - -(block.phase + n) // 128]
        result = _core.kernels.sums(
            raw(block.base[at : at + n]), raw(shared),
            None if block.mask is None else raw(block.mask[here]), raw(task[at : at + n]),
            name_of(block.base), "float32" if shared is None else name_of(shared), name_of(task),
            scales=raw(scales), phase=block.phase, kernels="scalar")  # fmt: skip
        sums.append([result[name] for name in ("tau_sq", "dot", "approx_sq")])
    return torch.from_numpy(np.array(sums).reshape(-1, 3, 16))


def check_sums(backend, block, task):
    sums = backend.sums(to_device(block, 1), at_offset(task, 1))
    expected = expected_sums(block, task)
    assert sums.shape == expected.shape and sums.dtype == torch.float64
    assert_same(sums, expected, torch.tensor(True))


@pytest.mark.parametrize("shared", [*FLOATS, "int8"])
@pytest.mark.parametrize("base, task", [("float32", "float16"), ("bfloat16", "bfloat16"),
                                        ("float16", "float32")])  # fmt: skip
def test_sums(backend, base, task, shared):
    for phase in (0, 5, 127):
        block = block_of(300, base, shared, phase, scale=3.0)
        clean = [t.nan_to_num(0.5, 0.25, -0.25) for t in (block.base, values(300, task,
                 np.random.default_rng(7)))]  # fmt: skip
        check_sums(backend, block._replace(base=clean[0]), clean[1])


def test_sums_of_signs_and_of_no_mask(backend):
    block = block_of(300, "bfloat16", "signs")
    block = block._replace(base=block.base.nan_to_num(0.5))
    task = values(300, "bfloat16", np.random.default_rng(7)).nan_to_num(0.5)
    check_sums(backend, block, task)
    check_sums(backend, Block(300, block.base, None), task)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 129])
def test_sums_any_length(backend, n):
    block = block_of(n, shared="int8", phase=3)
    check_sums(backend, block, values(n, "float32", np.random.default_rng(n)))


def test_sums_by_units(backend, short_blocks):
    n = 2 * backends.UNIT + 100
    random = np.random.default_rng(0)
    base, task = (torch.from_numpy(random.standard_normal(n).astype(np.float32)) for _ in range(2))
    block = Block(n, base, None, packed(n + 9, random), *shared_of(n, 9, "int8", random), phase=9)
    check_sums(backend, block, task)


@pytest.mark.parametrize("n", [*LENGTHS, 70001])
def test_masks_together(backend, n):
    for count in (1, 3, 8, 40) if n == 257 else (1, 5):
        random = np.random.default_rng([n, count])
        masks = [packed(n, random) for _ in range(count)]
        here = [at_offset(mask, k % 3) for k, mask in enumerate(masks)]
        masks = [mask.numpy() for mask in masks]
        kernels = _core.kernels
        assert backend.agreement(here, n).tolist() == kernels.agreement(masks, n, kernels="scalar")
        pairs = np.array(kernels.overlap(masks, n, kernels="scalar")).reshape(count, count)
        expected = np.triu(pairs) + np.triu(pairs, 1).T
        np.testing.assert_array_equal(backend.overlap(here, n).cpu().numpy(), expected)
        for least in {1, 2, count, count + 1}:
            mask = backend.consensus(here, n, least).cpu().numpy()
            expected = kernels.consensus(masks, n, least, kernels="scalar")
            np.testing.assert_array_equal(mask, expected)


def slots_of(plane, n):
    """(bytes before its blocks, what each slot stands for) of a coded ternary plane."""
    at = 8 * -(-n // ternary.BLOCK)
    symbols = np.flatnonzero(np.unpackbits(plane[at : at + 9], bitorder="little"))
    head = at + 9 - -11 * symbols.size // 8
    table = int.from_bytes(plane[at + 9 : head].tobytes(), "little")
    slots = []
    for k, s in enumerate(symbols.tolist()):
        share, gap = (table >> 11 * k & 2047) + 1, ((4 + s % 4) << s // 4) - 4
        slots += [share | rank << 16 | gap << 32 | s // 4 << 59 for rank in range(share)]
    return head, torch.from_numpy(np.array(slots or [0] * 2048, np.uint64).view(np.int64))


def placed(array):
    """Bytes on the device, at an odd address."""
    return at_offset(torch.from_numpy(np.array(array)), 1)


def ternary_vector(n, density, random):
    signs = random.choice(np.array([-1, 1], np.int8), n)
    signs[random.random(n) >= density] = 0
    return signs


def check_ternary(backend, guarded, plane, head, slots, n, expected):
    """``expected``: the vector, or None where the plane is not sound."""
    mask, signs = (guarded(-(-n // 8), torch.uint8) for _ in range(2))
    status = guarded(1, torch.int32).zero_()
    backend.unpack_ternary(placed(plane), head, slots.to(DEVICE), n, mask, signs, status)
    assert status.item() == (expected is None)
    if expected is not None:
        unpacked = np.concatenate([mask.cpu().numpy(), signs.cpu().numpy()])
        assert unpacked.tobytes() == ternary.raw(expected)
    guarded.check()


@pytest.mark.parametrize("n, density", [(0, 0), (1, 0), (1, 1), (7, 0.5), (9, 1), (1000, 0.02),
                                        (1003, 0.3), (399, 0.9), (200001, 0.001)])  # fmt: skip
def test_unpack_ternary(backend, guarded, n, density):
    signs = ternary_vector(n, density, np.random.default_rng(n))
    plane = np.frombuffer(ternary.code(signs), np.uint8)
    check_ternary(backend, guarded, plane, *slots_of(plane, n), n, signs)


def with_another_end(plane, blocks):
    """A coded plane, each block in turn ending before its beginning, elsewhere, or behind it."""
    for k in range(blocks):
        for byte, value in [(0, 0), (3, 1), (7, 0xFF)]:
            damaged = plane.copy()
            damaged[8 * k + byte] = value
            yield damaged


def test_unpack_ternary_of_several_blocks(backend, guarded, short_blocks):
    block = ternary.BLOCK
    n = 4 * block + 77
    signs = np.zeros(n, np.int8)
    random = np.random.default_rng(0)
    signs[:100] = ternary_vector(100, 0.3, random)
    signs[block - 1] = -1
    signs[block : 2 * block : block // 9] = 1
    signs[4 * block + 40 :] = ternary_vector(37, 0.3, random)
    plane = np.frombuffer(ternary.code(signs), np.uint8)
    head, slots = slots_of(plane, n)
    check_ternary(backend, guarded, plane, head, slots, n, signs)
    check_ternary(backend, guarded, plane[:-1], head, slots, n, None)
    for damaged in with_another_end(plane, 5):
        found = ternary_or_none(damaged, n)
        check_ternary(backend, guarded, damaged, head, slots, n, found)


def ternary_or_none(plane, n):
    try:
        return ternary.decode(plane.tobytes(), n)
    except FormatError:
        return None


@pytest.mark.parametrize("seed", range(3))
def test_unsound_ternary_planes(backend, guarded, seed):
    random, n = np.random.default_rng(seed), 71
    signs = ternary_vector(n, [0.2, 0.4, 0.9][seed], random)
    plane = np.frombuffer(ternary.code(signs), np.uint8)
    head, slots = slots_of(plane, n)
    refused = 0
    for at in [*range(head, head + 16), *random.integers(head + 16, plane.size, 8).tolist()]:
        damaged = plane.copy()
        damaged[at] ^= 1 << random.integers(8)
        found = ternary_or_none(damaged, n)
        refused += found is None
        check_ternary(backend, guarded, damaged, head, slots, n, found)
    assert refused > 8
    for size in range(head, plane.size, 7):
        short = plane[:size].copy()
        short[:8] = np.array([size - head], np.uint64).view(np.uint8)
        check_ternary(backend, guarded, short, head, slots, n, ternary_or_none(short, n))


def float32_shared(shared, scales):
    if scales is None:
        return shared.float().numpy()
    return shared.numpy().astype(np.float32) * np.repeat(scales.numpy(), 128)[: shared.numel()]


def check_mask(backend, guarded, plane, n, shared, scales, expected):
    mask, status = guarded(-(-n // 8), torch.uint8), guarded(1, torch.int32).zero_()
    scales = None if scales is None else at_offset(scales, 1)
    backend.unpack_mask(placed(plane), n, at_offset(shared, 1), scales, mask, status)
    assert status.item() == (expected is None)
    if expected is not None:
        assert mask.cpu().numpy().tobytes() == np.packbits(expected, bitorder="little").tobytes()
    guarded.check()


def mask_of(s, random):
    """Bits that are likelier where s is large; never where it is 0."""
    return (np.abs(s) * random.random(s.size) > 0.008) & (s != 0)


def mask_or_none(plane, s):
    try:
        return conditional.decode(plane.tobytes(), s)
    except FormatError:
        return None


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("shared", [*FLOATS, "int8"])
def test_unpack_mask(backend, guarded, shared, n):
    random = np.random.default_rng(n)
    stored, scales = shared_of(n, 0, shared, random)
    if shared != "int8":
        stored[~stored.isfinite()] = 0
    s = float32_shared(stored, scales)
    mask = mask_of(s, random)
    mask[64:128] = False
    plane = np.frombuffer(conditional.code(mask, s), np.uint8)
    check_mask(backend, guarded, plane, n, stored, scales, mask)


def test_unpack_mask_of_several_blocks(backend, guarded, short_blocks):
    block = conditional.BLOCK
    n = 3 * block + 77
    random = np.random.default_rng(0)
    s = (random.standard_normal(n) * 0.02).astype(np.float32)
    mask = np.zeros(n, bool)
    for at in (100, block - 70, 3 * block):
        mask[at : at + 130] = mask_of(s[at : at + 130], random)
    plane = np.frombuffer(conditional.code(mask, s), np.uint8)
    shared = torch.from_numpy(s)
    check_mask(backend, guarded, plane, n, shared, None, mask)
    check_mask(backend, guarded, plane[:-1], n, shared, None, None)
    check_mask(backend, guarded, plane[:31], n, shared, None, None)
    for damaged in with_another_end(plane, 4):
        found = mask_or_none(damaged, s)
        check_mask(backend, guarded, damaged, n, shared, None, found)


def test_unpack_the_last_of_long_blocks(backend, guarded):
    n = 2 * conditional.BLOCK + 77
    random = np.random.default_rng(0)
    stored, scales = shared_of(n, 0, "int8", random)
    s = float32_shared(stored, scales)
    mask, signs = np.zeros(n, bool), np.zeros(n, np.int8)
    mask[-70:] = mask_of(s[-70:], random)
    signs[-70:] = ternary_vector(70, 0.3, random)
    plane = np.frombuffer(conditional.code(mask, s), np.uint8)
    check_mask(backend, guarded, plane, n, stored, scales, mask)
    plane = np.frombuffer(ternary.code(signs), np.uint8)
    check_ternary(backend, guarded, plane, *slots_of(plane, n), n, signs)


@pytest.mark.parametrize("seed", range(2))
def test_unsound_masks(backend, guarded, seed):
    random, n = np.random.default_rng(seed), 130
    shared = values(n, "bfloat16", random)  # with NaN, which no writer stores
    s = shared.float().numpy()
    mask = mask_of(s, random) & np.isfinite(s)
    plane = np.frombuffer(conditional.code(mask, np.where(np.isnan(s), 0, s)), np.uint8)
    refused = 0
    for at in [*range(20), *random.integers(20, plane.size, 16).tolist()]:
        damaged = plane.copy()
        damaged[at] ^= 1 << random.integers(8)
        found = mask_or_none(damaged, s)
        refused += found is None
        check_mask(backend, guarded, damaged, n, shared, None, found)
    assert refused > 20
    for size in range(8, plane.size, 31):
        short = plane[:size].copy()
        short[:8] = np.array([size - 8], np.uint64).view(np.uint8)
        check_mask(backend, guarded, short, n, shared, None, mask_or_none(short, s))
