"""Decoding into memory that other processes see."""

import multiprocessing
from multiprocessing import shared_memory

import numpy as np
import pytest

import tallcodec
from helpers import small_family


def digest(name, layout):
    """What another process finds there."""
    memory = shared_memory.SharedMemory(name)
    try:
        arrays = {key: np.ndarray(shape, np.float32, memory.buf, offset)
                  for key, (shape, offset) in layout.items()}  # fmt: skip
        return {key: array.tobytes() for key, array in arrays.items()}
    finally:
        arrays = None
        memory.close()


@pytest.mark.parametrize("method", ["tall", "ternary"])
def test_numpy_arrays_over_shared_memory(encode, method):
    path = encode(*small_family(), method=method)
    with tallcodec.open(path, "np") as file:
        expected = file.decode("cars")
        layout, end = {}, 0
        for key, array in expected.items():
            layout[key], end = (array.shape, end), end + array.nbytes
        memory = shared_memory.SharedMemory(create=True, size=end)
        try:
            out = {key: np.ndarray(shape, np.float32, memory.buf, offset)
                   for key, (shape, offset) in layout.items()}  # fmt: skip
            file.decode("cars", out=out)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(digest, (memory.name, layout))
        finally:
            out = None
            memory.close()
            memory.unlink()
    assert found == {key: array.tobytes() for key, array in expected.items()}


def test_torch_tensors_in_shared_memory(encode):
    torch = pytest.importorskip("torch")
    path = encode(*small_family())
    with tallcodec.open(path) as file:
        expected = file.decode("dtd")
        out = {key: torch.zeros_like(tensor).share_memory_() for key, tensor in expected.items()}
        addresses = {key: tensor.data_ptr() for key, tensor in out.items()}
        file.decode("dtd", out=out)
    for key, tensor in out.items():
        assert tensor.is_shared() and tensor.data_ptr() == addresses[key]
        assert torch.equal(tensor, expected[key])
