"""The whole codec once more, in plain NumPy: a reader, a writer and changes of files, made from
docs/format.md.

It is the oracle of the test suite: slow, obvious, and equal to the C++ implementation byte for
byte. Everything is held in memory and nothing is shared with the fast code but the specification.
"""

from . import formulas, records
from .changes import add, compact, remove
from .formulas import hash64
from .reader import Reference, read
from .writer import write

__all__ = [
    "Reference", "add", "compact", "formulas", "hash64", "read", "records", "remove", "write",
]  # fmt: skip
