"""Tensors to files, held against safetensors, torch and transformers themselves."""

import errno
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import contents, every_dtype, expected, names_in, torch_bytes
from tallcodec.checkpoint import open_checkpoint
from tallcodec.checkpoint_write import Part, parse_size, write_checkpoint
from tallcodec.errors import ArgumentError, OutputExistsError, ReadError, WriteError
from tallcodec.output import atomic_file
from tallcodec.tensors import DTYPES, dtype_name

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def state_dict():
    return every_dtype()


def write(path, state_dict, **options):
    """Write a state dict through write_checkpoint, recording the size of each batch."""
    source = {name: torch_bytes(tensor) for name, tensor in state_dict.items()}
    batches = []

    def fill(parts):
        batches.append(sum(len(part.memory) for part in parts))
        for name, begin, memory in parts:
            assert memory.dtype == np.uint8 and memory.ndim == 1 and memory.flags.c_contiguous
            memory[:] = np.frombuffer(source[name], np.uint8)[begin : begin + len(memory)]

    specs = {n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in state_dict.items()}
    return write_checkpoint(path, specs, fill, **options), batches


@pytest.mark.parametrize("metadata", [None, {"z": "1", "a": "ü"}])
def test_written_safetensors_is_read_by_safetensors(tmp_path, state_dict, metadata):
    path = tmp_path / "a.safetensors"
    written, batches = write(path, state_dict, metadata=metadata)
    assert written == [path] and names_in(tmp_path) == ["a.safetensors"] and len(batches) == 1
    assert expected(safetensors_torch.load_file(path)) == expected(state_dict)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    with open_checkpoint(path) as checkpoint:
        assert contents(checkpoint) == expected(state_dict)
        for tensor in checkpoint.tensors.values():
            assert tensor.offset % DTYPES[tensor.dtype].itemsize == 0
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_written_torch_file_is_read_by_torch(tmp_path, state_dict, suffix):
    path = tmp_path / f"a{suffix}"
    assert write(path, state_dict)[0] == [path]
    loaded = torch.load(path, weights_only=True)
    assert type(loaded) is dict and list(loaded) == list(state_dict)
    assert expected(loaded) == expected(state_dict)
    with open_checkpoint(path) as checkpoint:
        assert contents(checkpoint) == expected(state_dict)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "folder"])
def test_same_input_same_bytes(tmp_path, state_dict, name):
    other_order = dict(reversed(state_dict.items())) if name != "a.pt" else state_dict
    written = []
    for folder, source in (("1", state_dict), ("2", other_order)):
        (tmp_path / folder).mkdir()
        options = {"max_shard_size": 300} if name == "folder" else {}
        paths, _ = write(tmp_path / folder / name, source, metadata={"b": "1", "a": "2"}, **options)
        written.append({path.name: path.read_bytes() for path in paths})
    assert written[0] == written[1]


