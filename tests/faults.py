"""Changes of a file that are killed or fail, at every call and at random moments. Run by
test_faults.py with tests/faults.c preloaded; prints what was tried and what came of it, as JSON.

Each change runs in a process of its own, forked from this one. Afterwards the file has to be whole
and either what it was or what it was to become, and the same change, made again, has to lead there.
"""

import collections
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import tallcodec
from helpers import same, small_family
from tallcodec.errors import TallcodecError, WriteError

FAULTS = (
    "killed in it", "killed after it", "no space", "no space ever after", "input/output error",
    "short write", "interrupted",
)  # fmt: skip
HARMLESS = FAULTS[5:]  # for these a call is made again, or goes on


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def small(folder):
    """A base and tasks: one is a folder, one has a NaN, one unties a tensor, one has a head."""
    base, tasks = small_family(("cars", "dtd", "aircraft", "sun397"))
    for state in (base, *tasks.values()):
        del state["a.bias"]
        state["tied"] = state["a.weight"].copy()
    tasks["aircraft"]["tied"] += 1
    tasks["aircraft"]["b.weight"][2, 3] = np.nan
    tasks["cars"]["head"] = normal(7, 1)
    folder.mkdir()
    save_file(tasks["sun397"], folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"a": 1}')
    return base, {**tasks, "sun397": folder}


def large():
    """Few tensors, that take some time."""
    base = {f"w{i}": normal((200, 1000), i) for i in range(3)}
    return base, {
        task: {name: w + normal(w.shape, 9 + k) / 100 for name, w in base.items()}
        for k, task in enumerate(("cars", "dtd", "aircraft", "sun397"))
    }


class Changes:
    """What can be done to a file, from what it is before: None where there is none."""

    def __init__(self, folder, base, tasks, options):
        self.folder, self.path = folder, folder / "a.tall"
        first = {name: tasks[name] for name in ("cars", "dtd")}
        new = {name: tasks[name] for name in ("aircraft", "sun397")}
        tallcodec.encode(base, first, self.path, **options)
        tallcodec.add(self.path, {"gone": tasks["aircraft"]})
        tallcodec.remove(self.path, ["gone"])
        self.before = self.path.read_bytes()
        self.calls = {
            "encode": (False, lambda: tallcodec.encode(base, tasks, self.path, threads=1)),
            "encode over it": (
                True, lambda: tallcodec.encode(base, tasks, self.path, threads=2, overwrite=True),
            ),
            "add": (True, lambda: tallcodec.add(self.path, new, method="tall", threads=1)),
            "add the better": (True, lambda: tallcodec.add(self.path, new, threads=2)),
            "remove": (True, lambda: tallcodec.remove(self.path, ["dtd"])),
            "compact": (True, lambda: tallcodec.compact(self.path, threads=2)),
        }  # fmt: skip

    def reset(self, name):
        for found in self.folder.iterdir():
            found.unlink()
        if self.calls[name][0]:
            self.path.write_bytes(self.before)

    def expected(self, name):
        """The states before and after, each as (bytes, what it decodes to)."""
        self.reset(name)
        before = self.look()
        self.calls[name][1]()
        return before, self.look()

    def look(self):
        """The bytes of the file, and what these decode to; None where there is no file."""
        if not self.path.exists():
            return None, None
        tallcodec.verify(self.path, threads=1)
        with tallcodec.open(self.path, "np", threads=1) as file:
            end = file._file.size()
            return self.path.read_bytes()[:end], {t: file.decode(t) for t in [None, *file.tasks]}


def alike(a, b):
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(
        a[t].keys() == b[t].keys() and all(same(a[t][n], b[t][n]) for n in a[t]) for t in a
    )


def run(call):
    """Runs a change in another process; gives that one's number."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        call()
        status = 0
    except WriteError:
        status = 1
    except TallcodecError:
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def check(changes, name, states, where):
    """One state or the other, and the way from it to the second. Gives which."""
    found = changes.look()
    new = alike(found[1], states[1][1]) and found[0] == states[1][0]
    # In the header the slot that is not the file's may be torn.
    old = alike(found[1], states[0][1]) and (found[0] or b"")[192:] == (states[0][0] or b"")[192:]
    assert old or new, f"{name}, {where}: the file is neither what it was nor what it was to be"
    left = [p.name for p in changes.folder.iterdir() if p != changes.path]
    if not new:
        changes.calls[name][1]()
        assert changes.path.read_bytes() == states[1][0], f"{name}, {where}: another file after it"
    return new, left


def every_call(changes, shim, counts):
    for name, (_, call) in changes.calls.items():
        states = changes.expected(name)
        for number, fault in enumerate(FAULTS):
            for at in range(10_000):
                changes.reset(name)

                def with_fault(call=call, at=at, number=number):
                    shim.faults_arm(at, number)
                    call()
                    if shim.faults_calls() <= at:
                        os._exit(50)  # there was no such call

                code = os.waitstatus_to_exitcode(os.waitpid(run(with_fault), 0)[1])
                where = f"{fault} at call {at}"
                killed = number < 2
                allowed = {0, 50} | ({-signal.SIGKILL} if killed else {1})
                if fault in HARMLESS:
                    allowed -= {1}
                assert code in allowed, f"{name}, {where}: ended with {code}"
                new, left = check(changes, name, states, where)
                if code == 50:
                    assert new
                    break
                if code == 0:
                    assert new, f"{name}, {where}: said it was done"
                if not killed:
                    assert not left or code == 0, f"{name}, {where}: left {left}"
                counts[f"{name}: {fault}"] += 1
                counts["new" if new else "old"] += 1


def random_moments(changes, points, counts, seed):
    random_ = random.Random(seed)
    names = list(changes.calls)
    states = {name: changes.expected(name) for name in names}
    times = {}
    for name in names:
        changes.reset(name)
        start = time.monotonic()
        os.waitpid(run(changes.calls[name][1]), 0)
        times[name] = time.monotonic() - start
    killed = 0
    while killed < points:
        name = names[killed % len(names)]
        changes.reset(name)
        delay = random_.random() * times[name]
        child = run(changes.calls[name][1])
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"{name}: ended with {code}"
        killed += code != 0
        times[name] *= 1.02 if code else 0.95  # it takes now longer, now shorter
        new, _ = check(changes, name, states[name], f"killed after {delay:.4f} s")
        counts[f"{name}: killed from outside" if code else f"{name}: done before"] += 1
        counts["new" if new else "old"] += 1


def main(folder, what, amount):
    shim = ctypes.CDLL(None)
    counts = collections.Counter()
    folder = Path(folder)
    work = folder / "work"
    work.mkdir()
    if what == "calls":
        coded = {"scale": "unit-gain-row", "coding": "entropy", "shared_dtype": "int8"}
        changes = Changes(work, *small(folder / "folder"), coded if amount == "coded" else {})
        if amount == "coded":  # encoding is not much else
            del changes.calls["encode"], changes.calls["encode over it"]
        every_call(changes, shim, counts)
    else:
        random_moments(Changes(work, *large(), {"coding": "entropy"}), int(amount), counts, 1)
    shutil.rmtree(work)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
