"""What Triton makes of the kernels for GPUs, without one: exact arithmetic, 16 bytes at a time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tallcodec

pytest.importorskip("torch")
pytest.importorskip("triton")

ARCHS = ["80", "90", "100"]
ROOT = Path(tallcodec.__file__).parents[1]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """PTX by the kernel's name and the architecture's."""
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    environment["PYTHONPATH"] = str(ROOT)
    script = Path(__file__).with_name("triton_variants.py")
    subprocess.run([sys.executable, script, folder, *ARCHS], env=environment, check=True)
    return {file.stem: file.read_text() for file in folder.iterdir()}


def test_every_kernel_compiles(ptx):
    names = {name.rpartition("-")[0] for name in ptx}
    assert len(ptx) == len(names) * len(ARCHS)
    operations = {name.split("-")[0] for name in names}
    assert operations == {"decode", "convert", "encode", "sums", "agreement", "overlap",
                          "consensus", "unpack"}  # fmt: skip


def test_every_operation_rounds_once(ptx):
    """Nothing is fused, flushed or approximated; .rn forbids ptxas to fuse, too."""
    for name, text in ptx.items():
        inexact = r"fma\S*f32|\S*\.ftz\S*|\S*\.approx\S*|\b(?:add|sub|mul|div)\.(?:full\.)?f32"
        assert not re.findall(inexact, text), name
        if name.startswith(("decode", "encode")) and "signs" not in name:
            assert re.search(r"\b(?:add|sub)\.rn\.f32", text), name


WIDE = r"{}\.global\S*\.(?:v4\.b32|v2\.b64)"


@pytest.mark.parametrize("arch", ARCHS)
def test_aligned_tensors_move_16_bytes_at_a_time(ptx, arch):
    for kernel in ("decode-float32", "decode-float16", "decode-bfloat16", "decode-bfloat16-int8",
                   "decode-bfloat16-signs", "decode-bfloat16-int8-rows", "encode-float32",
                   "encode-bfloat16", "convert-float32-to-bfloat16"):  # fmt: skip
        text = ptx[f"{kernel}-{arch}"]
        assert re.search(WIDE.format("ld"), text) and re.search(WIDE.format("st"), text), kernel
