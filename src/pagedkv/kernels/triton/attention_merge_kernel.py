"""Merges what the chunks of a cut tile left: the second launch of an attention call whose work has merges."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..attention_plan import DeviceWork
from .language import LOG2E
from .variant import Variant

__all__ = ["Partials", "compile_variants", "merge_partials", "new_partials"]

_BLOCK_CHUNKS = 16
_BLOCK_STATS = 128
_MAX_COLUMNS = 128


class Partials(NamedTuple):
    """What items leave of rows that others compute, too.

    Shapes: sums [R, Hk, Dv] float32, contiguous, values times weights, not yet divided; stats [R, Hk, 2] float32,
            contiguous: the highest logit m of the chunk (natural units) and the sum of weights exp(logit - m).
            R partial rows. A row that sees no key of the chunk: zeros, -inf and 0.
    """

    sums: torch.Tensor
    stats: torch.Tensor


def new_partials(work: DeviceWork, num_kv_heads: int, value_dim: int) -> Partials | None:
    """Memory for the partial rows of a call, None if its work has no merges."""
    if not work.num_partial_rows or not work.merges.shape[0]:
        return None
    shape = work.num_partial_rows, num_kv_heads
    return Partials(
        torch.empty(*shape, value_dim, dtype=torch.float32, device=work.merges.device),
        torch.empty(*shape, 2, dtype=torch.float32, device=work.merges.device),
    )


def merge_partials(
    partials: Partials,
    merges: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    group: int,
    sinks: torch.Tensor | None = None,
    value_scale: float = 1.0,
) -> None:
    """Fills the rows of out [T, Hk * group, Dv] (any float dtype) and lse [T, Hk * group] that `merges` [m, 5] names.

    Both contiguous, as are sinks [Hk * group] float32, which join the denominators here, once; the device is current.
    """
    num_kv_heads, value_dim = partials.sums.shape[1:]
    columns = _columns(value_dim)
    num_programs = merges.shape[0] * num_kv_heads * triton.cdiv(value_dim, columns)
    if not num_programs:
        return
    _merge_partials[(num_programs,)](
        partials.sums,
        partials.stats,
        merges,
        sinks,
        out,
        lse,
        value_scale,
        out.shape[0],
        num_kv_heads,
        group,
        value_dim,
        BLOCK_CHUNKS=_BLOCK_CHUNKS,
        BLOCK_STATS=_BLOCK_STATS,
        BLOCK_COLUMNS=columns,
        num_warps=4,
    )


def _columns(value_dim: int) -> int:
    return min(int(triton.next_power_of_2(value_dim)), _MAX_COLUMNS)


@triton.jit(do_not_specialize=["num_tokens"])
def _merge_partials(
    Sums,
    Stats,
    Merges,
    Sinks,
    Out,
    Lse,
    value_scale,
    num_tokens,
    num_kv_heads,
    group,
    value_dim,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A program merges BLOCK_COLUMNS columns of one row and head."""
    num_blocks = tl.cdiv(value_dim, BLOCK_COLUMNS)
    program = tl.program_id(0)
    block = program % num_blocks
    kv_head = (program // num_blocks) % num_kv_heads
    merge = Merges + (program // num_blocks // num_kv_heads).to(tl.int64) * 5
    num_chunks = tl.load(merge + 4)
    token = tl.load(merge)
    if (num_chunks <= 0) | (token >= num_tokens):
        return
    head = kv_head * group + tl.load(merge + 1)
    row = token.to(tl.int64) * num_kv_heads * group + head
    # Rows of [R, Hk] from one chunk to the next.
    first = tl.load(merge + 2).to(tl.int64) * num_kv_heads + kv_head
    step = tl.load(merge + 3).to(tl.int64) * num_kv_heads

    stats = tl.arange(0, BLOCK_STATS)
    highest = tl.full((), float("-inf"), tl.float32)
    if Sinks is not None:
        sink = tl.load(Sinks + head)
        highest = sink
    for start in range(0, num_chunks, BLOCK_STATS):
        maxima = tl.load(
            Stats + (first + (start + stats) * step) * 2, mask=start + stats < num_chunks, other=float("-inf")
        )
        highest = tl.maximum(highest, tl.max(maxima, 0))
    # A row that has seen nothing: exp(-inf - -inf) would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)

    chunks = tl.arange(0, BLOCK_CHUNKS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.full((), 0.0, tl.float32)
    if Sinks is not None:
        total += tl.exp2((sink - base) * LOG2E)
    result = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        partial = first + (start + chunks) * step
        exists = start + chunks < num_chunks
        weights = tl.exp2((tl.load(Stats + partial * 2, mask=exists, other=float("-inf")) - base) * LOG2E)
        total += tl.sum(weights * tl.load(Stats + partial * 2 + 1, mask=exists, other=0.0), 0)
        sums = tl.load(
            Sums + partial[:, None] * value_dim + columns[None, :],
            mask=exists[:, None] & (columns < value_dim)[None, :],
            other=0.0,
        )
        result += tl.sum(sums * weights[:, None], 0)
    # Not `total > 0`: a NaN must show.
    is_empty = total == 0
    total = tl.where(is_empty, 1.0, total)
    result = tl.where(is_empty, 0.0, result * tl.math.div_rn(1.0, total) * value_scale)
    tl.store(Out + row * value_dim + columns, result.to(Out.dtype.element_ty), mask=columns < value_dim)
    if Lse is not None:
        tl.store(Lse + row, tl.where(is_empty, float("-inf"), base + tl.log(total)), mask=block == 0)


def compile_variants() -> list[Variant]:
    """One row of heads with sinks, and the wide one of MLA."""
    pointers = {"Sums": "*fp32", "Stats": "*fp32", "Merges": "*i32", "Sinks": "*fp32", "Out": "*bf16", "Lse": "*fp32"}
    numbers = {"value_scale": "fp32", "num_tokens": "i32", "num_kv_heads": "i32", "group": "i32", "value_dim": "i32"}
    blocks = {"BLOCK_CHUNKS": _BLOCK_CHUNKS, "BLOCK_STATS": _BLOCK_STATS}
    return [
        Variant(
            f"merge-{value_dim}{'-sinks' if has_sinks else ''}",
            _merge_partials,
            {name: kind for name, kind in {**pointers, **numbers}.items() if has_sinks or name not in ("Sinks", "Lse")},
            {
                **blocks,
                "BLOCK_COLUMNS": _columns(value_dim),
                **({} if has_sinks else {"Sinks": None, "Lse": None}),
            },
            frozenset({*pointers, "value_dim"}),
        )
        for value_dim, has_sinks in ((128, True), (512, False))
    ]
