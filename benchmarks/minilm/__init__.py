"""A real family: one pretrained MiniLM encoder, fine-tuned on eight text tasks."""

import json
import os
from pathlib import Path

from safetensors.torch import load_file

CACHE = Path(os.environ.get("TALLCODEC_CACHE", Path.home() / ".cache" / "tallcodec")).expanduser()
FAMILY = CACHE / "minilm"
DOWNLOADS = CACHE / "downloads"


class Family:
    """The checkpoints that make_checkpoints.py has written."""

    def __init__(self, folder=FAMILY):
        self.folder = folder
        if not (folder / "meta.json").exists():
            raise SystemExit(
                f"{folder}: no family here. Make it once (11 to 25 minutes on two cores) with\n"
                "    PYTHONPATH=benchmarks python -m minilm.make_checkpoints"
            )
        self.tasks = list(json.loads((folder / "meta.json").read_text())["tasks"])
        self.base_path = folder / "base.safetensors"
        self.paths = {task: folder / "checkpoints" / f"{task}.safetensors" for task in self.tasks}

    def base(self):
        return load_file(self.base_path)

    def checkpoint(self, task):
        return load_file(self.paths[task])
