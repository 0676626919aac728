"""The kernel that measures how fast a GPU reads."""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.kernels.triton import runtime  # noqa: F401  (corrects the interpreter before the first kernel)
from pagedkv.kernels.triton.variant import Variant

__all__ = ["BLOCK", "compile_variants", "read_kernel"]

BLOCK = 8192


@triton.jit
def read_kernel(source, sums, num_blocks, num_programs, BLOCK: tl.constexpr):
    """Sums of int32, so that every byte is needed; program p takes blocks p, p + num_programs, ..."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in tl.range(program, num_blocks, num_programs, num_stages=4):
        total += tl.load(source + (block * BLOCK + at))
    tl.store(sums + program, tl.sum(total, 0))


def compile_variants() -> list[Variant]:
    """For the compile tests."""
    signature = {"source": "*i32", "sums": "*i32", "num_blocks": "i32", "num_programs": "i32"}
    aligned = frozenset({"source", "sums", "num_blocks", "num_programs"})
    return [Variant("read", read_kernel, signature, {"BLOCK": BLOCK}, aligned, num_warps=8)]
