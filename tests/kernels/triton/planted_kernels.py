"""Kernels that the compile test must refuse, and one that it must not."""

import os

import triton
import triton.language as tl

from pagedkv.kernels.triton.variant import Variant


@triton.jit
def _add_one(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n) + 1.0, mask=at < n)


@triton.jit
def _product(left, right, target, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, depth, column = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    a = tl.load(left + row[:, None] * DEPTH + depth[None, :])
    b = tl.load(right + depth[:, None] * COLUMNS + column[None, :])
    tl.store(target + row[:, None] * COLUMNS + column[None, :], tl.dot(a, b))


@triton.jit
def _unknown_name(target):
    tl.store(target, there_is_no_such_name)  # noqa: F821


def _product_variant(name, rows, depth, columns, num_warps):
    return Variant(
        name,
        _product,
        signature={"left": "*fp16", "right": "*fp16", "target": "*fp32"},
        constexprs={"ROWS": rows, "DEPTH": depth, "COLUMNS": columns},
        aligned=frozenset({"left", "right", "target"}),
        num_warps=num_warps,
    )


def compile_variants():
    if os.environ.get("PLANTED") == "raises":
        raise RuntimeError("this module cannot say what to compile")
    if os.environ.get("PLANTED") == "nothing":
        return []
    small = {"signature": {"source": "*fp32", "target": "*fp32", "n": "i32"}, "constexprs": {"BLOCK": 128}}
    return [
        Variant("harmless", _add_one, **small),
        Variant("left-out-here", _add_one, **small, left_out={"cuda:80": "it is planted"}),
        # 64 x 256 floats of one warp: 512 registers a thread.
        _product_variant("spills", 64, 16, 256, num_warps=1),
        _product_variant("much-shared-memory", 128, 512, 64, num_warps=8),
        Variant("broken", _unknown_name, signature={"target": "*fp32"}, constexprs={}),
        Variant("wrong-parameters", _add_one, signature={"source": "*fp32", "goal": "*fp32"}, constexprs={"BLOCK": 8}),
        Variant("kills", _KillsTheCompiler(), signature={}, constexprs={}),
    ]


class _KillsTheCompiler:
    """Stands for a kernel at which a compiler aborts."""

    @property
    def arg_names(self):
        os.abort()
