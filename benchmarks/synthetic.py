"""Families of random checkpoints in files, of any size, made piece by piece."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from shapes import Shapes

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BASE_SPREAD, TASK_SPREAD = 0.02, 2e-4  # standard deviations of θ₀ and of every τ
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16"}
_CHUNK = 1 << 22  # elements made and written at a time


class Family(NamedTuple):
    shapes: Shapes
    dtype: str
    base: Path
    checkpoints: list[Path]

    @property
    def parameters(self) -> int:
        return elements(self.shapes)

    @property
    def nbytes(self) -> int:
        """Of the tensors of one checkpoint."""
        return self.parameters * DTYPES[self.dtype].itemsize

    @property
    def paths(self) -> list[Path]:
        return [self.base, *self.checkpoints]

    def tasks(self, count: int) -> dict[str, Path]:
        """``count`` names for the checkpoints, in turn where there are fewer."""
        turns = len(self.checkpoints)
        return {f"task{k + 1:02}": self.checkpoints[k % turns] for k in range(count)}


def elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def make_family(folder: Path, shapes: Shapes, dtype: str, checkpoints: int) -> Family:
    """A base and independent Gaussian fine-tunes of it, safetensors files in a new folder."""
    folder.mkdir()
    paths = [folder / f"task{k + 1:02}.safetensors" for k in range(checkpoints)]
    family = Family(shapes, dtype, folder / "base.safetensors", paths)
    random = np.random.Generator(np.random.SFC64(0))
    write_checkpoint(family.base, shapes, dtype, lambda _, n: normal(random, n, BASE_SPREAD))
    for seed, path in enumerate(paths, 1):
        random, base = np.random.Generator(np.random.SFC64(seed)), values(family.base, dtype)

        def tuned(_, n):
            nonlocal base
            here, base = base[:n], base[n:]
            return here.astype(np.float32) + normal(random, n, TASK_SPREAD)

        write_checkpoint(path, shapes, dtype, tuned)
    return family


def normal(random: np.random.Generator, count: int, spread: float) -> np.ndarray:
    return random.standard_normal(count, np.float32) * np.float32(spread)


def write_checkpoint(
    path: Path, shapes: Shapes, dtype: str, make: Callable[[str, int], np.ndarray]
) -> None:
    """A safetensors file, written as it is made: ``make(name, count)`` gives the next values of a
    tensor, in order."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            count = math.prod(shape)
            for at in range(0, count, _CHUNK):
                piece = make(name, min(_CHUNK, count - at))
                file.write(memoryview(piece.astype(DTYPES[dtype], copy=False).view(np.uint8)))


def values(path: Path, dtype: str) -> np.ndarray:
    """All values of such a checkpoint, mapped, in the order of its file."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return np.memmap(path, np.uint8, "r", start).view(DTYPES[dtype])
