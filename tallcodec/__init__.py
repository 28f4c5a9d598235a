"""One file for a base model and all its fine-tuned checkpoints.

    tallcodec.encode("base.safetensors", {"cars": "cars.safetensors"}, "vision.tall")
    with tallcodec.open("vision.tall") as f:
        state_dict = f.decode("cars")
"""

from . import errors
from .encoding import encode
from .errors import TallcodecError
from .file import File, open, verify
from .info import FileInfo, TaskInfo, Verification
from .version import __version__

__all__ = [
    "File", "FileInfo", "TallcodecError", "TaskInfo", "Verification", "__version__", "encode",
    "errors", "open", "verify",
]
