"""What the GPU's kernels became: registers, memory and instructions, read from the machine code in
the extension and in what Triton compiles. Needs no GPU.

    python benchmarks/gpu_inspect.py [--docs]

--docs writes the table into docs/gpu.md. Ends with an error where a kernel spills, uses local
memory, contracts a product and a sum where it must not, or lacks 16-byte loads or stores.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import DOCS, markdown, write_part
from tallcodec import _core

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Divisions, of which SASS makes fused steps that give the quotient's one rounding.
DIVIDES = ("Encode", "encode-bfloat16-int8")


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    name: str
    registers: int = 0
    local: int = 0  # bytes of stack and local memory, spills being there
    shared: int = 0
    instructions: Counter = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    def row(self, architecture: str) -> dict:
        return {
            "kernel": self.name,
            "for": architecture,
            "registers": self.registers,
            "spills and local bytes": self.local + self.count("LDL|STL"),
            "shared bytes": self.shared,
            "16-byte loads": self.count(r"LDG\S*\.128|LDGSTS\S*\.128"),
            "loads": self.count("LDG"),
            "16-byte stores": self.count(r"STG\S*\.128"),
            "stores": self.count("STG"),
            "FFMA": self.count("FFMA"),
            "MMA": self.count("[HIDQU]*[HG]MMA"),
        }


def tool(name: str) -> str:
    """A tool of CUDA: on PATH, or from its package on PyPI."""
    packaged = [p for place in sys.path for p in Path(place).glob(f"nvidia/*/bin/{name}")]
    found = shutil.which(name) or next(map(str, packaged), None)
    if not found:
        raise SystemExit(f"{name} is not here: pip install nvidia-cuda-{name}")
    return found


def run(*command) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def kernels_of(binary: Path, architecture: str) -> list[Kernel]:
    """The kernels in a cubin, or in a program that has some for the architecture."""
    found: dict[str, Kernel] = {}
    chosen = [] if binary.suffix == ".cubin" else ["-arch", architecture]
    usage = run(tool("cuobjdump"), "-res-usage", *chosen, binary)
    for mangled, text in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}
        local = numbers["STACK"] + numbers["LOCAL"]
        found[mangled] = Kernel(short(mangled), numbers["REG"], local, numbers["SHARED"])
    for part in run(tool("cuobjdump"), "-sass", *chosen, binary).split("Function : ")[1:]:
        mangled = part.split(None, 1)[0]
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)"
        code = re.findall(instruction, part, re.M)
        found[mangled].instructions = Counter(code)
    return sorted(found.values(), key=lambda kernel: kernel.name)


def short(mangled: str) -> str:
    """Encode<BF16, F32>, of what run<Encode<VectorSource<BF16, F32>>> is called in machine code."""
    demangled = run("c++filt", mangled).strip().replace("(anonymous namespace)::", "")
    name = demangled.replace("tallcodec::", "")
    inner = re.match(r"void run<(.*)>\(", name)
    name = re.sub(r"VectorSource<(.*?)>", r"\1", inner.group(1)) if inner else name
    return name.replace(" >", ">").strip()


def triton_kernels(folder: Path) -> list[tuple[str, Kernel]]:
    """(architecture, kernel) of what Triton compiles ahead of time."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from matmul_kernels import cases, compile_case
    from triton_variants import variants

    path, found = folder / "kernel.cubin", []
    for architecture in ARCHITECTURES:
        number = int(architecture[3:])
        compiled = [(v.name, v.compile(number)) for v in variants()]
        compiled += [(f"matmul {case.name}", compile_case(case, number)) for case in cases()]
        for name, code in compiled:
            path.write_bytes(code.asm["cubin"])
            (kernel,) = kernels_of(path, architecture)
            kernel.name = f"Triton: {name}"
            found.append((architecture, kernel))
    return found


def flaws(row: dict) -> list[str]:
    """What must not be."""
    name, where = row["kernel"], f"{row['kernel']}, {row['for']}"
    found = []
    if row["spills and local bytes"]:
        found.append(f"{where}: spills or local memory")
    sums = name.startswith("Triton: matmul") and "f32" in name  # where products are added up
    if row["FFMA"] and not sums and not any(part in name for part in DIVIDES):
        found.append(f"{where}: a fused multiply-add")
    if name.startswith(("DecodeVectors", "Encode<")) and name != "Encode<ElementSource>":
        if not row["16-byte loads"]:
            found.append(f"{where}: no 16-byte loads")
    if name.startswith("DecodeVectors<BF16, BF16>") and not row["16-byte stores"]:
        found.append(f"{where}: no 16-byte stores")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the table into docs/gpu.md")
    arguments = parser.parse_args()
    extension = Path(_core.__file__)
    if "cuda" not in _core.gpu.tables():
        raise SystemExit("the extension was built without CUDA: TALLCODEC_CUDA=ON")
    rows = [kernel.row(architecture) for architecture in ARCHITECTURES
            for kernel in kernels_of(extension, architecture)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows += [kernel.row(where) for where, kernel in triton_kernels(Path(folder))]
    print(markdown(rows, text=2))
    if arguments.docs:
        shown = [row for row in rows if row["for"] == "sm_90"]
        write_part(DOCS / "gpu.md", "inspect", markdown(shown, text=2))
    found = [flaw for row in rows for flaw in flaws(row)]
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
