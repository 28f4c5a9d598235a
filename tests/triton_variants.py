"""The Triton kernels as TritonBackend launches them, compiled ahead of time: no GPU is needed.

    python tests/triton_variants.py FOLDER ARCH ...

leaves NAME-ARCH.ptx of each there."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from tallcodec.backends import Block
from tallcodec.kernels_triton import TritonBackend

N = 4096


class Variant(NamedTuple):
    name: str
    source: ASTSource
    options: dict[str, Any]

    def compile(self, arch: int) -> Any:
        """Triton's compiled kernel: asm["ptx"], asm["cubin"]."""
        return triton.compile(self.source, GPUTarget("cuda", arch, 32), self.options)


def source_of(kernel, args, kwargs) -> ASTSource:
    """What a launch with these arguments compiles."""
    values = dict(zip(kernel.arg_names, args)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, at = values[parameter.name], (parameter.num,)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        special = not parameter.do_not_specialize and type(number) is int
        if parameter.is_constexpr or value is None or (special and value is number == 1):
            signature[parameter.name], constants[at] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if special and number % 16 == 0:
            attributes[at] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def launches() -> Iterator[tuple[str, Any]]:
    """(name, function that launches one kernel) of everything the back-end does."""
    backend = TritonBackend()

    def floats(dtype=torch.float32, n=N):
        return torch.empty(n, dtype=dtype)

    def octets(n):
        return torch.empty(n, dtype=torch.uint8)

    def block(base, shared, out=None, **options):
        out = floats(out or base)
        size = N // 8 + 16 if shared == torch.uint8 else N
        scales = floats(n=N // 128 + 1) if shared == torch.int8 else None
        return Block(N, floats(base), out, octets(N // 8 + 16), torch.empty(size, dtype=shared),
                     scales, **options)  # fmt: skip

    f32, f16, bf16, i8, signs = (torch.float32, torch.float16, torch.bfloat16, torch.int8,
                                 torch.uint8)  # fmt: skip
    rows = {"row_scales": floats(), "row_length": 128}
    for name, decoding in {
        "decode-float32": block(f32, f32),
        "decode-bfloat16": block(bf16, bf16),
        "decode-float16": block(f16, f16),
        "decode-bfloat16-int8": block(bf16, i8),
        "decode-bfloat16-signs": block(bf16, signs),
        "decode-bfloat16-int8-rows": block(bf16, i8, **rows),
        "decode-bfloat16-any-rows": block(bf16, bf16, **rows | {"row_length": 129}),
        "decode-bfloat16-of-2-to-the-32": block(bf16, bf16)._replace(n=1 << 32),
        "decode-float32-to-float16": block(f32, bf16, f16),
        "decode-bfloat16-int8-phase": block(bf16, i8, phase=37),
        "convert-float32-to-bfloat16": Block(N, floats(f32), floats(bf16)),
    }.items():
        yield name, lambda: backend.decode([decoding])
    for name, base, tasks, shared, rule in [
        ("float32", f32, [f32] * 8, f32, "published"),
        ("bfloat16", bf16, [bf16] * 8, bf16, "adapted"),
        ("bfloat16-int8", bf16, [bf16] * 8, i8, "published"),
        ("float16", f16, [f16] * 8, f16, "magnitude"),
        ("mixed", bf16, [f32, f16, bf16], f32, "published"),
    ]:
        yield f"encode-{name}", lambda: backend.encode(
            floats(base), [floats(t) for t in tasks], [0.4] * len(tasks), shared, rule)  # fmt: skip
    yield "encode-merged", lambda: backend.encode(
        floats(), [floats()], [0.4], f32, merged=floats())  # fmt: skip
    yield "sums-bfloat16-int8", lambda: backend.sums(block(bf16, i8), floats(bf16))
    masks = [octets(N // 8) for _ in range(8)]
    yield "agreement", lambda: backend.agreement(masks, N)
    yield "overlap", lambda: backend.overlap(masks, N)
    yield "consensus", lambda: backend.consensus(masks, N, 2)
    status = torch.empty(1, dtype=torch.int32)
    yield "unpack-ternary", lambda: backend.unpack_ternary(
        octets(1000), 100, torch.empty(2048, dtype=torch.int64), N, *masks[:2], status
    )
    for name, shared in [("float32", f32), ("bfloat16", bf16), ("int8", i8)]:
        scales = floats() if shared == i8 else None
        yield f"unpack-mask-{name}", lambda: backend.unpack_mask(
            octets(1000), N, floats(shared), scales, masks[0], status
        )


def variants() -> Iterator[Variant]:
    """Every kernel with the arguments it is meant for."""
    run = JITFunction.run
    launched = []

    def record(kernel, *args, grid, warmup=False, **kwargs):
        launched.append((kernel, args, kwargs))

    for name, launch in launches():
        JITFunction.run = record
        try:
            launch()
        finally:
            JITFunction.run = run
        kernel, args, kwargs = launched.pop()
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        yield Variant(name, source_of(kernel, args, kwargs), options)


if __name__ == "__main__":
    folder, *archs = sys.argv[1:]
    for variant in variants():
        for arch in archs:
            ptx = variant.compile(int(arch)).asm["ptx"]
            Path(folder, f"{variant.name}-{arch}.ptx").write_text(ptx)
