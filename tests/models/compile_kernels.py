"""Compiles the kernels for a GPU of compute capability 9.0, which need not be there, for bfloat16,
and prints a line for each: its name, and the instructions by which it reads and writes memory."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_train.models import norm_kernels, pool_kernels

TARGET = GPUTarget("cuda", 90, 32)
ACTIVATIONS = ("x", "plus", "y", "grad", "of_x", "of_plus")
NUMBERS = ("eps", "momentum")
#: Known to be multiples of 16: addresses, and the number of channels.
SIZES = ("rows", "pixels", "per_program", "of_parts", "depth", "height", "width")
TYPES = {"real": "*i1", "taps": "*u8", "steps": "*i64"}


def compile_kernel(kernel: Any, **constants: Any) -> None:
    signature, known, aligned = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(number,)] = "constexpr", constants[name]
            continue
        if name in ACTIVATIONS:
            signature[name] = "*bf16"
        elif name == "channels" or name.endswith(SIZES):
            signature[name] = "i32"
        else:
            signature[name] = TYPES.get(name, "fp32" if name in NUMBERS else "*fp32")
        if signature[name].startswith("*") or name == "channels":
            aligned[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=known, attrs=aligned)
    code = triton.compile(source, target=TARGET).asm["ptx"]
    print(kernel.fn.__name__, *sorted(set(re.findall(r"\b(?:ld|st)\.global[.\w]*", code))))


def main() -> None:
    tile = {"TILE_ROWS": 64, "TILE_CHANNELS": 64}
    alone = {"y": None, "of_plus": None}
    compile_kernel(norm_kernels.sums_kernel, **tile)
    compile_kernel(norm_kernels.output_kernel, RELU=True, **tile)
    compile_kernel(norm_kernels.output_kernel, RELU=True, plus=None, real=None, **tile)
    compile_kernel(norm_kernels.gradient_sums_kernel, RELU=True, **tile)
    compile_kernel(norm_kernels.gradient_sums_kernel, RELU=True, real=None, **alone, **tile)
    compile_kernel(norm_kernels.gradients_kernel, RELU=True, **tile)
    compile_kernel(norm_kernels.gradients_kernel, RELU=True, real=None, **alone, **tile)
    few = {"PARTS_AT_ONCE": 128, "TILE_CHANNELS": 16}
    compile_kernel(norm_kernels.gradient_vectors_kernel, **few)
    tile = {"TILE_ROWS": 32, "TILE_CHANNELS": 64}
    compile_kernel(pool_kernels.pool_kernel, **tile)
    compile_kernel(pool_kernels.pool_gradient_kernel, **tile)


if __name__ == "__main__":
    main()
