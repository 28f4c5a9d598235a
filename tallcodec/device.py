"""Planes on a device: taken there packed, unpacked there, decoded from there."""

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import numbers
from .backends import Backend, Block
from .errors import FormatError
from .tensors import torch_dtype

Piece = tuple[int, int, int]
"""Bytes of a plane in memory: its number, their address and how many there are."""
Record = dict[str, Any]
"""What a device takes for a tensor: csrc/decode.h's DeviceTensor."""

_ALIGN = 64  # of planes in a file
_SCALE_BLOCK = 128  # elements
_BATCH_BYTES = 64 << 20  # of tensors whose planes are loaded at once
_SHARED = ("base", "shared", "shared_scales", "copied")  # by tasks
_OWN = ("mask", "signs", "row_scales")
_CODED = ("coded",)
_ARITHMETIC = {numbers.DTYPES[n]: torch_dtype(n) for n in (*numbers.ARITHMETIC, "I8")}


class Memory:
    """Memory of a device that is filled on one stream and used on others."""

    def __init__(self, size: int, device: torch.device):
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._filled: Any = None

    def seal(self) -> None:
        """All that fills it is queued on the current stream."""
        if self.bytes.is_cuda:
            self._filled = torch.cuda.Event()
            self._filled.record(torch.cuda.current_stream(self.bytes.device))

    def use(self) -> None:
        """Have the current stream wait until it is filled, and whoever gets the memory next wait
        for what the stream does with it."""
        if self._filled is not None:
            stream = torch.cuda.current_stream(self.bytes.device)
            stream.wait_event(self._filled)
            self.bytes.record_stream(stream)


class Plane:
    """Bytes of a plane on a device, and the memory that they are part of."""

    __slots__ = ("bytes", "memory", "__weakref__")

    def __init__(self, memory: Memory, begin: int, size: int):
        self.memory = memory
        self.bytes = memory.bytes[begin : begin + size]


class Residents:
    """The planes of a file that tasks share, once on a device, for as long as one of them is there.
    The lock is held while planes are added."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.planes: weakref.WeakValueDictionary[int, Plane] = weakref.WeakValueDictionary()


class Recipe(NamedTuple):
    """How a tensor, or a part of one, is made: of blocks, one behind the other, or by a copy."""

    blocks: list[Block]
    copied: torch.Tensor | None  # uint8


class Decoding:
    """Decodes tensors of a task to a device, some at a time, whose planes do not stay there. Work
    is queued on the device's current stream."""

    def __init__(self, file: Any, number: int, device: torch.device, backend: Backend):
        self._source = _Source(file, number, file._check)
        self._device, self._backend = device, backend
        self._statuses: list[_Status] = []

    def decode(self, parts: Sequence[tuple[int, torch.Tensor, int, int]]) -> None:
        """Decode parts of tensors: (number, flat memory on the device, first element, elements).
        What they are decoded from is checked before any is written to, but for whether coded planes
        are sound: see :meth:`finish`. Raises what decoding on the CPU does."""
        plan = self._source.plan([(tensor, first, count) for tensor, _, first, count in parts])
        records = plan.tensors()
        pieces = _pieces(records, (*_SHARED[:-1], *_OWN, *_CODED))
        planes = _upload(pieces, self._source.mapping, self._device)
        unpacked = _Unpacked(records, planes.__getitem__, self._device, self._backend)
        self._statuses.append(unpacked.status)
        recipes = [
            _recipe(record, planes.__getitem__, unpacked.bits)
            if record["copied"] is None
            else Recipe([], _host(*record["copied"][1:]))
            for record in records
        ]
        _decode(self._backend, zip(recipes, (out for _, out, *_ in parts)))

    def finish(self) -> None:
        """Raise FormatError where a coded plane was not sound: what is decoded is not, either."""
        _require_sound(self._statuses, self._source)


