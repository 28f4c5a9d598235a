"""What decodes on a device: CUDA C++ or Triton, which do the same and give the same bits; which of
them there are, and which is used."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from . import _core
from .errors import ArgumentError

UNIT = 524288  # elements of a tensor for which statistics are summed in one go, lane by lane
LANES = 16
_OLDEST = 8, 0  # compute capability that the CUDA kernels are built for
_TOO_OLD = "its kernels are for compute capability {}.{} and more".format(*_OLDEST)


class Block(NamedTuple):
    """Elements of one tensor, on a device. As csrc/kernels.h has it: ``base`` and ``out`` begin
    with the first of ``n`` elements, as ``shared`` does where it has one value per element; what is
    packed, and ``scales``, begin ``phase`` < 128 elements before.

    All are one-dimensional, contiguous torch tensors of one device: values in float32, float16 or
    bfloat16, of whatever alignment.
    """

    n: int
    base: Any  # (n,)
    out: Any  # (n,); None where nothing is decoded
    mask: Any = None  # (⌈(phase + n) / 8⌉,) uint8; None: the base is only converted
    shared: Any = None  # (n,) values or int8; or uint8: signs, packed as the mask
    scales: Any = None  # (⌈(phase + n) / 128⌉,) float32, of an int8 shared vector
    scale: float = 1.0  # g, a float32 value; ignored where there are
    row_scales: Any = None  # float32: g of element i is row_scales[i // row_length]
    row_length: int = 0
    phase: int = 0


class Encoded(NamedTuple):
    """What comes of n elements of a base and its tasks. Bits are packed as in a mask: element i is
    bit i mod 8 of byte i div 8, spare bits 0."""

    shared: Any  # (n,) of the shared vector's dtype
    scales: Any  # (⌈n / 128⌉,) float32 of an int8 shared vector, else None
    masks: list[Any]  # per task (⌈n / 8⌉,) uint8
    set_bits: Any  # (tasks,) int64: bits of the mask
    published_bits: Any  # (tasks,) int64: elements that the rule sets, those where s = 0 too
    agreement: Any  # (tasks + 1,) int64: elements that the rule sets for exactly k tasks
    nonfinite: Any  # (tasks + 1,) int32, not 0 where a task, or last the base, has NaN or infinity


def table_of(numbers: Sequence[Any], device: Any) -> Any:
    """64-bit numbers on a device, without waiting for it."""
    import torch

    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


class Backend(Protocol):
    """The operations. They trust their arguments (tallcodec.gpu checks them), run on the current
    stream of the tensors' device, and wait for nothing."""

    name: str

    def decode(self, blocks: Sequence[Block]) -> None:
        """``out`` = mask ? base + scale · s : base."""

    def encode(
        self, base: Any, tasks: Sequence[Any], thresholds: Sequence[float], shared_dtype: Any,
        rule: str = "published", merged: Any = None,
    ) -> Encoded:
        """The shared vector and all masks in one pass. ``shared_dtype`` is a torch dtype; ``rule``
        "published", "magnitude" or "adapted" (MaskRule in csrc/kernels.h); ``merged`` (n,) float32
        is a multi-task vector to use in place of the sum of task vectors. Tasks may be of dtypes
        other than the base's."""

    def sums(self, block: Block, task: Any) -> Any:
        """(⌈n / UNIT⌉, 3, LANES) float64: Σ τ², Σ τ·m·s, Σ (m·s)² of each unit's elements of a
        lane, added in order; ``scale`` does not count. As csrc/kernels.h's Sums."""

    def agreement(self, masks: Sequence[Any], n: int) -> Any:
        """(masks + 1,) int64: on how many of n elements exactly k masks are set."""

    def overlap(self, masks: Sequence[Any], n: int) -> Any:
        """(masks, masks) int64, symmetric: on how many elements both are set; the diagonal is the
        masks' popcounts."""

    def consensus(self, masks: Sequence[Any], n: int, least: int) -> Any:
        """The mask of the elements on which ``least`` ≥ 1 masks or more are set."""

    def unpack_ternary(
        self, plane: Any, head: int, slots: Any, n: int, mask: Any, signs: Any, status: Any
    ) -> None:
        """A coded ternary plane (docs/format.md, "Ternary planes") into raw bits.

        ``plane``: all of its bytes, uint8; ``head``: how many of them are before its blocks;
        ``slots``: (2048,) int64, what each slot stands for: frequency, then slot − start, 16 bits
        each from the lowest, then the symbol's smallest gap, 27 bits, and its extra bits, 5.
        ``mask`` and ``signs``: (⌈n / 8⌉,) uint8, aligned to 4 bytes. ``status``: (1,) int32, set to
        1 where a block is not sound; whatever the bytes are, nothing outside the arrays is
        touched."""

    def unpack_mask(
        self, plane: Any, n: int, shared: Any, scales: Any, mask: Any, status: Any
    ) -> None:
        """A mask coded given the shared vector (docs/format.md, "Conditional masks"), likewise;
        ``shared`` is (n,) values or int8, with ``scales``."""


