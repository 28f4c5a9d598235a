"""One file for a base model and all its fine-tuned checkpoints.

    tallcodec.encode("base.safetensors", {"cars": "cars.safetensors"}, "vision.tall")
    with tallcodec.open("vision.tall") as f:
        state_dict = f.decode("cars")
"""

import importlib

try:
    from . import _core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tallcodec's extension is not here. Its source folder shadows an installed package: run "
        "from another folder, or `pip install -e .`"
    ) from error
from . import errors, hf, vllm
from .backends import BackendInfo, backends
from .encoding import encode
from .errors import TallcodecError
from .file import File, Loaded, open
from .info import FileInfo, TaskInfo, Verification
from .merging import MergeInfo, merge
from .stats import FileStats, stats
from .switcher import Switcher, SwitchMetrics
from .tasks import add, compact, remove
from .verify import verify
from .version import __version__


def __getattr__(name: str):
    if name in ("dcp", "gpu"):  # which import PyTorch
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BackendInfo", "File", "FileInfo", "FileStats", "Loaded", "MergeInfo", "SwitchMetrics",
    "Switcher", "TallcodecError", "TaskInfo", "Verification", "__version__", "add", "backends",
    "compact", "encode", "errors", "hf", "merge", "open", "remove", "stats", "verify", "vllm",
]  # fmt: skip
