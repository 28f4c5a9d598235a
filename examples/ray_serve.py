"""Ray Serve: the tasks of one `.tall` file as multiplexed models of one live model.

    tallcodec encode --base bert/ --task cars=cars/ --task dtd=dtd/ -o bert.tall
    cd examples && TALL=../bert.tall serve run ray_serve:app
    curl -H "serve_multiplexed_model_id: cars" --json '{"input_ids": [[101, 102]]}' localhost:8000

A replica has one model and the packed planes of the tasks it was asked for lately; Serve sends a
task's requests to replicas that have its planes.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import tallcodec


class Planes:
    """A task's planes in memory, for as long as Serve keeps this. It calls `__del__` when it evicts
    a model, and Python does once more."""

    def __init__(self, switcher: tallcodec.Switcher, task: str):
        self.switcher, self.task = switcher, task

    def __del__(self):
        self.switcher.forget(self.task)


@serve.deployment
class Tasks:
    def __init__(self, path: str):
        self.file = tallcodec.open(path)
        first = self.file.tasks[0]
        self.model = tallcodec.hf.from_pretrained(self.file, first).eval()
        self.switcher = tallcodec.Switcher(self.model, self.file, task=first)
        self.threads = ThreadPoolExecutor(4)

    @serve.multiplexed(max_num_models_per_replica=3)
    async def planes(self, task: str) -> Planes:
        await asyncio.wrap_future(self.switcher.prefetch(task))
        return Planes(self.switcher, task)

    async def __call__(self, request: Request) -> JSONResponse:
        task, inputs = serve.get_multiplexed_model_id(), await request.json()
        if task not in self.file.tasks:
            return JSONResponse({"error": f"no task {task!r}", "tasks": self.file.tasks}, 404)
        await self.planes(task)
        loop = asyncio.get_running_loop()
        return JSONResponse(await loop.run_in_executor(self.threads, self.answer, task, inputs))

    def answer(self, task: str, inputs: dict) -> dict:
        tensors = {name: torch.tensor(value) for name, value in inputs.items()}
        with self.switcher.task(task, restore=False), torch.inference_mode():
            return {"task": task, "logits": self.model(**tensors).logits.tolist()}


if "TALL" in os.environ:
    app = Tasks.bind(os.environ["TALL"])
