"""How far encoding, saving and verifying are: by a callback, and as a bar in a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

import tallcodec
from helpers import awkward, names_in, normal, small_family, write_safetensors
from tallcodec import errors


class Log(list):
    """The calls of a progress function, (step, done, total)."""

    def __call__(self, *call):
        self.append(call)

    def check(self, *steps):
        """In order within each step, to its end; just these steps."""
        seen = {}
        for step, done, total in self:
            assert 0 <= done <= total and isinstance(total, int)
            assert seen.get(step, (0, total)) <= (done, total)
            seen[step] = done, total
        assert set(seen) == set(steps)
        assert all(done == total for done, total in seen.values())


@pytest.mark.parametrize("options, steps", [
    ({}, ["adapting masks", "encoding"]),
    ({"threshold": 0.4, "coding": "entropy"}, ["encoding", "coding masks"]),
    ({"merge": "ties", "threshold": 0.4}, ["surveying", "encoding"]),
    ({"method": "ternary"}, ["encoding", "looking at magnitudes", "finding what is kept",
                             "finding scales", "writing ternary planes", "coding ternary planes"]),
])  # fmt: skip
def test_encoding(tmp_path, options, steps):
    base, tasks, _ = awkward(1, big=True)
    log = Log()
    tallcodec.encode(base, tasks, tmp_path / "a.tall", progress=log, **options)
    by_step = {}
    for step, done, total in log:
        assert 0 <= done <= total
        by_step.setdefault(step, []).append((done, total))
    assert list(by_step) == steps
    assert all(calls[-1][0] == calls[-1][1] for calls in by_step.values())


def test_saving_and_verifying(encode, tmp_path):
    path = encode(*small_family(), coding="entropy")
    log = Log()
    with tallcodec.open(path, "np") as file:
        file.save("cars", tmp_path / "a.safetensors", progress=log)
        log.check("decoding")
        assert log[-1][2] == sum(a.nbytes for a in file.decode("cars").values())
    log = Log()
    tallcodec.verify(path, progress=log)
    log.check("verifying")


def test_merging_and_counting(encode, tmp_path):
    path = encode(*small_family(), threshold=0.4)
    for call, step in (
        (lambda log: tallcodec.merge(path, tmp_path / "m.safetensors", progress=log), "decoding"),
        (lambda log: tallcodec.merge(path, framework="np", progress=log), "decoding"),
        (lambda log: tallcodec.stats(path, progress=log), "counting masks"),
    ):
        log = Log()
        call(log)
        log.check(step)


def test_what_it_raises_ends_the_operation(encode, tmp_path):
    def stop(*_):
        raise StopIteration("enough")

    base, tasks = small_family()
    path = encode(base, tasks)
    before = path.read_bytes(), names_in(tmp_path)
    with pytest.raises(StopIteration, match="enough"):
        tallcodec.encode(base, tasks, path, overwrite=True, progress=stop)
    with tallcodec.open(path, "np") as file, pytest.raises(StopIteration):
        file.save("cars", tmp_path / "a.safetensors", progress=stop)
    with pytest.raises(StopIteration):
        tallcodec.verify(path, progress=stop)
    with pytest.raises(StopIteration):
        tallcodec.merge(path, tmp_path / "b.safetensors", progress=stop)
    assert before == (path.read_bytes(), names_in(tmp_path))


@pytest.mark.parametrize("progress", [True, "bar", 3])
def test_it_is_a_function(encode, tmp_path, progress):
    path = encode(*small_family())
    for call in (
        lambda: tallcodec.encode(*small_family(), tmp_path / "b.tall", progress=progress),
        lambda: tallcodec.verify(path, progress=progress),
        lambda: tallcodec.open(path, "np").save("cars", tmp_path / "c/", progress=progress),
    ):
        with pytest.raises(errors.ArgumentError, match="progress must be a function"):
            call()


SLOW = """
import sys, time
from tallcodec.progress import bar
with bar() as progress:
    for k in range(1, 8):
        time.sleep(float(sys.argv[1]))
        progress("encoding", k, 7)
print("done")
"""


@pytest.mark.parametrize("seconds, shown", [(0.3, True), (0, False)])
def test_a_bar_for_what_takes_longer_than_a_second(seconds, shown):
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-c", SLOW, str(seconds)], stdout=subprocess.PIPE,
                          stderr=terminal, timeout=60)  # fmt: skip
    os.write(terminal, b"end\n")
    text = b""
    while b"end" not in text:
        text += os.read(reader, 10_000)
    os.close(terminal)
    os.close(reader)
    assert done.stdout == b"done\n"
    assert (b"encoding" in text and b" %|" in text) == shown


def test_no_bar_without_a_terminal(tmp_path):
    done = subprocess.run([sys.executable, "-c", SLOW, "0.3"], capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"done\n", b"")
    base = {"w": normal(2_000_000, 1)}
    write_safetensors(tmp_path / "base.safetensors", base)
    write_safetensors(tmp_path / "t.safetensors", {"w": base["w"] + np.float32(1)})
    done = subprocess.run(
        [sys.executable, "-m", "tallcodec", "encode", "--base", tmp_path / "base.safetensors",
         "--task", f"t={tmp_path / 't.safetensors'}", "-o", tmp_path / "a.tall"],
        capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
