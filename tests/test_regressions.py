"""Bugs that were found once, each by its symptom."""

import os

import numpy as np
import pytest
import torch

import tallcodec
from helpers import normal, same, small_family
from tallcodec import _core, errors
from tallcodec.output import atomic_file


def test_zstd_planes_inflated_by_several_threads(encode):
    base = {f"t{i:03}": np.zeros(20000 + i, np.int64) for i in range(40)}
    tasks = {"a": {name: np.arange(len(x)) // 100 for name, x in base.items()}}
    path = encode(base, tasks)
    with tallcodec.open(path, "np", threads=4) as file:
        assert len({plane[1] for plane in file._core.planes()}) == 2, "no zstd planes"
        for _ in range(5):
            decoded = file.decode("a")
            assert all(same(decoded[name], x) for name, x in tasks["a"].items())


def test_names_asked_for_twice(small_file):
    with tallcodec.open(small_file, "np") as file:
        decoded = file.decode("cars", ["a.bias"] * 50)
        assert same(decoded["a.bias"], file.decode("cars")["a.bias"]) and len(decoded) == 1


def test_torch_default_device_does_not_matter(small_file, tmp_path):
    with tallcodec.open(small_file) as file:
        expected = file.decode("cars")
        with torch.device("meta"):
            decoded = file.decode("cars")
            file.save("cars", tmp_path / "cars.pt")
    saved = torch.load(tmp_path / "cars.pt")
    for name, tensor in expected.items():
        assert decoded[name].equal(tensor) and saved[name].equal(tensor)


def test_verify_of_an_embedded_base_against_another(small_file):
    base, _ = small_family()
    assert tallcodec.verify(small_file, base).base_checked
    base["a.bias"] = base["a.bias"] + np.float32(1e-6)
    with pytest.raises(errors.BaseMismatchError, match="tensor 'a.bias' has other values"):
        tallcodec.verify(small_file, base)


def test_writing_through_a_link_keeps_it(encode, tmp_path):
    target, link = encode(*small_family()), tmp_path / "link.tall"
    link.symlink_to(target)
    before = target.read_bytes()
    tallcodec.encode(*small_family(("other",)), link, overwrite=True)
    assert link.is_symlink() and target.read_bytes() != before
    assert tallcodec.verify(link).tasks == 1


def test_names_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("x" * 250 + ".tall")
    tallcodec.encode(*small_family(), path)
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise PermissionError(13, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_file(tmp_path / "x") as file:
        file.write(b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_files_do_not_depend_on_the_rounding_mode(encode):
    import ctypes
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("the number of FE_UPWARD is that of x86-64")
    family = small_family()
    libm = ctypes.CDLL("libm.so.6")
    options = dict(scale="unit-gain", threads=1)
    expected = encode(*family, **options).read_bytes()
    assert libm.fesetround(0x800) == 0
    try:
        found = encode(*family, **options)
    finally:
        libm.fesetround(0)
    assert found.read_bytes() == expected


def test_kernels_that_are_not_there_are_an_error(small_file, monkeypatch):
    monkeypatch.setenv("TALLCODEC_KERNELS", "mmx")
    with tallcodec.open(small_file, "np") as file:
        with pytest.raises(errors.ArgumentError, match=f"=mmx.*{_core.kernels.available()[0]}"):
            file.decode("cars")


def test_a_name_and_values_of_zero_bytes(encode):
    path = encode({"w": normal(3)}, {"a": {"w": normal(3, 1)}}, metadata={"empty": ""})
    with tallcodec.open(path, "np") as file:
        assert file.info.metadata == {"empty": ""}


def test_a_checkpoint_that_shrinks_is_named(tmp_path):
    state = {"w": torch.zeros(200000), "v": torch.ones(200000)}
    from safetensors.torch import save_file

    from tallcodec.checkpoint import open_checkpoint

    path = tmp_path / "a.safetensors"
    save_file(state, path)
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 1000)
        tensors = list(checkpoint.tensors.values())
        sources = [(tensor.fd, tensor.offset) for tensor in tensors]
        with pytest.raises(errors.ReadError, match="a.safetensors ends early"):
            _core.same_bytes(*sources, tensors[0].nbytes)
