"""What operations take in memory, whatever the size of a tensor: each in its own process, pages
of mapped files counted."""

import subprocess
import sys

import numpy as np
import pytest

import tallcodec
from helpers import normal, write_safetensors

ELEMENTS = 50_000_000  # 200 MB in float32
MIB = 1 << 20

PEAK = """
import re, sys
import tallcodec

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

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
    for coding in ("raw", "entropy"):
        tallcodec.encode(base, {"t": task}, folder / f"{coding}.tall", coding=coding)
    return folder


def peak_of(folder, code):
    done = subprocess.run([sys.executable, "-c", PEAK, code], cwd=folder, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
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
