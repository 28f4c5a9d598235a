"""Builds and tests on what else is here: compilers, architectures (in emulation), Pythons.

    python tests/portability.py                  all of it, half an hour or more: make portability
    python tests/portability.py pythons          or compilers, architectures, refusals: a part
    python tests/portability.py code build/tests in seconds: make test-cpp

What is not installed is said and left out. On Debian: apt-get install clang qemu-user
g++-aarch64-linux-gnu g++-s390x-linux-gnu g++-i686-linux-gnu
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from release import ROOT, TEST_PACKAGES, check_install, environment, install, run

BUILD = ROOT / "build" / "portability"
TESTS = ("kernels", "ternary", "conditional", "file", "resume", "gpu", "threads")
# What not every x86-64 CPU has, and must not be where any of them goes: what is encoded by VEX or
# EVEX, as everything of AVX and since, and what SSE3 to SSE4.2, POPCNT, LZCNT, MOVBE and BMI added.
# (TZCNT is BSF to a CPU that does not know it; compilers use it for what is the same by either.)
NEWER = re.compile(
    r"^v(?!err|erw)|%[yz]mm|^(popcnt|lzcnt|movbe|crc32|andn |bextr|bls|bzhi|mulx|pdep|pext |rorx|"
    r"sarx|shlx|shrx|adcx|adox|haddp|hsubp|addsubp|movddup|movshdup|movsldup|movntdqa|lddqu|pshufb|"
    r"palignr|pabs|phadd|phsub|psign|pmaddubsw|pmulhrsw|blend|pblend|pcmpeqq|pcmpgtq|pcmp.str|"
    r"p(max|min)(sb|sd|ud|uw)|pmov[sz]x|pmuldq|pmulld|ptest|p(extr|insr)[bdq]|packusdw|round[ps]|"
    r"dpp[sd]|extractps|insertps|mpsadbw)"
)
SIMD = ("kernels_avx2", "kernels_avx512")
done, missing = [], []


def installed(*programs) -> bool:
    absent = [name for name in programs if not shutil.which(name)]
    missing.extend(absent)
    return not absent


# Machine code


def check_code(folder: Path) -> None:
    """Instructions that not every x86-64 CPU has are in the SIMD files alone, and there in no
    function that a linker may take in place of another file's."""
    objects = sorted(folder.glob("CMakeFiles/tallcodec*.dir/csrc/*.o"))
    assert len(objects) > 15, f"{folder}: no build of the tests"
    newer = 0
    for path in objects:
        simd = path.name.startswith(SIMD)
        code = run("objdump", "-d", "--no-show-raw-insn", path, stdout=subprocess.PIPE).stdout
        found = [i for i in re.findall(r"^ +[0-9a-f]+:\t(.+)$", code, re.M) if NEWER.search(i)]
        assert simd or not found, f"{path.name} has newer instructions: {found[:3]}"
        newer += len(found)
        if simd:
            assert found, f"{path.name} has none of its instructions"
            symbols = run("nm", "-C", path, stdout=subprocess.PIPE).stdout
            shared = [line for line in symbols.splitlines() if re.search(r" [Wi] ", line)]
            assert not shared, f"{path.name} has functions that other files may use: {shared}"
    done.append(f"code: {newer} newer instructions in {len(objects)} files, all where they belong")


# Compilers and architectures


def build_and_test(name: str, compiler: str, *options: str, run_by=()) -> Path:
    """Build everything in C++, with warnings as errors, and run the tests and the example."""
    folder = BUILD / name
    run("cmake", "-S", ROOT, "-B", folder, "-GNinja", f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DTALLCODEC_PYTHON=OFF", "-DTALLCODEC_TESTS=ON", "-DTALLCODEC_CUDA=OFF",
        f"-DCMAKE_INSTALL_PREFIX={folder}/cpp", *options)  # fmt: skip
    run("cmake", "--build", folder)
    for test in TESTS:
        if not run_by or test != "resume":  # which kills processes by the hundred
            run(*run_by, folder / f"test_{test}")
    run("cmake", "--install", folder, "--component", "cpp")
    example = folder / "example"
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", example, "-GNinja",
        f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_PREFIX_PATH={folder}/cpp",
        *(option for option in options if not option.startswith("-DCMAKE_CXX_FLAGS")))  # fmt: skip
    run("cmake", "--build", example)
    check = ROOT / "tests" / "cpp" / "check_example.py"
    run(sys.executable, check, *run_by, example / "decode")
    done.append(f"{name}: all C++ tests, and golden files by the example")
    return folder


