"""What back-ends decode on a device: the bits of the CPU, its errors, in whatever memory."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import tallcodec
from helpers import (
    BF16,
    assert_same,
    awkward,
    encoded,
    normal,
    numpy_state,
    same,
    small_family,
    torch_state,
    write_safetensors,
)
from tallcodec import errors, numbers

torch = pytest.importorskip("torch")

from tallcodec import device as device_module  # noqa: E402
from tallcodec.kernels_cuda import CudaBackend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter

ROOT = Path(__file__).parents[1]
WAYS = {
    "masks": {},
    "published": {"threshold": 0.4, "scale": "none", "shared_dtype": "bfloat16"},
    "coded masks": {"coding": "entropy", "shared_dtype": "float16"},
    "coded int8": {"coding": "entropy", "scale": "unit-gain-row", "shared_dtype": "int8",
                   "base_storage": "reference"},
    "int8": {"coding": "raw", "scale": "unit-gain-row", "shared_dtype": "int8"},
    "ternary": {"method": "ternary"},
    "mixed": {"method": {"cars": "ternary", "dtd": "tall", "aircraft": "ternary"},
              "coding": "raw"},
}  # fmt: skip
way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


def family(big=False):
    base, tasks, _ = awkward(3, big=big)
    sparse = normal((9, 300), 7)
    for k, state in enumerate((base, *tasks.values())):
        state["table"] = np.full(3000, k)  # worth a zstd frame
        state["sparse"] = sparsely_changed(sparse, k)  # worth coding its mask
    return base, tasks


def sparsely_changed(array, k):
    random = np.random.default_rng(k)
    return array + normal(array.shape, k, spread=0.1) * (random.random(array.shape) < 0.1)


FEW = [
    "layer.float32.7x33", "layer.float16.1x260", "layer.bfloat16.530", "layer.float32.scalar",
    "layer.float32.0", "mixed.float32.one", "equal.some", "sparse", "table", "verbatim.bool",
    "head.weight", "extra.cars", "missing.one", "tied.a", "tied.b", "nonfinite.float32.one",
]  # fmt: skip


def is_slow(device):
    """Whether programs are interpreted."""
    return os.environ["TALLCODEC_BACKEND"] == "triton" and device == "cpu"


@pytest.fixture
def kinds(device):
    """A base and its tasks, of fewer tensors where the back-end is slow."""
    base, tasks = family()
    if not is_slow(device):
        return base, tasks
    base, *states = ({n: state[n] for n in FEW if n in state} for state in (base, *tasks.values()))
    return base, dict(zip(tasks, states))


@pytest.fixture
def fast(device):
    if is_slow(device):
        pytest.skip("the interpreter is slow")
    return device


def on_cpu(path, base=None, **options):
    """What the core decodes of every task."""
    with tallcodec.open(path, "np", base, **options) as file:
        return {task: file.decode(task) for task in (None, *file.tasks)}


@way
def test_the_same_is_decoded(encode, device, kinds, options):
    base, tasks = kinds
    path = encode(base, tasks, **options)
    given = base if "base_storage" in options else None
    with tallcodec.open(path, base=given) as file:
        for task, expected in on_cpu(path, given).items():
            if is_slow(device) and task in ("dtd", "aircraft") and options.get("coding") != "raw":
                continue
            found = file.decode(task, device=device)
            assert all(t.device.type == device for t in found.values())
            assert_same(numpy_state(found), expected)
            loaded = file.load(task, device)
            assert_same(numpy_state(loaded.decode()), expected)
            assert_same(numpy_state(loaded.decode(["table"])), {"table": expected["table"]})
            with tallcodec.open(path, "np", given) as core:
                assert loaded.nbytes == core.load(task).nbytes


@way
def test_large_tensors_in_parts(encode, fast, options, monkeypatch):
    base, tasks = family(big=True)
    path = encode(base, tasks, **options)
    given = base if "base_storage" in options else None
    for batch in (64 << 20, 8 * 50_001):
        monkeypatch.setattr("tallcodec.checkpoint_write._BATCH_BYTES", batch)
        monkeypatch.setattr("tallcodec.device._BATCH_BYTES", batch)
        with tallcodec.open(path, base=given) as file:
            for task, expected in on_cpu(path, given).items():
                assert_same(numpy_state(file.decode(task, device=fast)), expected)
            assert_same(numpy_state(file.load(task, fast).decode()), expected)


@way
def test_rows_are_those_of_the_whole_tensor(encode, device, kinds, options):
    base, tasks = kinds
    if is_slow(device) and options.get("coding") != "raw":
        pytest.skip("unpacks a plane for every row: the interpreter is slow")
    path = encode(base, tasks, **options)
    given = base if "base_storage" in options else None
    expected = on_cpu(path, given)
    with tallcodec.open(path, base=given) as file:
        for task in ("cars", "dtd"):
            for name, whole in expected[task].items():
                if not whole.ndim or not len(whole):
                    continue
                start = len(whole) // 3
                for stop in {start, start + 1, len(whole)}:
                    part = file.decode_rows(task, name, start, stop, device=device)
                    assert same(numpy_state({name: part})[name], whole[start:stop]), name


@way
def test_rows_of_large_tensors(encode, fast, options):
    base, tasks = family(big=True)
    names = [n for n in base if n.startswith("big")]
    base = {n: base[n] for n in names}
    path = encode(base, {t: {n: s[n] for n in names} for t, s in tasks.items()}, **options)
    given = base if "base_storage" in options else None
    expected = on_cpu(path, given)["cars"]
    with tallcodec.open(path, base=given) as file:
        for name, first, last in (("big.flat", 0, 5), ("big.flat", 262_143, 262_146),
                                  ("big.flat", 524_280, 600_001), ("big.rows", 1, 3),
                                  ("big.many rows", 600, 1201)):  # fmt: skip
            rows = file.decode_rows("cars", name, first, last, device=fast)
            assert same(numpy_state({name: rows})[name], expected[name][first:last]), name


def test_only_what_the_rows_need_is_checked(tmp_path, fast):
    base = {"w": np.zeros((4, 400_000), np.float32)}
    tasks = {"t": {"w": np.ones((4, 400_000), np.float32)}}
    path = tmp_path / "x.tall"
    data = bytearray(encoded(path, base, tasks))
    data[192 + 4 * 400_000 * 3] ^= 1  # where the base's last row begins
    path.write_bytes(data)
    with tallcodec.open(path) as file:
        assert (file.decode_rows("t", "w", 0, 2, device=fast) == 1).all()
        with pytest.raises(errors.ChecksumError, match="base plane of tensor 'w'"):
            file.decode_rows("t", "w", 2, 4, device=fast)
        (record,) = file._device_plan(0, [(0, 400_000, 400_000)], (), True, None).tensors()
        assert record["base"][2] == 4 * 400_000 and record["start"] == 400_000
        assert record["mask"][2] == 50_000


def test_a_referenced_base_in_a_file(encode, device, tmp_path):
    base, tasks = small_family(dtype=BF16)
    given = write_safetensors(tmp_path / "base.safetensors", base)
    path = encode(base, tasks, base_storage="reference")
    with tallcodec.open(path, base=given) as file:
        for task, expected in on_cpu(path, base).items():
            assert_same(numpy_state(file.decode(task, device=device)), expected)
            assert_same(numpy_state(file.load(task, device).decode()), expected)
    other = base | {"a.bias": base["a.weight"][0]}
    for other in (other, write_safetensors(tmp_path / "other.safetensors", other)):
        with tallcodec.open(path, base=other) as file:
            for call in (file.load, file.decode):
                with pytest.raises(errors.BaseMismatchError, match="differs in .* 'a.bias'"):
                    call("cars", device=device)
    with tallcodec.open(path) as file:
        with pytest.raises(errors.BaseMismatchError, match="pass the base"):
            file.decode("cars", device=device)


def test_lazily_and_into_models(small_file, device):
    with tallcodec.open(small_file) as file:
        state, expected = file.state_dict("cars", device), on_cpu(small_file)["cars"]
        assert state["a.bias"].device.type == device
        assert_same(numpy_state(dict(state)), expected)
        linear = torch.nn.Linear(40, 6, bias=False, device=device)
        linear.load_state_dict({"weight": state["a.weight"]})
        assert same(numpy_state({"w": linear.weight})["w"], expected["a.weight"])


# The caller's memory.


class Foreign:
    """Memory of another framework."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_into_the_callers_memory(small_file, device):
    expected = on_cpu(small_file)["cars"]
    out = {
        "a.weight": torch.zeros(6, 40, device=device, requires_grad=True),
        "a.bias": Foreign(torch.zeros(40, device=device)),
        "b.weight": np.zeros((5, 129), np.float32),
    }
    with tallcodec.open(small_file) as file:
        for result in (file.decode("cars", out=out), file.decode("cars", list(out), out)):
            assert all(result[name] is out[name] for name in out)
            assert same(numpy_state({"w": out["a.weight"]})["w"], expected["a.weight"])
            assert same(numpy_state({"b": out["a.bias"].tensor})["b"], expected["a.bias"])
            assert same(out["b.weight"], expected["b.weight"])
        rows = torch.zeros(9, 40, device=device)[2:4]
        assert file.decode_rows("cars", "a.weight", 1, 3, rows) is rows
        assert same(numpy_state({"r": rows})["r"], expected["a.weight"][1:3])
        loaded, out = file.load("cars", device), torch.zeros(6, 40, device=device)
        assert loaded.decode(["a.weight"], {"a.weight": out})["a.weight"] is out
        assert same(numpy_state({"w": out})["w"], expected["a.weight"])


