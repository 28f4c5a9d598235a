"""What nvcc made of the CUDA kernels: exact, 16 bytes at a time, nothing in local memory."""

import re
from pathlib import Path

import pytest

from tallcodec import _core

gpu_inspect = pytest.importorskip("gpu_inspect")

if "cuda" not in _core.gpu.tables():
    pytest.skip("built without CUDA", allow_module_level=True)


@pytest.fixture(scope="module", params=["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def rows(request):
    kernels = gpu_inspect.kernels_of(Path(_core.__file__), request.param)
    return [kernel.row(request.param) for kernel in kernels]


def test_every_kernel_is_there(rows):
    names = {row["kernel"].split("<")[0] for row in rows}
    assert names == {"Agreement", "Consensus", "DecodeElements", "DecodeVectors", "Encode",
                     "Overlap", "SumUnits", "UnpackMask", "UnpackTernary"}  # fmt: skip
    assert sum(row["kernel"].startswith("DecodeVectors") for row in rows) == 15


def test_code(rows):
    assert not [flaw for row in rows for flaw in gpu_inspect.flaws(row)]


def test_no_operation_is_fused_flushed_or_approximated():
    """In what all of the machine code is made of; there, divisions become several steps."""
    tool = gpu_inspect.tool("cuobjdump")
    ptx = gpu_inspect.run(tool, "-ptx", _core.__file__)
    assert "div.rn.f32" in ptx and "sub.rn.f32" in ptx
    inexact = r"fma\S*f(?:32|64)|\S*\.ftz\S*|\S*\.approx\S*|(?:div\.full|add|sub|mul)\.f32"
    assert not re.findall(inexact, ptx)


def test_without_a_driver_it_says_so():
    count, why = _core.gpu.devices("cuda")
    assert count > 0 or "driver" in why
