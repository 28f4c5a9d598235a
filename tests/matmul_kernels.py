"""The kernels of tallcodec/matmul_triton.py as they are launched, compiled without a GPU.

    python tests/matmul_kernels.py [ARCHITECTURE …]      # registers, stack, shared memory of each

Prints one line of JSON per kernel. Not to be run by Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tallcodec import matmul_triton as mt

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int8: "*i8", None: None}
ARGUMENTS = ("columns", "groups", "x_stride")  # multiples of 16 in models


class Case(NamedTuple):
    name: str
    kernel: triton.JITFunction
    signature: dict  # argument -> type; None is an argument that is None
    constexprs: dict  # argument -> value
    options: dict


def matmul_case(name, rows, tasks, dtype, shared=None, signs=False, by_row=False, group=8):
    """``tasks`` 1: one for all rows."""
    tiles = mt.tiles_for(rows, tasks, dtype, group, signs and by_row)
    mixed, few = tasks > 1, rows <= mt.FEW_ROWS  # few rows are split along K
    signature = {
        "x": POINTERS[dtype], "base": POINTERS[dtype], "shared": POINTERS[shared],
        "scales": "*fp32" if shared == torch.int8 else None, "masks": "*i64",
        "signs": "*i64" if signs else None, "gains": "*fp32",
        "bias": None if few else POINTERS[dtype], "out": "*fp32" if few else POINTERS[dtype],
        "task": "i32", "task_of_row": "*i64" if mixed else None,
        "order": None if few or not mixed else "*i32",
        "bounds": None if few or not mixed else "*i32", "rows": "i32", "columns": "i32",
        "groups": "i32", "tasks": "i32", "x_stride": "i32", "steps": "i32",
    }
    constexprs = {"BY_ROW": by_row, "TASKS": 16, "GROUP": group, "BLOCK_M": tiles.m,
                  "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False}
    return Case(name, mt.matmul_kernel, signature, constexprs, options)


def cases():
    """Every kernel: the name of a matmul says rows, the dtypes of base and shared vector, and what
    else its tasks have."""
    bf16, f16, f32, i8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
    for rows, tasks in [("one", 1), ("few", 9), ("many", 9)]:
        n = 1024 if rows == "many" else 32 if tasks > 1 else 1
        yield matmul_case(f"{rows} bf16 bf16", n, tasks, bf16, bf16)
        yield matmul_case(f"{rows} bf16 int8", n, tasks, bf16, i8)
        yield matmul_case(f"{rows} bf16 ternary", n, tasks, bf16, signs=True)
        yield matmul_case(f"{rows} bf16 int8 ternary by row", n, tasks, bf16, i8, True, True)
        yield matmul_case(f"{rows} f32 f32", n, tasks, f32, f32)
    yield matmul_case("many f16 f16", 1024, 9, f16, f16)
    for rows, tasks, n in [("one", 1, 1), ("few", 9, 32), ("many", 9, 1024)]:
        yield matmul_case(f"odd {rows} bf16 int8", n, tasks, bf16, i8, group=1)
    odd = matmul_case("odd column", 1, 1, bf16, i8, by_row=True)
    ones = {"columns": 1, "groups": 1, "x_stride": 1}  # Triton makes constants of them
    yield odd._replace(constexprs=odd.constexprs | ones)
    yield Case("sum", mt.sum_kernel, {"parts": "*fp32", "bias": "*bf16", "out": "*bf16",
                                      "columns": "i32", "splits": "i32"}, {"BLOCK": 512}, {})
    yield Case("group", mt.group_kernel, {"task_of_row": "*i64", "order": "*i32", "bounds": "*i32",
                                          "rows": "i32", "tasks": "i32"}, {"BLOCK": 1024}, {})


def compile_case(case, architecture):
    names = case.kernel.arg_names
    constants = {name: None for name, kind in case.signature.items() if kind is None}
    constants |= case.constexprs
    signature = {name: "constexpr" if name in constants else case.signature[name] for name in names}
    known = () if case.name.startswith("odd") else ARGUMENTS
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                  if signature[name][0] == "*" or name in known}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(case.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)


def resources(cubin) -> dict:
    """Registers and bytes of stack (which is where spills are) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True,
                              text=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}


def inspect(case, architecture) -> dict:
    compiled = compile_case(case, architecture)
    ptx = compiled.asm["ptx"]
    return {
        "name": case.name, "architecture": architecture, **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps,
        "tensor_cores": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma\.", ptx)),
        "fma": len(re.findall(r"fma\.rn\.f32", ptx)),
        "local": len(re.findall(r"\.local\b", ptx)),
        "loads_of_16_bytes": len(re.findall(
            r"ld\.global[.\w]*\.v4\.b32|cp\.async\.cg\.shared\.global .*0x10\b", ptx)),
    }


if __name__ == "__main__":
    for architecture in map(int, sys.argv[1:] or [90]):
        for case in cases():
            print(json.dumps(inspect(case, architecture)), flush=True)