def test_tensors_of_inference_mode_are_written_to(encode, device):
    base, tasks = small_family()
    tasks["cars"]["a.bias"] = base["a.bias"]  # is copied
    with tallcodec.open(encode(base, tasks)) as file, torch.inference_mode():
        out = {n: torch.zeros(a.shape, device=device) for n, a in base.items()}
    with tallcodec.open(file._path) as file:
        file.load("cars", device).decode(out=out)
        assert_same(numpy_state(out), on_cpu(file._path)["cars"])
        made = file.decode("cars", device=device)["a.bias"]
        assert not made.is_inference()


def test_the_cpu_decodes_and_copies_where_it_is_forced(small_file, monkeypatch):
    monkeypatch.setenv("TALLCODEC_BACKEND", "cpu")
    cuda = torch.device("cuda")
    with tallcodec.open(small_file) as file:
        number = file._number("cars")
        result, groups = file._targets(number, None, None, None)
        for targets in groups.values():
            file._decode_to(cuda, file._backend(cuda), number, targets)
        assert_same(numpy_state(result), on_cpu(small_file)["cars"])


@pytest.mark.parametrize("flaw, match", [
    (lambda t: t.double(), "F64"), (lambda t: t[:3], r"F32 \(3, 40\)"),
    (lambda t: t.T.contiguous().T, "not contiguous"), (lambda t: t.to("meta"), "on meta"),
    (lambda t: t.to_sparse(), "sparse"), (lambda t: "text", "a str, not a torch"),
    (lambda t: Foreign(t.T), r"\(40, 6\)"), (lambda t: Foreign(3), "cannot be written to"),
])  # fmt: skip
def test_memory_that_does_not_fit_is_refused(small_file, device, flaw, match):
    other = torch.zeros(40, device=device)
    out = {"a.bias": other, "a.weight": flaw(torch.zeros(6, 40, device=device))}
    with tallcodec.open(small_file) as file:
        for decode in (file.decode, lambda task, out: file.load(task, device).decode(out=out)):
            with pytest.raises(errors.TensorMismatchError, match=rf"out\['a.weight'\].*{match}"):
                decode("cars", out=out)
    assert not other.any()


