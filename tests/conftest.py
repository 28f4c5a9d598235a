"""Fixtures that several test files share."""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

import tallcodec
from helpers import small_family, write_safetensors

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, or many new ones.
_any = {"deadline": None, "suppress_health_check": list(HealthCheck),
        "phases": set(Phase) - {Phase.explain}}  # fmt: skip
settings.register_profile("short", max_examples=150, derandomize=True, **_any)
settings.register_profile("long", max_examples=10_000, print_blob=True, **_any)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def ways():
    """The back-ends that decode to a torch device here, and the device's type."""
    try:
        import torch
    except ImportError:
        return []
    if torch.cuda.is_available():
        return [("cuda", "cuda"), ("triton", "cuda"), ("cuda-host", "cpu")]
    return [("cuda-host", "cpu"), ("triton", "cpu")]


@pytest.fixture(params=ways(), ids="-".join)
def device(request, monkeypatch):
    """A device, once for each back-end that decodes to it, which is forced."""
    backend, device = request.param
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TALLCODEC_BACKEND", backend)
    return device


@pytest.fixture(params=[("cpu", "cpu"), *ways()], ids="-".join)
def anywhere(request, monkeypatch):
    """The same, and the CPU with the core."""
    backend, device = request.param
    monkeypatch.setenv("TALLCODEC_BACKEND", backend)
    return device


@pytest.fixture
def encode(tmp_path):
    """encode(base, tasks, **options) -> the path of a new .tall file."""
    made = []

    def encode(base, tasks, **options):
        path = tmp_path / f"file{len(made)}.tall"
        made.append(path)
        tallcodec.encode(base, tasks, path, **options)
        return path

    return encode


@pytest.fixture
def small_file(encode):
    """A file of two tasks of a few ordinary tensors, with metadata of its own."""
    return encode(*small_family(), metadata={"purpose": "test"})


@pytest.fixture
def checkpoints(tmp_path):
    """base.safetensors, cars.safetensors and a folder dtd/, in the folder that is returned."""
    folder = tmp_path / "checkpoints"
    (folder / "dtd").mkdir(parents=True)
    base, tasks = small_family()
    write_safetensors(folder / "base.safetensors", base)
    write_safetensors(folder / "cars.safetensors", tasks["cars"], {"made by": "a test"})
    write_safetensors(folder / "dtd" / "model.safetensors", tasks["dtd"], {"format": "pt"})
    (folder / "dtd" / "config.json").write_text('{"hidden_size": 40}')
    (folder / "dtd" / "vocab.txt").write_text("a\nb\n" * 500)
    return folder


@pytest.fixture
def net():
    """A small network."""
    torch = pytest.importorskip("torch")
    from switching import Net

    torch.manual_seed(0)
    return Net()


@pytest.fixture
def path(net, encode):
    """A file of three tasks of it."""
    from switching import encode_net

    return encode_net(net, encode)