class Planes:
    """Planes of tensors of a task on a device, to decode from, from any number of threads. The
    base's and shared ones are there once for all tasks of the file.

    Raises what :meth:`tallcodec.File.load` does.
    """

    def __init__(
        self, file: Any, number: int, tensors: Iterable[int], device: torch.device, backend: Backend
    ):
        self.device = device
        self.shared: set[Plane] = set()
        """Those of the base and the shared vector."""
        self._backend = backend
        self._recipes: dict[int, Recipe] = {}
        self._memories: set[Memory] = set()
        self._sizes: dict[Any, int] = {}  # of the task's own
        source, statuses = _Source(file, number, verify=True), []
        originals = list(dict.fromkeys(map(source.core.original, tensors)))
        residents: Residents = file._on_device.setdefault(device, Residents())
        with residents.lock:
            for batch in _batches(originals, lambda t: source.core.info(number, t)[2]):
                statuses.append(self._load(source, batch, residents))
                file._let_go(_BATCH_BYTES)
            _require_sound(statuses, source)

    def bytes(self) -> int:
        """How many the task's own planes take."""
        return sum(self._sizes.values())

    def recipe(self, tensor: int) -> Recipe:
        """How a whole tensor is made, for work that is queued on the current stream next."""
        for memory in self._memories:
            memory.use()
        return self._recipes[tensor]

    def decode(self, targets: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Decode whole tensors: (number, flat memory on the device)."""
        for memory in self._memories:
            memory.use()
        _decode(self._backend, ((self._recipes[tensor], out) for tensor, out in targets))

    def _load(self, source: "_Source", tensors: list[int], residents: Residents) -> "_Status":
        there = dict(residents.planes)
        plan = source.plan([(tensor, 0, 1 << 63) for tensor in tensors], set(there))
        records = plan.tensors()
        shared, own, coded = (
            _upload([p for p in _pieces(records, roles) if p[1]], source.mapping, self.device)
            for roles in (_SHARED, _OWN, _CODED)
        )
        there |= {number: plane for (number, *_), plane in shared.items()}

        def find(piece: Piece) -> Plane:
            return own.get(piece) or coded.get(piece) or there[piece[0]]

        used = {piece: there[piece[0]] for piece in _pieces(records, _SHARED)}
        memories = {plane.memory for plane in used.values()}
        for memory in memories:
            memory.use()
        unpacked = _Unpacked(records, find, self.device, self._backend)
        self._recipes |= {t: _recipe(r, find, unpacked.bits) for t, r in zip(tensors, records)}
        verbatim = {r["copied"] for r in records if r["coding"] == numbers.VERBATIM} - {None}
        self.shared |= {plane for piece, plane in used.items() if piece not in verbatim}
        self._sizes |= {number: size for number, _, size in verbatim}
        self._sizes |= {piece: piece[2] for piece in own} | unpacked.sizes
        new = {plane.memory for plane in (*shared.values(), *own.values())} | {unpacked.memory}
        for memory in new:
            memory.seal()
        self._memories |= memories | new
        residents.planes.update(there)
        return unpacked.status


class _Source:
    """What a file has of a task, and what keeps it open."""

    def __init__(self, file: Any, number: int, verify: bool):
        self._file, self._number, self._verify = file, number, verify
        self._base, self.core = file._base, file._file  # in this order, see File.close
        self.label = file._label
        begin, size = self.core.memory()
        self.mapping = range(begin, begin + size)

    def plan(self, parts: list[tuple[int, int, int]], there: Iterable[int] = ()) -> Any:
        """What a device that has the planes ``there`` takes for parts of tensors: (number, first
        element, elements)."""
        return self._file._device_plan(self._number, parts, there, self._verify, self._base)


class _Status(NamedTuple):
    """Whether planes were sound, once they are unpacked: what outlives their bits."""

    numbers: list[int]
    flaws: torch.Tensor  # (planes,) int32 on the device, not 0 where one was not


class _Unpacked:
    """The bits of the coded planes among what was taken: each as (mask, signs), signs of ternary
    ones only."""

    def __init__(
        self, records: list[Record], find: Callable[[Piece], Plane], device: torch.device,
        backend: Backend,
    ):  # fmt: skip
        coded = {r["coded"]: r for r in records if r["coded"] is not None}
        self.sizes = {
            piece: _bit_bytes(r["stop"] - r["start"]) * (2 if r["slots"] else 1)
            for piece, r in coded.items()
        }
        flaws = torch.zeros(len(coded), dtype=torch.int32, device=device)
        self.status = _Status([number for number, *_ in coded], flaws)
        self.bits: dict[Piece, tuple[Any, Any]] = {}
        room = [(size + 7) // 8 * 8 for size in self.sizes.values()]
        self.memory = Memory(sum(room), device)
        slots = b"".join(r["slots"] for r in coded.values() if r["slots"])
        tables = iter(_to_device(slots, torch.int64, device).view(-1, 2048)) if slots else iter(())
        begin = 0
        for k, (piece, r) in enumerate(coded.items()):
            n, status = r["stop"] - r["start"], flaws[k : k + 1]
            bits = self.memory.bytes[begin : begin + room[k]]
            begin += room[k]
            plane = find(piece).bytes
            if r["slots"]:
                mask, signs = (half[: _bit_bytes(n)] for half in bits.view(2, -1))
                backend.unpack_ternary(plane, r["head"], next(tables), n, mask, signs, status)
            else:
                mask, signs = bits[: _bit_bytes(n)], None
                shared, scales = _shared(r, find)
                backend.unpack_mask(plane, n, shared, scales, mask, status)
            self.bits[piece] = mask, signs


def _require_sound(statuses: list[_Status], source: _Source) -> None:
    """Wait for planes to be unpacked. Raises FormatError, which names one that is not sound."""
    statuses = [status for status in statuses if status.numbers]
    if not statuses:
        return
    numbers = [number for status in statuses for number in status.numbers]
    for number, flaw in zip(numbers, torch.cat([status.flaws for status in statuses]).tolist()):
        if flaw:
            what = source.core.describe(number)
            raise FormatError(f"{source.label}: {what}: is not soundly coded")


def _recipe(
    r: Record, find: Callable[[Piece], Plane], bits: dict[Piece, tuple[Any, Any]]
) -> Recipe:
    if r["copied"] is not None:
        return Recipe([], find(r["copied"]).bytes)
    first, end, start = r["first"], r["end"], r["start"]
    if first == end:
        return Recipe([], None)
    base_start = first // _SCALE_BLOCK * _SCALE_BLOCK
    base = find(r["base"]).bytes.view(_ARITHMETIC[r["base_dtype"]])
    if r["coded"] is None:
        mask, signs = (r[role] and find(r[role]).bytes for role in ("mask", "signs"))
    else:
        mask, signs = bits[r["coded"]]
    shared, scales = (signs, None) if signs is not None else _shared(r, find)
    row_length, row_scales = r["row_length"], None
    cuts = [first, end]
    if r["row_scales"] is not None:
        row_scales = find(r["row_scales"]).bytes.view(torch.float32)
        # Rows are counted from the beginning of a block.
        cuts = sorted({first, min(first + -first % row_length, end), end})
    blocks = []
    for a, b in zip(cuts, cuts[1:]):
        phase = a % _SCALE_BLOCK
        packed = a - phase - start
        octets = slice(packed // 8, _bit_bytes(b - start))
        blocks.append(
            Block(
                n=b - a,
                base=base[a - base_start : b - base_start],
                out=None,
                mask=mask[octets],
                shared=shared[a - start : b - start] if signs is None else signs[octets],
                scales=None if scales is None else scales[packed // _SCALE_BLOCK :],
                scale=r["scale"],
                row_scales=row_scales if a == first or row_scales is None else row_scales[1:],
                row_length=0 if row_scales is None else row_length,
                phase=phase,
            )
        )
    return Recipe(blocks, None)


def _shared(r: Record, find: Callable[[Piece], Plane]) -> tuple[Any, Any]:
    """The shared vector, and the scales of an int8 one."""
    values = find(r["shared"]).bytes.view(_ARITHMETIC[r["shared_dtype"]])
    scales = r["shared_scales"]
    return values, None if scales is None else find(scales).bytes.view(torch.float32)


def _decode(backend: Backend, made: Iterable[tuple[Recipe, torch.Tensor]]) -> None:
    """Make tensors in flat memory."""
    blocks, copies = [], []
    for recipe, out in made:
        at = 0
        for block in recipe.blocks:
            blocks.append(block._replace(out=out[at : at + block.n]))
            at += block.n
        if recipe.copied is not None:
            copies.append((out.view(torch.uint8), recipe.copied))
    if blocks:
        backend.decode(blocks)
    if copies:
        with torch.inference_mode():  # in which all tensors can be written to
            torch._foreach_copy_(*zip(*copies))


def _pieces(records: Iterable[Record], roles: Sequence[str]) -> list[Piece]:
    return [record[role] for record in records for role in roles if record[role] is not None]


def _upload(pieces: Iterable[Piece], mapping: range, device: torch.device) -> dict[Piece, Plane]:
    """Take pieces to a device, those that lie side by side in a file's mapping at once.

    They are copied from pageable memory, which has been read when this returns.
    """
    runs: list[tuple[int, int, list[Piece]]] = []
    for piece in sorted(set(pieces), key=lambda p: p[1]):
        begin, end = piece[1], piece[1] + piece[2]
        if begin in mapping:
            begin -= (begin - mapping.start) % _ALIGN  # so that every piece is aligned in its run
            if runs and runs[-1][0] in mapping and begin <= runs[-1][1] + _ALIGN:
                start, last, run = runs.pop()
                runs.append((start, max(last, end), [*run, piece]))
                continue
        runs.append((begin, end, [piece]))
    planes = {}
    for begin, end, run in runs:
        memory = Memory(end - begin, device)
        memory.bytes.copy_(_host(begin, end - begin))
        planes |= {piece: Plane(memory, piece[1] - begin, piece[2]) for piece in run}
    return planes


def _to_device(content: bytes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype).to(device)


def _host(address: int, size: int) -> torch.Tensor:
    """Bytes in memory, which somebody keeps, as a tensor that is only read."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _bit_bytes(n: int) -> int:
    return (n + 7) // 8


def _batches(tensors: Iterable[int], size: Callable[[int], int]) -> Iterator[list[int]]:
    batch, room = [], _BATCH_BYTES
    for tensor in tensors:
        batch.append(tensor)
        room -= size(tensor)
        if room <= 0:
            yield batch
            batch, room = [], _BATCH_BYTES
    if batch:
        yield batch
