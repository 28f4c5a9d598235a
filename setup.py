"""Builds the C++ extension with CMake. Everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

if sys.byteorder != "little" or sys.maxsize < 2**63 - 1:
    sys.exit("tallcodec needs a 64-bit, little-endian machine: csrc/dtype.h says why")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        options = [
            "-GNinja",
            # Named anew each time: pip's build environment is another one for every build.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTALLCODEC_CUDA={os.environ.get('TALLCODEC_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_core"], check=True)


setup(ext_modules=[Extension("tallcodec._core", [])], cmdclass={"build_ext": CMakeBuild})
