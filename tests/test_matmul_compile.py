"""The matmul kernels compile for GPUs, into what they are meant to be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiled_kernels(architecture, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("matmul_kernels.py")
    environment["PYTHONPATH"] = str(script.parents[1])
    output = subprocess.run([sys.executable, script, str(architecture)], env=environment,
                            check=True, capture_output=True, text=True).stdout
    for kernel in map(json.loads, output.splitlines()):
        assert kernel["stack"] == kernel["local"] == 0, kernel
        if "16" in kernel["name"]:
            assert kernel["tensor_cores"] > 0, kernel
            assert kernel["fma"] == 0, kernel  # base + scale · s rounds twice
        if kernel["name"].startswith(("one ", "few", "many")):
            assert kernel["loads_of_16_bytes"] > 0, kernel
