"""A live model switched from task to task: exact, in place, whole whatever fails, by one thread."""

import copy
import gc
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import tallcodec
from helpers import awkward, encoded, small_family, torch_state
from tallcodec import Switcher, errors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

WAIT = 20  # seconds, for what should come at once


class Net(nn.Module):
    """Layers, a buffer, a counter, and a hook for tests in the middle of the forward pass."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(12, 40, dtype=dtype), nn.Linear(40, 7, dtype=dtype)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.middle = lambda: None

    def forward(self, x):
        x = self.first(x)
        self.middle()
        return self.second(x)


def tuned(state, seed, but=()):
    """A fine-tuned version of a state dict."""
    generator = torch.Generator().manual_seed(seed)

    def change(name, tensor):
        if name in but:
            return tensor.clone()
        if not tensor.is_floating_point():
            return tensor + seed
        step = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return tensor + 0.05 * step

    return {name: change(name, tensor) for name, tensor in state.items()}


TASKS = ("cars", "dtd", "mnist")
METHODS = {"cars": "tall", "dtd": "ternary", "mnist": "tall"}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def path(net, encode):
    return encode_net(net, encode)


def encode_net(net, encode, **options):
    base = {k: v.clone() for k, v in net.state_dict().items()}
    tasks = {t: tuned(base, k, but=("second.bias",)) for k, t in enumerate(TASKS, 1)}
    return encode(base, tasks, **({"method": METHODS} | options))


def assert_on(model, path, task, base=None):
    with tallcodec.open(path, base=base) as file:
        expected = file.decode(task)
    state = model if isinstance(model, dict) else model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), (task, name)


# Exact, in place.


@pytest.mark.parametrize("options", [
    {}, {"method": "ternary"}, {"method": "tall", "coding": "entropy", "shared_dtype": "int8"},
    {"method": "tall", "threshold": 0.4, "scale": "unit-gain-row"},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_sequence_of_switches_is_exact_and_in_place(encode, options, dtype):
    torch.manual_seed(0)
    net = Net(dtype)
    path = encode_net(net, encode, **options)
    before = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    choose = random.Random(0)
    with Switcher(net, path) as switcher:
        assert_on(net, path, None)
        for _ in range(20):
            task = choose.choice([None, *TASKS])
            switcher.switch(task)
            assert switcher.current == task
            assert_on(net, path, task)
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == before


def test_every_kind_of_tensor_as_a_mapping(tmp_path):
    base, tasks, _ = awkward(2, big=True)
    names = [n for n in base if all(n in state and state[n].shape == base[n].shape
             and state[n].dtype == base[n].dtype for state in tasks.values())]  # fmt: skip
    base, *states = ({n: state[n] for n in names} for state in (base, *tasks.values()))
    path = tmp_path / "a.tall"
    encoded(path, base, dict(zip(tasks, states)), base_storage="reference",
            method={"cars": "ternary", "dtd": "tall", "aircraft": "tall"})  # fmt: skip
    model = torch_state(base)
    with tallcodec.open(path, base=base) as file, Switcher(model, file, task="dtd") as switcher:
        for task in ("cars", "aircraft", None, "dtd", "cars"):
            switcher.switch(task)
            for name, tensor in file.decode(task).items():
                same = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor
                ours = model[name].view(-1).view(torch.uint8) if tensor.numel() else model[name]
                assert torch.equal(same, ours), (task, name)


def test_only_what_differs_is_written(net, path):
    with Switcher(net, path) as switcher, torch.no_grad():
        net.second.bias.fill_(7)  # no task has another than the base
        switcher.switch("cars")
        net.first.weight.fill_(7)
        assert switcher.metrics.tensors == 5 + 4
        switcher.switch("cars")  # is there already
        assert (net.second.bias == 7).all() and (net.first.weight == 7).all()
        switcher.switch("dtd")
        assert switcher.metrics.tensors == 5 + 4 + 4 and (net.second.bias == 7).all()
        changed = 4 * (12 * 40 + 40 + 40 * 7) + 8
        assert switcher.metrics.bytes == 3 * changed + 4 * 7


def test_memory_that_is_not_contiguous_keeps_its_strides(encode):
    base, tasks = small_family()
    model = torch_state(base)
    model["a.weight"] = torch.zeros(40, 6).T
    path = encode(base, tasks)
    with Switcher(model, path) as switcher:
        switcher.switch("dtd")
        assert model["a.weight"].stride() == (1, 6)
        assert_on(model, path, "dtd")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_stay_tied(encode):
    model = Tied()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    w = base["embed.weight"] + 0.1 * torch.randn(50, 8)
    path = encode(base, {"t": {"embed.weight": w, "head.weight": w}})
    with Switcher(model, path, task="t"):
        assert model.head.weight is model.embed.weight
        assert_on(model, path, "t")


def test_weights_that_only_the_model_ties_are_refused(encode):
    model = Tied()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    path = encode(base, {"t": tuned(base, 1)})
    with pytest.raises(errors.TensorMismatchError, match="1 tensors that the model ties"):
        Switcher(model, path)


def test_a_compiled_model_follows(net, path):
    compiled, x = torch.compile(net, backend="eager"), torch.ones(2, 12)
    with Switcher(net, path) as switcher, torch.no_grad():
        outputs = {}
        for task in (None, "cars", "dtd", None, "cars"):
            switcher.switch(task)
            outputs.setdefault(task, net(x))
            assert torch.equal(compiled(x), outputs[task])
    assert not torch.equal(outputs["cars"], outputs["dtd"])


# What does not fit.


def test_what_does_not_fit_is_named_and_counted(path):
    net = Net()
    net.first = nn.Linear(12, 40, bias=False)
    net.second = nn.Linear(41, 7)
    net.extra = nn.ParameterList([nn.Parameter(torch.ones(k)) for k in range(1, 11)])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(errors.TensorMismatchError) as error:
        Switcher(net, path)
    message = str(error.value)
    assert "does not fit the base" in message
    assert r"1 tensors of another dtype or shape: 'second.weight' (the model's F32 (7, 41), the file's F32 (7, 40))" in message  # noqa: E501
    assert "1 tensors that only the file has: 'first.bias'" in message
    assert "10 tensors that only the model has: 'extra.0', " in message and "2 more" in message
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_dtypes_are_not_converted(path):
    with pytest.raises(errors.TensorMismatchError, match="4 tensors of another dtype.*BF16"):
        Switcher(Net(torch.bfloat16), path)


def test_not_strict_leaves_alone_what_only_one_has(net, path):
    net.extra = nn.Parameter(torch.full((3,), 5.0))
    net.first.register_parameter("bias", None)
    with pytest.raises(errors.TensorMismatchError):
        Switcher(net, path)
    with Switcher(net, path, strict=False) as switcher:
        switcher.switch("cars")
    assert (net.extra == 5).all()
    with tallcodec.open(path) as file:
        assert torch.equal(net.first.weight, file.decode("cars")["first.weight"])


def test_a_task_that_lacks_a_tensor_is_refused_alone(net, encode):
    """It would keep what the task before had there."""
    base = {k: v.clone() for k, v in net.state_dict().items()}
    tasks = {t: tuned(base, k) for k, t in enumerate(TASKS)}
    del tasks["dtd"]["second.bias"]
    tasks["mnist"]["second.weight"] = torch.zeros(9, 40)
    for strict in (True, False):
        with Switcher(net, encode(base, tasks), strict=strict) as switcher:
            switcher.switch("cars")
            with pytest.raises(errors.TensorMismatchError, match="task 'dtd': 1 tensors that only"):
                switcher.switch("dtd")
            with pytest.raises(errors.TensorMismatchError, match=r"task 'mnist'.*F32 \(9, 40\)"):
                switcher.prefetch("mnist")
            with pytest.raises(errors.TaskNotFoundError, match="'sun397'"):
                switcher.switch("sun397")
            assert switcher.current == "cars"
            assert_on(net, switcher._file._path, "cars")


def test_a_head_that_the_base_lacks(net, encode):
    base = {k: v.clone() for k, v in net.state_dict().items()}
    tasks = {t: tuned(base, k) for k, t in enumerate(TASKS)}
    del base["second.weight"]
    path = encode(base, tasks)
    with pytest.raises(errors.TensorMismatchError, match="does not fit the base"):
        Switcher(net, path)
    with Switcher(net, path, task="cars") as switcher:
        switcher.switch("mnist")
        assert_on(net, path, "mnist")


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_with_none_of_the_tensors_is_refused(path, strict):
    with pytest.raises(errors.TensorMismatchError, match="none of the model's tensors"):
        Switcher(nn.Linear(3, 3), path, strict=strict)


def test_a_head_of_another_shape_is_left_out_by_a_mapping(net, encode):
    base = {k: v.clone() for k, v in net.state_dict().items()}
    tasks = {t: tuned(base, k) for k, t in enumerate(TASKS)}
    tasks["dtd"]["second.weight"] = torch.zeros(9, 40)
    path = encode(base, tasks)
    body = {k: v for k, v in net.state_dict().items() if not k.startswith("second")}
    with Switcher(body, path, strict=False) as switcher:
        for task in TASKS:
            switcher.switch(task)
            with tallcodec.open(path) as file:
                assert torch.equal(net.first.weight, file.decode(task)["first.weight"])


@pytest.mark.parametrize("arguments", [("base", "f.tall"), (None, "f.tall"), ("f.tall", Net())])
def test_a_model_and_a_file_are_told_apart(arguments):
    with pytest.raises(errors.ArgumentError, match="model must be an nn.Module or a mapping"):
        Switcher(*arguments)
    with pytest.raises(errors.ArgumentError, match="file must be a path or a File, not a Net"):
        Switcher(Net(), Net())


@pytest.mark.parametrize("wrap", [
    lambda net: torch.compile(net, backend="eager"), torch.nn.DataParallel,
    lambda net: torch.nn.DataParallel(torch.compile(net, backend="eager")),
])  # fmt: skip
def test_what_is_wrapped_is_switched(net, path, wrap):
    with Switcher(wrap(net), path, task="cars") as switcher:
        assert_on(net, path, "cars")
        switcher.switch("dtd")
        assert_on(net, path, "dtd")


@pytest.mark.parametrize("arguments", [{"budget": -1}, {"budget": "1GB"}, {"base": {}}])
def test_arguments_are_checked(net, path, arguments):
    with tallcodec.open(path) as file, pytest.raises(errors.ArgumentError):
        Switcher(net, file if "base" in arguments else path, **arguments)


def test_a_model_that_was_moved_is_refused(net, path):
    with Switcher(net, path, task="cars") as switcher:
        net.second.weight = nn.Parameter(torch.zeros(7, 40))
        with pytest.raises(errors.SwitchError, match="1 tensors that are elsewhere: 'second.we"):
            switcher.switch("dtd")
        with pytest.raises(errors.SwitchError, match="elsewhere"):
            switcher.switch("cars")  # where it is
        assert (net.second.weight == 0).all()


# Failures.


def damage(path, kind):
    """The bytes of the file with a flipped bit in the first plane of a kind."""
    with tallcodec.open(path) as file:
        offset = next(p[2] for p in file._file.planes() if p[0] == tallcodec.numbers.PLANES[kind])
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    return data


@pytest.mark.parametrize("kind, task", [("ternary", "dtd"), ("mask", "cars")])
def test_damage_leaves_the_old_task_whole(net, path, kind, task):
    path.write_bytes(damage(path, kind))
    with Switcher(net, path, task="mnist") as switcher:
        with pytest.raises(errors.ChecksumError, match=f"task '{task}'"):
            switcher.switch(task)
        with pytest.raises(errors.ChecksumError):
            switcher.prefetch(task).result(WAIT)
        assert switcher.current == "mnist"
        assert_on(net, path, "mnist")


def test_a_file_written_to_in_place_is_refused(net, path):
    with Switcher(net, path, task="cars") as switcher:
        expected = copy.deepcopy(net.state_dict())
        switcher.prefetch("dtd").result(WAIT)
        with open(path, "r+b") as file:
            file.seek(192)
            file.write(b"x" * 64)
        os.utime(path, ns=(1, 1))  # whatever the clock's grain
        with pytest.raises(errors.ReadError, match="written to in place"):
            switcher.switch("dtd")
        assert all(torch.equal(expected[k], v) for k, v in net.state_dict().items())


def test_a_file_that_is_replaced_stays_what_it_was(net, path, tmp_path):
    (tmp_path / "old.tall").write_bytes(path.read_bytes())
    with Switcher(net, path, task="cars") as switcher:
        (tmp_path / "new").write_bytes(b"something else")
        os.replace(tmp_path / "new", path)
        switcher.switch("dtd")
        assert_on(net, tmp_path / "old.tall", "dtd")
        path.unlink()
        switcher.switch("mnist")
        assert_on(net, tmp_path / "old.tall", "mnist")


def fail_after(switcher, monkeypatch, writes, times=1):
    """Makes the next `times` writes fail when they have written some tensors."""
    decode, left = switcher._file._decode, [times]

    def failing(number, requests, loaded):
        if not left[0]:
            return decode(number, requests, loaded)
        left[0] -= 1
        decode(number, requests[:writes], loaded)
        raise errors.ReadError(5, "the disk is gone")

    monkeypatch.setattr(switcher._file, "_decode", failing)


def test_a_failure_between_writes_is_undone(net, path, monkeypatch):
    with Switcher(net, path, task="cars") as switcher:
        fail_after(switcher, monkeypatch, 2)
        with pytest.raises(errors.ReadError, match="disk is gone"):
            switcher.switch("dtd")
        assert switcher.current == "cars"
        assert_on(net, path, "cars")
        switcher.switch("dtd")
        assert_on(net, path, "dtd")


def test_a_failure_that_cannot_be_undone_is_said_and_healed(net, path, monkeypatch):
    with Switcher(net, path, task="cars") as switcher:
        fail_after(switcher, monkeypatch, 2, times=2)
        with pytest.raises(errors.SwitchError, match="disk is gone; and what.*could not be put"):
            switcher.switch("dtd")
        for task in ("cars", "dtd"):  # the one it was on, too
            switcher.switch(task)
            assert_on(net, path, task)


def test_nobody_uses_a_model_in_between_tasks(net, path, monkeypatch):
    with Switcher(net, path, task="cars") as switcher:
        fail_after(switcher, monkeypatch, 2, times=2)
        with pytest.raises(errors.SwitchError, match="could not be put back"):
            switcher.switch("dtd")
        with pytest.raises(errors.SwitchError, match="in between tasks, since a switch failed"):
            net(torch.ones(1, 12))
        with switcher.task("cars"):  # is written again
            assert_on(net, path, "cars")
            net(torch.ones(1, 12))


def test_what_was_changed_in_place_is_not_put_back(net, path, monkeypatch):
    with Switcher(net, path, task="cars") as switcher:
        decode = switcher._file._decode

        def decode_and_change(number, requests, loaded):
            decode(number, requests, loaded)
            os.utime(path, ns=(1, 1))

        monkeypatch.setattr(switcher._file, "_decode", decode_and_change)
        with pytest.raises(errors.SwitchError, match="written to in place.*could not be put back"):
            switcher.switch("dtd")
        assert switcher._held is None


@pytest.mark.parametrize("change", ["written", "cut short"])
@pytest.mark.parametrize("name", ["base.pt", "base.safetensors"])
def test_a_base_that_is_changed_in_place_is_refused(net, encode, tmp_path, name, change):
    base = {k: v.clone() for k, v in net.state_dict().items()}
    save = torch.save if name == "base.pt" else save_file
    save(base, tmp_path / name)
    path = encode(base, {t: tuned(base, k) for k, t in enumerate(TASKS)}, base_storage="reference")
    with Switcher(net, path, base=tmp_path / name, task="cars") as switcher:
        switcher.prefetch("dtd").result(WAIT)
        before = copy.deepcopy(net.state_dict())
        with open(tmp_path / name, "r+b") as file:
            if change == "written":
                file.seek(900)
                file.write(b"x" * 300)
            else:
                file.truncate(900)
        os.utime(tmp_path / name, ns=(1, 1))
        with pytest.raises(errors.ReadError, match="its base was written to in place"):
            switcher.switch("dtd")
        assert switcher.current == "cars"
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_models_own_memory_is_no_base(net, encode):
    path = encode_net(net, encode, base_storage="reference", method="tall")
    with pytest.raises(errors.ArgumentError, match="base is the model's own memory"):
        Switcher(net, path, base=net.state_dict())
    base = {k: v.clone() for k, v in net.state_dict().items()}
    with Switcher(net, path, base=base) as switcher:
        for task in ("cars", "dtd", None):
            switcher.switch(task)
            assert_on(net, path, task, base)


def test_closing_waits_for_a_switch(encode):
    base, tasks = small_family()
    model = torch_state(base)
    for name in ("a.weight", "b.weight"):  # copied one by one
        model[name] = torch.zeros(*reversed(model[name].shape)).T
    path, copying, go = encode(base, tasks), threading.Event(), threading.Event()
    switcher = Switcher(model, path)
    copy_ = switcher._plan._copy

    def slowly(*arguments):
        copying.set()
        go.wait(WAIT)
        copy_(*arguments)

    switcher._plan._copy = slowly
    switching, switched = start(lambda: switcher.switch("dtd"))
    assert copying.wait(WAIT)
    closing, closed = start(switcher.close)
    closing.join(0.05)
    assert closing.is_alive()
    go.set()
    switching.join(WAIT)
    closing.join(WAIT)
    assert switched == closed == [None]
    assert_on(model, path, "dtd")
    with pytest.raises(errors.ClosedError):
        switcher.prefetch("cars")


def test_a_closed_file_fails_before_anything_is_written(net, path):
    with tallcodec.open(path) as file:
        switcher = Switcher(net, file, task="cars")
        switcher.prefetch("dtd").result(WAIT)
    with pytest.raises(errors.ClosedError):
        switcher.switch("dtd")
    assert switcher.current == "cars" and switcher._held is not None
    assert_on(net, path, "cars")


def test_memory_that_cannot_be_written_to_is_refused(net, path):
    state = dict(net.state_dict())
    meta = state | {"second.weight": torch.empty(7, 40, device="meta")}
    with pytest.raises(errors.TensorMismatchError, match="'second.weight' .it has no memory"):
        Switcher(meta, path)
    expanded = state | {"first.bias": torch.zeros(1).expand(40)}
    with pytest.raises(errors.TensorMismatchError, match="'first.bias' .its elements share memory"):
        Switcher(expanded, path)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


# Threads.


def start(function):
    """A thread that runs a function, and what it gave or raised."""
    results = []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_a_forward_pass_cannot_switch_its_own_model(net, path):
    with Switcher(net, path, task="cars") as switcher:
        net.middle = lambda: switcher.switch("dtd")
        with pytest.raises(errors.SwitchError, match="in the middle of a forward pass"):
            net(torch.ones(1, 12))
        net.middle = lambda: None
        switcher.switch("dtd")  # the pass has ended, though by an error
        assert_on(net, path, "dtd")


def test_a_switch_waits_for_passes_and_passes_for_it(net, path):
    inside, go = threading.Event(), threading.Event()
    x = torch.ones(1, 12)
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        expected = {}
        for task in ("dtd", "cars"):
            switcher.switch(task)
            expected[task] = net(x)
        net.middle = lambda: (inside.set(), go.wait(WAIT))
        first, on_cars = start(lambda: net(x).detach())
        assert inside.wait(WAIT)
        switching, switched = start(lambda: switcher.switch("dtd"))
        while not switcher._gate._changers:
            pass
        second, on_dtd = start(lambda: net(x).detach())  # comes behind the switch
        switching.join(0.05)
        assert switching.is_alive() and switcher.current == "cars" and not on_dtd
        go.set()
        for thread in (first, switching, second):
            thread.join(WAIT)
        assert torch.equal(on_cars[0], expected["cars"]) and torch.equal(on_dtd[0], expected["dtd"])
        assert switched == [None]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_pass_without_a_word_does_not_lock_the_model(net, path, error):
    """torch calls its hooks for Exceptions only."""
    def stop():
        raise error()

    with Switcher(net, path, task="cars") as switcher:
        net.middle = stop
        thread, results = start(lambda: net(torch.ones(1, 12)))
        thread.join(WAIT)
        assert isinstance(results[0], error)
        with pytest.raises(error):
            net(torch.ones(1, 12))
        net.middle = lambda: None
        switching, switched = start(lambda: switcher.switch("dtd"))
        switching.join(WAIT)
        assert switched == [None]
        switcher.switch("cars")
        net(torch.ones(1, 12))
        assert not switcher._gate._uses


def test_a_block_may_be_left_in_another_thread(net, path):
    """As a dependency of a web framework, or a generator that another thread finishes."""
    with Switcher(net, path, task="cars") as switcher:
        block = switcher.task("dtd")
        thread, results = start(block.__enter__)
        thread.join(WAIT)
        assert results == [None] and switcher.current == "dtd"
        thread, results = start(lambda: block.__exit__(None, None, None))
        thread.join(WAIT)
        assert not results[0] and switcher.current == "cars" and not switcher._gate._uses
        switcher.switch("mnist")


def test_a_block_may_wait_for_passes_of_other_threads(net, path):
    x, inside = torch.ones(1, 12), threading.Event()
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        def work():
            with switcher.task("dtd"):
                inside.set()
                while not switcher._gate._changers:
                    pass
                thread, results = start(lambda: net(x).detach())
                thread.join(WAIT)
                return results

        working, worked = start(work)
        assert inside.wait(WAIT)
        switching, switched = start(lambda: switcher.switch("mnist"))
        for thread in (working, switching):
            thread.join(WAIT)
        assert len(worked[0]) == 1 and switched == [None]
        assert switcher.current == "mnist"


def test_switches_do_not_keep_passes_out(net, path):
    stop, passes = threading.Event(), []
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        def switch():
            while not stop.is_set():
                for task in TASKS:
                    switcher.switch(task)

        switching = [start(switch) for _ in range(3)]
        thread, _ = start(lambda: [passes.append(net(torch.ones(1, 12))) for _ in range(50)])
        thread.join(WAIT)
        stop.set()
        for other, results in switching:
            other.join(WAIT)
            assert results == [None]
    assert len(passes) == 50


def test_what_a_pass_leaves_behind_is_put_back_at_its_end(net, path):
    """A block that ends last is within a pass, which is not to be switched under."""
    opened, leave = threading.Event(), threading.Event()
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        def outer():
            with switcher.task("dtd"):
                opened.set()
                leave.wait(WAIT)

        def within():
            with switcher.task("dtd"):
                leave.set()
                first.join(WAIT)

        first, results = start(outer)
        assert opened.wait(WAIT)
        net.middle = within
        net(torch.ones(1, 12))
        first.join(WAIT)
        assert results == [None] and switcher.current == "cars"
        assert_on(net, path, "cars")


def test_an_inner_block_does_not_keep_the_outer_from_restoring(net, path):
    with Switcher(net, path, task="cars") as switcher:
        with switcher.task("dtd"):
            with switcher.task("dtd", restore=False):
                pass
        assert switcher.current == "cars"


def test_a_block_puts_back_what_was(net, path):
    with Switcher(net, path, task="cars") as switcher:
        with switcher.task("dtd"):
            assert_on(net, path, "dtd")
            with switcher.task("dtd"):  # the same, once more
                net(torch.ones(1, 12))
            assert switcher.current == "dtd"
            for other in (switcher.task("mnist"), switcher.task(None)):
                with pytest.raises(errors.SwitchError, match="block of another task"), other:
                    pass
            with pytest.raises(errors.SwitchError):
                switcher.switch("cars")
            assert_on(net, path, "dtd")
        assert_on(net, path, "cars")
        with pytest.raises(ZeroDivisionError), switcher.task(None):
            1 / 0
        assert_on(net, path, "cars")
        with pytest.raises(errors.TaskNotFoundError), switcher.task("none"):
            pass
        assert switcher.current == "cars" and not switcher._gate._uses


def test_a_block_that_leaves_the_model_where_it_is(net, path):
    with Switcher(net, path, task="cars") as switcher:
        with switcher.task("dtd", restore=False):
            pass
        assert switcher.current == "dtd" and switcher.metrics.switches == 2
        with switcher.task("mnist"):
            assert_on(net, path, "mnist")
        assert switcher.current == "dtd"
        assert_on(net, path, "dtd")


def test_a_pass_that_dies_in_a_thread_of_a_pool(net, path):
    def die():
        raise SystemExit

    with Switcher(net, path, task="cars") as switcher, ThreadPoolExecutor(1) as pool:
        net.middle = die
        assert isinstance(pool.submit(net, torch.ones(1, 12)).exception(WAIT), SystemExit)
        switching, switched = start(lambda: switcher.switch("dtd"))
        switching.join(WAIT)
        assert switched == [None]


def test_blocks_that_wait_for_a_switch_share_their_task(net, path):
    """Whoever is first puts the model on it, the others join."""
    together, copying, go = threading.Barrier(3), threading.Event(), threading.Event()

    def work():
        with switcher.task("dtd"):
            together.wait(WAIT)

    with Switcher(net, path, task="cars") as switcher:
        write = switcher._plan.write

        def slowly(*arguments):
            copying.set()
            go.wait(WAIT)
            write(*arguments)

        switcher._plan.write = slowly
        switching, switched = start(lambda: switcher.switch("mnist"))
        assert copying.wait(WAIT)
        threads = [start(work) for _ in range(3)]
        while switcher._gate._users < 3:
            pass
        go.set()
        for thread, results in [(switching, switched), *threads]:
            thread.join(WAIT)
            assert results == [None]
        assert switcher.current == "mnist" and switcher.metrics.switches == 4


def test_a_leaver_does_not_wait_for_a_block_that_needs_it(net, path):
    x = torch.ones(1, 12)

    def visit():
        with switcher.task("dtd"):
            pass

    def work():
        for _ in range(300):
            visiting = pool.submit(visit)
            with switcher.task("dtd"), torch.no_grad():
                pool.submit(net, x).result(WAIT)
            visiting.result(WAIT)

    with Switcher(net, path, task="cars") as switcher, ThreadPoolExecutor(1) as pool:
        thread, results = start(work)
        thread.join(3 * WAIT)
        assert results == [None] and switcher.current == "cars"


def test_a_pass_that_waits_for_closing(net, path):
    inside, go, x = threading.Event(), threading.Event(), torch.ones(1, 12)
    switcher = Switcher(net, path, task="cars")
    net.middle = lambda: (inside.set(), go.wait(WAIT))
    first, _ = start(lambda: net(x).detach())
    assert inside.wait(WAIT)
    closing, closed = start(switcher.close)
    while not switcher._gate._changers:
        pass
    second, results = start(lambda: net(x).detach())
    while not switcher._gate._users:
        pass
    go.set()
    for thread in (first, closing, second):
        thread.join(WAIT)
    assert closed == [None] and isinstance(results[0], torch.Tensor)


def test_passes_that_die_while_others_wait(net, path):
    def die():
        raise SystemExit

    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        net.middle = die
        threads = [start(lambda: net(torch.ones(1, 12))) for _ in range(4)]
        switching, switched = start(lambda: switcher.switch("dtd"))
        for thread, results in threads:
            thread.join(WAIT)
            assert isinstance(results[0], SystemExit)
        switching.join(WAIT)
        assert switched == [None]


@pytest.mark.parametrize("restore", [True, False])
def test_blocks_of_many_threads(net, path, restore):
    x, expected, wrong = torch.ones(1, 12), {}, []
    with Switcher(net, path) as switcher, torch.no_grad():
        for task in (None, *TASKS):
            switcher.switch(task)
            expected[task] = net(x)
        switcher.switch("cars")

        def work(seed):
            choose = random.Random(seed)
            with torch.no_grad():
                for _ in range(150):
                    task = choose.choice([None, *TASKS])
                    with switcher.task(task, restore=restore):
                        if not torch.equal(net(x), expected[task]):
                            wrong.append(task)

        threads = [start(lambda seed=seed: work(seed)) for seed in range(8)]
        for thread, results in threads:
            thread.join(60)
            assert results == [None]
        assert not wrong
        assert switcher.current == "cars" or not restore
        assert torch.equal(net(x), expected[switcher.current])
        assert not switcher._gate._uses and not switcher._blocks


def test_blocks_of_one_task_share_it(net, path):
    together = threading.Barrier(3)

    def work():
        with switcher.task("dtd"):
            together.wait(WAIT)

    with Switcher(net, path, task="cars") as switcher:
        threads = [start(work) for _ in range(3)]
        for thread, results in threads:
            thread.join(WAIT)
            assert results == [None]
        assert switcher.current == "cars"
        assert switcher.metrics.switches == 3  # to cars, to dtd, and back


# Memory.


def test_prefetching_and_what_is_counted(net, path):
    with Switcher(net, path) as switcher:
        assert switcher.prefetch("dtd").result(WAIT) is None
        switcher.switch("dtd")
        assert (switcher.metrics.hits, switcher.metrics.misses) == (1, 1)  # the base was no hit
        switcher.switch("cars")
        switcher.switch("dtd")
        done = switcher.metrics
        assert (done.hits, done.misses, done.switches, done.evictions) == (2, 2, 4, 0)
        sizes = [(12 * 40 // 8 + 40 // 8 + 40 * 7 // 8) * planes + 8 for planes in (1, 2)]
        assert (done.resident_tasks, done.resident_bytes) == (2, sum(sizes))
        assert 0 < done.last_milliseconds < done.milliseconds


def test_the_least_recently_used_planes_go_first(net, encode):
    path = encode_net(net, encode, method="tall")
    with Switcher(net, path, budget=120) as switcher:  # one task is 108 bytes
        for task in ("cars", "dtd", "mnist"):
            switcher.switch(task)
        assert set(switcher._cache._tasks) == {None, "dtd", "mnist"}
        switcher.switch("dtd")
        assert switcher.metrics.hits == 1 and switcher.metrics.evictions == 1
        switcher.prefetch("cars").result(WAIT)
        assert set(switcher._cache._tasks) == {None, "dtd", "cars"}
        assert_on(net, path, "dtd")
    with Switcher(net, path, budget=0, task="cars") as switcher:
        switcher.switch("dtd")
        assert set(switcher._cache._tasks) == {"dtd"}
        switcher.switch("cars")
        assert_on(net, path, "cars")


def test_forgetting(net, path):
    with Switcher(net, path, task="cars") as switcher:
        switcher.prefetch("dtd").result(WAIT)
        for task in ("dtd", "dtd", "cars", "unknown"):
            switcher.forget(task)
        assert switcher.metrics.resident_tasks == 0 and switcher.metrics.evictions == 2
        assert_on(net, path, "cars")
        switcher.switch("dtd")
        switcher.switch("cars")
        assert switcher.metrics.misses == 3  # cars at first, dtd and cars again
        assert_on(net, path, "cars")


def test_what_fails_to_switch_does_not_stay_in_memory(net, path, monkeypatch):
    with Switcher(net, path, task="cars", budget=0) as switcher:
        fail_after(switcher, monkeypatch, 1)
        with pytest.raises(errors.ReadError):
            switcher.switch("dtd")
        assert set(switcher._cache._tasks) == {"cars"}


def test_a_switcher_that_is_dropped_leaves_no_hooks(net, path):
    switcher = Switcher(net, path)
    del switcher
    gc.collect()
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_the_least_recently_used_is_not_the_first_one(net, encode):
    path = encode_net(net, encode, method="tall")
    with Switcher(net, path, budget=220) as switcher:  # two tasks and a bit
        for task in ("cars", "dtd", "cars", "mnist", "dtd"):
            switcher.switch(task)
        switcher.prefetch("cars").result(WAIT)
        assert switcher.metrics.evictions == 0 and switcher.metrics.misses == 4
    with Switcher(net, path, budget=108) as switcher:  # one task besides that it is on
        for task in ("cars", "dtd", "cars", "mnist"):
            switcher.switch(task)
        assert set(switcher._cache._tasks) == {None, "cars", "mnist"}


def test_closing(net, path):
    switcher = Switcher(net, path, task="cars")
    assert len(net._forward_hooks) == 1
    switcher.close()
    switcher.close()
    assert not net._forward_hooks and not net._forward_pre_hooks
    assert_on(net, path, "cars")
    with pytest.raises(errors.ClosedError):
        switcher.switch("dtd")
    with tallcodec.open(path) as file:
        Switcher(net, file).close()
        file.decode("cars")  # it stays open


def test_a_failed_constructor_leaves_no_hook(path):
    net = Net(torch.bfloat16)
    with pytest.raises(errors.TensorMismatchError):
        Switcher(net, path)
    assert not net._forward_hooks and not net._forward_pre_hooks


class Plain(nn.Module):
    """With nothing that cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(30, 40))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_watched_model_is_not_watched(encode, again):
    base = {"w": torch.ones(30, 40)}
    path = encode(base, {t: tuned(base, k) for k, t in enumerate(("cars", "dtd"))})
    model, x = Plain(), torch.ones(1, 30)
    with Switcher(model, path, task="cars") as switcher:
        other = again(model)
        expected = model(x)
        other.register_forward_hook(lambda *_: switcher.switch("dtd"))  # in the middle of its pass
        assert torch.equal(other(x), expected)
        assert switcher.current == "dtd" and not torch.equal(model(x), expected)
        assert_on(other, path, "cars")
