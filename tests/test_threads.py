"""Many threads and processes on one open file, and every order in which things can end."""

import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tallcodec
from helpers import assert_same, awkward, normal, small_family
from tallcodec.errors import ClosedError, FormatError

ROOT = Path(__file__).parents[1]
OPTIONS = [
    {"coding": "entropy"},
    {"method": {"cars": "ternary", "dtd": "tall", "aircraft": "ternary"}},
    {"base_storage": "reference", "shared_dtype": "int8", "scale": "unit-gain-row"},
]


@pytest.fixture(params=OPTIONS, ids=lambda options: next(iter(options)))
def awkward_file(request, encode):
    """A file's path, and its base where that is only referenced."""
    base, tasks, _ = awkward(7)
    path = encode(base, tasks, **request.param)
    return path, base if "base_storage" in request.param else None


def at_once(bodies):
    """Run functions, each in a thread, all beginning together; what they return, or what went
    wrong."""
    barrier = threading.Barrier(len(bodies))

    def run(body):
        barrier.wait()
        return body()

    with ThreadPoolExecutor(len(bodies)) as pool:
        return [future.result() for future in [pool.submit(run, body) for body in bodies]]


def digest(state):
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in state.items()}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_hundred_threads(awkward_file, threads):
    path, base = awkward_file
    with tallcodec.open(path, "np", base, threads=threads) as file:
        owners = [None, *file.tasks]
        expected = {task: file.decode(task) for task in owners}
        info, loaded = str(file.info), file.load(file.tasks[0])
        stats = str(tallcodec.stats(path)) if base is None else None

        def everything(seed):
            choose = random.Random(seed)
            task = choose.choice(owners)
            wanted = choose.sample(sorted(expected[task]), 5)
            assert_same(file.decode(task), expected[task])
            assert_same(file.decode(task, wanted), {name: expected[task][name] for name in wanted})
            if seed % 5 == 0:
                assert_same(file.load(task).decode(wanted), {n: expected[task][n] for n in wanted})
            elif seed % 5 == 1:
                assert_same(loaded.decode(), expected[loaded.task])
            elif seed % 5 == 2:
                tallcodec.verify(path, base, threads=threads)
                assert stats is None or str(tallcodec.stats(path)) == stats
            elif seed % 5 == 3:
                assert str(file.info) == info
                assert_same(dict(file.state_dict(task)), expected[task])
            return True

        assert all(at_once([lambda seed=seed: everything(seed) for seed in range(100)]))


def test_closing_while_a_hundred_threads_decode(awkward_file):
    path, base = awkward_file
    for _ in range(5):
        file = tallcodec.open(path, "np", base, threads=2)
        expected = file.decode("dtd")

        def decode(file=file, expected=expected):
            try:
                for _ in range(50):
                    assert_same(file.decode("dtd"), expected)
                    assert_same(file.load("dtd").decode(), expected)
            except ClosedError:
                return "closed"

        ends = at_once([decode] * 99 + [file.close])
        assert ends.count("closed") == 99
        with pytest.raises(ClosedError):
            file.decode("dtd")


def test_what_a_file_leaves_outlives_it(awkward_file):
    """Collected in any order: no lazy state, loaded task or tensor needs what is gone."""
    path, base = awkward_file
    expected = tallcodec.open(path, "np", base).decode("cars")
    for order in itertools.permutations(["loaded", "state", "decoded"]):
        file = tallcodec.open(path, "np", base)
        left = {"loaded": file.load("cars"), "state": file.state_dict("cars"),
                "decoded": file.decode("cars")}  # fmt: skip
        file.cycle = file  # for the collector to find
        del file
        for name in order:
            gc.collect()
            last = left.pop(name)
            assert_same(last.decode() if name == "loaded" else dict(last), expected)
        del last
    gc.collect()


# Other processes.


