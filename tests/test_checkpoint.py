"""Files to tensors, held against safetensors and torch themselves."""

import errno
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from helpers import contents, every_dtype, expected, names_in
from tallcodec.checkpoint import is_side_file, open_checkpoint
from tallcodec.errors import CheckpointError, ClosedError, ReadError
from tallcodec.tensors import DTYPES, dtype_name, torch_dtype

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def state_dict():
    return every_dtype()


def raw_safetensors(path: Path, header, data=b"", length=None) -> Path:
    """A safetensors file with exactly this header, an object or ready bytes."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape,
            "data_offsets": [begin, end]}


def write_bytes(path: Path, data=b"abc") -> Path:
    """A checkpoint with these bytes as tensor "a"."""
    if path.suffix == ".safetensors":
        return raw_safetensors(path, {"a": entry(0, len(data))}, data)
    torch.save({"a": torch.tensor(list(data), dtype=torch.uint8)}, path)
    return path


def rezip(path: Path, change=lambda name, data: data, **options) -> Path:
    """An archive of torch.save as another tool packs it, its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records:
            with archive.open(name, "w", force_zip64=True) as record:
                record.write(change(name.partition("/")[2], data))
    return path


# Reading what others wrote


def test_reads_safetensors(tmp_path, state_dict):
    path = tmp_path / "a.safetensors"
    safetensors_torch.save_file(state_dict, path, metadata={"format": "pt", "note": "ü"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "safetensors" and checkpoint.label == str(path)
        assert checkpoint.metadata == {"format": "pt", "note": "ü"} and checkpoint.files == {}
        assert list(checkpoint.tensors) == sorted(state_dict)
        assert contents(checkpoint) == expected(state_dict)
        for tensor in checkpoint.tensors.values():
            assert os.pread(tensor.fd, tensor.nbytes, tensor.offset) == tensor.read().tobytes()


def test_reads_save_model_with_tied_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    safetensors_torch.save_model(model, str(tmp_path / "a.safetensors"))
    loaded = safetensors_torch.load_file(tmp_path / "a.safetensors")
    with open_checkpoint(str(tmp_path / "a.safetensors")) as checkpoint:
        assert contents(checkpoint) == expected(loaded)
        assert len(checkpoint.tensors) == 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_reads_torch_files(tmp_path, state_dict, suffix, legacy):
    path = tmp_path / f"a{suffix}"
    if legacy:  # it has no classes for the storages of newer dtypes
        newer = ("U16", "U32", "U64", "F8_")
        state_dict = {n: t for n, t in state_dict.items() if not n.upper().startswith(newer)}
    torch.save(state_dict, path, _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "torch"
        assert contents(checkpoint) == expected(state_dict)
        assert all((tensor.fd < 0) == legacy for tensor in checkpoint.tensors.values())


def test_reads_state_dict_of_torch_tensors(state_dict):
    state_dict["parameter"] = torch.nn.Parameter(torch.randn(3))
    with open_checkpoint(state_dict) as checkpoint:
        assert (checkpoint.kind, checkpoint.label) == ("memory", "state dict")
        assert contents(checkpoint) == expected(state_dict)


def test_memory_that_is_fit_is_not_copied():
    tensor, array = torch.arange(5.0), np.arange(5.0)
    with open_checkpoint({"t": tensor, "a": array}) as checkpoint:
        assert checkpoint.tensors["t"].offset == tensor.data_ptr()
        assert checkpoint.tensors["a"].offset == array.ctypes.data


def test_memory_outlives_the_callers_reference():
    source = {"a": np.arange(1000), "b": torch.arange(1000).view(10, 100).T}
    with open_checkpoint(source) as checkpoint:
        source.clear()
        assert (checkpoint.tensors["a"].read().view("<i8") == np.arange(1000)).all()
        transposed = checkpoint.tensors["b"].read().view("<i8").reshape(100, 10)
        assert (transposed == np.arange(1000).reshape(10, 100).T).all()


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_arrays_of_every_dtype(name):
    array = np.arange(12).reshape(3, 4).astype(DTYPES[name].numpy)
    views = {
        "plain": array,
        "transposed": array.T,
        "strided": array[:, ::2],
        "scalar": array[1, 1:2].reshape(()),
    }
    with open_checkpoint(views) as checkpoint:
        for key, view in views.items():
            tensor = checkpoint.tensors[key]
            assert (tensor.dtype, tensor.shape) == (name, view.shape)
            assert tensor.read().tobytes() == view.tobytes()


def test_big_endian_arrays_are_converted():
    array = np.array([1.5, -2.0, 3e38], ">f4")
    with open_checkpoint({"a": array}) as checkpoint:
        assert checkpoint.tensors["a"].read().tobytes() == array.astype("<f4").tobytes()


def test_dtype_names_agree_with_torch_and_numpy():
    for name, dtype in DTYPES.items():
        assert dtype_name(dtype.numpy) == name == dtype_name(torch_dtype(name))
        assert dtype.itemsize == dtype.numpy.itemsize == torch_dtype(name).itemsize
    assert dtype_name(np.dtype(np.longlong)) == "I64"
    assert dtype_name(np.dtype(">f8")) == "F64"
    assert dtype_name(np.dtype(ml_dtypes.bfloat16)) == "BF16"
    assert dtype_name(torch.complex128) is None


def test_lazy_bits_of_torch_are_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    with open_checkpoint({"a": tensor.conj(), "b": tensor}) as checkpoint:
        assert checkpoint.tensors["a"].read().view("<c8").tolist() == [1 - 2j, 3 + 4j]
        assert checkpoint.tensors["a"].offset != checkpoint.tensors["b"].offset


def test_tied_weights_share_memory():
    tensor, array = torch.randn(4, 4), np.ones((2, 2))
    source = {
        "a": tensor, "b": torch.nn.Parameter(tensor), "transposed": tensor.T, "again": tensor.T,
        "other": tensor.view(torch.int32), "flat": tensor.view(-1), "equal": tensor.clone(),
        "n": array, "m": array.view(),
    }
    with open_checkpoint(source) as checkpoint:
        address = {name: tensor.offset for name, tensor in checkpoint.tensors.items()}
    assert address["a"] == address["b"] == address["other"] == address["flat"]
    assert address["n"] == address["m"] and address["transposed"] == address["again"]
    assert len({address[n] for n in ("a", "transposed", "equal", "n")}) == 4


def test_tied_weights_of_a_torch_file(tmp_path):
    tensor = torch.randn(4)
    torch.save({"a": tensor, "b": tensor, "c": tensor.clone()}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        a, b, c = (checkpoint.tensors[name].offset for name in "abc")
        assert a == b != c


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_close_is_idempotent_and_final(tmp_path, name):
    with open_checkpoint(write_bytes(tmp_path / name)) as checkpoint:
        tensor = checkpoint.tensors["a"]
        assert tensor.read().tobytes() == b"abc"
    checkpoint.close()
    for action in (tensor.read, checkpoint.check_unchanged):
        with pytest.raises(ClosedError, match=name):
            action()
    with pytest.raises(OSError):
        os.fstat(tensor.fd)


# Torch files: where tensors lie in them


def test_views_lie_in_their_storage(tmp_path):
    whole = torch.arange(60, dtype=torch.int16).view(6, 10)
    state_dict = {
        "whole": whole, "rows": whole[2:4], "row": whole[5], "last": whole[5, 9], "none": whole[6:],
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }  # fmt: skip
    torch.save(state_dict, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert contents(checkpoint) == expected(state_dict)
        begin = checkpoint.tensors["whole"].offset
        offsets = [checkpoint.tensors[n].offset - begin for n in ("rows", "row", "last", "none")]
        assert offsets == [40, 100, 118, 120]
        for tensor in checkpoint.tensors.values():
            assert os.pread(tensor.fd, tensor.nbytes, tensor.offset) == tensor.read().tobytes()


def test_elements_out_of_order_are_copied(tmp_path):
    whole = torch.arange(120.0).view(2, 3, 4, 5)
    state_dict = {
        "last": whole.contiguous(memory_format=torch.channels_last), "transposed": whole[1, 1].T,
        "column": whole[..., 1], "expanded": whole[0, 0, 0, :2].expand(3, 2), "plain": whole,
        "bfloat16": whole.bfloat16().view(30, 4).T, "float8": whole.to(torch.float8_e5m2)[..., ::2],
    }  # fmt: skip
    torch.save(state_dict, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert contents(checkpoint) == expected(state_dict)
        assert [name for name, tensor in checkpoint.tensors.items() if tensor.fd >= 0] == ["plain"]


def test_archives_that_others_packed(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert contents(checkpoint) == expected(state_dict)
        assert all(tensor.fd >= 0 for tensor in checkpoint.tensors.values())


def big_endian(name, data):
    if name == "byteorder":
        return b"big"
    return np.frombuffer(data, "<f4").astype(">f4").tobytes() if name.startswith("data/") else data


@pytest.mark.parametrize("odd", ["compressed", "big endian", "conjugate", "negative"])
def test_what_does_not_lie_there_as_it_is_is_loaded(tmp_path, odd):
    path = tmp_path / "a.pt"
    state_dict = {"a": torch.randn(1000), "b": torch.randn(3, 4)}
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()  # a bit that says how to take what is stored
    if odd in ("conjugate", "negative"):
        state_dict["c"] = conjugate if odd == "conjugate" else conjugate.imag
    torch.save(state_dict, path)
    if odd == "compressed":
        rezip(path, compression=zipfile.ZIP_DEFLATED)
    elif odd == "big endian":
        rezip(path, big_endian)
    with open_checkpoint(path) as checkpoint:
        assert contents(checkpoint) == expected(
            {name: t.resolve_conj().resolve_neg() for name, t in state_dict.items()}
        )
        assert all(tensor.fd < 0 for tensor in checkpoint.tensors.values())


def test_what_is_beside_a_state_dict_may_be_anything(tmp_path):
    content = {"model": {"a": torch.ones(3)}, "optimizer": [torch.eye(3).to_sparse(), 1e-3],
               "meta": torch.empty(2, device="meta")}  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert contents(checkpoint) == expected(content["model"])
        assert checkpoint.tensors["a"].fd >= 0


def test_refuses_records_that_are_cut_short(tmp_path):
    path = write_bytes(tmp_path / "a.pt")
    rezip(path, lambda name, data: data[:2] if name == "data/0" else data)
    with pytest.raises(CheckpointError, match="a.pt: damaged: tensor 'a' takes 3 bytes.* has 2"):
        open_checkpoint(path)


# Fields of a record's entry in the directory of an archive: its sizes, and where it begins.
@pytest.mark.parametrize("fields", [(20,), (24,), (20, 24), (42,)])
@pytest.mark.parametrize("value", [1, 1 << 20, 2**32 - 2])
def test_never_reads_what_is_no_record(tmp_path, fields, value):
    path = write_bytes(tmp_path / "a.pt", b"abcd")
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    for field in fields:
        struct.pack_into("<I", data, entry + field, value)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="a.pt: damaged: (record 'a/data/0'|tensor 'a')"):
        open_checkpoint(path)


# Torch files: wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {"state_dict": sd, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
        lambda sd: {"model_state_dict": sd, "rng": torch.ones(3)},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: {"module." + name: tensor for name, tensor in sd.items()},
        lambda sd: {"state_dict": {"module._orig_mod." + n: t for n, t in sd.items()}},
        lambda sd: {"_orig_mod.module." + n: t for n, t in sd.items()},
    ],
)
def test_unwraps_torch_files(tmp_path, wrap):
    state_dict = {"module.weight": torch.randn(3), "bias": torch.randn(2)}
    torch.save(wrap(state_dict), tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert contents(checkpoint) == expected(state_dict)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, "state_dict.*model"),
        ({"generator": {"a": torch.ones(1)}, "critic": {"a": torch.ones(1)}}, "generator.*critic"),
        ({"weight": torch.ones(1), "epoch": 3}, "'epoch' is a int"),
        ({"weight": torch.ones(1), "note": "x"}, "'note' is a str"),
        ({0: torch.ones(1)}, "rename"),
        (torch.ones(3), "holds a Tensor"),
        ([torch.ones(3)], "holds a list"),
        ({}, "no tensors"),
        ({"q.lora_A.weight": torch.ones(1)}, "merge_and_unload"),
        ({"lora_embedding_A": torch.ones(1)}, "merge_and_unload"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is sparse"),
        ({"a": torch.empty(2, device="meta")}, "meta device"),
    ],
)
def test_refuses_torch_file(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert "a.pt" in str(caught.value)


def test_refuses_a_state_dict_that_holds_itself(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="too deep"):
        open_checkpoint(tmp_path / "a.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_never_unpickles_freely(tmp_path, legacy):
    path = tmp_path / "a.pt"
    content = {"a": torch.ones(1), "b": Bomb(str(tmp_path / "boom"))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="(?s)refused it: .*mkdir.*save_file"):
        open_checkpoint(path)
    assert names_in(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("keep", [0, 3, 40, 300])
@pytest.mark.parametrize("legacy", [False, True])
def test_refuses_damaged_torch_file(tmp_path, legacy, keep):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="a.pt"):
        open_checkpoint(path)


# Sources that are no checkpoint


def test_refuses_other_sources():
    with pytest.raises(CheckpointError, match=r"state_dict\(\)"):
        open_checkpoint(torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="int"):
        open_checkpoint(3)
    with pytest.raises(CheckpointError, match="state dict.*no tensors"):
        open_checkpoint({})
    with pytest.raises(CheckpointError, match="'epoch' is a int"):
        open_checkpoint({"a": np.ones(1), "epoch": 3})
    with pytest.raises(CheckpointError, match="'model' is a dict"):
        open_checkpoint({"model": {"a": np.ones(1)}})
    for name in ("__metadata__", "\ud800", 3):
        with pytest.raises(CheckpointError, match="rename"):
            open_checkpoint({name: np.ones(1)})
    with pytest.raises(CheckpointError, match="object"):
        open_checkpoint({"a": np.array([None])})


def test_refuses_tensors_without_plain_values():
    with pytest.warns(UserWarning):
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointError, match="'a' is quantized"):
        open_checkpoint({"a": quantized})

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args, kwargs=None):
            raise NotImplementedError

    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (3,), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="'a' is a Wrapper without memory"):
        open_checkpoint({"a": wrapper})


def test_refuses_missing_and_irregular_files(tmp_path):
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    for name in ("none.safetensors", "none.pt", "none", "dangling.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file"):
            open_checkpoint(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.safetensors")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="regular file"):
        open_checkpoint(tmp_path / "fifo.safetensors")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="unknown kind of checkpoint '.gguf'"):
        open_checkpoint(tmp_path / "a.gguf")


def test_unreadable_source_is_a_read_error(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(ReadError, match="cannot be read: Permission denied") as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, str(tmp_path))


def test_failed_read_is_a_read_error(tmp_path, monkeypatch):
    path = raw_safetensors(tmp_path / "a.safetensors", {"a": entry(0, 1)}, b"a")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_checkpoint(path) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ReadError, match="a.safetensors.*error") as caught:
            checkpoint.tensors["a"].read()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_refuses_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match=f"{name}: a git-lfs pointer.*git lfs pull"):
        open_checkpoint(tmp_path / name)


