"""A live model switched from task to task: exact, in place, in memory, and what does not fit."""

import copy
import gc
import os
import pickle
import random

import pytest

import tallcodec
from helpers import assert_same, awkward, encoded, numpy_state, small_family, torch_state
from tallcodec import Switcher, errors

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from switching import TASKS, WAIT, Net, assert_on, encode_net, fail_after, tuned  # noqa: E402

pytestmark = [pytest.mark.usefixtures("anywhere"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # fmt: skip


@pytest.fixture
def net(net, anywhere):
    return net.to(anywhere)


# Exact, in place.


@pytest.mark.parametrize("options", [
    {}, {"method": "ternary"}, {"method": "tall", "coding": "entropy", "shared_dtype": "int8"},
    {"method": "tall", "threshold": 0.4, "scale": "unit-gain-row"},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_sequence_of_switches_is_exact_and_in_place(encode, options, dtype, anywhere):
    torch.manual_seed(0)
    net = Net(dtype).to(anywhere)
    path = encode_net(net, encode, **options)
    before = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    choose = random.Random(0)
    with Switcher(net, path) as switcher:
        assert_on(net, path, None)
        for _ in range(5 if is_interpreted(anywhere) else 20):
            task = choose.choice([None, *TASKS])
            switcher.switch(task)
            assert switcher.current == task
            assert_on(net, path, task)
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == before


def is_interpreted(device):
    return os.environ["TALLCODEC_BACKEND"] == "triton" and device == "cpu"


def test_every_kind_of_tensor_as_a_mapping(tmp_path, anywhere):
    if is_interpreted(anywhere):
        pytest.skip("the interpreter is slow")
    base, tasks, _ = awkward(2, big=True)
    names = [n for n in base if all(n in state and state[n].shape == base[n].shape
             and state[n].dtype == base[n].dtype for state in tasks.values())]  # fmt: skip
    base, *states = ({n: state[n] for n in names} for state in (base, *tasks.values()))
    path = tmp_path / "a.tall"
    encoded(path, base, dict(zip(tasks, states)), base_storage="reference",
            method={"cars": "ternary", "dtd": "tall", "aircraft": "tall"})  # fmt: skip
    model = {name: tensor.to(anywhere) for name, tensor in torch_state(base).items()}
    with tallcodec.open(path, base=base) as file, Switcher(model, file, task="dtd") as switcher:
        for task in ("cars", "aircraft", None, "dtd", "cars"):
            switcher.switch(task)
            assert_same(numpy_state(model), numpy_state(file.decode(task)))


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


def test_memory_that_is_not_contiguous_keeps_its_strides(encode, anywhere):
    base, tasks = small_family()
    model = {name: tensor.to(anywhere) for name, tensor in torch_state(base).items()}
    model["a.weight"] = torch.zeros(40, 6, device=anywhere).T
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


def test_tied_weights_stay_tied(encode, anywhere):
    model = Tied().to(anywhere)
    base = {k: v.clone().cpu() for k, v in model.state_dict().items()}
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


def test_a_compiled_model_follows(net, path, anywhere):
    compiled, x = torch.compile(net, backend="eager"), torch.ones(2, 12, device=anywhere)
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
        assert torch.equal(net.first.weight.cpu(), file.decode("cars")["first.weight"])


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
                assert torch.equal(net.first.weight.cpu(), file.decode(task)["first.weight"])


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