@dataclass(frozen=True)
class BackendInfo:
    """A back-end, as :func:`backends` tells of it."""

    name: str
    available: bool
    detail: str
    """Why it is not; of "cpu", which kernels it uses."""
    devices: tuple[str, ...]
    """Where it decodes to: "cpu", "cuda:0", …"""


def backends() -> dict[str, BackendInfo]:
    """What can decode here: "cpu", the C++ core, and of "cuda" and "triton" whether they can, on
    which devices, and if not, why. ``backend=`` of :func:`tallcodec.open`, or TALLCODEC_BACKEND,
    forces one of them."""
    known = _core.kernels.available()
    kernels = os.environ.get("TALLCODEC_KERNELS") or known[0]
    found = [BackendInfo("cpu", kernels in known, f"{kernels} kernels", ("cpu",))]
    for name in ("cuda", "triton"):
        try:
            _backend(name)
            found.append(BackendInfo(name, True, "", _devices(name)))
        except ArgumentError as error:
            found.append(BackendInfo(name, False, str(error), ()))
    return {info.name: info for info in found}


def forced(name: str | None = None) -> str | None:
    """The back-end that an argument names, or else TALLCODEC_BACKEND. Raises ArgumentError where
    it is not there."""
    said = "TALLCODEC_BACKEND" if name is None else "backend"
    name = (os.environ.get("TALLCODEC_BACKEND") or None) if name is None else name
    if name not in (None, "cpu"):
        if not isinstance(name, str) or name not in _MAKERS:
            raise ArgumentError(f"{said}={name}: there are cpu, cuda and triton")
        try:
            _backend(name)
        except ArgumentError as error:
            raise ArgumentError(f"{said}={name}: {error}") from error
    return name


def choose(device: Any, name: str | None = None) -> Backend | None:
    """What decodes to a torch device, or None, to arrays that are NumPy's: a back-end, or None: the
    C++ core (and where the device is not the CPU, "cpu" is forced: its results are copied there).
    ``name``: as in :func:`forced`.

    Raises ArgumentError where there is none.
    """
    name = forced(name)
    if name == "cpu" or device is None:
        return None
    if device.type == "cpu":
        return _backend(name) if name and "cpu" in _devices(name) else None
    missing = []
    for candidate in [name] if name else ["cuda", "triton"]:
        try:
            found = _backend(candidate)
        except ArgumentError as error:
            missing.append(f"{candidate}: {error}")
            continue
        flaw = _flaw(candidate, device)
        if not flaw:
            return found
        missing.append(f"{candidate}: {flaw}")
    raise ArgumentError(
        f"nothing here decodes to {device} ({'; '.join(missing)}); the back-end cpu "
        '(backend="cpu" of tallcodec.open, TALLCODEC_BACKEND=cpu) decodes on the CPU and copies'
    )


@functools.cache
def _backend(name: str) -> Backend:
    """Raises ArgumentError, which says why it is not there."""
    try:
        return _MAKERS[name]()
    except ArgumentError:
        raise
    except Exception as error:  # whatever a broken installation raises
        raise ArgumentError(f"it cannot be used: {error}") from error


def _devices(name: str) -> tuple[str, ...]:
    """Where a back-end works, one that is here."""
    if name in ("cpu", "cuda-host"):
        return ("cpu",)
    import torch

    found = tuple(
        f"cuda:{k}"
        for k in range(torch.cuda.device_count())
        if name != "cuda" or _capability(k) >= _OLDEST
    )
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return ("cpu", *found) if interpreted else found


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    """Initialises CUDA: nothing that is done where no back-end is asked for calls it."""
    import torch

    return torch.cuda.get_device_capability(device)


def _flaw(name: str, device: Any) -> str:
    """Why a back-end that is here does not decode to a device, or ""."""
    if device.type not in {where.split(":")[0] for where in _devices(name)}:
        return "it does not run there"
    if name == "cuda":
        import torch

        index = torch.cuda.current_device() if device.index is None else device.index
        if _capability(index) < _OLDEST:
            return _TOO_OLD
    return ""


def _require(name: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ArgumentError(f"{module} is not installed")
    if not _devices(name):
        import torch

        found = torch.cuda.device_count()
        raise ArgumentError(_TOO_OLD if found else "PyTorch sees no CUDA device")


def _triton() -> Backend:
    _require("triton", "torch", "triton")
    from .kernels_triton import TritonBackend

    return TritonBackend()


def _cuda(name: str) -> Backend:
    count, error = _core.gpu.devices(name)
    if not count:
        raise ArgumentError(error or "the driver finds no device")
    _require(name, "torch")
    from .kernels_cuda import CudaBackend

    return CudaBackend(name)


_MAKERS: dict[str, Callable[[], Backend]] = {
    "triton": _triton,
    "cuda": functools.partial(_cuda, "cuda"),
    "cuda-host": functools.partial(_cuda, "cuda-host"),  # its kernels on the CPU, for tests
}