def test_batches_bound_memory(tmp_path):
    mebibyte = 1 << 20
    sizes = {"a": 40, "b": 30, "c": 150, "d": 34, "e": 30, "empty": 0, "f": 1}
    specs = {name: ("I16", (size, mebibyte // 2)) for name, size in sizes.items()}
    batches = []

    def fill(parts):
        batches.append([(p.name, p.begin // mebibyte, len(p.memory) // mebibyte) for p in parts])
        for name, begin, memory in parts:
            memory[:] = ord(name[0]) + begin // (64 * mebibyte)
            pointer, first, elements = Part(name, begin, memory).request("I16")
            assert pointer == memory.ctypes.data
            assert (first, elements) == (begin // 2, len(memory) // 2)

    path = tmp_path / "a.safetensors"
    write_checkpoint(path, specs, fill)
    assert batches == [
        [("a", 0, 40)], [("b", 0, 30)], [("c", 0, 64)], [("c", 64, 64)],
        [("c", 128, 22), ("d", 0, 34)], [("e", 0, 30), ("empty", 0, 0), ("f", 0, 1)],
    ]  # fmt: skip
    with open_checkpoint(path) as checkpoint:
        for name, size in sizes.items():
            data = checkpoint.tensors[name].read().reshape(-1)
            pieces = np.arange(size * mebibyte) // (64 * mebibyte)
            assert len(data) == size * mebibyte and (data == ord(name[0]) + pieces).all()


def test_shards_respect_their_size(tmp_path):
    source = {f"t{i}": torch.full((size,), i, dtype=torch.uint8)
              for i, size in enumerate([60, 40, 1, 500, 99, 1, 1])}
    folder = tmp_path / "model"
    paths, _ = write(folder, source, max_shard_size=100)
    assert [path.name for path in paths] == [
        *(f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)),
        "model.safetensors.index.json",
    ]
    shards = [sorted(safetensors_torch.load_file(path)) for path in paths[:-1]]
    assert shards == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"], ["t6"]]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_size": 702}
    assert index["weight_map"]["t5"] == "model-00004-of-00005.safetensors"
    with safetensors.safe_open(paths[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with open_checkpoint(folder) as checkpoint:
        assert contents(checkpoint) == expected(source)


def test_kind_of_output_follows_the_path(tmp_path):
    source = {"a": torch.ones(1)}
    (tmp_path / "existing.pt").mkdir()
    for name in ("Llama-3.1-8B", "a.safetensors/", "existing.pt"):
        assert write(f"{tmp_path}/{name}", source)[0] == [tmp_path / name / "model.safetensors"]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"a": torch.ones(1)}
    assert write("a.safetensors", source)[0] == [Path("a.safetensors")]
    assert write("folder", source)[0] == [Path("folder/model.safetensors")]
    os.mkdir("here")
    monkeypatch.chdir("here")
    assert write(".", source)[0] == [Path("model.safetensors")]
    assert names_in(Path()) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_arguments_that_no_output_takes(tmp_path, name):
    with pytest.raises(ArgumentError, match="max_shard_size"):
        write(tmp_path / name, {"a": torch.ones(1)}, max_shard_size="5GB")
    for specs in ({"a": ("X8", (1,))}, {"__metadata__": ("U8", (1,))}):
        with pytest.raises(ArgumentError, match="X8|__metadata__"):
            write_checkpoint(tmp_path / name, specs, lambda parts: None)
    for side_file in ("../config.json", "/etc/x.json", "evil.py", "model.safetensors.index.json"):
        with pytest.raises(ArgumentError, match="side file"):
            write(tmp_path / "folder", {"a": torch.ones(1)}, files={side_file: b""})
    assert names_in(tmp_path) == []


def test_parse_size():
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, " 1.5 GiB ": 3 << 29, "7": 7, "7b": 7, 12: 12,
             "2TiB": 2 << 40, "0.1KB": 100}
    assert {size: parse_size(size) for size in sizes} == sizes
    for bad in ("", "GB", "-5GB", 0, -1, "0", "5XB", "5IB", "1e9", "5 GB GB", None, True, "inf"):
        with pytest.raises(ArgumentError, match="not a size"):
            parse_size(bad)


# Hugging Face folders


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )
    return transformers.BertModel(config)


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_reads_save_pretrained_and_writes_it_back(tmp_path, max_shard_size):
    transformers = pytest.importorskip("transformers")
    model = tiny_bert()
    source, target = tmp_path / "in", tmp_path / "out"
    model.save_pretrained(source, max_shard_size=max_shard_size)
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"not a checkpoint")
    (source / ".hidden.json").write_text("{}")
    (source / "checkpoint-1.json").mkdir()
    sharded = (source / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_size == "8KB")
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.kind == "folder"
        assert contents(checkpoint) == expected(model.state_dict())
        assert checkpoint.metadata["format"] == "pt"
        assert set(checkpoint.files) == {"config.json", "vocab.txt"}
        assert checkpoint.files["config.json"] == (source / "config.json").read_bytes()
        written, _ = write(
            target, model.state_dict(), metadata=checkpoint.metadata, files=checkpoint.files,
            max_shard_size=max_shard_size,
        )
    assert sorted(written) == sorted(target.iterdir())
    assert (target / "model.safetensors.index.json").exists() == sharded
    again, info = transformers.AutoModel.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert expected(again.state_dict()) == expected(model.state_dict())
    with open_checkpoint(target) as checkpoint:
        assert contents(checkpoint) == expected(model.state_dict())


# Writing: what exists already


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "folder"])
def test_existing_output_is_refused_and_kept(tmp_path, name):
    def snapshot():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    write(tmp_path / name, {"a": torch.ones(3)})
    before = snapshot()
    with pytest.raises(OutputExistsError, match=name) as caught:
        write(tmp_path / name, {"a": torch.zeros(3)})
    assert caught.value.errno == errno.EEXIST and caught.value.filename == str(tmp_path / name)
    assert snapshot() == before
    write(tmp_path / name, {"a": torch.zeros(3)}, overwrite=True)
    assert snapshot().keys() == before.keys()
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert contents(checkpoint) == expected({"a": torch.zeros(3)})


@pytest.mark.parametrize("can_link", [True, False])
def test_output_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, can_link):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not can_link:
        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "a.bin"
    with pytest.raises(OutputExistsError, match="a.bin"):
        with atomic_file(path) as file:
            file.write(b"ours")
            path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and names_in(tmp_path) == ["a.bin"]
    path.unlink()
    with atomic_file(path) as file:
        file.write(b"ours")
    assert path.read_bytes() == b"ours" and names_in(tmp_path) == ["a.bin"]


