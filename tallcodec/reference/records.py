"""The numbers and records of docs/format.md."""

import struct
from collections import namedtuple

from ..errors import VersionError
from .formulas import SUM_BLOCK, hash64

MAGIC = b"\x89TALL\r\n\x1a"
VERSION = 1
NONE = SCOPE_BASE = 0xFFFFFFFF
SCOPE_FILE = 0xFFFFFFFE
MAX_RANK = 32

KINDS = BASE, SHARED, MASK, TERNARY_PLANE, SCALES, VERBATIM, FILE = 1, 2, 3, 4, 5, 6, 7  # of planes
RAW, ZSTD, EXTERNAL, GAPS, CONDITIONAL = 0, 1, 2, 3, 4  # plane codings
AS_BASE, MASKED, AS_IS, ABSENT, SPARSE = 0, 1, 2, 3, 4  # entry codings
NOT_ARITHMETIC, OTHER_SHAPE, NOT_IN_BASE, NONFINITE_TASK, NONFINITE_BASE = 1, 2, 3, 4, 5
EMBEDDED, REFERENCED = 1, 2
TALL, MAGNITUDE, ADAPTED, TERNARY = 1, 2, 3, 4
METHODS = {"tall": TALL, "magnitude": MAGNITUDE, "adapted": ADAPTED,
           "ternary": TERNARY}
MERGES = {"task-arithmetic": 1, "average": 2, "ties": 3}
SCALE_MODES = {"none": 0, "unit-gain": 1, "unit-gain-row": 2}


class Record:
    """One kind of record: its type (a named tuple) and its bytes."""

    def __init__(self, name, fields):
        names, codes = zip(*(field.split(":") for field in fields.split()))
        self.type, self.struct = namedtuple(name, names), struct.Struct("<" + "".join(codes))
        self.size = self.struct.size
        self.zero = {n: b"" if c.endswith("s") else 0 for n, c in zip(names, codes)}

    def pack(self, **fields):
        """The record's bytes; fields that are not given are zero."""
        return self.struct.pack(*{**self.zero, **fields}.values())

    def unpack(self, data, offset=0):
        record = self.type(*self.struct.unpack_from(data, offset))
        if any(getattr(record, "reserved", b"")):
            raise VersionError(f"reserved bytes of a {self.type.__name__} record are in use")
        return record


HEADER = Record("Header", "magic:8s version:I header_size:I reserved:48s")
SLOT = Record("Slot", "sequence:Q index_offset:Q index_size:Q index_hash:Q file_size:Q "
               "reserved:16s slot_hash:Q")
INDEX = Record("Index", "tensors:I tasks:I planes:I free:I files:I metas:I dims:Q sums:Q counts:Q "
                "strings:Q writer:8s base_storage:B merge:B scale:B reserved:61s")
TENSOR = Record("Tensor", "name:8s dims:I rank:B dtype:B shared_dtype:B in_base:B base_plane:I "
                 "shared_plane:I scales_plane:I alias:I first_count:I counts:I reserved:24s")
TASK = Record("Task", "name:8s threshold:f method:B reserved:51s")
ENTRY = Record("Entry", "coding:B dtype:B rank:B reason:B dims:I plane:I scales_plane:I scale:f "
                "factor:f set_bits:Q published_bits:Q tau_sq:d dot:d approx_sq:d")
PLANE = Record("Plane", "kind:B coding:B reserved:6s offset:Q size:Q raw_size:Q first_sum:Q")
FREE = Record("Free", "offset:Q size:Q")
FILE_RECORD = Record("File", "scope:I plane:I name:8s")
META = Record("Meta", "scope:I reserved:4s key:8s value:8s")
ABSENT_ENTRY = ENTRY.pack(coding=ABSENT, plane=NONE, scales_plane=NONE)
HEADER_SIZE = HEADER.size + 2 * SLOT.size


def align64(size):
    return -(-size // 64) * 64


def plane_sums(stored):
    """One hash per 65,536 bytes of the plane, padded with zeros to a multiple of 64."""
    padded = stored.ljust(align64(len(stored)), b"\0")
    return [hash64(padded[at : at + SUM_BLOCK]) for at in range(0, len(padded), SUM_BLOCK)]


def sum_count(size):
    return -(-align64(size) // SUM_BLOCK)