def test_devices_that_are_not_there_are_refused(small_file):
    with tallcodec.open(small_file) as file:
        for device in ("cuda:99", "meta", "nonsense", "cpu:x", 3.5):
            for call in (file.decode, file.load, file.state_dict):
                with pytest.raises(errors.ArgumentError, match="device"):
                    call("cars", device=device)
    with tallcodec.open(small_file, "np") as file:
        assert_same(file.decode("cars", device="cpu"), file.load("cars", "cpu").decode())
        with pytest.raises(errors.ArgumentError, match='framework "np"'):
            file.decode_rows("cars", "a.weight", 0, 1, device="cuda")


# Damage.


@pytest.mark.parametrize("kind", ["base", "shared", "mask", "ternary", "scales", "verbatim"])
@pytest.mark.parametrize("coding", ["raw", "entropy"])
def test_damage_is_the_error_of_the_cpu(tmp_path, device, kind, coding):
    base, tasks = small_family()
    for k, state in enumerate((base, *tasks.values())):
        state["step"], state["table"] = np.array(k), np.full(3000, k)
    path = tmp_path / "x.tall"
    options = {"method": {"cars": "tall", "dtd": "ternary"}, "scale": "unit-gain-row"}
    data = encoded(path, base, tasks, coding=coding, shared_dtype="int8", **options)
    with tallcodec.open(path, "np") as file:
        planes = [p for p in file._file.planes() if p[0] == numbers.PLANES[kind]]
    for plane in planes:
        damaged = bytearray(data)
        damaged[plane[2]] ^= 1
        path.write_bytes(damaged)
        for task in ("cars", "dtd"):
            with tallcodec.open(path, "np") as file:
                try:
                    file.decode(task)
                    continue
                except errors.ChecksumError as error:
                    message = str(error)
            out = {n: torch.zeros(base[n].shape, device=device) for n in ("a.weight", "b.weight")}
            with tallcodec.open(path) as file:
                for call, given in ((file.decode, {"out": out}), (file.decode, {"device": device}),
                                    (file.load, {"device": device})):  # fmt: skip
                    with pytest.raises(errors.ChecksumError) as caught:
                        call(task, **given)
                    assert str(caught.value) == message
            assert not any(tensor.any() for tensor in out.values())


