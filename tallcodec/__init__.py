"""One file for a base model and all its fine-tuned checkpoints.

    tallcodec.encode("base.safetensors", {"cars": "cars.safetensors"}, "vision.tall")
    with tallcodec.open("vision.tall") as f:
        state_dict = f.decode("cars")
"""

from . import errors, hf
from .encoding import encode
from .errors import TallcodecError
from .file import File, Loaded, open, verify
from .info import FileInfo, TaskInfo, Verification
from .merging import MergeInfo, merge
from .stats import FileStats, stats
from .switcher import Switcher, SwitchMetrics
from .version import __version__

__all__ = [
    "File", "FileInfo", "FileStats", "Loaded", "MergeInfo", "SwitchMetrics", "Switcher",
    "TallcodecError", "TaskInfo", "Verification", "__version__", "encode", "errors", "hf", "merge",
    "open", "stats", "verify",
]  # fmt: skip