def compilers() -> None:
    for name, compiler in (("gcc", "g++"), ("clang", "clang++")):
        if installed(compiler):
            flags = "-DCMAKE_CXX_FLAGS=-march=x86-64 -Werror"
            folder = build_and_test(f"{name} -march=x86-64", compiler, flags)
            check_code(folder)
            if installed("qemu-x86_64"):  # a CPU without AVX, and one without AVX-512
                for cpu in ("Nehalem", "Haswell"):
                    for test in ("kernels", "ternary", "conditional"):
                        run("qemu-x86_64", "-cpu", cpu, folder / f"test_{test}")
                    done.append(f"{name}, on an emulated {cpu}: kernels and coders")


def architectures() -> None:
    for cpu in ("aarch64", "riscv64"):
        compiler = f"{cpu}-linux-gnu-g++"
        if installed(compiler, f"qemu-{cpu}"):
            build_and_test(cpu, compiler, "-DCMAKE_CXX_FLAGS=-Werror", "-DCMAKE_SYSTEM_NAME=Linux",
                           f"-DCMAKE_SYSTEM_PROCESSOR={cpu}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
                           run_by=[f"qemu-{cpu}"])  # fmt: skip


def refusals() -> None:
    """Where it cannot work, building it says why."""
    big = ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"]
    for compiler, flags, why in (
        ("g++", big, "little-endian machine"),
        ("g++", ["-ffast-math"], "without -ffast-math"),
        ("s390x-linux-gnu-g++", [], "little-endian machine"),
        ("i686-linux-gnu-g++", [], "64-bit machine"),
    ):
        if installed(compiler):
            source = ROOT / "csrc" / "kernels_scalar.cpp"
            refused = subprocess.run([compiler, "-std=c++17", "-fsyntax-only", *flags, source],
                                     capture_output=True, text=True)  # fmt: skip
            assert refused.returncode and why in refused.stderr, refused.stderr
            done.append(f"{' '.join([compiler, *flags])}: refused, {why}")
    for lie in ("sys.byteorder = 'big'", "sys.maxsize = 2**31 - 1"):
        code = f"import runpy, sys; {lie}; runpy.run_path('setup.py')"
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                 cwd=ROOT)  # fmt: skip
        why = "64-bit, little-endian machine"
        assert refused.returncode and why in refused.stderr, refused.stderr
        done.append(f"setup.py, with {lie}: refused, {why}")


# Pythons


def find_python(minor: int) -> str | None:
    """One that runs: pyenv's commands may stand for versions that are not there."""
    pyenv = Path.home() / ".pyenv" / "versions"
    candidates = [shutil.which(f"python3.{minor}"), *pyenv.glob(f"3.{minor}.*/bin/python")]
    for python in filter(None, candidates):
        version = "import sys; print(sys.version_info[1])"
        found = subprocess.run([python, "-c", version], capture_output=True, text=True)
        if found.stdout.strip() == str(minor):
            return str(python)
    missing.append(f"python3.{minor}")
    return None


def pythons() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*)\]", project, re.M)[1]
    for minor in range(10, 15):
        python = find_python(minor)
        if python is None:
            continue
        python = environment(BUILD / f"python3.{minor}", python)
        # The oldest Python has the oldest packages that are allowed, all others the newest.
        oldest = re.findall(r'"(\w+)>=([\d.]+)"', dependencies) if minor == 10 else []
        oldest = [f"{name}=={version}.*" for name, version in oldest]
        install(python, ROOT, *oldest, *TEST_PACKAGES)
        check_install(python)
        run(python, "-m", "pip", "list", "--disable-pip-version-check")
        done.append(f"Python 3.{minor}" + (", with the oldest packages allowed" if oldest else ""))


def main(what: str = "", *arguments: str) -> None:
    if what == "code":
        if os.uname().machine == "x86_64":
            check_code(Path(*arguments))
        refusals()
    else:
        for part in (compilers, architectures, refusals, pythons):
            if what in ("", part.__name__):
                part()
    print("", *done, *(f"{name}: not installed" for name in sorted(set(missing))), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
