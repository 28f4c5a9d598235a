"""A task through torch.distributed.checkpoint: whole, in shards, in place."""

import pytest

import tallcodec
from helpers import awkward, normal, small_family, to_torch
from tallcodec import errors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
from torch.distributed import checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # noqa: E402
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem  # noqa: E402

from tallcodec.dcp import Reader  # noqa: E402


def load(state, file, task, **options):
    dcp.load(state, storage_reader=Reader(file, task, **options), no_dist=True)


def empty(state):
    return {name: torch.zeros_like(to_torch(array)) for name, array in state.items()}


def same(a, b):
    bits = [t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.mark.parametrize("task", [None, "cars", "aircraft"])
def test_a_task_is_loaded_in_place(encode, task):
    base, tasks, _ = awkward(6)
    path = encode(base, tasks, base_storage="reference")
    with tallcodec.open(path, base=base) as file:
        expected = file.decode(task)
        state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        places = {name: tensor.data_ptr() for name, tensor in state.items()}
        load(state, path, task, base=base)
        assert all(same(state[name], tensor) for name, tensor in expected.items())
        assert places == {name: tensor.data_ptr() for name, tensor in state.items()}
        state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        load(state, file, task)
        assert all(same(state[name], tensor) for name, tensor in expected.items())


def test_some_tensors_other_dtypes_and_strides(encode):
    base, tasks = small_family()
    path = encode(base, tasks)
    state = {"a.weight": torch.zeros(40, 6).T}
    state["b.weight"] = torch.zeros(5, 129, dtype=torch.bfloat16)
    load(state, path, "dtd")
    with tallcodec.open(path) as file:
        expected = file.decode("dtd")
    assert torch.equal(state["a.weight"], expected["a.weight"])
    assert torch.equal(state["b.weight"], expected["b.weight"].to(torch.bfloat16))


class Shards(dcp.DefaultLoadPlanner):
    """Asks for parts of a tensor, as ranks that shard it do."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.left, self.read = parts, list(parts), []

    def create_local_plan(self):
        index = dcp.metadata.MetadataIndex("w", torch.Size([0, 0]))
        return LoadPlan([
            ReadItem(LoadItemType.TENSOR, index, torch.Size([0, 0]), index, torch.Size(offsets),
                     torch.Size(target.shape)) for offsets, target in self.parts])  # fmt: skip

    def resolve_tensor(self, item):
        """Each part once, though two are alike."""
        wanted = item.storage_offsets, item.lengths
        places = [(torch.Size(offsets), target.shape) for offsets, target in self.left]
        return self.left.pop(places.index(wanted))[1]

    def commit_tensor(self, item, tensor):
        self.read.append(tensor)


def test_shards_of_rows_and_of_columns(encode):
    base = {"w": normal((30, 50), 1)}
    path = encode(base, {"t": {"w": base["w"] + normal((30, 50), 2)}}, method="ternary")
    parts = [((0, 0), torch.zeros(10, 50)), ((10, 0), torch.zeros(20, 50)),
             ((0, 5), torch.zeros(30, 7)), ((3, 40), torch.zeros(9, 10)),
             ((0, 0), torch.zeros(30, 50)), ((0, 0), torch.ones(30, 50)),
             ((29, 49), torch.zeros(1, 1))]  # fmt: skip
    planner = Shards(parts)
    dcp.load({"w": torch.zeros(30, 50)}, storage_reader=Reader(path, "t"), planner=planner,
             no_dist=True)  # fmt: skip
    with tallcodec.open(path) as file:
        whole = file.decode("t")["w"]
    for (row, column), part in parts:
        rows, columns = part.shape
        assert torch.equal(part, whole[row : row + rows, column : column + columns])
    assert {t.data_ptr() for t in planner.read} == {t.data_ptr() for _, t in parts}


def test_keys_are_loaded_without_a_state_dict(encode):
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    path = encode(*small_family())
    found = _load_state_dict_from_keys({"a.bias"}, storage_reader=Reader(path, "cars"))
    with tallcodec.open(path) as file:
        assert torch.equal(found["a.bias"], file.decode("cars")["a.bias"])


def test_another_file_by_its_checkpoint_id(encode):
    base, tasks = small_family()
    path, other = encode(base, tasks), encode(base, {"cars": tasks["dtd"]})
    state = empty(base)
    dcp.load(state, checkpoint_id=other, storage_reader=Reader(path, "cars"), no_dist=True)
    with tallcodec.open(other) as file:
        assert torch.equal(state["a.bias"], file.decode("cars")["a.bias"])


def test_metadata(encode):
    path = encode(*small_family())
    metadata = Reader(path, "cars").read_metadata()
    spec = metadata.state_dict_metadata["a.weight"]
    assert spec.size == (6, 40) and spec.properties.dtype == torch.float32
    assert spec.chunks == [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([6, 40]))]
    assert Reader.validate_checkpoint_id("a/b.tall") and not Reader.validate_checkpoint_id("a/b")


def test_bad_input(encode, tmp_path):
    base, tasks = small_family()
    path = encode(base, tasks)
    failed = dcp.CheckpointException
    with pytest.raises(errors.TaskNotFoundError, match="has no task 'none'; it has 'cars', 'dtd'"):
        Reader(path, "none")
    with pytest.raises(errors.ReadError, match="none.tall: cannot be read"):
        Reader(tmp_path / "none.tall", "cars")
    with pytest.raises(failed, match="unknown"):
        load({"unknown": torch.zeros(3)}, path, "cars")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(failed, match="wrong checksum in the base plane of tensor 'a.bias'"):
        load(empty(base), path, "cars")
