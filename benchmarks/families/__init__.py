"""Real families of small networks: one base and its fine-tuned checkpoints, made in minutes.

    PYTHONPATH=benchmarks python -m families [NAME ...]     makes and scores them

| family | network | tasks | the base |
|---|---|---|---|
| digits | convolutional | 12 other views of handwritten digits | knows digits |
| words | GRU, next character | words of 22 languages | has seen them all, mixed |
| names | LSTM, next character | names of people in 40 countries | has seen English names alone |
| code | transformer, next character | Python source of 16 packages | has read 12 other packages |
| minilm | transformer | 8 text tasks (the package beside this one) | a sentence encoder |

Each of the first four trains on one core, the same each time, and stays in the cache. In *names*
the sizes of the task vectors differ eightfold: data, training and distance from English do.

    family, Scorer = load("words")
    scorer = Scorer(family, "test")
    scores = {task: scorer.score(task, family.checkpoint(task)) for task in family.tasks}
    scorer.kl_left(scorer.mean(scores))
"""

import importlib
import json

from safetensors.torch import load_file

from minilm import CACHE

FAMILIES = {"digits": "families.digits", "words": "families.text", "names": "families.text",
            "code": "families.code"}


class Family:
    """The checkpoints of a family in the cache: state dicts of float32 tensors."""

    def __init__(self, name, folder=None):
        self.name = name
        self.folder = folder or CACHE / "families" / name
        self.tasks = list(json.loads((self.folder / "meta.json").read_text())["tasks"])
        self.base_path = self.folder / "base.safetensors"
        self.paths = {task: self.folder / "checkpoints" / f"{task}.safetensors"
                      for task in self.tasks}

    def base(self):
        return load_file(self.base_path)

    def checkpoint(self, task):
        return load_file(self.paths[task])


def load(name):
    """A family, made first unless the cache has it, and the class that scores it."""
    if name == "minilm":
        from minilm import Family as MiniLM
        from minilm.evaluate import Scorer
        return MiniLM(), Scorer
    if name not in FAMILIES:
        raise SystemExit(f"{name}: no such family; there are {', '.join(FAMILIES)} and minilm")
    module = importlib.import_module(FAMILIES[name])
    folder = CACHE / "families" / name
    if not (folder / "meta.json").exists():
        module.make(name, folder)
    return Family(name, folder), module.Scorer
