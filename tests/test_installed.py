"""What an installed package has to do, source tree or not, PyTorch or not: the least of everything.

tests/release.py runs it, with a few of its neighbours, where nothing but a wheel is.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tallcodec
from helpers import BF16, assert_same, small_family
from tallcodec import _core
from tallcodec.checkpoint import open_checkpoint

HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_it_is_all_there():
    folder = Path(tallcodec.__file__).parent
    assert {"py.typed", "_core.pyi", "reference"} <= {path.name for path in folder.iterdir()}
    assert importlib.metadata.version("tallcodec") == tallcodec.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", tallcodec.__version__)
    assert "scalar" in _core.kernels.available()


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "tallcodec", *arguments], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_from_files_to_a_file_to_files(tmp_path, framework):
    """Checkpoints are written by a decoding: safetensors' own library needs not be there."""
    if framework == "pt" and not HAS_TORCH:
        pytest.skip("without PyTorch")
    base, tasks = small_family(dtype=BF16)
    first = tmp_path / "first.tall"
    tallcodec.encode(base, tasks, first)
    with tallcodec.open(first, framework) as file:
        for task, name in ((None, "base"), ("cars", "cars"), ("dtd", "dtd")):
            file.save(task, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("cars", "dtd")}
    second = tmp_path / "second.tall"
    command("encode", "--base", tmp_path / "base.safetensors", "-o", second,
            *(f"--task={name}={path}" for name, path in paths.items()))  # fmt: skip
    tallcodec.verify(second)
    assert "cars" in command("inspect", second)
    command("decode", second, "--task", "dtd", "-o", tmp_path / "again.safetensors")
    with tallcodec.open(second, "np") as file, open_checkpoint(tmp_path / "again.safetensors") as c:
        assert_same(file.decode(None), base)
        decoded = file.decode("dtd")
        assert {name: t.read().tobytes() for name, t in c.tensors.items()} == {
            name: array.tobytes() for name, array in decoded.items()
        }
    if framework == "pt":
        import torch

        with tallcodec.open(second) as file:
            assert all(t.dtype == torch.bfloat16 for t in file.decode("dtd").values())
