"""Switches that fail leave the old task whole, or say that they could not."""

import copy
import os

import pytest

import tallcodec
from helpers import small_family, torch_state
from tallcodec import Switcher, errors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from switching import TASKS, WAIT, assert_on, encode_net, fail_after, pause, start, tuned  # noqa: E402

pytestmark = [pytest.mark.usefixtures("anywhere"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # fmt: skip


@pytest.fixture
def net(net, anywhere):
    return net.to(anywhere)


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
        with pytest.raises(errors.ReadError, match="written to while it was read"):
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


def test_nobody_uses_a_model_in_between_tasks(net, path, monkeypatch, anywhere):
    with Switcher(net, path, task="cars") as switcher:
        fail_after(switcher, monkeypatch, 2, times=2)
        with pytest.raises(errors.SwitchError, match="could not be put back"):
            switcher.switch("dtd")
        with pytest.raises(errors.SwitchError, match="in between tasks, since a switch failed"):
            net(torch.ones(1, 12, device=anywhere))
        with switcher.task("cars"):  # is written again
            assert_on(net, path, "cars")
            net(torch.ones(1, 12, device=anywhere))


def test_what_was_changed_in_place_is_not_put_back(net, path, monkeypatch):
    with Switcher(net, path, task="cars") as switcher:
        write = switcher._plan.write

        def write_and_change(planes, names):
            write(planes, names)
            os.utime(path, ns=(1, 1))

        monkeypatch.setattr(switcher._plan, "write", write_and_change)
        with pytest.raises(errors.SwitchError, match="was written to.*could not be put back"):
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
        with pytest.raises(errors.ReadError, match=f"{name}: was written to"):
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
    path = encode(base, tasks)
    switcher = Switcher(model, path)
    copying, go = pause(switcher._plan, "_copy")
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