def decode_here(file, task):
    """What a process makes of a handle that it was handed."""
    with file if isinstance(file, tallcodec.File) else file._file:
        return digest(file.decode(task) if isinstance(file, tallcodec.File) else file.decode())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_of_processes(awkward_file, method):
    path, base = awkward_file
    with tallcodec.open(path, "np", base, threads=2) as file:
        calls = [(file, "cars"), (file, "dtd"), (file.load("dtd"), "dtd")]
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.starmap(decode_here, calls)
        assert found == [digest(file.decode(task)) for _, task in calls]


def exit_code(child, patience=60):
    """Of a process; one that is stuck is killed, so that it does not hold up all others."""
    killer = threading.Timer(patience, os.kill, (child, signal.SIGKILL))
    killer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        killer.cancel()


def test_a_child_of_a_process_with_running_threads(awkward_file):
    """It has the handle, and none of the threads that were in the midst of using it."""
    path, base = awkward_file
    with tallcodec.open(path, "np", base, threads=2) as file:
        expected, loaded, stop = digest(file.decode("dtd")), file.load("dtd"), threading.Event()

        def work():
            while not stop.is_set():
                file.decode("cars")
                file.load("aircraft")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                child = os.fork()
                if not child:
                    wrong = digest(file.decode("dtd")) != expected
                    wrong = wrong or digest(loaded.decode()) != expected
                    os._exit(wrong)
                assert exit_code(child) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


class Decoded:
    """A data set of what a file decodes to."""

    def __init__(self, file):
        self.file, self.loaded = file, file.load("dtd")

    def __len__(self):
        return 8

    def __getitem__(self, i):
        state = self.file.decode("cars") if i % 2 else self.loaded.decode()
        return state["a.weight"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(small_file, method):
    torch = pytest.importorskip("torch")
    with tallcodec.open(small_file, threads=1) as file:
        data = Decoded(file)
        loader = torch.utils.data.DataLoader(
            data, batch_size=2, num_workers=2, multiprocessing_context=method
        )
        assert torch.equal(torch.cat(list(loader)), torch.stack([data[i] for i in range(8)]))


def test_what_was_replaced_is_not_unpickled(small_file, encode):
    with tallcodec.open(small_file, "np") as file:
        pickled = [pickle.dumps(file), pickle.dumps(file.load("cars")),
                   pickle.dumps(file.state_dict("cars"))]  # fmt: skip
        os.replace(encode(*small_family(("cars", "dtd", "more"))), small_file)
        for data in pickled:
            with pytest.raises(FormatError, match="replaced"):
                pickle.loads(data)
        assert file.tasks == ["cars", "dtd"]  # the open one is as it was
        file.decode("cars")


# The end of the interpreter.

EXIT = """
import sys, threading, time
import tallcodec
path, how = sys.argv[1:]
file = tallcodec.open(path, "np", threads=2)
loaded, state = file.load("cars"), file.state_dict("cars")
def encode():
    base = file.decode(None)
    tallcodec.encode(base, {"a": file.decode("cars")}, path + ".2", overwrite=True,
                     progress=lambda *_: None)
calls = [lambda: file.decode("cars"), loaded.decode, lambda: tallcodec.verify(path),
         lambda: tallcodec.stats(path), encode]
def work(call):
    while True:
        call()
if how != "idle":
    for call in calls:
        threading.Thread(target=work, args=[call], daemon=True).start()
    time.sleep(0.2)
if how == "closed":
    file.close()
    file.close()
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["idle", "busy", "closed"])
def test_the_interpreter_ends(tmp_path, how):
    """With open handles, and daemon threads in the midst of everything."""
    base = {"w": normal((1500, 1000), 1)}
    path = tmp_path / "a.tall"
    tallcodec.encode(base, {"cars": {"w": base["w"] + normal((1500, 1000), 2)}}, path)
    for _ in range(8 if how == "busy" else 2):
        done = subprocess.run([sys.executable, "-c", EXIT, path, how], capture_output=True,
                              text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.stdout == "end\n"
        assert done.returncode == 0, (done.returncode, done.stderr)
        assert how == "closed" or not done.stderr