def test_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "folder"

    def fill(parts):
        target.mkdir()
        (target / "theirs").touch()

    with pytest.raises(OutputExistsError, match="folder"):
        write_checkpoint(target, {"a": ("U8", (1,))}, fill)
    assert names_in(tmp_path) == ["folder"] and names_in(target) == ["theirs"]


def test_file_that_appears_in_an_empty_folder_is_kept(tmp_path):
    def fill(parts):
        (tmp_path / "config.json").write_bytes(b"theirs")

    with pytest.raises(OutputExistsError, match="config.json"):
        write_checkpoint(tmp_path, {"a": ("U8", (1,))}, fill, files={"config.json": b"ours"})
    assert names_in(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"theirs"


def test_overwriting_a_folder_removes_stale_weights_only(tmp_path):
    source = {f"t{i}": torch.ones(100) for i in range(3)}
    files = {"config.json": b"{}"}
    write(tmp_path, source, max_shard_size=400, files=files)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "notes.txt").touch()
    write(tmp_path, source, files=files | {"vocab.txt": b""}, overwrite=True)
    kept = ["config.json", "model.safetensors", "notes.txt", "vocab.txt"]
    assert names_in(tmp_path) == kept
    write(tmp_path, source, max_shard_size="800B", overwrite=True)
    assert names_in(tmp_path) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "notes.txt", "vocab.txt",
    ]


def test_output_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo.pt")
    for name in ("folder", "fifo.pt"):
        with pytest.raises(OutputExistsError, match=f"{name}: exists and is not a regular file"):
            with atomic_file(tmp_path / name, overwrite=True):
                pass
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="file: exists and is not a folder"):
        write(tmp_path / "file", {"a": torch.ones(1)}, overwrite=True)
    assert names_in(tmp_path) == ["fifo.pt", "file", "folder"]


# Writing: what fails


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ReadError])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "folder"])
def test_failed_fill_changes_nothing(tmp_path, name, error):
    def fill(parts):
        raise error("no")

    specs = {"a": ("U8", (1,))}
    with pytest.raises(error, match="no"):
        write_checkpoint(tmp_path / name, specs, fill)
    assert names_in(tmp_path) == []
    (written,), _ = write(tmp_path / name, {"a": torch.ones(1)})
    before = written.read_bytes()
    with pytest.raises(error, match="no"):
        write_checkpoint(tmp_path / name, specs, fill, overwrite=True)
    assert names_in(tmp_path) == [name] and written.read_bytes() == before
    assert names_in(written.parent) == [written.name]


def test_missing_parent_folder_is_a_write_error(tmp_path):
    for name in ("none/a.safetensors", "none/a.pt", "none/folder"):
        with pytest.raises(WriteError, match=name) as caught:
            write(tmp_path / name, {"a": torch.ones(1)})
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == str(tmp_path / name)


# A limit on file size fails writes just as a full disk does, in the middle.
FULL_DISK = """
import resource, signal, sys
from tallcodec.checkpoint_write import write_checkpoint
from tallcodec.errors import WriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
path = sys.argv[1]
try:
    write_checkpoint(
        path, {"a": ("U8", (1_000_000,))}, lambda parts: parts[0].memory.fill(1), overwrite=True
    )
except WriteError as error:
    print(error.errno, error.filename == path, path in str(error))
"""


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "folder"])
def test_full_disk(tmp_path, name):
    (written,), _ = write(tmp_path / name, {"a": torch.ones(1)})
    before = written.read_bytes()
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / name], capture_output=True, text=True
    )
    assert result.stdout == f"{errno.EFBIG} True True\n", result.stderr
    assert names_in(tmp_path) == [name] and names_in(written.parent) == [written.name]
    assert written.read_bytes() == before


def test_atomic_file(tmp_path):
    path = tmp_path / "a.tall"
    old_umask = os.umask(0o027)
    try:
        with atomic_file(path) as file:
            assert not path.exists()
            os.pwrite(file.fileno(), b"cd", 2)
            os.pwrite(file.fileno(), b"ab", 0)
        with pytest.raises(ZeroDivisionError):
            with atomic_file(path, overwrite=True) as file:
                file.write(b"x" * 100_000)
                1 / 0
    finally:
        os.umask(old_umask)
    assert path.read_bytes() == b"abcd" and names_in(tmp_path) == ["a.tall"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(OutputExistsError, match="a.tall"):
        with atomic_file(path):
            pytest.fail("refused only after the work was done")
