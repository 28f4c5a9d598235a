"""examples/cpp, built against the installed package, decodes the golden files as expected.

python tests/cpp/check_example.py build/example/decode
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def run(*arguments):
    """What it writes, or, where it fails, its message."""
    done = subprocess.run([*arguments], capture_output=True)
    assert done.returncode in (0, 1), arguments
    return done.stderr.decode() if done.returncode else done.stdout


def main(*program):
    expected, compared = json.loads((GOLDEN / "expected.json").read_text()), 0
    for name, file in expected.items():
        path, decoded = GOLDEN / f"{name}.tall", file["decoded"]
        if "base" not in decoded:
            assert "references its base, and none was given" in run(*program, path, "cars", "a")
            continue
        listed = run(*program, path).decode().splitlines()
        tasks = {f"task {owner.removeprefix('task ')}" for owner in decoded if owner != "base"}
        assert tasks == {line for line in listed if line.startswith("task ")}
        for owner, tensors in decoded.items():
            task = "" if owner == "base" else owner.removeprefix("task ")
            for tensor, (_, _, digest) in tensors.items():
                assert f"tensor {tensor}" in listed
                found = run(*program, path, task, tensor)
                if isinstance(found, str):
                    assert "is a zstd frame, and no decompressor was given" in found, found
                    continue
                assert hashlib.sha256(found).hexdigest() == digest, (name, owner, tensor)
                compared += 1
    assert "has no task 'none'" in run(*program, GOLDEN / "v1-float32.tall", "none", "a")
    assert "not a .tall file" in run(*program, __file__)
    assert compared > 60
    print(f"{compared} tensors decoded by {' '.join(program)} as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])
