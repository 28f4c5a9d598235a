"""Encoding, adding, removing and compacting that is killed or fails, at every call that writes and
at random moments: the file is what it was or what it was to be. TALLCODEC_KILLS says how many
random moments (default 240; `make test-kills` tries some thousands)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", TESTS / "faults.c",
                    "-o", library, "-ldl"], check=True)  # fmt: skip
    return library


def run(shim, folder, what, amount):
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    done = subprocess.run([sys.executable, TESTS / "faults.py", folder, what, str(amount)],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    points = counts.pop("old") + counts.pop("new")
    print(f"{points} points survived: {counts}")
    return points, counts


@pytest.mark.parametrize("family", ["plain", "coded"])
def test_every_call(shim, tmp_path, family):
    points, counts = run(shim, tmp_path, "calls", family)
    assert points > 500 and len(counts) > 25


def test_random_moments(shim, tmp_path):
    kills = int(os.environ.get("TALLCODEC_KILLS", 240))
    _, counts = run(shim, tmp_path, "moments", kills)
    assert sum(count for name, count in counts.items() if "outside" in name) == kills