@pytest.mark.parametrize("method", ["tall", "ternary"])
def test_coded_planes_that_are_not_sound_are_named(tmp_path, device, method):
    base = {"w": normal((9, 300), 1)}
    tasks = {t: {"w": sparsely_changed(base["w"], k)} for k, t in enumerate("tu")}
    path = tmp_path / "x.tall"
    threshold = {"threshold": 0.4} if method == "tall" else {}
    data = encoded(path, base, tasks, method=method, coding="entropy", **threshold)
    with tallcodec.open(path, "np") as file:
        number, (_, _, offset, size, _) = next(
            (k, p) for k, p in enumerate(file._file.planes()) if p[1] > numbers.EXTERNAL
        )
        name = file._file.describe(number)
    refused, trials = 0, 5 if is_slow(device) else 100
    for at in range(0, size, 1 + size // trials):
        damaged = bytearray(data)
        damaged[offset + at] ^= 0x55
        path.write_bytes(damaged)
        with tallcodec.open(path, "np", verify=False) as file:
            try:
                expected = file.decode("t")
            except errors.FormatError:
                expected = None
        with tallcodec.open(path, verify=False) as file:
            if expected is not None:
                assert_same(numpy_state(file.decode("t", device=device)), expected)
                continue
            refused += 1
            with pytest.raises(errors.FormatError, match=name) as caught:
                file.decode("t", device=device)
            assert "is not soundly coded" in str(caught.value)
            with pytest.raises(errors.ChecksumError, match=name):
                file.load("t", device)
    assert refused > trials / 3


def test_bits_are_let_go_of_before_they_are_known_to_be_sound(encode, fast, monkeypatch):
    base = {"w": normal((9, 300), 1)}
    path = encode(base, {"t": {"w": sparsely_changed(base["w"], 1)}}, coding="entropy")
    made, unpack = [], device_module._Unpacked.__init__

    def watched(self, *arguments):
        unpack(self, *arguments)
        made.extend(map(weakref.ref, (self, self.memory)))
        self.status.flaws.fill_(1)

    monkeypatch.setattr(device_module._Unpacked, "__init__", watched)
    where = torch.empty(0, device=fast).device
    with tallcodec.open(path) as file:
        decoding = device_module.Decoding(file, 0, where, file._backend(where))
        for _ in range(2):
            decoding.decode([(0, torch.zeros(2700, device=where), 0, 2700)])
        gc.collect()
        assert len(made) == 4 and not any(each() for each in made)
        with pytest.raises(errors.FormatError, match="'w'.*is not soundly coded"):
            decoding.finish()


# Planes that stay.


def test_tasks_share_the_planes_of_base_and_shared_vector(encode, device):
    base, tasks = small_family()
    path = encode(base, tasks)
    with tallcodec.open(path) as file:
        cars = file.load("cars", device)
        before = dict(file._on_device[torch.empty(0, device=device).device].planes)
        again, dtd = file.load("cars", device), file.load("dtd", device)
        (residents,) = file._on_device.values()
        assert all(residents.planes[number] is plane for number, plane in before.items())
        assert len(before) == 6
        assert cars.nbytes == again.nbytes == dtd.nbytes == (240 + 40) // 8 + -(-645 // 8)
        assert cars.device.startswith(device)
        del cars, again, before
        gc.collect()
        assert len(residents.planes) == 6
        assert_same(numpy_state(dtd.decode()), on_cpu(path)["dtd"])
        del dtd
        gc.collect()
        assert not residents.planes


def test_what_is_loaded_does_not_read_the_file_again(tmp_path, device):
    base, tasks = small_family()
    path = tmp_path / "x.tall"
    data = encoded(path, base, tasks, coding="entropy")
    expected = on_cpu(path)["cars"]
    with tallcodec.open(path) as file:
        loaded = file.load("cars", device)
        path.write_bytes(data[:192] + bytes(len(data) - 192))
        assert_same(numpy_state(loaded.decode()), expected)


def test_a_closed_file_is_closed_for_it_too(small_file, device):
    with tallcodec.open(small_file) as file:
        loaded = file.load("cars", device)
        assert_same(numpy_state(pickle.loads(pickle.dumps(loaded)).decode()),
                    on_cpu(small_file)["cars"])  # fmt: skip
    for call in (loaded.decode, lambda: file.load("cars", device),
                 lambda: file.decode("cars", device=device)):  # fmt: skip
        with pytest.raises(errors.ClosedError):
            call()


def test_many_threads_use_one(encode, fast):
    base, tasks = family()
    path = encode(base, tasks, coding="entropy")
    expected, failures = on_cpu(path), []
    with tallcodec.open(path, threads=1) as file:
        loaded = file.load("dtd", fast)

        def use(task):
            try:
                assert_same(numpy_state(loaded.decode()), expected["dtd"])
                assert_same(numpy_state(file.load(task, fast).decode()), expected[task])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(t,)) for t in [None, *tasks] * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_switcher_keeps_what_tasks_share(encode, device):
    base, tasks = small_family()
    model = {name: tensor.to(device) for name, tensor in torch_state(base).items()}
    with tallcodec.open(encode(base, tasks)) as file:
        with tallcodec.Switcher(model, file, task="cars", budget=0) as switcher:
            for task in (None, "dtd", None):
                switcher.switch(task)
            (residents,) = file._on_device.values()
            assert len(residents.planes) == 6  # those of the shared vector, too
            assert switcher.metrics.resident_bytes == 0
        gc.collect()
        assert not residents.planes


