"""docs/licences.md lists every direct dependency, as it is pinned and as its metadata has it."""

import importlib.metadata
import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("requirements*.txt"), ROOT / "benchmarks" / "requirements-peers.txt"]
ROW = re.compile(r"^\| ([\w.-]+) \| ([\d.]+) \| (.+?) \| .+ \|$", re.M)
LISTED = {name: rest for name, *rest in ROW.findall((ROOT / "docs" / "licences.md").read_text())}


def pinned():
    lines = "\n".join(path.read_text() for path in FILES)
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", lines, re.M))


def licence(metadata):
    """An expression, or one line, or what a classifier says."""
    stated = metadata["License-Expression"] or metadata["License"] or ""
    if stated and "\n" not in stated:
        return stated
    classifiers = [c for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    return classifiers[0].rpartition(" :: ")[2]


def test_every_direct_dependency_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        named += extra
    named = {re.match(r"[\w.-]+", requirement)[0] for requirement in named}
    assert named <= pinned().keys()
    assert LISTED.keys() == pinned().keys()


@pytest.mark.parametrize("name", LISTED)
def test_versions_and_licences(name):
    version, stated = LISTED[name]
    assert version == pinned()[name]
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    if found["Version"].partition("+")[0] != version:
        pytest.skip(f"version {found['Version']} is installed")
    assert licence(found) == stated


def test_what_is_compiled_in_is_named():
    """The extension contains code of pybind11's headers: its licence asks to be passed on."""
    files = importlib.metadata.distribution("pybind11").files
    (text,) = [file.read_text() for file in files if file.name == "LICENSE"]
    assert (ROOT / "LICENSES" / "pybind11.txt").read_text() == text
