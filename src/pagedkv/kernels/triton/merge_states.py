"""merge_states on a GPU: a program folds the states of a block of rows, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .language import LOG2E
from .runtime import IS_INTERPRETED, on_device
from .variant import Variant

__all__ = ["compile_variants", "merge_states"]

# Elements of a program: 8 a thread, 16 bytes of bfloat16. Interpreted, a program costs by its steps, not by its size.
_BLOCK = 16384 if IS_INTERPRETED else 1024
_NUM_WARPS = 4


def merge_states(values: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, out_lse: torch.Tensor) -> None:
    """Fills out and out_lse, both contiguous; everything is checked."""
    num_tokens, num_states, num_heads, dim = values.shape
    num_rows = num_tokens * num_heads
    blocks = _blocks(dim)
    num_programs = triton.cdiv(num_rows, blocks["BLOCK_ROWS"]) * max(triton.cdiv(dim, blocks["BLOCK_COLUMNS"]), 1)
    if not num_programs:
        return
    with on_device(values):
        _merge_states[(num_programs,)](
            values,
            lse,
            out,
            out_lse,
            num_rows,
            num_states,
            num_heads,
            dim,
            *values.stride()[:3],
            *lse.stride(),
            **blocks,
            num_warps=_NUM_WARPS,
        )


def _blocks(dim: int) -> dict[str, int]:
    columns = min(triton.next_power_of_2(max(dim, 1)), 1024)
    return {"BLOCK_ROWS": _BLOCK // columns, "BLOCK_COLUMNS": columns}


# A new number of rows or states must not compile another kernel, in the middle of a capture for one.
@triton.jit(do_not_specialize=["num_rows", "num_states"])
def _merge_states(
    Values,
    Lse,
    Out,
    Out_lse,
    num_rows,
    num_states,
    num_heads,
    dim,
    stride_values_token,
    stride_values_state,
    stride_values_head,
    stride_lse_token,
    stride_lse_state,
    stride_lse_head,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A program merges BLOCK_COLUMNS columns of BLOCK_ROWS rows; row = token * num_heads + head."""
    num_blocks = tl.maximum(tl.cdiv(dim, BLOCK_COLUMNS), 1)
    program = tl.program_id(0)
    block = program % num_blocks
    row = (program // num_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_exists = row < num_rows
    exists = row_exists[:, None] & (column < dim)[None, :]
    token, head = row // num_heads, row % num_heads
    lse_at = token * stride_lse_token + head * stride_lse_head
    values_at = (token * stride_values_token + head * stride_values_head)[:, None] + column[None, :]

    highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for _ in tl.range(0, num_states, loop_unroll_factor=2):
        lse = tl.load(Lse + lse_at, mask=row_exists, other=float("-inf"))
        values = tl.load(Values + values_at, mask=exists, other=0.0).to(tl.float32)
        # Steps from state to state: a product of their number might be beyond 32 bits.
        Lse += stride_lse_state
        Values += stride_values_state
        new_highest = tl.maximum(highest, lse)
        # Rows that have seen no key yet keep the scale at 0: exp(-inf - -inf) would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        old, new = tl.exp2((highest - base) * LOG2E), tl.exp2((lse - base) * LOG2E)
        # What a state without keys holds may be NaN; a NaN of one that has some must show.
        values = tl.where((lse != float("-inf"))[:, None], values, 0.0)
        total = total * old[:, None] + values * new[:, None]
        weight_sum = weight_sum * old + new
        highest = new_highest

    is_empty = weight_sum == 0
    weight_sum = tl.where(is_empty, 1.0, weight_sum)
    total = tl.where(is_empty[:, None], 0.0, tl.math.div_rn(total, weight_sum[:, None]))
    tl.store(Out + row[:, None] * dim + column[None, :], total.to(Out.dtype.element_ty), mask=exists)
    merged = tl.where(is_empty, float("-inf"), highest + tl.log(weight_sum))
    tl.store(Out_lse + row, merged, mask=row_exists & (block == 0))


def compile_variants() -> list[Variant]:
    """Each dtype, narrow and wide rows."""
    numbers = ["num_rows", "num_states", "num_heads", "dim"]
    strides = [f"stride_values_{axis}" for axis in ("token", "state", "head")]
    strides += [f"stride_lse_{axis}" for axis in ("token", "state", "head")]
    return [
        Variant(
            f"merge-states-{dtype}-{dim}",
            _merge_states,
            {
                **{"Values": f"*{dtype}", "Lse": "*fp32", "Out": f"*{dtype}", "Out_lse": "*fp32"},
                **dict.fromkeys([*numbers, *strides], "i32"),
            },
            _blocks(dim),
            frozenset({"Values", "Lse", "Out", "Out_lse", "dim", *strides[:3]}),
            _NUM_WARPS,
        )
        for dtype, dim in (("fp32", 128), ("fp16", 128), ("bf16", 128), ("bf16", 512))
    ]