# Which there are.


def test_backends_are_told():
    found = tallcodec.backends()
    assert list(found) == ["cpu", "cuda", "triton"]
    assert all(name == info.name for name, info in found.items())
    assert found["cpu"].available and found["cpu"].devices == ("cpu",)
    assert found["cpu"].detail.endswith("kernels")
    for info in found.values():
        assert info.available == bool(info.devices) and (info.available or info.detail)


@pytest.mark.parametrize("capabilities, works", [([(7, 5), (9, 0)], ("cuda:1",)), ([(7, 0)], ())])
def test_devices_that_are_too_old_are_not_told(monkeypatch, capabilities, works):
    module = sys.modules["tallcodec.backends"]
    monkeypatch.setattr(module._core.gpu, "devices", lambda name: (len(capabilities), ""))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_capability", capabilities.__getitem__)
    monkeypatch.setattr(module, "_backend", module._backend.__wrapped__)
    found = tallcodec.backends()["cuda"]
    assert (found.available, found.devices) == (bool(works), works)
    assert works or found.detail == "its kernels are for compute capability 8.0 and more"
    for place in ("cuda", *(f"cuda:{k}" for k in range(len(capabilities)))):
        if place in works:
            assert module.choose(torch.device(place), "cuda").name == "cuda"
        else:
            with pytest.raises(errors.ArgumentError, match="capability 8.0 and more"):
                module.choose(torch.device(place), "cuda")


