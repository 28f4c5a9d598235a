"""Bad input: each has its own clear error, nothing appears half-written, the old file stays."""

import contextlib
import math
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tallcodec
from helpers import awkward, normal, seal, small_family, torch_state, unseal
from tallcodec import errors
from tallcodec.reference import records

ROOT = Path(__file__).parents[1]
W = {"w": normal((3, 4))}


def everything(path):
    """Open, describe, verify and decode all there is, as a user might."""
    with tallcodec.open(path, "np") as file:
        str(file.info)
        states = [file.decode(task) for task in (None, *file.tasks)]
        file.files(), file.metadata()
    tallcodec.verify(path)
    return [[(n, a.tobytes()) for n, a in state.items()] for state in states]


def rewrite(path, data):
    path.write_bytes(bytes(data))
    return path


# Files that are not whole.


def test_missing_file(tmp_path):
    with pytest.raises(errors.ReadError, match="gone.tall.*No such file") as caught:
        tallcodec.open(tmp_path / "gone.tall")
    assert isinstance(caught.value, OSError) and caught.value.errno == 2


def test_folder_as_file(tmp_path):
    with pytest.raises(errors.ReadError, match="directory"):
        tallcodec.open(tmp_path)


@pytest.mark.parametrize("content, match", [
    (b"", "not a .tall file"), (b"\x89TALL", "not a valid .tall file|truncated"),
    (b"{}" * 500, "not a .tall file"), (bytes(1000), "not a .tall file"),
])  # fmt: skip
def test_not_a_tall_file(tmp_path, content, match):
    with pytest.raises(errors.FormatError, match=f"x.tall: ({match})"):
        tallcodec.open(rewrite(tmp_path / "x.tall", content))


@pytest.mark.parametrize("damage", [
    lambda data: data.replace(b"\r\n", b"\n"), lambda data: data.replace(b"\n", b"\r\n"),
    lambda data: data.decode("latin1").encode(),
], ids=["unix", "dos", "latin1 to UTF-8"])  # fmt: skip
def test_text_mode_damage(small_file, damage):
    with pytest.raises(errors.FormatError, match="text-mode|not a .tall file"):
        tallcodec.open(rewrite(small_file, damage(small_file.read_bytes())))


@pytest.mark.parametrize("version, error", [(0, "FormatError"), (2, "VersionError"),
                                            (2**32 - 1, "VersionError")])  # fmt: skip
def test_version(small_file, version, error):
    data = seal(*unseal(small_file.read_bytes()), version=version)
    with pytest.raises(getattr(errors, error), match=f"format version {version}"):
        tallcodec.open(rewrite(small_file, data))


def test_every_truncation(small_file):
    data = small_file.read_bytes()
    for size in (*range(0, 193), *range(256, len(data), 61), len(data) - 1):
        with pytest.raises(errors.FormatError, match=small_file.name):
            tallcodec.open(rewrite(small_file, data[:size]))


def test_bytes_behind_the_end_are_ignored(small_file):
    expected = everything(small_file)
    rewrite(small_file, small_file.read_bytes() + b"an interrupted append")
    assert everything(small_file) == expected


def test_every_flipped_bit_is_found(encode):
    """One bit of every byte; of the empty second slot alone nothing is read."""
    base, task = {"w": normal(9), "i": np.arange(3)}, {"w": normal(9, 1), "i": np.arange(3) + 1}
    options = {"shared_dtype": "int8", "scale": "unit-gain-row", "metadata": {"k": "v"}}
    path = encode(base, {"a": task}, **options)
    data = path.read_bytes()
    expected = everything(path)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        rewrite(path, damaged)
        if 128 <= at < 192:
            assert everything(path) == expected
            continue
        with pytest.raises(errors.FormatError, match=path.name):
            everything(path)