# Bad safetensors files


NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.mark.parametrize(
    "header, data, length, message",
    [
        (b"", b"", 1, "header of 1 bytes"),
        ({"a": entry(0, 1)}, b"a", 2**64 - 1, f"header of {2**64 - 1} bytes"),
        ({"a": entry(0, 1)}, b"a", 10**8 + 1, "truncated"),
        (b"[]", b"", None, "expected a JSON object"),
        (b'{"a":', b"", None, "JSON"),
        (b'{"\xff": 1}', b"", None, "JSON"),
        (b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a", None, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "JSON"),
        (NESTED, b"", None, "JSON"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"ab", None, "duplicate key 'a'",
        ),
        (
            b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            b"a", None, "duplicate key 'dtype'",
        ),
        ({"__metadata__": {"a": 1}, "a": entry(0, 1)}, b"a", None, "__metadata__"),
        ({"__metadata__": [], "a": entry(0, 1)}, b"a", None, "__metadata__"),
        ({"a": 3}, b"", None, "'a': expected an object"),
        ({"a": {"dtype": "U8", "shape": [0]}}, b"", None, "'a': expected an object"),
        ({"a": entry(0, 1) | {"extra": 1}}, b"a", None, "'a': expected an object"),
        ({"a": entry(0, 1, "X8")}, b"a", None, "'a': dtype 'X8'"),
        ({"a": entry(0, 1, ["U8"])}, b"a", None, "'a': dtype"),
        ({"a": entry(0, 1, shape=[-1])}, b"a", None, "'a': the shape"),
        ({"a": entry(0, 1, shape=[1.0])}, b"a", None, "'a': the shape"),
        ({"a": entry(0, 1, shape=[True])}, b"a", None, "'a': the shape"),
        ({"a": entry(0, 1, shape=[2**63, 0])}, b"a", None, "'a': the shape"),
        ({"a": entry(0, 1, shape=[1] * 65)}, b"a", None, "'a': the shape"),
        ({"a": entry(0, 1, shape=3)}, b"a", None, "'a': the shape"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"a", None, "two whole"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, b"a", None, "two whole"),
        ({"a": entry(1, 0, shape=[1])}, b"a", None, "takes 1 bytes"),
        ({"a": entry(0, 5, "F32", [1])}, b"abcde", None, "takes 4 bytes"),
        # 2^32 * 2^32 elements are 0 modulo 2^64
        ({"a": entry(0, 0, "U8", [2**32, 2**32])}, b"", None, f"takes {2**64} bytes"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"abc", None, "'b' begins at byte 1.*overlaps"),
        ({"a": entry(0, 2), "b": entry(0, 2)}, b"ab", None, "overlaps"),
        ({"a": entry(0, 1), "b": entry(2, 3)}, b"abc", None, "'b' begins at byte 2.*hole"),
        ({"a": entry(1, 2)}, b"ab", None, "'a' begins at byte 1.*hole"),
        ({"a": entry(0, 2)}, b"a", None, "1 bytes of data where the header describes 2"),
        ({"a": entry(0, 1)}, b"ab", None, "2 bytes of data where the header describes 1"),
        ({"__metadata__": {"a": "b"}}, b"", None, "no tensors"),
        ({"a.lora_B.weight": entry(0, 1)}, b"a", None, "merge_and_unload"),
    ],
)
def test_refuses_bad_safetensors(tmp_path, header, data, length, message):
    path = raw_safetensors(tmp_path / "a.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_refuses_every_truncation(tmp_path):
    header = {"a": entry(0, 2), "b": entry(2, 4)}
    path = raw_safetensors(tmp_path / "a.safetensors", header, b"abcd")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="a.safetensors"):
            open_checkpoint(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_file_that_shrinks_is_a_read_error(tmp_path, name):
    path = write_bytes(tmp_path / name)
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, checkpoint.tensors["a"].offset + 2)
        with pytest.raises(ReadError, match=f"{name}: ended at byte"):
            checkpoint.tensors["a"].read()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_file_that_is_written_to_is_a_read_error(tmp_path, name):
    path = write_bytes(tmp_path / name)
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_unchanged()
        (tmp_path / "new").write_bytes(b"replaced")
        os.rename(path, tmp_path / "old")
        os.rename(tmp_path / "new", path)
        checkpoint.check_unchanged()
        assert checkpoint.tensors["a"].read().tobytes() == b"abc"
        os.utime(tmp_path / "old", ns=(1, 1))  # what a write does, whatever the clock's grain
        with pytest.raises(ReadError, match=f"{name}: was written to while it was read"):
            checkpoint.check_unchanged()


def test_any_shard_that_is_written_to_is_a_read_error(tmp_path):
    for name in "ab":
        raw_safetensors(tmp_path / f"{name}.safetensors", {name: entry(0, 1)}, b"x")
    index = {"weight_map": {name: f"{name}.safetensors" for name in "ab"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "b.safetensors", 1000)
        with pytest.raises(ReadError, match="b.safetensors: was written to"):
            checkpoint.check_unchanged()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_failed_open_leaves_no_descriptor(tmp_path, name):
    path = write_bytes(tmp_path / name)
    os.truncate(path, path.stat().st_size - 1)
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    if before is not None:
        assert os.listdir("/proc/self/fd") == before


# Hugging Face folders


def test_reads_folder_of_symlinks_as_in_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    raw_safetensors(blobs / "0", {"a": entry(0, 1)}, b"a")
    (blobs / "1").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../blobs/0")
    (snapshot / "config.json").symlink_to("../blobs/1")
    with open_checkpoint(snapshot) as checkpoint:
        assert contents(checkpoint) == {"a": ("U8", (1,), b"a")}
        assert checkpoint.files == {"config.json": b"{}"}


def test_reads_folders_of_torch_files(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert contents(checkpoint) == expected(state_dict)
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {name: f"pytorch_model-{len(name) % 2}.bin" for name in state_dict}
    for shard in set(weight_map.values()):
        part = {name: t for name, t in state_dict.items() if weight_map[name] == shard}
        torch.save(part, tmp_path / shard)
    index = {"weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert contents(checkpoint) == expected(state_dict)
        assert checkpoint.files == {}


def test_metadata_of_shards_is_merged(tmp_path):
    for name in "ab":
        header = {"__metadata__": {"format": "pt", name: "1"}, name: entry(0, 1)}
        raw_safetensors(tmp_path / f"{name}.safetensors", header, b"x")
    index = {"weight_map": {name: f"{name}.safetensors" for name in "ab"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt", "a": "1", "b": "1"}


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "JSON"),
        ('{"weight_map": {"a": "s.safetensors", "a": "s.safetensors"}}', "duplicate key 'a'"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "plain name"),
        ('{"weight_map": {"a": "../s.safetensors"}}', "plain name"),
        ('{"weight_map": {"a": "sub/s.safetensors"}}', "plain name"),
        ('{"weight_map": {"a": "/s.safetensors"}}', "plain name"),
        ('{"weight_map": {"a": ".."}}', "plain name"),
        ('{"weight_map": {"a": ""}}', "plain name"),
        ('{"weight_map": {"a": "s.safetensors\\u0000"}}', "plain name"),
        ('{"weight_map": {"a": "s.bin"}}', "expected a .safetensors file"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors: no such file"),
        ('{"weight_map": {"b": "s.safetensors", "a": "s.safetensors"}}',
         "'b' is in model.safetensors.index.json but not in s.safetensors"),
        ('{"weight_map": {"a": "s.safetensors"}}',
         "'c' is in s.safetensors but not in model.safetensors.index.json"),
    ],
)
def test_refuses_bad_index(tmp_path, index, message):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    header = {"a": entry(0, 1)} | ({"c": entry(1, 2)} if "'c'" in message else {})
    for place in (tmp_path, folder, folder / "sub"):
        raw_safetensors(place / "s.safetensors", header, b"x" * len(header))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_refuses_folders_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="not a Hugging Face folder.*model.safetensors"):
        open_checkpoint(tmp_path)
    raw_safetensors(tmp_path / "other.safetensors", {"a": entry(0, 1)}, b"a")
    with pytest.raises(CheckpointError, match="to use other.safetensors, pass the path"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_refuses_adapters(tmp_path, name):
    raw_safetensors(tmp_path / "model.safetensors", {"a": entry(0, 1)}, b"a")
    open_checkpoint(tmp_path).close()
    raw_safetensors(tmp_path / name, {"a": entry(0, 1)}, b"a")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_checkpoint(tmp_path)
    if name.endswith(".safetensors"):
        with pytest.raises(CheckpointError, match="merge_and_unload"):
            open_checkpoint(tmp_path / name)


def test_large_side_file_is_left_out_with_a_warning(tmp_path):
    raw_safetensors(tmp_path / "model.safetensors", {"a": entry(0, 1)}, b"a")
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", (32 << 20) + 1)  # sparse
    with pytest.warns(UserWarning, match="tokenizer.json: left out"):
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.files == {}


def test_side_file_names():
    for name in ("config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"):
        assert is_side_file(name)
    for name in ("../a.json", "a/b.json", "a\\b.json", ".a.json", "a.py", "a.bin", "a.safetensors",
                 "model.safetensors.index.json", "a\n.json", "a\0.json", "", ".", ".."):
        assert not is_side_file(name)


def test_needs_neither_torch_nor_safetensors(tmp_path):
    path = raw_safetensors(tmp_path / "a.safetensors", {"a": entry(0, 3)}, b"abc")
    code = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None  # importing them fails
import numpy as np
from tallcodec.checkpoint import open_checkpoint
from tallcodec.checkpoint_write import write_checkpoint
with open_checkpoint(sys.argv[1]) as c, open_checkpoint({"a": np.frombuffer(b"abc", "u1")}) as m:
    assert c.tensors["a"].read().tobytes() == m.tensors["a"].read().tobytes() == b"abc"
for path in (sys.argv[1] + ".safetensors", sys.argv[1] + "-folder"):
    write_checkpoint(path, {"a": ("U8", (3,))}, lambda parts: parts[0].memory.fill(1))
for action in (lambda: open_checkpoint(__file__), lambda: write_checkpoint("a.pt", {}, None)):
    try:
        action()
    except ValueError as error:
        print(type(error).__name__, "PyTorch" in str(error))
"""
    script = tmp_path / "script.bin"
    script.write_text(code)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert result.stdout == "CheckpointError True\nArgumentError True\n", result.stderr
    assert not (tmp_path / "a.pt").exists()