@pytest.mark.parametrize("hidden, detail", [("torch", "torch is not installed"),
                                            ("triton", "triton is not installed")])  # fmt: skip
def test_backends_without(hidden, detail):
    code = f"""
import sys
sys.modules["{hidden}"] = None
import tallcodec
print(tallcodec.backends()["triton"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)  # fmt: skip
    assert detail in done.stdout and "available=False" in done.stdout


def test_a_backend_that_is_not_known_is_refused(small_file, monkeypatch):
    base, tasks = small_family()
    with tallcodec.open(small_file) as file, tallcodec.open(small_file, "np") as arrays:
        monkeypatch.setenv("TALLCODEC_BACKEND", "vulkan")
        for call in (lambda: tallcodec.open(small_file), lambda: arrays.decode("cars"),
                     lambda: arrays.load("cars"), lambda: file.decode("cars"),
                     lambda: file.load("cars"), lambda: file.decode_rows("cars", "a.bias", 0, 1),
                     lambda: tallcodec.verify(small_file), lambda: tallcodec.stats(small_file),
                     lambda: tallcodec.encode(base, tasks, "x.tall")):  # fmt: skip
            with pytest.raises(errors.ArgumentError, match="=vulkan: there are cpu, cuda and tri"):
                call()
    assert not os.path.exists("x.tall")


@pytest.mark.parametrize("said", ["argument", "environment"])
def test_a_backend_is_an_argument_before_the_environment(small_file, monkeypatch, said):
    monkeypatch.setenv("TALLCODEC_BACKEND", "cuda-host" if said == "environment" else "vulkan")
    forced = {"backend": "cuda-host"} if said == "argument" else {}
    cpu, used = torch.device("cpu"), []
    decode = CudaBackend.decode
    monkeypatch.setattr(CudaBackend, "decode", lambda *a: (used.append(1), decode(*a)))
    expected = on_cpu(small_file, backend="cpu")["cars"]
    with tallcodec.open(small_file, backend="cpu") as file:
        loaded = file.load("cars")
        assert file._backend(cpu) is None and not used
    with tallcodec.open(small_file, **forced) as file, pickle.loads(pickle.dumps(file)) as again:
        for each in (file, again):
            assert each._backend(cpu).name == "cuda-host"
            assert_same(numpy_state(each.decode("cars")), expected)
            assert used
            used.clear()
        assert type(file.load("cars")._planes) is not type(loaded._planes)


def test_a_backend_that_is_an_argument_is_checked_at_once(small_file):
    for name in ("vulkan", "", 3, ["cpu"]):
        with pytest.raises(errors.ArgumentError, match="^backend=.*: there are cpu, cuda and tri"):
            tallcodec.open(small_file, backend=name)


def test_a_switcher_has_the_backend_of_its_file(small_file, monkeypatch):
    monkeypatch.setenv("TALLCODEC_BACKEND", "vulkan")
    base, _ = small_family()
    model = torch_state(base)
    for name in ("cpu", "cuda-host"):
        with tallcodec.open(small_file, backend=name) as file:
            for given in ((file, {}), (small_file, {"backend": name})):
                with tallcodec.Switcher(model, given[0], task="cars", **given[1]) as switcher:
                    assert switcher._file._forced == name
                assert_same(numpy_state(model), numpy_state(file.decode("cars")))
            with pytest.raises(errors.ArgumentError, match="backend is for a path"):
                tallcodec.Switcher(model, file, backend=name)
    with pytest.raises(errors.ArgumentError, match="^backend=vulkan"):
        tallcodec.Switcher(model, small_file, backend="vulkan")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_backend_that_is_not_there_is_refused(small_file, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuda", "triton"):
        monkeypatch.setenv("TALLCODEC_BACKEND", name)
        tallcodec.backends.__globals__["_backend"].cache_clear()
        with pytest.raises(errors.ArgumentError, match=f"TALLCODEC_BACKEND={name}: ."):
            tallcodec.open(small_file)