@pytest.mark.parametrize("shared", ["float32", "bfloat16", "int8", "ternary"])
@pytest.mark.parametrize("base", [np.float32, ml_dtypes.bfloat16])
def test_a_flip_in_any_block_that_is_decoded_is_found_and_numbered(encode, base, shared):
    """Blocks are hashed in the loop that decodes them, several of one plane to one of another where
    their types differ in size."""
    n = 524288 + 65536 + 4099  # a unit of whole blocks, and a block, and a part of one
    state = {"w": normal(n, 1).astype(base)}
    tasks = {k: {"w": (normal(n, 1) + normal(n, k, spread=0.1)).astype(base)} for k in (2, 3)}
    options = {"shared_dtype": shared, "method": "tall"}
    if shared == "ternary":
        options = {"method": "ternary", "density": 0.1, "coding": "raw"}
    path = encode(state, {f"task {k}": task for k, task in tasks.items()}, **options)
    data = bytearray(path.read_bytes())
    with tallcodec.open(path, "np") as file:
        planes = [file._core.planes()[plane] for plane in used(file, "task 2")]
    for _, _, offset, size, _ in planes:
        for begin in range(0, size, 65536):
            for at in {begin + 7, min(begin + 65535, size - 1)}:
                data[offset + at] ^= 4
                rewrite(path, data)
                data[offset + at] ^= 4
                with tallcodec.open(path, "np", threads=1) as file:
                    with pytest.raises(errors.ChecksumError, match=f"block {begin // 65536}$"):
                        file.decode("task 2")


def used(file, task):
    """The planes that a tensor of a task is decoded from."""
    core, number = file._core, file._number(task)
    starts = {offset: plane for plane, (_, _, offset, *_) in enumerate(core.planes())}
    return [starts[offset] for offset, _ in core.ranges(number, 0)]


def test_damage_is_found_in_a_file_of_many_blocks_and_named(encode):
    base, tasks, _ = awkward(8, big=True)
    path = encode(base, tasks, scale="unit-gain-row")
    with tallcodec.open(path, "np") as file:
        core = file._core
        tensor = core.find_tensor("big.rows")
        places = {"base plane": 0, "shared plane": 1, "mask": 2, "scales per row": 3}
        ranges = core.ranges(1, tensor)
    assert len(ranges) == len(places)
    data = path.read_bytes()
    for what, number in places.items():
        offset, size = ranges[number]
        damaged = bytearray(data)
        damaged[offset + size * 9 // 10] ^= 16
        rewrite(path, damaged)
        for use in (lambda f: f.decode("dtd"), lambda f: f.decode("dtd", ["big.rows"])):
            with tallcodec.open(path, "np") as file, pytest.raises(errors.ChecksumError) as caught:
                use(file)
            assert what in str(caught.value) and "big.rows" in str(caught.value)
        with pytest.raises(errors.ChecksumError, match="big.rows") as caught:
            tallcodec.verify(path)
        assert ("dtd" in str(caught.value)) == (number >= 2)
        with tallcodec.open(path, "np") as file:
            file.decode("dtd", ["layer.float32.530"])
        with tallcodec.open(path, "np", verify=False) as file:
            file.decode("dtd", ["big.rows"])


def test_verify_names_every_damaged_plane(small_file):
    with tallcodec.open(small_file, "np") as file:
        masks = [file._core.ranges(k, 0)[-1][0] for k in range(2)]
    data = bytearray(small_file.read_bytes())
    for offset in masks:
        data[offset] ^= 1
    with pytest.raises(errors.ChecksumError, match="(?s)mask of.*cars.*mask of.*dtd"):
        tallcodec.verify(rewrite(small_file, data))


HUGE = [2**16, 2**31, 2**32 - 1]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("field", range(6))
def test_absurd_counts(small_file, field, count):
    planes, index = unseal(small_file.read_bytes())
    index = bytearray(index)
    struct.pack_into("<I", index, 4 * field, count)
    with pytest.raises(errors.FormatError, match=small_file.name):
        tallcodec.open(rewrite(small_file, seal(planes, bytes(index))))


@pytest.mark.parametrize("count", [2**32, 2**61, 2**63, 2**64 - 1])
@pytest.mark.parametrize("at", range(24, 56, 8))
def test_absurd_lengths(small_file, at, count):
    planes, index = unseal(small_file.read_bytes())
    index = bytearray(index)
    struct.pack_into("<Q", index, at, count)
    with pytest.raises(errors.FormatError, match=small_file.name):
        tallcodec.open(rewrite(small_file, seal(planes, bytes(index))))


@pytest.mark.parametrize("value", [2**32, 2**63, 2**64 - 64, 64, 0])
@pytest.mark.parametrize("field", ["index_offset", "index_size", "file_size"])
def test_absurd_header(small_file, field, value):
    data = seal(*unseal(small_file.read_bytes()), **{field: value})
    with pytest.raises(errors.FormatError, match=small_file.name):
        tallcodec.open(rewrite(small_file, data))


@pytest.mark.parametrize("value", [2**20, 2**32, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("field", ["offset", "size", "raw_size", "first_sum"])
def test_absurd_planes(small_file, field, value):
    planes, index = unseal(small_file.read_bytes())
    at = records.INDEX.size + 3 * 64 + 2 * 64 + 6 * 64
    plane = records.PLANE.unpack(index, at)
    assert (plane.kind, plane.offset) == (records.BASE, 192)
    plane = records.PLANE.pack(**{**plane._asdict(), field: value})
    data = seal(planes, index[:at] + plane + index[at + len(plane) :])
    with pytest.raises(errors.FormatError, match=small_file.name):
        tallcodec.open(rewrite(small_file, data))


# Names that are not there, arguments that make no sense.


def test_unknown_task(small_file):
    with tallcodec.open(small_file, "np") as file:
        for use in (file.decode, file.state_dict, file.files, file.metadata,
                    lambda task: file.save(task, "x.safetensors")):  # fmt: skip
            with pytest.raises(errors.TaskNotFoundError, match="'boats'.*'cars', 'dtd'") as caught:
                use("boats")
            assert isinstance(caught.value, KeyError)


def test_unknown_tensor(small_file, encode):
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.TensorNotFoundError, match="'a.wieght'"):
            file.decode("cars", ["a.bias", "a.wieght"])
    path = encode({**W, "x": normal(2)}, {"a": {"w": normal((3, 4), 1)}})
    with tallcodec.open(path, "np") as file:
        with pytest.raises(errors.TensorNotFoundError, match="'a' has no tensor 'x'"):
            file.decode("a", ["x"])


def test_tensors_as_one_string(small_file):
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.ArgumentError, match="list of names"):
            file.decode("cars", "a.bias")


def test_out_that_names_no_tensors(small_file):
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.ArgumentError, match="out must map names.*list"):
            file.decode("cars", out=[np.zeros((6, 40), np.float32)])


