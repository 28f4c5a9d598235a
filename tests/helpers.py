"""What several test files share: states of NumPy arrays, compared, converted and written."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np

import tallcodec
from families import THRESHOLDS, family
from tallcodec import reference
from tallcodec.reference import hash64, records
from tallcodec.tensors import DTYPES, dtype_name, torch_dtype

BF16 = np.dtype(ml_dtypes.bfloat16)


def awkward(seed=0, **options):
    """families.family, and the thresholds of its tasks."""
    base, tasks = family(seed, **options)
    return base, tasks, {name: THRESHOLDS[name] for name in tasks}


def normal(shape, seed=0, dtype=np.float32, spread=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * spread
    return np.asarray(values).astype(dtype)


def encoded(path, base, tasks, **options):
    """The bytes of the file that encode makes."""
    tallcodec.encode(base, tasks, path, overwrite=True, **options)
    return path.read_bytes()


def reference_file(base, tasks, **options):
    """The bytes that the reference makes, by the name of this version."""
    return reference.write(base, tasks, writer=f"tallcodec {tallcodec.__version__}", **options)


def small_family(tasks=("cars", "dtd"), dtype=np.float32):
    """A few ordinary tensors, different in every task."""
    base = {"a.weight": normal((6, 40), 1, dtype), "a.bias": normal(40, 2, dtype)}
    base["b.weight"] = normal((5, 129), 3, dtype)

    def tuned(k):
        return {name: (array.astype(np.float32) + normal(array.shape, 10 * k + i, spread=0.1))
                .astype(dtype) for i, (name, array) in enumerate(base.items())}

    return base, {name: tuned(k + 1) for k, name in enumerate(tasks)}


def same(a, b):
    """Equal in dtype, shape and every bit."""
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert same(found[name], array), name


def to_torch(array):
    """The same bits as a torch tensor, for every dtype of families."""
    import torch

    tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    if array.size:
        flat = torch.from_numpy(np.array(array).reshape(-1).view(np.uint8))
        tensor.view(-1).view(torch.uint8).copy_(flat)
    return tensor


def to_numpy(tensor):
    """The same bits as a NumPy array."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.cpu().numpy().view(dtype).reshape(tuple(tensor.shape))


def torch_state(state):
    return {name: to_torch(array) for name, array in state.items()}


def numpy_state(state):
    return {name: to_numpy(tensor) for name, tensor in state.items()}


def write_safetensors(path, state, metadata=None):
    from safetensors.torch import save_file

    save_file(torch_state(state), path, metadata)
    return path


def seal(planes, index, **changes):
    """A file of these bytes with the right checksums, whatever they hold. Changes are fields of the
    header or of its slot."""
    slot = {"sequence": 1, "index_offset": 192 + len(planes), "index_size": len(index),
            "index_hash": hash64(index), "file_size": 192 + len(planes) + len(index)}  # fmt: skip
    head = {"magic": records.MAGIC, "version": 1, "header_size": 192}
    for name, value in changes.items():
        (slot if name in slot else head)[name] = value
    head, slot = records.HEADER.pack(**head), records.SLOT.pack(**slot)[:56]
    slot += hash64(head + slot).to_bytes(8, "little")
    return head + slot + bytes(64) + planes + index


def unseal(data):
    """(planes, index) of a new file."""
    offset = int.from_bytes(data[72:80], "little")
    return data[192:offset], data[offset:]


def torch_bytes(tensor) -> bytes:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(checkpoint) -> dict:
    return {n: (t.dtype, t.shape, t.read().tobytes()) for n, t in checkpoint.tensors.items()}


def expected(state_dict) -> dict:
    return {
        name: (dtype_name(t.dtype), tuple(t.shape), torch_bytes(t))
        for name, t in sorted(state_dict.items())
    }


def every_dtype():
    """Every dtype, an empty and a 0-d tensor, odd sizes, and a name that is not ASCII."""
    import torch

    generator = torch.Generator().manual_seed(0)
    result = {
        f"{name.lower()}.weight": torch.randint(0, 2, (3, 5, 8), generator=generator)
        .to(torch.uint8)
        .repeat_interleave(dtype.itemsize, dim=-1)
        .view(torch_dtype(name))
        for name, dtype in DTYPES.items()
    }
    result["counter"] = torch.tensor(16777217)
    result["empty"] = torch.empty(0, 7)
    result["scalar"] = torch.tensor(-0.0)
    result["größe"] = torch.randn(131, generator=generator).to(torch.bfloat16)
    return result


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
