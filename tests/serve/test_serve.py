"""Servers that switch one model from task to task on every request, asked over HTTP.

Run by `make test-serve`, in an environment of its own: Ray Serve on a local cluster, FastAPI under
uvicorn. TALLCODEC_REQUESTS says how many requests each gets (default 10,000).
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

import tallcodec
from tuning import save_tuned

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
REQUESTS = int(os.environ.get("TALLCODEC_REQUESTS", "10000"))
TASKS = ("a", "b", "c", "d", "e")
INPUTS = [[[3, 5, 7, 11]], [[2] * 9], [[9, 8, 7, 6, 5, 4]]]


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A file of five tasks of a small BERT, and the logits of each task's decoded checkpoint."""
    folder = tmp_path_factory.mktemp("family")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        vocab_size=100, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder / "base")
    save_tuned(model, folder, TASKS, 0.1)
    path = folder / "f.tall"
    methods = dict.fromkeys(TASKS, "tall") | {"b": "ternary", "d": "ternary"}
    tallcodec.encode(folder / "base", {t: folder / t for t in TASKS}, path, method=methods)
    expected = {}
    for task in TASKS:
        model = tallcodec.hf.from_pretrained(path, task).eval()
        with torch.inference_mode():
            for k, ids in enumerate(INPUTS):
                expected[task, k] = model(torch.tensor(ids)).logits
    return path, expected


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(url, body, headers=()):
    headers = {"Content-Type": "application/json"} | dict(headers)
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def ask_many(ask, expected):
    """Asks for another task on every request, four at a time; gives requests per second. Logits may
    differ in their last bits, as torch's own do from one number of threads to another."""

    def one(number):
        choose = random.Random(number)
        task, k = choose.choice(TASKS), choose.randrange(len(INPUTS))
        answer = ask(task, {"input_ids": INPUTS[k]})
        same = torch.allclose(torch.tensor(answer["logits"]), expected[task, k], atol=1e-5)
        return same and answer["task"] == task

    start = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        right = sum(threads.map(one, range(REQUESTS)))
    assert right == REQUESTS, f"{REQUESTS - right} of {REQUESTS} answers are wrong"
    return REQUESTS / (time.perf_counter() - start)


def wait_for(url, process, log):
    deadline = time.monotonic() + 120
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5)
        except urllib.error.HTTPError:
            return None
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def test_the_tasks_differ(family):
    _, expected = family
    for k in range(len(INPUTS)):
        for x in TASKS:
            for y in TASKS:
                assert x == y or not torch.allclose(expected[x, k], expected[y, k], atol=1e-3)


def test_fastapi(family, tmp_path, capsys):
    path, expected = family
    port, log = free_port(), tmp_path / "log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [BIN / "uvicorn", "--app-dir", "examples", "fastapi_app:app", "--port", str(port),
             "--log-level", "warning"],
            cwd=ROOT, env=os.environ | {"TALL": str(path)}, stdout=out, stderr=out)  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, server, log)
        speed = ask_many(lambda task, body: post(f"{url}/{task}", body), expected)
        with urllib.request.urlopen(url) as response:
            state = json.loads(response.read())
        assert state["tasks"] == list(TASKS) and state["switches"] > REQUESTS / 8
        assert state["misses"] <= len(TASKS)
        with pytest.raises(urllib.error.HTTPError) as error:
            post(f"{url}/none", {"input_ids": INPUTS[0]})
        assert error.value.code == 404
    finally:
        server.terminate()
        server.wait(30)
    with capsys.disabled():
        print(f"\nFastAPI: {speed:.0f} requests/s, {state['switches']} switches of "
              f"{state['milliseconds'] / state['switches']:.2f} ms")  # fmt: skip


def test_ray_serve(family, monkeypatch, capsys):
    path, expected = family
    ray = pytest.importorskip("ray")
    from ray import serve

    monkeypatch.setenv("TALL", str(path))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
             runtime_env={"env_vars": {"PYTHONPATH": str(ROOT / "examples")}})  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        from ray_serve import Tasks

        serve.run(Tasks.bind(str(path)))
        url = f"http://127.0.0.1:{port}/"

        def ask(task, body):
            return post(url, body, {"serve_multiplexed_model_id": task})

        speed = ask_many(ask, expected)  # three of five tasks stay: others are evicted all the time
        with pytest.raises(urllib.error.HTTPError) as error:
            ask("none", {"input_ids": INPUTS[0]})
        assert error.value.code == 404
    finally:
        serve.shutdown()
        ray.shutdown()
    with capsys.disabled():
        print(f"\nRay Serve: {speed:.0f} requests/s")


def test_evicting_twice_is_harmless(family, monkeypatch):
    """Serve calls `__del__` of a model that it evicts, and Python does once more."""
    path, expected = family
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from ray_serve import Planes

    model = tallcodec.hf.from_pretrained(path, "a").eval()
    with tallcodec.Switcher(model, path, task="a") as switcher:
        for task in ("a", "b"):
            switcher.prefetch(task).result()
            planes = Planes(switcher, task)
            planes.__del__()
            del planes
        with switcher.task("b"), torch.inference_mode():
            logits = model(torch.tensor(INPUTS[0])).logits
        assert torch.allclose(logits, expected["b", 0], atol=1e-6)