@pytest.mark.parametrize("options, match", [
    ({"framework": "tensorflow"}, "framework.*'tensorflow'"), ({"framework": None}, "framework"),
    ({"threads": 0}, "threads.*0"), ({"threads": -1}, "threads"), ({"threads": 1.5}, "threads"),
])  # fmt: skip
def test_open_with_bad_arguments(small_file, options, match):
    with pytest.raises(errors.ArgumentError, match=match):
        tallcodec.open(small_file, **options)


@pytest.mark.parametrize("threads", [1000, 2**40])
def test_more_threads_than_there_can_be(tmp_path, threads):
    tallcodec.encode(W, {"a": {"w": normal((3, 4), 1)}}, tmp_path / "x.tall", threads=threads)
    tallcodec.verify(tmp_path / "x.tall", threads=threads)


BAD_ARGUMENTS = [
    ({"threshold": math.nan}, "threshold.*nan"),
    ({"threshold": math.inf}, "threshold.*inf"),
    ({"threshold": -0.1}, "threshold.*-0.1"),
    ({"threshold": 1e39}, "threshold.*1e"),  # infinite as float32
    ({"threshold": 10**400}, "threshold"),
    ({"threshold": "0.4"}, "threshold.*'0.4'"),
    ({"threshold": None}, "threshold.*None"),
    ({"threshold": [0.4]}, "threshold"),
    ({"threshold": {}}, "threshold.*'a'"),
    ({"threshold": {"a": 0.4, "b": 0.4}}, "threshold.*'b'"),
    ({"threshold": {"a": math.nan}}, "threshold.*nan"),
    ({"scale": "unit"}, "scale.*'unit-gain'.*'unit'"),
    ({"scale": None}, "scale"),
    ({"scale": ["none"]}, "scale"),
    ({"method": "emr"}, "method.*'tall'.*'emr'"),
    ({"merge": "tie"}, "merge.*'task-arithmetic'.*'ties'.*'tie'"),
    ({"shared_dtype": "float64"}, "shared_dtype.*'bfloat16'.*'float64'"),
    ({"base_storage": "remote"}, "base_storage.*'reference'.*'remote'"),
    ({"metadata": {"k": 1}}, "metadata.*1"),
    ({"metadata": {1: "v"}}, "metadata.*1"),
    ({"metadata": ["k"]}, "metadata"),
    ({"metadata": {"k": "\ud800"}}, "metadata.*k"),
    ({"threads": 0}, "threads.*0"),
    ({"threads": "2"}, "threads.*'2'"),
    ({"tasks": {}}, "no tasks"),
    ({"tasks": [W]}, "tasks"),
    ({"tasks": {"": W}}, "name.*''"),
    ({"tasks": {"a\nb": W}}, "name.*'a.*b'"),
    ({"tasks": {"\ud800": W}}, "name"),
    ({"tasks": {3: W}}, "name.*3"),
]


