"""Builds the sdist, and the wheel from it, into dist/, and proves them: what they contain, what the
extension needs of a system, and tests of each where nothing else of this folder is.

python tests/release.py        `make wheel`; some minutes, the most of them PyTorch's installation
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# Tests that need nothing but the package and what is listed here.
TESTS = ("test_installed.py", "test_golden.py", "test_properties.py", "test_rows.py",
         "test_loaded.py", "test_validation.py", "test_ternary.py", "test_threads.py")  # fmt: skip
TEST_PACKAGES = ("pytest", "hypothesis", "xxhash")
LIBRARIES = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libpthread|ld-linux[-\w]*)\.so\.\d+")


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, text=True, **options)


def environment(folder: Path, python=sys.executable) -> Path:
    """The Python of a new virtual environment."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def install(python: Path, *what) -> None:
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what,
        env=os.environ | {"TALLCODEC_CUDA": "OFF"})  # fmt: skip


def check_install(python: Path, tests=TESTS) -> None:
    """Run tests of an installed package where no source tree is."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        options = ["-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests tests/golden",
                   "-o", "tmp_path_retention_policy=failed",
                   "-k", "not every_bit_flip and not every_truncation"]  # fmt: skip
        run(python, "-m", "pytest", *options, *(f"tests/{name}" for name in tests), cwd=folder)


def check_contents(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "csrc", "tallcodec", cwd=ROOT, stdout=subprocess.PIPE).stdout
    needed = {*tracked.split(), "CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"}
    assert needed <= names, f"the sdist lacks {sorted(needed - names)}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = {name for name in tracked.split() if name.startswith("tallcodec/")}
    assert tracked <= names, f"the wheel lacks {sorted(tracked - names)}"
    for licence in ("LICENSE", "LICENSES/pybind11.txt"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names), licence
    strange = [name for name in names if not re.match(r"tallcodec(/|-.*\.dist-info/)", name)]
    assert not strange, f"the wheel has {strange}"


def check_links(wheel: Path) -> None:
    """The extension needs only what every Linux has, and nothing of CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".so"))
            extension = archive.extract(name, folder)
        dynamic = run("readelf", "-d", "-W", extension, stdout=subprocess.PIPE).stdout
        symbols = run("readelf", "-Ws", extension, stdout=subprocess.PIPE).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    foreign = [library for library in needed if not LIBRARIES.fullmatch(library)]
    assert not foreign, f"the extension needs {foreign}"
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, "the extension has an RPATH"
    assert "cuda" not in symbols.replace("kernels_cuda_host", ""), "CUDA was left in"
    print("needs", *sorted(needed))
    run(sys.executable, "-m", "auditwheel", "show", wheel)


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    # CUDA's kernels are for those who build from source; a wheel serves every machine.
    run(sys.executable, "-m", "build", ROOT, env=os.environ | {"TALLCODEC_CUDA": "OFF"})
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    check_contents(sdist, wheel)
    check_links(wheel)
    for name, archive in (("sdist", sdist), ("wheel", wheel)):
        python = environment(ROOT / "build" / "release" / name)
        install(python, archive)
        run(python, "-c", "import tallcodec, sys; assert 'torch' not in sys.modules", cwd="/")
        install(python, *TEST_PACKAGES)
        check_install(python)
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "requirements-dev.txt").read_text(), re.M)
    install(python, torch, "safetensors")
    check_install(python, (*TESTS, "test_file.py", "test_encode.py"))
    print(f"{sdist.name} and {wheel.name}: built, and proven where nothing else is")


if __name__ == "__main__":
    main()
