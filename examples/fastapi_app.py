"""A server with one live model for all tasks of a `.tall` file, in FastAPI.

    TALL=bert.tall uvicorn --app-dir examples fastapi_app:app
    curl --json '{"input_ids": [[101, 7592, 102]]}' localhost:8000/cars
    curl localhost:8000/

Requests run in threads; those of one task run side by side, those of another wait for the switch. A
task that does not fit the model (another head, another dtype) gets a 409 that says why.
"""

import os
from contextlib import asynccontextmanager
from dataclasses import asdict

import torch
from fastapi import FastAPI, HTTPException

import tallcodec


@asynccontextmanager
async def lifespan(app: FastAPI):
    with tallcodec.open(os.environ["TALL"], base=os.environ.get("BASE")) as file:
        first = file.tasks[0]
        app.model = tallcodec.hf.from_pretrained(file, first).eval()
        with tallcodec.Switcher(app.model, file, task=first, budget=1 << 30) as app.switcher:
            yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
def state() -> dict:
    switcher = app.switcher
    return {"tasks": switcher.tasks, "current": switcher.current, **asdict(switcher.metrics)}


@app.post("/{task}")
def answer(task: str, inputs: dict) -> dict:
    if task not in app.switcher.tasks:
        raise HTTPException(404, f"no task {task!r}; there are {', '.join(app.switcher.tasks)}")
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    try:
        with app.switcher.task(task, restore=False), torch.inference_mode():
            return {"task": task, "logits": app.model(**tensors).logits.tolist()}
    except tallcodec.TallcodecError as error:
        raise HTTPException(409, str(error)) from error