@pytest.mark.parametrize("options, match", BAD_ARGUMENTS, ids=lambda x: str(x)[:40].encode())
def test_encode_with_bad_arguments(tmp_path, options, match):
    arguments = {"tasks": {"a": W}, **options}
    with pytest.raises(errors.ArgumentError, match=match):
        tallcodec.encode(W, output=tmp_path / "x.tall", **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, array, match", [
    ("a\nb", np.ones(2), "control"), ("a\x7f", np.ones(2), "control"),
    ("\x00", np.ones(2), "control"),
    ("deep", np.ones((1,) * 33), "'deep'.*33 dimensions"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["base", "task"])
def test_tensors_that_the_format_has_no_room_for(tmp_path, name, array, match, where):
    base, task = dict(W), {"w": W["w"] + 1}
    (base if where == "base" else task)[name] = array
    with pytest.raises(errors.CheckpointError, match=match):
        tallcodec.encode(base, {"a": task}, tmp_path / "x.tall")
    assert os.listdir(tmp_path) == []


def test_an_absurd_shape_without_elements(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(errors.CheckpointError, match="w.safetensors: tensor 'w'.*absurdly large"):
        tallcodec.encode(W, {"a": path}, tmp_path / "x.tall")


@pytest.mark.parametrize("bad, error, match", [
    ("gone.safetensors", errors.CheckpointError, "gone.safetensors: no such file"),
    (".", errors.CheckpointError, "not a Hugging Face folder"),
    ({}, errors.CheckpointError, "no tensors"),
    ({"w": [1, 2]}, errors.CheckpointError, "'w' is a list"),
    (None, errors.CheckpointError, "NoneType"),
])  # fmt: skip
def test_bad_checkpoints(tmp_path, monkeypatch, bad, error, match):
    monkeypatch.chdir(tmp_path)
    for base, task in ((bad, W), (W, bad)):
        with pytest.raises(error, match=match):
            tallcodec.encode(base, {"a": task}, "x.tall")
    assert os.listdir() == []


def test_bad_base_of_an_open_file(small_file):
    with pytest.raises(errors.CheckpointError, match="gone.safetensors: no such file"):
        tallcodec.open(small_file, "np", base="gone.safetensors")


def test_kernels_that_are_not_there(tmp_path, small_file, monkeypatch):
    monkeypatch.setenv("TALLCODEC_KERNELS", "nonsense")
    uses = [
        lambda: tallcodec.encode(W, {"a": {"w": W["w"] + 1}}, tmp_path / "x.tall"),
        lambda: tallcodec.verify(small_file),
        lambda: tallcodec.open(small_file).decode("cars"),
    ]
    for use in uses:
        with pytest.raises(errors.ArgumentError, match="TALLCODEC_KERNELS"):
            use()
    assert os.listdir(tmp_path) == [small_file.name]


# Outputs that cannot be written.


def test_output_exists(tmp_path):
    path = tmp_path / "x.tall"
    path.write_bytes(b"mine")
    with pytest.raises(errors.OutputExistsError, match="x.tall.*overwrite"):
        tallcodec.encode(W, {"a": W}, path)
    assert path.read_bytes() == b"mine" and os.listdir(tmp_path) == ["x.tall"]
    tallcodec.encode(W, {"a": W}, path, overwrite=True)
    tallcodec.verify(path)


def test_failed_overwrite_leaves_the_old_file(tmp_path, small_file):
    before = small_file.read_bytes()
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(errors.CheckpointError, match="bad.safetensors"):
        tallcodec.encode(W, {"a": tmp_path / "bad.safetensors"}, small_file, overwrite=True)
    assert small_file.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["bad.safetensors", small_file.name]


@pytest.fixture
def family_of_files(checkpoints):
    """A base and a task for each kind of checkpoint that is read from files, and a file of each."""
    torch = pytest.importorskip("torch")
    base, tasks = small_family()
    torch.save(torch_state(tasks["cars"]), checkpoints / "torch.pt")
    names = ("base.safetensors", "cars.safetensors", "torch.pt", "dtd/model.safetensors")
    sources = {name: checkpoints / name for name in ("cars.safetensors", "torch.pt", "dtd")}
    return checkpoints / "base.safetensors", sources, [checkpoints / name for name in names]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_that_is_written_to_meanwhile(tmp_path, family_of_files, number, overwrite):
    base, tasks, files = family_of_files
    output = tmp_path / "x.tall"
    if overwrite:
        output.write_bytes(b"mine")
    names = sorted(os.listdir(tmp_path))

    def write(*_):
        with open(files[number], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(files[number], ns=(1, 1))  # whatever the clock's grain

    with pytest.raises(errors.ReadError, match=f"{files[number]}: was written to while it was"):
        tallcodec.encode(base, tasks, output, progress=write, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == names
    assert not overwrite or output.read_bytes() == b"mine"


def test_a_checkpoint_that_is_replaced_meanwhile(tmp_path, family_of_files):
    base, tasks, files = family_of_files
    tallcodec.encode(base, tasks, tmp_path / "a.tall")

    def replace(*_):
        for file in files:
            (tmp_path / "new").write_bytes(b"something else")
            os.replace(tmp_path / "new", file)

    tallcodec.encode(base, tasks, tmp_path / "b.tall", progress=replace)
    assert (tmp_path / "a.tall").read_bytes() == (tmp_path / "b.tall").read_bytes()


@pytest.mark.parametrize("number", range(4))
def test_a_checkpoint_that_is_cut_short_meanwhile(tmp_path, family_of_files, number):
    base, tasks, files = family_of_files

    def cut(*_):
        os.truncate(files[number], 500)

    with pytest.raises(errors.ReadError, match=files[number].name):
        tallcodec.encode(base, tasks, tmp_path / "x.tall", progress=cut, merge="ties")
    assert not (tmp_path / "x.tall").exists()


@pytest.mark.parametrize("options", [{}, {"merge": "ties"}, {"method": "ternary"}], ids=str)
@pytest.mark.parametrize("number", range(4))
def test_a_read_error_in_the_middle(tmp_path, family_of_files, number, options):
    """A descriptor that is one of a folder by then stands for a disk that fails."""
    base, tasks, files = family_of_files
    output = tmp_path / "x.tall"
    output.write_bytes(b"mine")
    before = {path: path.read_bytes() for path in files}
    names = sorted(os.listdir(tmp_path))

    def fail(*_):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.path.samefile(f"/proc/self/fd/{fd}", files[number]):
                    folder = os.open("/", os.O_RDONLY)
                    os.dup2(folder, int(fd))
                    os.close(folder)

    with pytest.raises(errors.ReadError, match="Is a directory|was written to while"):
        tallcodec.encode(base, tasks, output, progress=fail, overwrite=True, **options)
    assert output.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == names
    assert before == {path: path.read_bytes() for path in files}


def test_output_folder_is_missing(tmp_path):
    with pytest.raises(errors.WriteError, match="x.tall") as caught:
        tallcodec.encode(W, {"a": W}, tmp_path / "gone" / "x.tall")
    assert caught.value.errno == 2


def test_output_is_a_folder(tmp_path):
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExistsError, match=tmp_path.name):
            tallcodec.encode(W, {"a": W}, tmp_path, overwrite=overwrite)


def test_an_input_is_not_replaced_by_the_output(checkpoints):
    """Encoding loses something: what is replaced could not be had back."""
    inputs = checkpoints / "base.safetensors", {"dtd": checkpoints / "dtd"}
    for output in (inputs[0], checkpoints / "dtd", checkpoints / "dtd" / "model.safetensors"):
        with pytest.raises(errors.ArgumentError, match="is an input"):
            tallcodec.encode(*inputs, output, overwrite=True)
    tall = checkpoints / "x.tall"
    tallcodec.encode(*inputs, tall, base_storage="reference")
    with tallcodec.open(tall, "np", inputs[0]) as file:
        for output in (inputs[0], tall):
            with pytest.raises(errors.ArgumentError, match="is an input"):
                file.save("dtd", output, overwrite=True)
    tallcodec.verify(tall, inputs[0])


def test_checkpoints_that_cannot_belong_together(tmp_path, checkpoints):
    with pytest.raises(errors.CheckpointError, match="none of its tensors is in the base"):
        tallcodec.encode({"v": normal(3)}, {"a": {"w": normal(3)}}, tmp_path / "x.tall")
    shard = checkpoints / "model-00001-of-00003.safetensors"
    (checkpoints / "cars.safetensors").rename(shard)
    with pytest.raises(errors.CheckpointError, match="one shard of 3.*pass the folder"):
        tallcodec.encode(checkpoints / "base.safetensors", {"a": shard}, tmp_path / "x.tall")


@pytest.mark.parametrize("name", ["-", "cars.safetensor", "a.onnx"])
def test_outputs_of_unknown_kind(small_file, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.ArgumentError, match="end it with a slash"):
            file.save("cars", name)
        file.save("cars", name + "/")
        file.save("cars", "Llama-3.1-8B")
    assert os.path.isdir(name) and os.path.isdir("Llama-3.1-8B")


def test_a_folder_that_is_not_there_is_named(small_file, tmp_path):
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.WriteError, match="there is no folder .*gone: make it first"):
            file.save("cars", tmp_path / "gone" / "x.safetensors")


def test_verify_counts_what_it_ignores(small_file):
    small_file.write_bytes(small_file.read_bytes() + b"junk")
    found = tallcodec.verify(small_file)
    assert found.ignored == 4 and "4 bytes behind its end are ignored" in str(found)


def limited_in_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


FULL = """
import sys, numpy as np, tallcodec
try:
    {}
except tallcodec.errors.WriteError as error:
    print(error, error.errno)
"""


@pytest.mark.parametrize("line", [
    "tallcodec.encode({'w': np.ones(999)}, {'a': {'w': np.ones(9)}}, 'x.tall', overwrite=True)",
    "tallcodec.open('full.tall', 'np').save('a', 'x.tall.safetensors')",
    "tallcodec.open('full.tall', 'np').save('a', 'folder')",
], ids=["encode", "file", "folder"])  # fmt: skip
def test_full_disk(tmp_path, line):
    """A limit on the size of files stands for it: the write fails likewise."""
    tallcodec.encode({"w": np.ones(9999)}, {"a": {"w": np.zeros(9999)}}, tmp_path / "full.tall")
    (tmp_path / "x.tall").write_bytes(b"mine")
    done = subprocess.run([sys.executable, "-c", FULL.format(line)], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
                          preexec_fn=limited_in_size)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and done.stdout.split()[-1] == "27"
    assert sorted(os.listdir(tmp_path)) == ["full.tall", "x.tall"]
    assert (tmp_path / "x.tall").read_bytes() == b"mine"


MANY_ENCODES = """
import signal, numpy as np, tallcodec
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
w = np.ones(1 << 22, np.float32)
tasks = {f"t{i}": {"w": w + i + 1} for i in range(4)}
print("ready", flush=True)
try:
    for _ in range(300):
        tallcodec.encode({"w": w}, tasks, "x.tall", overwrite=True)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_interrupted_encode_leaves_nothing(tmp_path):
    """Ctrl-C arrives at some moment of a long row of encodes, in the core most likely."""
    with subprocess.Popen([sys.executable, "-c", MANY_ENCODES], stdout=subprocess.PIPE, text=True,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout.readline() == "ready\n"
        while not os.listdir(tmp_path):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted\n"
    assert process.returncode == 0
    assert os.listdir(tmp_path) in ([], ["x.tall"])
    if os.listdir(tmp_path):  # of an encode that had ended before
        tallcodec.verify(tmp_path / "x.tall")


# The tree of exceptions.


def test_exceptions_are_pythons_own_too():
    for name, builtin in {
        "ArgumentError": ValueError, "CheckpointError": ValueError, "FormatError": ValueError,
        "TaskNotFoundError": KeyError, "TensorNotFoundError": KeyError, "ClosedError": ValueError,
        "OutputExistsError": FileExistsError, "ReadError": OSError, "WriteError": OSError,
    }.items():  # fmt: skip
        assert issubclass(getattr(errors, name), (errors.TallcodecError, builtin))
        assert issubclass(getattr(errors, name), builtin)
    assert issubclass(errors.VersionError, errors.FormatError)
    assert issubclass(errors.ChecksumError, errors.FormatError)


def test_messages_are_plain(small_file):
    """Not the repr that KeyError would show, not the number that OSError would."""
    with tallcodec.open(small_file) as file, pytest.raises(errors.TaskNotFoundError) as caught:
        file.decode("x")
    assert str(caught.value).startswith(str(small_file))
    with pytest.raises(errors.ReadError) as caught:
        tallcodec.open("/nowhere/x.tall")
    assert str(caught.value).startswith("/nowhere/x.tall: cannot be read")
