"""What the tests of Switcher share: a small network, a family of it, threads."""

import threading

import torch
from torch import nn

import tallcodec
from tallcodec import errors

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


def encode_net(net, encode, **options):
    base = {k: v.clone() for k, v in net.state_dict().items()}
    tasks = {t: tuned(base, k, but=("second.bias",)) for k, t in enumerate(TASKS, 1)}
    return encode(base, tasks, **({"method": METHODS} | options))


def assert_on(model, path, task, base=None):
    with tallcodec.open(path, base=base) as file:
        expected = file.decode(task)
    state = model if isinstance(model, dict) else model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name].cpu(), tensor), (task, name)


def fail_after(switcher, monkeypatch, writes, times=1):
    """Makes the next `times` writes fail when they have written some tensors."""
    write, left = switcher._plan.write, [times]

    def failing(planes, names):
        if not left[0]:
            return write(planes, names)
        left[0] -= 1
        write(planes, names[:writes])
        raise errors.ReadError(5, "the disk is gone")

    monkeypatch.setattr(switcher._plan, "write", failing)


def pause(owner, name):
    """Makes a method wait: the events that it has been called, and that it may go on."""
    method, called, go = getattr(owner, name), threading.Event(), threading.Event()

    def paused(*arguments):
        called.set()
        go.wait(WAIT)
        method(*arguments)

    setattr(owner, name, paused)
    return called, go


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
