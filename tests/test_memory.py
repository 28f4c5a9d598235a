"""What operations take in memory, whatever the size of a tensor: each in its own process, pages
of mapped files counted. What they leave in the page cache."""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tallcodec
from helpers import normal, torch_state, write_safetensors

ELEMENTS = 50_000_000  # 200 MB in float32
MIB = 1 << 20

PEAK = """
import re, sys
import tallcodec

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

if sys.argv[2:]:
    import torch
before = peak()
exec(sys.argv[1])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    base = {"w": np.resize(normal(1_000_003, 1), ELEMENTS).reshape(1000, -1)}
    task = {"w": base["w"] + np.resize(normal(999_983, 2, spread=0.01), ELEMENTS).reshape(1000, -1)}
    write_safetensors(folder / "base.safetensors", base)
    write_safetensors(folder / "t.safetensors", task)
    write_safetensors(folder / "flat.safetensors", {"w": task["w"].reshape(-1)})
    for coding in ("raw", "entropy"):
        tallcodec.encode(base, {"t": task}, folder / f"{coding}.tall", coding=coding)
    yield folder
    shutil.rmtree(folder)


def peak_of(folder, code, *torch):
    """Bytes that running the code adds to what a process takes that has imported tallcodec, and
    torch where that is named too."""
    done = subprocess.run([sys.executable, "-c", PEAK, code, *torch], cwd=folder,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("coding", ["raw", "entropy"])
def test_saving_a_large_tensor(folder, coding):
    code = f"tallcodec.open('{coding}.tall', 'np').save('t', 'o.safetensors', overwrite=True)"
    assert peak_of(folder, code) < 256 * MIB
    with tallcodec.open(folder / f"{coding}.tall", "np") as file:
        expected = file.decode("t")["w"]
    data = np.memmap(folder / "o.safetensors", np.float32, offset=8 + int.from_bytes(
        (folder / "o.safetensors").read_bytes()[:8], "little"))  # fmt: skip
    assert np.array_equal(data, expected.reshape(-1))


@pytest.mark.parametrize("options", [
    "", "coding='entropy'", "merge='ties'", "threshold=0.4, scale='unit-gain-row'",
    "method='ternary', bits=1.3", "method='ternary', density=0.02, coding='raw'",
])  # fmt: skip
def test_encoding_a_large_tensor(folder, options):
    code = ("tallcodec.encode('base.safetensors', {'t': 't.safetensors'}, 'o.tall', "
            f"overwrite=True, {options})")  # fmt: skip
    assert peak_of(folder, code) < 128 * MIB


@pytest.mark.parametrize("code", [
    "f.decode('t')",
    "f.decode('t', out={'w': np.empty((1000, 50_000), np.float32)})",
    "f.state_dict('t')['w']",
    "out = [f.decode_rows('t', 'w', i, i + 20) for i in range(0, 1000, 20)]",
])
def test_decoding_from_a_large_file(folder, code):
    """What is read of it is let go of on the way: all of it is twice what the tensors take."""
    code = ("import numpy as np; tallcodec.file._MAPPED = 48 << 20; "
            f"f = tallcodec.open('raw.tall', 'np'); {code}")  # fmt: skip
    assert peak_of(folder, code) < 4 * ELEMENTS + 192 * MIB


@pytest.mark.parametrize("coding", ["raw", "entropy"])
def test_a_large_tensor_that_is_stored_as_it_is(folder, coding):
    """Of another shape than the base's: too large to be compressed in memory."""
    code = ("tallcodec.encode('base.safetensors', {'t': 'flat.safetensors'}, 'v.tall', "
            f"overwrite=True, coding='{coding}')")  # fmt: skip
    assert peak_of(folder, code) < 128 * MIB
    code = "tallcodec.open('v.tall', 'np').save('t', 'o.safetensors', overwrite=True)"
    assert peak_of(folder, code) < 256 * MIB
    assert (folder / "o.safetensors").read_bytes() == (folder / "flat.safetensors").read_bytes()


def cached(path):
    """The share of a file that is in the page cache."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as data:
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(data)
            mincore = ctypes.CDLL(None, use_errno=True).mincore
            mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            assert mincore(ctypes.addressof(start), size, pages) == 0
            del start
            return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.parametrize("options", [{}, {"method": "ternary"}, {"merge": "ties"}], ids=str)
def test_what_does_not_fit_leaves_the_page_cache(folder, tmp_path, monkeypatch, options):
    inputs = [folder / "base.safetensors", folder / "t.safetensors"]
    for path in inputs:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not on disk yet cannot leave it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached(path) > 0.05:
                pytest.skip("a file system that is nothing but a cache")
            file.read()
    tallcodec.encode(inputs[0], {"t": inputs[1]}, tmp_path / "a.tall", **options)
    assert min(map(cached, inputs)) > 0.99
    monkeypatch.setattr(tallcodec.encoding, "memory", lambda: 256 * MIB)
    monkeypatch.setattr(tallcodec.output, "memory", lambda: 256 * MIB)
    tallcodec.encode(inputs[0], {"t": inputs[1]}, tmp_path / "b.tall", **options)
    assert max(map(cached, [*inputs, tmp_path / "b.tall"])) < 0.05
    assert (tmp_path / "a.tall").read_bytes() == (tmp_path / "b.tall").read_bytes()


def test_encoding_large_torch_files(folder):
    import torch

    base = torch_state({"w": np.resize(normal(1_000_003, 1), ELEMENTS).reshape(1000, -1)})
    torch.save(base, folder / "base.pt")
    torch.save({"state_dict": {"w": base["w"] + 0.01 * base["w"].flip(0)}}, folder / "t.pt")
    code = "tallcodec.encode('base.pt', {'t': 't.pt'}, 'o.tall', overwrite=True)"
    assert peak_of(folder, code, "torch") < 128 * MIB
